"""Grids of activations lose less behind the layers that read them, and nothing else changes."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from compiling import changed, network, rerun, run_to
from tiny_recurrent import read

from vmq import fit_scales as module
from vmq.graph import Graph, Variable
from vmq.lanes import Lanes
from vmq.layers import float_source, never_negative
from vmq.pipeline import Context
from vmq.recipe import BlockRecipe, Recipe
from vmq.runtime import create_session
from vmq.shadow import Shadow
from vmq.spec import EFFORTS

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = dataclasses.replace(EFFORTS["fast"], calibration=8, bias_frames=4, sequences=3, frames=2, block_iterations=2,
                           loop_frames=8)
PLAIN = Recipe("plain", range_steps=20, correct_biases=False)
FIT = dataclasses.replace(PLAIN, blocks=BlockRecipe(learn=(), fit=True))

# x has one channel that reaches far and is hardly read; y is read by two layers, one without a bias.
OUTLIER = """(float[1,3,32,48] src) => (float[1,1,32,48] pha)
    <float[3,3,1,1] w = {0.6,-0.2,0.3, 0.1,0.5,-0.4, 9,9,9}, float[3] wb = {0.1,0,-2},
     float[2,3,1,1] u = {1,-1,0.001, 0.5,0.7,0.002}, float[2] ub = {0.2,0.1},
     float[1,2,1,1] v = {1,-0.5}, float[1,2,3,3] t = {1,2,1,2,4,2,1,2,1, 1,0,-1,2,0,-2,1,0,-1},
     float[1] tb = {0.1}, float[1,1,1,1] p = {0.3}> {
    x = Conv (src, w, wb)
    y0 = Conv (x, u, ub)
    y = Relu (y0)
    a = Conv (y, v)
    b = Conv <pads = [1,1,1,1]> (y, t, tb)
    c = Add (a, b)
    d = Conv (c, p)
    pha = Sigmoid (d)
}"""


def prepared(graph: Graph, bits: str = "4") -> Context:
    return run_to("correct_biases", graph, bits, recipe=PLAIN, effort=TINY)


def grids(graph: Graph) -> dict[str, tuple[float, float]]:
    """Scale and zero point of every 4-bit activation, by the value that is rounded."""
    return {float_source(n.inputs[0]).name: (float(n.inputs[1].values), float(n.inputs[2].values.astype(np.float32)))
            for n in graph.nodes if n.op == "QuantizeLinear" and n.inputs[2].dtype.name == "uint4"}


def test_a_channel_that_is_hardly_read_gets_few_levels():
    graph = read(OUTLIER)
    context = prepared(graph)
    before = grids(graph)
    rerun("reconstruct_blocks", graph, context, recipe=FIT, effort=TINY)
    after = grids(graph)
    assert after["x"][0] < 0.5 * before["x"][0]
    assert after["y"] != before["y"]


class Judge:
    """What the layers that read a value make of a grid for it, as ONNX Runtime computes it."""

    def __init__(self, reference: Graph, name: str, feeds: list[dict[str, Any]]) -> None:
        apart = reference.copy()
        value = apart.value(name)
        self.biased = [len(n.inputs) > 2 for n in value.outputs if n.op == "Conv"]
        self.results = [n.outputs[0].name for n in value.outputs if n.op == "Conv"]
        given = Variable("given", dtype=np.float32, shape=value.shape)
        apart.replace_uses(value, given, list(value.outputs))
        apart.inputs.append(given)
        self.session = create_session(apart, extra=self.results)
        exact = create_session(reference, extra=[name, *self.results])
        self.feeds = feeds
        self.values = [exact.run([name, *self.results], f) for f in feeds]

    def __call__(self, scale: float, zero: float) -> float:
        """The sum over layers of the error's power relative to the result's."""
        errors = []
        for feeds, (x, *results) in zip(self.feeds, self.values, strict=True):
            rounded = (np.clip(np.rint(x / np.float32(scale)) + zero, 0, 15) - zero) * np.float32(scale)
            found = self.session.run(self.results, feeds | {"given": rounded.astype(np.float32)})
            errors.append([f - r for f, r in zip(found, results, strict=True)])
        whole = [power([v[1 + k] for v in self.values], b) for k, b in enumerate(self.biased)]
        lost = [power([e[k] for e in errors], b) for k, b in enumerate(self.biased)]
        return sum(a / b for a, b in zip(lost, whole, strict=True))


def power(results: list[Any], biased: bool) -> float:
    rows = np.concatenate(results).astype(np.float64)
    return float((rows.var((0, 2, 3)) if biased else np.square(rows).mean((0, 2, 3))).sum())


@pytest.mark.parametrize("text", [OUTLIER, None])
@pytest.mark.parametrize("part", ["FACTORS", "SHIFTS", "FINER"])
def test_what_is_chosen_loses_least_of_what_is_tried(text: str | None, part: str, monkeypatch: pytest.MonkeyPatch):
    graph = read(text) if text else network()
    context = prepared(graph)
    assert context.reference is not None
    renamed, rng = context.found["insert_qdq"], np.random.default_rng(3)
    sources = {v.name: renamed.get(s.name, s.name) for v in graph.values() for s in [float_source(v)]}
    feeds = [{v.name: rng.random(v.shape, np.float32) for v in context.reference.inputs} for _ in range(3)]
    for other, nothing in {"FACTORS": (1.0,), "SHIFTS": (0,), "FINER": (1.0,)}.items():
        if other != part:
            monkeypatch.setattr(module, other, nothing)
    before, shadow = grids(graph), Shadow(graph)
    with Lanes() as lanes:
        module.fit_scales(shadow, Shadow(context.reference), sources,
                          [{k: torch.from_numpy(v) for k, v in f.items()} for f in feeds], lanes)
    shadow.write_back()
    judged = 0
    for name, (scale, zero) in grids(graph).items():
        value = context.reference.value(renamed.get(name, name))
        if any(n.op != "Conv" for n in value.outputs) or list(before.values()).count(before[name]) > 1:
            continue                                                    # others are read as parts of something else
        judge, (old, start) = Judge(context.reference, value.name, feeds), before[name]
        if part == "SHIFTS":
            shifts = [d for d in module.SHIFTS if 0 <= start + d <= 15 and (d == 0 or not never_negative(value))]
            tried = {(old, start + d): judge(old, start + d) for d in shifts}
        else:
            tried = {(old * f, start): judge(old * f, start) for f in getattr(module, part)}
        assert judge(scale, zero) == pytest.approx(min(tried.values()), rel=1e-4)
        assert (scale, zero) == pytest.approx(min(tried, key=tried.__getitem__), rel=1e-6)
        judged += 1
    assert judged >= 2


@pytest.mark.parametrize("bits", ["8", "w4a8"])
def test_grids_of_8_bits_are_left(bits: str):
    graph = network()
    context = prepared(graph, bits)
    before = graph.to_bytes()
    rerun("reconstruct_blocks", graph, context, recipe=FIT, effort=TINY)
    assert graph.to_bytes() == before


def test_only_grids_of_4_bits_change():
    graph = network()
    context = prepared(graph)
    before = graph.copy()
    report = rerun("reconstruct_blocks", graph, context, recipe=FIT, effort=TINY)
    found = {c.name for n in graph.nodes if n.op == "QuantizeLinear" and n.inputs[2].dtype.name == "uint4"
             for c in n.inputs[1:]}
    assert changed(before, graph) <= found
    assert report.modified == len(changed(before, graph)) > 5
