"""What the exporters share: trained weights come in from a file, ONNX goes out to one, errors are one line."""

from __future__ import annotations

import argparse
import os
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn


class WeightsError(ValueError):
    """The weights file cannot be read, or does not fit the network."""


def load_state(path: Path | str) -> dict[str, Tensor]:
    """The state dict in a .safetensors or .pth file (the latter opened without running code in it).

    Raises:
        WeightsError: unreadable, or something else than named tensors.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            state: object = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise WeightsError(f"no such weights file: {path}") from None
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror or error}") from None
    except (RuntimeError, ValueError, EOFError, SafetensorError, pickle.UnpicklingError):
        raise WeightsError(f"{path} is neither .safetensors nor a .pth with a plain state dict, or damaged") from None
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise WeightsError(f"{path} holds no state dict of named tensors; save model.state_dict() and use that")
    return dict(state)


def fit(model: nn.Module, given: Mapping[str, Tensor], label: str, hints: Mapping[str, str] | None = None) -> None:
    """Load a state dict that must fit the model in every tensor; counters of batches may be missing.

    Args:
        model: is given the weights.
        given: tensors by name.
        label: what messages call the model.
        hints: what to say beside a fault in tensors whose names all begin with a prefix.

    Raises:
        WeightsError: a tensor is missing, unexpected, of another shape, or not finite.
    """
    own = model.state_dict()
    counters = {name for name in own if name.endswith("num_batches_tracked")}
    faults = {
        "missing": [name for name in own if name not in given and name not in counters],
        "unexpected": [name for name in given if name not in own],
        "of another shape": [
            f"{name} {list(given[name].shape)} instead of {list(value.shape)}"
            for name, value in own.items() if name in given and given[name].shape != value.shape
        ],
        "not finite": [name for name, value in given.items() if not torch.isfinite(value).all()],
    }  # fmt: skip
    if any(faults.values()):
        said = "; ".join(f"{len(names)} {what}: {_abridged(names)}" for what, names in faults.items() if names)
        for prefix, hint in (hints or {}).items():
            if all(name.startswith(prefix) for names in faults.values() for name in names):
                said += f"; {hint}"
        raise WeightsError(f"the weights do not fit {label}: {said}")
    model.load_state_dict(given, strict=False)


def _abridged(names: Sequence[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that replaces it when the block ends well, and goes when it does not.

    Raises:
        FileNotFoundError: there is no folder to write it in.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {path.parent} to write {path.name} in")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) of "WIDTHxHEIGHT", as argparse wants a type."""
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is no WIDTHxHEIGHT such as 512x288")
    return int(height), int(width)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, for a command that writes `--output`."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")

    def finish(self, output: Path, label: str, write: Callable[[], None]) -> int:
        """Write the output and say so, or what went wrong; returns the exit code."""
        try:
            write()
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        print(f"{output}: {label}, {output.stat().st_size:,} bytes")
        return 0
