"""The figures' files say where each row comes from, and the scripts compare like with like."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import authors
import blocks
import breadth
import clock
import code_digest
import figures
import floors
import gpu
import moved
import mutants
import numpy as np
import origin
import peers
import pytest
import recipes
import sizes
import spread
import texts
import torch
from conftest import OFFLINE, ROOT, Capture, Make, Patch, calibrate, fetch, git
from scipy.stats import ttest_rel
from simulated_gpu import simulated_gpu
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from wanda_dvc.pruning import selection
from wanda_dvc.pruning.solvers import GramFactors, fisher_least_squares
from wanda_dvc.stages import STAGES, run
from wanda_dvc.stages.inputs import draw_calibration, read_choices
from wanda_dvc.stages.mask import mask
from wanda_dvc.stages.perplexity import windows_of
from wanda_dvc.study.artifact import digest, read_provenance
from wanda_dvc.study.tensors import read_masks

FILES = sorted((ROOT / "benchmarks").glob("*.json"))
KEYS = ("protocol", "commit", "stages", "sources", "libraries", "cpu", "date")


def test_the_command_with_a_clock_writes_the_seconds_of_each_run(calibrated_study: Make):
    """A process, because DVC starts it by its name on the PATH."""
    made = calibrated_study()
    origin.process("wanda-dvc", "mask", cwd=made.root)
    assert clock.seconds(made.root).keys() == {"mask"}
    assert clock.seconds(made.root)["mask"] > 0


# --- origins ---


def test_a_row_keeps_its_origin_and_the_other_rows(tmp_path: Path):
    path = tmp_path / "rows.json"
    made = origin.origin("a protocol", ["mask", "apply"])
    origin.write_row(path, "one", {"perplexity": 20.5}, made)
    origin.write_row(path, "two", "diverged", made)
    origin.write_row(path, "one", {"perplexity": 20.7}, made)
    rows = origin.read_rows(path)
    assert list(rows) == ["one", "two"]
    assert rows["one"]["value"] == {"perplexity": 20.7}
    assert tuple(rows["one"]["origin"]) == KEYS
    assert made["stages"] == ["mask", "apply"]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert commit.startswith(made["commit"].removesuffix("+"))


def test_a_row_is_old_if_the_code_that_can_change_it_has_changed(tmp_path: Path, monkeypatch: Patch):
    """A copy of the code, changed; a comment, a docstring and what the stage never runs change no result."""
    shutil.copytree(code_digest.SOURCE, tmp_path, dirs_exist_ok=True)
    before = {stage: code_digest.sources_digest((stage,)) for stage in STAGES}

    def changed(name: str, old: str, new: str) -> set[str]:
        path = tmp_path / "wanda_dvc" / name
        unchanged = path.read_text(encoding="utf-8")
        path.write_text(mutants.mutated(unchanged, old, new), encoding="utf-8")
        for function in (code_digest.sources_digest, code_digest._imports, code_digest.code_of):
            function.cache_clear()
        after = {stage: code_digest.sources_digest((stage,), tmp_path) for stage in STAGES}
        path.write_text(unchanged, encoding="utf-8")
        return {stage for stage in STAGES if after[stage] != before[stage]}

    assert not changed("stages/mask.py", "import itertools\n", "import itertools  # of the library\n\n")
    assert not changed("stages/mask.py", '"""Choose the masks', '"""Write the masks')
    assert not changed("commands/doctor.py", "import platform\n", "import platform\nimport os\n")
    assert changed("pruning/scores.py", "float().mul_(x.norm)", "float().mul_(x.norm).mul_(1)") >= {"mask"}
    assert changed("stages/recover.py", "VALIDATION_WINDOWS = 4 ", "VALIDATION_WINDOWS = 5 ") == {"recover"}
    made = origin.origin("a protocol", ["mask"])
    assert not origin.is_old({"origin": made})
    assert origin.is_old({"origin": made | {"sources": before["apply"]}})
    assert origin.is_old({"origin": {"stages": {"mask": STAGES["mask"].version}}})  # of the time before digests


def test_every_module_that_a_stage_imports_is_in_its_digest():
    """A process, because this one has imported all."""
    names = [f"wanda_dvc.stages.{stage.replace('-', '_')}" for stage in STAGES]
    code = f"import sys, {', '.join(names)}\nprint(*(m.__file__ for n, m in sys.modules.items() if 'wanda_dvc' in n))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = {Path(file).relative_to(ROOT / "src") for file in done.stdout.split()}
    found = {path.relative_to(code_digest.SOURCE) for path in code_digest.imported_by(names)}
    assert len(imported) > 40
    assert imported <= found
    assert Path("wanda_dvc/pruning/scores.py") in found  # by the table of methods alone


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_every_committed_row_says_which_code_and_machine_made_it(file: Path):
    """Rows from before digests are old, and may be of a tree with changes."""
    for name, row in origin.read_rows(file).items():
        made = row["origin"]
        assert row.keys() == {"value", "origin"}
        assert made.keys() | {"sources"} == {*KEYS}
        assert re.fullmatch(r"[0-9a-f]{12}", made["commit"]) or "sources" not in made, f"{name}: uncommitted changes"
        assert set(made["stages"]) <= set(STAGES), name
        assert made["libraries"].keys() >= {*origin.LIBRARIES, "python"}, name
        assert re.fullmatch(r"\S.*, \d+ threads", made["cpu"]), name
        assert date.fromisoformat(made["date"]) >= date(2026, 11, 1), name
        assert made["protocol"], name
        if file.stem == "recipes":
            assert ("recover" in made["stages"]) == any(name.endswith(tokens) for tokens in recipes.TOKENS), name


def test_a_figure_of_an_old_row_has_a_mark(monkeypatch: Patch):
    made = origin.origin("a protocol", ["mask"])
    rows = {
        f"{figures.SMALL} {recipe} 50%": {"value": {"wikitext2": {"perplexity": 30.25}}, "origin": one}
        for recipe, one in (("wanda", made), ("fisher", made | {"sources": "other"}))
    }
    monkeypatch.setattr(figures, "measured", lambda _: rows)
    table = [line.strip("| ").split(" | ") for line in figures.TABLES["readme"]().splitlines()[2:]]
    cells = {row[0]: row[2] for row in table}
    assert cells["`wanda`"] == "30.25"
    assert cells["**`fisher`**\N{NO-BREAK SPACE}¹"] == "30.25"
    assert cells["`magnitude-rows`"] == "–"


def test_a_mark_is_written_once_for_a_row_or_a_table():
    old, new = f"1{figures.MARK}", "1"
    table = figures.table(["a", "b", "c"], [["x", old, old], ["y", old, new]]).splitlines()
    assert [table[0], *table[2:]] == ["| a | b | c |", f"| x{figures.MARK} | 1 | 1 |", f"| y | {old} | 1 |"]
    table = figures.table(["a", "b", "c"], [["x", old, "–"], ["y", old, old]]).splitlines()
    assert [table[0], *table[2:]] == [f"| a{figures.MARK} | b | c |", "| x | 1 | – |", "| y | 1 | 1 |"]


def test_recipes_are_compared_window_by_window_with_all_tests_adjusted(monkeypatch: Patch):
    """The oracle is scipy's test for pairs. The losses of two recipes are known on both texts."""
    made, generator = origin.origin("a protocol", ["mask"]), np.random.default_rng(0)
    losses = {recipe: generator.normal(3, 0.2, (2, 16)) for recipe in ("wanda", "wanda-refit")}
    rows = {
        f"{figures.SMALL} {recipe} 50%": {
            "value": {
                text: {"perplexity": math.exp(of_text.mean()), "losses": of_text.tolist(), "length": 2048}
                for text, of_text in zip(figures.TEXTS, of_recipe, strict=True)
            },
            "origin": made,
        }
        for recipe, of_recipe in losses.items()
    }
    monkeypatch.setattr(figures, "measured", lambda _: rows)
    lines = [line.strip("| ").split(" | ") for line in figures.TABLES["intervals"]().splitlines()[2:]]
    p = [ttest_rel(*(losses[recipe][text] for recipe in losses)).pvalue for text in range(2)]
    expected = [min(1, 2 * min(p)) if one == min(p) else max(min(1, 2 * min(p)), one) for one in p]
    found = [line for line in lines if line[0] == "`wanda-refit`"]
    assert [float(line[5]) for line in found] == pytest.approx(expected, rel=0.05)
    ratios = np.exp((losses["wanda-refit"] - losses["wanda"]).mean(axis=1))
    assert [line[4].partition(" ")[0] for line in found] == [f"{one:.3f}" for one in ratios]
    assert all(line[3:] == ["–", "–", "–"] for line in lines if line[0] == "`admm`")


