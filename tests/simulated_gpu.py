"""A GPU that exists only in Python: its tensors are on the host, and behave as if they were on a device of their own.

`OnDevice` is a tensor subclass that holds a tensor of the host and reports the device's name. Operations that mix it
with tensors of the host fail, as on CUDA. `SimulatedDevice` makes such tensors wherever a device is named, and stands
in for `torch.cuda`.

Torch's own C++ code takes the tensors for tensors of the CPU, so no compiler and no CUDA build is needed. It follows
that kernels are the CPU's: their numerics, the order of streams, and memory are not simulated.
"""

# Torch's own types are narrower than what a subclass may do.
# mypy: disable-error-code="assignment,attr-defined,misc,override"

import contextlib
import threading
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch import __future__ as future
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

GIGABYTE = 2**30
MIXED = "Expected all tensors to be on the same device, but found at least two devices, {} and cpu!"


class OnDevice(Tensor):
    """A tensor of the simulated device. Every operation runs on `host`."""

    host: Tensor
    owner: "SimulatedDevice"
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host: Tensor, owner: "SimulatedDevice") -> "OnDevice":
        if host.dtype is torch.float64 and not owner.knows_float64:
            raise TypeError(f"Cannot convert a tensor to float64: {owner.device} does not support float64")
        made: OnDevice = Tensor._make_wrapper_subclass(
            cls, host.shape, strides=host.stride(), storage_offset=host.storage_offset(), dtype=host.dtype
        )
        made.host, made.owner = host, owner
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        owner = next(x.owner for x in _flat((*args, *(kwargs or {}).values())) if isinstance(x, OnDevice))
        return owner.run(function, args, kwargs or {})

    @property
    def device(self) -> torch.device:
        return self.owner.device

    @property
    def is_cuda(self) -> bool:
        return self.owner.device.type == "cuda"

    @property
    def is_cpu(self) -> bool:
        return False

    @property
    def data(self) -> Tensor:
        return self.detach()

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.owner.to(self, *args, **kwargs)

    def cpu(self, **_: Any) -> Tensor:
        return self.owner.to(self, "cpu")

    def cuda(self, *_: Any, **__: Any) -> Tensor:
        return self.owner.to(self, "cuda")

    def tolist(self) -> Any:
        return self.owner.to(self, "cpu").tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first.")

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def untyped_storage(self) -> Any:
        return self.host.untyped_storage()

    def record_stream(self, stream: Any) -> None:
        assert isinstance(stream, Stream)

    def pin_memory(self, *_: Any) -> Tensor:
        raise RuntimeError("cannot pin a tensor of a device, only dense CPU tensors can be pinned")

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.clone()

    def __reduce_ex__(self, _: Any) -> Any:
        raise TypeError("a tensor of the simulated device is not pickled: copy it to the host first")

    def __repr__(self, **_: Any) -> str:
        return f"{self.host!r} on {self.device}"


