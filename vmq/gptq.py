"""Weights of a layer rounded column by column, each column's error passed on to those that are still to come.

With x the float layer's input and x' that of the quantized one, both less their means, over many positions:

    H  = E x' x'^T                                  and H + d I where it is inverted for Q
    W* = W + a W E(x - x') x'^T (H + 5 d I)^-1      with a = 1 what gives W x from x' with the least square error (Li et
                                                    al. 2025, GPTAQ, arXiv:2504.02692)
    Q  = columns of W* in order of falling H_ii, rounded one after the other; what is not rounded yet makes up for the
         error as far as it can (Frantar et al. 2022, GPTQ, arXiv:2210.17323)
    b' = b + W E x - Q E x'                         so that the mean stays

Where scales may change, each channel gets the one of several with the least (q - w*) H (q - w*)^T, q and w* its rows of
Q and W*; then in turns the scale that suits its integers best, and each integer that suits the others best (coordinate
descent: Behdin et al. 2023, QuantEase, arXiv:2309.01885).

The least square error is not the best for what follows: it makes noisy inputs count for less, and at 4-bit activations
a whole network of such layers fades. A part of the way keeps the gain without that.

One pass over the data instead of thousands of gradient steps. Means are left in where there is no bias to put the
difference into.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vmq.graph import Constant

POSITIONS = 1024
"""About so many positions of a picture are looked at."""
DAMPING = 0.01
"""d as a share of the mean of H_ii ..."""
SHARE = 0.3
"""a, how much of the errors before it a layer makes up for."""
EXACT = 1e-9
"""Of the power of the strongest inputs, so much is added to every H_ii: an input may be constant."""
FEW = 0.3
"""... and so much more for each input that a position of the sample stands for."""
BLOCK = 64
"""Columns whose errors are passed on together."""
FACTORS = (0.7, 0.8, 0.9, 1.1, 1.2)
"""What scales are multiplied by, in turn."""
TURNS = 3
"""How often scales and integers are fitted to each other."""
MOST_INPUTS = 4608
"""Inputs of a layer, at most: 512 channels under 3x3. H and all that is made of it take some 100 bytes for each pair,
and the frames that are looked at do not tell many more inputs apart."""


@dataclass(frozen=True)
class Layer:
    """How a layer multiplies: y[g,o] = sum over k of weight[g,o,k] * column[g,k] at every position.

    Attributes:
        columns: of the layer's input [N,...] and an offset, the columns [G,K,positions] under it.
        split: the weight as [G,O,K].
        join: and back.
    """

    columns: Callable[[Tensor, Sequence[float]], Tensor]
    split: Callable[[Tensor], Tensor]
    join: Callable[[Tensor], Tensor]


def layer_of(node: Any, shape: Sequence[int]) -> Layer | None:
    """How a node with a constant weight of some shape multiplies; None where it is unknown, or has too many inputs."""
    attrs = node.attrs
    if node.op == "Conv" and len(shape) == 4 and attrs.get("auto_pad", "NOTSET") == "NOTSET":
        groups, kernel = attrs.get("group", 1), (shape[2], shape[3])
        stride, dilation = (tuple(attrs.get(key, (1, 1))) for key in ("strides", "dilations"))
        top, left, bottom, right = attrs.get("pads", (0, 0, 0, 0))
        if math.prod(shape[1:]) > MOST_INPUTS:
            return None

        def columns(x: Tensor, offset: Sequence[float]) -> Tensor:
            x = F.pad(x, (left, right, top, bottom))
            size = [(n - d * (k - 1) - 1) // s + 1
                    for n, d, k, s in zip(x.shape[2:], dilation, kernel, stride, strict=True)]
            skip = max(1, math.isqrt(size[0] * size[1] // POSITIONS))
            first = [int(part * min(skip, n)) * s for part, n, s in zip(offset, size, stride, strict=True)]
            found = F.unfold(x[:, :, first[0]:, first[1]:], kernel, dilation=dilation,
                             stride=(stride[0] * skip, stride[1] * skip))
            return found.movedim(0, 1).reshape(groups, found.shape[1] // groups, -1)

        return Layer(columns, lambda w: w.reshape(groups, -1, math.prod(shape[1:])), lambda w: w.reshape(tuple(shape)))
    if len(shape) == 2 and (node.op == "MatMul" or (node.op == "Gemm" and not attrs.get("transA", 0)
                                                    and attrs.get("alpha", 1.0) == 1.0)):
        turned = bool(node.op == "Gemm" and attrs.get("transB", 0))
        if shape[1 if turned else 0] > MOST_INPUTS:
            return None

        def rows(x: Tensor, offset: Sequence[float]) -> Tensor:
            x = x.reshape(-1, x.shape[-1])
            skip = max(1, len(x) // POSITIONS)
            return x[int(offset[0] * skip)::skip].T[None]

        return Layer(rows, lambda w: (w if turned else w.T)[None], lambda w: w[0] if turned else w[0].T)
    return None


@dataclass(frozen=True)
class Moments:
    """Means over positions of a layer's input, and sums of products less means: float64, [G,K] and [G,K,K].

    Those of several parts of the data add up to those of all of it (Chan et al. 1979).

    Attributes:
        count: positions.
        ours, off: means of x' and of x - x'.
        square: sum of (x' - E x') (x' - E x')^T.
        cross: sum of (x - x' - E(x - x')) (x' - E x')^T.
    """

    count: int
    ours: Tensor
    off: Tensor
    square: Tensor
    cross: Tensor

    @classmethod
    def of(cls, ours: Tensor, theirs: Tensor) -> Moments:
        """Those of columns [G,K,positions] of the quantized and the float network."""
        off = theirs - ours
        mean, mean_off = (x.mean(2, dtype=torch.float64) for x in (ours, off))
        ours, off = (x - m[:, :, None].to(x.dtype) for x, m in ((ours, mean), (off, mean_off)))
        turned = ours.transpose(1, 2)       # without its mean it is small, and float32 is enough
        return cls(ours.shape[2], mean, mean_off, (ours @ turned).double(), (off @ turned).double())

    def add(self, other: Moments) -> Moments:
        """Those of both, in place of this one's."""
        count = self.count + other.count
        apart, apart_off = other.ours - self.ours, other.off - self.off
        share, weight = other.count / count, self.count * other.count / count
        row = apart[:, None, :] * weight
        return Moments(count, self.ours + share * apart, self.off + share * apart_off,
                       self.square.add_(other.square).add_(apart[:, :, None] * row),
                       self.cross.add_(other.cross).add_(apart_off[:, :, None] * row))


