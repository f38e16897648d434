"""Give channels that pass from one layer to the next alike weights on both sides, and high biases to the next layer.

Where nothing but positively homogeneous operators, f(a x) = a f(x) for a > 0, stands between two layers:

    W1' = W1 / s    b1' = b1 / s    W2' = s W2        s = sqrt(r1 / r2) for each channel between them

computes the same, and max |W1'| = max |W2'| in each channel; r1 and r2 are these ranges before. Layers in a row are
equalized pair by pair until nothing moves (Nagel et al. 2019, arXiv:1906.04721, cross-layer range equalization).
Through Relu, what a channel always exceeds moves on into the next bias (there, absorption of high biases):

    b1' = b1 - c    b2' = b2 + W2 c        c = max(0, min y - sigma[y]), y the first layer's result

The paper's c = max(0, E[y] - 3 sigma[y]) takes y for a Gaussian, as BatchNormalization describes it, and its tail for
lost; in RVM that moves alpha by up to 0.2. Here y is measured on some frames, the first of a clip with its zero states
among them, and c stays a margin of sigma below all that was seen, so that frames never seen hardly fall below it.
Results with a handful of values, after a global pooling, say too little of what may come and keep their bias; and a
second layer with zero padding takes none, since at its borders W2 c would be incomplete. Little is left: two channels
in RVM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from vmq.channels import PASSING
from vmq.graph import Constant, Graph
from vmq.pipeline import Context, Pass, PassResult
from vmq.runtime import Session

HOMOGENEOUS = PASSING - {"Resize"}
"""Operators that may stand between two layers."""

TOLERANCE = 1e-4
"""A factor closer to 1 is none, and neither is an offset below this share of its channel's largest value."""

ROUNDS = 20
"""Layers in a row are gone over at most this often; a depthwise one between two others takes about seven."""

CLIPS, FRAMES = 4, 16
"""Results are measured on so many clips at most, and so many frames in all."""

VALUES = 1000
"""Values of a channel to measure before its minimum is believed: as many as make a tail of three sigma visible."""

MARGIN = 1.0
"""Distance kept from the smallest value measured, in sigma."""

Array = NDArray[np.float64]


class Equalize(Pass):
    """Equalize weights across pairs of layers, and absorb high biases, where neither changes a result."""

    name: ClassVar[str] = "equalize"

    def run(self, graph: Graph, context: Context) -> PassResult:
        if not context.options.recipe.equalize:
            return PassResult()
        pairs = _pairs(graph)
        rounds = _equalize(pairs)
        for pair in pairs:
            pair.store(graph)
        absorbed = _absorb(graph, pairs, context)
        for pair in pairs:
            pair.store(graph)
        changed = {id(layer.node) for pair in pairs for layer in (pair.first, pair.second) if layer.changed}
        return PassResult(modified=len(changed),
                          report={"pairs": len(pairs), "rounds": rounds, "absorbed_channels": absorbed})


