"""The Python interface gives the pipeline's masks and figures, to the bit, and leaves a model as it was."""

import contextlib
import itertools
import json
import math
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from cases.grids import OF_WEIGHTS, cycled, full, named, thinned
from conftest import save_tiny_model, write_params
from safetensors.torch import load_file
from test_families import one_is_never_chosen, save, short_texts
from test_reconstruction import PATTERNS, allowed
from test_stages import fetch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm
from transformers import AutoModel, AutoModelForCausalLM

import wanda_dvc as wd
from wanda_dvc import interface
from wanda_dvc.catalog import ALLOCATIONS, RECONSTRUCTIONS
from wanda_dvc.engine.weights import Weights
from wanda_dvc.engine.windows import cut, load_tokenizer, tokenize
from wanda_dvc.stages.apply import apply
from wanda_dvc.stages.calibrate import calibrate
from wanda_dvc.stages.inputs import calibration_windows
from wanda_dvc.stages.mask import mask
from wanda_dvc.stages.perplexity import perplexity
from wanda_dvc.study.files import load_json
from wanda_dvc.study.project import Project
from wanda_dvc.study.tensors import block_file, read_masks

# By name: how the model is saved, and in which dtype the pipeline runs it.
MODELS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "tied": (lambda folder: save_tiny_model(folder, num_hidden_layers=2), "float32"),
    "untied-bfloat16": (lambda folder: save("llama", folder, torch.bfloat16), "bfloat16"),
    "other-dtype": (lambda folder: save("qwen3", folder, torch.bfloat16), "float32"),
    "transposed": (lambda folder: save("gpt2", folder), "float32"),
    "renamed": (lambda folder: save("gpt_neox", folder), "float32"),
    "experts": (lambda folder: save("mixtral", folder), "float32"),
    "unreached-expert": (one_is_never_chosen, "float32"),
    "experts-in-one-tensor": (lambda folder: save("gpt_oss", folder), "float32"),
    "experts-across": (lambda folder: save("granitemoe", folder), "float32"),
    "shared-expert": (lambda folder: save("qwen2_moe", folder), "float32"),
}
CHOICES: list[dict[str, Any]] = [
    *({"method": method} | pattern for method in OF_WEIGHTS for pattern in PATTERNS),
    *({"allocation": allocation} for allocation in ALLOCATIONS),
    {"allocation": "owl", "allocation_strength": 0.1, "group": "linear"},
    {"method": "wanda", "sparsity": 0.29},
    {"method": "wanda", "sparsity": 0},
]
CHOICES = [choice for choice in CHOICES if allowed(**choice)]
SOME: list[dict[str, Any]] = [
    {"method": "wanda"},
    {"method": "ria", "group": "linear"},
    {"method": "wanda-variant"},
    {"method": "sparsegpt", "pattern": "2:4"},
    {"method": "magnitude", "allocation": "owl"},
    {"method": "wanda", "group": "outputs", "allocation": "sensitivity"},
]


