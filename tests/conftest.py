"""Fixtures: tiny random models with a byte tokenizer, and studies of them.

Torch and transformers are imported where they are used: xdist's own process, which runs no test, does without.
"""

import atexit
import contextlib
import ctypes
import gc
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar
from unittest import mock

from jaxtyping import install_import_hook

# Torch and transformers bring a million objects that stay; walking them again and again is a fifth of a fast test.
gc.set_threshold(100_000, 50, 1000)

# Shapes in annotations are checked at run time, before anything imports these modules.
CHECKED = ["pruning", "engine"]
install_import_hook([f"wanda_dvc.{name}" for name in CHECKED], "checker.checked")

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run beside one another, on models too small to share
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
os.environ |= dict.fromkeys(OFFLINE, "1")
for _role in ("AUTHOR", "COMMITTER"):  # of the commits that tests make
    os.environ |= {f"GIT_{_role}_NAME": "test", f"GIT_{_role}_EMAIL": "test@example.org"}

# Of documents that `datasets` unpacks, before it is imported.
_datasets = tempfile.TemporaryDirectory(prefix="wanda-dvc-")
os.environ["HF_DATASETS_CACHE"] = _datasets.name

import offline  # noqa: E402 - after the hook
import pytest  # noqa: E402
from filelock import FileLock  # noqa: E402
from hypothesis import settings  # noqa: E402
from parsing import parse_once  # noqa: E402
from ruamel.yaml import YAML  # noqa: E402

from wanda_dvc.params import check_params, flatten, nested  # noqa: E402
from wanda_dvc.sources import EMBEDDED_FOLDER  # noqa: E402
from wanda_dvc.stages import run  # noqa: E402
from wanda_dvc.study.folder import Study  # noqa: E402

if TYPE_CHECKING:
    import torch

# The types that tests name most.
Make = Callable[..., Study]
Patch: TypeAlias = pytest.MonkeyPatch
Capture: TypeAlias = pytest.CaptureFixture[str]
Factory: TypeAlias = pytest.TempPathFactory

# How long an example takes depends on what else the machine does. `benchmarks/` measure times.
settings.register_profile("full", deadline=None)
settings.register_profile("short", deadline=None, max_examples=25)
parse_once()
offline.block()
pytest.register_assert_rewrite("families")  # its asserts show values too, as those of test modules do

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _no_network() -> Iterator[None]:
    yield
    reached, offline.reached[:] = offline.reached.copy(), []
    assert not reached


def pytest_configure(config: pytest.Config) -> None:
    """Without the tests that are `full`, draw fewer examples too."""
    settings.load_profile("short" if "not full" in config.getoption("markexpr") else "full")


# Modules whose grids `make test` runs as they are: the oracles of what is computed, the backends' own choice, pages.
WHOLE = {
    "test_backends.py", "test_divergence.py", "test_docs.py", "test_figures.py", "test_gram.py", "test_machine.py",
    "test_selection.py", "test_solvers.py",
}  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as `full` all rows of a test but those marked `short`; without such a mark, all but the first."""
    rows: dict[tuple[Path, str], list[pytest.Item]] = {}
    for item in items:
        if item.path.name not in WHOLE and not item.get_closest_marker("full"):
            rows.setdefault((item.path, item.nodeid.partition("[")[0]), []).append(item)
    for items_of_test in rows.values():
        chosen = [item for item in items_of_test if item.get_closest_marker("short")] or items_of_test[:1]
        for item in items_of_test:
            if item not in chosen:
                item.add_marker(pytest.mark.full)


def pytest_collection_finish() -> None:
    """No collection, such as pytest's own at the end, walks the objects of the libraries that are imported now."""
    gc.freeze()


def kept(folder: Path, key: tuple[object, ...], make: Callable[[Path], object]) -> Path:
    """Write into a folder the files that `make` writes into an empty one. Each key's files are made once a process."""
    if repr(key) not in _made:
        new = Path(tempfile.mkdtemp(dir=_kept_folder()))
        make(new)
        _made[repr(key)] = new
    folder.mkdir(parents=True, exist_ok=True)
    for path in _made[repr(key)].iterdir():
        (folder / path.name).unlink(missing_ok=True)  # other names may lead to the earlier file
        shutil.copyfile(path, folder / path.name)
    return folder


_made: dict[str, Path] = {}
_SCRATCH = tempfile.gettempdir()  # before any test has another


@cache
def _kept_folder() -> str:
    folder = tempfile.mkdtemp(prefix="wanda-dvc-models-", dir=_SCRATCH)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def save_tiny_model(
    folder: Path, *, seed: int = 0, dtype: "torch.dtype | None" = None, shard: str = "1GB", **config: Any
) -> Path:
    """A random Llama of four blocks with grouped queries, and a tokenizer that knows bytes."""
    import torch

    kind = dtype or torch.float32
    key = ("tiny", seed, kind, shard, sorted(config.items()))
    kept(folder, key, lambda new: _make_tiny_model(new, seed, kind, shard, config))
    torch.manual_seed(seed)  # what a test draws next does not depend on the tests before it
    return folder


