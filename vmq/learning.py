"""What can be learned of a quantized graph, by kind, and how each kind is parametrized.

    weight         the float weight behind a quantizer, straight through its rounding
    rounding       up or down, for each weight: AdaRound's soft rounding (`SoftRounding`)
    weight_scale   scale of a weight, a channel at a time
    scale, zero    scale and zero point of a 4-bit activation (LSQ, LSQ+); those of 8-bit ones are as good as found.
                   What is never negative, as behind a Relu, keeps its zero point, the lower end of the grid:
                   elsewhere it would cost a level
    bias           of a layer

Rates are relative: a step of 1 is as long as a quantization step for weights and biases, as the scale itself for
scales, and one integer for zero points. One rate then suits tensors whose values differ a thousandfold.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmq.fakequant import FakeQuantize, along, grid_scale, grid_zero
from vmq.graph import Constant, Graph
from vmq.lanes import generator
from vmq.layers import never_negative
from vmq.shadow import Shadow

KINDS = ("weight", "rounding", "weight_scale", "scale", "zero", "bias")
"""What a recipe may name under `learn`."""
SETTLED = 0.3
"""Where rounding is decided, weights stay at most so many steps from where they are rounded to, and so some way from
being rounded elsewhere."""


@dataclass(frozen=True)
class Parameter:
    """A parameter of the shadow.

    Attributes:
        kind: one of `KINDS`.
        constant: name of the graph's constant that it stands for.
        parameter: the parameter itself.
        unit: length of a step of rate 1, a number or one per channel in a shape that broadcasts.
    """

    kind: str
    constant: str
    parameter: nn.Parameter
    unit: Tensor


def parameters(shadow: Shadow, kinds: Collection[str], nodes: Collection[str] | None = None) -> list[Parameter]:
    """The parameters of these kinds that quantizers and layers of the shadow's graph have, each once.

    Args:
        nodes: names of the QuantizeLinear nodes and of the layers that count; None: all.
    """
    found: dict[str, Parameter] = {}
    for node in shadow.graph.nodes:
        if nodes is not None and node.name not in nodes:
            continue
        if node.op == "QuantizeLinear":
            scale, constant = shadow.parameter(node.inputs[1].name), isinstance(node.inputs[0], Constant)
            unit = grid_scale(scale)
            if constant and node.attrs.get("axis") is not None:
                weight = shadow.parameter(node.inputs[0].name)
                _add(found, kinds, "weight", node.inputs[0].name, weight, along(unit, weight, node.attrs["axis"]))
                _add(found, kinds, "weight_scale", node.inputs[1].name, scale, unit)
            elif not constant and np.dtype(node.inputs[2].dtype).name == "uint4":
                _add(found, kinds, "scale", node.inputs[1].name, scale, unit)
                if not never_negative(node.inputs[0]):
                    zero = shadow.parameter(node.inputs[2].name)
                    _add(found, kinds, "zero", node.inputs[2].name, zero, torch.ones(()))
        elif len(node.inputs) > 2 and isinstance(node.inputs[2], Constant) and _step_of(node) is not None:
            bias = shadow.parameter(node.inputs[2].name)
            _add(found, kinds, "bias", node.inputs[2].name, bias, torch.full_like(bias.detach(), _step_of(node) or 1.0))
    return list(found.values())


def _add(found: dict[str, Parameter], kinds: Collection[str], kind: str, name: str, parameter: nn.Parameter,
         unit: Tensor) -> None:
    if kind in kinds and not any(p.parameter is parameter for p in found.values()):
        found.setdefault(name, Parameter(kind, name, parameter, unit.detach().clone()))


def _step_of(node: Any) -> float | None:
    """A step of a layer's result, as the next quantizer sees it; None where no quantized layer is."""
    source = node.inputs[1].inputs
    if not source or source[0].op != "DequantizeLinear":
        return None
    todo, seen = list(node.outputs[0].outputs), 0
    while todo and seen < 8:
        reader = todo.pop(0)
        seen += 1
        if reader.op == "QuantizeLinear":
            return float(np.max(reader.inputs[1].values))
        todo += [r for o in reader.outputs for r in o.outputs]
    return 1.0 / 255.0


class Adam:
    """Adam (Kingma and Ba 2015) with the relative rates of this module and a schedule from outside.

    Args:
        learned: what is learned.
        rates: rate of each kind, in the units above.
    """

    def __init__(self, learned: Iterable[Parameter], rates: Mapping[str, float],
                 betas: tuple[float, float] = (0.9, 0.999)) -> None:
        self.learned, self.rates, self.betas, self.count = list(learned), rates, betas, 0
        self.state = [(torch.zeros_like(p.parameter), torch.zeros_like(p.parameter)) for p in self.learned]

    @torch.no_grad()
    def step(self, share: float = 1.0, constant: Collection[str] = ()) -> None:
        """Move every parameter that has a gradient, by `share` of its rate; all of it for `constant` kinds."""
        self.count += 1
        one, two = self.betas
        for item, (mean, square) in zip(self.learned, self.state, strict=True):
            gradient = item.parameter.grad
            if gradient is None:
                continue
            mean.lerp_(gradient, 1.0 - one)
            square.mul_(two).addcmul_(gradient, gradient, value=1.0 - two)
            root = (square / (1.0 - two ** self.count)).sqrt_().add_(1e-12)
            rate = (1.0 if item.kind in constant else share) * self.rates[item.kind] / (1.0 - one ** self.count)
            item.parameter.sub_((mean / root).mul_(item.unit * rate))
            item.parameter.grad = None

    def tensors(self) -> list[Tensor]:
        """All that a checkpoint must hold: parameters and moments."""
        return [t.detach() for p, s in zip(self.learned, self.state, strict=True) for t in (p.parameter, *s)]


