"""Write docs/commands.md from the command line itself: python scripts/commands.py."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tabulate import tabulate
from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption
from typer.main import get_command

from wanda_dvc.cli import app

TARGET = Path(__file__).parents[1] / "docs" / "commands.md"
HEAD = """\
# Commands

Every command of `wanda-dvc`, with its arguments and options. A command's `--help` prints the same.
`scripts/commands.py` writes this page from the command line.

| exit code | meaning |
| --- | --- |
| 0 | done |
| 1 | a defect of wanda-dvc; `--debug` shows the traceback |
| 2 | something that you can fix; the message says where, what was found, what was expected, and what to do |
| 128 + n | stopped by signal n; 130 after Ctrl-C |
"""


def page() -> str:
    """Return the page."""
    group = get_command(app)
    assert isinstance(group, TyperGroup)
    lines = [HEAD, "## Options of all commands\n", "They precede the command: `wanda-dvc -C study show`.\n"]
    lines.append(_table(_rows(group.params)))
    panels: dict[str, dict[str, TyperCommand]] = {}
    for name, command in group.commands.items():
        assert isinstance(command, TyperCommand)
        panels.setdefault(str(command.rich_help_panel or ""), {})[name] = command
    for panel, commands in panels.items():
        lines.append(f"## {panel}\n")
        for name, command in commands.items():
            words = " ".join(_usage(command.params))
            lines.append(f"### `{name}`\n")
            lines.append(f"{_sentence(str(command.help))}\n")
            lines.append(f"```text\nwanda-dvc {name} {words}".rstrip() + "\n```\n")
            if rows := list(_rows(command.params)):
                lines.append(_table(rows))
    return "\n".join(lines).rstrip() + "\n"


def _usage(parameters: Sequence[object]) -> Iterator[str]:
    """Yield the words after the command's name."""
    if any(isinstance(parameter, TyperOption) for parameter in parameters):
        yield "[OPTIONS]"
    for parameter in parameters:
        if isinstance(parameter, TyperArgument):
            name = parameter.metavar or str(parameter.name).upper()
            yield name if parameter.required or name.startswith("[") else f"[{name}]"


def _rows(parameters: Sequence[object]) -> Iterator[list[str]]:
    """Yield an argument's or option's name, default and meaning."""
    for parameter in parameters:
        if isinstance(parameter, TyperArgument):
            yield [f"`{parameter.metavar or str(parameter.name).upper()}`", "", _sentence(parameter.help or "")]
        elif isinstance(parameter, TyperOption):
            value = "" if parameter.is_flag else f" {parameter.opts[0].lstrip('-').upper()}"
            default = "" if parameter.is_flag or parameter.default is None else f"`{parameter.default}`"
            yield [f"`{', '.join(parameter.opts)}{value}`", default, _sentence(parameter.help or "")]


def _table(rows: Iterable[list[str]]) -> str:
    headers = ["argument or option", "default", "meaning"]
    return tabulate(list(rows), headers, tablefmt="github", disable_numparse=True) + "\n"


def _sentence(text: str) -> str:
    text = text.replace("|", "\\|")
    return text if text.endswith(".") else f"{text}."


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
