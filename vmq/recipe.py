"""How quantization parameters are found: a recipe, a small TOML file, as a frozen dataclass that checks itself."""

from __future__ import annotations

import math
import reprlib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from vmq.errors import OptionError

LEARNABLE = ("weight", "rounding", "weight_scale", "scale", "zero", "bias", "affine")
"""What a recipe may name under `learn`: vmq/learning.py says what each is; affine is PTQ4VM's gamma and beta."""


@dataclass(frozen=True)
class BlockRecipe:
    """How blocks are reconstructed (passes/reconstruct_blocks.py).

    Attributes:
        learn: what is learned, of `LEARNABLE` without affine.
        drop: probability that a value of an activation stays unrounded while learning.
        separate: learn what belongs to weights in a first sweep, on float activations, and the rest in a second.
        gptq: round weights column by column first (vmq/gptq.py), so that rounding is learned from there.
        rounding_rate, scale_rate, zero_rate, weight_rate, bias_rate: rates at `iterations`; with fewer, see `rates`.
        rounding_weight: weight of AdaRound's regulariser.
        iterations: how many steps a block takes in the authors' code.
    """

    learn: tuple[str, ...] = ("rounding", "scale")
    drop: float = 0.5
    separate: bool = False
    gptq: bool = False
    rounding_rate: float = 1e-3
    scale_rate: float = 4e-5
    zero_rate: float = 4e-4
    weight_rate: float = 4e-4
    bias_rate: float = 4e-4
    rounding_weight: float = 0.01
    iterations: int = 20_000

    def __post_init__(self) -> None:
        _check_part(self, set(LEARNABLE) - {"affine"})
        if self.drop >= 1.0:
            raise OptionError(f"drop is {self.drop}; give 0 to below 1")
        if self.gptq and "rounding" not in self.learn:
            raise OptionError("gptq is true and rounding is not learned; add it to learn")
        if self.iterations < 1:
            raise OptionError(f"iterations is {self.iterations}; give 1 or more")

    def rates_for(self, iterations: int) -> dict[str, float]:
        """The rate of each kind when a block takes `iterations` steps: fewer steps are longer, up to 60 times."""
        longer = min(60.0, max(1.0, self.iterations / iterations))
        return {"rounding": self.rounding_rate * longer, "scale": self.scale_rate * longer,
                "weight_scale": self.scale_rate * longer, "zero": self.zero_rate * longer,
                "weight": self.weight_rate * longer, "bias": self.bias_rate * longer}


@dataclass(frozen=True)
class NetworkRecipe:
    """How the whole network is calibrated, unrolled in time (passes/calibrate_network.py).

    Attributes:
        learn: what is learned, of `LEARNABLE`.
        teacher: "float" (the float network's alpha) or "alpha" (the true one where footage has it, else the float
            network's).
        length: frames over which a sequence is run on from the quantized network's own state, before another one
            begins at the zero state.
        l1, laplacian, mse, temporal, state, foreground, flow: weights of the losses.
        occlusion: leave pixels out of the flow loss that flow forth and back do not agree on.
        affine_rate, weight_rate, weight_scale_rate, scale_rate, zero_rate, bias_rate: rates.
    """

    learn: tuple[str, ...] = ("affine", "scale")
    teacher: str = "float"
    length: int = 24
    l1: float = 0.0
    laplacian: float = 0.0
    mse: float = 0.0
    temporal: float = 0.0
    state: float = 0.0
    foreground: float = 0.0
    flow: float = 0.0
    occlusion: bool = False
    affine_rate: float = 1e-4
    weight_rate: float = 0.0
    weight_scale_rate: float = 0.0
    scale_rate: float = 1e-4
    zero_rate: float = 0.0
    bias_rate: float = 0.0

    def __post_init__(self) -> None:
        _check_part(self, set(LEARNABLE) - {"rounding"})
        if self.teacher not in ("float", "alpha"):
            raise OptionError(f"teacher is {reprlib.repr(self.teacher)}; give float or alpha")
        if self.length < 1:
            raise OptionError(f"length is {self.length}; give 1 or more")


LARGEST_RECIPE = 1 << 14
"""Bytes of a recipe, at most: with the dots in a key, tomllib's time grows as their square."""


