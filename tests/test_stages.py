"""The stages on a tiny model, called as plain functions."""

import csv
import io
import json
import math
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from cases.grids import OF_WEIGHTS, short
from cases.models import tensors as spoil_weights
from conftest import Capture, Make, Patch, calibrate, fetch, interrupted, mask_and_apply, shared, tree
from filelock import FileLock, Timeout
from safetensors.torch import load_file
from simulated_gpu import simulated_gpu
from transformers import AutoModelForCausalLM, AutoTokenizer

from wanda_dvc.catalog import methods
from wanda_dvc.engine import divergence
from wanda_dvc.engine.accelerator import Copies
from wanda_dvc.engine.checkpoint import Checkpoint
from wanda_dvc.engine.decoder import Decoder
from wanda_dvc.engine.forward import ModelRunner
from wanda_dvc.engine.harness import EngineLM
from wanda_dvc.errors import UserError
from wanda_dvc.params import Tasks
from wanda_dvc.pruning.masks import MaskRule, choose_linear
from wanda_dvc.pruning.statistics import BlockStats, InputStats
from wanda_dvc.results import stats
from wanda_dvc.results.show import show
from wanda_dvc.sources.tasks import find_tasks
from wanda_dvc.stages import process, run
from wanda_dvc.stages.apply import apply
from wanda_dvc.stages.inputs import removal_of
from wanda_dvc.stages.mask import MaskJob, mask, score_block
from wanda_dvc.stages.perplexity import perplexity
from wanda_dvc.stages.zero_shot import zero_shot
from wanda_dvc.study import artifact
from wanda_dvc.study.artifact import digest, files_digest, read_provenance, write_provenance
from wanda_dvc.study.files import load_json, write_json
from wanda_dvc.study.folder import Study
from wanda_dvc.study.protocol import TOKENIZER
from wanda_dvc.study.tensors import pack_masks, read_masks, read_stats, write_masks

# --- download ---


def test_a_mirror_is_laid_out_like_the_hub(study: Make, tmp_path: Path):
    mirror = tmp_path / "mirror/Salesforce/wikitext/wikitext-2-raw-v1"
    mirror.mkdir(parents=True)
    (mirror / "validation.jsonl").write_text('{"text": "x"}\n{"text": "y"}\n')
    there = {"runtime__mirror": str(tmp_path / "mirror")}
    made = study(calibration__text__source="wikitext2", calibration__text__split="validation", **there)
    fetch(made, "calibration")
    assert made.text("calibration") == "x y"
    with pytest.raises(UserError, match="test.jsonl: missing or not a file, expected a file; put it there"):
        fetch(study(perplexity__texts__embedded__source="wikitext2", **there), "perplexity")


@pytest.mark.slow  # lm-eval reads 8,761 questions
def test_a_mirror_of_the_real_benchmarks_is_taken_whole(study: Make):
    settings = {"tasks__source": "benchmark", "runtime__mirror": str(shared() / "datasets")}
    names = {"piqa": 1838, "hellaswag": 1000, "arc_easy": 2376, "boolq": 3270, "rte": 277}
    made = study(tasks__names=list(names), perplexity__texts__embedded__source="wikitext2", **settings)
    fetch(made, "tasks", "perplexity")
    rows = {name: len((made.data("tasks") / name / "items.jsonl").read_bytes().splitlines()) for name in names}
    assert rows == names
    assert len(made.text("perplexity/embedded").encode()) > 1_290_000


# --- calibrate, mask, apply ---


def test_what_is_plotted_is_what_the_stages_found(calibrated_study: Make):
    made = mask_and_apply(calibrated_study(sparsity=0.3))

    def plotted(name: str) -> list[dict[str, str]]:
        with made.plots(name).open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    weights = load_file(made.model("pruned") / "model.safetensors")
    expected = {(str(block), x): weights[f"{x}.weight"] for block in range(2) for x in read_masks(made.masks, block)}
    rows = plotted("sparsity")
    assert [(row["block"], row["linear"]) for row in rows] == list(expected)
    for row, weight in zip(rows, expected.values(), strict=True):
        assert int(row["zeros"]) == (weight == 0).sum()
        assert int(row["weights"]) == weight.numel()
        assert float(row["sparsity"]) == pytest.approx((weight == 0).float().mean().item(), abs=1e-5)
    zeros, total = (sum(int(row[name]) for row in rows) for name in ("zeros", "weights"))
    assert load_json(made.metrics("pruned", "sparsity")) == {"sparsity": round(zeros / total, 6)}  # no short decimal


