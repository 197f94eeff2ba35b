"""The documentation: its commands are the command line's, its links lead somewhere, its code compiles."""

import ast
import importlib
import itertools
import logging
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote

import pages
import pytest
import readme
from conftest import ROOT, Patch, git, read_preset, save_tiny_model
from page_blocks import Block, blocks, without_blocks
from repository import Repository
from ruamel.yaml import YAML
from typer.core import TyperGroup
from typer.main import get_command

from wanda_dvc.cli import app
from wanda_dvc.errors import UserError
from wanda_dvc.params import flatten, read_params
from wanda_dvc.stages import STAGES

LISTED = git(ROOT, "ls-files", "--cached", "--others", "--exclude-standard", "*.md").split()
PAGES = sorted({page for page in LISTED if (ROOT / page).exists()})
GUIDES = [page for page in PAGES if page in ("README.md", "CONTRIBUTING.md") or page.startswith("docs/")]
# What a page's own package adds, and its substitute here.
PACKAGED = {f"++method={added}deviation": f"++method={added}ria" for added in ("", "wanda,")}
SEPARATORS = {"&&", "||", "|", ";", "&"}


def split(line: str) -> Iterator[list[str]]:
    """The commands of a line, as words, without its comment."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    for separates, words in itertools.groupby(lexer, SEPARATORS.__contains__):
        if not separates:
            yield list(words)


def lines(block: Block) -> Iterator[list[str]]:
    if block.language in ("", "bash"):
        for line in block.text.replace("\\\n", " ").splitlines():
            yield from split(line)


def commands(page: str) -> Iterator[list[str]]:
    """The commands of a page's shell blocks."""
    return itertools.chain.from_iterable(lines(block) for block in blocks(page))


def mentions(page: str) -> Iterator[list[str]]:
    """The commands that a page's sentences give with options; others are named, like `dvc plots`, not given.

    Options alone are those of an experiment or of `prune`.
    """
    text = without_blocks((ROOT / page).read_text(encoding="utf-8"))
    of_prune = "--(?:recipe|pattern|recover|text|eval-text|sparsity) "
    for options, command in ("-S ", "dvc exp run --temp"), (of_prune, "wanda-dvc prune MODEL DIR"):
        for span in re.findall(rf"`({options}[^`\n<]+)`", text):
            yield from split(f"{command} {span}")
    for span in re.findall(r"`((?:wanda-dvc|dvc|make) [^`\n]+)`", text):
        if (" -" in span or span.startswith("make")) and not {"…", "["} & set(span):
            yield from split(span)


def anchors(page: Path) -> set[str]:
    """The fragments that GitHub gives to a page's headings."""
    found: set[str] = set()
    text = without_blocks(page.read_text(encoding="utf-8"))
    for heading in re.findall(r"^#+ +(.*?) *#*$", text, flags=re.MULTILINE):
        slug = pages.slug(heading)
        names = itertools.chain([slug], (f"{slug}-{number}" for number in itertools.count(1)))
        found.add(next(name for name in names if name not in found))
    return found


def check_settings(overrides: list[str]) -> None:
    """Write them into params.yaml as `dvc exp run -S` does, and refuse what a stage would then refuse."""
    from dvc.utils.hydra import apply_overrides, get_hydra_sweeps

    for sweep in get_hydra_sweeps({"params.yaml": overrides}):
        with tempfile.TemporaryDirectory() as folder:
            path = shutil.copy(ROOT / "params.yaml", folder)
            apply_overrides(path, sweep["params.yaml"])
            read_params(Path(path))


def check_wanda_dvc(words: list[str]) -> None:
    group = get_command(app)
    assert isinstance(group, TyperGroup)
    locked = {option for parameter in group.params for option in parameter.opts} | {"--help"}
    at = next((index for index, word in enumerate(words) if word in group.commands), None)
    if set(words) <= locked:
        return
    assert at is not None, f"no command among {', '.join(group.commands)}"
    group.make_context("wanda-dvc", ["." if word == "STUDY" else word for word in words[: at + 1]])  # runs nothing
    group.commands[words[at]].make_context(words[at], words[at + 1 :])


