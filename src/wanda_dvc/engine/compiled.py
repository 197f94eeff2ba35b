"""Blocks through `torch.compile`: what surrounds the matrix multiplications, in fewer passes over memory.

Blocks of one structure share one compiled function, because weights are arguments of it. Kernels are kept in the user's
cache directory for later processes.
"""

import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from wanda_dvc.engine.cache import user_cache
from wanda_dvc.engine.calls import Call
from wanda_dvc.errors import notice

# FLOPs from which `auto` compiles: minutes of work, of which a compiled block saves a tenth; compiling takes 5 to 20 s.
# On a GPU estimated.
WORTH = {"cpu": 2.5e13, "cuda": 2e16}
TOLERANCE = {torch.float32: 1e-4}  # relative, of a compiled block's first output; 5e-2 in other dtypes
CACHE = "TORCHINDUCTOR_CACHE_DIR"
BACKEND = "inductor"

_given: list[tuple[str, Tensor]] = []  # what hooked modules of the block at work were given


class CompiledBlocks:
    """Runs blocks compiled. A block that cannot be compiled ends that, with one line: all run as they are then.

    Forward pre-hooks see what they would see in a block that is not compiled, once the block has run.
    """

    def __init__(self, blocks: Sequence[nn.Module], *, dynamic: bool) -> None:
        """With `dynamic`, rows of all lengths share a function; else each length has its own, which is faster."""
        _cache_on_disk()
        self.works, self._dynamic = True, dynamic
        self._compiled = torch.compile(_through, fullgraph=True, dynamic=dynamic, backend=BACKEND)
        self._tried: set[tuple[object, ...]] = set()
        for block in blocks:
            for place, module in block.named_modules():
                module.__dict__["wanda_dvc_place"] = place

    def run(self, block: nn.Module, hidden: Tensor, call: Call) -> Any:
        """Return what a block returns."""
        if self.works and torch._C._len_torch_function_stack():
            self._give_up(block, "what some of its weights read is seen through torch's own functions")
        if not self.works or _is_watched(block):
            return block(hidden, *call.args, **call.kwargs)
        with _noting(block) as hooks:
            try:
                out = self._through(block, hidden, call, bool(hooks))
                given = list(_given)
            except Exception as error:  # dynamo, inductor and compilers raise what they like
                self._give_up(block, _reason(error))
            finally:
                _given.clear()
        if not self.works:
            return block(hidden, *call.args, **call.kwargs)
        for place, x in given:
            for hook in hooks[place]:
                hook(block.get_submodule(place), (x,))
        return out

    def _through(self, block: nn.Module, hidden: Tensor, call: Call, noted: bool) -> Any:
        """Run a block compiled. The first of its structure is compared with the block itself."""
        parameters = tuple((name, x.shape, x.stride()) for name, x in block.named_parameters())
        key = (type(block), parameters, None if self._dynamic else hidden.shape, noted)
        if key in self._tried:
            return self._compiled(block, hidden, call.args, call.kwargs, noted)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the compiler, about code of the family
            out = self._compiled(block, hidden, call.args, call.kwargs, noted)
        given = list(_given)
        expected = _through(block, hidden, call.args, call.kwargs, noted)
        if _sharing(given) != _sharing(_given):
            raise ValueError("its linears share other inputs")
        one, other = (x[0] if isinstance(x, (tuple, list)) else x for x in (out, expected))
        off = (one.float() - other.float()).norm() / other.float().norm()
        if off > TOLERANCE.get(hidden.dtype, 5e-2):  # not where it is NaN: then both overflow
            raise ValueError(f"its output differs by {off:.1e}")
        _given[:] = given
        self._tried.add(key)
        return out

    def _give_up(self, block: nn.Module, reason: str) -> None:
        self.works = False
        notice(f"runtime.compile: {type(block).__name__} runs as it is, not compiled: {reason}")


def is_worth_it(flops: float, device: torch.device) -> bool:
    """Whether a run is long enough to pay for compiling, and this machine has what that needs."""
    from torch.utils._triton import has_triton

    compiler = os.environ.get("CXX", "g++" if shutil.which("g++") else "clang++")
    there = has_triton() if device.type == "cuda" else shutil.which(compiler) is not None
    return device.type in WORTH and flops >= WORTH[device.type] and there


def _through(block: nn.Module, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], noted: bool) -> Any:
    if noted:  # compiled apart from the block without hooks: their presence is not looked at again
        _given.clear()
    return block(hidden, *args, **kwargs)


def _note(module: nn.Module, args: tuple[Any, ...]) -> None:
    _given.append((module.wanda_dvc_place, args[0]))  # type: ignore[arg-type]


@contextmanager
def _noting(block: nn.Module) -> Iterator[dict[str, list[Callable[..., Any]]]]:
    """Replaces the pre-hooks of a block's modules by one that compiles; gives the hooks, by module."""
    hooked = {place: module for place, module in block.named_modules() if module._forward_pre_hooks}
    hooks = {place: module._forward_pre_hooks for place, module in hooked.items()}
    try:
        for module in hooked.values():
            module._forward_pre_hooks = type(module._forward_pre_hooks)()
            module.register_forward_pre_hook(_note)
        yield {place: list(held.values()) for place, held in hooks.items()}
    finally:
        for place, module in hooked.items():
            module._forward_pre_hooks = hooks[place]


def _is_watched(block: nn.Module) -> bool:
    """Whether gradients, or hooks of outputs, follow what happens in the block."""
    return torch.is_grad_enabled() or any(module._forward_hooks for module in block.modules())


def _sharing(given: list[tuple[str, Tensor]]) -> list[tuple[str, str]]:
    """Return, for each module, the first that was given the same memory."""
    first: dict[tuple[Any, ...], str] = {}
    return [(place, first.setdefault((x.data_ptr(), x.shape, x.stride(), x._version), place)) for place, x in given]


def _cache_on_disk() -> None:
    """Keep kernels in the user's own cache directory, unless the environment names a place.

    They are loaded by pickle and as machine code, and torch's default is a name in /tmp that another user may take.
    They are compiled in this process: a pool of processes would outlive a killed stage.
    """
    import torch._inductor.config
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    if os.environ.get(CACHE) in (None, default_cache_dir()):  # torch writes its default there itself
        os.environ[CACHE] = str(user_cache() / "kernels")
    torch._inductor.config.compile_threads = 1


def _reason(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
