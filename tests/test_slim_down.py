"""The file gets smaller, nothing that it computes changes, and the float model's names stay."""

from __future__ import annotations

import numpy as np
import pytest
from compiling import clips, network, rerun, run_to

from passes.slim_down import SlimDown
from vmq.runtime import Session


@pytest.mark.parametrize("bits", ["8", "w4a8", "4"])
def test_smaller_and_the_same_bits(bits: str):
    graph = network()
    context = run_to("expose_states", graph, bits)
    before = graph.copy()
    result = rerun("slim_down", graph, context)
    assert result.modified == result.report["shared_constants"] + result.report["short_names"]
    assert result.report["shared_constants"] > 0 < result.report["short_names"]
    assert len(graph.to_bytes()) < 0.9 * len(before.to_bytes())
    assert graph.signature() == before.signature()
    for optimize in (False, True):
        sessions = [Session(g, optimize=optimize) for g in (before, graph)]
        for frame in clips()[0].frames(0, 3):
            one, other = (s.step(frame) for s in sessions)
            for name, values in one.items():
                np.testing.assert_array_equal(other[name], values)


def test_names_of_the_float_graph_stay_and_no_constant_is_there_twice():
    graph = network()
    context = run_to("expose_states", graph, "4")
    assert context.reference is not None
    known = {v.name for v in context.reference.values()}
    before = {v.name for n in graph.nodes for v in n.outputs if v.name in known}
    rerun("slim_down", graph, context)
    assert {v.name for n in graph.nodes for v in n.outputs if v.name in known} == before
    made = [v.name for n in graph.nodes for v in n.outputs if v.name not in known]
    assert made
    assert max(map(len, made)) <= 6
    assert len(set(made)) == len(made)
    seen = [(np.asarray(c.values).dtype.name, c.shape, np.asarray(c.values).tobytes()) for c in graph.constants()]
    assert len({(t, tuple(s), b) for t, s, b in seen}) == len(seen)


def test_again_changes_nothing():
    graph = network()
    context = run_to("slim_down", graph, "4")
    before = graph.to_bytes()
    assert rerun("slim_down", graph, context).modified == 0
    assert graph.to_bytes() == before


def test_a_constant_that_is_an_output_stays():
    graph = network()
    context = run_to("expose_states", graph, "8")
    twice = [graph.constant(f"same{k}", np.full(3, 0.25, np.float32)) for k in range(2)]
    for k, constant in enumerate(twice):
        out = graph.add("Identity", [constant], f"out{k}", {}, [3])
        graph.outputs.append(out)
    result_names = [o.name for o in graph.outputs]
    SlimDown().run(graph, context)
    assert [o.name for o in graph.outputs] == result_names
    assert sum(c.name.startswith("same") for c in graph.constants()) == 1