@pytest.mark.parametrize(
    ("changes", "loops"),
    [
        ({"sparsity": 0.3}, lambda score: oracle.keep_by_row(score, int(len(score[0]) * 0.3))),
        ({"group": "linear"}, lambda score: oracle.keep_by_layer(score, len(score) * len(score[0]) // 2)),
        ({"pattern": "2:4"}, lambda score: oracle.keep_n_of_m(score, 2, 4)),
    ],
)
@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_masks_are_those_of_the_loops(calibrated_study: Make, method: str, changes: dict[str, Any], loops):
    made = calibrated_study(method=method, **changes)
    mask(study=made)
    weights = load_file(made.model("dense") / "model.safetensors")
    inputs, consumers, *_ = read_stats(made.norms, 1)
    keeps = read_masks(made.masks, 1)
    for source, names in consumers.items():
        for name in names:
            norm = inputs[source].norm.tolist()
            score = oracle.scores(weights[f"{name}.weight"].tolist(), [norm] if method == "wanda" else None)
            assert keeps[name].tolist() == loops(score)


def test_statistics_cut_in_another_way_are_refused(calibrated_study: Make):
    with pytest.raises(UserError, match=r"stats/: measured with .*'windows': 4.* expected .*'windows': 3"):
        mask(study=calibrated_study(calibration__windows=3))
    made = calibrated_study(recipe="admm")
    write_provenance(made.gram, read_provenance(made.gram, "calibrate") | {"params": {}})
    with pytest.raises(UserError, match="stats/gram: found a calibration of"):
        mask(study=made)
    mask(study=calibrated_study(recipe="admm", propagation="pruned"))  # it reads no cached Gram matrices


@pytest.mark.parametrize("name", short(OF_WEIGHTS, "ria"))
def test_a_weight_that_is_stored_across_is_chosen_as_its_transpose_is(name: str):
    generator = torch.Generator().manual_seed(0)
    weights = {"linear": torch.randn(13, 24, generator=generator)}
    weights["stored_across"] = weights["linear"].T.contiguous()
    squares = torch.randint(1, 4, (24,), generator=generator).double() ** 2
    block = BlockStats({"x": InputStats(squares, squares, 1)}, {"x": list(weights)}, ["stored_across"])
    x = None if methods()[name].needs == "gram" else block.inputs["x"]  # a solver without tokens: the identity
    rule = MaskRule(methods()[name], Fraction(1, 2))
    keeps = {linear: choose_linear(linear, weight, x, block, rule) for linear, weight in weights.items()}
    assert torch.equal(keeps["stored_across"].T, keeps["linear"])
    assert keeps["stored_across"].is_contiguous()


def test_linears_of_a_block_give_up_different_shares():
    weights = {name: torch.randn(8, 20) for name in ("a", "b")}
    block = BlockStats({"x": InputStats(torch.ones(20).double(), torch.ones(20).double(), 1)}, {"x": ["a", "b"]}, [])
    sparsity = {"a": Fraction("0.29"), "b": Fraction("0.7")}
    rule = MaskRule(methods()["wanda"], sparsity)
    keeps = {name: choose_linear(name, x, block.inputs["x"], block, rule) for name, x in weights.items()}
    assert {name: (~keep).sum(1).tolist() for name, keep in keeps.items()} == {"a": [5] * 8, "b": [14] * 8}


def test_the_next_weight_is_copied_to_the_gpu_while_one_is_scored(calibrated_study: Make, monkeypatch: Patch):
    """By the engine's copies, from pinned memory: a GPU scores weights faster than the link brings them."""
    made = calibrated_study()
    job = MaskJob(made.plan, Checkpoint(made.model("dense")), [Fraction(1, 2)] * 4, None, made.fisher)
    block = read_stats(made.norms, 1)
    expected = score_block(job, 1, block, torch.device("cpu")).masks
    linears, real = [*block.by_linear], choose_linear
    read = [threading.Event() for _ in linears]
    copy, copied = Copies.copy, list[threading.Thread]()

    def copying(self: Copies, tensor: torch.Tensor, into: torch.Tensor) -> None:
        copied.append(threading.current_thread())
        copy(self, tensor, into)
        read[len(copied) - 1].set()

    def choose(linear: str, weight: torch.Tensor, *args: Any) -> torch.Tensor:
        assert weight.is_cuda
        assert threading.current_thread() not in copied
        assert all(event.wait(timeout=5) for event in read[: linears.index(linear) + 2])
        return real(linear, weight, *args)

    monkeypatch.setattr(Copies, "copy", copying)
    monkeypatch.setattr("wanda_dvc.stages.mask.choose_linear", choose)
    with simulated_gpu():
        masks = score_block(job, 1, block, torch.device("cuda")).masks
    assert len(copied) == len(linears)
    assert all(torch.equal(masks[linear].cpu(), expected[linear]) for linear in linears)


def test_only_weights_that_are_scored_reach_the_device(calibrated_study: Make, monkeypatch: Patch):
    made = calibrated_study(pattern="neurons")
    device, checkpoint = torch.device("cpu"), Checkpoint(made.model("dense"))
    removal = removal_of(checkpoint, made.plan, device)
    job = MaskJob(made.plan, checkpoint, [Fraction(1, 2)] * 4, removal, made.fisher)
    copied = list[torch.Tensor]()

    def to_device(_: Copies, weights: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        for weight in weights:
            copied.append(weight)
            yield weight

    monkeypatch.setattr(Copies, "to_device", to_device)
    block = read_stats(made.norms, 1)
    masks = score_block(job, 1, block, device).masks
    assert [weight.shape for weight in copied] == [checkpoint.weight("model.layers.1.mlp.down_proj").shape]
    assert list(masks) == list(block.by_linear)


def test_a_mask_costs_one_bit_a_weight(tmp_path: Path):
    keep = torch.rand(64, 1001) > 0.5
    write_masks(tmp_path, 0, pack_masks({"a.linear": keep}))
    assert torch.equal(read_masks(tmp_path, 0)["a.linear"], keep)
    assert next(tmp_path.iterdir()).stat().st_size < 64 * 126 + 500


def test_work_lies_in_the_repository_that_dvc_was_started_in(study: Make, tmp_path: Path, monkeypatch):
    """A queued experiment's checkout is gone when it fails; `DVC_ROOT` names the repository that stays."""
    made = study()
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "repository"))
    with made.work({"a": 1}) as work:
        assert work.path.is_relative_to(tmp_path / "repository/.dvc/tmp/wanda-dvc")
        assert Study.find(made.root).root == made.root  # and what is written goes to the checkout


def test_two_runs_with_the_same_inputs_do_not_work_in_one_place(study: Make):
    with study().work({"a": 1}) as work, pytest.raises(Timeout):
        FileLock(f"{work.path}.lock", is_singleton=False).acquire(timeout=0)


def test_gram_matrices_that_nobody_fetches_do_not_stay(calibrated_study: Make, tmp_path: Path):
    """Norms and Gram matrices are measured together. DVC may restore the latter, or force the former alone."""
    made = calibrated_study(recipe="admm")
    run("calibrate", study=made, variant="norms")
    assert not [path for path in made.work_root.iterdir() if path.is_dir()]  # stats/gram is there
    gram = shutil.copytree(made.gram, tmp_path / "gram")
    shutil.rmtree(made.gram)
    run("calibrate", study=made, variant="norms")
    assert work_of(made)
    gram.rename(made.gram)  # as DVC restores it
    mask(study=made)
    assert not [path for path in made.work_root.iterdir() if path.is_dir()]


def work_of(made: Study) -> Path:
    (found,) = [path for path in (made.root / ".dvc/tmp/wanda-dvc").iterdir() if path.is_dir()]
    return found


def flip(path: Path) -> int:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    return path.write_bytes(content)


def test_progress_is_a_bar_on_a_terminal_and_a_line_a_minute_elsewhere(monkeypatch: pytest.MonkeyPatch):
    shown = []
    for is_terminal in (True, False):
        terminal = io.StringIO()
        monkeypatch.setattr(terminal, "isatty", lambda is_terminal=is_terminal: is_terminal)
        monkeypatch.setattr("sys.stderr", terminal)
        assert list(process.progress((7, 8, 9), total=10, what="blocks", at=lambda block: block)) == [7, 8, 9]
        shown.append(terminal.getvalue())
    assert " 10/10 " in shown[0].split("\r")[-1]  # of a resumed pass
    assert not shown[1]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda work: [path.unlink() for path in work.glob("own/*")],
        lambda work: [flip(path) for path in work.glob("own/*")],
        lambda work: [path.write_bytes(b"") for path in work.glob("own/*")],
        lambda work: [path.write_bytes(path.read_bytes() + b"more") for path in work.glob("own/*")],
        lambda work: (work / "progress.json").write_text("[]"),
        lambda work: (work / "progress.json").write_text('{"finished": 99}'),
        lambda work: (work / "progress.json").write_bytes(b"\xff\x00"),
    ],
    ids=["gone", "flipped", "empty", "longer", "list", "too-far", "binary"],
)
def test_progress_counts_only_with_the_states_that_it_names(calibrated_study: Make, spoil: Callable[[Path], object]):
    """A removal that was killed half-way left progress without states: the perplexity was that of zeros."""
    made = calibrated_study()
    perplexity(study=made, model="dense", text="embedded")
    complete = made.details("dense", "perplexity/embedded").read_bytes()
    with interrupted(divergence, "measure"):
        perplexity(study=made, model="dense", text="embedded")
    assert [*work_of(made).glob("own/*")]
    spoil(work_of(made))
    perplexity(study=made, model="dense", text="embedded")
    assert made.details("dense", "perplexity/embedded").read_bytes() == complete


