"""A dump: every intermediate result as a file that can be opened, run and scored; its observer and its readers.

    DIR/00_input.onnx               the model that went in
    DIR/NN_pass.onnx, .txt, .diff   the graph after pass NN, as text, and what changed in the text
    DIR/NN_pass.json                the pass's report: changes, notes, seconds
    DIR/probe.npz                   a few calibration frames (uint8 [T,3,H,W]), to score every dump with, and the first
                                    one's alpha (uint8 [H,W]), if the model is told it
    DIR/pipeline.json               options, versions (of the model: a hash), passes, timings, and the files above
    DIR/NN_pass.failed.onnx, .json  on failure: the graph the pass was given, the error, how to run it again

An analysis changes nothing, so it leaves only its .json; so does a transformation that found nothing to do.
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
import traceback
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray

from vmq import __version__
from vmq.errors import MediaError, OutputError
from vmq.files import write_atomic
from vmq.graph import Graph
from vmq.pipeline import Context, Observer, Pass, PassResult
from vmq.runtime import FIRST_ALPHA_KEY
from vmq.text import diff_graphs, format_graph

PROBE_FRAMES = 32
"""Frames kept for scoring, at most, from the start of the footage: the states warm up in them."""
LARGEST = 1 << 28
"""Bytes of a dump's JSON that are read, at most."""


class Dump(Observer):
    """Writes the numbered dump of a compile into a folder.

    Args:
        folder: created when missing; dump files of an earlier compile in it are replaced.
        command: what to type to run the same again, for the reproducer.

    Raises:
        OutputError: the folder cannot be written, or holds something that is not a dump.
    """

    def __init__(self, folder: Path, command: str = "") -> None:
        self.folder, self.command = folder, command
        self._files: list[str] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            earlier = _files_of(folder)
            if earlier is None and any(not p.name.startswith(".") for p in folder.iterdir()):   # what a kill may leave
                raise OutputError(f"{folder} holds files that are no dump; give --dump a new or empty folder")
            for name in earlier or []:
                (folder / name).unlink(missing_ok=True)
        except OutputError:
            raise
        except OSError as error:
            raise OutputError(f"cannot write the dump to {folder}: {error.strerror}; give --dump another folder") \
                from error

    def started(self, graph: Graph, context: Context, passes: Sequence[Pass]) -> None:
        self._context, model = context, graph.to_bytes()
        self._pipeline: dict[str, Any] = {
            "command": self.command, "options": context.options.describe(),
            "versions": versions() | {"model": hashlib.sha256(model).hexdigest()[:16]},
            "clips": [{"name": c.name, "frames": len(c)} for c in context.clips], "passes": [], "finished": False}
        self._text = format_graph(graph)
        self._write("00_input.onnx", model)
        self._write("00_input.txt", self._text.encode())

    def after(self, index: int, step: Pass, graph: Graph, result: PassResult, seconds: float) -> None:
        stem = f"{index:02}_{step.name}"
        entry = {"index": index, "name": step.name, "modified": result.modified, "seconds": round(seconds, 3),
                 "model": f"{stem}.onnx" if result.modified else None}
        self._write_json(f"{stem}.json", entry | {"notes": list(result.notes), "report": result.report})
        if result.modified:
            text = format_graph(graph)
            self._write(f"{stem}.onnx", graph.to_bytes())
            self._write(f"{stem}.txt", text.encode())
            self._write(f"{stem}.diff", diff_graphs(self._text, text).encode())
            self._text = text
        self._pipeline["passes"].append(entry)
        self._write_pipeline()

    def failed(self, index: int, step: Pass, before: bytes, error: BaseException) -> None:
        stem = f"{index:02}_{step.name}.failed"
        self._write(f"{stem}.onnx", before)
        self._write_json(f"{stem}.json", {
            "pass": step.name, "error": f"{type(error).__name__}: {error}",
            "traceback": traceback.format_exception(error), "reproduce": self.command,
            "model_before_the_pass": f"{stem}.onnx", "options": self._context.options.describe(),
            "versions": versions()})

    def finished(self, graph: Graph) -> None:
        clips = [c for c in self._context.footage or self._context.clips if len(c)]
        if clips:
            frames = np.stack(list(islice(clips[0].frames(), PROBE_FRAMES)))
            probe = io.BytesIO()
            alpha = clips[0].first_alpha() if FIRST_ALPHA_KEY in graph.metadata else None
            known: dict[str, Any] = {} if alpha is None else {"first_alpha": alpha}
            np.savez_compressed(probe, frames=frames, **known)
            self._write("probe.npz", probe.getvalue())
        self._pipeline["finished"] = True
        self._write_pipeline()

    def _write_pipeline(self) -> None:
        content = self._pipeline | {"files": self._files}
        write_atomic(self.folder / "pipeline.json", (json.dumps(content, indent=1) + "\n").encode())

    def _write_json(self, name: str, content: Any) -> None:
        self._write(name, (json.dumps(content, indent=1) + "\n").encode())

    def _write(self, name: str, content: bytes) -> None:
        """Write a file of the dump, after noting in pipeline.json that it belongs to it."""
        self._files.append(name)
        self._write_pipeline()
        write_atomic(self.folder / name, content)


