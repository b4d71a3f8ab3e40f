"""A CUDA device without a GPU: operations on it run on fake tensors, which have a shape, a type and a device only.

A tensor of the CPU that meets one of the device raises an error, as on a GPU. Tensors on the CPU keep their values.
"""

import ctypes
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import vgen

aten = torch.ops.aten
PACKAGE = Path(vgen.__file__).parent


class FakeCuda(FakeTensorMode):
    """A mode in which `cuda:0` exists. It counts by place what makes the host wait for the device.

    These are reads of values (`item`, `bool`), copies to the host, and blocking copies to the device. Values that are
    read are 0, or true. Operations whose output shape depends on values, such as `nonzero`, raise an error.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.syncs: Counter[str] = Counter()
        """Number of host synchronizations by module and function of the package."""
        self._nested = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._nested:  # a decomposition of the operation that is running
            return super().__torch_dispatch__(func, types, args, kwargs)
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_device = [isinstance(x, FakeTensor) for x in inputs]
        target = torch.device(kwargs.get("device") or "cpu")
        if not any(on_device) and target.type == "cpu":
            return func(*args, **kwargs)
        if self._waits(func, on_device, kwargs):
            self.syncs[_place()] += 1
        if func is aten._local_scalar_dense.default:
            return inputs[0].dtype == torch.bool or torch.zeros((), dtype=inputs[0].dtype).item()
        if func is aten.copy_.default and not on_device[0]:
            return args[0]
        self._nested = True
        try:
            if not all(on_device):
                args, kwargs = tree_map_only(Tensor, self._fake, (args, kwargs))
            out = super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self._nested = False
        return _on_host(out) if isinstance(out, FakeTensor) else tree_map_only(FakeTensor, _on_host, out)

    def _waits(self, func: Any, on_device: list[bool], kwargs: dict[str, Any]) -> bool:
        if func is aten._to_copy.default:
            to_device = "device" not in kwargs or kwargs["device"].type == "cuda"
            return to_device != on_device[0] and not (to_device and kwargs.get("non_blocking"))
        if func is aten.copy_.default:
            return on_device == [False, True] or on_device == [True, False] and not kwargs.get("non_blocking")
        if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            return not all(on_device)  # indices on the host are copied
        return func is aten._local_scalar_dense.default

    def _fake(self, x: Tensor) -> FakeTensor:
        return x if isinstance(x, FakeTensor) else self.from_tensor(x.clone())


class LiveMemory(TorchDispatchMode):
    """The peak of the memory of all tensors that are created in it, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                if storage._cdata not in self._live:
                    self._live[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self._live.pop, storage._cdata)
        self.peak = max(self.peak, sum(self._live.values()))
        return out


def _on_host(x: FakeTensor) -> Tensor:
    """A fake tensor, or zeros if it is on the CPU."""
    return torch.zeros(x.shape, dtype=x.dtype) if x.device.type == "cpu" else x


def _place() -> str:
    """The innermost running function of the package."""
    frame = sys._getframe()
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE) and not frame.f_code.co_name.startswith("<"):
            return f"{path.stem}.{frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


@contextmanager
def cuda_device_guard() -> Iterator[None]:
    """Gives a build of PyTorch without CUDA a device guard for CUDA, without which C++ code refuses the device.

    PyTorch has one that does nothing. It uses it in place of a guard that finds 0 devices, so one is registered here:
    a C++ object whose virtual functions all return 0.
    """
    if torch.backends.cuda.is_built():
        yield
        return
    zero = ctypes.CFUNCTYPE(ctypes.c_size_t, ctypes.c_void_p)(lambda _: 0)
    address = ctypes.cast(zero, ctypes.c_void_p).value
    functions = (ctypes.c_void_p * 64)(*[address] * 64)
    guard = ctypes.c_void_p(ctypes.addressof(functions))
    (library,) = (Path(torch.__file__).parent / "lib").glob("*c10.*")
    cuda = int(torch._C._autograd.DeviceType.CUDA)
    guards = (ctypes.c_void_p * (cuda + 1)).in_dll(
        ctypes.CDLL(str(library)), "_ZN3c104impl26device_guard_impl_registryE"
    )
    guards[cuda] = ctypes.addressof(guard)
    torch._C._ensureCUDADeviceGuardSet()
    assert guards[cuda] != ctypes.addressof(guard)
    try:
        yield
    finally:
        guards[cuda] = None
