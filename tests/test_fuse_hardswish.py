"""Hard activations become one operator, and nothing else does."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_recurrent import read

from passes.fuse_hardswish import FuseHardswish
from vmq.graph import Graph
from vmq.pipeline import Context, run_passes
from vmq.runtime import Session
from vmq.spec import Options

HEAD = ("(float[1,3,8,8] src, float[1,3,1,1] w0, float wthree, float wnull, float wsix, float wsixth) "
        "=> (float[1,1,8,8] pha)")
FORMS = {
    "mul_hardsigmoid": ("HardSwish", "h = HardSigmoid <alpha = 0.16666667> (x) y = Mul (x, h)"),
    "hardsigmoid_mul": ("HardSwish", "h = HardSigmoid <alpha = 0.16666667> (x) y = Mul (h, x)"),
    "written_out": ("HardSwish", "a = Add (x, wthree) c = Clip (a, wnull, wsix) m = Mul (x, c) y = Div (m, wsix)"),
    "written_out_by_sixth": (
        "HardSwish", "a = Add (wthree, x) c = Clip (a, wnull, wsix) d = Mul (c, wsixth) y = Mul (d, x)"),
    "hardsigmoid": ("HardSigmoid", "a = Add (x, wthree) c = Clip (a, wnull, wsix) y = Div (c, wsix)"),
    "other_slope": (None, "h = HardSigmoid <alpha = 0.2> (x) y = Mul (x, h)"),
    "another_value": (None, "z = Neg (x) h = HardSigmoid <alpha = 0.16666667> (z) y = Mul (x, h)"),
    "relu6": (None, "c = Clip (x, wnull, wsix) y = Div (c, wsix)"),
    "other_shift": (None, "a = Add (x, wsixth) c = Clip (a, wnull, wsix) m = Mul (x, c) y = Div (m, wsix)"),
}


def graph_of(form: str) -> Graph:
    body = form.replace(") ", ")\n")
    graph = read(f"{HEAD} {{\n x = Conv (src, w0)\n {body}\n pha = Sigmoid (y) \n}}")
    for constant in graph.constants():
        values = {"wthree": 3.0, "wnull": 0.0, "wsix": 6.0, "wsixth": 1 / 6, "w0": None}[constant.name]
        constant.values = np.array(values, np.float32) if values is not None else constant.values * np.float32(6)
    return graph


@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str):
    wanted, text = FORMS[form]
    before, graph = graph_of(text), graph_of(text)
    result = run_passes(graph, [FuseHardswish()], Context(Options()))[0]
    ops = [n.op for n in graph.nodes]
    assert ops == (["Conv", wanted, "Sigmoid"] if wanted else [n.op for n in before.nodes])
    assert result.modified == (1 if wanted else 0) or form == "written_out_by_sixth"
    one, two = Session(before, optimize=False), Session(graph, optimize=False)
    frame = np.random.default_rng(0).integers(0, 256, (3, 8, 8), np.uint8)
    assert np.abs(one.step(frame)["pha"] - two.step(frame)["pha"]).max() < 1e-6


def test_a_gate_that_is_read_elsewhere_stays():
    graph = read("""(float[1,3,8,8] src, float[1,3,1,1] w0) => (float[1,1,8,8] pha) {
        x = Conv (src, w0)
        h = HardSigmoid <alpha = 0.16666667> (x)
        y = Mul (x, h)
        pha = Add (y, h)
    }""")
    run_passes(graph, [FuseHardswish()], Context(Options()))
    assert sorted(n.op for n in graph.nodes) == ["Add", "Conv", "HardSigmoid", "HardSwish"]