def _files_of(folder: Path) -> list[str] | None:
    """The files that an earlier dump wrote into a folder; None when there was none."""
    try:
        files = json.loads((folder / "pipeline.json").read_bytes())["files"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return [f for f in files if isinstance(f, str) and Path(f).name == f] if isinstance(files, list) else None


def versions() -> dict[str, str]:
    """Versions of what decides a result."""
    return {"vmq": __version__, "python": platform.python_version(), "numpy": np.__version__,
            "onnx": onnx.__version__, "onnxruntime": ort.__version__, "torch": torch.__version__,
            "machine": platform.machine()}


# -- read again ------------------------------------------------------------------------------------------


def read_pipeline(folder: Path) -> dict[str, Any]:
    """pipeline.json of a finished dump.

    Raises:
        MediaError: the folder is missing, is no dump, or the compile did not finish.
    """
    try:
        pipeline: dict[str, Any] = _read_json(folder / "pipeline.json")
        finished, passes, options = (pipeline[key] for key in ("finished", "passes", "options"))
        whole = isinstance(options["pairs"], dict) and all(
            isinstance(e["name"], str) and isinstance(e["index"], int) and isinstance(e["modified"], int)
            and isinstance(e["seconds"], int | float) and Path(e["model"] or "").name == (e["model"] or "")
            for e in passes)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MediaError(f"{folder} is not a dump (no readable pipeline.json); make one with "
                         "`vmq compile MODEL --dump DIR`") from error
    if not whole:
        raise MediaError(f"{folder}/pipeline.json is damaged; compile again with --dump")
    if not finished:
        raise MediaError(f"{folder} is the dump of a compile that did not finish; its *.failed.json says why")
    return pipeline


def _read_json(path: Path) -> Any:
    """A file of JSON; ValueError or OSError for what is none."""
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path} is far too large")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deep") from error


def read_reports(folder: Path, pipeline: dict[str, Any]) -> dict[str, Any]:
    """What each pass of a dump reports, by its name.

    Raises:
        MediaError: a file is missing or damaged.
    """
    reports = {}
    for entry in pipeline["passes"]:
        path = folder / f"{entry['index']:02}_{entry['name']}.json"
        try:
            reports[entry["name"]] = found = _read_json(path)
            whole = isinstance(found["report"], dict) and isinstance(found["notes"], list)
        except (OSError, ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            raise MediaError(f"{path} is missing or damaged; compile again with --dump")
    return reports


class Probe(NamedTuple):
    """Frames to measure on, [T,3,H,W], and the first one's alpha [H,W], if it is known."""

    frames: NDArray[np.uint8]
    first_alpha: NDArray[np.uint8] | None = None


def read_probe(folder: Path) -> Probe:
    """The probe of a dump.

    Raises:
        MediaError: they are missing or damaged.
    """
    try:
        with (folder / "probe.npz").open("rb") as file, np.load(file, allow_pickle=False) as archive:
            frames: NDArray[np.uint8] = archive["frames"]
            if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1] != 3 or not frames.size:
                raise ValueError("no frames")
            alpha: NDArray[np.uint8] | None = archive.get("first_alpha")
            if alpha is not None and (alpha.dtype != np.uint8 or alpha.shape != frames.shape[2:]):
                raise ValueError("no alpha of the first frame")
            return Probe(frames, alpha)
    except Exception as error:  # a damaged file raises whatever zipfile, zlib and numpy come upon
        raise MediaError(f"{folder}/probe.npz cannot be read; compile again with --dump") from error
