"""The Python interface: the pipeline's stages as functions on a transformers model in memory.

Functions use the stages' engine, scores and solvers. So masks and figures are identical to the pipeline's, given equal
tokens, dtype and number of threads. Weights have the names of the model's checkpoint, such as
`model.layers.0.self_attn.q_proj`; each expert of a mixture has its own name.
"""

import contextlib
import itertools
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from wanda_dvc.catalog import RECIPES, STATISTICS, STRUCTURES, Dtype
from wanda_dvc.errors import UserError
from wanda_dvc.plan import GRAM_DTYPE, WINDOWS_BACK
from wanda_dvc.study.project import Project

if TYPE_CHECKING:
    from jaxtyping import Bool, Int
    from torch import Tensor
    from transformers import PreTrainedModel

    from wanda_dvc.catalog import Structure
    from wanda_dvc.engine.decoder import Decoder
    from wanda_dvc.engine.loaded import Loaded
    from wanda_dvc.engine.removal import Removal
    from wanda_dvc.plan import Plan
    from wanda_dvc.pruning.gram import Gram
    from wanda_dvc.pruning.statistics import BlockStats
    from wanda_dvc.study.tensors import Grams


@dataclass(frozen=True, eq=False)
class Stats:
    """The statistics of each linear's input, by block; the result of `calibrate`.

    Attributes:
        blocks: The norm tier of each block, by distinct input: the sums Σx² and Σx, float64 [in], and the number of
            tokens. `blocks[0].inputs[NAME].norm` is ‖X_j‖₂, float32 [in]; `blocks[0].readers` lists its readers.
        grams: The Gram tier of each block, by distinct input; empty if not requested. `grams[0][NAME]` is unpacked at
            access; `.matrix()` is XᵀX, float32 [in, in].
        windows: The number of windows.
        length: Their tokens each.
        statistics: `norms`, `gram` or `gradients`. With `gradients`, `blocks[0].fisher` has Σ ‖x‖² (∂ℓ/∂y)² of each
            output of each linear, float64 [out].
        dtype: The dtype in which the model ran.
        weights: A checksum of each tensor of the model, to detect another model.
        fisher_grams: The Gram matrices of the gradients by each linear's outputs, by block and linear, like `grams`;
            empty if not requested.
    """

    blocks: "Sequence[BlockStats]"
    grams: "Sequence[Grams]"
    windows: int
    length: int
    statistics: str
    dtype: str
    weights: Mapping[str, int]
    fisher_grams: "Sequence[Grams]" = ()

    def __repr__(self) -> str:
        return (
            f"Stats({len(self.blocks)} blocks, {self.windows} windows of {self.length} tokens, {self.dtype}, "
            f"statistics {self.statistics})"
        )


@contextlib.contextmanager
def _plain() -> Iterator[None]:
    """Undo the caller's default dtype, autocast, TF32 and inference mode: they would change results, or fail."""
    import torch

    dtype, precision = torch.get_default_dtype(), torch.get_float32_matmul_precision()
    torch.set_default_dtype(torch.float32)
    torch.set_float32_matmul_precision("highest")
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            for device in ("cpu", "cuda", "mps"):
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_float32_matmul_precision(precision)