@pytest.mark.parametrize("propagation", ["dense", "pruned"])
def test_blocks_that_a_killed_run_has_lost_are_made_again(calibrated_study: Make, propagation: str):
    """Finished work that had been moved away was published without its blocks, with exit 0."""
    made = calibrated_study(propagation=propagation, calibration__statistics="norms")
    mask(study=made)
    target, stage = (made.norms, calibrate) if propagation == "dense" else (made.masks, mask)
    complete = tree(target)
    with interrupted(artifact, "finish"):
        stage(study=made)
    shutil.rmtree(work_of(made) / "out")
    stage(study=made)
    assert tree(target) == complete


def test_an_m_that_does_not_divide_the_inputs_is_refused(calibrated_study: Make):
    made = calibrated_study(pattern="3:6")
    message = r"pattern: got 3:6, but model.layers.0.self_attn.\w* has 32 inputs, expected a multiple of 6"
    with pytest.raises(UserError, match=message):
        mask(study=made)
    assert not made.masks.exists()


def test_weights_that_are_not_finite_are_refused(calibrated_study: Make):
    made = calibrated_study(method="magnitude")
    spoil_weights(lambda x: x["model.layers.1.mlp.up_proj.weight"][0, 0].fill_(math.nan))(made.model("dense"))
    with pytest.raises(UserError, match=r"model.layers.1.mlp.up_proj: scores of method magnitude that are not finite"):
        mask(study=made)


