"""Checkpoints: what long work has finished, kept in a folder until the result is written.

Every entry is one .npz file that appears whole or not at all. The folder belongs to one piece of work, told by a key
made of everything that decides its result; entries of other work are never read. Of several processes that share the
work, the first keeps the folder and tells the others what is in it.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vmq import processes
from vmq.errors import OutputError
from vmq.files import write_atomic


class Checkpoint:
    """Named sets of arrays in a folder; without a folder it forgets everything.

    Args:
        folder: created with the first entry.
        key: what decides the result; entries are kept apart by it.
        resume: read what an earlier run left; otherwise that is removed.

    Raises:
        OutputError: the folder is there and is not one of these.
    """

    def __init__(self, folder: Path | None = None, key: Any = None, resume: bool = False) -> None:
        self.folder = folder = folder if processes.rank() == 0 else None
        self._key = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:16]
        if folder is not None and folder.exists():
            if not folder.is_dir() or any(not _is_ours(p) for p in folder.iterdir()):
                raise OutputError(f"{folder} is in the way: it holds something else than unfinished work; move it away")
            if not resume:
                shutil.rmtree(folder)

    def save(self, name: str, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Keep arrays under a name; OutputError where that cannot be written."""
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            buffer = io.BytesIO()
            entries: dict[str, Any] = {f"a{k}": a for k, a in enumerate(arrays.values())}
            np.savez(buffer, names=np.array(list(arrays)), **entries)
            write_atomic(self.folder / f"{self._key}-{name}.npz", buffer.getvalue())
        except OSError as error:
            raise OutputError(f"cannot keep unfinished work in {self.folder} ({error.strerror}); make room there, or "
                              "give -o another folder") from error

    def load(self, name: str) -> dict[str, NDArray[Any]] | None:
        """What was kept under a name; None if there is nothing, or it is damaged."""
        return processes.first(lambda: self._load(name))

    def _load(self, name: str) -> dict[str, NDArray[Any]] | None:
        if self.folder is None:
            return None
        try:
            content = io.BytesIO((self.folder / f"{self._key}-{name}.npz").read_bytes())
            with np.load(content, allow_pickle=False) as kept:
                return {str(n): kept[f"a{k}"] for k, n in enumerate(kept["names"])}
        except Exception:  # a damaged file raises whatever zipfile, zlib and numpy come upon
            return None

    def finish(self) -> None:
        """The result is written: forget what led there."""
        if self.folder is not None and self.folder.exists():
            shutil.rmtree(self.folder)


def _is_ours(path: Path) -> bool:
    return path.is_file() and (path.suffix == ".npz" or path.name.startswith("."))
