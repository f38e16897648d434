"""The shadow against ONNX Runtime, optimizations off: node by node, whole models, every dump of a compile; learning."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from compiling import clips, network, run_to
from numpy.typing import NDArray
from onnx_text import load, run
from tiny_recurrent import FEED_FORWARD, LSTM, read
from torch import Tensor

from models import rvm
from passes import PIPELINE
from vmq.errors import ModelError
from vmq.fakequant import FakeQuantize
from vmq.graph import Graph
from vmq.layers import same_grid
from vmq.pipeline import Context, Observer, Pass, PassResult, run_passes
from vmq.recipe import Recipe
from vmq.runtime import Session
from vmq.shadow import Shadow
from vmq.spec import Bits, Options

Array = NDArray[Any]
Values = dict[str, Array]


pytestmark = pytest.mark.usefixtures("one_thread")


def tensors(values: Mapping[str, Array]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.array(value)) for name, value in values.items()}


def shadow_run(shadow: Shadow, given: Mapping[str, Array], wanted: Any = None) -> Values:
    with torch.no_grad():
        results = shadow(tensors(given)) if wanted is None else shadow.run(tensors(given), wanted)
    return {name: value.numpy() for name, value in results.items()}


def session_of(model: Graph, extra: Any = ()) -> Any:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    proto = model.to_proto()
    present = {o.name for o in proto.graph.output}
    proto.graph.output.extend(onnx.ValueInfoProto(name=n) for n in extra if n not in present)
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def outputs_of(session: Any, feeds: Values) -> Values:
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True))


def close(ours: Array, theirs: Array, what: str, tolerance: float = 2e-6) -> None:
    assert ours.shape == theirs.shape, what
    assert ours.dtype == theirs.dtype, what
    if theirs.dtype.kind == "f":
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * max(1.0, float(np.abs(theirs).max())),
                                   err_msg=what)
    else:
        np.testing.assert_array_equal(ours, theirs, err_msg=what)


def readable(graph: Graph) -> list[str]:
    """Results of nodes that ONNX Runtime hands out (it has no 4-bit arrays)."""
    narrow = {n.outputs[0].name for n in graph.nodes if n.op == "QuantizeLinear" and "int4" in n.inputs[2].dtype.name}
    return [o.name for n in graph.nodes for o in n.outputs if o.name and o.name not in narrow]


def feeds_of(session: Session, frame: NDArray[np.uint8]) -> Values:
    return {**session.state, session.frame_input: (frame.astype(np.float32) / np.float32(255.0))[None]}


LONG_SUMS = ("Conv", "GlobalAveragePool", "MatMul", "ReduceMean")


def check_node_by_node(graph: Graph, values: Values, shadow: Shadow) -> int:
    """Every node on ONNX Runtime's own inputs; quantizers bit for bit. Returns how many nodes were compared."""
    compared, known = 0, tensors(values)
    for node in graph.nodes:
        outputs = [o.name for o in node.outputs if o.name in values]
        with torch.no_grad():
            ours = shadow.run({n: v for n, v in known.items() if n not in outputs}, outputs)
        for name in outputs:
            tolerance = 0.0 if node.op.endswith("Linear") else 1e-5 if node.op in LONG_SUMS else 2e-6
            close(ours[name].numpy(), values[name], f"{node.name} ({node.op})", tolerance)
        compared += bool(outputs)
    return compared


# -- whole models --------------------------------------------------------------------------------------

