"""The Python interface: functions that run the pipeline's stages in a study of their own.

`calibrate` makes a study of a model: a directory with settings, a pipeline and, after each function, its results. The
other functions take that study. They change its settings and let DVC run the stages that the change affects, so masks,
weights and figures are the pipeline's. Keyword arguments are the settings of `params.yaml`, sections as dictionaries:
`calibration={"windows": 128}`.
"""

import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanda_dvc.errors import UserError
from wanda_dvc.results.listing import list_states, results
from wanda_dvc.stages import STAGES
from wanda_dvc.stages.runs import reproduce
from wanda_dvc.study import folder
from wanda_dvc.study.files import load_json, write_text
from wanda_dvc.study.scaffold import PARAMS, change_settings, changed, init

if TYPE_CHECKING:
    from jaxtyping import Bool
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from wanda_dvc.pruning.statistics import BlockStats


class Study:
    """A study on disk: the directory of `dvc repro` and `dvc exp run`.

    Args:
        directory: The study, or a folder in it.

    Attributes:
        path: The study's directory.

    Raises:
        UserError: `params.yaml` is missing in the directory and its parents.

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

        Raises:
            UserError: There is no git or DVC repository, or DVC cannot list its experiments.
        """
        return results(list_states(folder.Study(self.path)))

    def statistics(self, block: int) -> "BlockStats":
        """Return the norm tier of one block, by distinct input.

        `inputs[NAME].norm` is ‖X_j‖₂, float32 [in], over all calibration tokens; `readers` lists the linears that read
        each input.
        """
        from wanda_dvc.study.tensors import read_stats

        return read_stats(folder.Study(self.path).stats, block)

    def masks(self) -> 'Mapping[str, Bool[Tensor, "rows columns"]]':
        """Return the masks by linear, in the shape of the stored weight; True stays. Each is unpacked at access."""
        from wanda_dvc.study.artifact import block_count
        from wanda_dvc.study.tensors import Masks, read_masks

        masks, found = folder.Study(self.path).masks, Masks()
        for block in range(block_count(masks, "mask")):
            found |= read_masks(masks, block)
        return found


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

    Returns:
        The study. Its statistics serve every sparsity and pattern, and each recipe that reads no other statistics.

    Raises:
        UserError: A wrong argument or setting, an unsupported model, or activations that are not finite.

    Example:
        >>> study = wd.calibrate("HuggingFaceTB/SmolLM2-135M-Instruct", "study")
        >>> study.statistics(0).inputs["model.layers.0.self_attn.q_proj"].norm  # ‖X_j‖₂ of each feature, [in]
    """
    temporary = None if directory else tempfile.TemporaryDirectory(prefix="wanda-dvc-")
    place = Path(directory or temporary.name).absolute()  # type: ignore[union-attr] # one of the two is given
    changed(PARAMS.read_text(encoding="utf-8"), settings)  # a wrong setting makes no study
    model = str(model.expanduser().absolute()) if isinstance(model, Path) else model
    in_memory: list[Any] = [] if isinstance(model, str) else [model, tokenizer]
    if in_memory:
        from transformers import PreTrainedModel

        if not isinstance(model, PreTrainedModel):
            raise UserError(
                f"model: got {type(model).__name__}, expected a path, a Hub id or a causal language model of "
                "transformers; merge an adapter of PEFT first"
            )
        if tokenizer is None:
            raise UserError("tokenizer: missing; pass the tokenizer of the model in memory")
    init(folder=place, model=model if isinstance(model, str) else None)
    study = Study(place)
    if temporary:
        weakref.finalize(study, temporary.cleanup)
    for part in in_memory:
        part.save_pretrained(place / "model")
    if in_memory:
        (place / "model/.gitignore").write_text("*\n", encoding="utf-8")
        settings = {"model": str(place / "model")} | settings
    change_settings(study.path / "params.yaml", settings)
    reproduce(study.path, "calibrate")
    return study


def mask(study: Study, **settings: Any) -> 'Mapping[str, Bool[Tensor, "rows columns"]]':
    """Change settings of a study and choose the weights that stay; return the masks, as `Study.masks`.

    Example:
        >>> keep = wd.mask(study, recipe="wanda", pattern="2:4")
        >>> keep["model.layers.0.mlp.up_proj"].float().mean().item()
        0.5
    """
    change_settings(study.path / "params.yaml", settings)
    reproduce(study.path, "mask")
    return study.masks()


def prune(study: Study, **settings: Any) -> "PreTrainedModel":
    """Change settings of a study, prune its model, and return the pruned model, an ordinary one of transformers.

    The dense model does not change. The study keeps the pruned model in `models/pruned`. `recovery` does not train it.

    Example:
        >>> model = wd.prune(study, recipe="admm", sparsity=0.6)
    """
    from transformers import AutoModelForCausalLM

    change_settings(study.path / "params.yaml", settings)
    reproduce(study.path, "apply")
    pruned = folder.Study(study.path).model("pruned")
    return AutoModelForCausalLM.from_pretrained(pruned, dtype="auto", trust_remote_code=False)


def perplexity(study: Study, model: str = "pruned", *, text: str = "", **settings: Any) -> float:
    """Change settings of a study and measure a model's perplexity: exp(mean loss over its windows' predictions).

    Args:
        study: The study.
        model: `dense`, `pruned` or `recovered`.
        text: One of the study's `perplexity.texts`; "": the first one.
        **settings: Settings of `params.yaml`.

    Returns:
        The perplexity, to six significant digits; infinity if a loss is not finite.

    Example:
        >>> wd.perplexity(study, "dense"), wd.perplexity(study, sparsity=0.7)
        (15.6137, 88.5321)
    """
    file = study.path / "params.yaml"
    params, content = changed(file.read_text(encoding="utf-8"), settings)
    text = text or next(iter(params.perplexity.texts))
    next(STAGES["perplexity"].runs(params.perplexity.texts, model, text))  # UserError before a setting changes
    if not STAGES["perplexity"].variants[model].wanted(params):
        raise UserError("recovery.tokens: found 0, expected a number of tokens, as in recovery={'tokens': 200_000}")
    write_text(file, content)
    reproduce(study.path, "perplexity", model, text)
    found = load_json(folder.Study(study.path).metrics(model, f"perplexity/{text}"))["perplexity"]
    return found if isinstance(found, float) else float("inf")
