"""Closures and blocks: the same on every export of RVM, right on other cells, and no block bisects a state update."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import onnx
import pytest
import tiny_recurrent as tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.rvm import build, export
from passes.find_closures import LOCAL, Block, Closures, FindClosures, find_closures
from vmq.errors import ModelError
from vmq.graph import Graph
from vmq.pipeline import Context, run_passes
from vmq.spec import Options
from vmq.states import WEIGHTED, pair_states

# The paper's blocks of RVM: first conv, 15 inverted residuals (5 convs with squeeze-excite, 3 without, 2 without
# expansion), last conv, LR-ASPP, bottleneck, three upsampling blocks, output block, projection.
RVM_BLOCKS = [1, 2, 3, 3, 5, 5, 5, 3, 3, 3, 3, 5, 5, 5, 5, 5, 1, 2, 2, 3, 3, 3, 2, 1]

EXPORTS: dict[str, dict[str, Any]] = {
    "static": {"size": (64, 96)},
    "keep_bn": {"size": (64, 96), "keep_bn": True},
    "dynamic": {"dynamic": True},
    "refiner": {"size": (128, 192), "downsample_ratio": 0.5},
}


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, onnx.ModelProto]:
    """RVM with random weights, in every form that it is exported in."""
    folder = tmp_path_factory.mktemp("rvm")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name, options in EXPORTS.items():
        refiner = "deep" if name in {"dynamic", "refiner"} else None
        export(build(refiner=refiner), folder / f"{name}.onnx", **options)
    torch.set_num_threads(threads)
    return {name: onnx.load(folder / f"{name}.onnx") for name in EXPORTS}


def found(graph: Graph) -> Closures:
    return find_closures(graph, pair_states(graph))


def holds(graph: Graph, closures: Closures) -> None:
    """What is true of every result."""
    place = {name: k for k, block in enumerate(closures.blocks) for name in block.nodes}
    names = [n.name for n in graph.nodes]
    assert sorted(name for block in closures.blocks for name in block.nodes) == sorted(names)
    for node in graph.nodes:                        # with every edge forward, blocks are convex and in order
        for value in node.outputs:
            assert all(place[node.name] <= place[user.name] for user in value.outputs)
    for closure in closures.recurrent:
        assert len({place[name] for name in closure}) == 1
    order = {name: k for k, name in enumerate(names)}
    for nodes in [*closures.recurrent, *(b.nodes for b in closures.blocks)]:
        assert all(order[a] < order[b] for a, b in pairwise(nodes))
    assert len({b.name for b in closures.blocks}) == len(closures.blocks)


def ops(graph: Graph, names: Sequence[str], without: Sequence[str] = ()) -> Counter[str]:
    inside = set(names)
    return Counter(n.op for n in graph.nodes if n.name in inside and n.op not in without)


def weighted(graph: Graph, block: Block) -> int:
    return sum(count for op, count in ops(graph, block.nodes).items() if op in WEIGHTED)


def convs(graph: Graph, names: Sequence[str]) -> list[tuple[int, ...]]:
    """The weights' shapes of the convs in `names`."""
    inside = set(names)
    return [tuple(n.inputs[1].shape) for n in graph.nodes if n.name in inside and n.op == "Conv"]


def renamed(model: onnx.ModelProto, seed: int = 0) -> tuple[onnx.ModelProto, dict[str, str], dict[str, str]]:
    """The model with every name replaced by a random one; and what values and nodes are called now."""
    result, rng = onnx.ModelProto(), random.Random(seed)
    result.CopyFrom(model)
    graph = result.graph
    values: dict[str, str] = {"": ""}
    nodes: dict[str, str] = {}

    def new(old: str) -> str:
        return values.setdefault(old, f"t{rng.getrandbits(64):x}")

    for thing in (*graph.input, *graph.output, *graph.initializer, *graph.value_info):
        thing.name = new(thing.name)
    for node in graph.node:
        nodes[node.name] = f"n{rng.getrandbits(64):x}"
        node.name = nodes[node.name]
        node.input[:] = [new(name) for name in node.input]
        node.output[:] = [new(name) for name in node.output]
    return result, values, nodes


