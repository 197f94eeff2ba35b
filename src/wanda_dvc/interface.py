"""The Python interface: functions that run the pipeline's stages in a study of their own.

`calibrate` makes a study of a model: a directory with settings, a pipeline and, after each function, its results. The
other functions take that study. They change its settings and let DVC run the stages that the change affects, so masks,
weights and figures are the pipeline's. Keyword arguments are the settings of `params.yaml`, sections as dictionaries:
`calibration={"windows": 128}`.
"""

import contextlib
import os
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanda_dvc.commands import reproduce
from wanda_dvc.errors import UserError
from wanda_dvc.stages import STAGES
from wanda_dvc.study import folder
from wanda_dvc.study.artifact import block_count, locked
from wanda_dvc.study.files import load_json
from wanda_dvc.study.scaffold import change_settings, changed, init, new_params

if TYPE_CHECKING:
    from jaxtyping import Bool
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from wanda_dvc.pruning.statistics import BlockStats


class Study:
    """A study on disk: the directory of `dvc repro` and `dvc exp run`, `path`, around a given directory.

    UserError if `params.yaml` is missing in the given directory and its parents.

    Example:
        >>> results = pandas.DataFrame(wd.Study("study").results())
        >>> results.pivot_table("pruned.perplexity.embedded", "sparsity", "recipe")
    """

    def __init__(self, directory: str | Path = ".") -> None:
        self.path = folder.Study.find(Path(directory)).root

    def __repr__(self) -> str:
        return f"Study({str(self.path)!r})"

    def results(self) -> list[dict[str, Any]]:
        """Return the study's experiments, branches, tags and workspace, a flat record each.

        All records have the same keys: `experiment`, `commit` (None: the workspace), `state` (`success`, `failed`,
        `queued`, `running`, …), every setting by its dotted name, such as `calibration.windows`, and every measure of
        each model, such as `pruned.perplexity.embedded` or `pruned.acc.piqa`. None means not measured with these
        settings; of diverged measures, perplexity and divergence are infinity, others NaN.
        """
        from wanda_dvc.results.listing import flat_records, listed_revisions  # imports NumPy, and masks need none

        return flat_records(listed_revisions(folder.Study(self.path)))

    def statistics(self, block: int) -> "BlockStats":
        """Return the statistics `norms` of one block, by distinct input.

        `inputs[NAME].norm` is ‖X_j‖₂, float32 [in], over all calibration tokens; `consumers` lists the linears that
        read each input. Blocks count from 0.
        """
        from wanda_dvc.study.tensors import read_stats

        stats = folder.Study(self.path).stats
        count = block_count(stats, "calibrate")
        if count and block not in range(count):
            raise UserError(f"block: found {block!r}, expected 0 to {count - 1}")
        return read_stats(stats, block)

    def masks(self) -> 'Mapping[str, Bool[Tensor, "rows columns"]]':
        """Return the masks by linear, in the shape of the stored weight; True is kept. Each is unpacked at access."""
        from wanda_dvc.study.tensors import Masks, read_masks

        artifact, masks = folder.Study(self.path).masks, Masks()
        for block in range(block_count(artifact, "mask")):
            masks |= read_masks(artifact, block)
        return masks


def calibrate(
    model: "str | Path | PreTrainedModel",
    directory: str | Path | None = None,
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    **settings: Any,
) -> Study:
    """Make a study of a model, and measure the inputs of its linears, once for every later question.

    Args:
        model: A directory of safetensors, a Hub id (`ORG/NAME`), `package:NAME==VERSION`, or a causal language model
            of transformers in memory, which is saved into the study and does not change.
        directory: The new study, in an empty or a new directory; None: a temporary one, which is removed with the last
            reference to the result.
        tokenizer: The tokenizer of a model in memory.
        **settings: Settings of `params.yaml`, such as `calibration={"windows": 128, "length": 2048}`.
    """
    new_params(settings)  # a wrong setting or argument makes no study
    in_memory = not isinstance(model, str | os.PathLike)
    if in_memory:
        from transformers import PreTrainedModel, PreTrainedTokenizerBase  # its import takes seconds

        if not isinstance(model, PreTrainedModel) or not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise UserError(
                f"model, tokenizer: found {type(model).__name__}, {type(tokenizer).__name__}, expected a path, a Hub "
                "id or a causal language model of transformers with its tokenizer; merge an adapter of PEFT first"
            )
    elif tokenizer is not None:
        raise UserError("tokenizer: found one for a model on disk, which has its own; leave it out")
    temporary = tempfile.TemporaryDirectory(prefix="wanda-dvc-") if directory is None else None
    root = Path(temporary.name if temporary else directory).absolute()  # type: ignore[arg-type] # one of the two is set
    source = str(model.expanduser().absolute()) if isinstance(model, Path) else model
    init(folder=root, model=None if in_memory else str(source))
    study = Study(root)
    if temporary:
        weakref.finalize(study, temporary.cleanup)
    if in_memory:
        saved = root / "model"
        model.save_pretrained(saved)  # type: ignore[union-attr] # as checked
        tokenizer.save_pretrained(saved)  # type: ignore[union-attr]
        (saved / ".gitignore").write_text("*\n", encoding="utf-8")
        settings = {"model": str(saved)} | settings
    with _changed(study, settings):
        reproduce(study.path, "calibrate")
    return study


def mask(study: Study, **settings: Any) -> 'Mapping[str, Bool[Tensor, "rows columns"]]':
    """Change settings of a study and choose the weights to keep; return the masks, as `Study.masks`."""
    with _changed(study, settings):
        reproduce(study.path, "mask")
        return study.masks()


def prune(study: Study, **settings: Any) -> "PreTrainedModel":
    """Change settings of a study, prune its model, and return the pruned model, an ordinary one of transformers.

    The dense model does not change. The study keeps the pruned model in `models/pruned`. `recovery` does not train it.
    """
    with _changed(study, settings):
        from transformers import AutoModelForCausalLM  # its import takes seconds

        reproduce(study.path, "apply")
        pruned = folder.Study(study.path).model("pruned")
        return AutoModelForCausalLM.from_pretrained(pruned, dtype="auto", trust_remote_code=False)


def perplexity(study: Study, model: str = "pruned", *, text: str = "", **settings: Any) -> float:
    """Change settings of a study and measure a model's perplexity: exp(mean loss over its windows' predictions).

    The model is `dense`, `pruned` or `recovered`; the text is one of the study's `perplexity.texts`, by default the
    first. The perplexity has six significant digits; it is infinity if a loss is not finite.
    """
    params, _ = changed((study.path / "params.yaml").read_text(encoding="utf-8"), settings)
    text = text or next(iter(params.perplexity.texts))
    models = [name for name, variant in STAGES["perplexity"].variants.items() if variant.wanted(params)]
    for name, value, known in (("model", model, models), ("text", text, list(params.perplexity.texts))):
        if value not in known:
            raise UserError(f"{name}: found {value}, expected {', '.join(known)}, as these settings have it")
    with _changed(study, settings):
        reproduce(study.path, "perplexity", model, text)
        measured = load_json(folder.Study(study.path).metrics(model, f"perplexity/{text}"))["perplexity"]
        return measured if isinstance(measured, float) else float("inf")


@contextlib.contextmanager
def _changed(study: Study, settings: dict[str, Any]) -> Iterator[None]:
    """Let one function at a time change and read a study; others wait. Its settings change first."""
    lock = folder.Study(study.path).work_root / "interface"
    with locked(lock, f"waiting for another function on {study.path} …"):
        change_settings(study.path / "params.yaml", settings)
        yield