def test_the_spread_is_the_range_over_the_seeds_of_a_row(monkeypatch: Patch):
    made = origin.origin("a protocol", ["mask"])

    def row(perplexity: float) -> origin.Row:
        return {"value": {text: {"perplexity": perplexity} for text in figures.TEXTS}, "origin": made}

    name = f"{figures.SMALL} wanda 50%"
    files = {"recipes": {name: row(42.5)}, "spread": {}}
    monkeypatch.setattr(figures, "measured", files.__getitem__)
    assert figures.TABLES["spread"]() == figures.NOTHING
    for place, seed in enumerate(spread.SEEDS):
        files["spread"][f"{figures.SMALL} {seed} wanda 50%"] = row(42 + 2 * place)
    assert figures.TABLES["spread"]().splitlines()[-1] == "| SmolLM2 wanda 50 % | 42.00 to 44.00 | 42.00 to 44.00 |"


def test_rows_of_a_file_have_both_measures_on_each_text_and_the_mean_accuracy(monkeypatch: Patch):
    of_text = {"perplexity": 42.5, "divergence": {"mean": 0.25}}
    value = {"wikitext2": of_text, "news": of_text, "tasks": {"piqa": {"acc": 0.5}, "rte": {"acc": 0.25}}}
    row = {"value": value, "origin": origin.origin("a protocol", ["mask"])}
    monkeypatch.setattr(figures, "measured", {"blocks": {"m dense": row}, "sizes": {}}.__getitem__)
    head, _, line = figures.TABLES["blocks"]().splitlines()
    assert head == "| row | WikiText-2: perplexity, divergence | news: perplexity, divergence | mean accuracy, % |"
    assert line == "| m dense | 42.50, 0.250 | 42.50, 0.250 | 37.5 |"
    assert figures.TABLES["sizes"]() == figures.NOTHING


