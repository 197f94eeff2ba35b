"""The needs of each stage: memory, disk, FLOPs and bytes, from the plan, the settings and a model's sizes.

The line before a stage, `cost` and `doctor` read this table, so each formula is written once; docs/cost.md explains the
formulas. Existing files give better numbers: `Known` holds these numbers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from wanda_dvc.engine.sizes import (
    WIDTH,
    Linears,
    Memory,
    Sizes,
    choosing,
    comparing,
    differentiating,
    either,
    probing,
    propagating,
    reference_bytes,
    sizes,
    walking,
    writing,
)
from wanda_dvc.machine import cores
from wanda_dvc.params import Calibration, Params
from wanda_dvc.plan import GRAM_DTYPE, TRAINING, WINDOWS_BACK
from wanda_dvc.stages.running import device_name
from wanda_dvc.study.project import TEXT, Project
from wanda_dvc.study.tensors import block_count, read_stats

BYTES_A_TOKEN = 4  # of English text, about
SAMPLES = 48  # items a task of `tasks.source: embedded`

# Of lm-eval's tasks: the items of the split, the tokens of a question (its context once, then its choices) and the
# positions at which it needs logits; means of the first 200 items with SmolLM2's tokenizer.
TASKS = {
    "piqa": (1838, 57.4, 44.6),
    "hellaswag": (10042, 90.2, 60.4),
    "arc_easy": (2376, 41.6, 14.4),
    "boolq": (3270, 148.8, 1.0),
    "rte": (277, 80.1, 1.0),
}


@dataclass(frozen=True, kw_only=True)
class Need:
    """The approximate needs of a stage, in bytes; 0 if nothing, or not known yet."""

    memory: Memory = field(default_factory=Memory)
    disk: int = 0  # peak, including its outputs
    least: int = 0  # with less free disk the stage would fail
    read: int = 0  # from the disk
    hidden: int = 0  # hidden states between blocks, written and read
    link: int = 0  # weights and masks that cross the link to a GPU
    work: Mapping[str, float] = field(default_factory=dict)  # FLOPs: of blocks, head, grams, choosing, pruning


@dataclass(frozen=True, kw_only=True)
class Known:
    """The data behind the needs of all stages."""

    params: Params
    config: Path  # of the model: a config.json, or a directory with one
    device: str = "cpu"  # its kind
    texts: Mapping[str, int] = field(default_factory=dict)  # bytes of existing texts: calibration, perplexity/NAME
    files: int | None = None  # bytes of the model's directory
    part: str | None = None  # of the stage; None: its largest
    text: str | None = None  # of the perplexity; None: all
    measured: Linears | None = None  # of stats/: building a model takes seconds of imports

    @cached_property
    def model(self) -> Sizes:
        """The model, counted."""
        return sizes(self.config)

    @property
    def linears(self) -> Linears:
        """The linears, counted."""
        return self.measured or self.model

    @property
    def stored(self) -> int:
        """Bytes of the checkpoint."""
        return self.model.stored if self.files is None else self.files

    @property
    def evaluated(self) -> list[str]:
        """The texts of the perplexity evaluation."""
        return [self.text] if self.text else list(self.params.perplexity.texts)

    def tokens(self, text: str) -> int:
        """Return the evaluated tokens of a text; 0 for all tokens of a text that is not downloaded yet."""
        wanted, size = self.params.perplexity, self.texts.get(f"perplexity/{text}")
        counts = [size // BYTES_A_TOKEN] if size is not None else []
        counts += [wanted.windows * wanted.length] if isinstance(wanted.windows, int) else []
        return min(counts, default=0)


def need(project: Project, stage: str, part: str | None = None, text: str | None = None) -> Need:
    """Return the needs of a study's stage, as exact as the existing files allow."""
    folder = project.model(part or "dense")
    if stage not in NEEDS or not (folder / "config.json").is_file():
        return Need()
    files = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    measured = _measured(project) if stage in ("mask", "apply") else None
    on = replace(known(project.params, folder, project), files=files, part=part, text=text, measured=measured)
    return NEEDS[stage](on)


def known(params: Params, config: Path, project: Project | None) -> Known:
    """Return the data from settings, a configuration and, if there is a study, its texts."""
    import torch  # noqa: F401 - needed for the device's name

    parts = ["calibration", *(f"perplexity/{name}" for name in params.perplexity.texts)] if project else []
    texts = {part: file.stat().st_size for part in parts if project and (file := project.data(part) / TEXT).is_file()}
    return Known(params=params, config=config, device=device_name(params.runtime).partition(":")[0], texts=texts)


def config_of(project: Project) -> Path:
    """Return the directory with the configuration of a study's model: a local model's own, else models/dense."""
    local = Path(project.params.model)
    return local if local.is_absolute() and local.is_dir() else project.model("dense")


