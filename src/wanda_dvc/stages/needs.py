"""The peak memory and disk of each stage, one formula each, and the line that says so.

Memory in bytes, beyond the imports, with W parameters in the largest block, R outside the blocks, M weights in a
block's linears, l in the largest linear; F features that a block's linears read and write, f the most of one; L tokens
of a window; w bytes a number:

    calibrate               (2 W + R) w + (L F + l) w + 8 L f; Gram matrices add 16 Σ f² + 12 · 128 f
    mask                    M + 24 · min(cores · min(l, 2²⁰), M); a solver 41 l + 20 f²
    apply                   9 l; with Gram matrices 41 l + 20 f²
    perplexity, zero-shot   (2 W + R) w + (L F + l) w + min(2²⁵, L · vocabulary) (w + 8)

Weights in the checkpoint's dtype are views of mapped files on a CPU: page cache, which the system may reclaim. Each
stage adds 112 MiB. Hidden states wait on disk: 2 · windows · L · hidden · w. Files that exist already, such as texts,
make the numbers better.
"""

import contextlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass

from wanda_dvc.engine.checkpoint import WIDTH, dtype_of
from wanda_dvc.engine.sequences import chunk_places
from wanda_dvc.engine.sizes import FIXED, Sizes, Walk
from wanda_dvc.errors import UserError, notice
from wanda_dvc.machine import cores
from wanda_dvc.plan import GRAM_DTYPE, RECOVERY_BATCH, RECOVERY_LENGTH, WINDOWS_BACK
from wanda_dvc.pruning.gram import PANEL, WEIGHTS_AT_A_TIME
from wanda_dvc.stages import MODELS
from wanda_dvc.stages.device import device_name, free_memory
from wanda_dvc.study.folder import ITEMS, TEXT, Study

SELECTION = 24  # bytes a weight: its score, the partition of the scores, and the count of ties
TEXT_IN_MEMORY = 32  # bytes for each byte of a text while it is tokenized
BYTES_A_TOKEN = 4  # of English text, about


@dataclass(frozen=True, kw_only=True)
class Requirements:
    """What a stage needs at its peak, in bytes."""

    memory: int
    mapped: int = 0  # of the memory: page cache, which the system may reclaim
    disk: int  # with its outputs


class SizesOfStudy:
    """What the formulas read of a study: its settings, its model's configuration, the size of its texts.

    Without a part it is for the part of the stage that needs most; without a text of the perplexity, for each.
    """

    def __init__(self, study: Study, part: str = "", text: str = "") -> None:
        params, self.model = study.params, study.model(part if part in MODELS else "dense")
        self.part, self.text = part, text
        self.params = params.model_copy(update={"dtype": dtype_of(self.model, params.dtype)})
        self.device = device_name(params.runtime).partition(":")[0]  # its kind
        names = ["calibration", *(f"perplexity/{name}" for name in params.perplexity.texts)]
        files = {name: study.data(name) / TEXT for name in names}
        files |= {f"tasks/{name}": study.data("tasks") / name / ITEMS for name in params.tasks.names}
        self.files = {name: path.stat().st_size for name, path in files.items() if path.is_file()}  # bytes, fetched
        self.sizes = Sizes(self.model)

    def walk(self, length: int) -> Walk:
        """Return the memory of windows of `length` tokens through all blocks."""
        return Walk(self.sizes, dtype=self.params.dtype, length=length, device=self.device)

    def states(self, tokens: int) -> int:
        """Return the bytes of the hidden states of some tokens."""
        return tokens * self.sizes.hidden * WIDTH[self.params.dtype]

    def stored(self) -> int:
        """Return the bytes of the model's directory."""
        return sum(path.stat().st_size for path in self.model.iterdir() if path.is_file())


def need(study: Study, stage: str, part: str = "", text: str = "") -> Requirements:
    """Return the needs of a study's stage. UserError without the configuration of its model."""
    return NEEDS[stage](SizesOfStudy(study, part, text))


def _calibrate(on: SizesOfStudy) -> Requirements:
    """All windows through all blocks; with the gradients tier, some of them also backwards."""
    calibration, model = on.params.calibration, on.sizes
    length, gram = calibration.length, "gram" in on.params.statistics
    windows = min(WINDOWS_BACK, calibration.windows) if "fisher" in on.params.statistics else 0
    held = on.walk(length)
    memory = held.activations + held.norms + gram * held.grams + TEXT_IN_MEMORY * on.files.get("calibration", 0)
    disk = 2 * on.states(calibration.windows * length)  # two files that alternate
    disk += gram * _gram_bytes(model.all_squares)
    if windows:
        # Gram matrices of gradients, of all rows so far and of one row.
        grams = 16 * model.output_squares + (12 * PANEL + 8 * length) * model.widest
        memory = max(memory, 3 * held.activations + 2 * held.logits + grams)
        states, gradients = (windows * length * model.hidden * WIDTH[kind] for kind in (on.params.dtype, "float32"))
        disk += _gram_bytes(model.all_output_squares) + states * (model.blocks + 1) + 2 * gradients
    return _walked(held, memory, disk=disk)