def _make_tiny_model(folder: Path, seed: int, dtype: "torch.dtype", shard: str, config: dict[str, Any]) -> None:
    import torch
    from checkpoints import byte_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape = {
        "vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": True,
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**shape | config))
    model.to(dtype)  # type: ignore[arg-type] # transformers' decorator hides self
    for parameter in model.parameters():  # far from the tiny values of the initializer, so that masks matter
        parameter.data.mul_(5)
    model.save_pretrained(folder, max_shard_size=shard)
    byte_tokenizer().save_pretrained(folder)


TEXTS = ("calibration__text", "perplexity__texts__embedded")  # their settings


def write_params(root: Path, folder: Path | str, **changes: Any) -> None:
    """A small params.yaml, and after it the stage `plan`, which refuses wrong settings."""
    write_settings(root, folder, **changes)
    planned(Study(root))


def write_settings(root: Path, folder: Path | str, **changes: Any) -> None:
    """The committed params.yaml, small enough for a tiny model; `changes` by dotted names with __ for the dots."""
    small = {
        "model": str(folder), "recipe": "wanda", "calibration__windows": 3, "calibration__length": 64,
        "perplexity__length": 64, "perplexity__windows": 4, "tasks__names": ["piqa"], "tasks__limit": 4,
    }  # fmt: skip
    named = {name.replace("__", "."): value for name, value in (small | changes).items()}
    params: Any = nested(dict(flatten(committed())) | named)
    for setting in TEXTS:
        text = params
        for name in setting.split("__"):
            text = text.get(name) if isinstance(text, dict) else None
        if isinstance(text, dict) and Path(text["source"]).is_absolute() and f"{setting}__split" not in changes:
            text["split"] = None  # a file has none
    lines = [f"{name}: {json.dumps(value, ensure_ascii=False)}\n" for name, value in params.items()]
    (root / "params.yaml").write_text("".join(lines), encoding="utf-8")


