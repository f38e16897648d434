"""A device that computes on the host but keeps its tensors apart, as a GPU does: what mixes the two is an error.

It registers itself with torch as "gpu", for the rest of the process: import it in a process of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("gpu")

ACROSS = {"_to_copy", "copy_", "_copy_from"}
"""What may have tensors of both."""


class There(Tensor):
    """A tensor of the device: a shell around one of the host."""

    @staticmethod
    def __new__(cls, held: Tensor) -> There:
        return Tensor._make_wrapper_subclass(cls, held.size(), strides=held.stride(), dtype=held.dtype,
                                             storage_offset=held.storage_offset(), device="gpu:0")

    def __init__(self, held: Tensor) -> None:
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(function, args, kwargs or {})


def compute(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operator on what the shells hold; results are on the device if an operand or the call says so."""
    name = function.__name__.partition(".")[0]
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    here = [x for x in tensors if not isinstance(x, There) and x.ndim]
    if here and len(here) < len(tensors) and name not in ACROSS:
        raise RuntimeError(f"{name} of tensors on two devices")
    device = kwargs.get("device")
    there = len(here) < len(tensors) if device is None else torch.device(device).type == "gpu"
    bare = tree_map(lambda x: x.held if isinstance(x, There) else x, (args, kwargs))
    results = function(*bare[0], **bare[1] | ({} if device is None else {"device": "cpu"}))
    if name.endswith("_") and not name.startswith("_"):
        return args[0]
    return tree_map(lambda x: There(x) if there and isinstance(x, Tensor) else x, results)


_library = torch.library.Library("aten", "IMPL")
for _name, _operator in (("empty.memory_format", torch.ops.aten.empty.memory_format),
                         ("empty_strided", torch.ops.aten.empty_strided.default)):
    _library.impl(_name, lambda *args, _operator=_operator, **kwargs: compute(_operator, args, kwargs), "PrivateUse1")


class _Generator(torch.Generator):
    """Random numbers of the device are those of the host."""

    def __new__(cls, *_: Any) -> _Generator:
        return super().__new__(cls, "cpu")

    def __init__(self, *_: Any) -> None:
        pass


def _made_here(function: Any) -> Any:
    """A function that makes tensors: made on the host, then taken to the device."""
    return lambda *args, device=None, **kwargs: function(*args, **kwargs).to(device or "cpu")


torch.Generator = _Generator  # type: ignore[misc]
torch.tensor = _made_here(torch.tensor)
torch.arange = _made_here(torch.arange)
