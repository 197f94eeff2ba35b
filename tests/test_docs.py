"""The documentation: its commands are the command line's, its links lead somewhere, its code compiles."""

import ast
import itertools
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import pytest
from conftest import ROOT, save_tiny_model
from repository import Repository
from ruamel.yaml import YAML
from typer.core import TyperGroup
from typer.main import get_command

from wanda_dvc.cli import app
from wanda_dvc.errors import UserError
from wanda_dvc.params import check_params

LISTED = subprocess.run(
    ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
    cwd=ROOT, capture_output=True, text=True, check=True,
).stdout.split()  # fmt: skip
PAGES = sorted({page for page in LISTED if (ROOT / page).exists()})
GUIDES = [page for page in PAGES if page in ("README.md", "CONTRIBUTING.md") or page.startswith("docs/")]
SEPARATORS = {"&&", "||", "|", ";", "&"}


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    text: str


def blocks(page: str) -> Iterator[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    for fenced in re.finditer(r"^( *)```(\S*)[^\n]*\n(.*?)^\1```\s*$", text, flags=re.MULTILINE | re.DOTALL):
        yield Block(fenced[2], fenced[3])


def split(line: str) -> Iterator[list[str]]:
    """The commands of a line, as words, without its comment."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    for separates, words in itertools.groupby(lexer, SEPARATORS.__contains__):
        if not separates:
            yield list(words)


def commands(page: str) -> Iterator[list[str]]:
    """The commands of a page's shell blocks."""
    for block in blocks(page):
        if block.language in ("", "bash"):
            for line in block.text.replace("\\\n", " ").splitlines():
                yield from split(line)


def mentions(page: str) -> Iterator[list[str]]:
    """The commands that a page's sentences give with options; others are named, like `dvc plots`, not given."""
    text = without_blocks((ROOT / page).read_text(encoding="utf-8"))
    for span in re.findall(r"`((?:wanda-dvc|dvc|make) [^`\n]+)`", text):
        if (" -" in span or span.startswith("make")) and not {"…", "["} & set(span):
            yield from split(span)


def without_blocks(text: str) -> str:
    return re.sub(r"^( *)```.*?^\1```\s*$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The fragments that GitHub gives to a page's headings."""
    found: set[str] = set()
    text = without_blocks(page.read_text(encoding="utf-8"))
    for heading in re.findall(r"^#+ +(.*?) *#*$", text, flags=re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        names = itertools.chain([slug], (f"{slug}-{number}" for number in itertools.count(1)))
        found.add(next(name for name in names if name not in found))
    return found


def checked_settings(overrides: list[str]) -> None:
    """Refuse what `dvc exp run -S` would write into params.yaml and a stage would then refuse."""
    choices = []
    for override in overrides:
        name, _, given = override.partition("=")
        values = [given] if given.startswith("[") else given.split(",")
        choices.append([(name, YAML(typ="safe").load(value)) for value in values])
    for chosen in itertools.product(*choices):
        content = YAML(typ="safe").load((ROOT / "params.yaml").read_text(encoding="utf-8"))
        for name, value in chosen:
            *sections, leaf = name.split(".")
            target = content
            for section in sections:
                target = target[section]
            assert leaf in target, f"no setting {name}"
            target[leaf] = value
        check_params(content)


def check_wanda_dvc(words: list[str]) -> None:
    group = get_command(app)
    assert isinstance(group, TyperGroup)
    at = next((index for index, word in enumerate(words) if word in group.commands), None)
    if words == ["--help"]:
        return
    assert at is not None, f"no command among {', '.join(group.commands)}"
    group.make_context("wanda-dvc", words[: at + 1])  # parses; runs nothing
    group.commands[words[at]].make_context(words[at], words[at + 1 :])


def check_dvc(words: list[str]) -> None:
    from dvc.cli import parse_args

    arguments = parse_args(words)
    checked_settings(getattr(arguments, "set_param", None) or [])
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
        return f"{shlex.join(words)}: {type(error).__name__}: {error}"
    return None


@pytest.mark.parametrize("page", GUIDES)
def test_every_command_of_a_page_is_one_that_the_command_line_takes(page: str):
    assert [found for words in (*commands(page), *mentions(page)) if (found := problem(words))] == []


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("wanda-dvc prune", "no command among locate"),
        ("wanda-dvc stats --block 3", "No such option: --block"),
        ("wanda-dvc stats --layer all", "BadParameter"),
        ("dvc exp walk", "DvcParserError"),
        ("dvc repro prune", "AssertionError"),
        ("dvc exp run -S sparsety=0.7", "no setting sparsety"),
        ("dvc exp run --queue -S 'sparsity=0.3,1.5'", "sparsity: got 1.5, expected < 1"),
        ("dvc exp run -S method=sparse", "method: got sparse"),
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


# What some of the README's commands are in a tiny study; None where they are not run here.
AS_RUN: dict[str, str | None] = {
    "make repro": "dvc repro",
    ". .venv/bin/activate": None,  # the tests' environment is active
    "pip install wanda-dvc[report]": None,  # test_wheel.py and scripts/wheel.sh
    "wanda-dvc init study --model Qwen/Qwen3-0.6B": None,  # likewise; test_init.py makes that study
    "cd study": None,
    "dvc exp run -S model=Qwen/Qwen2.5-0.5B": None,  # needs the Hub
    # test_pipeline.py changes the model, test_sources.py the texts
    "dvc exp run -S perplexity.text.source=/data/test.jsonl -S perplexity.text.split=null": None,
    "wanda-dvc preset smollm2-135m-wikitext2": "wanda-dvc preset",  # the preset's model comes from the package registry
    "dvc exp run --queue -S sparsity=0.3,0.5,0.7 -S method=magnitude,wanda": None,  # test_pipeline.py queues one
    "dvc queue start": None,  # likewise
}


@pytest.mark.pipeline
def test_the_readmes_commands_run_in_their_order(tmp_path: Path):
    repository = Repository.new(tmp_path / "study", save_tiny_model(tmp_path / "tiny"))
    repository.commit()
    values = {"DIR": str(tmp_path / "exported")}
    said: dict[str, str] = {}
    lines = [" ".join(words) for words in commands("README.md")]
    assert set(lines) >= AS_RUN.keys()
    for line in lines:
        command = AS_RUN.get(line, line)
        if command is None:
            continue
        said[line] = repository.run(
            *(re.sub("|".join(values), lambda name: values[name[0]], w) for w in command.split())
        )
        if command.startswith("dvc exp run"):
            (values["NAME"],) = re.findall(r"Ran experiment\(s\): (\S+)", said[line])
    assert "measured sparsity" in said["wanda-dvc show"]
    assert (repository.root / "report.html").is_file()
    assert (tmp_path / "exported/model.safetensors").is_file()
    assert "block" in repository.run("wanda-dvc", "stats", "--layer", "1")
    assert "perplexity" in repository.run("dvc", "metrics", "diff")
