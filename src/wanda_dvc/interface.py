"""The Python interface: functions that run the pipeline's stages in a study of their own.

`calibrate` makes a study of a model: a directory with settings, a pipeline and results. The other functions change its
settings and let DVC run the stages that the change affects, so masks, weights and figures are the pipeline's. Keyword
arguments are the settings of `params.yaml`, sections as dictionaries: `calibration={"windows": 128}`.

`mask` and `prune` start from `calibrate`'s settings, or from `params.yaml` if you have edited it since: no setting of
an earlier call stays. `perplexity` starts from those of the last `mask` or `prune`.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from wanda_dvc.commands import reproduce
from wanda_dvc.commands.request import check_request
from wanda_dvc.errors import UserError
from wanda_dvc.params import flatten
from wanda_dvc.stages import STAGES
from wanda_dvc.study import folder
from wanda_dvc.study.artifact import block_count, locked
from wanda_dvc.study.files import load_json, write_json, write_text
from wanda_dvc.study.scaffold import absolute_source, changed, init, new_params

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor
    from transformers import PreTrainedModel

    from wanda_dvc.commands.prune import PrunedModel
    from wanda_dvc.pruning.statistics import BlockStats

# Of the command `prune`; other keyword arguments are settings.
OPTIONS = ("recipe", "sparsity", "pattern", "size", "parameters", "text", "eval_text", "recover", "evaluate")
# An order: a call's settings become the start of all later entries, never its own. `mask` is also `prune`; `latest` is
# no function: its settings are those of the last call, unless the user has edited the file.
FUNCTIONS = ("calibrate", "mask", "perplexity", "latest")


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
        `queued`, `running`, …), each setting of a `params.yaml` by its dotted name, such as `calibration.windows`, and
        every measure of each model, such as `pruned.perplexity.embedded` or `pruned.acc.piqa`. None means not measured
        with these settings; of diverged measures, perplexity and divergence are infinity, others NaN.
        """
        from wanda_dvc.results.listing import flat_records, listed_revisions  # imports NumPy, and masks need none

        return flat_records(listed_revisions(folder.Study(self.path)))

    def statistics(self, block: int) -> "BlockStats":
        """Return the statistics `norms` of one block, by distinct input.

        `inputs[NAME].norm` is ‖X_j‖₂, float32 [in], over all calibration tokens; `consumers` lists the linears that
        read each input. Blocks count from 0.
        """
        from wanda_dvc.study.tensors import read_stats

        norms = folder.Study(self.path).norms
        count = block_count(norms, "calibrate")
        if count and block not in range(count):
            raise UserError(f"block: found {block!r}, expected 0 to {count - 1}")
        return read_stats(norms, block)

    def masks(self) -> 'Mapping[str, Bool[Tensor, "rows columns"]]':
        """Return the masks by linear, in the shape of the stored weight; True is kept. Each is unpacked at access."""
        from wanda_dvc.study.tensors import Masks, read_masks

        artifact, masks = folder.Study(self.path).masks, Masks()
        for block in range(block_count(artifact, "mask")):
            masks |= read_masks(artifact, block)
        return masks


def calibrate(model: str | Path, directory: str | Path, **settings: Any) -> Study:
    """Make or reopen a study of a model, and measure the inputs of its linears, once for every later question.

    A study with these settings is not measured again; other settings replace its own.

    Args:
        model: A directory of safetensors, a Hub id (`ORG/NAME`), or `package:NAME==VERSION`.
        directory: The study, or a new or empty directory.
        **settings: Settings of `params.yaml`, such as `calibration={"windows": 128, "length": 2048}`.
    """
    new_params(settings)  # a wrong setting or argument makes no study
    root = Path(directory).absolute()
    source = absolute_source(_model_name(model), is_text=False)
    if not (root / "params.yaml").is_file():
        init(folder=root, model=source)
    study = Study(root)
    with _changed(study, "calibrate", {"model": source} | settings):
        reproduce(study.path, "calibrate")
    return study


def mask(study: Study, **settings: Any) -> 'Mapping[str, Bool[Tensor, "rows columns"]]':
    """Choose the weights to keep, with `calibrate`'s settings and these; return the masks, as `Study.masks`."""
    with _changed(study, "mask", settings):
        reproduce(study.path, "mask")
        return study.masks()


@overload
def prune(model: Study, /, **settings: Any) -> "PreTrainedModel": ...


@overload
def prune(model: str | Path | None = None, directory: str | Path | None = None, /, **options: Any) -> "PrunedModel": ...


