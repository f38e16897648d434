"""Read a dump: what each pass did to the alpha, and which tensors lost most.

The alpha error of a dump is its mean |alpha - float alpha| x 1e3 over the probe frames, in closed loop; a
tensor's signal-to-noise ratio compares its values in the last dump, read behind their quantizer, with those of the
float graph, both in closed loop:

    SQNR = 10 log10( sum x^2 / sum (x - x')^2 )    in dB
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vmq.errors import MediaError
from vmq.graph import Graph
from vmq.quant import FUNCTIONS
from vmq.runtime import Session

UNCALIBRATED = "insert_qdq"
"""After this pass every scale is still 1: its dump runs, but scoring it would say nothing."""


@dataclass(frozen=True)
class Inspection:
    """What a dump shows.

    Attributes:
        passes: per pass name, modified, seconds, and alpha_MAD (None where the graph did not change or is not
            calibrated yet).
        closures: node names of each recurrent closure.
        tensors: name and sqnr_db, worst first.
        notes: what the passes noted, with the pass's name before it.
    """

    passes: list[dict[str, Any]]
    closures: list[list[str]]
    tensors: list[dict[str, Any]]
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """The form that scripts rely on."""
        return {"passes": self.passes, "closures": self.closures, "tensors": self.tensors, "notes": self.notes}

    def lines(self, tensors: int = 20) -> list[str]:
        """The tables as text, with the worst `tensors` tensors."""
        lines = [f"{'pass':<20}{'changes':>8}{'seconds':>9}{'alpha MAD':>11}"]
        for entry in self.passes:
            score = "" if entry["alpha_MAD"] is None else f"{entry['alpha_MAD']:.3f}"
            lines.append(f"{entry['name']:<20}{entry['modified']:>8}{entry['seconds']:>9.2f}{score:>11}")
        lines.append("alpha MAD: mean |alpha - float alpha| x 1e3 over the probe frames, closed loop, optimized (where "
                     "integer kernels come in, rounding moves it a little)")
        lines += ["", f"recurrent closures: {len(self.closures)}"
                  + (f" of {', '.join(str(len(c)) for c in self.closures)} nodes" if self.closures else "")]
        lines += ["", f"{'SQNR dB':>8}  tensor (worst {min(tensors, len(self.tensors))} of {len(self.tensors)})"]
        lines += [f"{t['sqnr_db']:>8.1f}  {t['name']}" for t in self.tensors[:tensors]]
        if self.notes:
            lines += ["", *(f"note: {n}" for n in self.notes)]
        return lines


def inspect_dump(folder: Path, progress: Callable[[str, float], None] = lambda _what, _share: None) -> Inspection:
    """Score every dump in a folder that `--dump` wrote.

    Raises:
        MediaError: the folder is missing, is no dump, or the compile did not finish.
    """
    pipeline = _read(folder)
    frames = _probe(folder)
    dumps = [(e, folder / e["model"]) for e in pipeline["passes"] if e["model"]]
    names = [e["name"] for e, _ in dumps]
    floats = names.index(UNCALIBRATED) if UNCALIBRATED in names else len(names)
    float_path = dumps[floats - 1][1] if floats else folder / "00_input.onnx"
    how: dict[str, Any] = {"downsample_ratio": _ratio(folder), "pairs": pipeline["options"]["pairs"]}
    want = np.stack(list(Session(float_path, **how).alphas(frames)))
    scores: dict[str, float] = {}
    for index, (entry, path) in enumerate(dumps):
        if entry["name"] != UNCALIBRATED:
            got = np.stack(list(Session(path, **how).alphas(frames)))
            scores[entry["name"]] = float(np.abs(got - want).mean()) * 1e3
        progress("scoring the dumps", (index + 1) / (len(dumps) + 1))
    passes = [{"name": e["name"], "modified": e["modified"], "seconds": e["seconds"],
               "alpha_MAD": scores.get(e["name"])} for e in pipeline["passes"]]
    tensors = _tensors(float_path, dumps[-1][1], frames, how) if scores else []
    progress("scoring the dumps", 1.0)
    closures, notes = [], []
    for entry in pipeline["passes"]:
        details = json.loads((folder / f"{entry['index']:02}_{entry['name']}.json").read_text())
        closures += details["report"].get("closures", [])
        notes += [f"{entry['name']}: {n}" for n in details["notes"]]
    return Inspection(passes, closures, tensors, notes)


def _read(folder: Path) -> dict[str, Any]:
    try:
        pipeline: dict[str, Any] = json.loads((folder / "pipeline.json").read_text())
        finished, _, _ = (pipeline[key] for key in ("finished", "passes", "options"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MediaError(f"{folder} is not a dump (no readable pipeline.json); make one with "
                         "`vmq compile MODEL --dump DIR`") from error
    if not finished:
        raise MediaError(f"{folder} is the dump of a compile that did not finish; its *.failed.json says why")
    return pipeline


def _probe(folder: Path) -> NDArray[np.uint8]:
    try:
        with np.load(folder / "probe.npz", allow_pickle=False) as archive:
            frames: NDArray[np.uint8] = archive["frames"]
            return frames
    except (OSError, ValueError, KeyError) as error:
        raise MediaError(f"{folder}/probe.npz cannot be read; compile again with --dump") from error


def _ratio(folder: Path) -> float:
    for path in folder.glob("[0-9][0-9]_bind_shapes.json"):
        return float(json.loads(path.read_text())["report"].get("downsample_ratio", 1.0))
    return 1.0


def _tensors(float_path: Path, last_path: Path, frames: NDArray[np.uint8], how: dict[str, Any],
             ) -> list[dict[str, Any]]:
    """SQNR of every value that both graphs compute in float, worst first.

    What only a saturating function reads is left out: its range is chosen for the function's result, which is
    there, and its own ratio says nothing.
    """
    exact, ours = Graph.load(float_path), Graph.load(last_path)
    there = {v.name for n in exact.nodes for v in n.outputs if (v.dtype is None or v.dtype == np.float32)
             and not (v.outputs and all(r.op in FUNCTIONS for r in v.outputs))}
    # A value that is quantized is read behind its last DQ; the name of the value before stays the name of both.
    reads: dict[str, str] = {}
    for node in ours.nodes:
        for value in node.outputs:
            if value.name in there:
                reads[value.name] = _behind_quantizers(value).name
    names = sorted(reads)
    one = Session(exact, extra=names, **how)
    two = Session(ours, extra=[reads[n] for n in names], optimize=False, **how)
    signal, noise = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for frame in frames:
        a, b = one.step(frame), two.step(frame)
        for name in names:
            if a[name].shape == b[reads[name]].shape:
                x = a[name].astype(np.float64)
                signal[name] += float((x * x).sum())
                noise[name] += float(((x - b[reads[name]]) ** 2).sum())
    rows = [{"name": n, "sqnr_db": round(float(10 * np.log10(max(signal[n], 1e-30) / max(noise[n], 1e-30))), 2)}
            for n in names if signal[n] > 0.0]
    return sorted(rows, key=lambda row: (row["sqnr_db"], row["name"]))


def _behind_quantizers(value: Any) -> Any:
    """The value behind the narrowest quantizer that stands for `value`: Q, perhaps Clip, DQ, and so on."""
    while True:
        quantizers = [r for r in value.outputs if r.op == "QuantizeLinear"]
        if not quantizers:
            return value
        node = quantizers[0]
        while node.op != "DequantizeLinear":
            node = node.outputs[0].outputs[0]
        value = node.outputs[0]
