"""Every stage on a simulated GPU: the same results as on the CPU, and how often what crosses between host and device.

`tests/simulated_gpu.py` says what it simulates, docs/install.md what it cannot see.
"""

import ast
import contextlib
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, calibrate, planned, save_tiny_model, text_of, write_params
from safetensors.torch import load_file
from simulated_gpu import SimulatedDevice
from test_families import RECORDED, save

from wanda_dvc.catalog import RECIPES
from wanda_dvc.stages.apply import apply
from wanda_dvc.stages.download import download
from wanda_dvc.stages.mask import mask
from wanda_dvc.stages.perplexity import perplexity
from wanda_dvc.stages.zero_shot import zero_shot
from wanda_dvc.study.files import load_json
from wanda_dvc.study.project import Project
from wanda_dvc.study.tensors import block_count, read_fisher, read_masks, read_stats

full = pytest.mark.full
# What `save_tiny_model` makes with so many blocks, and what goes through it.
BLOCKS = 2


@dataclass(frozen=True, eq=False)
class Bench:
    """Runs the stages of one model; what does not depend on the recipe runs once."""

    model: Path
    root: Path
    texts: dict[str, str]

    def project(self, folder: Path, kind: str, recipe: str) -> Project:
        """Return a study with a recipe, and with a pattern of units if a second word names one."""
        folder.mkdir(exist_ok=True)
        recipe, *pattern = recipe.split()
        changes: dict[str, Any] = {"calibration__statistics": "gradients", "runtime__device": kind, "recipe": recipe}
        changes |= {"pattern": pattern[0], "sparsity": 0.25} if pattern else {}
        write_params(folder, self.model, **self.texts | changes)
        return planned(Project(folder))

    @cache  # noqa: B019 - a bench lives as long as the tests of its model
    def measured(self, kind: str) -> Project:
        """Download, calibrate, and the dense model's perplexity."""
        project = self.project(self.root / f"{kind}-measured", kind, "wanda")
        for part in ("model", "calibration", "perplexity"):
            download(project=project, part=part, text=text_of(part))
        with present(kind):
            calibrate(project=project)
            perplexity(project=project, model="dense", text="embedded")
        return project

    @cache  # noqa: B019
    def pruned(self, kind: str, recipe: str) -> Project:
        """The same, then mask, apply and the pruned model's perplexity."""
        folder = self.root / f"{kind}-{recipe}"
        shutil.copytree(self.measured(kind).root, folder, symlinks=True)
        project = self.project(folder, kind, recipe)
        with present(kind):
            mask(project=project)
            apply(project=project)
            perplexity(project=project, model="pruned", text="embedded")
        return project

    @cache  # noqa: B019
    def asked(self, kind: str, recipe: str) -> Project:
        """The same, then zero-shot."""
        project = self.pruned(kind, recipe)
        download(project=project, part="tasks")
        with present(kind):
            zero_shot(project=project, model="pruned")
        return project


def present(kind: str) -> contextlib.AbstractContextManager[object]:
    """Inside, this process has the device."""
    return contextlib.nullcontext() if kind == "cpu" else SimulatedDevice(kind).present()


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, texts: dict[str, str]) -> Bench:
    """A tiny Llama."""
    root = tmp_path_factory.mktemp("gpu")
    return Bench(save_tiny_model(root / "model", num_hidden_layers=BLOCKS), root, texts)


def figure(project: Project, model: str) -> Any:
    return load_json(project.metrics(model, "perplexity/embedded"))["perplexity"]


def check_alike(host: Project, card: Project, *, masks: bool = True) -> None:
    """Hold the results of a GPU to the CPU's. Both add up in other orders: in float32 that is 1e-4 at most."""
    for block in range(block_count(host.stats, "calibrate")):
        one, other = (read_stats(project.stats, block) for project in (host, card))
        assert one.readers == other.readers
        for name, x in one.inputs.items():
            assert x.count == other.inputs[name].count
            torch.testing.assert_close(other.inputs[name].norm, x.norm, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(other.influence, one.influence, rtol=1e-4, atol=1e-6)
        assert one.outputs.keys() == other.outputs.keys()
        for name, outputs in one.outputs.items():
            assert other.outputs[name].count == outputs.count
            assert float(other.outputs[name].sum) == pytest.approx(float(outputs.sum), rel=1e-4)
        one_back, other_back = (read_fisher(project.gradients, block) for project in (host, card))
        assert one_back.keys() == other_back.keys()
        for name, sums in one_back.items():
            assert float((other_back[name] - sums).norm()) <= 1e-3 * float(sums.norm()), name
        for name, keep in read_masks(host.masks, block).items() if masks else ():
            assert torch.equal(read_masks(card.masks, block)[name], keep), name
    for model in ("dense", "pruned"):
        assert figure(card, model) == pytest.approx(figure(host, model), rel=1e-3)
    weights, others = (load_file(project.model("pruned") / "model.safetensors") for project in (host, card))
    for name, weight in weights.items():
        torch.testing.assert_close(others[name], weight, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "recipe"),
    [
        *(("cuda", recipe) for recipe in RECIPES),
        *(pytest.param("mps", recipe, marks=() if recipe == "wanda-refit" else full) for recipe in RECIPES),
    ],
)
def test_every_stage_of_every_recipe_gives_what_the_cpu_gives(bench: Bench, kind: str, recipe: str):
    check_alike(bench.pruned("cpu", recipe), bench.pruned(kind, recipe))


@pytest.mark.parametrize("recipe", ["wanda neurons", "admm neurons", "admm heads", "wanda blocks"])
def test_a_smaller_model_is_the_one_that_the_cpu_makes(bench: Bench, recipe: str):
    check_alike(bench.pruned("cpu", recipe), bench.pruned("cuda", recipe))