# --- the protocol ---


def test_a_run_measures_the_rows_that_are_missing_or_old(tmp_path: Path, monkeypatch: Patch):
    measured = []

    class Comparison:
        def __init__(self, *_: object) -> None: ...

        def measure(self, row: tuple[str, ...]) -> str:
            measured.append(" ".join(row))
            return measured[-1]

    monkeypatch.setattr(recipes, "Comparison", Comparison)
    rows = [("a", recipe, "50%") for recipe in ("wanda", "admm", "fisher")]
    names = [" ".join(row) for row in rows]
    made = origin.origin("a protocol", ["mask"])
    origin.write_row(tmp_path / "rows.json", names[0], "known", made)
    origin.write_row(tmp_path / "rows.json", names[1], "old", made | {"sources": "other"})
    for _ in range(2):
        recipes.measure(rows, tmp_path / "rows.json", tmp_path, tmp_path, seconds=False)
    assert measured == names[1:]
    found = origin.read_rows(tmp_path / "rows.json")
    assert [found[name]["value"] for name in names] == ["known", *names[1:]]


@pytest.mark.full
@pytest.mark.timeout(3 * 3600)
def test_the_headline_figures_are_those_of_the_page(tmp_path: Path, monkeypatch: Patch):
    """The real model, half an hour on two cores. Stages are processes, which fetch what this machine lacks."""
    for name in OFFLINE:
        monkeypatch.delenv(name)
    shared = os.environ.get("WANDA_DVC_SHARED")
    calibrated_study = recipes.Comparison(recipes.MODELS[0], Path(shared, "datasets") if shared else None, tmp_path)
    known = origin.read_rows(recipes.TARGET)
    for recipe in ("dense", "wanda", figures.RECOMMENDED):
        row = (recipes.MODELS[0], recipe, *([] if recipe == "dense" else ["50%"]))
        expected, found = known[" ".join(row)]["value"], calibrated_study.measure(row)
        for text in recipes.TEXTS:
            assert found[text]["perplexity"] == pytest.approx(expected[text]["perplexity"], rel=0.005), (recipe, text)