# --- evaluation ---


@pytest.mark.parametrize("complete", [3, 0])
def test_the_rest_of_a_text_is_one_more_window_if_it_is_kept(study: Make, tiny: Path, tmp_path: Path, complete: int):
    """As the reproduction study takes it: total loss / total predictions."""
    (tmp_path / "text.txt").write_text("".join(chr(97 + (i * i) % 23) for i in range(complete * 50 + 17)))
    text = {"perplexity__texts__embedded__source": str(tmp_path / "text.txt")}
    made = fetch(study(perplexity__length=50, perplexity__windows="all", **text), "model", "perplexity")
    perplexity(study=made, model="dense", text="embedded")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
    tokens = torch.tensor(tokenizer(made.text("perplexity/embedded"))["input_ids"])
    with torch.no_grad():
        losses = [model(input_ids=row[None], labels=row[None]).loss.item() for row in tokens.split(50)]
    details = json.loads(made.details("dense", "perplexity/embedded").read_text())
    np.testing.assert_allclose(details["losses"], losses, rtol=1e-5)
    assert (details["protocol"]["windows"], details["protocol"]["rest"]) == (complete, 17)
    assert details["protocol"]["tokens_sha256"] == digest(tokens.tolist())
    value = json.loads(made.metrics("dense", "perplexity/embedded").read_text())["perplexity"]
    expected = math.exp((49 * sum(losses[:-1]) + 16 * losses[-1]) / (complete * 49 + 16))
    assert value == pytest.approx(expected, rel=1e-5)
    other = shutil.copytree(tiny, made.root / "other")
    (other / "tokenizer.json").write_text("{}")
    assert details["protocol"]["tokenizer_sha256"] == files_digest(tiny, TOKENIZER) != files_digest(other, TOKENIZER)
    if complete:
        assert abs(expected / math.exp(sum(losses) / 4) - 1) > 1e-4  # the windows' mean is another number