class Stream:
    """Stands in for `torch.cuda.Stream`; all that is asked of one is done already."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, other: "Stream") -> None:
        assert isinstance(other, Stream)

    def synchronize(self) -> None: ...


class _Modes(TorchFunctionMode):
    """Makes tensors of the device wherever a call names it."""

    def __init__(self, owner: "SimulatedDevice") -> None:
        super().__init__()
        self.owner = owner

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is Tensor.to:
            return self.owner.to(args[0], *args[1:], **kwargs)
        if function is Tensor.pin_memory:
            return self.owner.pinned(args[0])
        if function == Tensor.data.__set__ and isinstance(args[1], OnDevice):
            raise NotImplementedError("a tensor whose data become another's is not simulated")
        if function is scaled_dot_product_attention and kwargs.get("is_causal") and isinstance(args[0], OnDevice):
            query, key, value = args[:3]
            if query.shape[-1] != value.shape[-1]:  # torch's own path for these makes its mask in C++, on the host
                mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril()
                kwargs |= {"is_causal": False, "attn_mask": OnDevice(mask, self.owner)}
        if self.owner.is_named(kwargs.get("device")):
            kwargs["device"] = "cpu"
            made = function(*args, **kwargs)
            if isinstance(made, OnDevice):  # as ones_like of one
                return made
            return OnDevice(made, self.owner)
        return function(*args, **kwargs)


class SimulatedDevice:
    """One device by name, `cuda` or `mps`. `free` is the memory that `mem_get_info` reports."""

    def __init__(self, kind: str = "cuda", *, free: int = GIGABYTE) -> None:
        self.device, self.free, self.knows_float64 = torch.device(kind, 0), free, kind == "cuda"

    # --- what operations do ---

    def run(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Run one operation on the host's tensors. RuntimeError where it mixes both."""
        name = function.overloadpacket.__name__
        if name == "copy_":
            return self._copy(*args, **kwargs)
        indexed = name in ("index", "index_put", "index_put_", "_index_put_impl_")
        if indexed:
            self._take_indices(args[0], args[1])
        self._refuse_mixed((args[0], *args[2:]) if indexed else args, kwargs)
        held: dict[int, OnDevice] = {}

        def host(x: Any) -> Any:
            if isinstance(x, OnDevice):
                held[id(x.host)] = x
                return x.host
            return [host(one) for one in x] if isinstance(x, (list, tuple)) else x

        def on_device(x: Any) -> Any:
            if isinstance(x, Tensor):
                return held[id(x)] if id(x) in held else OnDevice(x, self)
            return type(x)(map(on_device, x)) if isinstance(x, (list, tuple)) else x

        kernel = _histogram if name == "histc" else function
        made = kernel(*map(host, args), **{key: host(x) for key, x in kwargs.items()})
        if any(one.shape != one.host.shape for one in held.values()):
            raise NotImplementedError(f"{function} changes a tensor's shape in place, which is not simulated")
        return on_device(made)

    def _take_indices(self, tensor: Tensor, indices: Any) -> None:
        """Raise RuntimeError for indices on the device of a tensor of the host."""
        for index in indices:
            if isinstance(index, OnDevice) and not isinstance(tensor, OnDevice):
                raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor")

    def _refuse_mixed(self, args: Any, kwargs: Any) -> None:
        """Raise RuntimeError for a tensor of the host, unless it is one number that is no part of a list."""
        for value in (*args, *kwargs.values()):
            several = isinstance(value, (list, tuple))
            for x in value if several else (value,):
                if isinstance(x, Tensor) and not isinstance(x, OnDevice) and (x.dim() or several):
                    raise RuntimeError(MIXED.format(self.device))

    def _copy(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        if isinstance(target, OnDevice) and not isinstance(source, OnDevice):
            self.crossed("to_device", blocks=not non_blocking, source=source)
        elif isinstance(source, OnDevice) and not isinstance(target, OnDevice):
            self.crossed("to_host", blocks=not non_blocking)
        (target.host if isinstance(target, OnDevice) else target).copy_(
            source.host if isinstance(source, OnDevice) else source
        )
        return target

    # --- between host and device ---

    def is_named(self, device: Any) -> bool:
        """Whether this is the device."""
        return isinstance(device, (str, torch.device)) and torch.device(device).type == self.device.type

    def to(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`Tensor.to`, between the host and this device too."""
        words = _words(args, kwargs)
        device = words.pop("device", None)
        here = isinstance(tensor, OnDevice)
        there = here if device is None else self.is_named(device)
        if device is not None and not there and torch.device(device).type not in ("cpu", "meta"):
            return Tensor.to(tensor, device, **words)
        if here == there:
            with torch._C.DisableTorchFunction():
                return Tensor.to(tensor, **words)
        if tensor.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError("gradients across the link are not simulated")
        if words.get("dtype") is torch.float64 and not self.knows_float64:  # the device converts before it copies
            raise TypeError(f"Cannot convert a tensor to float64: {self.device} does not support float64")
        blocks = not words.pop("non_blocking", False)
        with torch._C.DisableTorchFunction():
            made = Tensor.to(tensor.host if isinstance(tensor, OnDevice) else tensor, **words | {"copy": True})
        self.crossed("to_device" if there else "to_host", blocks=blocks, source=tensor)
        return OnDevice(made, self) if there else made

    def pinned(self, tensor: Tensor) -> Tensor:
        """`Tensor.pin_memory`: a copy on the host."""
        if self.device.type != "cuda":
            raise RuntimeError(f"{self.device} has no pinned memory")
        made = tensor.clone()
        made.is_pinned_by_simulation = True
        return made

    def crossed(self, direction: str, *, blocks: bool, source: Tensor | None = None) -> None:
        """Check a copy that does not block."""
        if not blocks and direction == "to_host":
            raise AssertionError("a copy to the host that does not block: nothing waits for it before it is read")
        if not blocks and not getattr(source, "is_pinned_by_simulation", False):
            raise AssertionError("a copy to the device that does not block, from memory that is not pinned: it blocks")

    # --- the process ---

    @contextlib.contextmanager
    def present(self) -> Iterator["SimulatedDevice"]:
        """Inside, this process and the threads that it starts have the device."""
        run, backward = threading.Thread.run, torch.autograd._engine_run_backward
        cuda = self.device.type == "cuda"

        def in_thread(thread: threading.Thread) -> None:
            with _Modes(self):
                run(thread)

        stand_ins: dict[str, Any] = {
            "torch.cuda.is_available": lambda: cuda,
            "torch.cuda.device_count": lambda: int(cuda),
            "torch.backends.mps.is_available": lambda: not cuda,
        }
        if cuda:
            stand_ins |= {
                "torch.cuda.get_device_name": lambda *_: "a simulated GPU",
                "torch.cuda.get_device_capability": lambda *_: (8, 0),
                "torch.cuda.mem_get_info": lambda *_: (self.free, self.free),
                "torch.cuda.max_memory_allocated": lambda *_: 0,
                "torch.cuda.memory_reserved": lambda *_: 0,
                "torch.cuda.memory_allocated": lambda *_: 0,
                "torch.cuda.synchronize": lambda *_: None,
                "torch.cuda.Stream": Stream,
                "torch.cuda.stream": lambda _: contextlib.nullcontext(),
                "torch.cuda.current_stream": Stream,
            }
        with contextlib.ExitStack() as stack:
            for name, stand_in in stand_ins.items():
                stack.enter_context(mock.patch(name, stand_in))
            stack.enter_context(mock.patch.object(threading.Thread, "run", in_thread))
            # `Module.to` then makes new parameters: a tensor of the host cannot become one of the device.
            stack.callback(future.set_overwrite_module_params_on_conversion, False)
            future.set_overwrite_module_params_on_conversion(True)
            # Torch leaves the modes while it computes gradients; hooks, which are ours, run inside.
            stack.enter_context(mock.patch("torch.autograd._engine_run_backward", self._inside(backward)))
            stack.enter_context(_Modes(self))
            yield self

    def _inside(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with _Modes(self):
                return function(*args, **kwargs)

        return call


def _histogram(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`histc` of whole numbers, as CUDA has it; the CPU has none."""
    return torch.histc(tensor.float(), *args, **kwargs).to(tensor.dtype)


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        else:
            yield value


def _words(args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of `Tensor.to` by name."""
    words = dict(kwargs)
    if isinstance(other := words.pop("other", None), Tensor):
        args = (other, *args)
    flags = iter(("non_blocking", "copy"))
    for value in args:
        if isinstance(value, Tensor):
            words |= {"device": value.device, "dtype": value.dtype}
        elif isinstance(value, torch.dtype):
            words["dtype"] = value
        elif isinstance(value, bool):
            words[next(flags)] = value
        elif value is not None:
            words["device"] = value
    return {name: value for name, value in words.items() if value is not None}
