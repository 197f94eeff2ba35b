"""`recover`: zeros stay, a killed run ends with the same weights, two processes are one, and validation."""

import json
import os
import shutil
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate import PartialState
from cases.grids import short
from conftest import Capture, Make, Patch, fetch, mask_and_apply, prune
from families import ALL, save
from safetensors.torch import load_file
from short_training import CPU, LOW, pair, train, windows
from transformers import AutoModelForCausalLM

from wanda_dvc.commands.export import export, sections
from wanda_dvc.engine.checkpoint import Checkpoint, EditedCheckpoint, write_model
from wanda_dvc.engine.memory import FIXED, ModelSizes
from wanda_dvc.errors import UserError
from wanda_dvc.results.experiments import workspace
from wanda_dvc.results.show import show
from wanda_dvc.stages import needs, run
from wanda_dvc.stages.inputs import draw_calibration
from wanda_dvc.stages.needs import Conditions, requirements, training_ways
from wanda_dvc.stages.recover import _windows_of_text, recover, training_windows
from wanda_dvc.study.artifact import read_provenance, write_provenance
from wanda_dvc.study.files import Json, load_json, write_json
from wanda_dvc.study.folder import Study
from wanda_dvc.training import trainer
from wanda_dvc.training.sharding import local, shard


def written(view: Any, folder: Path) -> dict[str, torch.Tensor]:
    list(write_model(view, folder))
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("changes", [{}, {"dtype": torch.bfloat16}, LOW], ids=["float32", "bfloat16", "low"])
@pytest.mark.parametrize("tied", [True, False])
def test_divergence_falls_and_zeros_stay(tied: bool, changes: dict[str, Any], tmp_path: Path):
    dense, pruned = pair(tmp_path, tie_word_embeddings=tied, attention_bias=True)  # biases of 0 change
    with mock.patch.object(trainer, "RecoveryTrainer", wraps=trainer.RecoveryTrainer) as trainers:
        weights, curve = train(dense, pruned, tmp_path / "work", steps=19, **changes)
    assert all(one.grad is None for one in trainers.call_args.kwargs["dense"].parameters())  # no memory
    assert curve[-1]["tokens"] == 19 * 2 * 16  # also after a last step between two evaluations
    assert curve[-1]["text"] < curve[0]["text"]
    assert curve[-1]["embedded"] < curve[0]["embedded"]
    assert curve[-1]["score"] == pytest.approx(sum(curve[-1][x] / curve[0][x] / 2 for x in ("text", "embedded")))
    assert trainer.root_mean_square(torch.tensor([0.0, 3.0, 4.0])) == pytest.approx(12.5**0.5)  # of what stays
    before, after = load_file(pruned / "model.safetensors"), written(weights, tmp_path / "made")
    for name, weight in before.items():
        if weight.dim() > 1:
            assert torch.equal(weight == 0, after[name] == 0), name
        assert not torch.equal(weight, after[name]), name