def check_dvc(words: list[str]) -> None:
    from dvc.cli import parse_args

    logging.disable()  # DVC's handler raises where another test has closed the stream that it logs to
    try:
        arguments = parse_args(words)
    finally:
        logging.disable(logging.NOTSET)
    check_settings([PACKAGED.get(given, given) for given in getattr(arguments, "set_param", None) or []])
    stages = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    if words[0] == "repro":
        assert {target.partition("@")[0] for target in arguments.targets} <= stages.keys()


def check_make(words: list[str]) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    asked = {word for word in words if "=" not in word}
    assert asked <= targets, f"the Makefile has {', '.join(sorted(targets))}"


def check_python(words: list[str]) -> None:
    scripts = [word for word in words if word.endswith(".py")]
    assert all((ROOT / script).is_file() for script in scripts)


CHECKS = {"wanda-dvc": check_wanda_dvc, "dvc": check_dvc, "make": check_make, "python": check_python}


def problem(words: list[str]) -> str | None:
    """What is wrong with a command; None where nothing is, or where the command is another program's."""
    program, *rest = words
    try:
        if program in CHECKS:
            CHECKS[program](rest)
    except UserError as error:
        return f"{shlex.join(words)}: {'; '.join(error.problems)}"
    except Exception as error:  # each parser has its own
        if not str(error).endswith("does not exist."):  # a file of the reader
            return f"{shlex.join(words)}: {type(error).__name__}: {error.__cause__ or error}"
    return None