def reordered(model: onnx.ModelProto, seed: int) -> onnx.ModelProto:
    """The model with its nodes in another topological order."""
    result, rng = onnx.ModelProto(), random.Random(seed)
    result.CopyFrom(model)
    made = {v.name for v in (*model.graph.input, *model.graph.initializer)} | {""}
    waiting = list(model.graph.node)
    del result.graph.node[:]
    while waiting:
        node = rng.choice([n for n in waiting if made.issuperset(n.input)])
        waiting.remove(node)
        made.update(node.output)
        result.graph.node.append(node)
    return result


# -- RVM ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(EXPORTS))
def test_rvm_has_four_closures_with_their_gates(exports: dict[str, onnx.ModelProto], name: str) -> None:
    graph = Graph.load(exports[name])
    closures = found(graph)
    holds(graph, closures)
    assert [(s.pair.input, s.pair.output) for s in closures.states] == [(f"r{k}i", f"r{k}o") for k in (1, 2, 3, 4)]
    assert len(closures.recurrent) == 4
    cell = Counter({"Mul": 3, "Concat": 2, "Conv": 2, "Sigmoid": 1, "Split": 1, "Tanh": 1, "Sub": 1, "Add": 1})
    for closure, width in zip(closures.recurrent, (16, 20, 40, 64), strict=True):
        assert ops(graph, closure, without=["Expand"]) == cell
        assert ops(graph, closure)["Expand"] == (name == "dynamic")
        assert convs(graph, closure) == [(2 * width, 2 * width, 3, 3), (width, 2 * width, 3, 3)]


@pytest.mark.parametrize("name", list(EXPORTS))
def test_rvm_falls_into_the_blocks_of_the_paper(exports: dict[str, onnx.ModelProto], name: str) -> None:
    graph = Graph.load(exports[name])
    blocks = found(graph).blocks
    assert [weighted(graph, b) for b in blocks[:len(RVM_BLOCKS)]] == RVM_BLOCKS
    whole = sum(n.op in WEIGHTED for n in graph.nodes)
    assert whole == 78 + (7 if name in {"dynamic", "refiner"} else 0)
    assert sum(weighted(graph, b) for b in blocks) == whole
    if whole == 78:
        assert len(blocks) == len(RVM_BLOCKS)
    # each inverted residual has one depthwise conv, the recurrent blocks what belongs to them
    assert [sum(s[1] == 1 for s in convs(graph, b.nodes)) for b in blocks[1:16]] == [1] * 15
    assert [ops(graph, b.nodes)["Concat"] >= 3 for b in blocks[18:22]] == [True] * 4
    assert all(ops(graph, b.nodes)["Resize"] == 1 for b in blocks[19:23])


@pytest.mark.parametrize("name", list(EXPORTS))
def test_names_do_not_matter(exports: dict[str, onnx.ModelProto], name: str) -> None:
    graph = Graph.load(exports[name])
    other, values, nodes = renamed(exports[name])
    before, after = found(graph), found(Graph.load(other))
    # nodes that the loader has to name are compared by nothing but their block
    known = {n.name for n in graph.nodes} & set(nodes)
    assert len(known) > 200
    assert [(values[s.pair.input], values[s.pair.output]) for s in before.states] == [
        (s.pair.input, s.pair.output) for s in after.states]
    assert [[nodes[n] for n in s.nodes if n in known] for s in before.states] == [
        [n for n in s.nodes if n in nodes.values()] for s in after.states]
    assert [[nodes[n] for n in b.nodes if n in known] for b in before.blocks] == [
        [n for n in b.nodes if n in nodes.values()] for b in after.blocks]


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_nodes_does_not_matter(exports: dict[str, onnx.ModelProto], seed: int) -> None:
    before = found(Graph.load(exports["static"]))
    graph = Graph.load(reordered(exports["static"], seed))
    after = found(graph)
    holds(graph, after)
    assert [set(s.nodes) for s in before.states] == [set(s.nodes) for s in after.states]
    assert [set(b.nodes) for b in before.blocks] == [set(b.nodes) for b in after.blocks]


