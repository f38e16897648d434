"""What is asked for is checked where it is written down: one line that names the value and what to give."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmq.errors import OptionError
from vmq.recipe import BlockRecipe, NetworkRecipe, Recipe
from vmq.spec import Bits, Options, QuantSpec
from vmq.targets import TARGETS


def one_line(error: pytest.ExceptionInfo[OptionError]) -> str:
    message = str(error.value)
    assert message
    assert "\n" not in message
    return message


@pytest.mark.parametrize(("text", "bits", "said"), [
    ("8", Bits(8, 8), "W8A8"), (8, Bits(8, 8), "W8A8"), ("4", Bits(4, 4), "W4A4"), (4, Bits(4, 4), "W4A4"),
    ("w4a8", Bits(4, 8), "W4A8"), (" W4A8 ", Bits(4, 8), "W4A8"), ("w8a4", Bits(8, 4), "W8A4"),
    ("w8a8", Bits(8, 8), "W8A8")])
def test_bits(text: str | int, bits: Bits, said: str) -> None:
    assert Bits.parse(text) == bits
    assert str(bits) == said


@pytest.mark.parametrize("text", ["", "2", "16", "w4", "a8", "w4a", "w2a8", "w4a16", "4.0", "four", "w4 a8"])
def test_bad_bits(text: str) -> None:
    with pytest.raises(OptionError, match="give 8, 4, w4a8, w8a4, or auto with a --budget") as error:
        Bits.parse(text)
    assert text in one_line(error)


@given(st.text(max_size=6))
def test_bits_of_any_text(text: str) -> None:
    try:
        bits = Bits.parse(text)
    except OptionError:
        return
    assert Bits.parse(str(bits)) == bits


@pytest.mark.parametrize(("bits", "signed", "low", "high", "name"), [
    (16, False, 0, 65535, "uint16"), (8, False, 0, 255, "uint8"),
    (8, True, -128, 127, "int8"), (4, False, 0, 15, "uint4"), (4, True, -8, 7, "int4")])
def test_grids(bits: int, signed: bool, low: int, high: int, name: str) -> None:
    spec = QuantSpec(bits, signed, 1)
    assert (spec.qmin, spec.qmax, spec.dtype.name) == (low, high, name)
    assert QuantSpec.of(spec.dtype, 1) == spec
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.bits = 4  # type: ignore[misc]


def test_widths_that_there_are_not() -> None:
    for bits in (0, 1, 2, 3, 5, 16, -8):
        for make in (lambda b: QuantSpec(b, signed=True), lambda b: Bits(b, 8)):
            with pytest.raises(OptionError, match=f"{bits} bits were asked for"):
                make(bits)
    for bits in (0, 1, 2, 3, 5, 32, -8):
        for make in (lambda b: QuantSpec(b, signed=False), lambda b: Bits(8, b)):
            with pytest.raises(OptionError, match=f"{bits} bits were asked for"):
                make(bits)
    with pytest.raises(KeyError):
        QuantSpec.of(np.int32)


def test_shipped_recipe() -> None:
    assert Recipe.load("mse") == Recipe("mse", range_norm=2.4, range_steps=100, samples=131_072)


def test_recipe_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("range_norm = 3\nsamples = 2048\n")
    assert Recipe.load(str(path)) == Recipe("mine", range_norm=3.0, samples=2048)
    path.write_text("[blocks]\ndrop = 0\nlearn = ['rounding']\n[network]\nl1 = 1\nlength = 3\n")
    assert Recipe.load(str(path)) == Recipe("mine", blocks=BlockRecipe(drop=0.0, learn=("rounding",)),
                                            network=NetworkRecipe(l1=1.0, length=3))
    path.write_text("")
    assert Recipe.load(str(path)) == Recipe("mine")


@pytest.mark.parametrize(("content", "said"), [
    ("range_nrom = 2.4", "unknown key 'range_nrom'; known are balance, correct_biases, "),
    ("name = 'x'", "unknown key 'name'"),
    ("range_norm = '2.4'", "range_norm is '2.4'; give a number"),
    ("range_norm = true", "range_norm is True; give a number"),
    ("range_steps = 2.5", "range_steps is 2.5; give a whole number"),
    ("samples = [1]", r"samples is \[1\]; give a whole number"),
    ("[samples]\na = 1", "give a whole number"),
    ("range_norm = 0.5", "range_norm is 0.5; give 1 to 10"),
    ("range_norm = nan", "range_norm is nan"),
    ("range_norm = inf", "range_norm is inf"),
    ("range_steps = 1", "give 2 to 10000"),
    ("samples = 10", "give 1024 to"),
    ("equalize = 1", "equalize is 1; give true or false"),
    ("blocks = 1", r"blocks is 1; give a table \[blocks\]"),
    ("[blocks]\ndrap = 0.5", r"\[blocks\]: unknown key 'drap'; known are bias_rate, drop, "),
    ("[blocks]\ngptq = true\nlearn = ['scale']", r"\[blocks\]: gptq is true and rounding is not learned; add it"),
    ("[blocks]\ndrop = 1.0", r"\[blocks\]: drop is 1.0; give 0 to below 1"),
    ("[blocks]\nscale_rate = -1.0", "scale_rate is -1.0; give 0 or more"),
    ("[blocks]\nscale_rate = nan", "scale_rate is nan; give 0 or more"),
    ("[blocks]\nlearn = ['affine']", "learn names 'affine'; known are bias, rounding, "),
    ("[blocks]\nlearn = 'bias'", "learn is 'bias'; give a list"),
    ("[blocks]\nlearn = [1]", r"learn is \[1\]; give a list"),
    ("[network]\nteacher = 'me'", "teacher is 'me'; give float or alpha"),
    ("[network]\nlength = 0", "length is 0; give 1 or more"),
    ("range_norm = ", "not valid TOML"),
    ("range_norm = 1\nrange_norm = 2", "not valid TOML"),
    ("\x00", "not valid TOML"),
    pytest.param("learn = " + "[" * 10_000, "not valid TOML", id="deep"),
    pytest.param("samples" + ".a" * 5000 + " = 1", r"samples is \{'a': .*\.\.\..*; give a whole", id="deep keys"),
    pytest.param("range_norm = 1" + "0" * 400, "range_norm is inf; give 1 to 10", id="many digits"),
    pytest.param("a" * 10_000 + " = 1", r"unknown key 'a{5,20}\.\.\.a{5,20}'", id="long key"),
])
def test_bad_recipes(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(content)
    with pytest.raises(OptionError, match=said) as error:
        Recipe.load(str(path))
    assert "mine" in one_line(error)


def test_recipes_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    for name in ("nothing", "", str(tmp_path), "/dev/zero", str(tmp_path / "none.toml"), str(tmp_path / "binary.toml"),
                 "a\0b"):
        with pytest.raises(OptionError, match=r"neither one of .*mse.* nor a readable TOML file") as error:
            Recipe.load(name)
        one_line(error)


def test_recipes_that_are_too_long(tmp_path: Path) -> None:
    """Of a key with 300,000 dots tomllib makes as many tables, in time that grows as their square."""
    dots, huge = tmp_path / "dots.toml", tmp_path / "huge.toml"
    dots.write_text("a." * 300_000 + "a = 1")
    huge.touch()
    os.truncate(huge, 1 << 40)                                # sparse
    for path in (dots, huge):
        with pytest.raises(OptionError, match=r"(dots|huge)\.toml is longer than 16384 bytes; give a") as error:
            Recipe.load(str(path))
        one_line(error)


@pytest.mark.parametrize(("option", "said"), [
    ({"container": "int2"}, "--container int2 is not known for --target cpu; give one of int4cast, int8, int4"),
    ({"size": (8, 512)}, "--size 512x8 is out of range"),
    ({"size": (288, 100_000)}, "--size 100000x288"),
    ({"size": (16_384, 16_384)}, "give 16 to 16384 pixels a side, and at most 33.6 million"),
    ({"size": (-288, -512)}, "--size -512x-288"),
    ({"downsample_ratio": 0.0}, "--downsample-ratio 0.0"),
    ({"downsample_ratio": 1.5}, "--downsample-ratio 1.5"),
    ({"downsample_ratio": float("nan")}, "--downsample-ratio nan"),
    ({"keep": {"first": 6}}, "--keep first=6: give 4 or 8 bits"),
    ({"seed": -1}, "--seed -1: give 0 or more"),
])
def test_bad_options(option: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError) as error:
        Options(**option)
    assert said in one_line(error)


def test_options_describe_themselves_in_json() -> None:
    options = Options(bits=Bits.parse("w4a8"), size=(288, 512), downsample_ratio=0.25, keep={"first": 8},
                      pairs={"r1i": "r1o"}, container="int8", seed=3)
    assert json.loads(json.dumps(options.describe())) == {
        "bits": "W4A8", "recipe": "plain", "effort": "standard", "target": "cpu", "container": "int8",
        "size": [288, 512], "downsample_ratio": 0.25, "keep": {"first": 8}, "pairs": {"r1i": "r1o"}, "seed": 3,
        "device": "cpu", "state": "float32", "budget": None, "normalization": None}
    assert all(Options(container=c).container == c for c in TARGETS["cpu"].containers)
    assert json.dumps(Options().describe())