EXPORTS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "static": (None, {"size": (48, 64)}),
    "keep-bn": (None, {"size": (48, 64), "keep_bn": True, "opset": 20}),
    "deep": ("deep", {"size": (96, 128), "downsample_ratio": 0.5}),
    "fast": ("fast", {"size": (96, 128), "downsample_ratio": 0.5}),
    "dynamic deep": ("deep", {"dynamic": True}),
    "dynamic fast": ("fast", {"dynamic": True, "opset": 18}),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_rvm_in_closed_loop(name: str, tmp_path: Path):
    refiner, options = EXPORTS[name]
    rvm.export(rvm.build(refiner=refiner, seed=1), tmp_path / "rvm.onnx", **options)
    graph = Graph.load(tmp_path / "rvm.onnx")
    if name == "dynamic deep":
        assert graph.opset == 12
        assert {"HardSigmoid", "Shape", "Expand", "Slice"} <= {n.op for n in graph.nodes}
    session, shadow = session_of(graph), Shadow(graph)
    inputs = {i.name: [d if isinstance(d, int) else 1 for d in i.shape] for i in session.get_inputs()}
    rng = np.random.default_rng(0)
    for size, ratio in (((75, 101), 0.7), ((64, 96), 1.0)) if "dynamic" in options else ((options["size"], 1.0),):
        states = [{n: np.zeros(shape, np.float32) for n, shape in inputs.items() if n.startswith("r")}] * 2
        for _ in range(3):
            frame = {"src": rng.random((1, 3, *size), np.float32)}
            if "downsample_ratio" in inputs:
                frame["downsample_ratio"] = np.array([ratio], np.float32)
            theirs, ours = outputs_of(session, frame | states[0]), shadow_run(shadow, frame | states[1])
            assert list(ours) == list(theirs)
            for value in theirs:
                close(ours[value], theirs[value], value, 1e-5)
            states = [{f"r{k}i": outputs[f"r{k}o"] for k in range(1, 5)} for outputs in (theirs, ours)]


TRANSFORMER = """(float[1,batch,12,16] tokens, int64[batch,12] kinds, float[16] w_n, float[16] w_m, float[16,48] w_qkv,
        float[48] w_b, float[16,16] w_o, float[16,32] w_1, float[32] w_1b, float[32,16] w_2, float[5,16] w_e)
    => (float[batch,n,16] y, float[batch,n] weight) <int64[1] zero = {0}, int64[1] heads = {4}, int64[1] eight = {4},
        int64[1] three = {3}, int64[1] all = {-1}, float half = {0.5}, float one = {1}, float root = {1.41421356},
        float quarter = {0.5}, int64 none = {0}, float low = {-1000}> {
    x0 = Squeeze (tokens, zero)
    e = Gather (w_e, kinds)
    x = Add (x0, e)
    h = LayerNormalization <axis = -1> (x, w_n, w_m)
    p = MatMul (h, w_qkv)
    qkv = Add (p, w_b)
    size = Shape (qkv)
    lead = Slice (size, zero, two)
    split = Concat <axis = 0> (lead, three, heads, eight)
    parts = Reshape (qkv, split)
    order = Transpose <perm = [2,0,3,1,4]> (parts)
    q1, k1, v1 = Split <axis = 0, num_outputs = 3> (order)
    q = Squeeze (q1, zero)
    k = Squeeze (k1, zero)
    v = Squeeze (v1, zero)
    kt = Transpose <perm = [0,1,3,2]> (k)
    dots = MatMul (q, kt)
    scaled = Mul (dots, quarter)
    empty = Equal (kinds, none)
    m1 = Unsqueeze (empty, one_two)
    masked = Where (m1, low, scaled)
    attention = Softmax <axis = -1> (masked)
    mixed = MatMul (attention, v)
    back = Transpose <perm = [0,2,1,3]> (mixed)
    flat = Concat <axis = 0> (lead, all)
    joined = Reshape (back, flat)
    o = MatMul (joined, w_o)
    x2 = Add (x, o)
    f = MatMul (x2, w_1)
    fb = Add (f, w_1b)
    scaled_f = Div (fb, root)
    erf = Erf (scaled_f)
    erf1 = Add (erf, one)
    gated = Mul (fb, erf1)
    gelu = Mul (gated, half)
    d = MatMul (gelu, w_2)
    y = Add (x2, d)
    weight = ReduceMean <keepdims = 0> (y, all)
}"""