@pytest.mark.parametrize("page", GUIDES)
def test_every_command_of_a_page_is_one_that_the_command_line_takes(page: str):
    assert [found for words in (*commands(page), *mentions(page)) if (found := problem(words))] == []


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("wanda-dvc shrink", "no command among"),
        ("wanda-dvc stats --blocks 3", "No such option: --blocks"),
        ("dvc exp walk", "DvcParserError"),
        ("dvc repro prune", "AssertionError"),
        ("dvc exp run -S sparsety=0.7", "Could not override 'sparsety'"),
        ("dvc exp run --queue -S 'sparsity=0.3,1.5'", "sparsity: found 1.5, expected less than 1"),
        ("dvc exp run -S ++method=sparse", 'method: found "sparse"'),
        ("make pruned", "the Makefile has bench"),
        ("python benchmarks/no.py", "AssertionError"),
    ],
)
def test_a_wrong_command_is_found(line: str, said: str):
    found = problem(shlex.split(line))
    assert found is not None
    assert said in found


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_leads_to_a_file_and_its_heading(page: str):
    text = re.sub(r"`[^`\n]*`", "`code`", without_blocks((ROOT / page).read_text(encoding="utf-8")))
    links = re.findall(r"\]\(([^)\s]+)", text) + re.findall(r"""(?:src|srcset|href)=["']([^"']+)["']""", text)
    broken = []
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        path, _, fragment = unquote(link).partition("#")
        target = ROOT / Path(page).parent / path if path else ROOT / page
        if not target.exists() or (fragment and target.suffix == ".md" and fragment not in anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", GUIDES)
def test_every_python_block_compiles(page: str):
    for block in blocks(page):
        if block.language == "python":
            ast.parse(block.text)


PRUNE = "wanda-dvc prune HuggingFaceTB/SmolLM2-135M-Instruct"
# Where a command is not run, and why. A page stands for all of its commands.
NOT_RUN = {
    "CONTRIBUTING.md": "makes the environment that the tests are running in, and runs them",
    "wanda-dvc evaluate models/pruned model-Q4_K_M.gguf": "test_evaluate.py measures a directory and GGUF files",
    "wanda-dvc evaluate --json /data/other-pruned": "likewise",
    "docs/add-a-method.md": "test_catalog.py installs the page's package and prunes with it",
    "docs/results.md": "measures the real model for hours; data.md adds a text, and compare.md changes the recipe",
    "docs/install.md": "test_wheel.py and scripts/wheel.sh install the wheel; test_init.py begins studies",
    "docs/python.md": "test_experiments.py runs it as one notebook",
    "python3 -m venv .venv": "test_wheel.py and scripts/wheel.sh install the wheel",
    **dict.fromkeys((". .venv/bin/activate", "pip install .[report]"), "likewise"),
    "pip install .[ray]": "the tests that need it say that it is not installed",
    "wanda-dvc prune --pattern neurons": "test_prune.py prunes tiny models",
    "wanda-dvc prune MODEL OUT --pattern neurons --text FILE": "likewise",
    "wanda-dvc prune MODEL OUT --sparsity 50%": "likewise",
    "wanda-dvc init ../study": "test_init.py begins studies",
    **dict.fromkeys((f"{PRUNE} sparse --recipe wanda", f"{PRUNE} sparser --recipe wanda --sparsity 70%"), "likewise"),
    "wanda-dvc init study --model Qwen/Qwen3-0.6B": "likewise; test_init.py makes that study",
    "wanda-dvc init grid --preset llama-2-7b": "test_init.py makes studies of presets",
    "wanda-dvc init paper-table --preset paper": "likewise",
    "wanda-dvc init ../second --model /data/smaller": "test_init.py begins studies",
    **dict.fromkeys(
        ("cd study", "cd ../study", "cd grid", "cd paper-table", "cd ../second"), "the tests run in a study"
    ),
    "dvc exp run --temp -S ++runtime.ray=local -S sparsity=0.55": "test_cluster.py runs all stages as tasks",
    "make test": "this is one of its tests",
    "dvc exp run --temp -S model=Qwen/Qwen2.5-0.5B": "needs the Hub",
    "dvc exp run --temp -S +perplexity.texts.ptb.source=ptb -S ~perplexity.texts.embedded": "needs the Hub",
    "wanda-dvc prune MODEL /data/smaller --pattern experts --sparsity 25%": "test_experts.py prunes mixtures",
    "dvc remote add --default team /mnt/team/wanda": "test_local_sources.py pushes, clones and pulls",
    **dict.fromkeys(("git commit -m Name the remote", "dvc push", "git push -u origin HEAD"), "likewise"),
    "dvc exp run --temp -S pattern=2:4": "test_units.py prunes a smaller model in a second study",
    "dvc queue start": "runs experiments in the background; test_pipeline.py runs a queue",
    "dvc queue kill NAME": "needs a worker that was killed; test_crashes.py kills stages",
}
TASKS = "dvc exp run --temp -S tasks.names=[piqa,arc_easy]"
PAPER = "docs/paper.md"
TUTORIALS = ("docs/dvc.md", PAPER)
CONTEXT = 4096  # of LLaMA-2
QUEUE = "dvc exp run --queue -S tasks.names=[]"
GRID = "dvc exp run --queue -S sparsity=0.3,0.5,0.7"
# What others are in a tiny study.
AS_RUN = {
    "make repro": "dvc repro",
    f"{PRUNE} smaller --pattern neurons": "wanda-dvc export smaller",
    "wanda-dvc stats --block 12": "wanda-dvc stats --block 1",
    f"{TASKS} -S ++tasks.limit=20": f"{TASKS} -S ++tasks.limit=4",
    f"{QUEUE} -S recipe=wanda-paper,sparsegpt-paper,magnitude": "dvc exp run --temp -S recipe=sparsegpt-paper",
    f"{QUEUE} -S pattern=2:4,4:8 -S recipe=wanda-paper,sparsegpt-paper,magnitude": (
        "dvc exp run --temp -S pattern=2:4 -S recipe=magnitude"
    ),
    f"{GRID} -S recipe=magnitude,wanda": "dvc exp run --queue -S sparsity=0.3,0.7",
    f"{GRID} -S recipe=magnitude-rows,wanda-paper": "dvc exp run --queue -S sparsity=0.3,0.7",
}
# What commands print, by their first words: an exit code of 0 is not enough.
SAID = {
    **dict.fromkeys(("wanda-dvc show", "wanda-dvc list", "wanda-dvc prune", "dvc metrics diff"), "perplexity"),
    "wanda-dvc stats": "block", "wanda-dvc report": "report.html", "wanda-dvc doctor": "memory",
    "wanda-dvc export": "the pruned model", "dvc plots show": "index.html", "dvc status": "up to date",
    "dvc exp run": "experiment", "dvc queue status": "Queued", "dvc exp branch": "study-of-mine",
}  # fmt: skip


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, texts: dict[str, str]) -> tuple[Repository, str]:
    """A tiny study that has run, and its experiment.

    Without tasks and with short texts, which cost most of the time; the page on tasks brings its own.
    """
    folder = tmp_path_factory.mktemp("finished")
    model = save_tiny_model(folder / "tiny", num_hidden_layers=2, max_position_embeddings=CONTEXT)
    settings = {"tasks__names": [], "calibration__windows": 4, **texts}
    repository = Repository.new(folder / "study", model, settings=settings)
    shutil.copytree(ROOT / ".dvc/plots", repository.root / ".dvc/plots")
    repository.repro()
    repository.commit()
    return repository, experiment(repository.run("dvc", "exp", "run", "-S", "sparsity=0.25"))


