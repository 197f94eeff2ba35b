"""Write docs/commands.md from the command line itself, as typer documents it: python scripts/commands.py."""

import re
from pathlib import Path

from typer import Context
from typer.cli import get_docs_for_click
from typer.main import get_command

from wanda_dvc.cli import app
from wanda_dvc.stages import STAGES

TARGET = Path(__file__).parents[1] / "docs" / "commands.md"
# What typer repeats for each command, in the order in which it goes.
WITHOUT = (
    r"\* `(-h, --help|--(install|show)-completion)`: .*\n",
    r"\*\*Commands\*\*:\n\n(\* .*\n)+\n",  # the headings, cut to a few words
    r"\*\*(Usage|Arguments|Options)\*\*:\n\n",
    r"```console\n\$ wanda-dvc [a-z-]+ .*\n```\n\n",  # the arguments are listed
    r"\n(?=\n\n)",
)


def page() -> str:
    """Return the page."""
    command = get_command(app)
    text = get_docs_for_click(
        obj=command, ctx=Context(command, **command.context_settings), name="wanda-dvc", title="Commands"
    )
    for repeated in WITHOUT:
        text = re.sub(repeated, "", text)
    text = re.sub(r"(\n\* `\[?[A-Za-z][^ `]*) <[^`]*>", r"\1", text)  # the types of arguments
    for stage in STAGES:
        text = text.replace(f"## `wanda-dvc {stage}`", f"### `wanda-dvc {stage}`")
    before, first, after = text.partition(f"### `wanda-dvc {next(iter(STAGES))}`")
    return f"{before}## Stages\n\nIn the order of the pipeline. `dvc repro` runs them.\n\n{first}{after.rstrip()}\n"


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