@_plain()
def calibrate(
    model: "PreTrainedModel",
    tokens: 'Int[Tensor, "windows length"]',
    *,
    statistics: Literal["norms", "gram", "gradients"] = "norms",
    dtype: Dtype | None = None,
) -> Stats:
    """Measure the inputs of a model's linears, once for each distinct input.

    The model's weights, flags and configuration do not change; a model with hooks is refused. Its weights are not
    copied, except into another `dtype`. The function needs the memory of one running block in addition to the model.
    Hidden states between blocks are on disk in Python's temporary folder (`TMPDIR`), 2 · windows · length · hidden
    size numbers.

    Args:
        model: A causal language model of transformers in evaluation mode, on any device.
        tokens: Token ids, whole numbers [windows, length], without padding. The paper uses 128 windows of 2,048.
        statistics: The tier of statistics, as the setting `calibration.statistics`. `norms`: the norm of each input
            feature. `gram`: Gram matrices too, in² bytes for each distinct input of `in` features. `gradients`: also a
            backward pass of the first eight windows, one block at a time, for the Fisher information of each linear's
            outputs and the Gram matrices of their gradients, out² bytes for each linear of `out` outputs. The hidden
            states before every block are on disk meanwhile.
        dtype: The dtype in which the model runs; None: its own. Sums are float64 for any dtype.

    Returns:
        The statistics. They serve every method, sparsity and pattern, as long as the model has these weights.

    Raises:
        UserError: A wrong argument, an unsupported model structure, or activations that are not finite.

    Example:
        >>> stats = wd.calibrate(model, tokens, statistics="gram")
        >>> stats.blocks[0].inputs["model.layers.0.self_attn.q_proj"].norm  # ‖X_j‖₂ of each feature, [in]
    """
    from wanda_dvc.engine.fisher import backward
    from wanda_dvc.engine.walk import Runner
    from wanda_dvc.stages.running import progress, say_unreached
    from wanda_dvc.study.tensors import Grams, pack_gradients, pack_grams

    _one_of("statistics", statistics, STATISTICS)
    source = _evaluating(model)
    if statistics == "gradients" and any(parameter.is_inference() for parameter in model.parameters()):
        raise UserError("model: got weights made in torch.inference_mode(), expected others; load it outside of it")
    rows = _windows(tokens, source)
    decoder = _decoder(source, dtype)
    blocks, grams = [], []
    gradients: list[Grams] = []
    with _arguments(), tempfile.TemporaryDirectory(prefix="wanda-dvc-") as work:
        run = Runner(decoder, Path(work))
        for step in progress(run.walk(rows), total=len(decoder.blocks), what="calibrate, blocks"):
            measured, matrices, _ = step.record(gram=statistics != "norms")
            blocks.append(measured)
            if statistics != "norms":
                grams.append(pack_grams(measured, matrices, GRAM_DTYPE))
        if statistics == "gradients":
            back = backward(run, rows[:WINDOWS_BACK], gram=True)
            for number, came in progress(back, total=len(blocks), what="calibrate, blocks back"):
                blocks[number] = blocks[number]._replace(fisher=came.sums)
                gradients.insert(0, pack_gradients(came.grams))
                came.grams.clear()  # before the next block's arrive
    say_unreached("calibrate", {number: block.unreached() for number, block in enumerate(blocks)})
    name = str(decoder.dtype).removeprefix("torch.")
    windows, length = rows.shape
    return Stats(blocks, grams, windows, length, statistics, name, source.fingerprint(), gradients)