@dataclass(frozen=True)
class Recipe:
    """How quantization parameters are found; a small TOML file.

    Attributes:
        name: what reports call it.
        range_norm: p of the range search, which minimises the mean of |error|^p.
        range_steps: how many ranges are tried, as equal shares of the full one.
        samples: values kept of each tensor over all calibration frames.
        fit_ranges: choose ranges of what layers read by what these make of the rounding.
        correct_biases: shift biases so that every layer keeps its mean.
        equalize: equalize weights across layers where that is exact.
        balance: scale channels in front of convolutions to fit one grid.
        blocks: block-wise reconstruction; None for none.
        network: calibration of the whole network; None for none.
    """

    name: str
    range_norm: float = 2.4
    range_steps: int = 100
    samples: int = 131_072
    fit_ranges: bool = False
    correct_biases: bool = True
    equalize: bool = False
    balance: bool = False
    blocks: BlockRecipe | None = None
    network: NetworkRecipe | None = None

    def __post_init__(self) -> None:
        if not 1.0 <= self.range_norm <= 10.0:
            raise OptionError(f"recipe {self.name}: range_norm is {self.range_norm}; give 1 to 10")
        if not 2 <= self.range_steps <= 10_000:
            raise OptionError(f"recipe {self.name}: range_steps is {self.range_steps}; give 2 to 10000")
        if not 1024 <= self.samples <= 1 << 24:
            raise OptionError(f"recipe {self.name}: samples is {self.samples}; give 1024 to 16777216")

    @classmethod
    def load(cls, name: str) -> Recipe:
        """The recipe of that name that ships with vmq, or the TOML file of that path.

        Raises:
            OptionError: no such recipe, or a key or value that does not belong there.
        """
        shipped = {p.stem: p for p in sorted((Path(__file__).parent / "recipes").glob("*.toml"))}
        path = shipped.get(name, Path(name))
        try:
            if path.exists() and not path.is_file():
                raise OSError("a folder or a device")
            with path.open("rb") as file:
                content = file.read(LARGEST_RECIPE + 1)
            table = tomllib.loads(content.decode()) if len(content) <= LARGEST_RECIPE else None
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise OptionError(f"recipe {path} is not valid TOML: {error}") from error
        except (OSError, ValueError) as error:
            raise OptionError(f"recipe {name!r} is neither one of {', '.join(shipped)} nor a readable TOML file") \
                from error
        if table is None:
            raise OptionError(f"recipe {path} is longer than {LARGEST_RECIPE} bytes; give a TOML file like those in "
                              "vmq/recipes")
        parts: dict[str, Any] = {}
        for part, kind in (("blocks", BlockRecipe), ("network", NetworkRecipe)):
            inner = table.pop(part, None)
            if isinstance(inner, dict):
                values = _typed(kind, inner, f"{path}: [{part}]")
                try:
                    parts[part] = kind(**values)
                except OptionError as error:
                    raise OptionError(f"recipe {path}: [{part}]: {error}") from error
            elif inner is not None:
                raise OptionError(f"recipe {path}: {part} is {reprlib.repr(inner)}; give a table [{part}]")
        return cls(name=path.stem, **_typed(cls, table, str(path)), **parts)


def _typed(kind: Any, table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The entries of a TOML table as the fields of a dataclass; OptionError for what does not fit."""
    known: dict[str, Any] = {f.name: f.default for f in fields(kind) if f.name not in ("name", "blocks", "network")}
    values = {}
    for key, value in table.items():
        if key not in known:
            raise OptionError(f"recipe {where}: unknown key {reprlib.repr(key)}; known are {', '.join(sorted(known))}")
        default = known[key]
        wanted = type(default)
        given = tuple(value) if isinstance(value, list) else value
        if wanted is float and isinstance(given, int) and not isinstance(given, bool):
            given = float(given) if abs(given) < 1e308 else math.inf
        inner = type(default[0]) if isinstance(default, tuple) else None
        if not isinstance(given, wanted) or isinstance(given, bool) != isinstance(default, bool) or (
                inner and not all(type(v) is inner for v in given)):
            words = {float: "a number", int: "a whole number", bool: "true or false", str: "a word", tuple: "a list"}
            raise OptionError(f"recipe {where}: {key} is {reprlib.repr(value)}; give {words[wanted]}")
        values[key] = given
    return values


def _check_part(part: BlockRecipe | NetworkRecipe, known: set[str]) -> None:
    for kind in part.learn:
        if kind not in known:
            raise OptionError(f"learn names {reprlib.repr(kind)}; known are {', '.join(sorted(known))}")
    for name, value in vars(part).items():
        if isinstance(value, float) and not 0.0 <= value < math.inf:
            raise OptionError(f"{name} is {value}; give 0 or more")
