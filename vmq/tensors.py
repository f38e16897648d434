"""What quantization does to each tensor, from one run of a compiled model beside the float one.

With x the float model's values, y the compiled model's before a quantizer, and y' behind it:

    SQNR    = 10 log10( sum x^2 / sum (x - y')^2 )    all that went wrong up to here, in dB
    own     = 10 log10( sum y^2 / sum (y - y')^2 )    what this quantizer alone adds
    misfit  = 10 log10( sum (y - y')^2 / sum (y - y*)^2 ),  y* on the best grid of as many levels

Own noise is the price of the bits, misfit the price of the range: a scale that is 8 times too large costs 18 dB.
Where one saturating function alone reads a tensor (sigmoid, tanh, ...), all errors are those of its result, as in
the search for ranges. Of a weight, x = y is the float model's, and misfit is that of rounding to nearest, whatever was
learned. The results of some functions are integers that are read with another scale than they were written with
(passes/integer_forms.py): the function fixes that grid, and there is no misfit. Numbers are of a fixed sample of each
tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vmq.graph import Constant, Graph
from vmq.layers import dead_below, quantizer_of, written_by
from vmq.quant import FUNCTIONS, dequantize, quantize, search_range, search_weight_scale
from vmq.runtime import Session
from vmq.spec import QuantSpec

SAMPLES = 16_384
"""Values of a tensor that are looked at in each frame."""
BINS = 48
"""Bars of a histogram: the middle two thirds lie within the grid, the rest beyond its ends."""
STEPS = 40
"""Ranges tried in search of the best grid."""
SILENT = 1e-6
"""Noise of so small a share of the signal, 60 dB below it, does not count."""

Array = NDArray[Any]


@dataclass(frozen=True)
class Tensor:
    """A tensor of the compiled model; what only quantizers have is None where there is none.

    Attributes:
        name: as in the float model.
        closure: name of the closure that makes it, or that reads it first (weights, frame, states).
        kind: activation, or weight (any quantized constant).
        reader: of a weight, the first node that reads it.
        sqnr_db, own_db, misfit_db: as above.
        bits: of the narrowest grid it goes through.
        low, high: ends of that grid (of weights, of the widest channel).
        smallest, largest: values that occurred.
        clipped: share of values beyond the ends of the grid, by more than half a step.
        levels, used: levels of the grid, and how many of them occurred (of weights, in any channel).
        flips: share of a weight's integers that are not the nearest ones.
        fit: the step of the best grid as a multiple of this grid's; of activations.
        histogram: share of values in `BINS` bars over the grid and a quarter of its width beyond each end; the
            outermost two hold all that lies further out.
    """

    name: str
    closure: str
    kind: str
    sqnr_db: float
    reader: str = ""
    own_db: float | None = None
    misfit_db: float | None = None
    bits: int | None = None
    low: float | None = None
    high: float | None = None
    smallest: float = 0.0
    largest: float = 0.0
    clipped: float | None = None
    levels: int | None = None
    used: int | None = None
    flips: float | None = None
    fit: float | None = None
    histogram: list[float] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """In plain JSON types."""
        return asdict(self)


def measure_tensors(reference: Graph, quantized: Graph, homes: Mapping[str, str], frames: NDArray[np.uint8], *,
                    session: Mapping[str, Any] | None = None,
                    progress: Callable[[float], None] = lambda _share: None) -> list[Tensor]:
    """Every float tensor that both models have and every quantized constant, worst SQNR first.

    Args:
        reference: the float model.
        quantized: the compiled one, with the float model's names.
        homes: the closure of each node of `quantized`, by the node's name.
        frames: a clip [T,3,H,W] that both run over in closed loop, without optimizations.
        session: further arguments of `Session`, such as state pairs.
        progress: called with the share done.
    """
    watched = _watched(reference, quantized, homes)
    how = dict(session or {})
    inputs = {v.name for v in reference.inputs}
    one = Session(reference, extra=[w.name for w in watched if w.name not in inputs], **how)
    two = Session(quantized, extra=[w.raw for w in watched if w.raw not in inputs], optimize=False, **how)
    places: dict[int, Array] = {}
    for index, frame in enumerate(frames):
        exact, ours = one.feeds(frame), two.feeds(frame)
        exact, ours = exact | one.step(frame), ours | two.step(frame)
        for tensor in watched:
            x, y = exact[tensor.name], ours[tensor.raw]
            if x.shape == y.shape:
                if tensor.floor is not None:
                    x, y = np.maximum(x, tensor.floor), np.maximum(y, tensor.floor)
                if x.size > SAMPLES:
                    chosen = places.setdefault(
                        x.size, np.random.default_rng(x.size).integers(0, x.size, SAMPLES))
                    x, y = x.ravel()[chosen], y.ravel()[chosen]
                tensor.add(x.ravel(), y.ravel())
        progress((index + 1) / (len(frames) + 1))
    rows = [w.row() for w in watched if w.signal > 0.0]
    rows += _constants(reference, quantized, homes)
    return sorted(rows, key=lambda t: (t.sqnr_db, t.name))


def decibels(signal: float, noise: float) -> float:
    """10 log10 of a ratio, to two digits; 300 and more stand for no noise at all."""
    return round(float(10 * np.log10(max(signal, 1e-30) / max(noise, 1e-30))), 2)


def range_of(quantized: Graph, name: str) -> tuple[float, float] | None:
    """The ends of the grid that a float tensor is quantized on; None where it is not."""
    values = {v.name: v for v in quantized.values() if not isinstance(v, Constant)}
    grids = _read_grid(values[name])[1] if name in values else []
    return grids[-1].ends if grids else None


def scales_of(quantized: Graph, name: str) -> list[Constant]:
    """The scales of the grid that a float tensor is quantized on; tensors may share them."""
    grids = _read_grid(next(v for v in quantized.values() if v.name == name))[1]
    return list({s.name: s for n in grids[-1].nodes for s in [n.inputs[1]]}.values()) if grids else []


@dataclass(frozen=True)
class _Grid:
    """A quantizer of an activation, and the nodes that it is made of."""

    nodes: tuple[Any, ...]
    scale: Array
    zero: Array
    low: int
    high: int

    @property
    def spec(self) -> QuantSpec:
        return QuantSpec((self.high - self.low + 1).bit_length() - 1, self.low < 0)

    @property
    def ends(self) -> tuple[float, float]:
        return float((self.low - self.zero) * self.scale), float((self.high - self.zero) * self.scale)

    def round(self, y: Array) -> Array:
        steps = np.clip(np.rint(y / self.scale) + self.zero, self.low, self.high)
        return ((steps - self.zero) * self.scale).astype(np.float32)

    def places(self, y: Array) -> Array:
        """Where values lie, in steps of the grid before rounding."""
        return y / self.scale + self.zero


class _Watched:
    """A tensor that is watched while both models run."""

    def __init__(self, name: str, raw: str, closure: str, grids: Sequence[_Grid],
                 through: Callable[..., Array] | None, form: Callable[[Array], Array] | None,
                 floor: Array | None) -> None:
        self.name, self.raw, self.closure, self.grids, self.form = name, raw, closure, grids, form
        self.through, self.floor = through or (lambda x: x), floor
        self.reader = through
        self.signal = self.noise = 0.0
        self.kept: list[Array] = []

    def add(self, x: Array, y: Array) -> None:
        """The values of a frame, float and ours before the quantizers."""
        y = self.form(y) if self.form is not None else y
        self.kept.append(y)
        for grid in self.grids:
            y = grid.round(y)
        exact = self.through(x).astype(np.float64)
        self.signal += float(exact @ exact)
        error = self.through(y) - exact
        self.noise += float(error @ error)

    def row(self) -> Tensor:
        y = np.concatenate(self.kept)
        basic: dict[str, Any] = {"name": self.name, "closure": self.closure, "kind": "activation",
                 "sqnr_db": decibels(self.signal, self.noise), "smallest": float(y.min()), "largest": float(y.max())}
        if not self.grids:
            return Tensor(**basic)
        grid, rounded = self.grids[-1], y
        for step in self.grids:
            rounded = step.round(rounded)
        wanted = self.through(y)
        own = _squares(self.through(rounded) - wanted)
        seen: dict[str, Any] = {**basic, **_use(grid.places(y), grid.low, grid.high),
                                "own_db": decibels(_squares(wanted), own),
                                "bits": grid.spec.bits, "low": grid.ends[0], "high": grid.ends[1]}
        if self.form is not None and len(self.grids) == 1:
            return Tensor(**seen)
        scale, zero = search_range(y, float(y.min()), float(y.max()), grid.spec, norm=2.0, steps=STEPS,
                                   through=self.reader)
        best = _Grid((), scale, zero, grid.spec.qmin, grid.spec.qmax)
        reachable = _squares(self.through(best.round(y)) - wanted)
        return Tensor(**seen, misfit_db=_misfit(own, reachable, _squares(wanted)), fit=float(scale / grid.scale))


def _watched(reference: Graph, quantized: Graph, homes: Mapping[str, str]) -> list[_Watched]:
    """The float values that both graphs have, by name, with the quantizers that ours stand behind."""
    values = {v.name: v for v in quantized.values() if not isinstance(v, Constant)}
    found = []
    for value in reference.values():
        ours = values.get(value.name)
        if ours is None or isinstance(value, Constant) or (value.dtype is not None and value.dtype != np.float32):
            continue
        behind, grids, written = _read_grid(ours)
        if isinstance(behind, Constant):
            continue
        near = behind.inputs or behind.outputs
        raw = behind if written is None else written.inputs[0]
        form = partial(_as_read, written, behind.inputs[0]) if written is not None else None
        found.append(_Watched(value.name, raw.name, homes.get(near[0].name, "") if near else "", grids,
                              _function(value), form, dead_below(value)))
    return found


def _read_grid(value: Any) -> tuple[Any, list[_Grid], Any]:
    """A value before its own quantizers, the grids that it goes through, and None.

    Of a form's result (passes/integer_forms.py) the grid that it is read on is the first of these, and the third is
    the QuantizeLinear of its integers.
    """
    raw = _raw(value)
    reader = raw.inputs[0] if raw.inputs else None
    written = written_by(reader) if reader is not None and reader.op == "DequantizeLinear" else None
    return raw, ([_grid((reader, written))] if written is not None else []) + _grids(raw), written


def _as_read(written: Any, reader: Any, y: Array) -> Array:
    """What a form reads where this was written, but for rounding: shifted, saturated, scaled."""
    ours, theirs = _grid((written,)), _grid((reader,))
    places = ours.places(y)
    if ours.zero != theirs.zero:                       # the function saturates where the integers do
        places = np.clip(places, ours.low, ours.high + 1)
    return ((places - theirs.zero) * theirs.scale).astype(np.float32)


def _raw(value: Any) -> Any:
    """The value before its quantizers, where a model output's name went behind them."""
    while value.inputs and value.inputs[0].op == "DequantizeLinear":
        pair = quantizer_of(value.inputs[0])
        if pair is None:
            break
        value = pair[0].inputs[0]
    return value


