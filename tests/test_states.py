"""States are paired by topology: the right pairs, none where there are none, and an error where it cannot tell."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
import tiny_recurrent as tiny
from hypothesis import given
from hypothesis import strategies as st

from vmq.errors import ModelError, OptionError
from vmq.graph import Graph
from vmq.states import DataFlow, StatePair, all_operands, data_operands, pair_states


def paired(graph: Graph, **overrides: str) -> dict[str, str]:
    return {p.input: p.output for p in pair_states(graph, overrides)}


@pytest.mark.parametrize(("text", "pairs"), [
    (tiny.GRU, {"r": "s"}),
    (tiny.LSTM, {"h": "h2", "c": "c2"}),
    (tiny.TWO_STATES, {"a": "a2", "b": "b2"}),
    (tiny.LAST_ALPHA, {"last": "pha"}),
    (tiny.FEED_FORWARD, {}),
    (tiny.TWO_IMAGES, {}),
], ids=["gru", "lstm", "two states", "last alpha", "feed-forward", "two images"])
def test_pairs(text: str, pairs: dict[str, str]) -> None:
    assert paired(tiny.read(text)) == pairs


def test_pairs_come_in_the_order_of_the_inputs() -> None:
    graph = tiny.read(tiny.LSTM)
    assert pair_states(graph) == (StatePair("h", "h2"), StatePair("c", "c2"))
    graph.inputs.reverse()
    graph.outputs.reverse()
    assert pair_states(graph) == (StatePair("c", "c2"), StatePair("h", "h2"))


def test_names_of_states_do_not_matter() -> None:
    graph = tiny.read(tiny.LSTM)
    h, c, h2, c2 = (graph.value(name) for name in ("h", "c", "h2", "c2"))
    h.name, c.name, h2.name, c2.name = "c", "h", "c2", "h2"
    assert paired(graph) == {"c": "c2", "h": "h2"}
    h2.name, c2.name = "h2", "c2"
    assert paired(graph) == {"c": "h2", "h": "c2"}


@pytest.mark.parametrize("text", [tiny.GRU, tiny.LSTM, tiny.TWO_STATES])
def test_free_dimensions_change_nothing(text: str) -> None:
    expected = paired(tiny.read(text))
    graph = tiny.read(text)
    for k, value in enumerate([*graph.inputs, *graph.outputs]):
        frame = value.name == "src"
        value.shape = ["n", 3, "h", "w"] if frame else [f"{axis}{k}" for axis in "nchw"]
    assert paired(graph) == expected


def test_free_sizes_with_known_channels_tell_a_last_alpha_from_a_foreground() -> None:
    graph = tiny.read(tiny.LAST_ALPHA)
    for value in [*graph.inputs, *graph.outputs]:
        value.shape = ["n", value.shape[1], "h", "w"]
    assert paired(graph) == {"last": "pha"}
    graph.value("fgr").shape = graph.value("pha").shape = graph.value("last").shape = ["n", "c", "h", "w"]
    with pytest.raises(ModelError, match="--pair last="):
        pair_states(graph)


def test_unknown_output_shapes_change_nothing() -> None:
    graph = tiny.read(tiny.GRU)
    for value in graph.outputs:
        value.shape = None
    assert paired(graph) == {"r": "s"}


def test_a_first_state_of_one_element_is_expanded_to_the_shape_of_the_frame() -> None:
    graph = tiny.read("""(float[N,3,H,W] src, float[A,B,C,D] r, float[4,3,3,3] w0, float[4,8,3,3] w1)
            => (float[N,3,H,W] fgr, float[E,F,G,I] s) {
        x = Conv <pads = [1,1,1,1]> (src, w0)
        size = Shape (x)
        full = Expand (r, size)
        both = Concat <axis = 1> (x, full)
        d = Conv <pads = [1,1,1,1]> (both, w1)
        s = Add (d, full)
        sum = ReduceMean <keepdims = 1> (s)
        fgr = Add (sum, src)
    }""")
    assert paired(graph) == {"r": "s"}
    nodes = DataFlow(graph).between(graph.value("r"), graph.value("s"))
    assert [graph.nodes[k].op for k in DataFlow.members(nodes)] == ["Expand", "Concat", "Conv", "Add"]


def test_a_size_that_comes_from_an_input_is_no_data() -> None:
    graph = tiny.read("""(float[1,1,8,8] src, float[1,1,8,8] ref, float[1,1,3,3] w0) => (float[1,1,8,8] y) {
        x = Conv <pads = [1,1,1,1]> (src, w0)
        size = Shape (ref)
        y = Resize <mode = "linear"> (x, , , size)
    }""")
    assert paired(graph) == {}
    resize = next(n for n in graph.nodes if n.op == "Resize")
    assert [v.name for v in data_operands(resize)] == ["x"]
    assert [v.name for v in all_operands(resize)] == ["x", "size"]


def test_identity_and_cast_around_a_state_are_looked_through() -> None:
    graph = tiny.read("""(float[1,3,8,8] src, float[1,4,8,8] r, float[4,3,3,3] w0)
            => (float[1,4,8,8] s) {
        r0 = Identity (r)
        r1 = Cast <to = 1> (r0)
        x = Conv <pads = [1,1,1,1]> (src, w0)
        y = Add (x, r1)
        s = Identity (y)
    }""")
    assert paired(graph) == {"r": "s"}


def test_a_state_that_is_never_updated_is_none() -> None:
    text = """(float[1,3,8,8] src, float[1,4,8,8] r, float[4,3,3,3] w0) => (float[1,4,8,8] s, float[1,4,8,8] y) {
        s = %s (r)
        x = Conv <pads = [1,1,1,1]> (src, w0)
        y = Add (x, r)
    }"""
    assert paired(tiny.read(text % "Identity")) == {}
    assert paired(tiny.read(text % "Relu")) == {"r": "y"}


def test_an_output_that_is_an_input_is_none() -> None:
    graph = tiny.read(tiny.GRU)
    graph.outputs.append(graph.value("r"))
    assert paired(graph) == {}


def test_a_colour_image_fed_back_beside_an_encoder_of_the_frame() -> None:
    # The frame's own conv does not see the last result: the one is told from the other.
    graph = tiny.read("""(float[1,3,8,8] src, float[1,3,8,8] last, float[4,3,3,3] w0, float[3,7,3,3] w1)
            => (float[1,3,8,8] fgr) {
        x = Conv <pads = [1,1,1,1]> (src, w0)
        both = Concat <axis = 1> (x, last)
        fgr = Conv <pads = [1,1,1,1]> (both, w1)
    }""")
    assert paired(graph) == {"last": "fgr"}


def test_frame_and_state_of_one_shape_are_told_apart_by_depth() -> None:
    graph = tiny.read("""(float[1,8] x, float[1,8] h, float[8,8] w0, float[8,8] w1, float[8,8] w2)
            => (float[1,8] y) {
        e = MatMul (x, w0)
        wx = MatMul (e, w1)
        wh = MatMul (h, w2)
        sum = Add (wx, wh)
        y = Tanh (sum)
    }""")
    assert paired(graph) == {"h": "y"}


def test_of_equal_candidates_the_image_is_the_frame() -> None:
    graph = tiny.read("""(float[1,3,8,8] src, float[1,C,8,8] h, float[3,3,3,3] w0, float[3,3,3,3] w1)
            => (float[1,D,8,8] y) {
        wx = Conv <pads = [1,1,1,1]> (src, w0)
        wh = Conv <pads = [1,1,1,1]> (h, w1)
        sum = Add (wx, wh)
        y = Tanh (sum)
    }""")
    assert paired(graph) == {"h": "y"}


def test_a_tie_goes_to_the_choice_that_leaves_the_other_input_an_output() -> None:
    # a could be p or q, both one node away; b can only be q.
    graph = tiny.read("""(float[1,3] x, float[1,2] a, float[1,2] b, float[3,2] w0)
            => (float[1,2] q, float[1,2] p) {
        e = MatMul (x, w0)
        p = Add (a, e)
        q = Sum (a, b, e)
    }""")
    assert paired(graph) == {"a": "p", "b": "q"}


def test_candidates_that_are_equally_good_are_an_error_that_names_both() -> None:
    with pytest.raises(ModelError) as caught:
        pair_states(tiny.read(tiny.AMBIGUOUS))
    message = str(caught.value)
    assert "\n" not in message
    choices = set(re.findall(r"--pair (\w+=\w+)", message))
    assert len(choices) == 2
    assert choices <= {"a=a2", "a=b2", "b=a2", "b=b2"}
    assert all(name in message for choice in choices for name in choice.split("="))


def test_overrides_settle_what_is_ambiguous() -> None:
    graph = tiny.read(tiny.AMBIGUOUS)
    assert paired(graph, a="b2") == {"a": "b2", "b": "a2"}
    assert paired(graph, b="b2") == {"a": "a2", "b": "b2"}
    assert paired(graph, a="", b="") == {}


def test_overrides_win_over_topology() -> None:
    assert paired(tiny.read(tiny.LAST_ALPHA), last="") == {}
    assert paired(tiny.read(tiny.TWO_IMAGES), background="fgr") == {"background": "fgr"}
    assert paired(tiny.read(tiny.LSTM), h="c2", c="h2") == {"h": "c2", "c": "h2"}


@pytest.mark.parametrize(("overrides", "says"), [
    ({"q": "s"}, "no input 'q'; it has 'src', 'r'"),
    ({"r": "q"}, "no output 'q'; it has 'pha', 's'"),
    ({"r": "pha"}, "differ in type or shape"),
])
def test_overrides_that_make_no_sense(overrides: dict[str, str], says: str) -> None:
    with pytest.raises(OptionError, match=re.escape(says)):
        pair_states(tiny.read(tiny.GRU), overrides)


def test_an_output_belongs_to_one_input() -> None:
    with pytest.raises(OptionError, match="already belongs"):
        pair_states(tiny.read(tiny.LSTM), {"h": "h2", "c": "h2"})


def test_whole_numbers_are_no_states() -> None:
    graph = tiny.read("""(float[1,8] x, int64[1,8] count) => (float[1,8] y, int64[1,8] next) {
        i = Cast <to = 7> (x)
        next = Add (count, i)
        y = Tanh (x)
    }""")
    assert paired(graph) == {}


def test_distance_and_what_lies_between() -> None:
    graph = tiny.read(tiny.GRU)
    flow = DataFlow(graph)
    r, s, src = (graph.value(n) for n in ("r", "s", "src"))
    assert [graph.nodes[k].op for k in flow.members(flow.between(r, s))] == [
        "Concat", "Conv", "Sigmoid", "Split", "Mul", "Concat", "Conv", "Tanh", "Sub", "Mul", "Add"]
    assert flow.distance(r, s) == 1
    assert flow.distance(src, s) == 8                # Conv Relu Concat Conv Tanh Sub Mul Add
    assert flow.distance(r, r) == 0
    assert flow.names(flow.between(src, r)) == ()
    with pytest.raises(ValueError, match="no data path"):
        flow.distance(src, r)


@given(st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=3), min_size=1, max_size=25), st.data())
def test_sets_of_nodes_agree_with_walking_the_graph(reads: list[list[int]], data: st.DataObject) -> None:
    names = ["x"]
    lines = []
    for k, places in enumerate(reads):
        lines.append(f"v{k} = Sum ({', '.join(names[p % len(names)] for p in places)})")
        names.append(f"v{k}")
    graph = tiny.read(f"(float[1] x) => (float[1] {names[-1]}) {{ {chr(10).join(lines)} }}")
    flow = DataFlow(graph)
    start = data.draw(st.integers(0, len(reads) - 1))

    def walk(edges: list[list[int]]) -> set[int]:
        seen, stack = {start}, [start]
        while stack:
            new = set(edges[stack.pop()]) - seen
            seen |= new
            stack += new
        return seen

    assert set(flow.members(flow.descendants(1 << start))) == walk(flow.users)
    assert set(flow.members(flow.ancestors(1 << start))) == walk(flow.feeds)
    assert all(a < b for a, b in pairwise(flow.members(flow.descendants(1 << start))))
