"""ceil_mode goes where it rounds nothing and stays where it does; never a value changes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_text import load, run

from passes.floor_pooling import FloorPooling
from vmq.graph import Graph
from vmq.pipeline import Context, PassResult, run_passes
from vmq.spec import Options


def floor(graph: Graph) -> PassResult:
    return run_passes(graph, [FloorPooling()], Context(Options()))[0]


def pool(attributes: str, size: str = "1,2,8,12", result: str = "1,2,4,6", op: str = "AveragePool") -> Graph:
    return load(f"(float[{size}] x) => (float[{result}] y) {{ [pool] y = {op} <ceil_mode = 1, {attributes}> (x) }}")


@pytest.mark.parametrize(("attributes", "size", "result", "op"), [
    ("kernel_shape = [2,2], strides = [2,2]", "1,2,8,12", "1,2,4,6", "AveragePool"),
    ("kernel_shape = [3,3], strides = [2,2], pads = [1,1,0,0]", "1,2,8,12", "1,2,4,6", "AveragePool"),
    ("kernel_shape = [3,3], strides = [2,2]", "1,2,7,9", "1,2,3,4", "MaxPool"),
    ("kernel_shape = [2], strides = [3], dilations = [2]", "1,2,9", "1,2,3", "MaxPool"),
])
def test_exact_windows(attributes: str, size: str, result: str, op: str) -> None:
    graph = pool(attributes, size, result, op)
    before = run(graph)
    assert floor(graph) == PassResult(modified=1)
    assert [n.attrs["ceil_mode"] for n in graph.nodes] == [0]
    np.testing.assert_array_equal(run(graph)["y"], before["y"])
    assert floor(graph).modified == 0


@pytest.mark.parametrize(("attributes", "size", "result"), [
    ("kernel_shape = [2,2], strides = [2,2]", "1,2,7,12", "1,2,4,6"),
    ("kernel_shape = [3,3], strides = [2,2]", "1,2,8,12", "1,2,4,6"),
])
def test_windows_that_need_it(attributes: str, size: str, result: str) -> None:
    graph = pool(attributes, size, result)
    before = graph.to_bytes()
    found = floor(graph)
    assert found.modified == 0
    assert "pool needs its ceil_mode at" in found.notes[0]
    assert graph.to_bytes() == before


def test_automatic_padding_and_poolings_without_it_are_left() -> None:
    graph = pool('kernel_shape = [2,2], strides = [2,2], auto_pad = "SAME_UPPER"')
    assert floor(graph).modified == 0
    plain = load("(float[1,2,8,12] x) => (float[1,2,4,6] y) "
                 "{ y = MaxPool <kernel_shape = [2,2], strides = [2,2]> (x) }")
    assert floor(plain) == PassResult()


@settings(max_examples=60)
@given(st.integers(5, 14), st.integers(1, 4), st.integers(1, 4), st.integers(0, 2), st.integers(0, 2),
       st.sampled_from(["AveragePool", "MaxPool"]))
def test_no_value_ever_changes(size: int, kernel: int, stride: int, begin: int, end: int, op: str) -> None:
    begin, end = min(begin, kernel - 1), min(end, kernel - 1)
    graph = load(f"(float[1,1,{size}] x) => (float[1,1,n] y) {{ y = {op} <ceil_mode = 1, kernel_shape = [{kernel}], "
                 f"strides = [{stride}], pads = [{begin},{end}]> (x) }}")
    before = run(graph)["y"]
    exact = (size + begin + end - kernel) % stride == 0
    assert floor(graph).modified == exact
    np.testing.assert_array_equal(run(graph)["y"], before)