def test_the_training_is_the_one_by_hand(tmp_path: Path):
    """In float64: KL(dense ‖ pruned), clipped gradients of what is not zero, AdamW, the schedule, the best step."""
    dense, pruned = pair(tmp_path, attention_bias=True)
    steps, rate = 6, 0.02
    weights, curve = train(dense, pruned, tmp_path / "work", steps=steps, rate=rate)
    teacher, student = (AutoModelForCausalLM.from_pretrained(x, dtype=torch.float64).eval() for x in (dense, pruned))
    parameters = dict(student.named_parameters())
    start = {name: x.detach().clone() for name, x in parameters.items()}
    moments = {name: (torch.zeros_like(x), torch.zeros_like(x)) for name, x in start.items()}

    def divergence(tokens: torch.Tensor) -> torch.Tensor:
        p, q = (model(input_ids=tokens).logits.softmax(-1) for model in (teacher, student))
        return (p * (p / q).log()).sum(-1).mean()

    scores, reached = list[float](), list[dict[str, torch.Tensor]]()
    before: list[float] = []
    for step, tokens in enumerate([*windows(2 * steps).split(2), None]):
        with torch.no_grad():
            found = [divergence(windows(2, seed=seed)).item() for seed in (1, 2)]
        before = before or found
        scores.append(sum(one / other / 2 for one, other in zip(found, before, strict=True)))
        reached.append({name: x.detach().clone() for name, x in parameters.items()})
        if tokens is None:
            break
        gradients = dict(zip(parameters, torch.autograd.grad(divergence(tokens), [*parameters.values()]), strict=True))
        for name, x in start.items():
            if x.dim() > 1:
                gradients[name] = gradients[name] * (x != 0)
        norm = sum(x.square().sum() for x in gradients.values()) ** 0.5
        falling = step if step < 1 else (steps - step) / (steps - 1)  # a warm-up of one step
        for name, x in parameters.items():
            gradient = gradients[name] / max(1, norm)
            mean, square = moments[name]
            mean += 0.1 * (gradient - mean)
            square += 0.001 * (gradient**2 - square)
            size = max(1e-3, (start[name].square().sum() / max(1, start[name].count_nonzero())).item() ** 0.5)
            change = mean / (1 - 0.9 ** (step + 1)) / ((square / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
            x.data -= falling * rate * size * change
    assert [one["score"] for one in curve] == pytest.approx(scores, rel=1e-4)
    best = reached[scores.index(min(scores))]
    for name, weight in written(weights, tmp_path / "made").items():
        change = best[name] - start[name]
        assert (weight.double() - start[name] - change).norm() < 1e-2 * change.norm(), name


@pytest.mark.parametrize("changes", [{}, LOW])
def test_a_killed_training_resumes_and_ends_with_the_same_weights(changes: dict[str, Any], tmp_path: Path):
    dense, pruned = pair(tmp_path)
    whole, curve = train(dense, pruned, tmp_path / "whole", **changes)
    work = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        train(dense, pruned, work, on_step=mock.Mock(side_effect=[*[None] * 9, KeyboardInterrupt]), **changes)
    _, last = sorted(work.glob("checkpoint-*"))
    for step in (2, 10):  # an older one; and the kill came while the next one was written
        state = shutil.copytree(last, work / f"checkpoint-{step}") / "trainer_state.json"
        state.write_text(state.read_text().replace('"global_step": 8', f'"global_step": {step}'))
    state.unlink()
    steps: list[int] = []
    with mock.patch.object(trainer, "mean_divergence", wraps=trainer.mean_divergence) as measured:
        again, resumed = train(dense, pruned, work, on_step=steps.append, **changes)
    passes = 1 + bool(changes)  # with low memory, each backward pass computes the loss again
    assert measured.call_count == passes * 12 + 6 * 4  # the steps that were left, the evaluations
    assert steps == [*range(9, 21)]  # those before the kill count
    assert resumed == curve
    one, other = (written(made, tmp_path / str(place)) for place, made in enumerate((whole, again)))
    assert all(torch.equal(one[name], other[name]) for name in one | other)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_the_best_weights_stay_and_a_training_that_does_not_help_is_dropped(stored: torch.dtype, tmp_path: Path):
    dense, pruned = pair(tmp_path, dtype=stored)
    weights, curve = train(dense, pruned, tmp_path / "far", rate=1.0, steps=4)
    best = min(curve, key=lambda one: one["text"])
    assert best not in (curve[0], curve[-1])
    made = written(weights, tmp_path / "made")
    # Written again by a run that was killed after the training, which has nothing to train.
    again, same = train(
        dense, pruned, tmp_path / "far", rate=1.0, steps=4, on_step=mock.Mock(side_effect=AssertionError)
    )
    assert same == curve
    assert all(torch.equal(weight, made[name]) for name, weight in written(again, tmp_path / "made again").items())
    _, seen = train(dense, tmp_path / "made", tmp_path / "again", steps=1)
    assert seen[0]["text"] == pytest.approx(best["text"], rel=1e-4)
    assert train(dense, pruned, tmp_path / "one", steps=1, rate=1e-3)[0] is not None
    for start in (dense, pruned):
        weights, _ = train(dense, start, tmp_path / start.name, steps=2, rate=0.0 if start == pruned else 0.01)
        assert weights is None  # there is nothing to gain, or nothing is gained


FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}  # of `accelerate launch --use_fsdp --fsdp_version 2`


def launch(processes: int, environ: dict[str, str], function: Callable[[int], object]) -> list[int]:
    """Run a function of the rank in processes as `accelerate launch` starts them; return their exit codes."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"ACCELERATE_USE_CPU": "1", "ACCELERATE_MIXED_PRECISION": "bf16"}  # of an `accelerate config`
    children = []
    for rank in range(processes):
        if not (child := os.fork()):
            os.environ.update(shared | environ, RANK=str(rank), LOCAL_RANK=str(rank))
            code = 1
            try:
                PartialState._reset_state()  # as in a new process
                function(rank)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


@pytest.mark.parametrize(
    ("dtype", "rtol"),
    [(torch.float32, 1e-4), (torch.bfloat16, 2**-7)],  # a value in bfloat16 may be rounded up and down
    ids=["float32", "bfloat16"],
)
def test_two_processes_make_the_weights_of_one(dtype: torch.dtype, rtol: float, tmp_path: Path):
    """Also if the GPU of one has memory for all activations, and that of the other has not."""
    dense, pruned = pair(tmp_path, dtype=dtype)
    one, curve = train(dense, pruned, tmp_path / "one", steps=4)

    def run(rank: int) -> None:
        made, seen = train(dense, pruned, tmp_path / "two", steps=4, checkpointing=rank == 1)
        (tmp_path / f"{rank}.json").write_text(json.dumps(seen))
        if rank == 0:
            written(made, tmp_path / str(rank))

    assert launch(2, FSDP, run) == [0, 0]
    first = load_file(tmp_path / "0" / "model.safetensors")
    for name, weight in written(one, tmp_path / "made").items():
        torch.testing.assert_close(first[name], weight, rtol=rtol, atol=1e-5)
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert seen[0] == seen[1]
    for ours, theirs in zip(seen[0], curve, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)


@pytest.mark.full  # three launches
@pytest.mark.parametrize("way", [{}, LOW], ids=["float32", "low"])
def test_a_killed_training_of_split_models_resumes_and_ends_with_the_same_weights(way: dict[str, Any], tmp_path: Path):
    dense, pruned = pair(tmp_path)
    curve = train(dense, pruned, tmp_path / "one", steps=12, **way)[1]

    def run(place: str, **changes: Any) -> Callable[[int], None]:
        def run_rank(rank: int) -> None:
            made, seen = train(dense, pruned, tmp_path / place, steps=12, **way, **changes)
            # With codes of 8 bits, processes round other random numbers.
            assert seen[-1]["text"] == pytest.approx(curve[-1]["text"], rel=0.02 if way else 1e-3)
            if rank == 0:
                written(made, tmp_path / f"{place}-model")

        return run_rank

    assert launch(2, FSDP, run("whole")) == [0, 0]
    assert launch(2, FSDP, run("killed", on_step=mock.Mock(side_effect=[*[None] * 6, KeyboardInterrupt]))) == [1, 1]
    (last,) = (tmp_path / "killed").glob("checkpoint-*")
    assert {path.name for path in last.glob("states-*")} == {"states-0.pt", "states-1.pt"}
    assert launch(2, FSDP, run("killed")) == [0, 0]
    whole, resumed = (load_file(tmp_path / f"{place}-model" / "model.safetensors") for place in ("whole", "killed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole | resumed)
    before = load_file(pruned / "model.safetensors")
    assert all(torch.equal(weight == 0, resumed[name] == 0) for name, weight in before.items() if weight.dim() > 1)


@pytest.mark.full
def test_processes_that_split_a_model_train_it_in_the_first_ones_way(study: Make, monkeypatch: Patch):
    made = prune(fetch(study(**SMALL)))
    for module in (trainer, needs):
        monkeypatch.setattr(module, "LOGITS_OF_SLICE", 2**12)

    def run(rank: int) -> None:
        given = Conditions(made, ModelSizes.read(made.model("dense")))
        full, _, low = (FIXED + needs.training_memory(given, way) for way in needs.TRAINING_WAYS)
        monkeypatch.setattr("wanda_dvc.machine.free_memory", lambda: low if rank == 0 else full)
        recover(study=made)

    assert launch(2, FSDP, run) == [0, 0]
    provenance = read_provenance(made.model("recovered"), "recover")
    assert provenance["trained"]
    assert provenance["optimizer_states"] == "8 bits"


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view")  # OPT's; no operation writes to it
@pytest.mark.parametrize("family", short(ALL, "stablelm"))
def test_a_split_model_has_the_gradients_of_a_complete_one(family: str, tmp_path: Path):
    folders = pair(tmp_path, family=family)

    def gradients(divergence: Any, is_split: bool) -> dict[str, torch.Tensor]:
        dense, pruned = (trainer.load_for_training(folder, torch.float32, CPU) for folder in folders)
        dense.requires_grad_(False)
        if is_split:
            shard(dense, CPU)
            shard(pruned, CPU)
        divergence(dense, pruned, windows(2)).backward()
        return {name: local(x.grad) for name, x in pruned.named_parameters() if x.grad is not None}

    def run(_: int) -> None:
        torch.distributed.init_process_group("gloo")
        for divergence in (trainer.divergence_of_windows, trainer.sliced_divergence):
            complete, split = (gradients(divergence, is_split) for is_split in (False, True))
            assert complete.keys() == split.keys()
            assert all(torch.equal(complete[name], split[name]) for name in complete)

    assert launch(1, {}, run) == [0]


@pytest.mark.parametrize("family", short(ALL, "stablelm"))
def test_every_family_recovers_some_steps(family: str, tmp_path: Path):
    dense, pruned = pair(tmp_path, family=family)
    rows = windows(2).repeat(4, 1)  # trained on, and measured
    held = {"text": rows[:2], "embedded": rows[:2]}
    weights, curve = train(dense, pruned, tmp_path / "a", windows=rows, validation=held, rate=1e-3, checkpointing=True)
    assert weights is not None
    assert curve[-1]["text"] < curve[0]["text"]
    before, after = load_file(pruned / "model.safetensors"), written(weights, tmp_path / "made")
    assert before.keys() == after.keys()
    assert all(after[name][weight == 0].count_nonzero() == 0 for name, weight in before.items() if weight.dim() > 1)


def test_a_launch_that_cannot_train_is_refused(tmp_path: Path):
    dense, pruned = pair(tmp_path)
    refused = {
        "4 processes, expected a divisor": {"WORLD_SIZE": "4"} | FSDP,
        "found copies .* --use_fsdp": {"WORLD_SIZE": "2"},
        "found copies of the model, DeepSpeed": {"ACCELERATE_USE_DEEPSPEED": "true"},
        "found .* --fsdp_version 2": {"ACCELERATE_USE_FSDP": "true", "WORLD_SIZE": "2"},
    }
    for said, environ in refused.items():
        with mock.patch.dict(os.environ, environ), pytest.raises(UserError, match=f"accelerate launch: {said}"):
            train(dense, pruned, tmp_path / "work")


SMALL = {"recovery__tokens": 1024, "recovery__rate": 0.01}


@pytest.fixture
def recovered(calibrated_study: Make) -> Study:
    made = mask_and_apply(calibrated_study(**SMALL, pattern="2:4"))
    run("recover", study=made)
    return made


def test_the_recovered_model_is_the_one_that_is_shown_and_exported(recovered: Study, tmp_path: Path):
    for part in ("dense", "pruned", "recovered"):
        run("perplexity", study=recovered, variant=part)
    curve = recovered.plots("recovery").read_text().splitlines()
    assert curve[0] == "tokens,text,embedded"
    assert float(curve[-1].split(",")[1]) < float(curve[1].split(",")[1])
    assert load_json(recovered.metrics("recovered", "sparsity")) == {"sparsity": 0.5}
    before, after = (load_file(recovered.model(name) / "model.safetensors") for name in ("pruned", "recovered"))
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(before[name] == 0, after[name] == 0)
    experiment = workspace(recovered)
    assert list(experiment.models) == ["dense", "pruned", "recovered"]
    assert experiment.final is experiment.results["recovered"]
    (row,) = [line for line in show(study=recovered).splitlines() if line.startswith("| divergence, nats")]
    assert row.count("to") == 2
    said = export(study=recovered, experiment=None, target=tmp_path / "exported")
    assert "the recovered model of the workspace" in said
    assert torch.equal(load_file(tmp_path / "exported" / "model.safetensors")[name], after[name])
    assert "were then trained on 1,024 tokens" in (tmp_path / "exported" / "README.md").read_text(encoding="utf-8")


def test_a_training_that_did_not_help_is_reported(recovered: Study):
    own = read_provenance(recovered.model("recovered"), "recover")
    write_provenance(recovered.model("recovered"), own | {"trained": False, "tokens": 512})
    results = sections(workspace(recovered))["Results"]
    assert "A training on 512 tokens towards the dense model did not help" in results


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rate": 0.02}, "models/recovered was made with other settings: rate=0.02; run `dvc repro"),
        ({"pruned": "0"}, "models/recovered: found another pruned model's; run `dvc repro"),
    ],
)
def test_a_recovered_model_of_other_inputs_is_not_exported(recovered: Study, tmp_path: Path, changes: Json, says: str):
    own = read_provenance(recovered.model("recovered"), "recover")
    changed = own | changes if "pruned" in changes else own | {"recovery": own["recovery"] | changes}
    write_provenance(recovered.model("recovered"), changed)
    with pytest.raises(UserError, match=says):
        export(study=recovered, experiment=None, target=tmp_path / "exported")
    stale = workspace(recovered)
    assert not stale.results["recovered"].metrics
    if "pruned" in changes:
        assert "models/recovered belongs to another experiment than models/pruned/" in stale.notes[-1]


def test_without_tokens_there_is_no_recovered_model(calibrated_study: Make, recovered: Study, capsys: Capture):
    off = calibrated_study(pattern="2:4")
    for stage in ("download", "recover", "perplexity"):
        run(stage, study=off, variant={"download": "recovery", "perplexity": "recovered"}.get(stage, ""))
    assert [path.name for path in off.model("recovered").iterdir()] == ["none.json"]
    assert "recover: not needed with these settings" in capsys.readouterr().err
    assert list(workspace(off).models) == ["dense", "pruned"]


def test_a_pruned_model_of_another_dense_model_is_not_recovered(recovered: Study):
    dense = recovered.model("dense")
    write_provenance(dense, read_provenance(dense, "download model") | {"sha256": "0" * 64})
    with pytest.raises(UserError, match=r"models/pruned/: made from .*; run `dvc repro` or `wanda-dvc apply`"):
        recover(study=recovered)


def test_windows_are_not_the_calibrations_and_validation_has_others(study: Make):
    made = fetch(study(**SMALL, calibration__windows=8), "model", "calibration")
    rows, held = training_windows(made)
    drawn = draw_calibration(made).tokens
    pieces = {tuple(row[place : place + 32].tolist()) for row in drawn for place in range(33)}
    for row in (*rows, *held["text"]):
        assert not any(tuple(row[place : place + 32].tolist()) in pieces for place in range(33))
    every = [tuple(row.tolist()) for row in (*rows, *held["text"])]
    assert len(set(every)) == len(every) == 16 + 4
    assert len(held["embedded"]) == 4
    long = {"calibration__windows": 8, "recovery__tokens": 64 * 300}  # the text is shorter, and repeated
    rows, held = training_windows(study(**long))
    assert len(rows) == 300
    assert not {tuple(row.tolist()) for row in rows} & {tuple(row.tolist()) for row in held["text"]}


def test_the_training_takes_the_memory_that_is_free(study: Make, monkeypatch: Patch, capsys: Capture):
    made = prune(fetch(study(**SMALL)))
    for module in (trainer, needs):
        monkeypatch.setattr(module, "LOGITS_OF_SLICE", 2**12)
    sizes, run_of = ModelSizes.read(made.model("dense")), Conditions(made, ModelSizes.read(made.model("dense")))
    full, twice, low = (FIXED + needs.training_memory(run_of, way) for way in needs.TRAINING_WAYS)
    assert low < twice < full
    for free, expected in (
        (full, (False, False)), (full - 1, (False, True)), (twice, (False, True)), (twice - 1, (True, True)),
        (low, (True, True)),
    ):  # fmt: skip
        monkeypatch.setattr("wanda_dvc.machine.free_memory", lambda free=free: free)
        assert training_ways(made, sizes)[0] == expected
        assert requirements(made, "recover", sizes, free).memory == {2: full, 1: twice, 0: low}[expected.count(False)]
    assert requirements(made, "recover", sizes).memory == low
    with mock.patch.dict(os.environ, WORLD_SIZE="2"), pytest.raises(UserError, match="copies of the model"):
        training_ways(made, sizes)
    recover(study=made)
    assert "recover: weights in bfloat16 and optimizer states in 8 bits" in capsys.readouterr().err
    provenance = read_provenance(made.model("recovered"), "recover")
    assert provenance["trained_in"] == "bfloat16"
    assert (provenance["weights"], provenance["optimizer_states"]) == ("bfloat16 and 8 bits", "8 bits")
    assert provenance["trained"]
    monkeypatch.setattr("wanda_dvc.machine.free_memory", lambda: low - 1)
    with pytest.raises(UserError, match=r"recovery.tokens: found .*B, expected .* of memory; set it to 0"):
        recover(study=made)


def test_an_interrupted_training_keeps_its_way_where_it_fits(study: Make, monkeypatch: Patch, capsys: Capture):
    made = prune(fetch(study(**SMALL)))
    for module in (trainer, needs):
        monkeypatch.setattr(module, "LOGITS_OF_SLICE", 2**12)
    given = Conditions(made, ModelSizes.read(made.model("dense")))
    full, _, low = (FIXED + needs.training_memory(given, way) for way in needs.TRAINING_WAYS)
    ways = []

    def interrupted(*_: Any, low_memory: bool, work: Path, **__: Any) -> Any:
        ways.append(low_memory)
        write_json(work / "checkpoint-8" / "trainer_state.json", {"global_step": 8})
        raise KeyboardInterrupt

    monkeypatch.setattr("wanda_dvc.stages.recover.train", interrupted)
    for free, is_low in ((low, True), (full, True)):
        monkeypatch.setattr("wanda_dvc.machine.free_memory", lambda free=free: free)
        with pytest.raises(KeyboardInterrupt):
            recover(study=made)
        assert ways[-1] is is_low
    shutil.rmtree(made.work_root)
    for free, is_low in ((full, False), (low, True)):
        monkeypatch.setattr("wanda_dvc.machine.free_memory", lambda free=free: free)
        assert "begins anew" not in capsys.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            recover(study=made)
        assert ways[-1] is is_low
    assert "does not fit the free memory, or this launch: this one begins anew" in capsys.readouterr().err


def test_the_provenance_is_that_of_the_best_score(study: Make, monkeypatch: Patch, capsys: Capture):
    made = prune(fetch(study(**SMALL)))
    of = [(0, 1.0, 1.0, 1.0), (512, 1.1, 0.1, 0.6), (1024, 0.9, 0.7, 0.8)]
    checkpoint = Checkpoint(made.model("pruned"))
    curve = [dict(zip(("tokens", "text", "embedded", "score"), one, strict=True)) for one in of]
    found = EditedCheckpoint(checkpoint, checkpoint.read, {}), curve
    monkeypatch.setattr("wanda_dvc.stages.recover.train", lambda *_, **__: found)
    recover(study=made)
    assert read_provenance(made.model("recovered"), "recover")["tokens"] == 512
    assert "did not help on the training text;" in capsys.readouterr().err


def test_a_model_trains_without_dropout(tmp_path: Path):
    model = trainer.load_for_training(save("gpt2", tmp_path / "model"), torch.float32, CPU).train()
    assert torch.equal(model(windows(2)).logits, model(windows(2)).logits)


def test_a_step_has_as_many_windows_as_set_and_the_rate_grows_by_their_root(study: Make, tmp_path: Path):
    made = fetch(study(**SMALL, recovery__batch=3), "model", "calibration")
    rows, _ = training_windows(made)
    assert len(rows) == 1024 // 64 // 3 * 3
    assert made.stage_input("recover")["batch"] == 3
    dense, pruned = pair(tmp_path)
    steps: list[int] = []
    with mock.patch.object(trainer, "RecoveryTrainer", wraps=trainer.RecoveryTrainer) as trainers:
        _, curve = train(dense, pruned, tmp_path / "work", windows=windows(24), batch=8, on_step=steps.append)
    assert steps == [1, 2, 3]
    assert curve[-1]["tokens"] == 24 * 16
    parameters = trainer.load_for_training(pruned, torch.float32, CPU).parameters()
    expected = [0.01 * 2 * trainer.root_mean_square(parameter.detach()) for parameter in parameters]  # √(8 / 2)
    groups = trainers.call_args.kwargs["optimizers"][0].param_groups
    assert [group["initial_lr"] for group in groups] == pytest.approx(expected)


def test_a_short_text_is_named_by_its_own_setting(study: Make, tmp_path: Path):
    (tmp_path / "short.txt").write_text("Short.", encoding="utf-8")
    made = study(recovery__tokens=512, recovery__text={"source": str(tmp_path / "short.txt")})
    fetch(made, "model", "recovery")
    with pytest.raises(UserError, match=r"^recovery.text: \d+ tokens, expected 1 windows of 64 or more"):
        _windows_of_text(made, "recovery", made.stage_input("recover"), 4, calibrated=0)
