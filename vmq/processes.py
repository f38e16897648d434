"""Several processes that do one piece of work: `torchrun --nproc-per-node N -m vmq compile ...`.

All of them run the same program with the same arguments, so each holds the same graph at any time. Of a list of
items, process r of N computes those at r, r + N, r + 2N, ...; then all of them get all results, in the order of the
items. Process 0 alone writes files and speaks. An error in one process ends all of them.

Without torchrun there is one process: it has all items, and torch.distributed is not touched.
"""

from __future__ import annotations

import contextlib
import io
import os
import pathlib
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from vmq.errors import OptionError, ProcessError

TIMEOUT = timedelta(minutes=30)
"""A process that the others wait for so long is taken for lost."""
COURTESY = 2.0
"""Seconds for which process 0 goes first in saying what went wrong: most errors are met by all."""

T = TypeVar("T")


@dataclass
class _Group:
    rank: int
    count: int
    store: Any
    alone: bool = False


_group: _Group | None = None


def launched() -> bool:
    """Whether torchrun started this process as one of several."""
    names = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    return names <= os.environ.keys() and os.environ["WORLD_SIZE"] != "1"


def rank() -> int:
    """Number of this process, from 0."""
    return _group.rank if _group else 0


def count() -> int:
    """Number of processes that share the work."""
    return _group.count if _group else 1


def threads() -> int:
    """This process's share of the machine's cores; 0 where all are its own."""
    if _group is None or _group.alone:
        return 0
    return max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def gpu() -> int:
    """Number of the GPU that this process computes on, if it does."""
    return int(os.environ.get("LOCAL_RANK", "0")) if _group else 0


@contextlib.contextmanager
def joined(device: str = "cpu") -> Iterator[None]:
    """Work together with the other processes that torchrun started, if it did; all must enter and leave.

    Args:
        device: where gradients are added up: cpu (gloo) or cuda (nccl; process r of a machine takes its GPU number r).

    Raises:
        OptionError: there are fewer GPUs than processes.
        ProcessError: the others cannot be reached.
    """
    global _group
    if not launched():
        yield
        return
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")       # when another process ends, we say so ourselves
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    with _answers():
        store, number, size = next(rendezvous("env://", timeout=TIMEOUT))
        _group = _Group(number, size, store)
        if device == "cuda" and torch.cuda.is_available():
            if gpu() >= torch.cuda.device_count():
                raise OptionError(f"--device cuda: there are {torch.cuda.device_count()} GPUs for "
                                  f"{os.environ.get('LOCAL_WORLD_SIZE')} processes; give torchrun a smaller "
                                  "--nproc-per-node")
            torch.cuda.set_device(gpu())
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" and torch.cuda.is_available() else "gloo"
        with _silent():
            dist.init_process_group(backend, store=store, rank=number, world_size=size, timeout=TIMEOUT)
    yield
    with _answers():
        together([None])
        dist.destroy_process_group()
    _group = None


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Nothing goes to standard output: gloo counts its peers there in torch 2.9, between the lines of a table."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with pathlib.Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def mine(items: Sequence[T]) -> list[T]:
    """The items that this process computes."""
    return list(items[rank()::count()])


def together(results: list[T], device: str = "cpu") -> list[T]:
    """Everybody's results, in the order of the items, from each process's results of its own.

    Args:
        results: anything that can be pickled.
        device: where tensors among the results are to be.
    """
    if _group is None:
        return results
    import torch
    import torch.distributed as dist

    buffer = io.BytesIO()
    torch.save(results, buffer)
    with _answers():
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(count())]
        dist.all_gather(lengths, torch.tensor([buffer.tell()]))
        everybody = []
        for sender, length in enumerate(lengths):
            sent = torch.empty(int(length), dtype=torch.uint8)
            if sender == rank():
                sent = torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)
            dist.broadcast(sent, sender)
            everybody.append(results if sender == rank() else torch.load(
                io.BytesIO(sent.numpy().tobytes()), map_location=device, weights_only=False))  # from ourselves
    return [everybody[k % count()][k // count()] for k in range(sum(map(len, everybody)))]


def first(make: Callable[[], T]) -> T:
    """What `make` returns in process 0, with all cores for itself; the others wait for it."""
    if _group is None:
        return make()
    _group.alone = True
    try:
        made: list[Any] = [make() if rank() == 0 else None]
    finally:
        _group.alone = False
    chosen: T = together(made)[0]
    return chosen


def spread(tensor: Any, place: int) -> None:
    """Give everybody's tensor the values that it has where item number `place` was computed."""
    if _group is not None:
        import torch
        import torch.distributed as dist

        with _answers():
            dist.broadcast(tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor, place % count())


def add_up(tensor: Any) -> None:
    """Give everybody's tensor the sum over all processes."""
    if _group is not None:
        import torch.distributed as dist

        with _answers():
            dist.all_reduce(tensor)


def agree(what: str, value: str) -> None:
    """Make sure that all processes hold the same; ProcessError, naming it, if they do not."""
    if _group is not None and len(set(together([value]))) > 1:
        raise ProcessError(f"the processes do not have the same {what}; they need the same command, the same versions "
                           "and the same kind of processor")


def spokesman() -> str | None:
    """For an error that ends the work: what to put before it, or None where another process has told one.

    Process 0 goes first. One that ends because another did finds that already said.
    """
    if _group is None:
        return "" if not launched() or os.environ["RANK"] == "0" else None
    if rank():
        time.sleep(COURTESY)
    try:
        chosen = _group.store.compare_set("vmq-spokesman", "", str(rank())).decode()
    except RuntimeError:            # it went with the process that kept it
        chosen = "0"
    if chosen != str(rank()):
        return None
    return f"process {rank()} on {socket.gethostname()}: " if rank() else ""


@contextlib.contextmanager
def _answers() -> Iterator[None]:
    """Turn what torch.distributed raises where another process is gone into one line."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, ProcessError):
            raise
        minutes = TIMEOUT.total_seconds() / 60
        raise ProcessError(f"another process has ended, or has not answered for {minutes:g} minutes; see what it said, "
                           "and run the same command again with --resume") from error