MODNET_LIKE = """(float[1,3,16,24] src, float[8,3,3,3] w_0, float[4] w_s, float[4] w_t, float[4] w_m, float[4] w_is,
        float[4] w_ib, float[8,1,3,3] w_d, float[2,8] w_1, float[2] w_1b, float[8,2] w_2, float[8,4,2,2] w_up,
        float[4,1,1] w_slope, float[1,4,3,3] w_h) => (float[1,1,32,48] pha, float[1,8,8,12] deep)
    <int64[8] pads = {0,0,1,2,0,0,1,0}, int64[1] last = {-1}, float zero = {0}, float one = {1},
     float[4] var = {0.5, 1, 2, 0.25}, float[4] twice = {1, 1, 2, 2}> {
    c = Conv <pads = [1,1,1,1], strides = [2,2]> (src, w_0)
    a, b = Split <axis = 1, num_outputs = 2> (c)
    n = BatchNormalization (a, w_s, w_t, w_m, var)
    i = InstanceNormalization (b, w_is, w_ib)
    ibn = Concat <axis = 1> (n, i)
    r = LeakyRelu <alpha = 0.1> (ibn)
    padded = Pad <mode = "reflect"> (r, pads)
    d = Conv <group = 8> (padded, w_d)
    pooled = MaxPool <kernel_shape = [3,3], strides = [1,1], pads = [1,1,1,1]> (d)
    g = GlobalAveragePool (pooled)
    flat = Flatten (g)
    s1 = Gemm <transB = 1> (flat, w_1, w_1b)
    s2 = Relu (s1)
    s3 = Gemm <transB = 1> (s2, w_2)
    s4 = Sigmoid (s3)
    s5 = Unsqueeze (s4, last)
    s6 = Unsqueeze (s5, last)
    deep = Mul (pooled, s6)
    up = ConvTranspose <strides = [2,2]> (deep, w_up)
    act = PRelu (up, w_slope)
    big = Resize <mode = "linear", coordinate_transformation_mode = "align_corners"> (act, , twice)
    head = Conv <pads = [1,1,1,1]> (big, w_h)
    pha = Clip (head, zero, one)
}"""


def test_transformer_block():
    text = TRANSFORMER.replace("int64[1] zero", "int64[1] two = {2}, int64[2] one_two = {1, 2}, int64[1] zero")
    graph = load(text)
    rng = np.random.default_rng(1)
    feeds = {"tokens": rng.normal(size=(1, 2, 12, 16)).astype(np.float32), "kinds": rng.integers(0, 5, (2, 12))}
    values = outputs_of(session_of(graph, readable(graph)), feeds) | feeds
    shadow = Shadow(graph)
    assert check_node_by_node(graph, values, shadow) == len(graph.nodes)
    for name, value in shadow_run(shadow, feeds).items():
        close(value, values[name], name, 1e-5)


def test_modnet_like_network():
    graph = load(MODNET_LIKE)
    feeds = {"src": np.random.default_rng(1).normal(size=(1, 3, 16, 24)).astype(np.float32)}
    values = outputs_of(session_of(graph, readable(graph)), feeds) | feeds
    shadow = Shadow(graph)
    assert check_node_by_node(graph, values, shadow) == len(graph.nodes)
    for name, value in shadow_run(shadow, feeds).items():
        close(value, values[name], name, 1e-5)


# -- every dump ----------------------------------------------------------------------------------------


class _Keep(Observer):
    def __init__(self) -> None:
        self.graphs: dict[str, Graph] = {}

    def started(self, graph: Graph, context: Context, passes: Any) -> None:  # noqa: ARG002
        self.graphs["input"] = graph.copy()

    def after(self, index: int, step: Pass, graph: Graph, result: PassResult, seconds: float) -> None:  # noqa: ARG002
        if result.modified:
            self.graphs[step.name] = graph.copy()


def dumps_of(graph: Graph, bits: str, **options: Any) -> dict[str, Graph]:
    keep = _Keep()
    run_passes(graph, PIPELINE, Context(Options(bits=Bits.parse(bits), **options), clips()), [keep])
    return keep.graphs


def undoes(dequantize: Any) -> bool:
    """True for a DequantizeLinear that reads integers as they were written, perhaps behind a Clip."""
    before = dequantize.inputs[0].inputs
    if before and before[0].op == "Clip":
        before = before[0].inputs[0].inputs
    return bool(before) and before[0].op == "QuantizeLinear" and same_grid(before[0], dequantize)


@pytest.mark.parametrize(("bits", "container"), [
    ("8", "int4cast"), ("w4a8", "int4cast"), ("4", "int4cast"), ("4", "int8"), ("4", "int4")])