@pytest.mark.parametrize(
    ("file", "old", "new", "is_moved"),
    [
        ("pruned/perplexity/embedded.json", 18.0, 18.08, False), ("pruned/perplexity/embedded.json", 18.0, 18.1, True),
        ("pruned/perplexity/embedded.json", 18.0, 17.8, True), ("pruned/perplexity/embedded.json", 18.0, None, True),
        ("pruned/perplexity/embedded.json", None, 18.0, True), ("pruned/zero_shot.json", 0.6, 0.7, False),
        ("pruned/zero_shot.json", 0.6, 0.4, True), ("pruned/perplexity/embedded.json", 18.0, "diverged", True),
    ],
)  # fmt: skip
def test_a_committed_figure_that_moved_is_found(file: str, old: object, new: object, is_moved: bool):
    differences = {f"metrics/{file}": {"perplexity": {"old": old, "new": new}}}
    assert bool([*moved.moved(differences, items=10)]) == is_moved


# --- texts ---


def test_no_calibration_reads_a_text_for_evaluations(tmp_path: Path, monkeypatch: Patch):
    monkeypatch.setattr(breadth, "make", lambda name, folder: folder / f"{name}.txt")
    for calibration in breadth.CALIBRATIONS:
        settings = breadth.settings(calibration, "64-windows", tmp_path)
        chosen = settings["calibration"]["text"]
        sources = [text["source"] for text in (chosen if isinstance(chosen, list) else [chosen])]
        assert len(set(sources)) == int(calibration[0])
        evaluated = {name: text["source"] for name, text in settings["perplexity"]["texts"].items()}
        assert set(sources) & set(evaluated.values()) == {"wikitext2"}
        assert all(evaluated[name] == str(tmp_path / f"{name}.txt") for name in breadth.UNSEEN)


def test_each_row_of_breadth_names_a_pruning():
    rows = list(breadth.wanted())
    assert len(rows) == len(set(rows)) == 1 + 6 * len(breadth.PRUNED)
    for _, _, _, recipe, amount, *tokens in rows[1:]:
        assert recipe in recipes.RECIPES
        assert amount in recipes.AMOUNTS | recipes.SMALLER
        assert set(tokens) <= set(recipes.TOKENS)


def test_a_pattern_alone_removes_what_its_candidate_does():
    candidates = [
        {"blocks": "30/30", "heads": "3/3", "neurons": "960/1536"},
        {"blocks": "22/30", "heads": "3/3", "neurons": "1/1"},
        {"blocks": "29/30", "heads": "2/3", "neurons": "1/1"},
    ]  # fmt: skip
    rows = {"m chosen 80%": {"value": {"candidates": candidates}, "origin": origin.origin("")}}
    found = {kind: sizes.changes_of(("m", kind, "80%"), rows) for kind in sizes.PATTERNS}
    assert found["heads"] is None
    assert found["neurons"] == {"recipe": "fisher", "pattern": "neurons", "sparsity": 0.375}
    assert found["blocks"] == {"recipe": "fisher", "pattern": "blocks", "sparsity": 0.266667}
    with pytest.raises(SystemExit, match="the row `chosen` is missing or old; measure it first"):
        sizes.changes_of(("m", "heads", "60%"), rows)
    names = list(sizes.wanted())
    assert all(names.index((*row[:1], "chosen", row[2])) <= names.index(row) for row in names)


def test_a_given_choice_of_blocks_is_removed(study: Make, monkeypatch: Patch):
    """It competes with no neighbours. After it, the choice of `calibrate` does again."""
    made = fetch(study(pattern="blocks", sparsity=0.5, recipe="wanda-refit"), "model", "calibration")
    calibrate(study=made)
    chosen = blocks.Chosen.__new__(blocks.Chosen)
    chosen.study = made
    monkeypatch.setattr(recipes.Comparison, "stage", lambda _, name: run(name, study=made))
    tried = []
    for given in ((1, 3), (2, 3), ()):
        chosen.given = given
        chosen.stage("mask")
        candidates = [row["removed blocks"] for row in read_provenance(made.masks, "mask")["candidates"]]
        tried.append(candidates)
        removed = [not any(mask.any() for mask in read_masks(made.masks, block).values()) for block in range(4)]
        assert [block for block, gone in enumerate(removed) if gone] in candidates
    measured = sorted(read_choices(made.blocks)[1].removed)
    assert [*tried[:2], tried[2][0]] == [[[1, 3]], [[2, 3]], measured]


