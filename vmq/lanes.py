"""Lanes: gradients of several items at once, one thread each, added up in a fixed order.

Networks of this size leave a second thread idle inside an operator (two threads were no faster than one), but not
beside it. The number of lanes is fixed and every lane computes on one thread, so that the result does not depend on
the number of processors.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from vmq.errors import OptionError

LANES = 2
"""Items computed at a time."""

T = TypeVar("T")

_own = threading.local()


def generator() -> torch.Generator:
    """The random numbers of the item that this thread works on."""
    found: torch.Generator = _own.generator
    return found


def check_device(name: str) -> None:
    """Raise OptionError where torch cannot compute on the device of this name."""
    if name == "cuda" and not torch.cuda.is_available():
        raise OptionError(f"--device cuda: torch {torch.__version__} finds no CUDA device here; leave --device out, or "
                          "install a CUDA build of torch on a machine with a GPU")


class Lanes:
    """A pool of threads to learn with; use it in a `with`.

    Args:
        device: where the items are computed; random numbers are drawn there.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device

    def __enter__(self) -> Self:
        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)
        self._pool = ThreadPoolExecutor(LANES, "lane", initializer=lambda: torch.set_num_threads(1))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None,
                 ) -> None:
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._threads)

    def map(self, function: Callable[[Any], T], items: Sequence[Any]) -> list[T]:
        """`function` of each item, in order, without gradients."""
        return list(self._pool.map(torch.no_grad()(function), items))

    def gradients(self, loss: Callable[[Any], Tensor], items: Sequence[Any], parameters: Sequence[nn.Parameter],
                  seed: int) -> float:
        """Leave the mean gradient of `loss` over items in `.grad` of the parameters; returns the mean loss.

        `seed` and an item's place decide the random numbers that `generator()` gives while it is computed.
        """
        def one(job: tuple[int, Any]) -> tuple[float, tuple[Tensor | None, ...]]:
            place, item = job
            _own.generator = torch.Generator(self.device).manual_seed(seed * 1009 + place)
            value = loss(item)
            if not value.requires_grad:
                return float(value), (None,) * len(parameters)
            return float(value.detach()), torch.autograd.grad(value, parameters, allow_unused=True)

        results = list(self._pool.map(one, enumerate(items)))
        for index, parameter in enumerate(parameters):
            total: Tensor | None = None
            for _, gradients in results:
                part = gradients[index]
                if part is not None:
                    total = part if total is None else total + part
            parameter.grad = None if total is None else total.div_(len(items))
        return sum(value for value, _ in results) / len(items)
