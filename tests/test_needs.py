"""What a stage needs, from a config alone."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import save_tiny_model, text_of
from test_families import save

from wanda_dvc.engine import sizes
from wanda_dvc.engine.calls import calls_bytes
from wanda_dvc.engine.checkpoint import Checkpoint
from wanda_dvc.engine.decoder import LOGITS_AT_A_TIME
from wanda_dvc.engine.divergence import BYTES_A_TOKEN, TEMPORARIES
from wanda_dvc.engine.questions import ROW
from wanda_dvc.errors import UserError
from wanda_dvc.stages import STAGES
from wanda_dvc.stages import needs as stages
from wanda_dvc.stages.calibrate import calibrate
from wanda_dvc.stages.download import download
from wanda_dvc.stages.needs import NEEDS, Need, need
from wanda_dvc.study.project import Project
from wanda_dvc.views import needs

# The tiny model of conftest: q and o, k and v, three of the feed-forward, two norms; embeddings (tied), a norm.
PRUNABLE = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48
BLOCK = PRUNABLE + 2 * 32
REST = 260 * 32 + 32


@pytest.fixture
def config_only(project: Callable[..., Project], tiny: Path) -> Callable[..., Project]:
    """A project whose models are config.json and nothing else."""

    def make(**changes: object) -> Project:
        made = project(**changes)
        for which in ("dense", "pruned"):
            made.model(which).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(tiny / "config.json", made.model(which) / "config.json")
        return made

    return make


def test_sizes_are_those_of_the_checkpoint_and_need_no_weights(tmp_path: Path, tiny: Path):
    shutil.copyfile(tiny / "config.json", tmp_path / "config.json")
    found = sizes.sizes(tmp_path)
    checkpoint = Checkpoint(tiny)
    stored = [entry.length for entry in checkpoint.entries.values()]
    features = 4 * 32 + 2 * (32 + 16) + 3 * (32 + 48)
    squares, out_squares = 6 * 32**2 + 48**2, 3 * 32**2 + 2 * 16**2 + 2 * 48**2
    assert found == sizes.Sizes(
        count=4 * PRUNABLE,
        prunable=PRUNABLE,
        linear=32 * 48,
        features=features,
        widest=48,
        squares=squares,
        all_squares=4 * squares,
        output_squares=out_squares,
        all_output_squares=4 * out_squares,
        products=4 * 2 * (2 * 32**3 + 2 * 16 * 32**2 + 2 * 48 * 32**2 + 32 * 48**2),
        width=4,
        parameters=4 * BLOCK + REST,
        blocks=4,
        block=BLOCK,
        rest=REST,
        met=4 * PRUNABLE,
        scored=0,
        pairs=4 * 32,
        head=260 * 32,
        hidden=32,
        vocabulary=260,
        dtype="float32",
    )
    assert found.stored == sum(stored)


def test_an_untied_head_counts(tmp_path: Path):
    assert sizes.sizes(save_tiny_model(tmp_path, tie_word_embeddings=False)).rest == REST + 260 * 32


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("float16", 2)])
def test_what_each_stage_needs(
    config_only: Callable[..., Project], monkeypatch: pytest.MonkeyPatch, dtype: str, width: int
):
    def needed(project: Project, stage: str, part: str | None = None) -> tuple[int, int]:
        """Memory beyond what is the same for all models, and disk."""
        found = need(project, stage, part)
        assert found.memory.mapped == (stage in ("calibrate", "perplexity", "zero-shot") and dtype == "float32")
        return found.memory.total - sizes.LIBRARIES - sizes.ALLOCATOR, found.disk

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    project = config_only(dtype=dtype)  # 3 × 64 tokens to calibrate on, 4 × 64 to measure on
    features, linear = 4 * 32 + 2 * (32 + 16) + 3 * (32 + 48), 32 * 48
    walk = (2 * BLOCK + REST + linear + 64 * features) * width
    assert needed(project, "calibrate") == (walk + 64 * 48 * 8, 3 * 64 * 32 * width * 2)
    masks = PRUNABLE + sizes.SELECTION * linear
    assert needed(project, "mask") == (masks, 4 * PRUNABLE // 8)
    assert needed(project, "apply") == (9 * linear, (project.model("dense") / "config.json").stat().st_size)
    logits = 64 * 260 * (width + 8)
    slices = TEMPORARIES * 64 * 260
    hidden = 4 * 64 * 32 * width * 2
    assert needed(project, "perplexity", "pruned") == (walk + logits + slices + 64 * BYTES_A_TOKEN, hidden)
    assert needed(project, "perplexity", "dense")[1] == hidden + 4 * 64 * BYTES_A_TOKEN
    packed = (2 * BLOCK + REST + linear + ROW * features) * width + ROW * 260 * (width + 8) + calls_bytes("cpu")
    assert needed(project, "zero-shot", "dense")[0] == packed
    assert need(project, "zero-shot", "dense").least == 0  # what questions take is an estimate
    monkeypatch.setenv("OMP_NUM_THREADS", "99")
    assert needed(project, "mask")[0] == PRUNABLE + sizes.SELECTION * PRUNABLE
    project = config_only(dtype=dtype, perplexity__windows=None)
    assert needed(project, "perplexity", "dense")[1] == 0  # not known yet
    project.data("perplexity/embedded").mkdir(parents=True)
    (project.data("perplexity/embedded") / "text.txt").write_text("x" * 4000)
    memory, disk = needed(project, "perplexity", "dense")
    text = 4000 * sizes.TEXT_IN_MEMORY
    assert memory == walk + logits + slices + text + 64 * BYTES_A_TOKEN  # 15 windows are 15 shards
    assert disk == 1000 * (32 * width * 2 + BYTES_A_TOKEN)


def test_every_stage_that_computes_says_what_it_needs():
    assert list(NEEDS) == [name for name, stage in STAGES.items() if stage.computes]


def test_a_task_that_is_not_known_counts_as_the_mean_of_those_that_are(
    config_only: Callable[..., Project], monkeypatch: pytest.MonkeyPatch
):
    project = config_only(tasks__source="benchmark", tasks__names=["abacus"], zero_shot__limit=None)
    monkeypatch.setattr(stages, "TASKS", {"one": (100, 50.0, 2.0), "other": (300, 150.0, 4.0)})
    assert need(project, "zero-shot", "dense").work["head"] == 2 * 200 * 3 * 260 * 32
    assert need(project, "zero-shot", "dense").disk == 200 * 100 * 32 * 4 * 2


def test_masks_of_pruned_inputs_take_a_walk_more(config_only: Callable[..., Project]):
    def memory(stage: str) -> sizes.Memory:
        return need(project, stage).memory

    project = config_only()
    masks = memory("mask")
    project = config_only(propagation="pruned", method="magnitude")
    assert memory("mask") == masks
    project = config_only(propagation="pruned")
    walk = memory("calibrate")
    both = walk.total + masks.selection + BLOCK * 4  # a pruned block is no view of the checkpoint
    assert memory("mask").total == both
    assert memory("mask").weights == walk.weights


def test_rows_that_are_chosen_apart_need_no_more_than_some(config_only: Callable[..., Project], monkeypatch):
    monkeypatch.setattr("wanda_dvc.pruning.choose.WEIGHTS_AT_A_TIME", 100)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for changes, scores in (
        ({}, 100),
        ({"group": "linear"}, 32 * 48),
        ({"group": "linear", "pattern": "2:4"}, 100),
        ({"method": "wanda-variant"}, 32 * 48),
    ):
        found = need(config_only(**changes), "mask").memory
        assert found.selection == PRUNABLE + sizes.SELECTION * scores


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_was_measured_tells_the_linears(project: Callable[..., Project], tmp_path: Path, family: str):
    made = project(model=str(save(family, tmp_path / family)))
    for part in ("model", "calibration"):
        download(project=made, part=part, text=text_of(part))
    before = [need(made, stage) for stage in ("mask", "apply")]
    calibrate(project=made)
    assert [need(made, stage) for stage in ("mask", "apply")] == before


def test_logits_are_a_chunk_at_most(config_only: Callable[..., Project]):
    found = need(config_only(perplexity__length=2**20), "perplexity", "dense").memory
    assert found.logits == LOGITS_AT_A_TIME * 12


def test_before_there_is_a_config_only_what_is_known_is_said(
    project: Callable[..., Project], capsys: pytest.CaptureFixture[str]
):
    made = project()
    assert need(made, "calibrate") == Need()
    needs.announce(project=made, stage="calibrate")
    assert capsys.readouterr().err == ""


def test_one_line_says_it_and_a_disk_that_is_too_small_is_refused(
    config_only: Callable[..., Project], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    project = config_only()
    monkeypatch.setattr(needs, "disk", lambda project: 3 * 64 * 32 * 4 * 2)
    monkeypatch.setattr(needs, "free_memory", lambda device: 1)  # too little memory is said, not refused
    needs.announce(project=project, stage="calibrate")
    wanted = need(project, "calibrate").memory
    needs_memory = f"{wanted.total / 1e9:.1f} GB of memory"
    assert capsys.readouterr().err == (
        f"calibrate needs about {needs_memory} and 0.1 MB of disk; free: 0.1 MB of memory and 0.1 MB of disk\n"
    )
    monkeypatch.setattr(needs, "disk", lambda project: 3 * 64 * 32 * 4 * 2 - 1)
    with pytest.raises(UserError, match="of disk free, expected about 0.1 MB for calibrate; free some"):
        needs.announce(project=project, stage="calibrate")


def test_a_config_that_means_nothing_stops_no_stage(
    project: Callable[..., Project], capsys: pytest.CaptureFixture[str]
):
    made = project()
    made.model("dense").mkdir(parents=True)
    for content in ("{", '{"model_type": "abacus"}', "{}"):
        (made.model("dense") / "config.json").write_text(content)
        needs.announce(project=made, stage="mask")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("queued", [False, True])
def test_unfinished_work_counts_as_free_disk(
    project: Callable[..., Project], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, queued: bool
):
    """Also that of a queued experiment, which lies in the repository that DVC was started in."""
    made = project()
    if queued:
        monkeypatch.setenv("DVC_ROOT", str(tmp_path / "repository"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("usage", (), {"free": 10}))
    assert needs.disk(made) == 10
    work = (tmp_path / "repository" if queued else made.root) / ".dvc/tmp/wanda-dvc/abc"
    work.mkdir(parents=True)
    (work / "hidden_0.bin").write_bytes(b"x" * 8192)
    assert needs.disk(made) >= 10 + 8192
