"""The pipeline on a real DVC repository: what a change reruns, and what it doesn't."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Factory, save_tiny_model, tree
from repository import CALIBRATE, DOWNLOADS, EVALUATE, PRUNE, RECOVER, Repository, ran

from wanda_dvc.sources import EMBEDDED_FOLDER

pytestmark = pytest.mark.pipeline

BASELINE = {"perplexity-dense@embedded", "zero-shot-dense"}
ALL = {"plan"} | DOWNLOADS | CALIBRATE | PRUNE | EVALUATE | BASELINE


@pytest.fixture(scope="module")
def start(tmp_path_factory: Factory, texts: dict[str, str]) -> Repository:
    """A repository in which everything has run once, and is committed."""
    # Wide enough that a copy of the model in the cache could not be missed.
    wide: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    model = save_tiny_model(tmp_path_factory.mktemp("model") / "tiny", **wide)
    joined = tmp_path_factory.mktemp("text") / "lines.jsonl"  # a text of many lines, which a setting joins
    lines = (EMBEDDED_FOLDER / "text/train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    joined.write_text("".join(lines[:20]), encoding="utf-8")
    settings = texts | {"calibration__text__source": str(joined), "tasks__names": []}
    repository = Repository.new(tmp_path_factory.mktemp("start") / "study", model, settings=settings)
    assert ran(repository.run("dvc", "repro")) == ALL
    repository.commit()
    return repository


@pytest.fixture
def repository(start: Repository, tmp_path: Path) -> Repository:
    """A copy of it, with its own cache."""
    shutil.copytree(start.root, tmp_path / "study", symlinks=True)
    return replace(start, root=tmp_path / "study")


def test_running_again_on_equal_inputs_changes_nothing_in_git(repository: Repository):
    assert repository.repro() == set()
    assert repository.run("git", "status", "--porcelain") == ""
    forced = ("mask", "perplexity-pruned@embedded")
    assert ran(repository.run("dvc", "repro", "--force", *forced)) >= set(forced)
    assert repository.run("git", "status", "--porcelain") == ""


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"runtime__device": "cpu", "runtime__mirror": "/"}, set()),
        ({"method": "magnitude"}, PRUNE | EVALUATE),
        ({"calibration__windows": 4}, {"calibrate-norms"} | PRUNE | EVALUATE),
        ({"calibration__text__join": "\n"}, {"download-calibration"} | CALIBRATE | PRUNE | EVALUATE),
        ({"perplexity__length": 32}, {"perplexity-dense@embedded", "perplexity-pruned@embedded"}),
        ({"tasks__limit": 3}, {"zero-shot-dense", "zero-shot-pruned"}),
        ({"tasks__names": ["piqa"]}, {"download-tasks", "zero-shot-dense", "zero-shot-pruned"}),
        ({"dtype": "bfloat16"}, {"calibrate-norms"} | PRUNE | EVALUATE | BASELINE),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_change_reruns_what_depends_on_it(repository: Repository, changes: dict[str, Any], expected: set[str]):
    assert repository.repro(**changes) == {"plan"} | expected


def test_a_change_reruns_the_training_that_depends_on_it(repository: Repository, tmp_path: Path):
    (tmp_path / "more.txt").write_text("".join(f"The {number}th line. " for number in range(2000)))
    settings: dict[str, Any] = {"recovery__tokens": 1024}
    assert repository.repro(trained=True, **settings) == {"plan"} | RECOVER
    for changes, expected in (
        ({"runtime__device": "cpu"}, set()),
        ({"recovery__rate": 0.002}, RECOVER),
        ({"recovery__tokens": 2048}, RECOVER),
        ({"recovery__text__source": str(tmp_path / "more.txt")}, RECOVER | {"download-recovery"}),
        ({"perplexity__length": 32}, {f"perplexity-{model}@embedded" for model in ("dense", "pruned", "recovered")}),
        ({"sparsity": 0.6}, PRUNE | EVALUATE | RECOVER),
        # The run cache of DVC has the placeholder of zero-shot, from before the training.
        ({"recovery__tokens": 0}, RECOVER - {"zero-shot-recovered"} | {"download-recovery"}),
    ):
        settings |= changes
        assert repository.repro(trained=True, **settings) == {"plan"} | expected, changes


def test_a_recipe_alone_measures_what_it_reads_once_and_solved_weights_are_not_cached(repository: Repository):
    """To `fisher` and back to `wanda`, in the workspace, elsewhere and in the queue."""
    norms = tree(repository.root / "stats/norms")
    changed = {"plan", "calibrate-gram", "calibrate-fisher"} | PRUNE | EVALUATE
    assert ran(repository.run("dvc", "exp", "run", "-S", "recipe=fisher")) == changed
    assert tree(repository.root / "stats/norms") == norms
    assert ran(repository.run("dvc", "exp", "run", "-S", "recipe=wanda")) == {"plan", "apply"}
    assert ran(repository.run("dvc", "exp", "run", "--temp", "-S", "recipe=fisher")) == {"plan", "apply"}
    before, weights = repository.cached(), (repository.model / "model.safetensors").stat().st_size
    assert ran(repository.run("dvc", "exp", "run", "-S", "recipe=wanda-refit")) == {"plan"} | PRUNE | EVALUATE
    assert repository.cached() - before < weights / 20  # metrics and details; the masks are Wanda's
    sweep = ("-S", "recipe=wanda,admm,fisher", "-S", "sparsity=0.5,0.6")
    repository.run("dvc", "exp", "run", "--queue", *sweep)
    said = repository.run("dvc", "exp", "run", "--run-all", "--jobs", "1")
    assert "calibrate" not in " ".join(re.findall(r"Running stage '([^']+)'", said))


def test_another_model_reruns_all_but_the_texts_and_tasks(repository: Repository, tmp_path: Path):
    repository.model = save_tiny_model(tmp_path / "other", seed=5)
    assert repository.repro(sparsity=0.5) == ALL - DOWNLOADS | {"download-model"}


def test_another_text_runs_its_own_stages_alone(repository: Repository, tmp_path: Path):
    (tmp_path / "more.txt").write_text("".join(f"The {number}th line. " for number in range(200)))
    setting = f"+perplexity.texts.more.source={tmp_path}/more.txt"
    own = {"download-perplexity@more", "perplexity-dense@more", "perplexity-pruned@more"}
    assert ran(repository.run("dvc", "exp", "run", "--name", "two", "-S", setting)) == {"plan"} | own
    shown, listed = (repository.run("wanda-dvc", *words) for words in (("show",), ("list",)))
    assert re.search(r"perplexity, more +\| \d", shown)
    assert "The calibration text has another source." in shown
    assert "perplexity, more" in listed.replace("  ", " ")
    assert repository.repro(sparsity=0.5) == {"plan"}  # the text is gone
    assert {path.name for path in (repository.root / "sources/perplexity").iterdir()} == {"embedded"}


def test_coming_back_to_a_sparsity_runs_apply_alone_and_caches_no_model(repository: Repository):
    first = json.loads((repository.root / "metrics/pruned/perplexity/embedded.json").read_text())
    before = repository.cached()
    assert repository.repro(sparsity=0.7) == {"plan"} | PRUNE | EVALUATE
    added = repository.cached() - before
    weights = (repository.model / "model.safetensors").stat().st_size
    masks = sum(path.stat().st_size for path in (repository.root / "masks").iterdir())
    assert masks < added < masks + 100_000 < weights / 2  # masks, metrics and details
    assert repository.repro(sparsity=0.5) == {"plan", "apply"}
    assert json.loads((repository.root / "metrics/pruned/perplexity/embedded.json").read_text()) == first
    assert repository.repro() == set()


def test_a_clone_without_the_cache_calibrates_once_for_a_queue_of_two(start: Repository, tmp_path: Path):
    """The first experiment makes what the lock names and nobody has; the second takes it from the cache."""
    start.run("git", "clone", "--quiet", str(start.root), str(tmp_path / "clone"))
    clone = replace(start, root=tmp_path / "clone")
    names = ("first", "second")
    for name, sparsity in zip(names, (0.3, 0.7), strict=True):
        clone.run("dvc", "exp", "run", "--queue", "--name", name, "--set-param", f"sparsity={sparsity}")
    clone.run("dvc", "queue", "start")
    clone.run("dvc", "exp", "run", "--run-all")
    first, second = (ran(clone.run("dvc", "queue", "logs", name)) for name in names)
    assert first == ALL - {"calibrate-gram", "calibrate-fisher", "calibrate-blocks"}  # outs that another stage writes
    assert second == {"plan"} | PRUNE | EVALUATE


def test_an_experiment_changes_its_own_figures(repository: Repository):
    """One in the workspace, two in the queue; compared, shown, applied."""
    said = repository.run("dvc", "exp", "run", "--name", "two-of-four", "--set-param", "pattern=2:4")
    assert ran(said) == {"plan"} | PRUNE | EVALUATE
    assert "pattern: 2:4" in (repository.root / "params.yaml").read_text()
    difference = repository.run("dvc", "metrics", "diff")
    assert re.search(r"metrics/pruned/perplexity/embedded.json +perplexity +[\d.]+ +[\d.]+", difference)
    assert "metrics/dense" not in difference
    repository.run("git", "checkout", "--", ".")
    repository.run("dvc", "checkout")

    repository.run("dvc", "exp", "run", "--queue", "-S", "pattern=4:8", "-S", "recipe=magnitude,wanda")
    repository.run("dvc", "queue", "start")
    repository.run("dvc", "exp", "run", "--run-all")  # returns when the queue's worker has nothing left to do

    shown = json.loads(repository.run("dvc", "exp", "show", "--json"))
    revisions = [(one["name"], one["revs"][0]["data"]) for branch in shown for one in branch["experiments"] or []]
    names = {}
    for name, data in revisions:
        params = data["params"]["params.yaml"]["data"]
        names[params["pattern"], params["recipe"]] = name
        assert data["metrics"]["metrics/pruned/sparsity.json"]["data"] == {"sparsity": 0.5}
    assert names.keys() >= {("2:4", "wanda"), ("4:8", "wanda"), ("4:8", "magnitude")}

    repository.run("dvc", "exp", "apply", names["4:8", "magnitude"])
    shown_here = repository.run("wanda-dvc", "show")
    assert "magnitude, pattern 4:8, sparsity 0.5" in shown_here
    assert "models/pruned belongs to another experiment than masks/" in shown_here
    assert repository.repro() == {"apply"}
    assert "another experiment" not in repository.run("wanda-dvc", "show")


def test_a_recovered_experiment_is_exported(repository: Repository, tmp_path: Path):
    repository.run("dvc", "exp", "run", "--temp", "--name", "trained", "--set-param", "recovery.tokens=1024", "recover")
    said = repository.run("wanda-dvc", "export", str(tmp_path / "exported"), "--rev", "trained")
    assert "the recovered model of trained" in said


def test_export_builds_an_experiments_model_and_leaves_the_workspace(repository: Repository, tmp_path: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    repository.run("dvc", "exp", "run", "--name", "two-of-four", "--set-param", "pattern=2:4")
    repository.run("dvc", "exp", "run", "--name", "elsewhere", "--set-param", "runtime.device=cuda", "plan")
    repository.run("git", "checkout", "--", ".")
    repository.run("dvc", "checkout")
    before, cached = tree(repository.root), repository.cached()
    exported = tmp_path / "exported"
    repository.run("wanda-dvc", "export", str(exported), "--rev", "two-of-four")
    assert tree(repository.root) == before
    assert repository.run("git", "status", "--porcelain") == ""
    assert repository.cached() == cached
    assert not [path for path in (repository.root / ".dvc/tmp/wanda-dvc").iterdir() if path.is_dir()]

    # The workspace has another model: the dense one comes out of the cache too.
    dense, away = repository.root / "models/dense", tmp_path / "away"
    dense.rename(away)
    repository.run("wanda-dvc", "export", str(tmp_path / "again"), "--rev", "elsewhere")
    away.rename(dense)
    assert tree(tmp_path / "again") == tree(exported)

    repository.run("dvc", "exp", "apply", "two-of-four")
    repository.run("wanda-dvc", "apply")
    applied = tree(repository.root / "models/pruned")
    own = tree(exported)
    card = own.pop("README.md").decode()
    sealed = json.loads(applied.pop("provenance.json"))
    assert json.loads(own["provenance.json"]) == sealed
    assert {name: own[name] for name in own if name != "provenance.json"} == applied
    assert not any(path.is_symlink() for path in exported.rglob("*"))
    assert not any(str(tmp_path.parent).encode() in content for content in [card.encode(), *own.values()])

    measured = json.loads((repository.root / "metrics/pruned/perplexity/embedded.json").read_text())["perplexity"]
    assert f"| {measured:,.2f} (" in card  # and its interval
    assert re.search(r"\| pattern +\| 2:4 +\|", card)
    assert "model: /path/to/tiny\n" in card
    model = AutoModelForCausalLM.from_pretrained(exported)
    weight = model.model.layers[0].mlp.up_proj.weight
    assert ((weight.reshape(-1, 4) == 0).sum(1) >= 2).all()
    assert AutoTokenizer.from_pretrained(exported)("a")["input_ids"]

    revision = repository.run("git", "rev-parse", "HEAD").strip()
    shutil.rmtree(repository.root / ".dvc/cache")
    missing = repository.run("wanda-dvc", "export", str(tmp_path / "missing"), "--rev", revision, check=False)
    assert f"{revision}: its masks/ is not complete in DVC's cache" in missing
    assert "`dvc pull --all-commits`" in missing
    assert not (tmp_path / "missing").exists()