class _Layer:
    """A Conv, ConvTranspose or Gemm with its constants in one form.

    Attributes:
        weight: [groups, outputs / groups, inputs / groups, taps].
        bias: [outputs], zeros where there is none.
        changed: whether either is not what it was.
    """

    def __init__(self, node: Any) -> None:
        self.node, self.changed, self._stored = node, False, True
        values = np.asarray(node.inputs[1].values, np.float64)
        self._groups = node.attrs.get("group", 1) if node.op != "Gemm" else 1
        # ConvTranspose [in, out / groups, ...] and Gemm [in, out] count inputs first
        self._swapped = node.op == "ConvTranspose" or (node.op == "Gemm" and not node.attrs.get("transB", 0))
        split = values.reshape(self._groups, values.shape[0] // self._groups, values.shape[1], -1)
        self.weight: Array = (split.swapaxes(1, 2) if self._swapped else split).copy()
        outputs = self._groups * self.weight.shape[1]
        biased = len(node.inputs) > 2 and node.inputs[2].name
        bias = np.asarray(node.inputs[2].values, np.float64).reshape(-1) if biased else np.zeros(1)
        self.bias: Array = np.broadcast_to(bias, (outputs,)).copy()

    def output_ranges(self) -> Array:
        """Largest |weight| of each output channel."""
        return np.abs(self.weight).max((2, 3)).reshape(-1)

    def input_ranges(self) -> Array:
        """Largest |weight| that each input channel meets."""
        return np.abs(self.weight).max((1, 3)).reshape(-1)

    def scale_outputs(self, factor: Array) -> None:
        """Multiply output channels."""
        self._touch(self.weight * factor.reshape(self._groups, -1, 1, 1), self.bias * factor)

    def scale_inputs(self, factor: Array) -> None:
        """Multiply what input channels meet."""
        self._touch(self.weight * factor.reshape(self._groups, 1, -1, 1), self.bias)

    def shift_outputs(self, offset: Array) -> None:
        """Add to output channels."""
        self._touch(self.weight, self.bias + offset)

    def response(self, values: Array) -> Array:
        """What the weights make of inputs that are the same everywhere, [inputs] to [outputs]."""
        return (self.weight.sum(3) * values.reshape(self._groups, 1, -1)).sum(2).reshape(-1)

    def store(self, graph: Graph) -> None:
        """Write what changed into the graph."""
        if self._stored:
            return
        node, weight = self.node, self.node.inputs[1]
        split = self.weight.swapaxes(1, 2) if self._swapped else self.weight
        weight.values = split.reshape(weight.shape).astype(weight.dtype)      # read by nobody else
        old = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None
        if old is not None or self.bias.any():
            bias = graph.constant(f"{weight.name}_bias" if old is None else old.name, self.bias.astype(weight.dtype))
            node.inputs = [*node.inputs[:2], bias]
        self._stored = True

    def _touch(self, weight: Array, bias: Array) -> None:
        self.weight, self.bias, self.changed, self._stored = weight, bias, True, False


@dataclass(frozen=True)
class _Pair:
    """Two layers, and the operators between them, if any."""

    first: _Layer
    second: _Layer
    between: tuple[str, ...]

    @property
    def result(self) -> str:
        """Name of the first layer's result."""
        name: str = self.first.node.outputs[0].name
        return name

    def absorbs(self) -> bool:
        """Whether an offset of the first layer can move into the bias of the second."""
        node = self.second.node
        return self.between == ("Relu",) and node.op != "ConvTranspose" and not any(node.attrs.get("pads", ())) \
            and node.attrs.get("auto_pad", "NOTSET") in ("NOTSET", "VALID")

    def store(self, graph: Graph) -> None:
        """Write what changed into the graph."""
        self.first.store(graph)
        self.second.store(graph)


def _pairs(graph: Graph) -> list[_Pair]:
    """Pairs in the order of the graph; a layer in two pairs is one object."""
    layers = {id(n): _Layer(n) for n in graph.nodes if _adjustable(n)}
    outputs = {id(v) for v in graph.outputs}
    pairs = []
    for first in layers.values():
        value, between = first.node.outputs[0], list[str]()
        while len(value.outputs) == 1 and id(value) not in outputs:
            reader = value.outputs[0]
            if id(reader) in layers:
                if reader.op != "Gemm" or not reader.attrs.get("transA", 0):
                    pairs.append(_Pair(first, layers[id(reader)], tuple(between)))
                break
            if reader.op not in HOMOGENEOUS or len(reader.outputs) != 1:
                break
            between.append(reader.op)
            value = reader.outputs[0]
    return pairs


def _adjustable(node: Any) -> bool:
    """True for a layer with a constant weight of its own and a constant bias, one number a channel, or none."""
    if node.op not in ("Conv", "ConvTranspose", "Gemm"):
        return False
    constants = [v for v in node.inputs[1:] if v.name]
    if not all(isinstance(v, Constant) for v in constants) or len(node.inputs[1].outputs) != 1:
        return False
    return node.op != "Gemm" or (node.attrs.get("alpha", 1.0) == node.attrs.get("beta", 1.0) == 1.0
                                 and all(d == 1 for v in constants[1:] for d in v.values.shape[:-1]))


def _equalize(pairs: Sequence[_Pair]) -> int:
    """Equalize the pairs until none changes; returns how many rounds changed something."""
    for done in range(ROUNDS):
        moved = False
        for pair in pairs:
            before, after = pair.first.output_ranges(), pair.second.input_ranges()
            both = (before > 0) & (after > 0)
            factor = np.sqrt(np.divide(before, after, where=both, out=np.ones_like(before)))
            if np.abs(factor - 1.0).max() >= TOLERANCE:
                pair.first.scale_outputs(1.0 / factor)
                pair.second.scale_inputs(factor)
                moved = True
        if not moved:
            return done
    return ROUNDS


def _absorb(graph: Graph, pairs: Sequence[_Pair], context: Context) -> int:
    """Move what the results of first layers always exceed into second ones' biases; returns how many channels."""
    taking = [p for p in pairs if p.absorbs()]
    if not taking or not context.clips:
        return 0
    absorbed = 0
    for pair, offset in zip(taking, _offsets(graph, [p.result for p in taking], context), strict=True):
        if offset.any():
            pair.first.shift_outputs(-offset)
            pair.second.shift_outputs(pair.second.response(offset))
            absorbed += int(np.count_nonzero(offset))
    return absorbed


def _offsets(graph: Graph, names: Sequence[str], context: Context) -> list[Array]:
    """c of each of the values called `names`, [channels], over some frames of some clips."""
    session = Session(graph, pairs=context.options.pairs, extra=names)
    clips = [context.clips[i] for i in np.unique(np.linspace(0, len(context.clips) - 1, CLIPS).astype(int))]
    frames: dict[str, list[NDArray[Any]]] = {name: [] for name in names}      # mean, mean square, min, max of each
    counts = dict.fromkeys(names, 0)
    for number, clip in enumerate(clips):
        session.reset(session.told(clip))
        for frame in clip.frames(0, min(len(clip), FRAMES // len(clips))):
            outputs = session.step(frame)
            for name in names:
                y = outputs[name].astype(np.float64)
                axes = (0, *range(2, y.ndim))
                frames[name].append(np.stack([y.mean(axes), (y * y).mean(axes), y.min(axes), y.max(axes)]))
                counts[name] += y.size // y.shape[1]
        context.progress("measuring biases", (number + 1) / len(clips))
    offsets = []
    for name in names:
        (mean, square), lowest = np.mean(frames[name], 0)[:2], np.min(frames[name], 0)[2]
        highest = np.max(frames[name], 0)[3]
        offset = lowest - MARGIN * np.sqrt(np.maximum(square - mean * mean, 0.0))
        high = (offset > TOLERANCE * np.abs(highest)) & (counts[name] >= VALUES)
        offsets.append(np.where(high, offset, 0.0))
    return offsets