def placed(folder: Path, tiny: Path) -> dict[str, str]:
    """What stands for the places of the documentation on this machine; `NAME` is the last experiment."""
    rows = (ROOT / "src/wanda_dvc/embedded/text/test.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "test.jsonl").write_text("".join(rows[::2]), encoding="utf-8")
    (folder / "train.txt").write_text("".join(rows[1::2]), encoding="utf-8")
    named = {**dict.fromkeys(("/data/my-model", "MODEL"), str(tiny)), "DIR": str(folder / "exported")}
    named |= {f"/data/{name}": str(folder / name) for name in ("test.jsonl", "train.txt", "smaller")}
    return named | {"NEW": str(folder / "new")}


def to_run() -> dict[str, list[Block | list[str]]]:
    """What each page's test runs, in order: Python, and commands that no page before has given; all of a tutorial's."""
    pages: dict[str, list[Block | list[str]]] = {}
    given: set[str] = set(NOT_RUN)
    for page in GUIDES:
        for block in blocks(page) if page not in NOT_RUN else []:
            if block.language == "python":
                pages.setdefault(page, []).append(block)
            for words in lines(block):
                line = " ".join(words)
                if line not in given or (page in TUTORIALS and line not in NOT_RUN):
                    pages.setdefault(page, []).append(words)
                    given.add(line)
    return pages


TO_RUN = to_run()
# Pages of many experiments. The README has one of each kind of command; of every page the commands are checked above.
LONG = {"docs/data.md", "docs/compare.md", "docs/quickstart.md", *TUTORIALS}


@pytest.mark.pipeline
@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=pytest.mark.full if page in LONG else ()) for page in TO_RUN]
)
def test_the_commands_of_a_page_run_in_their_order(page: str, finished: tuple[Repository, str], tmp_path: Path):
    start, made = finished
    repository = replace(start, root=shutil.copytree(start.root, tmp_path / "study", symlinks=True))
    if page == PAPER:  # at the lengths of its preset
        preset = read_preset("paper")
        lengths = {name.replace(".", "__"): preset[name] for name in ("calibration.length", "perplexity.length")}
        assert set(lengths.values()) == {CONTEXT}
        repository.change(**lengths, perplexity__windows=preset["perplexity.windows"])
    another = save_tiny_model(tmp_path / "another-tiny", seed=1, num_hidden_layers=2)
    values = placed(tmp_path, another) | {"NAME": made}
    for step in TO_RUN[page]:
        if isinstance(step, Block):
            paths = "|".join(name for name in values if name.startswith("/"))
            repository.run(sys.executable, "-c", re.sub(paths, lambda found: values[found[0]], step.text))
            continue
        line = " ".join(step)
        printed = AS_RUN[line].split() if line in AS_RUN else step
        command = [re.sub("|".join(values), lambda found: values[found[0]], word) for word in printed]
        said = repository.run(*command)
        assert [word for start, word in SAID.items() if line.startswith(start) and word not in said] == [], said
        if line.startswith("dvc exp run") and "--queue" not in command:
            values["NAME"] = experiment(said)
            refs = repository.run("git", "for-each-ref", "--format=%(refname)", "refs/exps").splitlines()
            (ref,) = (ref for ref in refs if ref.endswith(f"/{values['NAME']}"))
            settings = dict(flatten(YAML(typ="safe").load(repository.run("git", "show", f"{ref}:params.yaml"))))
            assert given_settings(command).items() <= settings.items()