def test_every_dump(bits: str, container: str):
    graphs = dumps_of(network(), bits, container=container)
    assert {"input", "insert_qdq", "calibrate_ranges", "quantize_biases", "lower"} <= set(graphs)
    for name, graph in graphs.items() if container == "int4cast" else [("lower", graphs["lower"])]:
        shadow = Shadow(graph)
        pairs = [n for n in graph.nodes if n.op == "DequantizeLinear" and undoes(n)]
        assert set(shadow.quantizers) == {n.outputs[0].name for n in pairs}, name
        session = Session(graph, optimize=False, extra=readable(graph), threads=1)
        own_state, steps, off = dict(session.state), 0, 0
        for frame in clips(1, 3)[0].frames():
            feeds = feeds_of(session, frame)
            theirs = session.step(frame) | feeds
            narrow = [n for n in graph.nodes if n.op == "QuantizeLinear" and "int4" in n.inputs[2].dtype.name]
            assert check_node_by_node(graph, theirs, shadow) == len(graph.nodes) - len(narrow), name
            wanted = [*shadow.quantizers, "fgr", "pha", "s"]
            ours = shadow_run(shadow, feeds | own_state, wanted)
            own_state = {"r": ours["s"]}
            for value, quantizer in shadow.quantizers.items():
                assert isinstance(quantizer, FakeQuantize)
                scale = quantizer.scale.detach().numpy()
                if quantizer.spec.axis is not None:
                    scale = scale.reshape([-1 if i == quantizer.spec.axis else 1 for i in range(ours[value].ndim)])
                apart = np.rint(np.abs(ours[value] - theirs[value]) / scale)
                assert apart.max() <= 1, (name, value)
                steps, off = steps + apart.size, off + int(apart.sum())
            for value in ("fgr", "pha", "s"):
                assert np.abs(ours[value] - theirs[value]).mean() < 1e-5, (name, value)
        assert off <= 1e-4 * steps, (name, off, steps)


def test_quantized_rvm(tmp_path: Path):
    rvm.export(rvm.build(seed=2), tmp_path / "rvm.onnx", size=(32, 48))
    graph = Graph.load(tmp_path / "rvm.onnx")
    run_to("lower", graph, "4", clips(1, 2), recipe=Recipe("mse", range_steps=8))
    shadow, session = Shadow(graph), Session(graph, optimize=False, extra=readable(graph), threads=1)
    assert len([q for q in shadow.quantizers.values() if q.limits == (0, 15)]) > 40
    for frame in clips(1, 2)[0].frames():
        values = feeds_of(session, frame)
        values |= session.step(frame)
        check_node_by_node(graph, values, shadow)


# -- blocks and values ---------------------------------------------------------------------------------


