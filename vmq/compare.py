"""Two dumps side by side: which settings differ, what each pass gave, which tensors got better or worse.

Both are measured on the probe clip of the first, where their frames have one size. Tensors are matched by their names
in the float model; where the two models that went in have the same operators in the same order, by their places in it,
so that a renamed export still compares. Weights are matched by the layer that reads them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vmq.dump import read_pipeline, read_probe
from vmq.errors import MediaError
from vmq.findings import Finding
from vmq.graph import Graph
from vmq.report import Inspection, inspect_dump, said
from vmq.tensors import Tensor

MOST = 10
"""Tensors listed each way."""


@dataclass(frozen=True)
class Change:
    """A tensor in both dumps.

    Attributes:
        name, kind: in the first dump.
        before, after: its SQNR in dB in the first and in the second.
        bits: in the first and in the second, None where it is float.
    """

    name: str
    kind: str
    before: float
    after: float
    bits: tuple[int | None, int | None]

    @property
    def gain(self) -> float:
        """By how many dB it is better in the second."""
        return round(self.after - self.before, 2)


@dataclass(frozen=True)
class Comparison:
    """Two inspections and what differs.

    Attributes:
        names: of the two dumps.
        first, second: what each shows.
        settings: options, versions and clips that differ: name, and the values in both.
        tensors: all that are in both, most improved first.
        same_clip: whether both were measured on the same frames.
    """

    names: tuple[str, str]
    first: Inspection
    second: Inspection
    settings: dict[str, tuple[Any, Any]]
    tensors: list[Change]
    same_clip: bool

    @property
    def better(self) -> list[Change]:
        """The tensors that gained most, at most `MOST`."""
        return [c for c in self.tensors if c.gain > 0.0][:MOST]

    @property
    def worse(self) -> list[Change]:
        """The tensors that lost most, at most `MOST`."""
        return [c for c in reversed(self.tensors) if c.gain < 0.0][:MOST]

    @property
    def passes(self) -> list[tuple[str, float | None, float | None]]:
        """Passes of either with the alpha MAD after them."""
        scores = [{p["name"]: p["alpha_MAD"] for p in seen.passes} for seen in (self.first, self.second)]
        names = list(dict.fromkeys([*scores[0], *scores[1]]))
        return [(name, scores[0].get(name), scores[1].get(name)) for name in names]

    @property
    def alpha(self) -> tuple[float, float]:
        """Alpha MAD x 1e3 of the two, over the whole probe clip in closed loop."""
        one, two = (float(np.mean(seen.loop.closed)) if seen.loop else 0.0 for seen in (self.first, self.second))
        return one, two

    @property
    def verdict(self) -> Finding:
        """Which is better, and what to look at."""
        one, two = self.alpha
        better = self.names[two < one]
        if one == two:
            says = f"Both are the same to alpha: MAD {one:.2f}."
        else:
            says = (f"{better} is better: alpha MAD {min(one, two):.2f} against {max(one, two):.2f} over the clip "
                    f"({abs(two - one) / max(one, two):.0%} less).")
        moved = (self.worse or self.better)[:1]
        if self.settings:
            shown = ", ".join(f"{k} {said(a)} → {said(b)}" for k, (a, b) in list(self.settings.items())[:4])
            says += f" What differs: {shown}."
        hint = f"look at {moved[0].name} first: its SQNR goes from {moved[0].before:.1f} to {moved[0].after:.1f} dB." \
            if moved else "nothing: the tensors are the same."
        return Finding("model", better, says, hint[0].upper() + hint[1:])

    def to_json(self) -> dict[str, Any]:
        """In plain JSON types."""
        return {"dumps": list(self.names), "verdict": self.verdict.says, "same_clip": self.same_clip,
                "alpha_MAD": list(self.alpha),
                "settings": {k: list(v) for k, v in self.settings.items()},
                "passes": [{"name": n, "alpha_MAD": [a, b]} for n, a, b in self.passes],
                "better": [asdict(c) | {"gain": c.gain} for c in self.better],
                "worse": [asdict(c) | {"gain": c.gain} for c in self.worse]}

    def lines(self) -> list[str]:
        """As text."""
        lines = [self.verdict.says, f"A: {self.names[0]}", f"B: {self.names[1]}"]
        if not self.same_clip:
            lines.append("the frames differ in size: each was measured on its own clip")
        lines += ["", "settings that differ:" if self.settings else "no settings differ"]
        lines += [f"  {key}: {said(a)} -> {said(b)}" for key, (a, b) in self.settings.items()]
        lines += ["", f"{'alpha MAD after':<20}{'A':>9}{'B':>9}"]
        for name, a, b in self.passes:
            if a is not None or b is not None:
                lines.append(f"{name:<20}" + "".join(f"{'' if v is None else f'{v:.3f}':>9}" for v in (a, b)))
        lines.append(f"{'over the clip':<20}" + "".join(f"{v:>9.3f}" for v in self.alpha))
        for title, rows in (("better in B", self.better), ("worse in B", self.worse)):
            lines += ["", f"{'change':>8}{'A dB':>8}{'B dB':>8}  {title}, by SQNR"]
            lines += [f"{c.gain:>+8.1f}{min(c.before, 99.9):>8.1f}{min(c.after, 99.9):>8.1f}  {c.name}" for c in rows]
        return lines


def compare_dumps(one: Path, two: Path, progress: Callable[[str, float], None] = lambda _what, _share: None,
                  ) -> Comparison:
    """Measure two dumps and say what differs.

    Raises:
        MediaError: one is no dump of a finished compile, or they are of different models.
    """
    for folder in (one, two):
        read_pipeline(folder)
    probe = read_probe(one)
    same = probe.frames.shape[1:] == read_probe(two).frames.shape[1:]
    seen = [inspect_dump(folder, _named(progress, folder), probe=given)
            for folder, given in ((one, None), (two, probe if same else None))]
    names = _names(Graph.load(one / "00_input.onnx"), Graph.load(two / "00_input.onnx"))
    before = {_key(t, {}): t for t in seen[0].tensors}
    changes = [Change(old.name, old.kind, old.sqnr_db, new.sqnr_db, (old.bits, new.bits))
               for new in seen[1].tensors if (old := before.get(_key(new, names))) is not None]
    if not changes:
        raise MediaError(f"{one} and {two} have no tensor in common: they are not of the same model")
    changes.sort(key=lambda c: (-c.gain, c.name))
    return Comparison((str(one), str(two)), seen[0], seen[1], _differing(*(s.setup for s in seen)), changes, same)


def _named(progress: Callable[[str, float], None], folder: Path) -> Callable[[str, float], None]:
    return lambda what, share: progress(f"{folder}: {what}", share)


def _key(tensor: Tensor, names: dict[str, str]) -> tuple[str, str]:
    """What tells a tensor from others in both models."""
    name = tensor.reader if tensor.kind == "weight" else tensor.name
    return tensor.kind, names.get(name, name)


def _names(one: Graph, two: Graph) -> dict[str, str]:
    """Names in the second model to names in the first, where both have the same operators in the same order."""
    if [n.op for n in one.nodes] != [n.op for n in two.nodes]:
        return {}
    names = dict(zip((v.name for v in two.inputs), (v.name for v in one.inputs), strict=False))
    for ours, theirs in zip(one.nodes, two.nodes, strict=True):
        names |= {theirs.name: ours.name, **dict(zip((v.name for v in theirs.outputs),
                                                     (v.name for v in ours.outputs), strict=False))}
    return names


def _differing(one: dict[str, Any], two: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Options, versions and clips that are not the same."""
    found: dict[str, tuple[Any, Any]] = {}
    for part in ("options", "versions"):
        a, b = (setup.get(part) or {} for setup in (one, two))
        found |= {key: (a.get(key), b.get(key)) for key in dict.fromkeys([*a, *b]) if a.get(key) != b.get(key)}
    clips = [", ".join(f"{c['name']} ({c['frames']})" for c in setup.get("clips") or []) for setup in (one, two)]
    return found | ({"clips": (clips[0], clips[1])} if clips[0] != clips[1] else {})
