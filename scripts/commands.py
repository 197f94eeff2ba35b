"""Write docs/commands.md from the command line itself, as typer documents it: python scripts/commands.py."""

from pathlib import Path

from typer import Context
from typer.cli import get_docs_for_click
from typer.main import get_command

from wanda_dvc.cli import app

TARGET = Path(__file__).parents[1] / "docs" / "commands.md"


def page() -> str:
    """Return the page."""
    command = get_command(app)
    text = get_docs_for_click(
        obj=command, ctx=Context(command, **command.context_settings), name="wanda-dvc", title="Commands"
    )
    return text.rstrip() + "\n"


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
