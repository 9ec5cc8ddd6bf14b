"""GPUs that exist in name only: tensors with real numbers in host memory under the label `gpu:0`, `gpu:1`.

As on real GPUs, an operation on tensors of two devices is an error, and so is one with host memory (except
indices of the host, which torch allows). So a forward that runs here hands tensors over where it must.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

aten = torch.ops.aten
NAME = "gpu"
P = ParamSpec("P")
T = TypeVar("T")
_MAY_MIX = {aten._to_copy.default, aten.copy_.default, aten.index.Tensor, aten.index_put_.default,
            aten._index_put_impl_.default}  # fmt: skip
_registered: list[bool] = []


class OnGpu(torch.Tensor):
    """A tensor that says it lies on a GPU; `held` are its numbers."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor, device: torch.device) -> OnGpu:
        with torch.inference_mode(False):  # torch will not take views of tensors from inside and outside
            made: OnGpu = torch.Tensor._make_wrapper_subclass(
                cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(),
                dtype=held.dtype, device=device,
            )  # fmt: skip
        made.held = held
        return made

    def data_ptr(self) -> int:
        """Where its numbers lie: kernels in Triton's interpreter read them there."""
        return self.held.data_ptr()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnGpu({self.held!r}, device={self.device})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if func.overloadpacket is aten.to:  # in inference mode it arrives whole
        return _to(args, kwargs)
    tensors = list(_tensors((*args, *kwargs.values())))
    devices = {t.device for t in tensors if isinstance(t, OnGpu)}
    hosts = [t for t in tensors if not isinstance(t, OnGpu) and t.dim() > 0]
    if len(devices) > 1 and func not in (aten._to_copy.default, aten.copy_.default):
        raise RuntimeError(f"{func}: tensors on {sorted(map(str, devices))}")
    if devices and hosts and func not in _MAY_MIX:
        raise RuntimeError(f"{func}: tensors on {devices} and in host memory")
    target = kwargs.get("device")
    target = torch.device(target) if target is not None else None
    if target is None and tensors and isinstance(tensors[0], OnGpu):
        target = tensors[0].device
    elif target is None and devices and func is not aten.copy_.default:  # that brings numbers back
        raise RuntimeError(f"{func}: a tensor in host memory with others on {devices}")
    if target is not None and target.type == NAME:
        kwargs = {**kwargs, **({"device": torch.device("cpu")} if "device" in kwargs else {})}
        kwargs.pop("pin_memory", None)
    inner_args, inner_kwargs = _held(args), {name: _held(value) for name, value in kwargs.items()}
    out = func(*inner_args, **inner_kwargs)
    if func is aten._to_copy.default and out is inner_args[0]:
        out = out.clone()
    if args and isinstance(args[0], OnGpu) and out is args[0].held:
        return args[0]  # in place
    if target is None or target.type != NAME:
        return out
    return _labelled(out, target)


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Those among arguments, and in lists of them."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _held(value: Any) -> Any:
    """An argument with the numbers of its tensors."""
    if isinstance(value, OnGpu):
        return value.held
    return type(value)(map(_held, value)) if isinstance(value, list | tuple) else value


def _labelled(value: Any, device: torch.device) -> Any:
    """A result whose tensors say where they lie."""
    if isinstance(value, torch.Tensor):
        return OnGpu(value, device)
    return [_labelled(each, device) for each in value] if isinstance(value, list | tuple) else value


def _to(args: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    """`tensor.to(device, dtype)` in all its forms."""
    tensor, *rest = args
    asked = [*rest, *kwargs.values()]
    device = next((a for a in asked if isinstance(a, torch.device)), tensor.device)
    dtype = next((a for a in asked if isinstance(a, torch.dtype)), tensor.dtype)
    if (device, dtype) == (tensor.device, tensor.dtype):
        return tensor  # type: ignore[no-any-return]
    held = tensor.held if isinstance(tensor, OnGpu) else tensor
    held = held.to(dtype, copy=True)
    return OnGpu(held, device) if device.type == NAME else held


class _Factories(TorchDispatchMode):
    """Lets `torch.arange(..., device="gpu:0")` make tensors there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        devices = [torch.device(kwargs["device"])] if kwargs.get("device") is not None else []
        devices += [a for a in args if isinstance(a, torch.device)]
        if any(device.type == NAME for device in devices):
            return _run(func, args, kwargs)
        return func(*args, **kwargs)


def on_any_thread(work: Callable[P, T]) -> Callable[P, T]:
    """`work`, which may make tensors on these GPUs on threads other than the block's."""

    def inside(*args: P.args, **kwargs: P.kwargs) -> T:
        with _Factories():
            return work(*args, **kwargs)

    return inside


@contextmanager
def pretend_gpus() -> Iterator[tuple[torch.device, torch.device]]:
    """Two GPUs, inside the block."""
    if not _registered:
        _setup_privateuseone_for_python_backend(NAME)
        _registered.append(True)
    with _Factories():
        yield torch.device(NAME, 0), torch.device(NAME, 1)