@_plain()
def mask(  # noqa: PLR0913 - the pipeline's settings, by their names
    model: "PreTrainedModel",
    stats: Stats,
    *,
    recipe: str = "wanda",
    sparsity: float = 0.5,
    pattern: str = "unstructured",
    method: str | None = None,
    group: Literal["row", "linear", "outputs"] | None = None,
    allocation: str | None = None,
    allocation_strength: float | None = None,
) -> 'Mapping[str, Bool[Tensor, "rows columns"]]':
    """Compute the masks of a model. The model does not change: `prune` or `reconstruct` applies the masks.

    The arguments are the pipeline's settings of the same names, with the same rules; `docs/settings.md` lists them. The
    statistics are the dense model's, as with `propagation: dense`.

    Args:
        model: The model that `stats` were measured on, with the same weights.
        stats: The result of `calibrate`.
        recipe: The row of the catalog that replaces None in the arguments below: `magnitude`, `wanda`, `admm`,
            `fisher`, … Its reconstruction is an argument of `reconstruct`.
        sparsity: The fraction of each linear's weights to prune, in [0, 1); each row loses ⌊in · sparsity⌋ weights.
        pattern: `unstructured`; `n:m`: n of every m neighbours stay, and the sparsity is 1 − n/m; or
            `neurons`, `heads`, `blocks` or `experts`: the sparsity is the share of these units. Pass this pattern to
            `prune` or `reconstruct` too.
        method: The score of weights: `magnitude`, `wanda`, `wanda-variant`, `ria`, or with Gram matrices `sparsegpt`
            and `admm`; or a method of an installed package.
        group: The competing weights: a `row` (one output), the complete `linear`, or the complete linear with each
            row weighted by its output's Fisher information (`outputs`).
        allocation: The rule for the sparsities of blocks or linears: `uniform`, `owl`, `sensitivity`.
        allocation_strength: The strength of the differences; None: the allocation's default.

    Returns:
        The masks by linear: bool, in the shape of the stored weight, True stays. Each is one bit a weight in memory and
        is unpacked at access.

    Raises:
        UserError: A wrong argument, arguments that exclude one another or do not fit the model, choices that need other
            statistics than `stats` has, or statistics of other weights.

    Example:
        >>> keep = wd.mask(model, stats, recipe="wanda", sparsity=0.5, pattern="2:4")
        >>> keep["model.layers.0.mlp.up_proj"].float().mean().item()
        0.5
    """
    from wanda_dvc.catalog import check_pattern
    from wanda_dvc.engine.accelerator import solving_device
    from wanda_dvc.pruning.allocation import allocate
    from wanda_dvc.stages.mask import keeps, removal_of, with_chosen_units
    from wanda_dvc.stages.running import progress
    from wanda_dvc.study.tensors import Masks, pack_masks

    plan = _plan(
        stats,
        recipe=recipe,
        sparsity=sparsity,
        pattern=pattern,
        method=method,
        group=group,
        allocation=allocation,
        allocation_strength=allocation_strength,
    )
    source = _measured(model, stats)

    def weights(name: str) -> "Tensor":
        return source.weight(name).cpu()  # where the statistics are, and the pipeline chooses

    with _arguments():
        check_pattern(pattern, {name: linear.features for name, linear in source.linears.items()})
        shares = allocate(
            weights,
            stats.blocks,
            len(stats.blocks),
            allocation=plan.allocation,
            share=plan.share,
            group=plan.group,
            strength=plan.strength,
        )
        removal = removal_of(source, plan.structure, plan.share)
        removal = with_chosen_units(removal, source, stats.blocks, plan) if removal else None
        chosen = Masks({}, {})
        for block, measured in enumerate(progress(stats.blocks, total=len(stats.blocks), what="mask, blocks")):
            grams = stats.grams[block].on(solving_device(source.device)) if stats.grams else None
            chosen |= pack_masks(keeps(plan, weights, measured, shares[block], removal, grams=grams))
    return chosen


@_plain()
def prune(
    model: "PreTrainedModel",
    keep: 'Mapping[str, Bool[Tensor, "rows columns"]]',
    *,
    pattern: str = "unstructured",
) -> float:
    """Set a model's weights outside the masks to zero, or remove units, in place. All others are bit-identical.

    All masks are checked before the first change, so an error does not change the model. Memory: one mask at a time, or
    with a pattern of units the new, smaller weights.

    Args:
        model: A causal language model of transformers; its parameters change in place.
        keep: Masks by linear, as returned by `mask`; linears without a mask do not change.
        pattern: The pattern of the masks. With a pattern of units, such as `neurons`, the model gets smaller: new
            blocks replace its blocks, and its configuration changes. Hooks on the old blocks are lost.

    Returns:
        The measured sparsity: the fraction of the weights of these linears that are zero or removed now.

    Raises:
        UserError: A mask of no weight of this model, of another shape or dtype, or of another pattern's units.

    Example:
        >>> wd.prune(model, wd.mask(model, stats, sparsity=0.5))
        0.5
    """
    import torch

    source = _source(model)
    weights = _targets(source, keep)
    if (structure := _structure(pattern)) is not None:
        _shrink(source, _removed(source, keep, structure))
        kept = sum(int(keep[name].sum()) for name in weights)
        return 1 - kept / sum(weight.numel() for weight in weights.values())
    zeros = 0
    with torch.no_grad():
        for name, weight in weights.items():
            weight.masked_fill_(~keep[name].to(weight.device), 0)
            zeros += weight.numel() - int(weight.count_nonzero())
    return zeros / sum(weight.numel() for weight in weights.values())


