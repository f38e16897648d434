"""What is asked for, as frozen dataclasses that check themselves: bit widths, effort, options."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from vmq.errors import OptionError
from vmq.recipe import Recipe
from vmq.targets import TARGETS, Target

CARRIER_BITS = 8
"""Width of tensors that only pass between elementwise operators: no narrower integer kernel exists."""


@dataclass(frozen=True)
class QuantSpec:
    """The integer grid of one quantizer.

    Attributes:
        bits: 4 or 8, for activations also 16.
        signed: int8/int4 (weights, symmetric, zero point 0) or uint16/uint8/uint4 (activations, asymmetric).
        axis: the axis that has one scale a channel, or None for one scale in all.
    """

    bits: int
    signed: bool
    axis: int | None = None

    def __post_init__(self) -> None:
        if self.bits not in ((4, 8) if self.signed else (4, 8, 16)):
            raise OptionError(f"{self.bits} bits were asked for; vmq quantizes to 4 or 8")

    @property
    def qmin(self) -> int:
        """Smallest integer of the grid."""
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def qmax(self) -> int:
        """Largest integer of the grid."""
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    @property
    def dtype(self) -> np.dtype[Any]:
        """The element type that says this width in a graph."""
        kinds: dict[tuple[int, bool], Any] = {(4, True): ml_dtypes.int4, (4, False): ml_dtypes.uint4,
                                              (8, True): np.int8, (8, False): np.uint8, (16, False): np.uint16}
        kind: np.dtype[Any] = np.dtype(kinds[self.bits, self.signed])
        return kind

    @classmethod
    def of(cls, dtype: Any, axis: int | None = None) -> QuantSpec:
        """The grid that a zero point's element type stands for.

        Raises:
            KeyError: the type is none of int4, uint4, int8, uint8, uint16.
        """
        bits, signed = {"int4": (4, True), "uint4": (4, False), "int8": (8, True), "uint8": (8, False),
                        "uint16": (16, False)}[np.dtype(dtype).name]
        return cls(bits, signed, axis)


SIDE = 16384
"""Pixels of a frame's side, at most."""
PIXELS = 1 << 25
"""Pixels of a frame, at most: a little more than 8K has."""


def check_size(size: tuple[int | None, int | None]) -> str:
    """In which way a frame of (height, width) pixels, None where that is free, is too large; empty if it is not."""
    known = [n or 1 for n in size]
    if max(known) > SIDE:
        return f"more than {SIDE} pixels a side"
    return f"more than {PIXELS / 1e6:.1f} million pixels" if math.prod(known) > PIXELS else ""


DEVICES = ("cpu", "cuda")
"""Where learning computes."""
STATES = ("float32", "uint8")
"""Types that recurrent states may have between frames."""
KEEPABLE = ("first", "last", "depthwise", "pooled", "recurrent")
"""Layers that `--keep WHAT=BITS` can name, all found from topology."""


@dataclass(frozen=True)
class Bits:
    """Nominal widths of the operands of Conv, MatMul and Gemm.

    Attributes:
        weights: 4 or 8.
        activations: 4 or 8; 16 for single layers where a target needs it.
    """

    weights: int
    activations: int

    def __post_init__(self) -> None:
        for bits, known in ((self.weights, (4, 8)), (self.activations, (4, 8, 16))):
            if bits not in known:
                raise OptionError(f"{bits} bits were asked for; vmq quantizes to 4 or 8")

    @classmethod
    def parse(cls, text: str | int) -> Bits:
        """Read `8` (W8A8), `4` (W4A4) or `w4a8`.

        Raises:
            OptionError: anything else.
        """
        word = str(text).strip().lower()
        if word in ("4", "8"):
            return cls(int(word), int(word))
        if len(word) == 4 and word[0] == "w" and word[2] == "a" and word[1] in "48" and word[3] in "48":
            return cls(int(word[1]), int(word[3]))
        raise OptionError(f"--bits {text} is not known; give 8, 4, w4a8, w8a4, or auto with a --budget")

    def __str__(self) -> str:
        return f"W{self.weights}A{self.activations}"


