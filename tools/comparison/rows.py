"""What is compared: the tables and their rows, the seeds of each effort, and recipes made for them alone."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmq.errors import OptionError
from vmq.files import write_atomic
from vmq.recipe import Recipe
from vmq.spec import Bits

ROOT = Path(__file__).resolve().parents[2]
RECIPE_FILES = ROOT / "vmq" / "recipes"

SEEDS: Mapping[str, tuple[int, ...]] = {"fast": (0, 1, 2), "standard": (0,)}
"""Which seeds each effort is compiled with."""

RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "mse+equalize": ("mse", {"equalize": True}),
    "brecq+gac": ("ptq4vm", {"blocks": "brecq", "network": {"flow": 0.0}}),
    "brecq+gac+ofa": ("ptq4vm", {"blocks": "brecq", "network": {"flow": 0.05}}),
    "qdrop+gac": ("ptq4vm", {"blocks": "qdrop", "network": {"flow": 0.0}}),
    "qdrop+gac+ofa": ("ptq4vm", {"blocks": "qdrop", "network": {"flow": 0.05}}),
    "ptq4vm-float": ("ptq4vm", {"network": {"teacher": "float"}}),
    "vmq+gac+ofa": ("ptq4vm", {"fit_ranges": True, "correct_biases": True, "balance": True, "blocks": "vmq"}),
    "vmq+gac+ofa-float": ("ptq4vm", {"fit_ranges": True, "correct_biases": True, "balance": True, "blocks": "vmq",
                                     "network": {"teacher": "float"}}),
}
"""Recipes made here: the shipped one they start from and what changes. A table of the TOML file that is None is left
out, one that is a word comes from the shipped recipe of that name, one that is a mapping is changed in these keys."""


@dataclass(frozen=True)
class Row:
    """One way to compile, shown with a line for each effort.

    Attributes:
        label: what the table calls it.
        recipe: a shipped one or one of `RECIPES`; None: the float network as it is.
        bits: as `vmq compile --bits` takes them.
        footage: what it is calibrated on: calib, calib-N (N frames of it), unlabelled, or builtin (vmq's own clips).
        on: what it is scored on: eval (the first --eval), elsewhere (every further one), stills (with motion) or
            clips (without alpha).
        size, ratio: as `vmq compile --size` and `--downsample-ratio` take them, for the network with free sizes;
            an empty size: the model as it is.
    """

    label: str
    recipe: str | None = None
    bits: str = "4"
    footage: str = "calib"
    on: str = "eval"
    size: str = ""
    ratio: float | None = None

    @property
    def shown(self) -> str:
        """What the table calls it, with the size."""
        return f"{self.label} at {self.size}" if self.size else self.label


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        name: as --only takes it.
        title, rows: what it shows.
        note: what its reader should know.
        size: adds multiply-adds and megabytes.
        ratio: adds how many times the float network's error it is.
        frames: adds how many frames ranges were found on, and how many there were.
    """

    name: str
    title: str
    rows: tuple[Row, ...]
    note: str = ""
    size: bool = False
    ratio: bool = False
    frames: bool = False


FLOAT = Row("FP32")
METHODS = (("QDrop", "qdrop"), ("ptq4vm", "ptq4vm"), ("vmq", "vmq"))
TABLES: tuple[Table, ...] = (
    Table("first-stage", "First stage, W4A4", (
        FLOAT, Row("MSE", "mse"), Row("MSE, equalized", "mse+equalize"), Row("BRECQ", "brecq"), Row("QDrop", "qdrop"),
        Row("vmq", "vmq"))),
    Table("bits", "Bits", (
        FLOAT, *(Row(f"{recipe} {Bits.parse(bits)}", recipe, bits)
                 for recipe in ("ptq4vm", "vmq") for bits in ("8", "w4a8", "4"))), size=True, ratio=True),
    Table("ablation", "Ablation of the second stage, W4A4", (
        FLOAT, Row("BRECQ", "brecq"), Row("BRECQ + GAC", "brecq+gac"), Row("BRECQ + GAC + OFA", "brecq+gac+ofa"),
        Row("QDrop", "qdrop"), Row("QDrop + GAC", "qdrop+gac"), Row("QDrop + GAC + OFA", "qdrop+gac+ofa"))),
    Table("generalisation", "What calibration never saw, W4A4", (
        *(Row(label, recipe, on=on) for on in ("stills", "elsewhere") for label, recipe in (("FP32", None), *METHODS)),
        *(Row(label, recipe, on="clips") for label, recipe in METHODS)), ratio=True, note="""\
Stills with motion: pictures of people with alpha, carried from one random affine to another (rotation up to 10
degrees, translation 10%, scale 0.9 to 1.1, shear 5 degrees) over the built-in backgrounds. Clips without alpha have
no true one: to FP32 is all that can be said."""),
    Table("sizes", "Other sizes", tuple(
        Row(label, recipe, bits, on=on, size=size, ratio=ratio)
        for size, ratio, on in (("480x270", None, "eval"), ("1920x1080", 0.25, "stills"))
        for label, recipe, bits in (("FP32", None, "4"), ("vmq W8A8", "vmq", "8"), ("QDrop W4A4", "qdrop", "4"),
                                    ("vmq W4A4", "vmq", "4"))), ratio=True, note="""\
Compiled for that size from the network with free sizes, on the same calibration footage resized. 1920x1080: the
network sees a quarter of width and height, and its refiner brings the result to full size; on stills with motion."""),
    Table("data", "Footage and labels, W4A4", (
        FLOAT, Row("vmq", "vmq"), Row("vmq, 64 frames", "vmq", footage="calib-64"),
        Row("vmq, 16 frames", "vmq", footage="calib-16"),
        Row("vmq, other footage, without alpha", "vmq", footage="unlabelled"),
        Row("vmq, built-in clips", "vmq", footage="builtin"),
        Row("vmq + GAC + OFA, true alpha", "vmq+gac+ofa"),
        Row("vmq + GAC + OFA, FP32's alpha", "vmq+gac+ofa-float"),
        Row("ptq4vm, true alpha", "ptq4vm"), Row("ptq4vm, FP32's alpha", "ptq4vm-float")), ratio=True, frames=True,
        note="""\
vmq by itself never looks at true alpha. Frames: those that ranges were found on, of those there are; blocks are
learned on crops of all of them."""),
)


@dataclass(frozen=True)
class Job:
    """One compile; the same one may serve several tables."""

    recipe: str
    bits: str
    effort: str
    seed: int
    footage: str
    size: str = ""
    ratio: float | None = None

    @property
    def name(self) -> str:
        size = f"-{self.size}" if self.size else ""
        return f"{self.recipe}-{Bits.parse(self.bits)}-{self.effort}-{self.seed}-{self.footage}{size}".lower()

    @property
    def options(self) -> dict[str, Any]:
        """All that is not left at its default, by name."""
        given = dataclasses.asdict(self)
        return {f.name: given[f.name] for f in dataclasses.fields(self) if given[f.name] != f.default}


# ------------------------------------------------------------------------------------------------------ recipes


def recipe_text(name: str) -> str:
    """The TOML text of a recipe: a shipped file's, or what `RECIPES` makes of it."""
    base, changes = RECIPES.get(name, (name, {}))
    if not changes:
        return _shipped(base)
    tables = tomllib.loads(_shipped(base))
    for key, change in changes.items():
        if change is None:
            tables.pop(key, None)
        elif isinstance(change, str) and isinstance(tables.get(key), dict):
            tables[key] = tomllib.loads(_shipped(change))[key]
        elif isinstance(change, dict):
            tables[key] = tables.get(key, {}) | change
        else:
            tables[key] = change
    plain = {k: v for k, v in tables.items() if not isinstance(v, dict)}
    parts = {k: v for k, v in tables.items() if isinstance(v, dict)}
    lines = [f"# {base}, changed: {json.dumps(changes)}"]     # TOML writes our kinds of values as JSON does
    lines += [f"{k} = {json.dumps(v)}" for k, v in plain.items()]
    for part, values in parts.items():
        lines += ["", f"[{part}]", *(f"{k} = {json.dumps(v)}" for k, v in values.items())]
    return "\n".join(lines) + "\n"


def same_as_shipped(name: str, folder: Path) -> str:
    """The shipped recipe that one of `RECIPES` equals, so that it is compiled once; else its own name."""
    if name not in RECIPES:
        return name
    with contextlib.suppress(OptionError):      # a bad recipe is for the compile to complain about
        made = dataclasses.replace(Recipe.load(write_recipe(name, folder)), name="")
        for path in sorted(RECIPE_FILES.glob("*.toml")):
            with contextlib.suppress(OptionError):
                if dataclasses.replace(Recipe.load(path.stem), name="") == made:
                    return path.stem
    return name


def write_recipe(name: str, folder: Path) -> str:
    """What `--recipe` takes: a shipped recipe's name, or the file written to `folder`."""
    if name not in RECIPES:
        return name
    path, content = folder / f"{name}.toml", recipe_text(name).encode()
    if not path.exists() or path.read_bytes() != content:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content)
    return str(path)


def _shipped(name: str) -> str:
    try:
        return (RECIPE_FILES / f"{name}.toml").read_text(encoding="utf-8")
    except OSError as error:
        raise OptionError(f"there is no shipped recipe {name}; correct the tables in {Path(__file__).name}") from error