@_plain()
def reconstruct(
    model: "PreTrainedModel",
    keep: 'Mapping[str, Bool[Tensor, "rows columns"]]',
    stats: Stats,
    *,
    reconstruction: str = "least-squares",
    pattern: str = "unstructured",
) -> dict[str, dict[str, float]]:
    """Prune a model in place, and give kept weights new values that compensate for the pruned weights.

    Call it instead of `prune`: it solves for the dense weights' outputs, so it needs the dense model. Main memory holds
    all new weights, as large as all linears of `keep`, until the last is solved for. So an error does not change the
    model.

    Args:
        model: The dense model that `stats` were measured on; its parameters change in place.
        keep: Masks by linear, as returned by `mask`; linears without a mask do not change.
        stats: Statistics with Gram matrices: `calibrate(model, tokens, statistics="gram")`.
        reconstruction: `least-squares`, `output-weighted` or `sparsegpt`; `none` only prunes, and returns the layer
            errors.
        pattern: The pattern of the masks, as in `prune`.

    Returns:
        By linear: the layer error `error`, ‖(W−Ŵ)X‖² / ‖WX‖² on the calibration tokens; `masked`, the layer error of
        this mask without a reconstruction; and solver diagnostics: `unchanged` rows, `dead` features, `damping` and
        whether it was `raised`. Experts without tokens are only pruned, and missing here.

    Raises:
        UserError: A wrong argument, statistics without Gram matrices (for `output-weighted` also of gradients) or of
            other weights (such as an already pruned model's), or a mask that does not fit.

    Example:
        >>> diagnostics = wd.reconstruct(model, keep, stats)
        >>> max(diagnostics.values(), key=lambda linear: linear["error"])
    """
    import torch

    from wanda_dvc.catalog import RECONSTRUCTIONS, SOLVED_UNITS
    from wanda_dvc.engine.accelerator import solving_device
    from wanda_dvc.pruning.choose import prepared_linears, prune_linear
    from wanda_dvc.pruning.choose import reconstruct as solve_linear
    from wanda_dvc.stages.running import progress

    _check_stats(stats)
    _one_of("reconstruction", reconstruction, [row.name for row in RECONSTRUCTIONS.values() if not row.trains])
    row = RECONSTRUCTIONS[reconstruction]
    structure = _structure(pattern)
    needed = "gradients" if row.by_gradients and not structure else "gram"
    if STATISTICS.index(stats.statistics) < STATISTICS.index(needed):
        raise UserError(
            f"reconstruction: got {reconstruction} and statistics {stats.statistics}, expected {needed}; call "
            f'calibrate(model, tokens, statistics="{needed}")'
        )
    source = _measured(model, stats)
    targets = _targets(source, keep)
    removed = _removed(source, keep, structure) if structure else None
    made: dict[str, Tensor] = {}
    found: dict[str, dict[str, float]] = {}
    gradients: Iterable[Mapping[str, Gram]] = stats.fisher_grams or itertools.repeat({})
    pairs = zip(stats.grams, gradients, strict=False)
    for grams, back in progress(pairs, total=len(stats.grams), what="reconstruct, blocks"):
        for name, prepared in prepared_linears(grams.readers, grams.on(solving_device(source.device))):
            if name not in keep:
                continue
            weight, across, new, solved = source.weight(name), name in grams.transposed, None, {}
            if prepared is not None and row.function:
                words = {"reconstruction": SOLVED_UNITS if structure else row, "gradients": back.get(name)}
                one = solve_linear(weight, keep[name], prepared, transposed=across, **words)
                new, solved = one.weight, one.diagnostics
            pruned = prune_linear(weight, keep[name], prepared, new, transposed=across, of_inputs=structure is not None)
            made[name] = pruned.weight.cpu()
            if pruned.error is not None and pruned.masked is not None:
                found[name] = {"error": pruned.error, "masked": pruned.masked} | solved
    if removed:
        _shrink(source, removed, made)
        return found
    with torch.no_grad():
        for name, weight in made.items():
            targets[name].copy_(weight)
    return found