@dataclass(frozen=True)
class Budget:
    """What `--bits auto` may spend.

    Attributes:
        text: as it was given.
        of: "size" (bytes of the file) or "bops" (bit operations of a frame, see vmq/cost.py).
        amount: bytes or bit operations; or of `share`, the share of what W8A8 takes.
        share: see `amount`.
    """

    text: str
    of: str
    amount: float
    share: bool = False

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read a file size such as `2.6MB`, bit operations such as `120GBOPs`, or their share of W8A8's such as `50%`.

        Raises:
            OptionError: anything else.
        """
        known = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*([kmgt]?)(b|bops|%)", text.strip().lower())
        amount = float(known[1]) if known else 0.0
        if known is None or (known[2] and known[3] == "%") or amount == 0.0 or (known[3] == "%" and amount >= 100.0):
            raise OptionError(f"--budget {text} is not known; give {BUDGETS}")
        if known[3] == "%":
            return cls(text, "bops", amount / 100.0, share=True)
        return cls(text, "size" if known[3] == "b" else "bops", amount * 1000.0 ** " kmgt".index(known[2] or " "))

    def limit(self, whole: float) -> float:
        """Bytes or bit operations at most, if W8A8 takes `whole`."""
        return self.amount * whole if self.share else self.amount

    def says(self, cost: float, whole: float) -> str:
        """A cost in the words of the budget, rounded up."""
        if self.share:
            return f"{math.ceil(cost / whole * 1e3) / 10:g}%"
        power = next((p for p in (4, 3, 2) if cost >= 1000.0**p), 1)
        letter = " kMGT"[power] if self.of == "bops" else " KMGT"[power]
        return f"{math.ceil(cost / 1000.0**power * 100) / 100:g}{letter}{'B' if self.of == 'size' else 'BOPs'}"


BUDGETS = "a file size such as 2.6MB, bit operations of a frame such as 120GBOPs, or their share of W8A8's such as 50%"
"""What `--budget` takes, in words."""


def parse_bits(bits: str | int, budget: str | None) -> tuple[Bits, Budget | None]:
    """What `--bits` and `--budget` say together. With auto the bits are the narrowest that a layer may get.

    Raises:
        OptionError: one of them is not known, or goes without the other.
    """
    if str(bits).strip().lower() != "auto":
        if budget is not None:
            raise OptionError(f"--budget {budget} is for --bits auto, not --bits {bits}; leave one of them out")
        return Bits.parse(bits), None
    if budget is None:
        raise OptionError(f"--bits auto needs a --budget: {BUDGETS}")
    return Bits(4, 4), Budget.parse(budget)


@dataclass(frozen=True)
class Chosen:
    """The widths that passes/choose_bits.py has chosen for a closure.

    Attributes:
        name, nodes: of the closure, as `find_closures` gave them.
        bits: of its layers, where `keep` says nothing else.
        sensitivity: by widths, how far they alone move alpha, in mean |alpha - alpha of W8A8| x 1e3.
    """

    name: str
    nodes: tuple[str, ...]
    bits: Bits
    sensitivity: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Widths and sensitivity in plain JSON types."""
        return {"bits": str(self.bits), "sensitivity": dict(self.sensitivity)}