def _measured(project: Project) -> Linears | None:
    from wanda_dvc.engine.checkpoint import Checkpoint

    checkpoint, shapes, width = Checkpoint(project.model("dense")), [], 0
    for block in range(block_count(project.stats, "calibrate")):
        measured = read_stats(project.stats, block)
        features = {name: len(measured.inputs[x].sum) for x, names in measured.readers.items() for name in names}
        weights = {name: checkpoint.weight(name) for name in features}
        shapes.append([(weight.numel() // features[name], features[name]) for name, weight in weights.items()])
        width = next(iter(weights.values())).itemsize
    return Linears.of(shapes, width) if shapes else None


# --- the stages ---


def back_windows(calibration: Calibration) -> int:
    """Return the number of windows in the backward pass."""
    return min(WINDOWS_BACK, calibration.windows) if calibration.statistics == "gradients" else 0


def _calibrate(on: Known) -> Need:
    """Count all windows through all blocks, and with `gradients` the backward pass of some windows."""
    calibration, model, dtype = on.params.calibration, on.model, on.params.dtype
    gram, windows, length = calibration.statistics != "norms", back_windows(calibration), calibration.length
    once = _recording(on, gram=gram)
    once = replace(once, disk=once.disk + gram * _gram_bytes(model.all_squares))
    if not windows:
        return once
    # Three passes: forward, then in each block forward again and back. Back costs one pass: weights get no gradients.
    back = _walk(on, "calibration", 3 * windows, length, head=2 * windows * length)
    states, gradients = (windows * length * model.hidden * WIDTH[kind] for kind in (dtype, "float32"))
    memory = differentiating(model, dtype=dtype, length=length, workers=on.params.runtime.ray is not None)
    return replace(
        once,
        memory=either(once.memory, memory),
        disk=once.disk + _gram_bytes(model.all_output_squares) + states * (model.blocks + 1) + 2 * gradients,
        read=3 * once.read,
        hidden=once.hidden + back.hidden,
        link=3 * once.link,
        work=_sum(once.work, back.work, {"grams": windows * length * model.all_output_squares}),
    )


def _mask(on: Known) -> Need:
    """Count a pass over weights and scores, or a solver's work; with `propagation: pruned` also runs of the blocks."""
    plan, linears, on_card = on.params.plan, on.linears, on.device == "cuda"
    if plan.records_grams or (plan.method.needs == "gram" and not plan.propagates):
        memory = writing(linears, gram=True, by_gradients=plan.masks_read_gradients)
    else:
        by_row = plan.method.selects_by_row(plan.pattern, plan.group) and not on_card
        memory = choosing(linears, threads=1 if on_card else cores(), by_row=by_row)
        if plan.allocation.needs == "gram":  # it rates all blocks before it prunes any
            memory = either(memory, writing(linears, gram=True))
    memory = _with_probe(on, memory)
    chosen = Need(
        memory=memory,
        disk=kept_bytes(on),
        read=on.stored + plan.masks_read_gram * _gram_bytes(linears.all_squares),
        link=linears.count * (linears.width + 1),
        work={"choosing": linears.choosing(plan.method)},
    )
    if not plan.propagates:
        return chosen
    # The pruned windows twice. A training also runs the dense ones, and three times as much for each epoch: forwards,
    # and twice backwards.
    passes = 2 + plan.runs_dense * (1 + (plan.propagation == "corrected")) + plan.trains * (3 * TRAINING["epochs"] + 2)
    walk = _recording(on, passes=passes, gram=plan.records_grams, crosses=plan.corrects)
    streams = 1 + plan.runs_dense
    return replace(
        walk,
        memory=propagating(walk.memory, memory, plan, model=on.model, dtype=on.params.dtype),
        disk=chosen.disk + streams * walk.disk,
        least=streams * walk.least,
        link=walk.link + chosen.link,
        work=_sum(walk.work, chosen.work, {"pruning": linears.solving(plan.reconstruction)}),
    )


def _with_probe(on: Known, memory: Memory) -> Memory:
    """Return the larger need of a stage and of the probe that it begins with, for a pattern of units."""
    structure = on.params.plan.structure
    return memory if structure is None else either(memory, probing(on.model, copies=not structure.method))


def kept_bytes(on: Known) -> int:
    """Return what an experiment adds to the cache: a bit for each weight of the linears, and weights/."""
    return on.linears.count // 8 + (on.stored if on.params.plan.weights_come_from == "weights" else 0)


def _apply(on: Known) -> Need:
    """Count a linear in memory, and the files of another model; with Gram matrices, layer errors."""
    plan, linears, gram = on.params.plan, on.linears, on.params.calibration.statistics != "norms"
    grams = gram * _gram_bytes(linears.all_squares)
    solving = linears.solving(plan.reconstruction) if plan.weights_come_from == "gram" else 0
    return Need(
        memory=_with_probe(on, writing(linears, gram=gram, by_gradients=plan.by_gradients)),
        disk=on.stored,
        least=0 if plan.structure else on.stored,  # a smaller model takes less
        read=on.stored + grams,
        link=grams + gram * linears.count * (2 * linears.width + 1),  # weights in both directions, and masks
        work={"pruning": linears.pruning(plan.reconstruction, gram=gram) + solving},
    )


def _perplexity(on: Known) -> Need:
    """Count the texts one after another; their references stay."""
    texts = [_on_text(on, text) for text in on.evaluated]
    references = sum(reference_bytes(on.tokens(text)) for text in on.evaluated) if on.part != "pruned" else 0
    return Need(
        memory=max((one.memory for one in texts), key=lambda memory: memory.total),
        disk=max(one.disk for one in texts) + references,
        least=max(one.least for one in texts) // 2,  # a token may take more bytes than expected
        read=sum(one.read for one in texts),
        hidden=sum(one.hidden for one in texts),
        link=sum(one.link for one in texts),
        work=_sum(*(one.work for one in texts)),
    )


def _on_text(on: Known, text: str) -> Need:
    """Count all windows of a text through all blocks and the head, and the dense model's predictions."""
    length, tokens = on.params.perplexity.length, on.tokens(text)
    found = _walk(on, f"perplexity/{text}", tokens / length, length, head=tokens, logits=True)
    return replace(
        found, memory=comparing(found.memory, on.model, length=length, windows=tokens // length, device=on.device)
    )


def _zero_shot(on: Known) -> Need:
    """Count all questions of all tasks through all blocks, and the head at the tokens of choices."""
    from wanda_dvc.engine.questions import ROW

    most = min(on.params.items or 10**9, SAMPLES if on.params.tasks.source == "embedded" else 10**9)
    average = tuple(sum(column) / len(TASKS) for column in zip(*TASKS.values(), strict=True))
    needed = [TASKS.get(name, average) for name in on.params.tasks.names]
    tokens, positions = (sum(min(task[0], most) * task[place] for task in needed) for place in (1, 2))
    # Attention is within a question, and so small that packed rows overstate it.
    found = _walk(on, "tasks", tokens / ROW, ROW, head=positions, logits=True, packed=True)
    # A block of each kind first runs in float32, to test for support of several questions in a row.
    width = WIDTH[on.params.dtype]
    tested = Memory(weights=4 * on.model.block + (on.model.block + on.model.rest) * width if width < 4 else 0)
    return replace(found, least=0, link=2 * found.link, memory=either(found.memory, tested))


NEEDS: dict[str, Callable[[Known], Need]] = {
    "calibrate": _calibrate,
    "mask": _mask,
    "apply": _apply,
    "perplexity": _perplexity,
    "zero-shot": _zero_shot,
}


# --- their parts ---


def _walk(on: Known, text: str, windows: float, length: int, *, head: float = 0, **held: bool) -> Need:
    """Count windows of a text through all blocks, and the head at some positions; `held` is for `sizes.walking`."""
    model, width = on.model, WIDTH[on.params.dtype]
    waiting = int(2 * windows * length * model.hidden * width)  # two files that alternate
    read = on.texts.get(text, 0)
    return Need(
        memory=walking(model, dtype=on.params.dtype, length=length, device=on.device, text=read, **held),
        disk=waiting,
        least=0 if on.params.runtime.ray and not on.params.plan.trains else waiting,  # Ray's store may hold them
        read=model.stored,
        hidden=model.blocks * waiting,
        link=model.parameters * width,
        work={"blocks": model.walking(windows, length), "head": 2 * head * model.head},
    )


def _recording(on: Known, *, passes: int = 1, gram: bool, crosses: bool = False) -> Need:
    """Count some passes of the calibration windows through all blocks; one pass sums statistics."""
    windows, length = on.params.calibration.windows, on.params.calibration.length
    walk = _walk(on, "calibration", windows, length, statistics=True, gram=gram, crosses=crosses)
    # The upper triangle of XᵀX is half of its products; a cross product has no such half.
    grams = windows * length * on.model.all_squares * (gram + 2 * crosses)
    work = {kind: passes * flops for kind, flops in walk.work.items()} | {"grams": grams}
    return replace(walk, hidden=passes * walk.hidden, work=work)


def _gram_bytes(squares: int) -> int:
    """Return the maximum bytes of Gram matrices with a given count of numbers."""
    return squares // 2 * WIDTH[GRAM_DTYPE]


def _sum(*works: Mapping[str, float]) -> Mapping[str, float]:
    return {kind: sum(work.get(kind, 0) for work in works) for work in works for kind in work}