def test_rvm_takes_less_than_a_second(exports: dict[str, onnx.ModelProto]) -> None:
    graph = Graph.load(exports["static"])
    started = time.process_time()
    found(graph)
    assert time.process_time() - started < 1.0


# -- other cells ----------------------------------------------------------------------------------------------


def test_a_gru_without_a_split_takes_in_the_conv_that_feeds_it_alone() -> None:
    graph = tiny.read(tiny.GRU)
    closures = found(graph)
    holds(graph, closures)
    assert ops(graph, closures.recurrent[0]) == Counter(
        {"Conv": 3, "Relu": 1, "Concat": 2, "Sigmoid": 1, "Split": 1, "Mul": 2, "Tanh": 1, "Sub": 1, "Add": 1})
    assert [weighted(graph, b) for b in closures.blocks] == [3, 1]


def test_the_states_of_an_lstm_share_one_closure() -> None:
    graph = tiny.read(tiny.LSTM)
    closures = found(graph)
    holds(graph, closures)
    assert [(s.pair.input, s.pair.output) for s in closures.states] == [("h", "h2"), ("c", "c2")]
    assert len(closures.recurrent) == 1
    assert convs(graph, closures.recurrent[0]) == [(16, 4, 3, 3), (16, 4, 3, 3)]     # W_x and W_h
    assert ops(graph, closures.recurrent[0]) == Counter(
        {"Conv": 2, "Add": 2, "Split": 1, "Sigmoid": 3, "Tanh": 2, "Mul": 3})
    assert [weighted(graph, b) for b in closures.blocks] == [3, 1]      # with the conv that feeds it alone


def test_two_states_of_one_cell() -> None:
    graph = tiny.read(tiny.TWO_STATES)
    closures = found(graph)
    holds(graph, closures)
    assert len(closures.states) == 2
    assert len(closures.recurrent) == 1
    assert ops(graph, closures.recurrent[0]) == Counter({"Concat": 1, "Conv": 1, "Split": 1, "Add": 2})


def test_stacked_states_have_their_own_closures() -> None:
    graph = tiny.read("""(float[1,3,8,8] src, float[1,4,8,8] a, float[1,4,8,8] b, float[4,7,3,3] w0, float[4,8,3,3] w1)
            => (float[1,4,8,8] a2, float[1,4,8,8] b2) {
        xa = Concat <axis = 1> (src, a)
        a1 = Conv <pads = [1,1,1,1]> (xa, w0)
        a2 = Tanh (a1)
        xb = Concat <axis = 1> (a2, b)
        b1 = Conv <pads = [1,1,1,1]> (xb, w1)
        b2 = Tanh (b1)
    }""")
    closures = found(graph)
    holds(graph, closures)
    assert [len(c) for c in closures.recurrent] == [3, 3]
    assert [weighted(graph, b) for b in closures.blocks] == [1, 1]


def test_a_fed_back_alpha_closes_over_the_network() -> None:
    graph = tiny.read(tiny.LAST_ALPHA)
    closures = found(graph)
    holds(graph, closures)
    assert [(s.pair.input, s.pair.output) for s in closures.states] == [("last", "pha")]
    assert ops(graph, closures.recurrent[0]) == Counter({"Concat": 1, "Conv": 2, "Sigmoid": 1})
    assert [weighted(graph, b) for b in closures.blocks] == [2, 1]


@pytest.mark.parametrize("text", [tiny.FEED_FORWARD, tiny.TWO_IMAGES])
def test_feed_forward_networks_have_no_closures(text: str) -> None:
    graph = tiny.read(text)
    closures = found(graph)
    holds(graph, closures)
    assert closures.states == ()
    assert closures.recurrent == ()