@dataclass(frozen=True)
class Normalization:
    """What a model takes instead of RGB in 0..1: (frame - mean) / std, as torchvision's Normalize.

    Attributes:
        mean, std: of red, green and blue; one number stands for all three.
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        for name, numbers in (("mean", self.mean), ("std", self.std)):
            if len(numbers) not in (1, 3) or not np.isfinite(numbers).all() or (name == "std" and min(numbers) <= 0.0):
                raise OptionError(f"--{name} {','.join(f'{n:g}' for n in numbers)}: give one number or three"
                                  f"{', above 0' if name == 'std' else ''}")

    def __call__(self, frames: NDArray[np.float32]) -> NDArray[np.float32]:
        """Frames [...,3,H,W] in 0..1 as the model takes them."""
        mean, std = (np.asarray(numbers, np.float32)[:, None, None] for numbers in (self.mean, self.std))
        result: NDArray[np.float32] = (frames - mean) / std
        return result

    def to_json(self) -> dict[str, Any]:
        """Mean and standard deviation in plain JSON types."""
        return {"mean": list(self.mean), "std": list(self.std)}


def parse_normalization(mean: float | Sequence[float] | None, std: float | Sequence[float] | None,
                        ) -> Normalization | None:
    """What `--mean` and `--std` say together; None where neither is given.

    Raises:
        OptionError: neither one number nor three, or a std of 0 or less.
    """
    if mean is None and std is None:
        return None
    return Normalization(*(tuple(map(float, np.atleast_1d(default if given is None else given)))
                           for given, default in ((mean, 0.0), (std, 1.0))))


@dataclass(frozen=True)
class Effort:
    """How much work a compile takes; times are of RVM at 512x288 on two cores.

    Attributes:
        calibration: frames that ranges are found on, at most; of longer footage, stretches spread evenly over it.
        bias_frames: frames that layers' means are compared on.
        sequences, frames: sequences that blocks are learned on, and frames of each.
        block_iterations, block_batch: steps that a block takes, and frames in each.
        steps, batch, unrolled: steps of the whole network, sequences in each, and frames with gradient of each.
        gates: how often closed-loop error is looked at while the whole network is calibrated.
        loop_frames: frames that the result is verified on in closed loop.
    """

    name: str
    calibration: int
    bias_frames: int
    sequences: int
    frames: int
    block_iterations: int
    block_batch: int
    steps: int
    batch: int
    unrolled: int
    gates: int
    loop_frames: int


EFFORTS: Mapping[str, Effort] = MappingProxyType({e.name: e for e in (
    Effort("fast", calibration=64, bias_frames=16, sequences=12, frames=4, block_iterations=50, block_batch=4,
           steps=30, batch=2, unrolled=3, gates=3, loop_frames=64),
    Effort("standard", calibration=256, bias_frames=64, sequences=32, frames=8, block_iterations=100, block_batch=8,
           steps=280, batch=2, unrolled=3, gates=5, loop_frames=160),
    Effort("thorough", calibration=1024, bias_frames=256, sequences=128, frames=8, block_iterations=20_000,
           block_batch=32, steps=4000, batch=8, unrolled=6, gates=20, loop_frames=512),
)})
"""What `--effort` names: minutes, tens of minutes, days (what the authors of the methods do on GPUs)."""


@dataclass(frozen=True)
class Options:
    """Everything that decides what a compile writes.

    Attributes:
        bits, recipe, effort, target, seed: see their types.
        budget: choose the widths of each closure within this, not below `bits`; None: all have `bits`.
        container: how 4-bit weights are stored; empty: the target's best way.
        size: (height, width) in pixels that free dimensions are bound to; None keeps a static model's.
        downsample_ratio: what an input for the ratio is bound to, in (0, 1].
        keep: width of layers that stay wider (or become narrower) than nominal, by `KEEPABLE` or node name.
        pairs: state inputs and outputs paired by hand, where topology alone is ambiguous.
        device: where learning computes, one of `DEVICES`.
        state: the type that recurrent states have between frames, one of `STATES`.
        normalization: what the model takes instead of RGB in 0..1; None: what its metadata say, or RGB in 0..1.
    """

    bits: Bits = field(default_factory=lambda: Bits(8, 8))
    recipe: Recipe = field(default_factory=lambda: Recipe("plain"))
    effort: Effort = EFFORTS["standard"]
    target: Target = field(default_factory=lambda: TARGETS["cpu"])
    container: str = ""
    size: tuple[int, int] | None = None
    downsample_ratio: float | None = None
    keep: Mapping[str, int] = field(default_factory=dict)
    pairs: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0
    device: str = "cpu"
    state: str = "float32"
    budget: Budget | None = None
    normalization: Normalization | None = None

    def __post_init__(self) -> None:
        if self.state not in STATES:
            raise OptionError(f"--state {self.state} is not known; give one of {', '.join(STATES)}")
        if self.device not in DEVICES:
            raise OptionError(f"--device {self.device} is not known; give one of {', '.join(DEVICES)}")
        if not self.container:
            object.__setattr__(self, "container", self.target.containers[0])
        if self.container not in self.target.containers:
            raise OptionError(f"--container {self.container} is not known for --target {self.target.name}; give one of "
                              f"{', '.join(self.target.containers)}")
        if self.size is not None and (min(self.size) < 16 or check_size(self.size)):
            raise OptionError(f"--size {self.size[1]}x{self.size[0]} is out of range; give 16 to {SIDE} pixels a side, "
                              f"and at most {PIXELS / 1e6:.1f} million in all")
        if self.downsample_ratio is not None and not 0.0 < self.downsample_ratio <= 1.0:
            raise OptionError(f"--downsample-ratio {self.downsample_ratio} is out of range; give above 0 to 1")
        if self.seed < 0:
            raise OptionError(f"--seed {self.seed}: give 0 or more")
        for what, bits in self.keep.items():
            if bits not in (4, 8):
                raise OptionError(f"--keep {what}={bits}: give 4 or 8 bits")

    def describe(self) -> dict[str, Any]:
        """The options in plain JSON types, for reports and metadata."""
        return {
            "bits": "auto" if self.budget else str(self.bits), "recipe": self.recipe.name,
            "effort": self.effort.name, "target": self.target.name,
            "container": self.container, "size": list(self.size) if self.size else None,
            "downsample_ratio": self.downsample_ratio, "keep": dict(self.keep), "pairs": dict(self.pairs),
            "seed": self.seed, "device": self.device, "state": self.state,
            "budget": self.budget.text if self.budget else None,
            "normalization": self.normalization.to_json() if self.normalization else None,
        }
