"""What is asked for, as frozen dataclasses that check themselves: bit widths, recipe, target, options."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

from vmq.errors import OptionError

CARRIER_BITS = 8
"""Width of tensors that only pass between elementwise operators: no narrower integer kernel exists."""


@dataclass(frozen=True)
class QuantSpec:
    """The integer grid of one quantizer.

    Attributes:
        bits: 4 or 8.
        signed: int8/int4 (weights, symmetric, zero point 0) or uint8/uint4 (activations, asymmetric).
        axis: the axis that has one scale a channel, or None for one scale in all.
    """

    bits: int
    signed: bool
    axis: int | None = None

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
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
                                              (8, True): np.int8, (8, False): np.uint8}
        kind: np.dtype[Any] = np.dtype(kinds[self.bits, self.signed])
        return kind

    @classmethod
    def of(cls, dtype: Any, axis: int | None = None) -> QuantSpec:
        """The grid that a zero point's element type stands for.

        Raises:
            KeyError: the type is none of int4, uint4, int8, uint8.
        """
        bits, signed = {"int4": (4, True), "uint4": (4, False), "int8": (8, True), "uint8": (8, False)}[
            np.dtype(dtype).name]
        return cls(bits, signed, axis)


@dataclass(frozen=True)
class Operands:
    """Which inputs of a multiply-add operator are quantized.

    Attributes:
        activations: indices of inputs that are activations.
        weight: index of the weight, quantized with one scale per output channel when it is constant.
    """

    activations: tuple[int, ...]
    weight: int


@dataclass(frozen=True)
class Target:
    """Where the model is to run: which operators have integer kernels there, and of what kind.

    Attributes:
        compute: multiply-add operators; their operands take the nominal bits.
        carriers: operators with uint8 kernels, every float operand and result quantized.
        movers: operators that hand on their input's integers unchanged, under the input's scale.
        absorbed: operators that vanish into the quantizer after them when they follow a compute node.
    """

    name: str
    compute: Mapping[str, Operands]
    carriers: frozenset[str]
    movers: frozenset[str]
    absorbed: frozenset[str]


# What fuses to integer kernels in the CPU execution provider of ONNX Runtime (1.24 to 1.31).
TARGETS: Mapping[str, Target] = MappingProxyType({
    "cpu": Target(
        name="cpu",
        compute=MappingProxyType({
            "Conv": Operands((0,), 1),
            "MatMul": Operands((0, 1), 1),
            "Gemm": Operands((0, 1), 1),
        }),
        carriers=frozenset({"Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool", "Sigmoid", "LeakyRelu"}),
        movers=frozenset({"Split", "Slice", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "MaxPool"}),
        absorbed=frozenset({"Relu"}),
    ),
})

CONTAINERS = ("int4cast", "int8", "int4")
"""How 4-bit weights are stored: INT4 + Cast (small and fast), INT8 (older runtimes), plain INT4 (textbook)."""

KEEPABLE = ("first", "last", "depthwise", "pooled", "recurrent")
"""Layers that `--keep WHAT=BITS` can name, all found from topology."""


@dataclass(frozen=True)
class Bits:
    """Nominal widths of the operands of Conv, MatMul and Gemm.

    Attributes:
        weights, activations: 4 or 8.
    """

    weights: int
    activations: int

    def __post_init__(self) -> None:
        for bits in (self.weights, self.activations):
            if bits not in (4, 8):
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
        raise OptionError(f"--bits {text} is not known; give 8, 4, w4a8 or w8a4")

    def __str__(self) -> str:
        return f"W{self.weights}A{self.activations}"


@dataclass(frozen=True)
class Recipe:
    """How quantization parameters are found; a small TOML file.

    Attributes:
        name: what reports call it.
        range_norm: p of the range search, which minimises the mean of |error|^p.
        range_steps: how many ranges are tried, as equal shares of the full one.
        samples: values kept of each tensor over all calibration frames.
        frames: calibration frames at most; of longer footage, stretches spread evenly over it.
        bias_frames: frames that layers' means are compared on to correct their biases; 0 leaves biases alone.
    """

    name: str
    range_norm: float = 2.4
    range_steps: int = 100
    samples: int = 131_072
    frames: int = 1024
    bias_frames: int = 64

    def __post_init__(self) -> None:
        if not 1.0 <= self.range_norm <= 10.0:
            raise OptionError(f"recipe {self.name}: range_norm is {self.range_norm}; give 1 to 10")
        if not 2 <= self.range_steps <= 10_000:
            raise OptionError(f"recipe {self.name}: range_steps is {self.range_steps}; give 2 to 10000")
        if not 1024 <= self.samples <= 1 << 24:
            raise OptionError(f"recipe {self.name}: samples is {self.samples}; give 1024 to 16777216")
        if not 1 <= self.frames <= 1 << 24:
            raise OptionError(f"recipe {self.name}: frames is {self.frames}; give 1 to 16777216")
        if not 0 <= self.bias_frames <= 1 << 20:
            raise OptionError(f"recipe {self.name}: bias_frames is {self.bias_frames}; give 0 to 1048576")

    @classmethod
    def load(cls, name: str) -> Recipe:
        """The recipe of that name that ships with vmq, or the TOML file of that path.

        Raises:
            OptionError: no such recipe, or a key or value that does not belong there.
        """
        shipped = {p.stem: p for p in sorted((Path(__file__).parent / "recipes").glob("*.toml"))}
        path = shipped.get(name, Path(name))
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except tomllib.TOMLDecodeError as error:
            raise OptionError(f"recipe {path} is not valid TOML: {error}") from error
        except (OSError, ValueError) as error:
            raise OptionError(f"recipe {name!r} is neither one of {', '.join(shipped)} nor a readable TOML file") \
                from error
        kinds = {"range_norm": float, "range_steps": int, "samples": int, "frames": int, "bias_frames": int}
        known = {f.name for f in fields(cls)} - {"name"}
        for key, value in table.items():
            if key not in known:
                raise OptionError(f"recipe {path}: unknown key {key!r}; known are {', '.join(sorted(known))}")
            if isinstance(value, bool) or not isinstance(value, (int, kinds[key])):
                raise OptionError(f"recipe {path}: {key} is {value!r}; give a number")
        return cls(name=path.stem, **table)


@dataclass(frozen=True)
class Options:
    """Everything that decides what a compile writes.

    Attributes:
        bits, recipe, target, container, seed: see their types.
        size: (height, width) in pixels that free dimensions are bound to; None keeps a static model's.
        downsample_ratio: what an input for the ratio is bound to, in (0, 1].
        keep: width of layers that stay wider (or become narrower) than nominal, by `KEEPABLE` or node name.
        pairs: state inputs and outputs paired by hand, where topology alone is ambiguous.
    """

    bits: Bits = field(default_factory=lambda: Bits(8, 8))
    recipe: Recipe = field(default_factory=lambda: Recipe("mse"))
    target: Target = field(default_factory=lambda: TARGETS["cpu"])
    container: str = "int4cast"
    size: tuple[int, int] | None = None
    downsample_ratio: float | None = None
    keep: Mapping[str, int] = field(default_factory=dict)
    pairs: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.container not in CONTAINERS:
            raise OptionError(f"--container {self.container} is not known; give one of {', '.join(CONTAINERS)}")
        if self.size is not None and not all(16 <= n <= 16384 for n in self.size):
            raise OptionError(f"--size {self.size[1]}x{self.size[0]} is out of range; give 16 to 16384 pixels a side")
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
            "bits": str(self.bits), "recipe": self.recipe.name, "target": self.target.name,
            "container": self.container, "size": list(self.size) if self.size else None,
            "downsample_ratio": self.downsample_ratio, "keep": dict(self.keep), "pairs": dict(self.pairs),
            "seed": self.seed,
        }
