"""Give the channels of what convolutions read ranges that fit one grid.

An activation has one scale for all its channels. Where the largest takes values a hundred times those of the others,
as in front of depthwise convolutions, 16 levels leave the others next to none: in RVM half the channels that the
first inverted residuals read are rounded to noise louder than they are. Joined tensors share a grid, too: a state
within -1 to 1 beside features that reach 30. A channel may be multiplied by s if the weights that read it are divided
by s:

    conv(x, W) = conv(s * x, W / s)          s one number a channel

- in front of a depthwise convolution that costs nothing, as its weights have a scale a channel: all channels
  get the same range;
- elsewhere what activations gain, weights lose: s ~ w^(1-a) / r^a, with r and w the largest magnitudes of a channel
  and of the weights that read it (Xiao et al. 2023, SmoothQuant, eq. 4), and a = 1/2, or `SHARE`.

s goes into the weights that make x, where all that is tied to x can be scaled along (vmq/channels.py); into the gate
where x is gated; otherwise a Mul by a constant is put on the edge, where channels differ enough to be worth it. Such a
constant is chosen on an 8-bit grid, so that it is exact when it is quantized itself. Of what is joined each part is
scaled by itself, relative to the largest of the parts that cannot be scaled. At 8 bits only what costs no operator is
done.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from vmq import processes
from vmq.channels import Array, Scaling, is_gate, leaves, scale_columns
from vmq.graph import Constant, Graph
from vmq.pipeline import Context, Pass, PassResult
from vmq.runtime import Session
from vmq.spec import Options
from vmq.states import WEIGHTED

FRAMES = 16
"""Frames that ranges are measured on, spread over the clips."""
WARM_UP = 2
"""Frames at the start of each clip that only warm the state up."""
SPREAD = 64.0
"""No channel is multiplied by more than this relative to the largest."""
SHARE = 0.7
"""The a of 4-bit activations: how weights are rounded is learned, so theirs is the smaller error. Behind a global
pooling, where layers read few values and have many weights, it is 1/2."""
WORTH = 0.4
"""A Mul is put in where the median channel has less than this share of the largest one's range; of what is joined,
where a part has less than this share of the range of the part that it is held against, or so many times more."""
NEGATIVE = 2.0
"""Negative values count for so much: what lies below zero takes levels from all channels."""


class BalanceChannels(Pass):
    """Scale channels in front of convolutions so that one grid fits them all, and unscale their weights."""

    name: ClassVar[str] = "balance_channels"

    def run(self, graph: Graph, context: Context) -> PassResult:
        if not context.options.recipe.balance or not context.clips:
            return PassResult()
        convs = [n for n in graph.nodes if _suits(n)]
        seen = processes.first(lambda: _measure(graph, context, {n.inputs[0].name for n in convs}))
        work = _Balance(graph, context.options, seen)
        for conv in convs:
            work.balance(conv)
        return PassResult(modified=sum(work.counts.values()), report=dict(work.counts))


class _Balance:
    """What is scaled where.

    Attributes:
        counts: how many values were scaled, by where.
        narrow: layers may read 4 bits, so that an operator more is worth it.
    """

    def __init__(self, graph: Graph, options: Options, seen: dict[str, Array]) -> None:
        self.graph, self.seen = graph, seen
        self.narrow = options.bits.activations == 4 and (options.budget is None or options.budget.of == "bops")
        self.swish = "HardSwish" in options.target.forms
        self.counts = {"folded": 0, "gated": 0, "inserted": 0}
        self.alike: dict[str, NDArray[np.bool_]] = {}       # channels that fit one grid already, by value
        self.settled: dict[str, NDArray[np.bool_]] = {}     # channels that must not be scaled any more
        self.copies: dict[str, tuple[Any, Array]] = {}      # scaled by a Mul, and its factors, by value

    def balance(self, conv: Any) -> None:
        value = conv.inputs[0]
        parts = list(leaves(value))
        if self.seen[value.name].max() <= 0.0 or all(_is_picture(part) for part, _ in parts):
            return
        if value is not parts[0][0]:
            self._joined(self._wanted(conv), parts)
        elif not self._fold_for_all(value) and self.narrow:
            maker, scale = value.inputs[0], _on_grid(self._wanted(conv))
            gate = next((v for v in maker.inputs if is_gate(v)), None) if maker.op == "Mul" else None
            differ = np.median(self.seen[value.name]) < WORTH * self.seen[value.name].max()
            if gate is not None and len(value.outputs) == 1 and (differ or value.name not in self.alike):
                maker.inputs[list(maker.inputs).index(gate)] = self._times(gate, scale)
                self.counts["gated"] += 1
            elif differ:
                conv.inputs[0] = self._times(value, scale)
                self.copies[value.name] = conv.inputs[0], scale
                self.counts["inserted"] += 1
            else:
                return
            scale_columns(self.graph, conv, 1.0 / scale)

    def _wanted(self, conv: Any) -> Array:
        """Factors that a layer wants of what it reads, of geometric mean 1."""
        reach = self.seen[conv.inputs[0].name]
        wanted = 1.0 / np.maximum(reach, reach.max() / SPREAD)
        if not _is_depthwise(conv):
            weight = np.abs(conv.inputs[1].values).astype(np.float64)
            columns = weight.max(axis=(0, *range(2, weight.ndim)))
            share = SHARE if self.narrow and np.prod(conv.inputs[0].shape[2:]) > 1 else 0.5
            wanted = wanted ** share * np.maximum(columns, columns.max() / SPREAD) ** (1.0 - share)
        return np.asarray(wanted / np.exp(np.log(wanted).mean()))

    def _fold_for_all(self, value: Any) -> bool:
        """Scale a value where it is made as all layers want that read it, or what is tied to it."""
        trial = self._scaling(value)
        if not trial.possible or _touch(self.alike, trial) or _touch(self.settled, trial):
            return False
        wanted = [self._wanted(n) for n in trial.readers if n.inputs[0].name in self.seen
                  and self.seen[n.inputs[0].name].max() > 0.0 and n.inputs[0].shape[1] == value.shape[1]]
        self._apply(self._scaling(value, np.exp(np.mean(np.log(wanted), 0))), self.alike, "folded")
        return True

    def _joined(self, wanted: Array, parts: list[tuple[Any, list[int]]]) -> None:
        """Scale the parts of a Concat relative to the largest one that cannot be scaled."""
        trials = {value.name: self._scaling(value) for value, _ in parts}

        def free(value: Any) -> bool:
            return trials[value.name].possible and not _touch(self.settled, trials[value.name])

        held = [part for part in parts if not free(part[0]) and not _is_picture(part[0])]
        largest = max(held, key=lambda part: np.prod(part[0].shape), default=None)
        unit = np.exp(np.log(wanted if largest is None else wanted[largest[1]]).mean())
        for value, places in parts:
            factors = wanted[places] / unit
            if _touch(self.alike, trials[value.name]) or _touch(self.settled, trials[value.name]):
                factors = np.full_like(factors, np.exp(np.log(factors).mean()))
            if free(value):
                self._apply(self._scaling(value, factors), self.settled, "folded")
            elif self.narrow and not (value.inputs and value.inputs[0].op == "Expand") and (
                    np.median(factors) < WORTH * factors.max() or not WORTH < np.median(factors) < 1.0 / WORTH):
                self._insert(value, _on_grid(factors))

    def _insert(self, value: Any, factors: Array) -> None:
        """Put a Mul on the edges from a value to Concats, and unscale what reads them."""
        copy, factors = self.copies.get(value.name) or (self._times(value, factors), factors)
        for join in [r for r in value.outputs if r.op == "Concat"]:
            place = list(join.inputs).index(value)
            join.inputs[place] = copy
            readers = Scaling(self.graph, copy, factors, made=join)
            if readers.possible:
                self._apply(readers, self.settled, "inserted")
            else:
                join.inputs[place] = value

    def _apply(self, scaling: Scaling, kind: dict[str, NDArray[np.bool_]], where: str) -> None:
        scaling.apply()
        self.counts[where] += 1
        for name, factors in scaling.factors().items():
            kind[name] = kind.get(name, False) | (factors != 1.0)
            if name in self.seen:
                self.seen[name] = self.seen[name] * factors

    def _scaling(self, value: Any, factors: Array | None = None) -> Scaling:
        """Of a value; a trial without factors. The gate of a hardswish reads 1 / factors, on an 8-bit grid."""
        if factors is None:
            factors = np.linspace(1.5, 2.5, value.shape[1])
        swish = self.swish and any(r.op == "Conv" and _is_depthwise(r) for r in value.outputs)
        scaling = Scaling(self.graph, value, factors, swish=swish)
        return scaling if not scaling.swished else Scaling(self.graph, value, 1.0 / _on_grid(1.0 / factors), swish=True)

    def _times(self, value: Any, scale: Array) -> Any:
        factors = self.graph.constant("balance", scale.reshape(1, -1, 1, 1).astype(np.float32))
        return self.graph.add("Mul", [value, factors], f"{value.name}_balanced", shape=value.shape)


def _touch(kind: dict[str, NDArray[np.bool_]], scaling: Scaling) -> bool:
    """Whether factors would change channels of that kind."""
    return any((kind[name] & (factors != 1.0)).any() for name, factors in scaling.factors().items() if name in kind)


def _is_depthwise(conv: Any) -> bool:
    return bool(conv.attrs.get("group", 1) > 1)


def _on_grid(scale: Array) -> Array:
    """Factors on an 8-bit grid that ends with the largest."""
    steps = np.maximum(np.rint(255.0 * scale / scale.max()), 1.0)
    return np.asarray(steps * (scale.max() / 255.0))


def _is_picture(value: Any) -> bool:
    """True for what is made of the model's inputs without a layer."""
    todo, seen = [value], set[int]()
    while todo:
        for node in todo.pop().inputs:
            if node.op in WEIGHTED:
                return False
            todo += [v for v in node.inputs if id(v) not in seen]
            seen.update(id(v) for v in node.inputs)
    return True