class SoftRounding(nn.Module):
    """A weight quantizer that learns for each weight whether it is rounded up or down (Nagel et al. 2020, AdaRound).

        y = scale * clip(floor(w / scale) + h(v), low, high),   h(v) = clip(1.2 * sigmoid(v) - 0.1, 0, 1)   eq. 22, 23

    Scales may be learned along; floor(w / scale) stays what it was.
    """

    def __init__(self, quantizer: FakeQuantize, weight: Tensor) -> None:
        super().__init__()
        self.quantizer, self.limits = quantizer, quantizer.limits
        scale = along(grid_scale(quantizer.scale), weight, quantizer.spec.axis)
        zero = along(grid_zero(quantizer.zero, quantizer.spec), weight, quantizer.spec.axis)
        self.low, self.high = self.limits[0] - zero, self.limits[1] - zero
        steps = weight.detach() / scale
        self.floor = steps.floor()
        self.v = nn.Parameter(torch.logit(((steps - self.floor).clamp(0.001, 0.999) + 0.1) / 1.2))

    def up(self) -> Tensor:
        """h(v): how far each weight is rounded up, 0 to 1."""
        return torch.clamp(1.2 * torch.sigmoid(self.v) - 0.1, 0.0, 1.0)

    def forward(self, weight: Tensor) -> Tensor:
        """The softly rounded weight; what is given is not looked at."""
        scale = along(self.quantizer.scale, weight, self.quantizer.spec.axis).clamp(min=1e-30)
        return torch.minimum(torch.maximum(self.floor + self.up(), self.low), self.high) * scale

    def undecided(self, sharpness: float) -> Tensor:
        """The regulariser sum(1 - |2 h(v) - 1|^sharpness), eq. 24."""
        return (1.0 - (2.0 * self.up() - 1.0).abs().pow(sharpness)).sum()

    @torch.no_grad()
    def settle(self, weight: Tensor) -> None:
        """Move the weight to where rounding to nearest gives what was learned, as far as `SETTLED` asks for."""
        scale = along(grid_scale(self.quantizer.scale), weight, self.quantizer.spec.axis)
        steps = torch.minimum(torch.maximum(self.floor + (self.up() >= 0.5), self.low), self.high)
        low, high = ((steps + side).mul_(scale) for side in (-SETTLED, SETTLED))
        low = torch.where(steps <= self.low, torch.full_like(low, -torch.inf), low)
        high = torch.where(steps >= self.high, torch.full_like(high, torch.inf), high)
        weight.copy_(torch.minimum(torch.maximum(weight, low), high))


class Dropped(nn.Module):
    """An activation quantizer that lets values through unrounded, each with a probability (Wei et al. 2022, QDrop)."""

    def __init__(self, quantizer: FakeQuantize, probability: float) -> None:
        super().__init__()
        self.quantizer, self.probability = quantizer, probability

    def forward(self, x: Tensor) -> Tensor:
        """x, rounded where a coin says so."""
        return mixed(self.quantizer(x), x, self.probability)


def coarse(quantizers: Mapping[str, Callable[[Tensor], Tensor]]) -> dict[str, Callable[[Tensor], Tensor]]:
    """Stand-ins, by name, for quantizers whose steps are too fine to teach anything: they clip and do not round.

    Those are 8-bit activations. A stand-in takes a third of the time, and keeps to the range that the quantizer has.
    """
    found: dict[str, Callable[[Tensor], Tensor]] = {}
    for name, quantizer in quantizers.items():
        if isinstance(quantizer, FakeQuantize) and not quantizer.spec.signed and quantizer.limits[1] >= 255:
            zero, scale = float(grid_zero(quantizer.zero, quantizer.spec)), float(grid_scale(quantizer.scale))
            found[name] = partial(F.hardtanh, min_val=-zero * scale, max_val=(quantizer.limits[1] - zero) * scale)
    return found


def mixed(x: Tensor, exact: Tensor, probability: float) -> Tensor:
    """x with each value replaced by that of `exact` with a probability (in steps of 1/256)."""
    if probability <= 0.0:
        return x
    eights = torch.empty((x.numel() + 7) // 8, dtype=torch.int64, device=x.device)
    eights.random_(-2**63, None, generator=generator())
    chosen = eights.view(torch.uint8)[:x.numel()].view(x.shape) < min(255, round(256 * probability))
    return torch.lerp(x, exact, chosen.to(x.dtype))       # eight times faster than rand and where


def assign(graph: Graph, twin: Graph, names: Collection[str] | None = None) -> int:
    """Give a graph's constants the values of those of the same name in its twin; returns how many changed."""
    values = {c.name: c.values for c in twin.constants() if names is None or c.name in names}
    changed = 0
    for constant in graph.constants():
        value = values.get(constant.name)
        if value is not None and not np.array_equal(np.asarray(constant.values), np.asarray(value)):
            constant.values, changed = np.array(value), changed + 1
    return changed