def test_an_ambiguous_cell_is_an_error() -> None:
    with pytest.raises(ModelError, match="--pair"):
        found(tiny.read(tiny.AMBIGUOUS))


def test_closures_that_feed_each_other_become_one_block() -> None:
    # a' reads b late and b' reads a late: each is convex, but neither can stand before the other.
    graph = tiny.read("""(float[1,3] x, float[1,2] a, float[1,2] b, float[3,2] w0, float[2,2] w1, float[2,2] w2)
            => (float[1,2] a2, float[1,2] b2) {
        e = MatMul (x, w0)
        a0 = Add (a, e)
        b0 = Sub (b, e)
        aw = MatMul (a0, w1)
        bw = MatMul (b0, w2)
        a1 = Add (a0, bw)
        b1 = Sub (b0, aw)
        a2 = Tanh (a1)
        b2 = Tanh (b1)
    }""")
    closures = found(graph)
    holds(graph, closures)
    assert [s.pair.output for s in closures.states] == ["a2", "b2"]
    assert len(closures.blocks) == 1


# -- blocks ---------------------------------------------------------------------------------------------------


def test_a_local_residual_is_one_block_and_a_long_skip_is_not() -> None:
    def chain(count: int) -> list[int]:
        weights = ", ".join(f"float[4,4,1,1] w{k}" for k in range(count + 2))
        body = "\n".join(f"c{k} = Conv (c{k - 1}, w{k})" for k in range(1, count + 1))
        graph = tiny.read(f"""(float[1,4,8,8] src, {weights}) => (float[1,4,8,8] y) {{
            c0 = Conv (src, w0)
            {body}
            sum = Add (c0, c{count})
            y = Conv (sum, w{count + 1})
        }}""")
        closures = found(graph)
        holds(graph, closures)
        return [weighted(graph, b) for b in closures.blocks]

    assert chain(3) == [1, 3, 1]
    assert chain(LOCAL) == [1, LOCAL, 1]
    assert chain(LOCAL + 1) == [1] * (LOCAL + 3)


def test_an_inverted_residual_without_residual_is_one_block() -> None:
    graph = tiny.read("""(float[1,3,8,8] src, float[4,3,3,3] w0, float[8,4,1,1] w1, float[8,1,3,3] w2,
            float[6,8,1,1] w3, float[6,1,3,3] w4, float[2,6,1,1] w5) => (float[1,2,8,8] y) {
        a = Conv <pads = [1,1,1,1]> (src, w0)
        b = Conv (a, w1)
        c = Relu (b)
        d = Conv <pads = [1,1,1,1], group = 8> (c, w2)
        e = Relu (d)
        f = Conv (e, w3)
        g = Conv <pads = [1,1,1,1], group = 6> (f, w4)
        y = Conv (g, w5)
    }""")
    closures = found(graph)
    holds(graph, closures)
    # the second depthwise conv has no expansion of its own: the projection before it closes the first block
    assert [convs(graph, b.nodes) for b in closures.blocks] == [
        [(4, 3, 3, 3)], [(8, 4, 1, 1), (8, 1, 3, 3), (6, 8, 1, 1)], [(6, 1, 3, 3), (2, 6, 1, 1)]]


def test_activations_close_a_block_and_resizing_opens_one() -> None:
    graph = tiny.read("""(float[1,3,8,8] src, float[4,3,3,3] w0, float[4,4,1,1] w1, float[4] w3, int64[3] wk)
            => (float[1,4,4,4] y) {
        a = Conv <pads = [1,1,1,1]> (src, w0)
        b = BatchNormalization (a, w3, w3, w3, w3)
        c = HardSigmoid (b)
        d = Mul (b, c)
        e = AveragePool <kernel_shape = [2,2], strides = [2,2]> (d)
        f = Neg (e)
        g = Conv (f, w1)
        y = Relu (g)
    }""")
    closures = found(graph)
    holds(graph, closures)
    assert [list(ops(graph, b.nodes)) for b in closures.blocks] == [
        ["Conv", "BatchNormalization", "HardSigmoid", "Mul"], ["AveragePool", "Neg", "Conv", "Relu"]]