def _grids(raw: Any) -> list[_Grid]:
    """The quantizers that a value goes through on its way to its most demanding reader.

    The last may be one whose integers are only read with another scale: its own grid counts.
    """
    grids: list[_Grid] = []
    value = raw
    while True:
        reads = [d for q in value.outputs if q.op == "QuantizeLinear"
                 for c in q.outputs[0].outputs for d in ([c] if c.op == "DequantizeLinear" else c.outputs[0].outputs)
                 if d.op == "DequantizeLinear"]
        pairs = [(pair, d) for d in reads for pair in [quantizer_of(d)] if pair is not None]
        if not pairs:
            return grids + [_grid((q, d)) for d in reads[-1:] for q in [written_by(d)] if q is not None]
        (node, limits), dequantizer = pairs[-1]
        grids.append(_grid((node, dequantizer), limits))
        value = dequantizer.outputs[0]


def _grid(nodes: tuple[Any, ...], limits: tuple[int, int] | None = None) -> _Grid:
    """The grid of the first of these, a Q or DQ of whole tensors, perhaps with fewer levels than its type has."""
    _, scale, zero = nodes[0].inputs
    spec = QuantSpec.of(zero.dtype)
    return _Grid(nodes, np.asarray(scale.values, np.float32).reshape(()),
                 np.asarray(zero.values).astype(np.float32).reshape(()), *(limits or (spec.qmin, spec.qmax)))


