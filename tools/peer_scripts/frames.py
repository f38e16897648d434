"""The recorded calibration frames, in the forms that tools read them: a folder with one .npz a frame.

Each file holds every input of the network by name: the frame, and the states as the float network had them then.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

Inputs = dict[str, Any]


def load(folder: Path, most: int | None = None) -> Iterator[Inputs]:
    """The inputs of frame after frame, as arrays by name; of at most so many frames, spread evenly over all."""
    paths = sorted(folder.glob("*.npz"))
    for path in paths[::-(-len(paths) // most) if most else 1]:
        with np.load(path) as file:
            yield {name: file[name] for name in file.files}


class Reader:
    """A calibration data reader as ONNX Runtime's quantizer and those made after it take it.

    Each frame is read when it is asked for.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rewind()

    def __len__(self) -> int:
        return len(list(self.folder.glob("*.npz")))

    def __iter__(self) -> Iterator[Inputs]:
        return load(self.folder)

    def get_next(self) -> Inputs | None:
        return next(self._rest, None)

    def rewind(self) -> None:
        self._rest = load(self.folder)
