"""The command line: thin commands that validate arguments and call a function."""

import contextlib
import gc
import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wanda_dvc import __version__
from wanda_dvc.errors import PROBLEMS, UserError, explain, notice
from wanda_dvc.stages import STAGES, Stage
from wanda_dvc.stages import run as run_stage

if TYPE_CHECKING:
    from wanda_dvc.study.folder import Study


app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Prune language models: calibrate once, then prune, compare and ship.\n\n"
    "`wanda-dvc prune MODEL DIR` does it in one command. In a study (`wanda-dvc init`), `dvc repro` and "
    "`dvc exp run --temp -S sparsity=0.7` run the stages. You can run each by hand too.",
    epilog="Exit codes: 0: success; 1: a bug in wanda-dvc; 2: an error that you can fix; 128 + n: stopped by signal n.",
)
PRUNE_PANEL, STAGE_PANEL = "One command", "Stages, in the order of the pipeline"
RESULT_PANEL, STUDY_PANEL = "Results", "Studies"

MODEL_HELP = "A directory, a Hub id, or package:NAME==VERSION."
TEXT_HELP = "The calibration text: a .txt or .jsonl file, a Hub id, wikitext2, c4, ptb."
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
TextArgument = Annotated[str, typer.Argument(metavar="TEXT", help="One of `perplexity.texts`; by default all.")]
Names = Annotated[list[str] | None, typer.Argument(metavar="NAME", help="Experiments, branches, tags or commits.")]
Version = Annotated[int | None, typer.Option("--stage-version", hidden=True)]  # for dvc.yaml


def _show_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"wanda-dvc {__version__}")
        raise typer.Exit