def _mask(on: SizesOfStudy) -> Requirements:
    """A block's masks and scores, or a solver; with `propagation`, during a walk through the pruned blocks."""
    plan, model = on.params.plan, on.sizes
    if plan.solves_by_input:
        chosen = _solving(model, uses_fisher=plan.solver_reads_fisher)
    else:
        on_gpu = on.device == "cuda"
        by_row = plan.method.selects_by_row(plan.pattern, plan.group) and not on_gpu
        scores = min(model.linear, WEIGHTS_AT_A_TIME) if by_row else model.linear
        chosen = model.prunable + SELECTION * min((1 if on_gpu else cores()) * scores, model.prunable)
    chosen = max(chosen, _probing(on))
    masks = model.count // 8
    if not plan.propagates and not plan.repairs:
        return Requirements(memory=FIXED + chosen, disk=masks)
    length = on.params.calibration.length
    held = on.walk(length)
    window = held.activations + held.norms + plan.corrects * held.dense
    sums = (plan.solves_by_input or plan.repairs) * held.grams + plan.corrects * held.crosses
    # A solver reads a packed triangle and, for a correction, a cross product.
    chosen += (2 * plan.solves_by_input + 4 * plan.corrects) * model.widest**2
    # A copy of the pruned block's weights, and the new ones as they are stored.
    weights = model.block * (WIDTH[on.params.dtype] + plan.solves * model.width)
    memory = window + sums + chosen + weights + TEXT_IN_MEMORY * on.files.get("calibration", 0)
    boundaries = 2 * (1 + plan.corrects)
    if plan.repairs:
        boundaries = min(model.blocks + 1, round(float(plan.sparsity) * model.blocks) + 3)
    waiting = boundaries * on.states(on.params.calibration.windows * length)
    made = masks + (plan.propagates and plan.solves) * on.stored()  # a repair stores one linear
    return _walked(held, memory, disk=waiting + made)


def _apply(on: SizesOfStudy) -> Requirements:
    """A linear, or a solver, while the linear before it is written; and the files of another model."""
    plan, model = on.params.plan, on.sizes
    solves = "gram" in on.params.statistics
    memory = _solving(model, uses_fisher=plan.solver.uses_fisher) if solves else 9 * model.linear
    return Requirements(memory=FIXED + max(memory, _probing(on)), disk=on.stored())


def trained_in(dtype: str, device: str) -> str:
    """Return the dtype of the products in `recover`, whose weights are in float32: bfloat16 if the processor has it."""
    from wanda_dvc.engine.accelerator import has_bfloat16

    return "bfloat16" if has_bfloat16(device) else dtype if (device, dtype) == ("cuda", "float16") else "float32"


def training(on: SizesOfStudy, *, kept: bool = False) -> int:
    """Return the memory of `recover`. Activations are one block's, and the inputs of all; or, if `kept`, of all."""
    model, length = on.sizes, min(RECOVERY_LENGTH, on.params.calibration.length)
    block = 8 * length * model.features + 12 * length**2 * model.scored
    blocks = block * model.blocks if kept else block + 4 * length * model.hidden * model.blocks
    dense = WIDTH[trained_in(on.params.dtype, on.device)]
    return FIXED + (16 + dense) * model.parameters + RECOVERY_BATCH * (blocks + 24 * length * model.vocabulary)


def computes_twice(study: Study) -> bool:
    """Whether `recover` has to compute activations twice. UserError if the memory is too small even so."""
    on = SizesOfStudy(study)
    least, most, free = training(on), training(on, kept=True), free_memory(device_name(study.params.runtime))
    if least > free:
        what = f"{gigabytes(least)} of memory (16 bytes a parameter, the dense model and activations)"
        raise UserError(f"recovery.tokens: found {gigabytes(free)}, expected {what}; set it to 0, or free some memory")
    return most > free