class Pair:
    """A project whose model is calibrated, and the same model in memory."""

    def __init__(self, root: Path, name: str) -> None:
        make, self.dtype = MODELS[name]
        self.root, self.source = root / "study", make(root / "model")
        self.root.mkdir()
        self.texts = short_texts(root)
        self.project = fetch(self.study(), "model", "calibration", "perplexity")
        calibrate(project=self.project)
        self.tokens = calibration_windows(self.project)
        text = tokenize(self.project.text("perplexity/embedded"), load_tokenizer(self.source))
        self.text = torch.stack(cut(text, length=64, windows=3))
        self.stats = wd.calibrate(self.load(), self.tokens, statistics="gradients", **self.words)

    @property
    def words(self) -> dict[str, Any]:
        """The dtype, where it is not the model's own."""
        return {"dtype": self.dtype} if "other-dtype" in str(self.root) else {}

    def study(self, **changes: Any) -> Project:
        """The project with other settings."""
        small: dict[str, Any] = {
            "calibration__statistics": "gradients",
            "calibration__windows": 2,
            "perplexity__windows": 3,
        }
        write_params(self.root, self.source, dtype=self.dtype, **self.texts | small | changes)
        return Project(self.root)

    def load(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.source, dtype="auto").eval()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    made: dict[str, Pair] = {}

    def get(name: str) -> Pair:
        if name not in made:
            made[name] = Pair(tmp_path_factory.mktemp(name), name)
        return made[name]

    return get


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether tensors are equal in every bit, the sign of a zero included."""
    return one.keys() == other.keys() and all(
        x.dtype == other[name].dtype and torch.equal(bits(x), bits(other[name])) for name, x in one.items()
    )


def pipeline_masks(project: Project) -> dict[str, Tensor]:
    mask(project=project)
    blocks = sorted(project.masks.glob("block_*"))
    return {name: keep for block in range(len(blocks)) for name, keep in read_masks(project.masks, block).items()}


def pruned_model(project: Project) -> dict[str, Tensor]:
    apply(project=project)
    return {name: x for path in project.model("pruned").glob("*.safetensors") for name, x in load_file(path).items()}


def saved(model: Any, folder: Path) -> dict[str, Tensor]:
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


# --- to the bit ---


# Models whose layouts others have too, in parts.
OTHERS = {"renamed", "experts-across", "shared-expert"}


@pytest.mark.parametrize("name", thinned([full(name) if name in OTHERS else name for name in MODELS], 3))
def test_statistics_and_perplexity_are_the_pipelines(pairs: Callable[[str], Pair], name: str, tmp_path: Path):
    pair = pairs(name)
    stats, project = pair.stats, pair.study()
    for number, block in enumerate(stats.blocks):
        tensors = load_file(block_file(project.stats, number))
        for source, x in block.inputs.items():
            assert torch.equal(x.sum_squares, tensors[f"{source}.sum_squares"])
            assert (x.count, x.sum.tolist()) == (int(tensors[f"{source}.count"]), tensors[f"{source}.sum"].tolist())
        assert block.influence is not None
        assert torch.equal(block.influence, tensors["influence"])
        assert len(tensors) == 3 * len(block.inputs) + 1 + len(block.outputs)
        assert same(stats.grams[number].tensors, load_file(block_file(project.gram, number)))
        squares = {f"{linear}.squared_gradients": x for linear, x in block.fisher.items()}
        assert same(stats.fisher_grams[number].tensors | squares, load_file(block_file(project.gradients, number)))
    perplexity(project=project, model="dense", text="embedded")
    expected = load_json(project.metrics("dense", "perplexity/embedded"))["perplexity"]
    assert wd.perplexity(pair.load(), pair.text, **pair.words) == expected


@pytest.mark.parametrize(
    ("name", "choice"),
    [
        *thinned(cycled([name for name in MODELS if name not in OTHERS], SOME), 3),
        *(full(name, choice) for name in sorted(OTHERS) for choice in SOME),
    ],
    ids=named,
)
def test_masks_and_pruned_models_are_the_pipelines(
    pairs: Callable[[str], Pair], name: str, choice: dict[str, Any], tmp_path: Path
):
    pair = pairs(name)
    project, model = pair.study(**choice), pair.load()
    keep = wd.mask(model, pair.stats, **choice)
    assert same(dict(keep), pipeline_masks(project))
    sparsity = wd.prune(model, keep)
    expected = pruned_model(project)
    assert same(saved(model, tmp_path), expected)
    assert round(sparsity, 6) == load_json(project.metrics("pruned", "sparsity"))["sparsity"]
    if choice == SOME[0]:
        for one in ("dense", "pruned"):
            perplexity(project=project, model=one, text="embedded")
        found = load_json(project.metrics("pruned", "perplexity/embedded"))["perplexity"]
        assert wd.perplexity(model, pair.text, **pair.words) == found


@pytest.mark.parametrize("choice", CHOICES, ids=named)
def test_every_method_with_every_pattern_gives_the_pipelines_masks(
    pairs: Callable[[str], Pair], choice: dict[str, Any]
):
    pair = pairs("tied")
    assert same(dict(wd.mask(pair.load(), pair.stats, **choice)), pipeline_masks(pair.study(**choice)))


@pytest.mark.parametrize(
    ("name", "reconstruction"),
    thinned(
        cycled(
            ["tied", "untied-bfloat16", "transposed", "unreached-expert", "experts-in-one-tensor"],
            [row.name for row in RECONSTRUCTIONS.values() if not row.trains],
        ),
        2,
    ),
)
def test_reconstructed_models_and_layer_errors_are_the_pipelines(
    pairs: Callable[[str], Pair], name: str, reconstruction: str, tmp_path: Path
):
    pair = pairs(name)
    project, model = pair.study(reconstruction=reconstruction), pair.load()
    keep = wd.mask(model, pair.stats)
    pipeline_masks(project)
    measures = wd.reconstruct(model, keep, pair.stats, reconstruction=reconstruction)
    assert same(saved(model, tmp_path), pruned_model(project))
    assert measures == load_json(project.details("pruned", "layer_error"))["linears"]


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(torch.float32)


AROUND: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "bfloat16": lambda: _default_dtype(torch.bfloat16),
    "float64": lambda: _default_dtype(torch.float64),
}


def test_products_are_exact_whatever_the_caller_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """TF32 cannot be seen on a CPU."""
    seen, decoder = list[str](), interface._decoder

    def noted(*given: Any) -> Any:
        seen.append(torch.get_float32_matmul_precision())
        return decoder(*given)

    monkeypatch.setattr(interface, "_decoder", noted)
    model = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path / "model")).eval()
    torch.set_float32_matmul_precision("medium")
    try:
        wd.perplexity(model, torch.arange(3, 35)[None])
        assert (seen, torch.get_float32_matmul_precision()) == (["highest"], "medium")
    finally:
        torch.set_float32_matmul_precision("highest")


def test_weights_without_gradients_are_refused(tmp_path: Path):
    config = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path / "model")).config
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(wd.UserError, match=r"^model: got weights made in torch.inference_mode\(\)"):
        wd.calibrate(model, torch.arange(3, 35)[None], statistics="gradients")
    wd.calibrate(model, torch.arange(3, 35)[None])


@pytest.mark.parametrize("around", AROUND)
def test_results_do_not_depend_on_the_callers_modes(around: str, tmp_path: Path):
    def everything(folder: Path, mode: contextlib.AbstractContextManager[Any]) -> dict[str, Any]:
        model = AutoModelForCausalLM.from_pretrained(save_tiny_model(folder)).eval()
        tokens = torch.randint(3, 250, (2, 64), generator=torch.Generator().manual_seed(0))
        with mode:
            stats = wd.calibrate(model, tokens, statistics="gradients")
            keep = wd.mask(model, stats, recipe="fisher")
            told = wd.reconstruct(model, keep, stats)
            found = wd.perplexity(model, tokens)
        grams = [x for one in (*stats.grams, *stats.fisher_grams) for x in one.tensors.values()]
        return {"keep": dict(keep), "told": told, "found": found, "grams": grams, "model": model.state_dict()}

    one, two = everything(tmp_path / "a", contextlib.nullcontext()), everything(tmp_path / "b", AROUND[around]())
    assert one["found"] == two["found"]
    assert one["told"] == two["told"]
    assert same(one["keep"], two["keep"])
    assert same(one["model"], two["model"])
    assert all(torch.equal(*both) for both in zip(one["grams"], two["grams"], strict=True))


def test_one_calibration_serves_a_model_that_is_loaded_again(pairs: Callable[[str], Pair]):
    pair = pairs("experts")
    stats = pickle.loads(pickle.dumps(pair.stats))
    assert same(dict(wd.mask(pair.load(), stats)), dict(wd.mask(pair.load(), pair.stats)))


def test_only_linears_with_a_mask_are_pruned(pairs: Callable[[str], Pair]):
    pair = pairs("tied")
    model = pair.load()
    before, name = state(model), "model.layers.1.mlp.up_proj"
    keep = {name: wd.mask(model, pair.stats)[name]}
    assert wd.prune(model, keep) == 0.5
    after = state(model)
    assert {key for key in after if not torch.equal(after[key], before[key])} == {f"{name}.weight"}
    assert wd.prune(model, keep) == 0.5
    assert same(state(model), after)
    fresh = pair.load()
    assert list(wd.reconstruct(fresh, keep, pair.stats)) == [name]
    assert {key for key, x in fresh.state_dict().items() if not torch.equal(x, before[key])} == {f"{name}.weight"}


def test_a_diverged_perplexity_is_infinite(pairs: Callable[[str], Pair], capsys: pytest.CaptureFixture[str]):
    model = pairs("tied").load()
    model.model.layers[1].mlp.up_proj.weight.data.fill_(3e38)
    assert math.isinf(wd.perplexity(model, pairs("tied").text))
    assert "block 1" in capsys.readouterr().err


# --- a model is left as it was ---


def properties(model: Any) -> dict[str, Any]:
    return {
        "weights": [(name, x.data_ptr(), x._version, x.requires_grad) for name, x in model.named_parameters()],
        "buffers": [(name, x.data_ptr(), x.dtype) for name, x in model.named_buffers()],
        "flags": [(name, module.training) for name, module in model.named_modules()],
        "hooks": [(name, [*x._forward_hooks, *x._forward_pre_hooks]) for name, x in model.named_modules()],
        "own": [(name, sorted(vars(module))) for name, module in model.named_modules()],
        "config": (model.config.to_dict(), model.config._attn_implementation),
        "tied": model.get_output_embeddings().weight is model.get_input_embeddings().weight,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["tied", "other-dtype", "experts"])
def test_a_model_is_as_it_was_after_measuring(pairs: Callable[[str], Pair], name: str, tmp_path: Path):
    pair = pairs(name)
    model = AutoModelForCausalLM.from_pretrained(pair.source, dtype="auto", attn_implementation="eager").eval()
    model.model.layers[0].requires_grad_(requires_grad=False)
    before, weights = properties(model), state(model)
    stats = wd.calibrate(model, pair.tokens, statistics="gram", **pair.words)
    wd.mask(model, stats, method="admm")
    wd.perplexity(model, pair.text, **pair.words)
    assert properties(model) == before
    assert same(state(model), weights)
    assert torch.is_grad_enabled()
    assert torch.equal(stats.blocks[0].inputs[next(iter(stats.blocks[0].inputs))].norm,
                       pair.stats.blocks[0].inputs[next(iter(stats.blocks[0].inputs))].norm)  # fmt: skip


def test_weights_are_borrowed_and_not_copied(pairs: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch):
    pair = pairs("experts")
    model = pair.load()
    own = {x.data_ptr() for x in model.parameters()}
    seen: list[int] = []
    real = Weights.hold

    def hold(weights: Weights, index: int, *args: Any) -> None:
        real(weights, index, *args)
        seen.extend(x.data_ptr() for x in weights.blocks[index].parameters())

    monkeypatch.setattr(Weights, "hold", hold)
    wd.calibrate(model, pair.tokens)
    assert seen
    assert set(seen) <= own


def test_nothing_is_left_in_the_temporary_folder(
    pairs: Callable[[str], Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    wd.perplexity(pairs("tied").load(), pairs("tied").text)
    assert not list(tmp_path.iterdir())


def test_an_error_half_way_leaves_the_model_as_it_was(pairs: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch):
    from wanda_dvc.pruning import choose

    pair = pairs("tied")
    model, keep = pair.load(), dict(wd.mask(pair.load(), pair.stats))
    before, last = state(model), list(keep)[-1]
    for damaged in (keep | {last: keep[last][1:]}, keep | {"lm_head": keep[last]}, keep | {last: keep[last].float()}):
        with pytest.raises(wd.UserError, match="keep: "):
            wd.prune(model, damaged)
        with pytest.raises(wd.UserError, match="keep: "):
            wd.reconstruct(model, damaged, pair.stats)
        assert same(state(model), before)
    real, count = choose.prune_linear, itertools.count()

    def tenth_kills(*args: Any, **words: Any) -> Any:
        if next(count) == 9:
            raise KeyboardInterrupt
        return real(*args, **words)

    monkeypatch.setattr(choose, "prune_linear", tenth_kills)
    with pytest.raises(KeyboardInterrupt):
        wd.reconstruct(model, keep, pair.stats)
    assert same(state(model), before)


# --- wrong arguments ---


def changed(model: Any) -> Any:
    model.model.norm.weight.data[0] += 1
    return model


def integers(model: Any) -> Any:
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(torch.zeros(48, 32, dtype=torch.uint8), requires_grad=False)
    return model


class Adapter(nn.Module):
    """As PEFT's models: not transformers' own."""

    def merge_and_unload(self) -> None:
        """Merge the adapter."""


def adapter() -> Any:
    return Adapter()


def hooked(model: Any, name: str = "model.layers.0.mlp", *, before: bool = False) -> Any:
    module = model.get_submodule(name)
    (module.register_forward_pre_hook if before else module.register_forward_hook)(lambda *_: None)
    return model


def patched(model: Any) -> Any:
    mlp = model.model.layers[0].mlp
    forward = mlp.forward
    mlp.forward = lambda x: 2 * forward(x)
    return model


def parametrized(model: Any, change: Callable[[nn.Module], object]) -> Any:
    change(model.model.layers[0].mlp.up_proj)
    return model


def sharing(model: Any) -> Any:
    mlp = model.model.layers[0].mlp
    mlp.up_proj.weight = mlp.gate_proj.weight
    return model


# What is asked of a model `m` and the pair `p` that it is of, and what is said.
REFUSED: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "no-model": (
        lambda m, p: wd.calibrate(nn.Linear(2, 2), p.tokens),  # type: ignore[arg-type]
        r"model: got Linear, expected a causal language model of transformers",
    ),
    "no-head": (
        lambda m, p: wd.calibrate(AutoModel.from_pretrained(p.source).eval(), p.tokens),
        r"model: got LlamaModel, expected LlamaForCausalLM",
    ),
    "training": (
        lambda m, p: wd.calibrate(m.train(), p.tokens),
        r"model: got training mode, expected evaluation mode; call model.eval\(\)",
    ),
    "training-perplexity": (lambda m, p: wd.perplexity(m.train(), p.tokens), r"model: got training mode"),
    "meta": (
        lambda m, p: wd.calibrate(m.to("meta"), p.tokens),
        r"model: .* on the meta device .*expected all in memory",
    ),
    "quantized": (
        lambda m, p: wd.calibrate(integers(m), p.tokens),
        r"up_proj.weight is torch.uint8, expected F32, F16, BF16",
    ),
    "hook": (
        lambda m, p: wd.calibrate(hooked(m), p.tokens),
        r"model: model.layers.0.mlp: has forward hooks, and the engine would not call them; remove them first",
    ),
    "hook-root": (lambda m, p: wd.perplexity(hooked(m, ""), p.tokens), r"model: LlamaForCausalLM: has forward hooks"),
    "hook-before": (
        lambda m, p: wd.mask(hooked(m, "model.layers.1", before=True), p.stats),
        r"model: model.layers.1: has forward hooks",
    ),
    "forward": (
        lambda m, p: wd.calibrate(patched(m), p.tokens),
        r"model: model.layers.0.mlp: its forward was replaced",
    ),
    "weight-norm": (
        lambda m, p: wd.calibrate(parametrized(m, weight_norm), p.tokens),
        r"model.layers.0.mlp.up_proj: a parametrized weight, .* make it permanent first",
    ),
    "pruned-by-torch": (
        lambda m, p: wd.mask(parametrized(m, lambda x: prune.l1_unstructured(x, "weight", 0.5)), p.stats),
        r"model.layers.0.mlp.up_proj: a parametrized weight, .*`prune.remove`",
    ),
    "shared": (
        lambda m, p: wd.calibrate(sharing(m), p.tokens),
        r"model: model.layers.0.mlp.gate_proj.* and .*up_proj.* share one weight|"
        r"model: model.layers.0.*proj.* and .*proj.* share one weight",
    ),
    "peft": (lambda m, p: wd.calibrate(adapter(), p.tokens), r"got Adapter, an adapter of PEFT, .*merge the adapter"),
    "one-dimension": (
        lambda m, p: wd.calibrate(m, p.tokens[0]),
        r"tokens: got \[64\], expected \[windows, length\]",
    ),
    "no-window": (lambda m, p: wd.perplexity(m, p.tokens[:0]), r"tokens: got \[0, 64\]"),
    "one-token": (lambda m, p: wd.perplexity(m, p.tokens[:, :1]), r"tokens: got \[2, 1\].*two tokens"),
    "list": (
        lambda m, p: wd.calibrate(m, p.tokens.tolist()),
        r"tokens: got list, expected a tensor of whole numbers",
    ),
    "floats": (
        lambda m, p: wd.calibrate(m, p.tokens.float()),
        r"tokens: got torch.float32, expected a tensor of whole numbers",
    ),
    "vocabulary": (
        lambda m, p: wd.calibrate(m, p.tokens + 260),
        r"tokens: got ids from \d+ to \d+, expected 0 to 259",
    ),
    "negative": (lambda m, p: wd.perplexity(m, p.tokens - 260), r"tokens: got ids from -\d+"),
    "long": (
        lambda m, p: wd.calibrate(m, torch.ones(1, 513, dtype=torch.long)),
        r"tokens: got windows of 513, expected at most the model's 512",
    ),
    "statistics": (
        lambda m, p: wd.calibrate(m, p.tokens, statistics="yes"),  # type: ignore[arg-type]
        r"statistics: got yes, expected norms, gram, fisher",
    ),
    "recipe": (lambda m, p: wd.mask(m, p.stats, recipe="wands"), r"^recipe: got wands, expected magnitude, wanda"),
    "propagation": (
        lambda m, p: wd.mask(m, p.stats, recipe="blockwise"),
        r"^recipe: got block with propagation corrected, expected one with propagation dense",
    ),
    "dtype": (
        lambda m, p: wd.perplexity(m, p.tokens, dtype="int8"),  # type: ignore[arg-type]
        r"dtype: got int8, expected float32, bfloat16, float16",
    ),
    "method": (
        lambda m, p: wd.mask(m, p.stats, method="wand"),
        r"^method: got wand, expected magnitude, wanda",
    ),
    "sparsity": (lambda m, p: wd.mask(m, p.stats, sparsity=1.5), r"^sparsity: got 1.5, expected < 1"),
    "pattern-word": (lambda m, p: wd.mask(m, p.stats, pattern="half"), r"^pattern: got half, expected"),
    "pattern-sparsity": (
        lambda m, p: wd.mask(m, p.stats, pattern="1:4"),
        r"^sparsity: got 0.5 with pattern 1:4, expected 0.75",
    ),
    "pattern-features": (
        lambda m, p: wd.mask(m, p.stats, pattern="5:10"),
        r"^pattern: got 5:10, but .* has 32 inputs",
    ),
    "group": (
        lambda m, p: wd.mask(m, p.stats, group="column"),  # type: ignore[arg-type]
        r"^group: got column, expected row, layer or fisher",
    ),
    "allocation": (
        lambda m, p: wd.mask(m, p.stats, allocation="even"),
        r"^allocation: got even, expected uniform",
    ),
    "variant-group": (
        lambda m, p: wd.mask(m, p.stats, method="wanda-variant", group="linear"),
        r"^method: got wanda-variant with .* group linear",
    ),
    "variant-sparsity": (
        lambda m, p: wd.mask(m, p.stats, method="wanda-variant", sparsity=0.97),
        r"^sparsity: got 0.97 of some linear with method wanda-variant",
    ),
    "other-weights": (
        lambda m, p: wd.mask(changed(m), p.stats),
        r"stats: measured on other weights \(1 of \d+ tensors, first model.norm.weight\)",
    ),
    "no-grams-method": (
        lambda m, p: wd.mask(m, wd.calibrate(m, p.tokens), method="admm"),
        r"^stats: got statistics norms, expected gram \(method admm\); call calibrate",
    ),
    "no-fisher-group": (
        lambda m, p: wd.mask(m, wd.calibrate(m, p.tokens), group="outputs"),
        r"^stats: got statistics norms, expected gradients \(group outputs\)",
    ),
    "no-fisher-allocation": (
        lambda m, p: wd.mask(m, wd.calibrate(m, p.tokens), allocation="sensitivity"),
        r"^stats: got statistics norms, expected gradients \(allocation sensitivity\)",
    ),
    "no-gradients": (
        lambda m, p: wd.reconstruct(
            m, {}, wd.calibrate(m, p.tokens, statistics="gram"), reconstruction="output-weighted"
        ),
        r"^reconstruction: got output-weighted and statistics gram, expected gradients; call calibrate",
    ),
    "no-grams-reconstruct": (
        lambda m, p: wd.reconstruct(m, wd.mask(m, p.stats), wd.calibrate(m, p.tokens)),
        r"^reconstruction: got least-squares and statistics norms, expected gram",
    ),
    "reconstruction": (
        lambda m, p: wd.reconstruct(m, {}, p.stats, reconstruction="magic"),
        r"^reconstruction: got magic, expected none, least-squares",
    ),
    "trains": (
        lambda m, p: wd.reconstruct(m, {}, p.stats, reconstruction="blockwise"),
        r"^reconstruction: got block, expected none, least-squares, fisher",
    ),
    "no-masks": (lambda m, p: wd.prune(m, {}), r"keep: got no masks"),
    "tokens-complex": (lambda m, p: wd.calibrate(m, p.tokens.to(torch.complex64)), r"^tokens: got torch.complex64"),
    "tokens-bool": (lambda m, p: wd.calibrate(m, p.tokens > 9), r"^tokens: got torch.bool, expected a tensor of whole"),
    "tokens-float8": (lambda m, p: wd.perplexity(m, p.tokens.to(torch.float8_e4m3fn)), r"^tokens: got torch.float8"),
    "tokens-above-int64": (
        lambda m, p: wd.calibrate(m, torch.full((1, 4), 2**63, dtype=torch.uint64)),
        r"^tokens: got ids from -\d+ to -\d+, expected 0 to 259",
    ),
    "tokens-meta": (
        lambda m, p: wd.calibrate(m, p.tokens.to("meta")),
        r"^tokens: got a tensor on the meta device, expected whole numbers in memory",
    ),
    "tokens-sparse": (
        lambda m, p: wd.perplexity(m, p.tokens.to_sparse()),
        r"^tokens: got torch.sparse_coo, expected torch.strided; call tokens.to_dense\(\)",
    ),
    "tokens-nested": (
        lambda m, p: wd.perplexity(m, torch.nested.nested_tensor([*p.tokens], layout=torch.jagged)),
        r"^tokens: got torch.jagged, expected torch.strided",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_arguments_are_said_with_what_was_found_and_expected(pairs: Callable[[str], Pair], case: str):
    call, message = REFUSED[case]
    with pytest.raises(wd.UserError, match=message) as error:
        call(pairs("tied").load(), pairs("tied"))
    assert "params.yaml" not in str(error.value)
    assert "\n" not in str(error.value)


ODD = (True, "4", 2.5, [1], {1: 2})
# By argument: what is asked with an odd value `x` of it, the values, and what is said.
ARGUMENTS: dict[str, tuple[Callable[[Any, Any, Any], Any], Sequence[Any], str]] = {
    "recipe": (lambda m, p, x: wd.mask(m, p.stats, recipe=x), ODD, "recipe: got .*, expected "),
    "sparsity": (
        lambda m, p, x: wd.mask(m, p.stats, sparsity=x),
        (*ODD, None, math.nan, torch.zeros(9, 9)),
        "sparsity: got .*, expected ",
    ),
    "pattern": (lambda m, p, x: wd.mask(m, p.stats, pattern=x), ODD, "pattern: got .*, expected "),
    "method": (lambda m, p, x: wd.mask(m, p.stats, method=x), ODD, "method: got .*, expected "),
    "group": (lambda m, p, x: wd.mask(m, p.stats, group=x), ODD, "group: got .*, expected "),
    "allocation": (lambda m, p, x: wd.mask(m, p.stats, allocation=x), ODD, "allocation: got .*, expected "),
    "strength": (
        lambda m, p, x: wd.mask(m, p.stats, allocation_strength=x),
        ODD,
        "allocation_strength: got .*, expected ",
    ),
    "statistics": (
        lambda m, p, x: wd.calibrate(m, p.tokens, statistics=x),
        (*ODD, None, ("norms", "gram"), torch.zeros(9, 9)),
        "statistics: got .*, expected norms, gram, fisher$",
    ),
    "dtype": (
        lambda m, p, x: wd.perplexity(m, p.tokens, dtype=x),
        (*ODD, torch.float16),
        "dtype: got .*, expected float32, bfloat16, float16$",
    ),
    "stats": (
        lambda m, p, x: wd.mask(m, x),
        (*ODD, None),
        r"stats: got .*, expected the result of calibrate\(model, tokens\)$",
    ),
    "stats-reconstruct": (
        lambda m, p, x: wd.reconstruct(m, {}, x),
        (*ODD, None),
        r"stats: got .*, expected the result of calibrate\(model, tokens\)$",
    ),
    "reconstruction": (
        lambda m, p, x: wd.reconstruct(m, {}, p.stats, reconstruction=x),
        (*ODD, None),
        "reconstruction: got .*, expected none, least-squares",
    ),
    "pattern-prune": (
        lambda m, p, x: wd.prune(m, wd.mask(m, p.stats), pattern=x),
        (*ODD, None),
        "pattern: got .*, expected unstructured, ",
    ),
    "pattern-reconstruct": (
        lambda m, p, x: wd.reconstruct(m, wd.mask(m, p.stats), p.stats, pattern=x),
        (*ODD, None),
        "pattern: got .*, expected unstructured, ",
    ),
    "keep": (
        lambda m, p, x: wd.prune(m, x),
        (True, "4", 2.5, [1], None, [("model.layers.0.mlp.up_proj", torch.ones(48, 32))]),
        r"keep: got .*, expected masks by linear; call mask\(model, stats\)$",
    ),
    "keep-mask": (
        lambda m, p, x: wd.prune(m, {"model.layers.0.self_attn.q_proj": x}),
        (*ODD, None, torch.ones(1024).bool(), torch.ones(32, 32), *(
            change(torch.ones(32, 32).bool()) for change in (Tensor.numpy, Tensor.to_sparse, lambda x: x.to("meta"))
        )),
        r"keep: model\S+: got .*, expected a dense torch.bool tensor \[32, 32\] in memory; choose",
    ),
    "tokens": (
        lambda m, p, x: wd.calibrate(m, x),
        (*ODD, None),
        r"tokens: got \w+, expected a tensor of whole numbers \[windows, length\]$",
    ),
    "model": (lambda m, p, x: wd.calibrate(x, p.tokens), (*ODD, None), "model: got .*, expected a causal language"),
    "directory": (lambda m, p, x: wd.Study(x), (True, 4, None, [1]), "directory: got .*, expected a path$"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        pytest.param(argument, x, id=f"{argument} {type(x).__name__} {number}")
        for argument, (_, values, _) in ARGUMENTS.items()
        for number, x in enumerate(values)
    ],
)
def test_an_odd_argument_is_one_line(pairs: Callable[[str], Pair], argument: str, value: Any):
    call, _, message = ARGUMENTS[argument]
    with pytest.raises(wd.UserError, match=f"^{message}") as error:
        call(pairs("tied").load(), pairs("tied"), value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "uint32", "uint64"])
def test_tokens_of_any_whole_numbers_are_the_same_tokens(pairs: Callable[[str], Pair], dtype: str):
    """As numpy reads files of tokens: uint16."""
    pair = pairs("tied")
    tokens = pair.text.clamp(max=255)
    assert wd.perplexity(pair.load(), tokens.to(getattr(torch, dtype))) == wd.perplexity(pair.load(), tokens)


def test_statistics_and_masks_of_another_model_are_refused(pairs: Callable[[str], Pair]):
    one, other = pairs("tied"), pairs("transposed")
    with pytest.raises(wd.UserError, match="stats: measured on other weights"):
        wd.mask(one.load(), other.stats)
    with pytest.raises(
        wd.UserError, match=r"keep: got a mask of .*, expected linears of this LlamaForCausalLM, such as"
    ):
        wd.prune(one.load(), wd.mask(other.load(), other.stats))


def test_a_pruned_model_is_not_reconstructed(pairs: Callable[[str], Pair]):
    """It would aim at what the pruned weights put out, and change nothing."""
    pair = pairs("tied")
    model = pair.load()
    keep = wd.mask(model, pair.stats)
    wd.prune(model, keep)
    with pytest.raises(wd.UserError, match="reload the model if it was pruned"):
        wd.reconstruct(model, keep, pair.stats)


def test_two_rows_that_change_places_are_other_weights(pairs: Callable[[str], Pair]):
    pair = pairs("tied")
    for name in ("model.layers.0.mlp.up_proj.weight", "model.norm.weight"):
        model = pair.load()
        weight = model.get_parameter(name)
        weight.data[[0, 1]] = weight.data[[0, 1]].flip(0) + (0 if weight.dim() > 1 else torch.tensor([1.0, -1.0]))
        with pytest.raises(wd.UserError, match=f"first {name}"):
            wd.mask(model, pair.stats)


# --- the package ---


def test_importing_the_package_loads_nothing():
    code = (
        "import sys; before = set(sys.modules); import wanda_dvc as wd; "
        "assert 'wanda_dvc.interface' not in sys.modules; names = dir(wd); wd.Study; "
        "heavy = {'torch', 'transformers', 'dvc', 'numpy'} & set(sys.modules); print(heavy, names)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("set() ")
    assert all(repr(name) in done.stdout for name in wd.__all__)


def test_all_names_are_there_and_no_others():
    for name in wd.__all__:
        assert getattr(wd, name).__doc__, name
    assert wd.mask is interface.mask
    for name in ("chose", "RECIPES"):  # the latter is a name of the interface's module
        with pytest.raises(AttributeError, match=f"module 'wanda_dvc' has no attribute '{name}'"):
            getattr(wd, name)


def test_statistics_say_what_they_are(pairs: Callable[[str], Pair]):
    stats = pairs("tied").stats
    assert repr(stats) == "Stats(2 blocks, 2 windows of 64 tokens, float32, statistics fisher)"
    assert json.dumps(stats.weights)