def test_every_row_of_blocks_has_as_many_as_it_names():
    for model, choice, number, *_ in (row for row in blocks.wanted() if "dense" not in row):
        given = blocks.GIVEN[model].get(choice, ())
        assert choice == blocks.MEASURED or len(set(given)) == int(number.removeprefix("blocks "))
        assert all(0 < block < blocks.BLOCKS[model] for block in given)


def test_an_email_is_what_its_sender_wrote(tmp_path: Path):
    prose = "I have read the whole thread twice, and I still think that the old server was easier to run than this one."
    body = f"On Monday Ann wrote:\n> {prose[:60]}\n> {prose[60:]}\n\n{prose[:70]}\n{prose[70:]}\n\n-- \n{prose} Ann."
    for number, subject in enumerate(["[list] Re: servers", "Fwd: the news"]):
        path = tmp_path / f"data/easy-ham-1/{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"Subject: {subject}\nContent-Type: text/plain\n\n{body}\n")
    assert [" ".join(one.split()) for one in texts.emails(tmp_path)] == [f"{prose[:70]} {prose[70:].strip()}"]


def test_a_text_of_another_version_is_refused(tmp_path: Path):
    (tmp_path / "news.txt").write_text("Another article.")
    with pytest.raises(RuntimeError, match="sha256"):
        texts.make("news", tmp_path)


# --- the peers ---


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_propagation_pruned_is_the_published_procedure(study: Make, method: str):
    """Plain hooks in transformers' model, block by block on the outputs of the pruned blocks before."""
    group = "linear" if method == "magnitude" else "row"
    made = fetch(study(method=method, propagation="pruned", group=group, sparsity=0.7), "model", "calibration")
    calibrate(study=made)
    mask(study=made)
    model = AutoModelForCausalLM.from_pretrained(made.model("dense")).eval()
    if method == "wanda":
        peers.prune_wanda(model, draw_calibration(made).tokens, made.params.sparsity)
    else:
        peers.prune_magnitude(model, made.params.sparsity)
    weights = dict(model.named_parameters())
    found = {name: keep for block in range(4) for name, keep in read_masks(made.masks, block).items()}
    for name, keep in found.items():
        assert torch.equal(weights[f"{name}.weight"] != 0, keep)
    mask(study=study(method=method, group=group, sparsity=0.7))
    dense = {name: keep for block in range(4) for name, keep in read_masks(made.masks, block).items()}
    same = {name for name in found if torch.equal(found[name], dense[name])}
    assert (same == set(found)) == (method == "magnitude")  # the procedures differ, but not in what block 0 reads
    assert {name for name in found if name.startswith("model.layers.0.self_attn.q")} <= same


AUTHORS = """
import torch

def get_loaders():
    raise NotImplementedError

def prune_wanda(args, model, tokenizer, device, prune_n, prune_m):
    batches, _ = get_loaders("c4", nsamples=args.nsamples)
    torch.cuda.synchronize()
    hidden = model.model.embed_tokens(batches[-1][0]).cuda()
    for block in model.model.layers:
        hidden = block(hidden, attention_mask=None)
        for linear in [x for x in block.modules() if isinstance(x, torch.nn.Linear)]:
            linear.weight.data[:, ::2] = 0
"""