@pytest.mark.parametrize("losses", [[1.0, math.inf], [math.nan], [800.0, 900.0]])
def test_a_perplexity_that_overflows_has_diverged(losses: list[float]):
    """What `show` says of it: tests/test_numerics.py."""
    assert divergence.compute_perplexity(losses, [63] * len(losses)) == "diverged"


def name_no_tokens(folder: Path) -> None:
    """Leave a tokenizer without tokens that begin, end or fill a text, as GPT's is."""
    path = folder / "tokenizer_config.json"
    kept = {key: value for key, value in json.loads(path.read_text()).items() if not key.endswith("_token")}
    write_json(path, kept)


def test_a_question_without_a_context_needs_a_token_that_begins_it(tiny: Path, tmp_path: Path):
    folder = shutil.copytree(tiny, tmp_path / "model")
    name_no_tokens(folder)
    decoder = Decoder(folder, dtype=torch.float32, device=torch.device("cpu"))
    before = {name: id(parameter) for name, parameter in decoder.model.named_parameters(remove_duplicate=False)}
    lm = EngineLM(folder, ModelRunner(decoder, tmp_path / "work"), progress=lambda items: items)
    assert {name: id(x) for name, x in decoder.model.named_parameters(remove_duplicate=False)} == before
    with pytest.raises(UserError, match="the tokenizer has no bos_token and no eos_token, expected one"):
        lm.loglikelihood([SimpleNamespace(args=("Why?", " So")), SimpleNamespace(args=("", "So"))])


@pytest.mark.parametrize(("named", "limit"), [(True, 2), (False, 1)])
def test_zero_shot_asks_what_lm_eval_asks(study: Make, tiny: Path, named: bool, limit: int):
    """Each choice's log-likelihood, against the whole model's; prompts are those of lm-eval's own definition."""
    made = fetch(study(tasks__limit=limit), "model", "tasks")
    if not named:
        name_no_tokens(made.model("dense"))
    asked = list(map(json.loads, (made.data("tasks") / "piqa/items.jsonl").read_text().splitlines()[:limit]))
    zero_shot(study=made, model="dense")
    details = load_json(made.details("dense", "zero_shot"))["tasks"]["piqa"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
    right = {"acc": 0, "acc_norm": 0}
    for item, answer in zip(asked, details["items"], strict=True):
        context, choices = tokenizer(f"Question: {item['goal']}\nAnswer:")["input_ids"], (item["sol1"], item["sol2"])
        for choice, found in zip(choices, answer["loglikelihoods"], strict=True):
            wanted = tokenizer(f" {choice}")["input_ids"]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([context + wanted])).logits[0].log_softmax(-1)
            expected = sum(logits[len(context) + i - 1, token].item() for i, token in enumerate(wanted))
            assert found == pytest.approx(expected, rel=1e-4)
        each = [value / len(choice) for value, choice in zip(answer["loglikelihoods"], choices, strict=True)]
        assert answer["answer_norm"] == each.index(max(each))
        right["acc"] += answer["answer"] == item["label"]
        right["acc_norm"] += answer["answer_norm"] == item["label"]
    assert details["protocol"]["dense"] == read_provenance(made.model("dense"), "download model")["sha256"]
    numbers = load_json(made.metrics("dense", "zero_shot"))["piqa"]
    assert numbers == {measure: count / limit for measure, count in right.items()}
    (row,) = [line for line in show(study=made).splitlines() if line.startswith("| piqa, acc, %")]
    assert "to" in row