def test_a_block_runs_on_its_own():
    graph = network()
    run_to("calibrate_ranges", graph, "4")
    shadow = Shadow(graph)
    rng = np.random.default_rng(0)
    feeds = {v.name: rng.random(v.shape, np.float32) for v in graph.inputs}
    names = [n.name for n in graph.nodes]
    block = set(names[len(names) // 3: 2 * len(names) // 3])
    inputs, outputs = shadow.boundary(block)
    assert 1 <= len(inputs) < 8
    assert outputs
    whole = shadow_run(shadow, feeds, [*inputs, *outputs, "pha"])
    alone = shadow_run(shadow, {n: whole[n] for n in inputs}, outputs)
    for name in outputs:
        assert np.array_equal(alone[name], whole[name])
    assert np.array_equal(shadow_run(shadow, feeds)["pha"], whole["pha"])
    with pytest.raises(ModelError, match="value 'r' is needed, but is neither given nor computed"):
        shadow.run(tensors({"src": feeds["src"]}), ["pha"])


def test_weights_are_quantized_once_for_all_frames():
    graph = network()
    run_to("lower", graph, "4")
    shadow = Shadow(graph)
    fixed = shadow.fixed_values()
    convs = [n for n in graph.nodes if n.op == "Conv"]
    assert {v.name for n in convs for v in n.inputs[1:]} - {c.name for c in graph.constants()} <= set(fixed)
    scales = [n.inputs[1].inputs[0].inputs[1].name for n in convs if n.inputs[1].inputs]
    parameters = [shadow.parameter(s).requires_grad_() for s in scales]
    assert len(parameters) > 5
    feeds = tensors({v.name: np.full(v.shape, 0.4, np.float32) for v in graph.inputs})
    held = shadow.run({}, fixed)
    here, there = shadow(feeds), shadow.run({**feeds, **held}, ["fgr", "pha", "s"])
    for name, value in here.items():
        assert torch.equal(there[name], value)
    for a, b in zip(*(torch.autograd.grad(o["s"].sum(), parameters, allow_unused=True) for o in (here, there)),
                    strict=True):
        assert a is b is None or torch.equal(a, b)


def test_values_go_after_their_last_use():
    graph = network()
    run_to("calibrate_ranges", graph, "8")
    shadow = Shadow(graph)
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def watch(quantizer: Any) -> Any:
        def quantize(x: Tensor) -> Tensor:
            nonlocal most
            y = quantizer(x)
            alive.append(weakref.ref(y))
            most = max(most, sum(r() is not None for r in alive))
            return y
        return quantize

    shadow.quantizers.update({name: watch(q) for name, q in shadow.quantizers.items()})
    feeds = {v.name: np.zeros(v.shape, np.float32) for v in graph.inputs}
    shadow_run(shadow, feeds)
    assert len(alive) > 30
    assert most < 10


# -- quantizers in a graph -----------------------------------------------------------------------------

FOREIGN = """(float[2,3,5] x) => (float[2,3,5] y, float[2,3,5] z, uint8[2,3,5] q, float[2,3,5] t)
    <float s = {0.05}, float s2 = {0.05}, uint8 z1 = {120}, uint8 z2 = {120}, float[3] sc = {0.1, 0.2, 0.02},
     int8[3] zc = {3, -7, 0}, float s4 = {0.1}, float s8 = {0.025}, uint8 z8 = {20}> {
    q = QuantizeLinear (x, s, z1)
    y = DequantizeLinear (q, s2, z2)
    qc = QuantizeLinear <axis = 1> (x, sc, zc)
    z = DequantizeLinear <axis = 1> (qc, sc, zc)
    q0 = QuantizeLinear (x, s4)
    t = DequantizeLinear (q0, s8, z8)
}"""


def test_pairs_as_other_tools_write_them():
    graph = load(FOREIGN)
    feeds = {"x": np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)}
    shadow = Shadow(graph)
    theirs = run(graph, feeds)
    ours = shadow_run(shadow, feeds)
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype
        assert np.array_equal(ours[name], value), name
    assert set(shadow.quantizers) == {"y", "z"}       # t is read with another scale than it was written with
    with torch.no_grad():
        shadow.parameter("s").mul_(2)
        shadow.parameter("z1").fill_(100.4)
        shadow.parameter("zc").add_(0.6)
    assert shadow.parameter("s") is shadow.parameter("s2")
    assert shadow.write_back() == 5
    assert graph.value("z1").values == graph.value("z2").values == 100
    assert graph.value("zc").values.tolist() == [4, -6, 1]
    for name, value in run(graph, feeds).items():
        assert np.array_equal(shadow_run(shadow, feeds)[name], value), name


def test_tied_quantizers_share_their_parameters():
    graph = network()
    run_to("calibrate_ranges", graph, "8")
    shadow = Shadow(graph)
    scales = [q.scale for q in shadow.quantizers.values() if isinstance(q, FakeQuantize)]
    constants = {id(n.inputs[1]) for n in graph.nodes if n.op == "QuantizeLinear"}
    assert len({id(s) for s in scales}) == len(constants) < len(scales)


def test_nothing_learned_changes_nothing():
    graph = network()
    run_to("lower", graph, "4")
    before = graph.to_bytes()
    assert Shadow(graph).write_back() == 0
    assert graph.to_bytes() == before


@pytest.mark.parametrize(("text", "said"), [
    ("(float[4] x) => (float[4] y) { y = Shrink (x) }", "node 'Shrink_0' .Shrink, opset 21.: this operator is not"),
    ("(float[4] x, float s) => (int8[4] y) <int8 z = {0}> { y = QuantizeLinear (x, s, z) }",
     "a scale that is computed"),
    ("(float[4] x) => (int16[4] y) <float s = {1}, int16 z = {0}> { y = QuantizeLinear (x, s, z) }",
     "a zero point of type int16"),
    ("(float[4] x) => (int8[4] y) <float s = {1}> { y = QuantizeLinear <output_dtype = 3> (x, s) }", "output_dtype 3"),
    ("(float[4,4] x) => (float[4,4] y) <float s = {1}, int8[4] q = {1,2,3,4}> "
     "{ a = DequantizeLinear <block_size = 2> (q, s)  y = Add (x, a) }", "block_size 2"),
])
def test_what_is_not_supported_is_named(text: str, said: str):
    with pytest.raises(ModelError, match=said):
        Shadow(load(text))


def test_a_node_that_does_not_work_on_its_inputs_is_named():
    shadow = Shadow(load("(float[a,b] x, float[c,d] y) => (float[a,d] z) { z = MatMul (x, y) }"))
    with pytest.raises(ModelError, match=r"node 'MatMul_0' \(MatMul\) does not work on \[2, 3\], \[2, 3\]: "):
        shadow({"x": torch.zeros(2, 3), "y": torch.zeros(2, 3)})


# -- gradients and learning ----------------------------------------------------------------------------


@pytest.mark.parametrize("text", [FEED_FORWARD, LSTM])
def test_gradients_are_finite_differences(text: str):
    shadow = Shadow(read(text)).double()
    generator = torch.Generator().manual_seed(0)
    feeds = {v.name: torch.randn(v.shape, dtype=torch.float64, generator=generator) for v in shadow.graph.inputs}
    weight = shadow.parameter("w0").requires_grad_()
    direction = torch.randn(weight.shape, dtype=torch.float64, generator=generator)

    def loss() -> Tensor:
        return sum((v.square().mean() for v in shadow(feeds).values()), torch.zeros(()))

    slope = (torch.autograd.grad(loss(), weight)[0] * direction).sum()
    ends = []
    for sign in (1e-6, -1e-6):
        with torch.no_grad():
            weight.add_(sign * direction)
            ends.append(loss())
            weight.sub_(sign * direction)
    torch.testing.assert_close(slope, (ends[0] - ends[1]) / 2e-6, rtol=1e-6, atol=1e-9)


def learn(shadow: Shadow, feeds: dict[str, Tensor], targets: dict[str, Tensor], rates: dict[str, float],
          steps: int) -> list[float]:
    """Adam on the activations' scales and zero points and on the weights; returns the loss at every step."""
    quantizers = [q for q in shadow.quantizers.values() if isinstance(q, FakeQuantize)]
    weights = [n.inputs[0].name for n in shadow.graph.nodes
               if n.op == "QuantizeLinear" and n.inputs[2].dtype.name in ("int4", "int8")]
    kinds = {"scales": {q.scale for q in quantizers if not q.spec.signed},
             "zeros": {q.zero for q in quantizers if not q.spec.signed},
             "weights": {shadow.parameter(w) for w in weights}}
    groups = [{"params": sorted(kinds[kind], key=id), "lr": rate} for kind, rate in rates.items()]
    for group in groups:
        for parameter in group["params"]:
            parameter.requires_grad_()
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for _ in range(steps):
        outputs = shadow(feeds)
        loss = torch.stack([(outputs[n] - targets[n]).square().mean() for n in targets]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("rates", "steps", "factor"), [
    ({"scales": 2e-3}, 25, 0.85),
    ({"zeros": 0.1}, 25, 0.92),
    ({"weights": 5e-3}, 25, 0.92),
    ({"scales": 1e-3, "zeros": 0.05, "weights": 3e-3}, 40, 0.6),
])
def test_learning_lowers_the_loss_and_the_runtime_computes_what_was_learned(
        rates: dict[str, float], steps: int, factor: float, tmp_path: Path):
    graph = network()
    context = run_to("calibrate_ranges", graph, "4")
    assert context.reference is not None
    shadow = Shadow(graph)
    batch = torch.cat([torch.from_numpy(f.astype(np.float32) / 255)[None] for c in context.clips for f in c.frames()])
    feeds = {"src": batch, "r": 0.5 * torch.randn(len(batch), 4, 32, 48, generator=torch.Generator().manual_seed(0))}
    with torch.no_grad():
        targets = Shadow(context.reference)(feeds)
    losses = learn(shadow, feeds, targets, rates, steps)
    assert np.mean(losses[-3:]) < factor * losses[0], losses
    assert shadow.write_back() >= 9
    graph.save(tmp_path / "learned.onnx")
    learned = Graph.load(tmp_path / "learned.onnx")
    session = Session(learned, optimize=False, extra=readable(learned), threads=1)
    again = Shadow(learned)
    for frame in clips(1, 3)[0].frames():
        values = feeds_of(session, frame)
        values |= session.step(frame)
        for twin in (shadow, again):
            assert check_node_by_node(learned, values, twin) > 50


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_same_on_cuda():
    graph = network()
    run_to("lower", graph, "8")
    shadow = Shadow(graph)
    feeds = tensors({v.name: np.full(v.shape, 0.3, np.float32) for v in graph.inputs})
    here = shadow(feeds)
    there = shadow.cuda()({n: v.cuda() for n, v in feeds.items()})
    for name, value in here.items():
        assert (there[name].cpu() - value).abs().mean() < 1e-3