@app.callback()
def main(
    directory: Annotated[
        Path,
        typer.Option(
            "--directory",
            "-C",
            exists=True,
            file_okay=False,
            help="The study, or a folder in it. Other paths start there.",
        ),
    ] = Path(),
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Set what all commands share: the folder and the debug mode."""
    os.chdir(directory)
    os.environ["WANDA_DVC_DEBUG"] = "1" if debug else ""


def _find_study() -> "Study":
    from wanda_dvc.study.folder import Study  # the settings' library takes a moment, and `--help` needs none

    return Study.find()


def _run(stage: Stage, version: int | None, variant: str, text: str) -> None:
    if version not in (None, stage.version):
        raise UserError(
            f"dvc.yaml: {stage.name}: version {version}, expected {stage.version}: the study is of another wanda-dvc; "
            "install that one, or make a new study with `wanda-dvc init DIR` and copy your settings"
        )
    study = _find_study()

    @contextlib.contextmanager
    def as_process(run_name: str) -> Iterator[None]:
        _prepare(run_name, network=stage.network)
        from wanda_dvc.stages.process import KEPT, NOTHING_KEPT, stoppable

        with stoppable(run_name, NOTHING_KEPT if stage.name == "apply" else KEPT):
            yield

    run_stage(stage.name, study=study, variant=variant, text=text, context=as_process)


def _prepare(label: str, *, network: bool = False) -> None:
    """Set the environment of the libraries, before their import."""
    if sys.stderr.isatty():
        notice(f"{label}: starting")  # libraries take seconds to come
    else:  # bars of libraries would fill a log; ours says a line a minute
        os.environ.update(HF_HUB_DISABLE_PROGRESS_BARS="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1")
        os.environ.setdefault("TQDM_DISABLE", "1")
    if not network:
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def _command(stage: Stage) -> Callable[..., None]:
    """Return the command of a stage, with an argument for its variant and one for a text where it has some."""
    meaning = f"{' or '.join(stage.variants)}; by default all."
    variant_argument = Annotated[str, typer.Argument(metavar=stage.argument.upper(), help=meaning)]

    def run_all(version: Version = None) -> None:
        _run(stage, version, "", "")

    def run_variant(variant: variant_argument = "", version: Version = None) -> None:
        _run(stage, version, variant, "")

    def run_text(variant: variant_argument = "", text: TextArgument = "", version: Version = None) -> None:
        _run(stage, version, variant, text)

    if any(variant.by_text for variant in stage.variants.values()):
        return run_text
    return run_variant if stage.argument else run_all


@app.command(rich_help_panel=PRUNE_PANEL)
def prune(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help=MODEL_HELP)] = None,
    directory: Annotated[Path | None, typer.Argument(metavar="DIR", help="A new or an empty directory.")] = None,
    recipe: Annotated[str | None, typer.Option(help="By default fisher; `wanda-dvc recipes` lists all.")] = None,
    sparsity: Annotated[
        str | None, typer.Option(help="0.3 or 30%, …; by default 50% of the weights, or 20% of units.")
    ] = None,
    pattern: Annotated[
        str, typer.Option(help="2:4 and other n:m; or neurons, heads, blocks, experts: a smaller model.")
    ] = "unstructured",
    size: Annotated[
        str | None, typer.Option(help="80%, 400MB, …: a smaller model, of the best measured depth and widths.")
    ] = None,
    parameters: Annotated[str | None, typer.Option(help="As --size, in parameters: 100M, 6B, …")] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help=f"{TEXT_HELP} By default c4 for a Hub id, else the embedded text. Repeatable."),
    ] = None,
    eval_text: Annotated[
        list[str] | None, typer.Option(help="A further text to measure perplexity on. Repeatable.")
    ] = None,
    recover: Annotated[str | None, typer.Option(help="Train the pruned model on this many tokens, such as 1M.")] = None,
    no_eval: Annotated[bool, typer.Option("--no-eval", help="Measure nothing.")] = False,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting of params.yaml. Repeatable.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what it fetches and needs, and stop.")] = False,
) -> None:
    """Prune a model into an ordinary Hugging Face directory, and compare it with the dense model.

    A model and a text are calibrated once, in a study in the cache folder.
    The next sparsity or pattern, and most recipes, start from the same
    statistics. An interrupted command resumes if you repeat it.

    Without MODEL it prunes SmolLM2-135M from PyPI. Without DIR the options
    give the directory its name. It measures perplexity and divergence;
    `dvc repro` in the study also runs the zero-shot tasks.
    """
    from wanda_dvc.commands.request import check_request, parse_changes
    from wanda_dvc.stages.process import stoppable

    again = "finished work is kept; run the same command again to resume"
    with stoppable("prune", again, with_children=True):
        request = check_request(
            model=model, target=directory, recipe=recipe, sparsity=sparsity, pattern=pattern, size=size,
            parameters=parameters, text=text or [], eval_text=eval_text or [], recover=recover, evaluate=not no_eval,
            changes=parse_changes(settings or []),
        )  # fmt: skip
        from wanda_dvc.commands.prune import describe_run, prune_model  # imports torch, which takes seconds

        typer.echo(describe_run(request) if dry_run else prune_model(request).text)


@app.command(rich_help_panel=RESULT_PANEL)
def show(names: Names = None, as_json: AsJson = False) -> None:
    """Show the last results of each model, or several experiments side by side, with paired tests."""
    from wanda_dvc.results.show import show as show_results

    typer.echo(show_results(study=_find_study(), names=names or [], as_json=as_json))


@app.command("list", rich_help_panel=RESULT_PANEL)
def list_experiments(as_json: AsJson = False) -> None:
    """List the experiments: state, change of settings, and the measures of the pruned models."""
    from wanda_dvc.results.listing import list_text

    typer.echo(list_text(study=_find_study(), as_json=as_json))


@app.command(rich_help_panel=RESULT_PANEL)
def stats(
    block: Annotated[int | None, typer.Option("--block", "--layer", help="Only this block, counted from 0.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the input norms by block and distinct input, with their outliers."""
    from wanda_dvc.results.stats import stats as show_statistics

    typer.echo(show_statistics(study=_find_study(), block=block, as_json=as_json))


@app.command(rich_help_panel=RESULT_PANEL)
def report(
    output: Annotated[Path, typer.Option("--output", "-o", dir_okay=False, help="The page.")] = Path("report.html"),
    rev: Annotated[list[str] | None, typer.Option(help="An experiment, commit, branch or tag; repeatable.")] = None,
) -> None:
    """Write the repository's experiments as one page: tables, pictures and intervals."""
    from wanda_dvc.results.report import report as write_report

    typer.echo(write_report(study=_find_study(), output=output, revs=rev))


@app.command(rich_help_panel=RESULT_PANEL)
def evaluate(
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH", exists=True, help="Directories of safetensors, or GGUF files.")
    ],
    as_json: AsJson = False,
) -> None:
    """Compare quantized or pruned files of the study's model with its dense model, on the study's texts and tasks."""
    study = _find_study()
    _prepare("evaluate")
    from wanda_dvc.commands.evaluate import evaluate as compare_models
    from wanda_dvc.stages.process import stoppable

    with stoppable("evaluate"):
        typer.echo(compare_models(study=study, paths=paths, as_json=as_json))