def round_columns(weight: Tensor, scale: Tensor, limits: tuple[int, int], moments: Moments, *, biased: bool,
                  fitted: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights for x' instead of x, before rounding and as integers, and what biases gain.

    Args:
        weight: the float layer's, [G,O,K].
        scale: [G,O,1], of the grid; its zero point is 0.
        limits: the smallest and largest integer.
        biased: the layer has a bias that can be changed.
        fitted: scales may change.

    Returns:
        W* and Q, [G,O,K] float64, b' - b, [G,O], 0 unless biased, and the scales, [G,O,1].
    """
    weight, scale, count = weight.double(), scale.double(), moments.count
    hessian, cross = moments.square / count, moments.cross / count
    power = (hessian.diagonal(dim1=1, dim2=2) + moments.ours.square()).mean(1)
    if not biased:
        hessian = hessian + moments.ours[:, :, None] * moments.ours[:, None, :]
        cross = cross + moments.off[:, :, None] * moments.ours[:, None, :]
    inputs = hessian.shape[1]
    mean = hessian.diagonal(dim1=1, dim2=2).mean(1)
    damping = (DAMPING + FEW * inputs / count) * mean + EXACT * power.max().clamp(min=EXACT)
    unit = torch.eye(inputs, dtype=hessian.dtype, device=hessian.device) * damping[:, None, None]
    made_up = torch.linalg.solve(hessian + 5.0 * unit, (weight @ cross).transpose(1, 2)).transpose(1, 2)
    wanted = weight + SHARE * made_up
    hessian = hessian + unit
    columns = _ColumnsInTurn(hessian, limits)
    steps = columns.rounded(wanted / scale)
    if fitted:
        steps, scale = _fitted(wanted, scale, steps, columns)
    gain = torch.zeros_like(weight[:, :, 0])
    if biased:
        gain = (weight @ (moments.ours + moments.off)[:, :, None] - (steps * scale) @ moments.ours[:, :, None])[:, :, 0]
    return wanted, steps, gain, scale


def _fitted(wanted: Tensor, scale: Tensor, steps: Tensor, columns: _ColumnsInTurn) -> tuple[Tensor, Tensor]:
    """Integers and scales that lose less than those that are given."""
    first, least = scale, columns.lost(wanted, steps, scale)
    for factor in FACTORS:
        other = columns.rounded(wanted / (first * factor))
        lost = columns.lost(wanted, other, first * factor)
        better = lost < least
        least, scale, steps = (torch.where(better, a, b) for a, b in (
            (lost, least), (first * factor, scale), (other, steps)))
    for _ in range(TURNS):
        pull = steps @ columns.hessian
        best = (pull * wanted).sum(2, keepdim=True) / (pull * steps).sum(2, keepdim=True)
        scale = torch.where((best > 0.5 * first) & (best < 2.0 * first), best, scale)
        steps = columns.improved(wanted / scale, steps)
    return steps, scale


class _ColumnsInTurn:
    """Integers for weights [G,O,K] in units of their steps, column after column.

    Args:
        hessian: [G,K,K].
        limits: the smallest and largest integer.
    """

    def __init__(self, hessian: Tensor, limits: tuple[int, int]) -> None:
        self.hessian, self.limits = hessian, limits
        self.order = hessian.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True)
        rows = hessian.gather(1, self.order[:, :, None].expand_as(hessian))
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(rows.gather(2, self.order[:, None].expand_as(hessian))))
        self.upper = torch.linalg.cholesky(inverse).mT      # row i: how the rest makes up for an error in column i

    def rounded(self, steps: Tensor) -> Tensor:
        """GPTQ: those whose input is strongest come first, the rest makes up for their errors."""
        left = steps.gather(2, self.order[:, None].expand_as(steps)).clone()
        done = torch.empty_like(left)
        for start in range(0, left.shape[2], BLOCK):
            stop = min(left.shape[2], start + BLOCK)
            errors = torch.empty_like(left[:, :, start:stop])
            for k in range(start, stop):
                done[:, :, k] = left[:, :, k].round().clamp_(*self.limits)
                errors[:, :, k - start] = (left[:, :, k] - done[:, :, k]) / self.upper[:, k, k, None]
                left[:, :, k:stop] -= errors[:, :, k - start, None] * self.upper[:, None, k, k:stop]
            left[:, :, stop:] -= errors @ self.upper[:, start:stop, stop:]
        return done.gather(2, self.order.argsort(dim=1)[:, None].expand_as(steps))

    def improved(self, wanted: Tensor, steps: Tensor) -> Tensor:
        """Coordinate descent: each integer becomes the best beside all others as they are."""
        steps, pull = steps.clone(), (wanted - steps) @ self.hessian
        for start in range(0, steps.shape[2], BLOCK):
            stop = min(steps.shape[2], start + BLOCK)
            moved = torch.empty_like(steps[:, :, start:stop])
            for k in range(start, stop):
                step = (steps[:, :, k] + pull[:, :, k] / self.hessian[:, k, k, None]).round().clamp_(*self.limits)
                moved[:, :, k - start] = step - steps[:, :, k]
                pull[:, :, k:stop] -= moved[:, :, k - start, None] * self.hessian[:, None, k, k:stop]
                steps[:, :, k] = step
            pull[:, :, stop:] -= moved @ self.hessian[:, start:stop, stop:]
        return steps

    def lost(self, wanted: Tensor, steps: Tensor, scale: Tensor) -> Tensor:
        """The square error of each channel's result, [G,O,1]."""
        off = steps * scale - wanted
        return ((off @ self.hessian) * off).sum(2, keepdim=True)


def bias_of(node: Any) -> Constant | None:
    """A layer's own constant bias, or None."""
    value = node.inputs[2] if len(node.inputs) > 2 else None
    return value if isinstance(value, Constant) and len(value.outputs) == 1 else None
