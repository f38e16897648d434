"""The Python API by name: what `vmq` exports, and that `vmq.compile` has a keyword for every option of the command."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import vmq
import vmq.cli
import vmq.compiler
from vmq.spec import EFFORTS

COMMAND_LINE_ONLY = {"help", "quiet", "json"}
RENAMED = {"pair": "pairs"}
PYTHON_ONLY = {"command", "observers", "progress"}
API = (Path(__file__).resolve().parents[1] / "docs" / "api.md").read_text(encoding="utf-8")


def options(command: str) -> set[str]:
    """Names of the arguments that a command takes."""
    actions = vmq.cli._parser()._subparsers
    assert actions is not None
    commands = actions._group_actions[0].choices
    assert isinstance(commands, dict)
    parser: argparse.ArgumentParser = commands[command]
    return {action.dest for action in parser._actions}


def test_names() -> None:
    assert vmq.__all__ == ["Result", "Session", "VmqError", "__version__", "compile"]
    for name in vmq.__all__:
        assert getattr(vmq, name) is not None
        assert name in dir(vmq)


def test_compile_has_a_keyword_for_every_option() -> None:
    given = {RENAMED.get(name, name) for name in options("compile") - COMMAND_LINE_ONLY}
    assert given == set(inspect.signature(vmq.compile).parameters) - PYTHON_ONLY


def test_defaults_are_those_of_the_command() -> None:
    args = vmq.cli._parser().parse_args(["compile", "model.onnx"])
    for name, parameter in inspect.signature(vmq.compile).parameters.items():
        said = getattr(args, {"pairs": "pair"}.get(name, name), None)
        if name not in PYTHON_ONLY | {"model"}:
            assert str(parameter.default or "") == str(said or "") or not (parameter.default or said), name


def test_a_call_as_a_command() -> None:
    """What a dump from Python says, read by the command line, gives the same arguments."""
    given = {"model": Path("my model.onnx"), "bits": "auto", "budget": "60%", "recipe": "mse",
             "calib": ["a b/", "c.mp4"], "size": (320, 192), "downsample_ratio": 0.25, "effort": EFFORTS["fast"],
             "target": "qnn", "container": "int8", "keep": {"first": 4, "/net/Conv": 8}, "pairs": {"r": "s", "t": ""},
             "seed": 3, "output": "out.onnx", "dump": "dump", "device": "cuda", "state": "uint8",
             "mean": (-0.5, 0.25, 1.0), "std": 0.5}
    words = shlex.split(vmq.compiler.command_of(given))
    args = vmq.cli._parser().parse_args(words[1:])
    want = given | {"calib": [Path("a b"), Path("c.mp4")], "size": "320x192", "effort": "fast",
                    "keep": [("first", 4), ("/net/Conv", 8)], "pair": [("r", "s"), ("t", "")],
                    "output": Path("out.onnx"), "dump": Path("dump"), "std": (0.5,)}
    assert {name: getattr(args, name) for name in want if name != "pairs"} == {
        name: value for name, value in want.items() if name != "pairs"}
    assert shlex.split(vmq.compiler.command_of({"model": b"", "dump": "d"})) == [
        "vmq", "compile", "d/00_input.onnx", "--dump=d"]
    mine = dataclasses.replace(EFFORTS["fast"], steps=1)
    assert vmq.compiler.command_of({"model": "m.onnx", "effort": mine}) == ""


@pytest.mark.parametrize("function", [vmq.compile, vmq.Session])
def test_every_parameter_is_typed_and_documented(function: Callable[..., Any]) -> None:
    text = inspect.getdoc(function)
    assert text is not None
    for name, parameter in inspect.signature(function).parameters.items():
        assert parameter.annotation is not parameter.empty
        assert re.search(rf"^ +(\w+, )*{name}(, \w+)*: ", text, re.MULTILINE), f"{name} is not documented"


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(vmq(?:\.\w+)+)\(", API))))
def test_documented_functions(name: str) -> None:
    """They are there, typed and documented; and the parameters that api.md names are theirs."""
    module, _, attribute = name.rpartition(".")
    function = getattr(import_module(module), attribute)
    assert inspect.getdoc(function)
    parameters = inspect.signature(function).parameters
    said = re.search(rf"`{re.escape(name)}\(([^`]*?)\)", API)
    assert said is not None
    for word in re.findall(r"(\w+)(?:=[^,)]*)?(?:,|$)", said[1].replace("...", "").replace("*", "")):
        assert word in parameters, f"{name} has no {word}"
    for parameter in parameters.values():
        assert parameter.annotation is not parameter.empty


def test_import_is_quick() -> None:
    """`import vmq` loads neither torch nor ONNX Runtime; they come with what needs them."""
    code = "import sys, vmq; assert not {'torch', 'onnxruntime', 'onnx'} & set(sys.modules); vmq.compile"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="module 'vmq' has no attribute 'quantise'"):
        _ = vmq.quantise