@pytest.mark.parametrize(("between", "strides", "tapped", "blocks"), [
    ("Relu", 1, False, [2]),
    ("Relu", 2, False, [1, 1]),
    ("AveragePool <kernel_shape = [1,1]>", 1, False, [1, 1]),
    ("Relu", 1, True, [1, 2]),
])
def test_a_double_conv_is_one_block(between: str, strides: int, tapped: bool, blocks: list[int]) -> None:
    more = "z = Conv <pads = [1,1,1,1]> (y, w1) t = Conv <pads = [1,1,1,1]> (a, w1)" if tapped else "z = Relu (y)"
    graph = tiny.read(f"""(float[1,3,8,8] src, float[4,3,3,3] w0, float[4,4,3,3] w1)
            => (float[1,4,A,B] z{', float[1,4,8,8] t' if tapped else ''}) {{
        a = Conv <pads = [1,1,1,1]> (src, w0)
        b = {between} (a)
        y = Conv <pads = [1,1,1,1], strides = [{strides},{strides}]> (b, w1)
        {more}
    }}""")
    closures = found(graph)
    holds(graph, closures)
    assert [weighted(graph, b) for b in closures.blocks][:len(blocks)] == blocks


def test_a_conv_that_feeds_others_too_stays_out_of_the_recurrent_block() -> None:
    text = """(float[1,3,8,8] src, float[1,4,8,8] r, float[4,3,3,3] w0, float[4,8,3,3] w1, float[1,4,1,1] w2)
            => (float[1,4,8,8] s, float[1,1,8,8] y) {
        x = Conv <pads = [1,1,1,1]> (src, w0)
        both = Concat <axis = 1> (x, r)
        new = Conv <pads = [1,1,1,1]> (both, w1)
        s = Add (new, r)
        y = Conv (%s, w2)
    }"""
    for read, alone in (("s", True), ("x", False)):
        graph = tiny.read(text % read)
        closures = found(graph)
        holds(graph, closures)
        assert len(convs(graph, closures.recurrent[0])) == 1 + alone
        assert [weighted(graph, b) for b in closures.blocks] == ([2, 1] if alone else [1, 1, 1])


def test_a_result_of_the_model_is_no_feeder() -> None:
    graph = tiny.read(tiny.GRU)
    graph.outputs.append(graph.value("x"))
    assert len(convs(graph, found(graph).recurrent[0])) == 2


def test_constants_in_the_making_cut_nothing() -> None:
    graph = tiny.read("""(float[1,3,8,8] src, float[4,3,1,1] w0, float[1,4,1,1] w2, float[2,4,1,1] w1)
            => (float[1,2,8,8] y) {
        bias = Identity (w2)
        a = Conv (src, w0)
        b = Add (a, bias)
        c = Relu (b)
        y = Conv (c, w1)
    }""")
    closures = found(graph)
    holds(graph, closures)
    assert [ops(graph, b.nodes) for b in closures.blocks] == [
        Counter({"Identity": 1, "Conv": 1, "Add": 1, "Relu": 1}), Counter({"Conv": 1})]


def test_a_network_without_weights_is_one_block() -> None:
    graph = tiny.read("(float[1,8] x) => (float[1,8] y) { a = Relu (x) y = Neg (a) }")
    assert [len(b.nodes) for b in found(graph).blocks] == [2]


@settings(max_examples=150)
@given(st.lists(st.tuples(st.sampled_from(["MatMul", "Sum", "Relu", "Concat", "Half"]),
                          st.lists(st.integers(0, 60), min_size=1, max_size=3)), min_size=2, max_size=40),
       st.lists(st.tuples(st.integers(0, 2), st.integers(0, 60)), max_size=3, unique_by=(lambda p: p[0])))