def test_a_task_without_an_accuracy_is_refused():
    for name in ("cola", "leaderboard_musr_murder_mysteries", "truthfulqa_mc2"):  # mcc, acc_norm, a share as acc
        with pytest.raises(UserError, match=rf"tasks.names: {name}: no multiple-choice task of .* with an accuracy"):
            find_tasks(Tasks(source="benchmark", names=[name]), None)


# --- results ---


def test_show_says_whose_model_is_in_the_workspace(calibrated_study: Make):
    made = mask_and_apply(calibrated_study())
    assert "another experiment" not in show(study=made)
    changed = calibrated_study(sparsity=0.7)
    shown = show(study=changed)
    assert "masks/ were made with other settings: sparsity=0.5; run `dvc repro`." in shown
    assert "measured sparsity" not in shown  # nothing says that the figures are of another sparsity than the title's
    mask(study=changed)  # as `dvc exp apply` leaves it: these masks, that model
    shown = show(study=changed)
    assert "models/pruned belongs to another experiment than masks/" in shown
    assert "other settings" not in shown
    assert "measured sparsity" not in shown
    apply(study=changed)
    assert "another experiment" not in show(study=changed)


def test_stats_are_a_summary_of_the_norms(calibrated_study: Make):
    made = calibrated_study()
    records = json.loads(stats.stats(study=made, block=1, as_json=True))
    inputs = read_stats(made.norms, 1).inputs
    assert [record["linears"][0] for record in records] == list(inputs)
    for record, x in zip(records, inputs.values(), strict=True):
        norm = sorted(enumerate(x.norm.tolist()), key=lambda pair: -pair[1])
        assert [(f["index"], f["norm"]) for f in record["largest"]] == norm[:5]
        assert record["max"] == norm[0][1]
        assert record["median"] == pytest.approx(float(np.median(x.norm)))
        assert record["outliers"] == pytest.approx(sum(v > 6 * record["median"] for _, v in norm) / len(norm))
    assert len(json.loads(stats.stats(study=made, block=None, as_json=True))) == 2 * 4
    with pytest.raises(UserError, match="--block: got 2, expected 0 to 1: the model has 2 blocks"):
        stats.stats(study=made, block=2, as_json=False)


def test_a_solver_refuses_stored_statistics_of_a_text_that_is_too_short(study: Make, tmp_path: Path):
    """DVC does not run `calibrate` again for another recipe."""
    (tmp_path / "short.txt").write_text("a few words " * 6)
    short = {"calibration__text": {"source": str(tmp_path / "short.txt")}, "calibration__length": 8}
    settings = short | {"calibration__windows": 60, "calibration__statistics": "gram"}
    calibrate(study=fetch(study(**settings, recipe="wanda"), "model", "calibration"))
    mask(study=study(**settings, recipe="wanda"))
    for recipe in ("wanda-refit", "admm"):
        with pytest.raises(UserError, match=r"calibration.text: \d+ distinct tokens, expected 480 for solvers"):
            mask(study=study(**settings, recipe=recipe))


def test_too_few_tokens_for_solvers_are_reported(calibrated_study: Make, capsys: Capture):
    calibrate(study=calibrated_study(calibration__statistics="gram"))
    shown = capsys.readouterr().err
    assert "calibrate: 256 distinct tokens, expected 480 for solvers" in shown