@_plain()
def perplexity(
    model: "PreTrainedModel", tokens: 'Int[Tensor, "windows length"]', *, dtype: Dtype | None = None
) -> float:
    """Measure a model's perplexity: exp(mean over windows of the mean loss of its length − 1 predictions).

    The model does not change. Its weights are not copied, and hidden states are on disk, as in `calibrate`.

    Args:
        model: A causal language model of transformers in evaluation mode, on any device; dense or pruned.
        tokens: Token ids, whole numbers [windows, length], without padding. The papers use consecutive windows of
            2,048 tokens of WikiText-2's test split.
        dtype: The dtype in which the model runs; None: its own. Losses are float32 for any dtype.

    Returns:
        The perplexity, to six significant digits as in the pipeline; infinity for the pipeline's `diverged`.

    Raises:
        UserError: A wrong argument or an unsupported model structure.

    Example:
        >>> wd.perplexity(model, tokens)
        15.6137
    """
    from wanda_dvc.engine.divergence import from_losses, window_losses
    from wanda_dvc.engine.rows import as_rows
    from wanda_dvc.engine.walk import Runner
    from wanda_dvc.stages.inputs import HEAD, say_not_finite
    from wanda_dvc.stages.running import progress

    source = _evaluating(model)
    rows = as_rows(_windows(tokens, source))
    decoder = _decoder(source, dtype)
    with _arguments(), tempfile.TemporaryDirectory(prefix="wanda-dvc-") as folder:
        run = Runner(decoder, Path(folder))
        for step in progress(run.walk(rows), total=len(decoder.blocks), what="perplexity, blocks"):
            step.advance()
        losses = list(run.head(window_losses, lambda _: True))
        where = run.not_finite or (None if all(map(math.isfinite, losses)) else HEAD)
    say_not_finite("perplexity", where)
    found = from_losses(losses, [len(row.tokens) - 1 for row in rows])
    return found if isinstance(found, float) else math.inf


class Study:
    """A study on disk: the directory of `dvc repro` and `dvc exp run`. It is only read.

    Args:
        directory: The study, or a folder in it.

    Raises:
        UserError: `params.yaml` is missing in the directory and its parents.

    Example:
        >>> results = pandas.DataFrame(wd.Study("study").results())
        >>> results.pivot_table("pruned.perplexity.embedded", "sparsity", "recipe")
    """

    def __init__(self, directory: str | Path = ".") -> None:
        _check_type("directory", directory, (str, os.PathLike), "a path")
        self._project = Project.find(Path(directory))

    def results(self) -> list[dict[str, Any]]:
        """Return the study's experiments, branches, tags and workspace, a flat record each.

        All records have the same keys: `experiment`, `commit` (None: the workspace), `state` (`success`, `failed`,
        `queued`, `running`, …), every setting by its dotted name, such as `calibration.windows`, and every measure by
        the model, its name, and its text or task: `dense.perplexity.embedded`, `pruned.perplexity.embedded`,
        `pruned.divergence.embedded`, `pruned.top1_agreement.embedded`, `pruned.acc.piqa`, `pruned.mean_acc`,
        `pruned.sparsity`. None means not measured with these settings; a diverged value is infinity.

        Raises:
            UserError: There is no git or DVC repository, or DVC cannot list its experiments.
        """
        from wanda_dvc.results.listing import results

        return results(self._project)


# --- arguments ---


@contextlib.contextmanager
def _arguments() -> Iterator[None]:
    """Name arguments, instead of settings of params.yaml, in errors raised inside."""
    try:
        yield
    except UserError as error:
        raise UserError(*(problem.removeprefix("params.yaml: ") for problem in error.problems)) from None