def committed() -> Any:
    """The settings of the committed params.yaml."""
    return YAML(typ="safe").load((ROOT / "params.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: Factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def texts(tmp_path_factory: Factory) -> dict[str, str]:
    """Settings of short texts, as changes of params.yaml: to make tokens of the embedded ones takes half a second."""
    names = [part.partition("__")[0] for part in TEXTS]

    def make(folder: Path) -> None:
        folder.mkdir()
        for name, split in zip(names, ("train", "test"), strict=True):
            lines = (EMBEDDED_FOLDER / f"text/{split}.jsonl").read_text(encoding="utf-8").splitlines()
            text = "\n".join(json.loads(line)["text"] for line in lines)
            (folder / f"{name}.txt").write_text(text[:6000], encoding="utf-8")

    folder = once(tmp_path_factory, "texts", make)
    return {f"{part}__source": str(folder / f"{name}.txt") for part, name in zip(TEXTS, names, strict=True)}


def planned(study: Study) -> Study:
    """The study after the stage `plan`."""
    run("plan", study=study)
    return study


def fetch(study: Study, *parts: str) -> Study:
    """Run parts of `download`: those that are named, or all but the tasks, whose index takes seconds."""
    from wanda_dvc.stages.download import download

    for part in parts or ("model", "calibration", "perplexity"):
        download(study=study, source=part, text="embedded" * (part == "perplexity"))
    return study


def git(folder: Path, *arguments: str) -> str:
    """Run git; what it prints."""
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def tree(folder: Path, *of: str) -> dict[str, bytes]:
    """The content of every file below a folder, or of those parts; without git's, DVC's and unfinished work."""
    names = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    names = [name for name in names if not {".dvc", ".git"} & set(name.parts) and (not of or name.parts[0] in of)]
    return {name.as_posix(): (folder / name).read_bytes() for name in names}


MADE = ("stats", "masks", "weights", "reference", "metrics")  # what stages that go through blocks write


calibrate = partial(run, "calibrate")  # all statistics that something reads


def mask_and_apply(study: Study) -> Study:
    """The study after these two stages."""
    for stage in ("mask", "apply"):
        run(stage, study=study)
    return study


def run_blocks(study: Study, *, asks: bool = True) -> None:
    """The stages that go through blocks, and the one between them; with `asks` the pruned model is asked questions."""
    calibrate(study=study)
    mask_and_apply(study)
    for part in ("dense", "pruned"):
        run("perplexity", study=study, variant=part)
    if asks:
        run("zero-shot", study=study, variant="pruned")


def prune(study: Study) -> Study:
    """The study after its calibration, too."""
    calibrate(study=study)
    return mask_and_apply(study)


CALIBRATION = {"calibration__statistics": "fisher", "calibration__windows": 4}


def once(factory: Factory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that one of pytest's processes makes for all of them."""
    folder = factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    with FileLock(folder / f"{name}.lock"):
        if not (folder / f"{name}.made").exists():
            make(folder / name)
            (folder / f"{name}.made").touch()
    return folder / name


@pytest.fixture(scope="session")
def calibrated(tmp_path_factory: Factory, texts: dict[str, str]) -> Path:
    """A study with Gram matrices and Fisher information of a tiny model."""

    def make(root: Path) -> None:
        model = save_tiny_model(root.with_name("calibrated-model") / "tiny", num_hidden_layers=2)
        root.mkdir()
        write_params(root, model, **CALIBRATION, **texts)
        calibrate(study=fetch(Study(root)))

    return once(tmp_path_factory, "calibrated", make)


@pytest.fixture(scope="session")
def finished(calibrated: Path, tmp_path_factory: Factory) -> Path:
    """A study of which every stage has run."""

    def make(root: Path) -> None:
        shutil.copytree(calibrated, root, symlinks=True, ignore=shutil.ignore_patterns("tmp"))
        study = fetch(Study(root), "tasks")
        for name in ("mask", "apply", "perplexity", "zero-shot"):
            run(name, study=study)

    return once(tmp_path_factory, "finished", make)


@pytest.fixture
def study(tmp_path: Path, tiny: Path, texts: dict[str, str]) -> Make:
    """Makes the study in tmp_path; called again, it changes the settings. `plan=False`: they may be wrong."""

    def make(model: Path | str = tiny, *, plan: bool = True, **changes: Any) -> Study:
        (write_params if plan else write_settings)(tmp_path, model, **texts | changes)
        return Study(tmp_path)

    return make


@pytest.fixture
def calibrated_study(calibrated: Path, study: Make, tmp_path: Path) -> Make:
    """Makes a copy of `calibrated` with other settings; called again, it changes them."""
    # Without notes of where its artifacts are: a stage that runs again would copy them.
    shutil.copytree(calibrated, tmp_path, symlinks=True, dirs_exist_ok=True, ignore=shutil.ignore_patterns("tmp"))
    return partial(study, Study(calibrated).params.model, **CALIBRATION)


def shared() -> Path:
    """The folder of reference data, which lies beside a checkout on some machines only."""
    folder = os.environ.get("WANDA_DVC_SHARED")
    if not folder:
        pytest.skip("WANDA_DVC_SHARED is not set: reference data is not on this machine")
    return Path(folder)


T = TypeVar("T")


def without_privilege(call: Callable[[], T]) -> T:
    """Call a function in a thread for which the permissions of files hold, also where the tests run as root."""
    with ThreadPoolExecutor(1, initializer=_drop_privilege) as thread:
        return thread.submit(call).result()


def _drop_privilege() -> None:
    if os.geteuid():
        return
    if sys.platform != "linux":
        pytest.skip("root passes over the permissions of files")
    system = ctypes.CDLL(None, use_errno=True)
    header, capabilities = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()  # version 3, this thread
    assert system.capget(header, capabilities) == 0
    for kind in (0, 1, 2):  # effective, permitted, inheritable
        capabilities[kind] &= ~(1 << 1 | 1 << 2 | 1 << 3)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER
    assert system.capset(header, capabilities) == 0


@contextlib.contextmanager
def interrupted(owner: object, name: str, at: int = 0) -> Iterator[None]:
    """Raise KeyboardInterrupt in a call of a function, by its number from 0 on; the code inside must not catch it."""
    function, calls = getattr(owner, name), itertools.count()

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == at:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    with mock.patch.object(owner, name, call), pytest.raises(KeyboardInterrupt):
        yield


def walk(decoder: Any, rows: Any, work: Path, **kwargs: Any) -> Any:
    """The steps of a forward pass in this process."""
    from wanda_dvc.engine.forward import ModelRunner

    return ModelRunner(decoder, work).forward(rows, **kwargs)


def outputs(decoder: Any, rows: Any, work: Path) -> "list[torch.Tensor]":
    """Run the blocks that have not run; return the hidden states after the last one."""
    from wanda_dvc.engine.forward import ModelRunner

    run = ModelRunner(decoder, work)
    for step in run.forward(rows):
        step.run()
    return list(run.map_outputs(lambda _, __, hidden, ___: iter(hidden), lambda shard: 0))


def read_preset(name: str) -> dict[str, Any]:
    """A preset's value of every setting but `runtime`, by dotted name."""
    from wanda_dvc.study.scaffold import PARAMS, preset_changes, updated

    content = updated(YAML(typ="safe", pure=True).load(PARAMS.read_text(encoding="utf-8")), preset_changes(name))
    return dict(flatten(check_params(content).model_dump(mode="json", exclude={"runtime"})))
