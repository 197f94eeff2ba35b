"""A GPU that exists only in Python: tensors of the host that say that they are on `cuda`.

An operation runs on the host's tensors; where it mixes tensors of the host and the device, it fails as on CUDA. Kernels
are the CPU's: their numerics, streams and memory are not simulated.
"""

# Torch's own types are narrower than what a subclass may do.
# mypy: disable-error-code="assignment,misc,override"

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch import __future__ as future
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)
# What starts no kernel: views, and memory without content.
VIEWS = {
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "chunk", "detach", "diagonal", "empty", "empty_like",
    "empty_strided", "expand", "narrow", "new_empty", "permute", "reshape", "select", "slice", "split",
    "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unfold", "unsqueeze", "view",
}  # fmt: skip
kernels = Counter[str]()  # that operations on the device would have started, by name, since the program's start


class OnDevice(Tensor):
    """A tensor of the device. Every operation runs on `host`."""

    host: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda _: CUDA)
    is_cuda = property(lambda _: True)
    is_cpu = property(lambda _: False)
    data = property(lambda self: self.detach())

    @staticmethod
    def __new__(cls, host: Tensor) -> "OnDevice":
        tensor: OnDevice = Tensor._make_wrapper_subclass(
            cls, host.shape, strides=host.stride(), storage_offset=host.storage_offset(), dtype=host.dtype
        )
        tensor.host = host
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = function.overloadpacket.__name__, kwargs or {}
        if name not in VIEWS:
            kernels[name] += 1
        if name == "copy_":
            _host(args[0]).copy_(_host(args[1]))
            return args[0]
        checked = (args[0], *args[2:]) if name.lstrip("_").startswith("index") else args  # indices may be the host's
        if any(isinstance(x, Tensor) and not isinstance(x, cls) and x.dim() for x in tree_leaves((checked, kwargs))):
            raise RuntimeError(f"{name}: expected all tensors on the same device, found {CUDA} and cpu")
        known = {id(x.host): x for x in tree_leaves((args, kwargs)) if isinstance(x, cls)}  # changed in place
        kernel = {"histc": _histogram, "mm": _product}.get(name, function)
        results = kernel(*tree_map(_host, args), **tree_map(_host, kwargs))
        return tree_map(lambda x: known.get(id(x)) if id(x) in known else _on_device(x), results)

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        return _to(self, *args, **kwargs)

    def cpu(self) -> Tensor:
        return self.host.clone()

    def tolist(self) -> Any:
        return self.host.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert {CUDA} device type tensor to numpy. Use Tensor.cpu() first.")

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def untyped_storage(self) -> Any:
        return self.host.untyped_storage()

    def record_stream(self, _: Any) -> None: ...

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.host.__reduce_ex__(protocol)


def _host(x: Any) -> Any:
    return x.host if isinstance(x, OnDevice) else x


def _on_device(x: Any) -> Any:
    return OnDevice(x) if isinstance(x, Tensor) and not isinstance(x, OnDevice) else x


def _histogram(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`histc` of whole numbers, as CUDA has it; the CPU has none."""
    return torch.histc(tensor.float(), *args, **kwargs).to(tensor.dtype)


def _product(a: Tensor, b: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """`mm` with its result in another dtype, as CUDA alone has it: products of 16-bit numbers are exact in float32."""
    return torch.mm(a, b) if out_dtype is None else torch.mm(a.to(out_dtype), b.to(out_dtype))


def _to(tensor: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
    """`Tensor.to`, between the host and the device too."""
    if args and isinstance(args[0], Tensor):
        args = (args[0].device, args[0].dtype)
    with torch._C.DisableTorchFunction():
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and device.type not in ("cpu", "cuda"):
            return Tensor.to(tensor, *args, **kwargs)
        here = isinstance(tensor, OnDevice)
        if device is None or here == (device.type == "cuda"):
            return Tensor.to(tensor, dtype=dtype or tensor.dtype, copy=copy)
        kernels["copy between devices"] += 1
        moved = Tensor.to(_host(tensor), dtype=dtype or tensor.dtype, copy=True)
        return moved if here else OnDevice(moved)


class _Modes(TorchFunctionMode):
    """Makes tensors of the device wherever a call names it."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is Tensor.to:
            return _to(*args, **kwargs)
        if function is Tensor.pin_memory:
            return args[0].clone()
        if str(kwargs.get("device")).startswith("cuda"):
            return _on_device(function(*args, **kwargs | {"device": "cpu"}))
        return function(*args, **kwargs)


def _inside(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _Modes():
            return function(*args, **kwargs)

    return call


@contextlib.contextmanager
def simulated_gpu() -> Iterator[None]:
    """Inside, this process and the threads that it starts have the device."""
    no, memory = mock.MagicMock(return_value=0), mock.MagicMock(return_value=(2**30, 2**30))
    stand_ins: dict[str, Any] = {
        "is_available": lambda: True, "device_count": lambda: 1, "get_device_name": lambda *_: "a simulated GPU",
        "mem_get_info": memory, "max_memory_allocated": no, "memory_reserved": no, "memory_allocated": no,
        "synchronize": no, "Stream": mock.MagicMock(), "stream": lambda _: contextlib.nullcontext(),
        "current_stream": mock.MagicMock(), "get_device_capability": lambda *_: (8, 0), "reset_peak_memory_stats": no,
        "is_bf16_supported": lambda **_: True, "set_device": no, "current_device": no,
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.multiple("torch.cuda", **stand_ins))
        stack.enter_context(mock.patch("torch.cuda.random.get_rng_state", torch.get_rng_state))  # of checkpoints
        stack.enter_context(mock.patch.object(threading.Thread, "run", _inside(threading.Thread.run)))
        # `Module.to` then makes new parameters: a tensor of the host cannot become one of the device.
        stack.callback(future.set_overwrite_module_params_on_conversion, False)
        future.set_overwrite_module_params_on_conversion(True)
        # Torch leaves the modes while it computes gradients; hooks, which are ours, run inside.
        backward = _inside(torch.autograd._engine_run_backward)  # type: ignore[attr-defined]
        stack.enter_context(mock.patch("torch.autograd._engine_run_backward", backward))
        stack.enter_context(_Modes())
        yield
