"""Write docs/commands.md from the command line itself, as typer documents it: python scripts/commands.py."""

import re
from pathlib import Path

from typer import Context
from typer.cli import get_docs_for_click
from typer.core import TyperGroup, TyperOption
from typer.main import get_command

from wanda_dvc.cli import app
from wanda_dvc.stages import STAGES

TARGET = Path(__file__).parents[1] / "docs" / "commands.md"
FIRST = "prune"  # the command whose options are on the page
# What typer repeats for each command, in the order in which it goes.
WITHOUT = (
    r"\* `(-h, --help|--(install|show)-completion)`: .*\n",
    r"\*\*Commands\*\*:\n\n(\* .*\n)+\n",
    r"\*\*(Usage|Arguments|Options)\*\*:\n\n",
    r"```console\n\$ wanda-dvc .*\n```\n\n",
    r"\n(?=\n\n)",
)


def page() -> str:
    """Return the page."""
    command = get_command(app)
    assert isinstance(command, TyperGroup)
    text = get_docs_for_click(
        obj=command, ctx=Context(command, **command.context_settings), name="wanda-dvc", title="Commands"
    )
    for repeated in WITHOUT:
        text = re.sub(repeated, "", text)
    text = re.sub(r"(\n\* `[^`]*) <[^`]*>`", r"\1`", text)  # types
    before, *described = re.split(r"(?=^## )", text, flags=re.MULTILINE)
    head = before[before.index("\n* ") + 1 :]
    first = next(one for one in described if one.startswith(f"## `wanda-dvc {FIRST}`"))
    title, about, *_ = first.split("\n\n")
    options = first[first.index("\n* ") + 1 :].rstrip()
    others = [_line(name, command) for name in command.commands if name not in STAGES and name != FIRST]
    stages = ", ".join(f"`{stage}`" for stage in STAGES)
    return "\n".join(
        [
            f"# Commands\n\n`--help` after a command describes it and its options.\n\n{head.rstrip()}\n",
            f"{title}\n\n{about}\n\n{options}\n\n## Other commands\n",
            *others,
            f"\n## Stages\n\n{stages}: `dvc repro` runs them in this order ([what each does]"
            "(how-it-works.md#the-pipeline)).\n",
        ]
    )


def _line(name: str, group: TyperGroup) -> str:
    """Return a command with its arguments and options, and what it does."""
    command = group.commands[name]
    context = Context(command, info_name=name)
    arguments = [re.sub(r"[{}]", "", piece).upper() for piece in command.collect_usage_pieces(context)[1:]]
    options = [one.opts[0] for one in command.params if isinstance(one, TyperOption) and not one.hidden]
    return f"* `{' '.join([name, *arguments, *options])}`: {command.get_short_help_str(limit=1000)}"


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