def _function(value: Any) -> Callable[..., Array] | None:
    """The saturating function that alone reads a value, if there is one."""
    readers = value.outputs
    if not readers or readers[0].op not in FUNCTIONS or any(
            (r.op, r.attrs) != (readers[0].op, readers[0].attrs) for r in readers):
        return None
    return partial(FUNCTIONS[readers[0].op], **readers[0].attrs)


def _constants(reference: Graph, quantized: Graph, homes: Mapping[str, str]) -> list[Tensor]:
    """Weights and other constants that the compiled model holds as integers."""
    twins = {n.name: n for n in reference.nodes}
    found: dict[str, Tensor] = {}
    for node in quantized.nodes:
        twin = twins.get(node.name)
        for index, value in enumerate(node.inputs):
            exact = twin.inputs[index] if twin is not None and index < len(twin.inputs) else None
            if isinstance(exact, Constant) and exact.name not in found and value.inputs \
                    and value.inputs[0].op == "DequantizeLinear":
                row = _constant(np.asarray(exact.values), value.inputs[0], exact.name, node.name, homes)
                if row is not None:
                    found[exact.name] = row
    return list(found.values())


def _constant(exact: Array, dequantizer: Any, name: str, reader: str, homes: Mapping[str, str]) -> Tensor | None:
    scale, zero = (np.asarray(v.values) for v in dequantizer.inputs[1:3]) if len(dequantizer.inputs) > 2 else (
        np.asarray(dequantizer.inputs[1].values), np.zeros(()))
    axis = dequantizer.attrs.get("axis", 1) if scale.size > 1 else None
    stored = dequantizer.inputs[0]
    while not isinstance(stored, Constant):                # Cast of INT4, or Q of a float constant
        if stored.inputs[0].op == "QuantizeLinear" and isinstance(stored.inputs[0].inputs[0], Constant):
            source = stored.inputs[0].inputs
            spec = QuantSpec.of(source[2].dtype, axis)
            integers = quantize(np.asarray(source[0].values), scale, zero.astype(np.int32), spec)
            break
        stored = stored.inputs[0].inputs[0]
    else:
        if np.dtype(stored.dtype).name not in ("int4", "uint4", "int8", "uint8"):
            return None                                    # a bias in int32: no grid to speak of
        spec = QuantSpec.of(stored.dtype, axis)
        integers = np.asarray(stored.values).astype(np.int32)
    if integers.shape != exact.shape or not exact.size:
        return None
    shape = [1] * exact.ndim
    if axis is not None:
        shape[axis] = -1
    s, z = (np.asarray(p, np.float32).reshape(shape if axis is not None else ()) for p in (scale, zero))
    nearest = quantize(exact, scale, zero.astype(np.int32), spec)
    noise = _squares(dequantize(integers, scale, zero, axis) - exact)
    misfit = None
    if spec.signed:
        best = search_weight_scale(exact, spec, norm=2.0, steps=STEPS // 2)
        rounded = quantize(exact, best, np.zeros(best.shape, np.int32), spec)
        misfit = _misfit(_squares(dequantize(nearest, scale, zero, axis) - exact),
                         _squares(dequantize(rounded, best, np.zeros(best.shape, np.int32), axis) - exact),
                         _squares(exact))
    quality = decibels(_squares(exact), noise)
    low, high = float(np.min((spec.qmin - z) * s)), float(np.max((spec.qmax - z) * s))
    use = _use((exact / s + z).ravel(), spec.qmin, spec.qmax) | {"used": len(np.unique(integers))}
    return Tensor(name, homes.get(reader, ""), "weight", quality, reader, quality, misfit, spec.bits, low, high,
                  float(exact.min()), float(exact.max()),
                  flips=round(float(np.mean(integers != nearest)), 4), **use)


def _use(places: Array, low: int, high: int) -> dict[str, Any]:
    """How values use a grid: what is clipped, levels used, histogram."""
    edge = (high - low + 1) / 4
    shifted = (places - (low - 0.5) + edge) / (6 * edge) * BINS
    counts = np.bincount(np.clip(shifted, 0, BINS - 1).astype(np.int64), minlength=BINS)
    inside = np.clip(np.rint(places), low, high).astype(np.int64)
    return {"clipped": round(float(np.mean((places < low - 0.5) | (places > high + 0.5))), 5),
            "levels": high - low + 1, "used": len(np.unique(inside)),
            "histogram": [round(c / len(places), 4) for c in counts.tolist()]}


def _squares(x: Array) -> float:
    flat = x.ravel().astype(np.float64)
    return float(flat @ flat)


def _misfit(noise: float, least: float, signal: float) -> float:
    """How far noise is above the least, in dB; noise below `SILENT` (values that lie on the grid already) is none."""
    return max(0.0, round(float(10 * np.log10(max(noise, 1e-30) / max(least, SILENT * signal, 1e-30))), 2))