def test_every_graph_is_cut_into_whole_blocks(steps: list[tuple[str, list[int]]], ends: list[tuple[int, int]]) -> None:
    values, lines = ["x", "s0", "s1", "s2"], []
    for k, (op, places) in enumerate(steps):
        reads = [values[p % len(values)] for p in places]
        line = {"MatMul": f"v{k} = MatMul ({reads[0]}, w0)", "Sum": f"v{k} = Sum ({', '.join(reads)})",
                "Relu": f"v{k} = Relu ({reads[0]})",
                "Concat": f"t{k} = Concat <axis = 0> ({', '.join(reads)}) v{k} = ReduceMean <keepdims = 1> (t{k}, wk)",
                "Half": f"v{k}, u{k} = Split <axis = 1, num_outputs = 2> ({reads[0]})"}[op]
        lines.append(line)
        values += [f"v{k}", f"u{k}"] if op == "Half" else [f"v{k}"]
    made = [v for v in values if v[0] in "uv"]
    targets = dict.fromkeys([made[-1], *(made[p % len(made)] for _, p in ends)])
    graph = tiny.read(f"""(float[N,M] x, float[N,M] s0, float[N,M] s1, float[N,M] s2, float[2,2] w0, int64[1] wk)
            => ({', '.join(f'float[N,M] {t}' for t in targets)}) {{ {chr(10).join(lines)} }}""")
    by_hand = {"s0": "", "s1": "", "s2": ""}
    for (state, _), target in zip(ends, list(targets)[1:], strict=False):
        by_hand[f"s{state}"] = target
    holds(graph, find_closures(graph, pair_states(graph, {"x": "", **by_hand})))


def test_thousands_of_nodes_take_seconds() -> None:
    count = 1000
    lines, value = [], "c"
    for k in range(count):
        lines.append(f"a{k} = MatMul ({value}, w0) b{k} = Relu (a{k})")
        lines.append(f"d{k} = MatMul (b{k}, w0) e{k} = Add (d{k}, {value})")
        value = f"e{k}"
    graph = tiny.read(f"""(float[1,4] src, float[1,4] r, float[4,4] w0) => (float[1,4] s, float[1,4] y) {{
        x = MatMul (src, w0)
        c = Add (x, r)
        s = Tanh (c)
        {chr(10).join(lines)}
        y = Relu ({value})
    }}""")
    started = time.process_time()
    closures = found(graph)
    assert time.process_time() - started < 5.0
    assert len(closures.blocks) == count + 1
    holds(graph, closures)


# -- the pass -------------------------------------------------------------------------------------------------


def test_the_pass_reports_and_leaves_the_graph() -> None:
    graph = tiny.read(tiny.LSTM)
    context = Context(Options())
    result, = run_passes(graph, [FindClosures()], context)
    assert context.found["find_closures"] == found(graph)
    assert result.modified == 0
    assert result.notes == ()
    assert [(s["input"], s["output"]) for s in result.report["states"]] == [("h", "h2"), ("c", "c2")]
    assert len(result.report["closures"]) == 1
    assert sum(len(b["nodes"]) for b in result.report["blocks"]) == len(graph.nodes)


def test_the_pass_says_when_there_is_no_state() -> None:
    result, = run_passes(tiny.read(tiny.FEED_FORWARD), [FindClosures()], Context(Options()))
    assert result.notes == ("no recurrent state found: the model is feed-forward",)
    assert result.report["closures"] == []


def test_the_pass_takes_pairs_by_hand() -> None:
    context = Context(Options(pairs={"a": "b2"}))
    run_passes(tiny.read(tiny.AMBIGUOUS), [FindClosures()], context)
    assert [(s.pair.input, s.pair.output) for s in context.found["find_closures"].states] == [("a", "b2"), ("b", "a2")]