def given_settings(command: list[str]) -> dict[str, object]:
    """The settings that a command gives by -S."""
    given = (word.lstrip("+").partition("=") for option, word in pairwise(command) if option == "-S")
    return {name: YAML(typ="safe").load(value) for name, equals, value in given if equals}


def experiment(said: str) -> str:
    """The name of the experiment that `dvc exp run` has made."""
    (name,) = re.findall(r"Ran experiment\(s\): (\S+)", said)
    return str(name)


def test_a_reason_not_to_run_a_command_belongs_to_a_page():
    given = {" ".join(words) for page in GUIDES for words in commands(page)}
    assert NOT_RUN.keys() - given <= set(GUIDES)
    assert AS_RUN.keys() <= given
    assert [start for start in SAID if not any(line.startswith(start) for line in given)] == []


def test_no_block_or_paragraph_of_the_readme_is_written_twice():
    """Lists of commands overlap in their lines, never as a whole."""
    readme = pieces("README.md")
    assert len(readme) > 10
    for page in GUIDES:
        if page != "README.md":
            assert pieces(page) & readme == set(), page


def pieces(page: str) -> set[str]:
    """The paragraphs, tables and blocks of a page with more than a few words."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.split(r"\n\s*\n", without_blocks(text)) + [block.text for block in blocks(page)]
    return {flat for piece in found if len(flat := " ".join(piece.split())) > 80}


# --- the site ---


@pytest.mark.parametrize("name", ["commands", "settings"])
def test_the_lists_of_commands_and_settings_are_those_of_the_code(name: str):
    """`python scripts/NAME.py` writes it."""
    script = importlib.import_module(name)
    assert script.TARGET.read_text(encoding="utf-8") == script.page()


@pytest.mark.parametrize("repository", ["https://example.org/owner/wanda-dvc", None])
def test_links_of_the_site_lead_to_its_pages_or_into_the_repository(repository: str | None, tmp_path: Path):
    """`make docs` checks the links to pages and their anchors."""
    pages.build(tmp_path, repository)
    led = 0
    for page in (tmp_path / "docs").rglob("*.md"):
        text = re.sub(r"`[^`\n]*`", "`code`", without_blocks(page.read_text(encoding="utf-8")))
        assert "<picture>" not in text
        assert '"include"' not in text
        for link in re.findall(r"\]\(([^)\s]+)", text):
            path = link.partition("#")[0]
            if link.startswith("https://example.org/owner"):
                inside = re.fullmatch(r"https://example.org/owner/wanda-dvc/(blob|tree)/main/(.+)", path)
                assert inside, link
                target = ROOT / inside[2]
                assert target.is_dir() if inside[1] == "tree" else target.is_file(), link
                led += 1
    assert bool(led) == bool(repository)
    assert "you want" in (tmp_path / "docs/index.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[a](no.md)", "docs/new.md: no.md leads to no file of the repository"),
        ("[a](../../outside)", "leads to no file of the repository"),
    ],
)
def test_a_link_that_leads_nowhere_stops_the_site(text: str, said: str, tmp_path: Path, monkeypatch: Patch):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/new.md").write_text(f"# A\n\n{text}\n", encoding="utf-8")
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match=re.escape(said)):
        pages.Site({"docs/new.md": "new.md"}, None).page("docs/new.md")


def test_a_package_index_shows_the_readme_with_absolute_links_or_none():
    """`scripts/readme.py` writes the package's metadata."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    files = re.findall(r"\]\((?!https:)([^)]+)\)", without_blocks(text))
    shown = readme.page(text, "https://example.org/owner/wanda-dvc", "v1")
    for file in files:
        kind = "tree" if (ROOT / file).is_dir() else "blob"
        assert f"](https://example.org/owner/wanda-dvc/{kind}/v1/{file})" in shown
    assert "](https://example.org/owner/wanda-dvc/raw/v1/docs/pictures/sparsity-light.svg)" in shown
    for page in shown, readme.page(text, None, "v1"):
        assert not re.search(r"\]\((?!https:)|<picture>", without_blocks(page))