def test_authors_code_runs_on_the_windows_of_a_study(study: Make, tmp_path: Path, monkeypatch: Patch):
    """A stand-in for the authors' code, which needs a GPU, a data set, and blocks without positions."""
    code = tmp_path / "code"
    (code / "lib").mkdir(parents=True)
    (code / "lib/prune.py").write_text(AUTHORS)
    git(code, "init", "--quiet")
    git(code, "add", ".")
    git(code, "commit", "--quiet", "--message", "code")
    monkeypatch.syspath_prepend(code)
    made = fetch(study())
    found = authors.measure(made, "wanda", "50%", code, "embedded")
    assert found["code"] == f"locuslab/wanda {git(code, 'rev-parse', 'HEAD')}"
    assert found["zeros"] == 0.5
    assert found["digests"]["calibration"] == digest(draw_calibration(made).tokens.tolist())
    model = AutoModelForCausalLM.from_pretrained(made.model("dense"))
    for block in model.model.layers:
        for linear in peers.linears_of(block).values():
            linear.weight.data[:, ::2] = 0
    windows, _ = windows_of(made, made.model("dense"), "embedded")
    tokens = torch.stack([window.tokens for window in windows])
    with torch.no_grad():
        expected = model(tokens, labels=tokens).loss.exp().item()
    assert found["embedded"]["perplexity"] == pytest.approx(expected, rel=1e-4)


def test_a_baseline_is_held_to_the_speed_of_its_time():
    """Measured while the machine was twice as slow, it counts half."""
    assert peers.scaled({"wall": 30.0, "gflops": 100.0}, {"gflops": 200.0}) == 15


@pytest.mark.parametrize(("goal", "met", "missed"), [("≥ 2", 2, 1.99), ("< 0.05", 0.049, 0.05), ("= 0", 0, 1)])
def test_a_row_says_whether_its_goal_is_met(goal: str, met: float, missed: float):
    assert peers.met(goal, met)
    assert not peers.met(goal, missed)


def test_every_other_answer_counts():
    ours = {task: [[-2.0, -1.0], [-1.0, -2.0]] for task in peers.TASKS}
    theirs = {task: [[-1.0001, -1.0002], [-1.0, -2.0]] for task in peers.TASKS}
    fake = SimpleNamespace(stage=lambda *_: {"answers": ours}, peer=lambda *_: {"answers": theirs})
    assert peers.other_answers(fake, "bfloat16")["ratio"] == len(peers.TASKS)  # type: ignore[arg-type]


# --- GPUs ---


def test_the_gpu_benchmark_runs_its_stages_on_a_simulated_gpu(tmp_path: Path, monkeypatch: Patch):
    """Accelerate knows no simulated GPU, so nothing is trained."""
    seconds = {"seconds": 2.0, "block": 0.1, "peak": 0, "needed": 1, "share": 0.5}
    monkeypatch.setattr(gpu, "recovery", lambda *_: seconds)
    recipes_by_statistics = {"norms": "wanda", "gram": "admm", "fisher": "fisher"}
    pruned = [(recipe, statistics, {"recipe": recipe}) for statistics, recipe in recipes_by_statistics.items()]
    monkeypatch.setattr(gpu, "PRUNED", pruned)
    monkeypatch.setattr(gpu, "CHECKED", {"wanda 2:4": {"pattern": "2:4"}})
    with simulated_gpu():
        assert gpu.main(["--tiny", "--out", str(tmp_path / "gpu.json")]) == 0
    rows = origin.read_rows(tmp_path / "gpu.json")
    kinds = Counter(name.partition(": ")[0] for name in rows)
    assert kinds == {"product in bfloat16": 1, "product in float32": 1, "check": 8, "stage": 13}
    assert "a simulated GPU" in rows["stage: mask fisher"]["origin"]["protocol"]
    page = figures.gpu(rows)
    assert "| recover, 20 steps | 2.0 | 0.0 of 0.0 | 50 % |" in page
    assert page.count("yes") == 8


