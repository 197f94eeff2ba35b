"""`wanda-dvc report`: the experiments of a repository as an HTML page and as Markdown."""

import shutil
from pathlib import Path

from wanda_dvc import __version__
from wanda_dvc.errors import UserError
from wanda_dvc.study.project import Project


def report(*, project: Project, output: Path, model: str | None = None, revs: list[str] | None = None) -> str:
    """Write `output` (HTML), the same in Markdown beside it, and its pictures in a folder; return what was written."""
    import matplotlib  # noqa: F401 - a missing library is told before anything is read
    import scipy  # noqa: F401 - likewise

    from wanda_dvc.report.chapters import content
    from wanda_dvc.report.charts import standalone
    from wanda_dvc.report.pages import Content, Picture, Text, as_html, as_markdown
    from wanda_dvc.report.rows import collect

    output = output.absolute()
    if output.suffix != ".html":
        raise UserError(f"--output: got {output.name}, expected a name that ends in .html; the .md goes beside it")
    with project.work({"kind": "report"}) as work:
        work.forget()  # left by a report that was killed
        work.path.mkdir(parents=True)
        collected = collect(project=project, model=model, revs=revs or [], work=work.path)
        if not collected.rows:
            waiting = "".join(f"\n{one.name}: {one.state}" for one in collected.unfinished)
            notes = "".join(f"\n{note.name}: {note.text}" for note in collected.notes)
            which = f" of a model named like {model}" if model else ""
            raise UserError(f"{project.root}: no experiment{which} with results; run `dvc repro`{waiting}{notes}")
        parts: Content = content(collected)
        work.forget()
    count = len(collected.rows)
    about = (
        f"{count} set{'s' if count > 1 else ''} of parameters with results, "
        f"{len(collected.unfinished)} unfinished or failed; wanda-dvc {__version__}. Intervals are at 95 %."
    )
    parts.insert(0, Text(about))
    title = f"Pruning study: {project.root.name}"
    pictures = output.with_name(f"{output.stem}_files")
    shutil.rmtree(pictures, ignore_errors=True)
    pictures.mkdir(parents=True)
    for part in parts:
        if isinstance(part, Picture):
            (pictures / f"{part.name}.svg").write_text(standalone(part.svg), encoding="utf-8")
    output.write_text(as_html(title, parts), encoding="utf-8")
    markdown = output.with_suffix(".md")
    markdown.write_text(as_markdown(title, parts, pictures.name), encoding="utf-8")
    return f"{output}: {count} rows, {len(collected.unfinished)} unfinished or failed; {markdown.name} says the same"
