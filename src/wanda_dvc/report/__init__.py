"""`wanda-dvc report`: the experiments of a repository as an HTML page and as Markdown."""

from pathlib import Path

from wanda_dvc import __version__
from wanda_dvc.errors import UserError
from wanda_dvc.reading import check_place
from wanda_dvc.study.markup import inline
from wanda_dvc.study.project import Project


def report(*, project: Project, output: Path, model: str | None = None, revs: list[str] | None = None) -> str:
    """Write `output` (HTML), a Markdown copy next to it, and a folder of pictures; return a message with the paths."""
    import matplotlib  # noqa: F401 - reports a missing library before any read
    import scipy  # noqa: F401 - likewise

    from wanda_dvc.report.chapters import content
    from wanda_dvc.report.pages import INTERVALS, heading, write
    from wanda_dvc.report.rows import collect

    check_place(output.with_name(f"{output.stem}_files"))  # before minutes of reading
    output = output.absolute()
    if output.suffix != ".html":
        raise UserError(
            f"--output: got {output.name}, expected a name that ends in .html; the .md file gets the same name"
        )
    with project.work({"kind": "report"}) as work:
        work.forget()  # left by a killed report
        work.path.mkdir(parents=True)
        collected = collect(project=project, model=model, revs=revs or [], work=work.path)
        if not collected.rows:
            waiting = "".join(f"\n{note.name}: {note.text}" for note in [*collected.unfinished, *collected.notes])
            which = f" of a model named like {model}" if model else ""
            raise UserError(f"{project.root}: no experiment{which} with results; run `dvc repro`{waiting}")
        parts = content(collected)
        work.forget()
    count, unfinished = len(collected.rows), f"{len(collected.unfinished)} unfinished or failed"
    sets = f"{count} set{'s' if count > 1 else ''} of parameters with results"
    about = f"{sets}, {unfinished}; wanda-dvc {__version__}. {INTERVALS}"
    markdown = write(output, [heading(1, f"Pruning study: {inline(project.root.name)}"), about, *parts])
    return f"{output}: {count} rows, {unfinished}; {markdown.name} says the same"