@app.command(rich_help_panel=STUDY_PANEL)
def recipes(as_json: AsJson = False) -> None:
    """List the recipes: what each reads, whether it changes kept weights, and its papers."""
    from wanda_dvc.commands.recipes import recipes_text

    typer.echo(recipes_text(as_json=as_json))


@app.command(rich_help_panel=STUDY_PANEL)
def init(
    directory: Annotated[Path, typer.Argument(help="A new or an empty directory.")] = Path(),
    preset: Annotated[str, typer.Option("--preset", help="Named settings; an unknown name lists them.")] = "default",
    model: Annotated[str | None, typer.Option(help=MODEL_HELP)] = None,
    calibration: Annotated[list[str] | None, typer.Option(help=TEXT_HELP)] = None,
    study: Annotated[Path | None, typer.Option("--from", help="Begin with a study's settings and results.")] = None,
) -> None:
    """Make a new study: pipeline, settings, git and DVC."""
    from wanda_dvc.study.scaffold import init as make_study

    typer.echo(make_study(folder=directory, preset=preset, model=model, calibration=calibration or [], study=study))


@app.command(rich_help_panel=STUDY_PANEL)
def export(
    directory: Annotated[Path, typer.Argument(help="A new or an empty directory.")],
    rev: Annotated[str | None, typer.Option(help="An experiment, commit, branch or tag; else the workspace.")] = None,
) -> None:
    """Write any experiment's pruned model and its model card, ready to upload; the workspace does not change."""
    from wanda_dvc.commands import check_target
    from wanda_dvc.stages.process import NOTHING_KEPT, stoppable

    with stoppable("export", NOTHING_KEPT):
        study = _find_study()
        check_target(study, directory)
        from wanda_dvc.commands.export import export as write_model  # imports torch, which takes seconds

        typer.echo(write_model(study=study, experiment=rev, target=directory))


@app.command(rich_help_panel=STUDY_PANEL)
def doctor(as_json: AsJson = False) -> None:
    """Check machine, libraries and settings; exit 2 if something needed is missing."""
    from wanda_dvc.commands.doctor import doctor as check

    table, passed = check(start=Path.cwd(), as_json=as_json)
    typer.echo(table)
    if not passed:
        raise typer.Exit(2)


for _stage in STAGES.values():  # last in --help
    app.command(_stage.name, help=_stage.about, rich_help_panel=STAGE_PANEL)(_command(_stage))


def run() -> None:
    """Run the command line and end the process: errors are lines, not tracebacks. `--help` has the exit codes."""
    # Torch and transformers make a million objects that stay. The garbage collector would visit them again and again
    # during the imports, and Python would free each at the end: two of the six seconds of a stage that does nothing.
    gc.set_threshold(100_000)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # not all terminals have UTF-8
    try:
        for argument in sys.argv[1:]:
            if argument == "" or re.fullmatch(r"--[a-z-]+=", argument):  # an unset variable must not choose a default
                raise UserError(f"{argument or repr('')}: has no value; give one, or leave the argument out")
        app()
    except SystemExit as end:  # how typer ends
        if "torch" not in sys.modules:
            raise
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else int(end.code is not None))
    except Exception as error:
        if os.environ.get("WANDA_DVC_DEBUG"):
            raise
        bug = (
            f"wanda-dvc {__version__}: {type(error).__name__}: {error}",
            "This is a bug in wanda-dvc; `wanda-dvc --debug …` prints the traceback.",
        )
        problems = explain(error)
        message = "\n".join(problems or bug)
        notice(message)
        if PROBLEMS in os.environ:
            Path(os.environ[PROBLEMS]).write_text(message, encoding="utf-8")
        sys.exit(2 if problems else 1)