def test_the_experts_that_go_are_those_that_go_on_the_cpu(tmp_path: Path, texts: dict[str, str]):
    bench = Bench(save("mixtral", tmp_path / "model"), tmp_path, texts)
    check_alike(*(bench.pruned(kind, "wanda experts") for kind in ("cpu", "cuda")))


@pytest.mark.parametrize(
    ("kind", "recipe"),
    [
        pytest.param(kind, recipe, marks=() if (kind, recipe) == ("cuda", "wanda") else full)
        for kind in ("cuda", "mps")
        for recipe in RECIPES
    ],
)
def test_questions_are_answered_as_on_the_cpu(bench: Bench, kind: str, recipe: str):
    details = [
        load_json(bench.asked(where, recipe).details("pruned", "zero_shot"))["tasks"]["piqa"] for where in ("cpu", kind)
    ]
    host, card = ([(item["answer"], item["loglikelihoods"]) for item in one["items"]] for one in details)
    for (answer, values), (other, others) in zip(host, card, strict=True):
        assert answer == other
        assert others == pytest.approx(values, abs=1e-3)


SHORT = ("gpt2", "mixtral")  # their weights are stored across, or are experts


@pytest.mark.parametrize("family", [pytest.param(name, marks=() if name in SHORT else full) for name in RECORDED])
def test_every_family_gives_what_the_cpu_gives(family: str, tmp_path: Path, texts: dict[str, str]):
    """Forward and backward, masks, least squares, and the perplexity of both models."""
    bench = Bench(save(family, tmp_path / "model"), tmp_path, texts)
    check_alike(*(bench.pruned(kind, "wanda-refit") for kind in ("cpu", "cuda")))


def test_hidden_states_that_a_gpu_has_no_room_for_wait_on_the_host(tmp_path: Path, bench: Bench):
    project = bench.project(tmp_path / "study", "cuda", "wanda")
    for part in ("model", "perplexity"):
        download(project=project, part=part, text=text_of(part))
    with SimulatedDevice("cuda", free=0).present():
        perplexity(project=project, model="dense", text="embedded")
    assert figure(project, "dense") == figure(bench.measured("cuda"), "dense")


# --- one module ---


def test_what_only_a_gpu_has_is_called_in_one_module():
    """`torch.cuda`, `torch.mps`, their backends, pinned memory, streams and semi-structured weights."""
    found = Counter[str]()
    for path in (ROOT / "src/wanda_dvc").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if any(map(_is_of_a_gpu, _names(node))):
                found[path.relative_to(ROOT / "src/wanda_dvc").as_posix()] += 1
    assert set(found) == {"engine/accelerator.py"}


def _names(node: ast.AST) -> list[str]:
    """The dotted names that a node reads or imports."""
    match node:
        case ast.Attribute():
            return [ast.unparse(node)]
        case ast.Import():
            return [alias.name for alias in node.names]
        case ast.ImportFrom():
            return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def _is_of_a_gpu(name: str) -> bool:
    places = ("torch.cuda", "torch.mps", "torch.backends.cuda", "torch.backends.cudnn", "torch.backends.mps")
    return name.startswith(places) or name.rpartition(".")[2] in (
        "pin_memory", "is_pinned", "record_stream", "wait_stream", "mem_get_info", "to_sparse_semi_structured",
    )  # fmt: skip


# --- the simulation itself ---


@pytest.fixture
def device() -> Iterator[SimulatedDevice]:
    with SimulatedDevice("cuda").present() as device:
        yield device


def test_the_simulated_device_refuses_what_a_gpu_refuses(device: SimulatedDevice):
    card, host = torch.ones(2, 3, device="cuda"), torch.ones(2, 3)
    assert (str(card.device), card.is_cuda, str((card * 2).device)) == ("cuda:0", True, "cuda:0")
    for mixed in (
        lambda: card + host,
        lambda: host.add_(card),
        lambda: torch.cat([card, host]),
        lambda: torch.stack([card[0, 0], host[0, 0]]),
        lambda: card @ host.T,
        lambda: host[torch.tensor([0], device="cuda")],
    ):
        with pytest.raises(RuntimeError, match="same device"):
            mixed()
    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
        card.numpy()
    with pytest.raises(AssertionError, match="memory that is not pinned"):
        torch.empty(2, 3, device="cuda").copy_(host, non_blocking=True)
    assert torch.equal((card + host.sum()).cpu(), host + 6)  # one number of the host is taken


def test_gradients_and_threads_see_the_simulated_device(device: SimulatedDevice):
    from concurrent.futures import ThreadPoolExecutor

    x, seen = torch.ones(3, device="cuda").requires_grad_(), []
    y = x * 2
    y.register_hook(lambda gradient: seen.append((gradient.device, torch.zeros(1, device="cuda").device)))
    (back,) = torch.autograd.grad(y.square().sum(), x)
    assert (str(back.device), back.tolist(), seen) == ("cuda:0", [8.0] * 3, [(x.device, x.device)])
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: torch.zeros(1, device="cuda").device).result() == x.device


def test_mps_has_neither_float64_nor_pinned_memory():
    with SimulatedDevice("mps").present():
        for call in (
            lambda: torch.ones(1, device="mps").double(),
            lambda: torch.zeros(1, dtype=torch.double).to("mps"),
            lambda: torch.ones(1).to("mps").to("cpu", torch.double),
        ):
            with pytest.raises(TypeError, match="float64"):
                call()
        with pytest.raises(RuntimeError, match="no pinned memory"):
            torch.ones(1).pin_memory()