def prune(
    model: Study | str | Path | None = None, directory: str | Path | None = None, /, **settings: Any
) -> "PreTrainedModel | PrunedModel":
    """Prune the model of a study, or any model into a directory.

    Of a study, with `calibrate`'s settings and these, it returns the pruned model, an ordinary one of transformers. The
    dense model does not change. The study keeps the pruned model in `models/pruned`. `recovery` does not train it.

    Of a model, a path or a Hub id, it does what `wanda-dvc prune MODEL DIR` does, in a study in the user's cache
    folder. `size`, `parameters`, `text`, `eval_text` (a text or a list) and `recover` are that command's options;
    `evaluate=False` is its `--no-eval`. The result has the directory, `path`, of a model that may be too large for
    memory, the measures of each model, `results`, and the `study`; printed, it is what the command prints.
    """
    if not isinstance(model, Study):
        options = {name: settings.pop(name) for name in OPTIONS if name in settings}
        for option in {"text", "eval_text"} & options.keys():
            texts = options[option]
            options[option] = [_name(text) for text in ([texts] if isinstance(texts, str | Path) else texts or [])]
        name = None if model is None else _model_name(model)
        target = None if directory is None else Path(directory)
        request = check_request(model=name, target=target, **options, changes=dict(flatten(settings)))
        from wanda_dvc.commands.prune import prune_model  # imports torch

        return prune_model(request, shown=False)
    if directory is not None:
        raise UserError(f"directory: found {directory}, expected none: a study has its own; copy its `models/pruned`")
    with _changed(model, "mask", settings):
        from transformers import AutoModelForCausalLM  # its import takes seconds

        reproduce(model.path, "apply")
        pruned = folder.Study(model.path).model("pruned")
        return AutoModelForCausalLM.from_pretrained(pruned, dtype="auto", trust_remote_code=False)


def perplexity(study: Study, model: str = "pruned", *, text: str = "", **settings: Any) -> float:
    """Measure a model's perplexity, exp(mean loss over its windows' predictions), of the last `mask` or `prune`.

    Settings, such as `perplexity={"windows": 8}`, change those of that call. The model is `dense`, `pruned` or
    `recovered`; the text is one of the study's `perplexity.texts`, by default the first. The perplexity has six
    significant digits; it is infinity if a loss is not finite.
    """
    params, _ = changed(_starts(study)["perplexity"], settings)
    text = text or next(iter(params.perplexity.texts))
    models = [name for name, variant in STAGES["perplexity"].variants.items() if variant.wanted(params)]
    for name, value, known in (("model", model, models), ("text", text, list(params.perplexity.texts))):
        if value not in known:
            raise UserError(f"{name}: found {value}, expected {', '.join(known)}, as these settings have it")
    with _changed(study, "perplexity", settings):
        reproduce(study.path, "perplexity", model, text)
        measured = load_json(folder.Study(study.path).metrics(model, f"perplexity/{text}"))["perplexity"]
        return measured if isinstance(measured, float) else float("inf")


def prune_linear(
    weight: 'Float[Tensor, "out in"]',
    inputs: 'Float[Tensor, "tokens in"] | None' = None,
    *,
    gram: 'Float[Tensor, "in in"] | None' = None,
    recipe: str = "wanda",
    sparsity: float = 0.5,
    pattern: str = "unstructured",
    **choices: str,
) -> 'tuple[Float[Tensor, "out in"], Bool[Tensor, "out in"]]':
    """Prune one linear: return its new weight, in the same dtype, and its mask; True is kept.

    Args:
        weight: [out, in], as `torch.nn.Linear` has it. It does not change.
        inputs: [tokens, in], what the linear reads.
        gram: XᵀX of the inputs, in place of them.
        recipe: One that reads no gradients of a model.
        sparsity: The fraction that is removed.
        pattern: `unstructured` or n:m.
        **choices: Separately set choices, such as `method="ria"`.
    """
    of_model = {"propagation": "dense", "allocation": "uniform"}  # choices that one linear does not have
    params, _ = new_params({"recipe": recipe, "sparsity": sparsity, "pattern": pattern} | choices | of_model)
    plan = params.plan
    if plan.structure or plan.tier == "fisher":
        problem = f"pattern: found {pattern}" if plan.structure else f"recipe: found {recipe}, which reads gradients"
        raise UserError(f"{problem}, expected one for a linear alone, such as admm, unstructured; use `wd.prune`")
    if (inputs is None) == (gram is None):
        raise UserError("inputs, gram: found both or none, expected one of them")
    from wanda_dvc.pruning.masks import MaskRule, prune_weight  # imports torch

    rule = MaskRule(plan.method, plan.sparsity, plan.pattern, plan.group)
    return prune_weight(weight, inputs, gram, rule, plan.used_reconstruction)


def _model_name(model: Any) -> str:
    if not isinstance(model, str | Path):
        found = type(model).__name__
        raise UserError(f"model: found {found}, expected a path or a Hub id; `save_pretrained` it and its tokenizer")
    return _name(model)


def _name(source: str | Path) -> str:
    return str(source.expanduser().absolute()) if isinstance(source, Path) else source


def _starts(study: Study) -> dict[str, str]:
    """Return the params.yaml that each function starts from, and the latest; all are the file if the user edited it."""
    starts, text = load_json(folder.Study(study.path).python_state), (study.path / "params.yaml").read_text("utf-8")
    return starts if starts.get("latest") == text else dict.fromkeys(FUNCTIONS, text)


@contextlib.contextmanager
def _changed(study: Study, function: str, settings: dict[str, Any]) -> Iterator[None]:
    """Hold a study for one function, with its settings, from which later functions of `FUNCTIONS` then start."""
    on_disk = folder.Study(study.path)
    with locked(on_disk.work_root / "interface", f"waiting for another function on {study.path} …"):
        starts = _starts(study)
        _, text = changed(starts[function], settings)
        starts |= dict.fromkeys(FUNCTIONS[FUNCTIONS.index(function) + 1 :], text)
        write_json(on_disk.python_state, starts)
        write_text(study.path / "params.yaml", text)
        yield
