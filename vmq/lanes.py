"""Lanes: gradients of several items at once, one thread each, added up in a fixed order.

Networks of this size leave a second thread idle inside an operator (two threads were no faster than one), but not
beside it. The number of lanes is fixed and every lane computes on one thread, so that the result does not depend on
the number of processors. Where several processes share the work (vmq/processes.py), each computes its share of the
items in lanes of its own; sums are then added up over processes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from vmq import processes
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
        gpu = torch.cuda.current_device() if self.device == "cuda" else None

        def settle() -> None:
            torch.set_num_threads(1)
            if gpu is not None:             # every thread begins on GPU 0
                torch.cuda.set_device(gpu)

        self._pool = ThreadPoolExecutor(LANES, "lane", initializer=settle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None,
                 ) -> None:
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._threads)

    def map(self, function: Callable[[Any], T], items: Sequence[Any]) -> list[T]:
        """`function` of each item, in order, without gradients."""
        own = self._pool.map(torch.no_grad()(function), processes.mine(items))
        return processes.together(list(own), self.device)

    def gradients(self, loss: Callable[[Any], Tensor], items: Sequence[Any], parameters: Sequence[nn.Parameter],
                  seed: int, owners: Sequence[int] | None = None) -> float:
        """Leave the mean gradient of `loss` over items in `.grad` of the parameters; returns the mean loss.

        `seed` and an item's place decide the random numbers that `generator()` gives while it is computed. Its place,
        or its entry in `owners`, modulo their number, is the process that computes it.
        """
        def one(job: tuple[int, Any]) -> tuple[float, tuple[Tensor | None, ...]]:
            place, item = job
            _own.generator = torch.Generator(self.device).manual_seed(seed * 1009 + place)
            value = loss(item)
            if not value.requires_grad:
                return float(value), (None,) * len(parameters)
            return float(value.detach()), torch.autograd.grad(value, parameters, allow_unused=True)

        results = list(self._pool.map(one, [
            (place, item) for place, item in enumerate(items)
            if (owners[place] if owners else place) % processes.count() == processes.rank()]))
        value = sum(value for value, _ in results)
        for index, parameter in enumerate(parameters):
            total: Tensor | None = None
            for _, gradients in results:
                part = gradients[index]
                if part is not None:
                    total = part if total is None else total + part
            parameter.grad = total
        if processes.count() > 1:
            value = self._add_up(parameters, value)
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.div_(len(items))
        return value / len(items)

    def _add_up(self, parameters: Sequence[nn.Parameter], value: float) -> float:
        """Add the gradients up over processes, all in one go, and a number with them; returns its sum."""
        present = [float(p.grad is not None) for p in parameters]
        flat = torch.cat([*((torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in parameters),
                          torch.tensor([*present, value], device=self.device)])
        processes.add_up(flat)
        *sums, rest = torch.split(flat, [*(p.numel() for p in parameters), len(present) + 1])
        *present, value = rest.tolist()
        for parameter, gradient, somewhere in zip(parameters, sums, present, strict=True):
            parameter.grad = gradient.view_as(parameter) if somewhere else None
        return value
