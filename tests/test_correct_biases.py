"""Bias correction restores what rounding took from the mean, and nothing else."""

from __future__ import annotations

import dataclasses

import numpy as np
from compiling import clips, network, rerun, run_to

from vmq.runtime import Session


def errors_of_means(graph, reference, names):
    """Largest |E[y] - E[y']| of the values called `names` over the clips, in closed loop."""
    ours, exact = Session(graph, extra=names), Session(reference, extra=names)
    sums = dict.fromkeys(names, 0.0)
    for clip in clips():
        ours.reset()
        exact.reset()
        for frame in clip.frames():
            a, b = exact.step(frame), ours.step(frame)
            for name in names:
                sums[name] = sums[name] + (a[name] - b[name]).mean((0, 2, 3))
    return {name: float(np.abs(total).max()) / 8 for name, total in sums.items()}


def test_means_of_layers_come_back():
    plain, graph = network(), network()
    run_to("calibrate_ranges", plain, "4")
    context = run_to("correct_biases", graph, "4")
    names = ["first", "deep", "f3", "point", "mixed", "g", "n", "head"]
    before, after = (errors_of_means(g, context.reference, names) for g in (plain, graph))
    assert sum(after.values()) < 0.5 * sum(before.values())
    assert after["first"] < 0.2 * before["first"] + 1e-4


def test_layers_without_bias_get_one():
    graph = network()
    run_to("correct_biases", graph)
    assert all(len(n.inputs) == 3 for n in graph.nodes if n.op == "Conv")


def test_a_network_is_not_corrected_towards_itself():
    """Measured against its own twin, only rounding ties that flip between the two runs are left."""
    graph = network()
    context = run_to("calibrate_ranges", graph)
    twin = dataclasses.replace(context, reference=graph.copy(), found=context.found | {"insert_qdq": {}})
    against_itself = rerun("correct_biases", graph.copy(), twin).report["largest_shift"]
    against_float = rerun("correct_biases", graph, context).report["largest_shift"]
    assert against_itself < 0.05 * against_float


def test_a_recipe_can_leave_biases_alone():
    graph = network()
    context = run_to("calibrate_ranges", graph)
    before = graph.to_bytes()
    recipe = dataclasses.replace(context.options.recipe, correct_biases=False)
    assert rerun("correct_biases", graph, context, recipe=recipe).modified == 0
    assert graph.to_bytes() == before