def _suits(node: Any) -> bool:
    """An ordinary or depthwise convolution of something computed, with constant weights."""
    if node.op != "Conv" or not isinstance(node.inputs[1], Constant) or not node.inputs[0].inputs:
        return False
    shape = node.inputs[0].shape
    channels = shape[1] if shape else None
    return isinstance(channels, int) and node.attrs.get("group", 1) in (1, channels) and channels > 1


def _measure(graph: Graph, context: Context, names: Iterable[str]) -> dict[str, Array]:
    """Largest magnitude of every channel of some values, averaged over frames."""
    wanted = [v.name for v in graph.values() if v.name in set(names)]
    session = Session(graph, pairs=context.options.pairs, extra=wanted, device=context.options.device)
    sums: dict[str, Array] = {}
    clips = list(context.clips)[::max(1, len(context.clips) // 4)][:4]
    for clip in clips:
        session.reset(session.told(clip))
        for index, frame in enumerate(clip.frames(0, WARM_UP + FRAMES // len(clips))):
            outputs = session.step(frame)
            if index < min(WARM_UP, len(clip) - 1):
                continue
            for name in wanted:
                axes = (0, *range(2, outputs[name].ndim))
                reach = np.maximum(outputs[name].max(axes), -NEGATIVE * outputs[name].min(axes)).astype(np.float64)
                sums[name] = sums.get(name, 0.0) + reach
    return sums