def _plan(stats: Stats, **given: Any) -> "Plan":
    """Check arguments as settings of params.yaml, with the default preset's for the rest.

    The reconstruction is an argument of another function, which checks its requirements.
    """
    from wanda_dvc.params import check_params
    from wanda_dvc.study.settings import DEFAULT, nested, read_preset

    _check_stats(stats)
    recipe = given["recipe"]
    if isinstance(recipe, str) and (row := RECIPES.get(recipe)) and row.propagation != "dense":
        raise UserError(
            f"recipe: got {row.name} with propagation {row.propagation}, expected one with propagation dense; pass its "
            "choices instead, or run it as a study"
        )
    content = nested(read_preset(DEFAULT)) | given | {"reconstruction": "none", "propagation": "dense"}
    content["calibration"]["statistics"] = "gradients"
    with _arguments():
        plan = check_params(content).plan
    if STATISTICS.index(stats.statistics) < STATISTICS.index(plan.needs):
        why = ", ".join(choice for choice, tier in plan.needing() if tier == plan.needs)
        raise UserError(
            f"stats: got statistics {stats.statistics}, expected {plan.needs} ({why}); call "
            f'calibrate(model, tokens, statistics="{plan.needs}")'
        )
    return plan


def _check_type(argument: str, given: object, types: type | tuple[type, ...], expected: str) -> None:
    """Raise UserError if an argument has another type."""
    if not isinstance(given, types):
        text = str(given)
        found = text if len(text) < 40 and text.isprintable() else type(given).__name__
        raise UserError(f"{argument}: got {found}, expected {expected}")


def _check_stats(stats: Stats) -> None:
    _check_type("stats", stats, Stats, "the result of calibrate(model, tokens)")


def _one_of(argument: str, given: str, known: Sequence[str]) -> None:
    expected = ", ".join(known)
    _check_type(argument, given, str, expected)
    if given not in known:
        raise UserError(f"{argument}: got {given}, expected {expected}")


def _source(model: "PreTrainedModel") -> "Loaded":
    """Wrap a model in memory. UserError if transformers cannot run it."""
    from transformers import PreTrainedModel

    from wanda_dvc.engine.loaded import Loaded

    if hasattr(model, "merge_and_unload"):
        raise UserError(
            f"model: got {type(model).__name__}, an adapter of PEFT, expected a plain model; merge the adapter first: "
            "model = model.merge_and_unload()"
        )
    if not isinstance(model, PreTrainedModel):
        raise UserError(
            f"model: got {type(model).__name__}, expected a causal language model of transformers; load it with "
            "AutoModelForCausalLM"
        )
    return Loaded(model)


def _evaluating(model: "PreTrainedModel") -> "Loaded":
    """Wrap a model in order to run it."""
    source = _source(model)
    if model.training:
        raise UserError("model: got training mode, expected evaluation mode; call model.eval()")
    return source


def _measured(model: "PreTrainedModel", stats: Stats) -> "Loaded":
    """Wrap a model. UserError if it is not the measured model."""
    source = _source(model)
    found = source.fingerprint()
    if other := [name for name in stats.weights if found.get(name) != stats.weights[name]]:
        raise UserError(
            f"stats: measured on other weights ({len(other)} of {len(stats.weights)} tensors, first {other[0]}), "
            f"expected the current weights of this {source}; reload the model if it was pruned or changed, or "
            "calibrate it again"
        )
    return source