def test_a_page_that_is_in_no_list_stops_the_site(tmp_path: Path, monkeypatch: Patch):
    monkeypatch.setattr(pages, "pages", lambda: {"README.md": "index.md", "docs/new.md": "new.md"})
    with pytest.raises(SystemExit, match=r"not listed: new\.md; listed and not there: CHANGELOG\.md, "):
        pages.build(tmp_path, None)


def test_pages_keep_code_and_show_one_picture_a_mode():
    site = pages.Site({"docs/results.md": "results.md"}, None)
    code = "`[a](no.md)` and ``[b](no.md)``\n\n```text\n[c](no.md) a\\|b\n```\n"
    assert site._rewrite(code, "docs/results.md") == code
    assert site._rewrite("| `a\\|b` | c\\|d |", "docs/results.md") == "| `a|b` | c\\|d |"
    written = site.page("docs/results.md")
    assert "](pictures/sparsity-light.svg#only-light)\n![" in written
    assert "](pictures/sparsity-dark.svg#only-dark)" in written


def test_the_pictures_are_drawn_from_the_committed_figures(tmp_path: Path):
    """`python scripts/pictures.py` writes them. Versions of the library may round and number things differently."""
    import pictures  # needs matplotlib

    pictures.save(tmp_path)
    before = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs/pictures").glob("*.svg")}
    drawn = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()}
    assert drawn.keys() == before.keys()
    for name, picture in drawn.items():
        assert texts(picture) == texts(before[name]), name
        assert places(picture) == pytest.approx(places(before[name]), abs=0.5), name


def test_the_drawn_pipeline_has_every_stage():
    drawn = next(blocks("docs/how-it-works.md")).text
    assert [stage for stage in STAGES if not re.search(rf"\b{stage}\b", drawn)] == []


def test_pages_and_docstrings_avoid_the_words_of_the_list():
    """`make lint` runs it as `python scripts/words.py`."""
    import words

    assert [one for name, text in words.texts().items() for one in words.problems(name, text)] == []
    wrong = "It stands beside `whole`.\n\n```text\ntold\n```\nA whole number [x](gone.md), a GPU's card.\n"
    found = [one.split(": use")[0] for one in words.problems("a.md", wrong)]
    assert found == ["a.md:1: beside", "a.md:1: stands", "a.md:6: card"]
    assert [*words.problems("a.md", "So it is. " * 9)] == []
    assert len([*words.problems("a.md", f"| a |\n| - |\n\nSo {'it is ' * 13}.")]) == 1
    source = '"""A doc.\n\ngone"""\nx = "told"  # beside\ny = f"{x} is gone now"\n'
    prose = [line.strip() for line in words.prose(source).splitlines()]
    assert prose == ['"""A doc.', "", 'gone"""', "# beside", "is gone now"]


def texts(svg: str) -> list[str]:
    return re.findall(r"<text [^>]*>([^<]+)</text>", svg)


def places(svg: str) -> list[float]:
    """The coordinates of a picture's lines and markers."""
    paths = re.findall(r"<path d=\"([^\"]+)\"", svg)
    return [float(number) for number in re.findall(r"-?\d+\.\d+", " ".join(paths))]
