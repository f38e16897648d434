"""A convolution of what is resized, as one of what was not: the same numbers, borders and all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_text import apply, load, ops, run

from passes.find_closures import FindClosures
from passes.fold_resizes import FoldResizes
from passes.insert_qdq import InsertQdq
from vmq.crops import resized
from vmq.graph import Graph
from vmq.layers import quantizer_of
from vmq.pipeline import Context, run_passes
from vmq.spec import Bits, Options
from vmq.targets import TARGETS


def network(channels: int = 5, filters: int = 4, others: tuple[int, ...] = (3,), sides: tuple[int, int] = (6, 8), *,
            kernel: tuple[int, int] = (3, 3), pads: tuple[int, int, int, int] = (1, 1, 1, 1), bias: bool = True,
            relu: bool = True, factors: tuple[float, float] = (2.0, 2.0), mode: str = "linear", extra: str = "",
            more: str = "", weights: str = "", outputs: str = "float[n,f,h,w] out") -> Graph:
    """x, resized, joined to pictures and convolved."""
    tall, wide = (int(n * f) for n, f in zip(sides, factors, strict=True))
    pictures = "".join(f", float[1,{n},{tall},{wide}] p{k}" for k, n in enumerate(others))
    names = "".join(f", p{k}" for k in range(len(others)))
    graph = load(f"""(float[1,{channels},{sides[0]},{sides[1]}] x{pictures},
                      float[{filters},{channels + sum(others)},{kernel[0]},{kernel[1]}] w_w, float[{filters}] w_b
                      {", " + weights if weights else ""})
        => ({outputs}) {{
        f = Constant <value_floats = [1.0, 1.0, {factors[0]}, {factors[1]}]> ()
        y = Resize <mode = "{mode}"> (x, , f)
        c = {"Concat <axis = 1> (y" + names + ")" if others else "Identity (y)"}
        o = Conv <pads = {list(pads)} {extra}> (c, w_w {", w_b" if bias else ""})
        out = {"Relu" if relu else "Identity"} (o)
        {more}
    }}""")
    for node in [n for n in graph.nodes if n.op == "Identity"]:
        graph.replace_uses(node.outputs[0], node.inputs[0])
    graph.fold_constants()
    graph.cleanup()
    graph.infer_shapes()
    return graph


def check(graph: Graph) -> Graph:
    """Folded, the same numbers come out up to the order of sums."""
    before = graph.copy()
    assert apply(FoldResizes(), graph).modified == 1
    feeds = {v.name: np.random.default_rng(0).normal(size=v.shape).astype(np.float32) for v in graph.inputs}
    ours, theirs = run(graph, feeds), run(before, feeds)
    assert list(ours) == list(theirs)
    for name, expected in theirs.items():
        assert ours[name].shape == expected.shape
        np.testing.assert_allclose(ours[name], expected, rtol=0, atol=2e-6 * np.abs(expected).max())
    return graph


@settings(max_examples=40)
@given(channels=st.integers(1, 6), filters=st.integers(1, 16), others=st.sampled_from([(), (3,), (3, 1), (1, 2, 1)]),
       sides=st.tuples(st.integers(1, 7), st.integers(4, 9)), bias=st.booleans(), relu=st.booleans(),
       tall=st.sampled_from([(1, 0, 0), (2, 0, 1), (3, 1, 1), (3, 0, 0), (5, 2, 2)]))
def test_the_same_numbers(channels: int, filters: int, others: tuple[int, ...], sides: tuple[int, int], bias: bool,
                          relu: bool, tall: tuple[int, int, int]) -> None:
    kernel, above, below = tall
    if 2 * sides[0] + above + below < kernel:
        return
    check(network(channels, filters, others, sides, kernel=(kernel, 3), pads=(above, 1, below, 1), bias=bias,
                  relu=relu))


def test_columns_are_not_resized_any_more() -> None:
    graph = check(network())
    assert ops(graph).count("Conv") == 3                                      # the ends have their own
    resize = next(n for n in graph.nodes if n.op == "Resize")
    assert resize.outputs[0].shape == [1, 5, 12, 8]


def test_the_layer_in_the_middle_keeps_its_name() -> None:
    graph = network()
    name = next(n.name for n in graph.nodes if n.op == "Conv")
    apply(FoldResizes(), graph)
    assert next(n for n in graph.nodes if n.name == name).outputs[0].shape == [1, 8, 12, 6]


@pytest.mark.parametrize("options", [
    {"filters": 17}, {"others": (3, 2)}, {"kernel": (3, 5), "pads": (1, 2, 1, 2)}, {"pads": (1, 0, 1, 0)},
    {"extra": ", strides = [2, 2]"}, {"extra": ", dilations = [2, 2]"}, {"mode": "nearest"}, {"sides": (6, 3)},
    {"factors": (2.0, 1.0)}, {"factors": (1.0, 2.0)}, {"factors": (4.0, 4.0)},
    {"more": "z = Exp (y)", "outputs": "float[n,f,h,w] out, float[n,g,h,w] z"},
    {"more": "z = Exp (c)", "outputs": "float[n,f,h,w] out, float[n,g,h,w] z"}],
    ids=["17 channels", "5 joined", "5 wide", "no padding", "strides", "dilations", "nearest", "3 columns",
         "rows alone", "columns alone", "by 4", "resized read elsewhere", "joined read elsewhere"])
def test_others_stay(options: dict[str, Any]) -> None:
    graph = network(**options)
    before = graph.to_bytes()
    assert apply(FoldResizes(), graph).modified == 0
    assert graph.to_bytes() == before


@pytest.mark.parametrize("target", ["qnn", "openvino"])
def test_targets_without_such_kernels_are_left_alone(target: str) -> None:
    graph = network()
    context = Context(Options(bits=Bits.parse("8"), target=TARGETS[target]))
    assert run_passes(graph, [FoldResizes()], context)[0].modified == 0


def test_a_result_before_its_relu_that_is_an_output() -> None:
    """The Relu stays where it is."""
    graph = check(network(outputs="float[n,f,h,w] out, float[n,f,h,w] o"))
    assert ops(graph).count("Relu") == 1


def test_blocks_have_the_new_nodes() -> None:
    """All in the block of the layer, and every node in one."""
    graph = network(more="pha = Conv <pads = [1,1,1,1]> (out, w_c)", outputs="float[n,f,h,w] pha",
                    weights="float[1,4,3,3] w_c")
    name = next(n.name for n in graph.nodes if n.op == "Conv")
    context = Context(Options(bits=Bits.parse("4")))
    run_passes(graph, [FindClosures()], context)
    before = context.found["find_closures"].blocks
    run_passes(graph, [FoldResizes()], context)
    after = context.found["find_closures"].blocks
    assert [b.name for b in after] == [b.name for b in before]
    assert sorted(n for b in after for n in b.nodes) == sorted(n.name for n in graph.nodes)
    (block,) = [b for b in after if name in b.nodes]
    assert sum(n.op == "Conv" for n in graph.nodes if n.name in block.nodes) == 4
    order = [n.name for n in graph.nodes]
    assert all(list(b.nodes) == sorted(b.nodes, key=order.index) for b in after)


def test_other_sizes_follow() -> None:
    """Crops for learning are the same graph at half the size."""
    half = resized(check(network(sides=(8, 16))), 0.5)
    direct = check(network(sides=(4, 8)))
    feeds = {v.name: np.random.default_rng(1).normal(size=v.shape).astype(np.float32) for v in direct.inputs}
    assert np.array_equal(run(half, feeds)["out"], run(direct, feeds)["out"])


@pytest.mark.parametrize("bits", ["8", "4"])
def test_what_is_joined_has_one_grid(bits: str) -> None:
    """The picture is rounded once, to the grid that it shares with what is resized; so are the three results."""
    graph = load("""(float[1,3,16,32] src, float[4,3,3,3] w_a, float[4,7,3,3] w_b, float[1,4,3,3] w_c)
                    => (float[1,1,16,32] pha) {
        f = Constant <value_floats = [1.0, 1.0, 2.0, 2.0]> ()
        a = Conv <pads = [1,1,1,1], strides = [2,2]> (src, w_a)
        b = Resize <mode = "linear"> (a, , f)
        c = Concat <axis = 1> (b, src)
        d = Conv <pads = [1,1,1,1]> (c, w_b)
        e = Relu (d)
        pha = Conv <pads = [1,1,1,1]> (e, w_c)
    }""")
    graph.fold_constants()
    graph.infer_shapes()
    run_passes(graph, [FindClosures(), FoldResizes(), InsertQdq()], Context(Options(bits=Bits.parse(bits))))
    for concat in (n for n in graph.nodes if n.op == "Concat"):
        reads = [v.inputs[0] for v in concat.inputs]
        assert all(n.op == "DequantizeLinear" for n in reads)
        assert len({id(n.inputs[1]) for n in reads}) == 1
    moved = next(n for n in graph.nodes if n.op == "Transpose")
    quantizer = quantizer_of(moved.inputs[0].inputs[0])
    assert quantizer is not None
    assert quantizer[0].inputs[0] is graph.inputs[0]
    layers = [n for n in graph.nodes if n.op == "Conv" and len(n.inputs[0].shape) == 4 and n.inputs[0].shape[1] == 10]
    assert len(layers) == 3
    width = {"8": "uint8", "4": "uint4"}[bits]
    assert {n.inputs[0].inputs[0].inputs[2].dtype.name for n in layers} == {width}


def test_what_keeps_a_layer_wider_keeps_its_ends_wider() -> None:
    graph = network(more="pha = Conv <pads = [1,1,1,1]> (out, w_c)", outputs="float[n,f,h,w] pha",
                    weights="float[1,4,3,3] w_c")
    name = next(n.name for n in graph.nodes if n.op == "Conv")
    context = Context(Options(bits=Bits.parse("4"), keep={name: 8, "first": 4, "last": 4}))
    results = run_passes(graph, [FindClosures(), FoldResizes(), InsertQdq()], context)
    layers = [n for n in graph.nodes if n.op == "Conv" and n.inputs[0].shape[1] == 11]
    assert len(layers) == 3
    wide = {k: v for k, v in results[-1].report["wider"].items() if v == "W8A8"}
    assert wide == dict.fromkeys((n.name for n in layers), "W8A8")