def _targets(source: "Loaded", keep: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """Return the weights of the masks, to be changed in place. UserError if a mask does not fit."""
    import torch

    _check_type("keep", keep, Mapping, "masks by linear; call mask(model, stats)")
    if not keep:
        raise UserError("keep: got no masks, expected one for each linear to prune; call mask(model, stats)")
    weights = {}
    for name in keep:
        if name not in source.linears:
            raise UserError(
                f"keep: got a mask of {name}, expected linears of this {source}, such as {next(iter(source.linears))}; "
                "choose masks for this model"
            )
        weight, mask = source.linears[name].weight.detach(), keep[name]
        expected = f"a dense torch.bool tensor {list(weight.shape)} in memory; choose masks for this model"
        _check_type(f"keep: {name}", mask, torch.Tensor, expected)
        if (mask.dtype, mask.shape) != (torch.bool, weight.shape) or mask.is_meta or mask.layout != torch.strided:
            place = " on meta" if mask.is_meta else "" if mask.layout == torch.strided else f" in {mask.layout}"
            raise UserError(f"keep: {name}: got {mask.dtype} {list(mask.shape)}{place}, expected {expected}")
        weights[name] = weight
    return weights


def _structure(pattern: str) -> "Structure | None":
    """Return the units of a pattern of masks; None if it sets weights to zero."""
    if not isinstance(pattern, str) or ":" not in pattern:
        _one_of("pattern", pattern, ("unstructured", *STRUCTURES, "n:m"))
    return STRUCTURES.get(pattern)


def _removed(source: "Loaded", keep: "Mapping[str, Tensor]", structure: "Structure") -> "Removal":
    """Return the units without a kept weight, and those that stay. UserError if masks do not say so of each unit."""
    from wanda_dvc.engine.finders import check_builds
    from wanda_dvc.stages.mask import removal_of

    devices = {str(linear.weight.device) for linear in source.linears.values()}
    if len(devices) > 1:
        raise UserError(
            f"model: got blocks on {', '.join(sorted(devices))}, expected one device to remove {structure.units}; load "
            "the model on one, or run the pipeline"
        )
    removal, keep = removal_of(source, structure, Fraction(0)), {name: mask.cpu() for name, mask in keep.items()}
    assert removal
    whole = [name for units in removal.whole.values() for linears in units.members for name in linears]
    if missing := [name for name in (*removal.readers, *whole) if name not in keep]:
        raise UserError(f"keep: no mask of {missing[0]}, expected those of all linears; call mask(model, stats)")
    with _arguments():
        removal = removal.with_stays(removal.stays_in(keep))
        check_builds(source, removal)
    if wrong := [name for name, mask in keep.items() if not mask.equal(removal.mask(name, mask))]:
        raise UserError(
            f"keep: the mask of {wrong[0]} removes other weights than those of complete {structure.units}; pass the "
            "pattern of the masks"
        )
    return removal


def _shrink(
    source: "Loaded",
    removal: "Removal",
    values: "Mapping[str, Tensor] | None" = None,
) -> None:
    """Remove units from a model in place; some linears get other values first."""
    from wanda_dvc.engine.checkpoint import Address
    from wanda_dvc.engine.loaded import shrink
    from wanda_dvc.engine.removal import Smaller

    values = values or {}

    def read(address: Address) -> "Tensor":
        given = values.get(address.linear)
        return source.read(address) if given is None else given

    with _arguments():
        shrink(source.model, Smaller(source, removal, read))


def _windows(tokens: 'Int[Tensor, "windows length"]', source: "Loaded") -> 'Int[Tensor, "windows length"]':
    """Check token ids. Return them in the engine's form."""
    import torch

    from wanda_dvc.engine.config import positions_of

    got = str(tokens.dtype) if isinstance(tokens, torch.Tensor) else type(tokens).__name__
    if not got.startswith(("torch.int", "torch.uint")):
        raise UserError(f"tokens: got {got}, expected a tensor of whole numbers [windows, length]")
    if tokens.layout != torch.strided:
        raise UserError(f"tokens: got {tokens.layout}, expected torch.strided; call tokens.to_dense()")
    if tokens.is_meta:
        raise UserError("tokens: got a tensor on the meta device, expected whole numbers in memory")
    if tokens.dim() != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise UserError(
            f"tokens: got {list(tokens.shape)}, expected [windows, length] with a window and two tokens or more; "
            "one text is tokens[None]"
        )
    if (positions := positions_of(source.config)) is not None and tokens.shape[1] > positions:
        raise UserError(f"tokens: got windows of {tokens.shape[1]}, expected at most the model's {positions} positions")
    tokens = tokens.detach().to("cpu", torch.long)
    least, most = int(tokens.min()), int(tokens.max())
    if least < 0 or most >= source.vocabulary:
        raise UserError(
            f"tokens: got ids from {least} to {most}, expected 0 to {source.vocabulary - 1}, the model's embeddings; "
            "use the tokenizer that belongs to it"
        )
    return tokens


def _decoder(source: "Loaded", dtype: Dtype | None) -> "Decoder":
    """Open the engine on a model in memory, on its own device."""
    import torch

    from wanda_dvc.engine.decoder import Decoder

    if dtype is not None:
        _one_of("dtype", dtype, get_args(Dtype))
    return Decoder(source, dtype=getattr(torch, dtype) if dtype else source.model.dtype, device=source.device)
