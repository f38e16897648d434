"""Layers rounded one after the other, each on what those before it give (columns by vmq/gptq.py).

A layer's weight becomes W*, as near to it as rounds to Q, and its bias b': learning can start from there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vmq import processes
from vmq.fakequant import FakeQuantize, along, grid_scale
from vmq.gptq import Moments, bias_of, layer_of, round_columns
from vmq.lanes import LANES, Lanes
from vmq.learning import SETTLED
from vmq.shadow import Shadow

RECENT, KEPT = 4, 1 << 29
"""So many of the values that layers read are kept for each frame, if those of all frames take no more bytes than that:
what lies behind them, past a shortcut as well, is computed from there."""


@dataclass(frozen=True)
class Frames:
    """The frames that are looked at.

    Attributes:
        given: of frame k, all that the layers are computed from, by name: ours, and the float network's.
        offsets: of each, two numbers in [0,1) that say which positions are looked at.
    """

    given: Callable[[int], tuple[dict[str, Tensor], dict[str, Tensor]]]
    offsets: Sequence[Sequence[float]]


@torch.no_grad()
def round_layers(shadow: Shadow, exact: Shadow, layers: Sequence[tuple[Any, Any, str]], frames: Frames,
                 held: Callable[[], dict[str, Tensor]], lanes: Lanes, *, biased: bool, scaled: bool) -> None:
    """Round the weights of layers in topological order; weights that are no columns, or on shifted grids, are left.

    Args:
        shadow: the quantized network; its parameters change.
        exact: the float one.
        layers: of each layer its node in either, the second perhaps None, and the name of its weight.
        frames: what is looked at.
        held: what does not depend on a frame, such as weights on their grids, as it is now.
        lanes: to compute in.
        biased: biases may change as well.
        scaled: so may scales, of weights of less than 8 bits; on those other rules hold (passes/limit_weights.py).
    """
    recent: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = [({}, {}) for _ in frames.offsets]
    for node, twin, name in layers:
        weight, quantizer = shadow.parameter(name), shadow.quantizers[node.inputs[1].name]
        assert isinstance(quantizer, FakeQuantize)
        layer = layer_of(node, weight.shape)
        if twin is None or twin.op != node.op or layer is None or bool(quantizer.grid_zero().any()):
            continue
        fixed, read, float_read = held(), node.inputs[0].name, twin.inputs[0].name

        def moments(k: int, fixed: dict[str, Tensor] = fixed, read: str = read, float_read: str = float_read,
                    columns: Callable[[Tensor, Sequence[float]], Tensor] = layer.columns) -> Moments:
            (given, given_exact), (own, own_exact) = frames.given(k), recent[k]
            x = _read(shadow, {**fixed, **given}, own, read, len(recent))
            y = _read(exact, given_exact, own_exact, float_read, len(recent))
            return Moments.of(columns(x, frames.offsets[k]), columns(y, frames.offsets[k]))

        found, at_once = None, LANES * processes.count()
        for start in range(0, len(recent), at_once):            # each is as large as H
            for part in lanes.map(moments, range(start, min(start + at_once, len(recent)))):
                found = part if found is None else found.add(part)
        assert found is not None
        bias = bias_of(node) if biased else None
        scale = along(grid_scale(quantizer.scale), weight, quantizer.spec.axis).expand_as(weight)
        scale = layer.split(scale)[:, :, :1].double()
        float_weight = layer.split(exact.parameter(twin.inputs[1].name))
        fitted = scaled and quantizer.spec.bits < 8 and quantizer.scale.numel() == scale.numel()
        wanted, steps, gain, scale = round_columns(float_weight, scale, quantizer.limits, found,
                                                   biased=bias is not None, fitted=fitted)
        if fitted:
            quantizer.scale.copy_(scale.reshape(quantizer.scale.shape))
        near = torch.minimum(torch.maximum(wanted / scale, steps - SETTLED), steps + SETTLED)
        ends = (steps <= quantizer.limits[0]) | (steps >= quantizer.limits[1])
        weight.copy_(layer.join(torch.where(ends, steps, near) * scale))
        if bias is not None:
            float_bias = bias_of(twin)
            start_at = exact.parameter(float_bias.name) if float_bias is not None else 0.0
            shadow.parameter(bias.name).copy_(start_at + gain.reshape(-1))


def _read(shadow: Shadow, given: dict[str, Tensor], recent: dict[str, Tensor], name: str, frames: int) -> Tensor:
    """A value, computed from what is given and from values that were asked for before and have not changed since."""
    value = recent.get(name)
    if value is None:
        value = shadow.run({**given, **recent}, [name])[name]
        if value.nbytes * RECENT * 2 * frames <= KEPT:
            if len(recent) == RECENT:
                del recent[next(iter(recent))]
            recent[name] = value
    return value