@pytest.mark.slow  # every check and every timing, of a training too
def test_the_gpu_benchmark_runs_on_a_cpu(capsys: Capture):
    assert gpu.main(["--device", "cpu", "--tiny"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("| yes |" in line for line in lines) == 11
    stages = ("| calibrate ", "| mask ", "| apply ", "| perplexity ", "| zero-shot ", "| recover, ")
    assert sum(line.startswith(stages) for line in lines) == 19


def test_the_gpu_benchmark_finds_a_kernel_that_is_wrong_on_a_gpu(tmp_path: Path, monkeypatch: Patch):
    """It removes one weight too many of each row."""
    keep_highest = selection.keep_highest
    monkeypatch.setattr(selection, "keep_highest", lambda score, kept: keep_highest(score, kept - score.is_cuda))
    monkeypatch.setattr(gpu, "CHECKED", {"wanda": {}})
    monkeypatch.setattr(gpu, "times", lambda *_: [])
    with simulated_gpu():
        assert gpu.main(["--tiny", "--out", str(tmp_path / "gpu.json")]) == 1
    rows = origin.read_rows(tmp_path / "gpu.json")
    assert not rows["check: masks of the same statistics, wanda, share that differs"]["value"]["met"]
    assert rows["check: norms, largest relative difference"]["value"]["met"]


def test_times_of_some_blocks_are_those_of_further_blocks():
    """The first block warms up. Seven linears a block, of which four blocks were written."""
    shown = [(0, 0.0), *((done, 10 + done) for done in range(1, 29))]
    assert gpu.further(shown, 4) == pytest.approx(7)


def test_the_least_work_of_a_stage_is_what_a_model_computes():
    """Torch counts the products of transformers' model on tensors without values; of attention, all pairs."""
    config = json.loads((floors.CONFIGS / "llama-3.1-8b.json").read_text()) | {"num_hidden_layers": 2}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
        tokens = torch.zeros(1, 64, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens)
    attention = counter.get_flop_counts()["Global"][torch.ops.aten.bmm]
    work = floors.work_of_stages(config, floors.Protocol(windows=1, length=64, evaluated=64))
    assert attention == 2 * 4 * 64**2 * 4096
    assert work["perplexity"].half == counter.get_total_flops() - attention / 2


def test_the_least_work_of_a_solver_is_what_it_multiplies():
    """Torch counts products on the simulated GPU; it does not count Cholesky factors."""
    widths = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    inputs = {16: (16, 8, 8, 16, 32, 32), 32: (16,)}  # the outputs of the linears, by the width of their input
    with simulated_gpu(), FlopCounterMode(display=False) as counter:
        grams = {size: torch.eye(size, device="cuda") + 0.1 for size in (8, 16, 32)}
        for width, outputs in inputs.items():
            for out in outputs:
                weight = torch.randn(out, width).to("cuda")
                factors, mask = GramFactors(grams[width]), weight > 0
                fisher_least_squares(weight, mask, factors, grams[out], steps=15)
    config = widths | {"num_hidden_layers": 1, "vocab_size": 4}
    factors_of_inputs = (3 * 16**3 + 32**3) / 3
    work = floors.work_of_stages(config, floors.Protocol())["apply fisher"]
    assert counter.get_total_flops() == pytest.approx(work.single - factors_of_inputs)


def test_a_floor_is_what_a_hand_computes():
    """LLaMA-2-7B has 6,476,005,376 weights in linears, and 13.8 GB of masks and weights."""
    attention = 32 * 128 * 2 * 2048**2 * 4096
    half = 2 * 128 * 2048 * 6_476_005_376 + attention
    rows = [row.strip("| ").split(" | ") for row in floors.table().splitlines()]
    cells = {tuple(row[:2]): row[2:] for row in rows}
    assert cells["LLaMA-2-7B", "`calibrate`, `wanda`"][3] == f"{half / 989e12:.2g}" == "3.6"
    config = json.loads((floors.CONFIGS / "llama-2-7b.json").read_text(encoding="utf-8"))
    mask = floors.work_of_stages(config, floors.Protocol())["mask wanda"].seconds(floors.H100)
    assert mask == pytest.approx(6_476_005_376 * (2 + 1 / 8) / 7e9)  # the disk is the slowest


# --- mutants ---


def test_every_mutant_changes_the_code_that_is_there():
    """`python scripts/mutants.py` runs them."""
    for name, row in mutants.TABLE.items():
        source = (ROOT / f"src/wanda_dvc/{name}.py").read_text(encoding="utf-8")
        for old, new in row["changes"]:
            compile(mutants.mutated(source, old, new), name, "exec")
        assert all((ROOT / f"tests/test_{test}.py").is_file() for test in row["tests"].split()), row["tests"]
