"""Free dimensions are bound to one size; states get the shapes that a frame gives them; static models stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_matting
from onnx_text import load, ops, run

from models import rvm
from passes.bind_shapes import BindShapes, frame_size
from passes.fold_shapes import FoldShapes
from passes.raise_opset import RaiseOpset
from vmq.errors import ModelError, OptionError, VmqError
from vmq.graph import Graph, Variable
from vmq.pipeline import Context, PassResult, run_passes
from vmq.spec import Options

# The state starts as 1x1x1x1 and is expanded inside, as in RVM; the net runs at size * ratio.
DYNAMIC = """(float[b,3,h,w] src, float[c,d,e,f] r, float[1] ratio, float[4,3,3,3] w_a, float[1,4,1,1] w_b)
        => (float[b,1,h,w] pha, float[g,i,j,k] s)
        <float[2] ones = {1.0, 1.0}, int64[1] two = {2}, int64[1] four = {4}, float none = {0.0}> {
    scales = Concat <axis = 0> (ones, ratio, ratio)
    small = Resize <mode = "linear"> (src, , scales)
    x = Conv <pads = [1,1,1,1], strides = [2,2]> (small, w_a)
    shape = Shape (x)
    h0 = Expand (r, shape)
    sum = Add (x, h0)
    s = Tanh (sum)
    p = Conv (s, w_b)
    whole = Shape (src)
    hw = Slice (whole, two, four)
    ps = Shape (p)
    nc = Slice (ps, zero, two)
    size = Concat <axis = 0> (nc, hw)
    pha = Resize <mode = "linear"> (p, , , size)
}""".replace("<float[2] ones", "<int64[1] zero = {0}, float[2] ones")


def bind(graph: Graph, **options: Any) -> PassResult:
    return run_passes(graph, [BindShapes()], Context(Options(**options)))[0]


def shapes(graph: Graph) -> dict[str, list[Any]]:
    return {v.name: list(v.shape) for v in (*graph.inputs, *graph.outputs)}


def refused(graph: Graph, kind: type[VmqError], **options: Any) -> str:
    with pytest.raises(kind) as error:
        bind(graph, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(("size", "ratio"), [((32, 48), 0.5), ((64, 32), 1.0), ((30, 44), 0.5)])
def test_a_dynamic_graph(size: tuple[int, int], ratio: float) -> None:
    graph = load(DYNAMIC)
    rng = np.random.default_rng(0)
    frames = rng.random((2, 1, 3, *size), dtype=np.float32)
    feeds: dict[str, Any] = {"src": frames[0], "r": np.zeros((1, 1, 1, 1), np.float32),
                             "ratio": np.array([ratio], np.float32)}
    first = run(graph, feeds)
    second = run(graph, feeds | {"src": frames[1], "r": first["s"]})

    result = bind(graph, size=size, downsample_ratio=ratio)
    state = list(first["s"].shape)
    assert shapes(graph) == {"src": [1, 3, *size], "r": state, "ratio": [1], "pha": [1, 1, *size], "s": state}
    assert result.modified == 3
    assert result.report == {"size": list(size), "states": {"r": state}, "downsample_ratio": ratio}
    assert result.notes == (f"ratio is bound to {ratio:g}; what is fed to it is ignored",)

    run_passes(graph, [FoldShapes()], Context(Options()))
    assert graph.value("x").shape == state          # and all that is inside is known
    assert not {"Shape", "Slice", "Expand", "Concat"} & set(ops(graph))
    zeros = {"src": frames[0], "r": np.zeros(state, np.float32), "ratio": np.array([0.123], np.float32)}
    found = run(graph, zeros)
    again = run(graph, zeros | {"src": frames[1], "r": found["s"]})
    for wanted, got in ((first, found), (second, again)):
        for name in wanted:
            np.testing.assert_allclose(got[name], wanted[name], atol=1e-6)
    assert bind(graph, size=size).modified <= 1


def test_defaults() -> None:
    graph = Graph.load(tiny_matting.model(("h", "w")))
    assert bind(graph).report["size"] == [288, 512]
    graph = Graph.load(tiny_matting.model(("h", 40)))        # what the model fixes, it keeps
    assert bind(graph).report["size"] == [288, 40]
    graph = Graph.load(tiny_matting.model(("h", "w"), ratio=True))
    result = bind(graph, size=(1080, 2048))
    assert result.report["downsample_ratio"] == 0.25         # 512 pixels on the longer side
    graph = Graph.load(tiny_matting.model(("h", "w"), ratio=True))
    assert bind(graph, size=(32, 48)).report["downsample_ratio"] == 1.0


def test_the_signature_keeps_names_and_order() -> None:
    graph = Graph.load(tiny_matting.model(("h", "w"), ratio=True))
    names = [v.name for v in (*graph.inputs, *graph.outputs)]
    bind(graph, size=(16, 24), downsample_ratio=0.5)
    assert [v.name for v in (*graph.inputs, *graph.outputs)] == names
    assert not graph.inputs[2].outputs                       # the ratio is an input still, and read by nobody
    clip = tiny_matting.frames()
    state = np.zeros((1, 1, 16, 24), np.float32)
    for frame, wanted in zip(clip, tiny_matting.alphas(clip, 0.5), strict=True):
        feeds = {"src": frame[None].astype(np.float32) / 255, "last": state, "ratio": np.ones(1, np.float32)}
        outputs = run(graph, feeds)
        state = outputs["next"]
        np.testing.assert_allclose(outputs["pha"][0, 0], wanted, atol=1e-6)


def test_a_static_graph_is_untouched() -> None:
    for size in (None, (16, 24)):
        graph = Graph.load(tiny_matting.model())
        before = graph.to_bytes()
        result = bind(graph, size=size)
        assert (result.modified, result.report, result.notes) == (0, {"size": [16, 24]}, ())
        assert graph.to_bytes() == before
        assert graph.value("mean").shape == [1, 1, 16, 24]   # but the shapes inside are known now


def test_a_static_graph_with_a_ratio() -> None:
    graph = Graph.load(tiny_matting.model(ratio=True))
    assert bind(graph, downsample_ratio=0.5).modified == 1
    assert not graph.inputs[2].outputs


def test_sizes_that_do_not_fit() -> None:
    message = refused(Graph.load(tiny_matting.model()), OptionError, size=(288, 512))
    assert message.startswith("--size 512x288 was asked for, but the model is fixed at 24x16; ")
    message = refused(Graph.load(tiny_matting.model(("h", 24))), OptionError, size=(16, 32))
    assert "fixed at 24xany" in message
    message = refused(Graph.load(tiny_matting.model()), OptionError, downsample_ratio=0.5)
    assert message.startswith("--downsample-ratio was given, but the model has no input for it")


def test_a_size_that_the_model_cannot_run_at() -> None:
    """Down by two, up by two, and added to itself: only even sizes work."""
    graph = load("""(float[1,3,h,w] x) => (float[1,3,h,w] y) <float[4] s = {1.0, 1.0, 2.0, 2.0}> {
        a = MaxPool <kernel_shape = [2,2], strides = [2,2]> (x)  b = Resize (a, , s)  y = Add (x, b) }""")
    message = refused(graph.copy(), ModelError, size=(33, 50))
    assert "does not run at 50x33" in message
    assert message.endswith("try a size divisible by 32, for example --size 32x32")
    bind(graph, size=(32, 50))
    assert shapes(graph) == {"x": [1, 3, 32, 50], "y": [1, 3, 32, 50]}


def test_a_failure_leaves_the_graph_as_it_was() -> None:
    graph = load(DYNAMIC)
    before = graph.to_bytes()
    refused(graph, OptionError, pairs={"nothing": "s"})
    assert graph.to_bytes() == before


@pytest.mark.parametrize(("shape", "asked", "size"), [
    ([1, 3, "h", "w"], None, (288, 512)), ([1, 3, 20, "w"], None, (20, 512)), ([1, 3, None, None], (30, 40), (30, 40)),
    (None, (30, 40), (30, 40)), ([1, 3, 30, 40], None, (30, 40)), ([1, 3, 30, 40], (30, 40), (30, 40))])
def test_frame_size(shape: list[Any] | None, asked: tuple[int, int] | None, size: tuple[int, int]) -> None:
    assert frame_size(Variable("x", np.float32, shape), asked) == size


def test_dynamic_rvm(tmp_path: Path) -> None:
    """The form of the authors' file: 1x1x1x1 first states, a ratio input, shapes computed in the graph."""
    rvm.export(rvm.build(refiner="deep"), tmp_path / "rvm.onnx", dynamic=True)
    graph = Graph.load(tmp_path / "rvm.onnx")
    names = [v.name for v in (*graph.inputs, *graph.outputs)]
    feeds: dict[str, Any] = {v.name: np.zeros((1, 1, 1, 1), np.float32) for v in graph.inputs}
    feeds["src"] = np.random.default_rng(0).random((1, 3, 128, 192), np.float32)
    feeds["downsample_ratio"] = np.array([0.5], np.float32)
    before = run(graph, feeds)
    options = Options(size=(128, 192), downsample_ratio=0.5)
    run_passes(graph, [RaiseOpset(), BindShapes(), FoldShapes()], Context(options))
    assert [v.name for v in (*graph.inputs, *graph.outputs)] == names
    assert not {"Shape", "Expand", "Gather"} & set(ops(graph))
    assert [v.shape for v in graph.inputs[1:5]] == [
        [1, 16, 32, 48], [1, 20, 16, 24], [1, 40, 8, 12], [1, 64, 4, 6]]
    static = {v.name: feeds[v.name] if v.name in ("src", "downsample_ratio") else np.zeros(v.shape, np.float32)
              for v in graph.inputs}
    for name, value in run(graph, static).items():
        np.testing.assert_allclose(value, before[name], atol=2e-6)