def _perplexity(on: SizesOfStudy) -> Requirements:
    """The windows of one text, by default the largest; the dense model's predictions on all of them stay."""
    from wanda_dvc.engine import divergence  # imports transformers

    wanted, model, held = on.params.perplexity, on.sizes, on.walk(on.params.perplexity.length)
    size = max(on.files.get(f"perplexity/{text}", 0) for text in ([on.text] if on.text else wanted.texts))
    counts = [size // BYTES_A_TOKEN] if size else []
    counts += [wanted.windows * wanted.length] if isinstance(wanted.windows, int) else []
    tokens = min(counts, default=0)  # 0: of a text that is not fetched yet
    shard = len(next(iter(chunk_places(tokens // wanted.length)), ())) * wanted.length
    slices = min(divergence.AT_A_TIME["cuda" if on.device == "cuda" else "cpu"], wanted.length * model.vocabulary)
    memory = held.activations + held.logits + TEXT_IN_MEMORY * size
    memory += divergence.REFERENCE_BYTES * shard + divergence.TEMPORARIES * slices
    kept = 0 if on.part in MODELS[1:] else divergence.REFERENCE_BYTES * tokens
    return _walked(held, memory, disk=2 * on.states(tokens) + kept)


def _zero_shot(on: SizesOfStudy) -> Requirements:
    """Packed rows of questions."""
    from wanda_dvc.engine.questions import SEQUENCE_TOKENS  # imports transformers

    held = on.walk(SEQUENCE_TOKENS)
    # At most: a file of items also has what no model reads.
    tokens = sum(on.files.get(f"tasks/{name}", 0) for name in on.params.tasks.names) // BYTES_A_TOKEN
    memory = max(held.activations + held.logits + held.block_arguments, held.tried)
    return _walked(held, memory, disk=2 * on.states(tokens))


NEEDS: dict[str, Callable[[SizesOfStudy], Requirements]] = {
    "calibrate": _calibrate,
    "mask": _mask,
    "apply": _apply,
    "recover": lambda on: Requirements(
        memory=training(on), disk=36 * on.sizes.parameters + on.stored()
    ),  # 3 checkpoints
    "perplexity": _perplexity,
    "zero-shot": _zero_shot,
}


def continuing(on: SizesOfStudy, tokens: int) -> int:
    """Return the memory of the complete model that continues a prompt up to a number of tokens, with its cache."""
    model, held, width = on.sizes, on.walk(tokens), WIDTH[on.params.dtype]
    cache = 2 * model.blocks * tokens * model.hidden * width  # keys and values; fewer with shared ones
    return FIXED + model.parameters * width + held.activations + held.logits + cache


def announce(study: Study, stage: str, part: str = "", text: str = "") -> None:
    """Print a stage's needs and what is free to stderr."""
    with contextlib.suppress(UserError, ValueError, KeyError, OSError):  # an invalid model: the stage reports it better
        wanted = need(study, stage, part, text)
        needed = f"{gigabytes(wanted.memory)} of memory and {gigabytes(wanted.disk)} of disk"
        notice(f"{stage} needs about {needed}; free: {' and '.join(map(gigabytes, free(study).values()))}")


def free(study: Study) -> dict[str, int]:
    """Return the free bytes of memory, the GPU's if stages run there, and of disk."""
    return {"memory": free_memory(device_name(study.params.runtime)), "disk": shutil.disk_usage(study.root).free}


def gigabytes(size: int) -> str:
    """Return a number of bytes, readable."""
    return f"{size / 1e9:.1f} GB" if size >= 5e7 else f"{max(size / 1e6, 0.1):.1f} MB"


# --- terms of the formulas ---


def _walked(held: Walk, memory: int, *, disk: int) -> Requirements:
    """Return the needs of a walk: its weights and other memory, and disk."""
    return Requirements(memory=FIXED + held.weights + memory, mapped=held.weights if held.mapped else 0, disk=disk)


def _solving(model: Sizes, *, uses_fisher: bool = False) -> int:
    """Solve for a linear, while the one before is written: 8 float32 copies and 5 matrices [f, f], at most."""
    linear, square = model.linear, model.widest**2
    return 9 * linear + 32 * linear + 20 * square + uses_fisher * 20 * (linear + square)


def _probing(on: SizesOfStudy) -> int:
    """The probe of a smaller model: one block in float32, and a copy of the weights that read neurons or heads."""
    structure = on.params.plan.structure
    if structure is None:
        return 0
    copies = 0 if structure.method else on.sizes.block // 3  # at most
    return 4 * (on.sizes.rest + on.sizes.block + copies)


def _gram_bytes(squares: int) -> int:
    """Return the bytes of stored triangles of Gram matrices, at most."""
    return squares // 2 * WIDTH[GRAM_DTYPE]
