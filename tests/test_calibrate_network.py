"""Calibration of the whole network: closed-loop error falls, what was best is kept, the graph stays plain QDQ."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compiling import changed, clips, constants, network, rerun, run_to
from numpy.typing import NDArray
from onnx_text import run as run_onnx
from tiny_recurrent import FEED_FORWARD, LSTM, read
from torch import Tensor

from passes import calibrate_network
from passes.calibrate_network import laplacian
from vmq.checkpoint import Checkpoint
from vmq.clips import Clip
from vmq.errors import PassError
from vmq.graph import Constant, Graph
from vmq.lanes import Lanes
from vmq.pipeline import Context, run_passes
from vmq.quant import quantize
from vmq.recipe import NetworkRecipe, Recipe
from vmq.runtime import Session
from vmq.shadow import Shadow
from vmq.spec import EFFORTS, QuantSpec

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = dataclasses.replace(EFFORTS["fast"], calibration=8, bias_frames=4, sequences=3, frames=2, block_iterations=2,
                           steps=6, batch=2, unrolled=2, gates=2, loop_frames=16)
PLAIN = Recipe("plain", range_steps=20)
EVERYTHING = {"learn": ("weight", "weight_scale", "scale", "zero", "bias"), "length": 6, "l1": 1.0, "laplacian": 0.25,
              "temporal": 5.0, "state": 0.5, "foreground": 0.1, "weight_rate": 0.02, "weight_scale_rate": 2e-3,
              "scale_rate": 5e-3, "zero_rate": 0.02, "bias_rate": 0.02}
PUBLISHED = {"learn": ("affine", "scale"), "teacher": "alpha", "length": 1, "mse": 1.0, "flow": 0.05,
             "affine_rate": 1e-3, "scale_rate": 1e-3}


@pytest.fixture(autouse=True, scope="module")
def few_gates() -> Iterator[None]:
    """Closed loops over two sequences of eight frames."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate_network, "GATE_CLIPS", 2)
        yield


def prepared(graph: Graph, bits: str = "4", footage: Sequence[Clip] | None = None) -> tuple[Graph, Context]:
    context = run_to("correct_biases", graph, bits, clips(2, 8) if footage is None else footage, recipe=PLAIN,
                     effort=TINY)
    return graph, context


@pytest.fixture(scope="module")
def start() -> tuple[Graph, Context]:
    """The network at 4 bits with ranges and corrected biases."""
    return prepared(network())


def calibrate(start: tuple[Graph, Context], recipe: dict[str, Any], checkpoint: Checkpoint | None = None,
              seed: int = 0, **effort: int) -> tuple[Graph, Any]:
    """A calibrated copy and what the pass reported."""
    graph, context = start[0].copy(), start[1]
    if checkpoint is not None:
        context = dataclasses.replace(context, checkpoint=checkpoint)
    result = rerun("calibrate_network", graph, context, effort=dataclasses.replace(TINY, **effort), seed=seed,
                   recipe=dataclasses.replace(PLAIN, network=NetworkRecipe(**recipe)))
    return graph, result


def gates(result: Any) -> list[float]:
    return list(result.report["closed_loop_MAD"].values())


def same_nodes(before: Graph, after: Graph) -> None:
    assert [(n.op, n.name, [v.name for v in n.inputs], [v.name for v in n.outputs]) for n in after.nodes] \
        == [(n.op, n.name, [v.name for v in n.inputs], [v.name for v in n.outputs]) for n in before.nodes]
    assert after.signature() == before.signature()


def zeros_of(graph: Graph) -> dict[str, NDArray[Any]]:
    """Zero points of activations, by name."""
    return {n.inputs[2].name: np.asarray(n.inputs[2].values) for n in graph.nodes
            if n.op == "QuantizeLinear" and not isinstance(n.inputs[0], Constant)}


# -- learning ------------------------------------------------------------------------------------------

RATES = ("weight_rate", "weight_scale_rate", "scale_rate", "zero_rate", "bias_rate")


def detuned(start: tuple[Graph, Context]) -> tuple[Graph, Context]:
    """The network with biases that are off, the way a bad start leaves them."""
    graph, rng = start[0].copy(), np.random.default_rng(0)
    for node in graph.nodes:
        if node.op == "Conv":
            values = np.asarray(node.inputs[2].values)
            node.inputs[2].values = (values + 0.3 * rng.normal(size=values.shape)).astype(np.float32)
    return graph, start[1]


def test_closed_loop_error_falls(start: tuple[Graph, Context]):
    """The gate, and the network as it runs: on the clips, from the first frame on, optimizations on."""
    bad = detuned(start)
    graph, result = calibrate(bad, EVERYTHING, steps=24, gates=4)
    found = gates(result)
    assert list(result.report["closed_loop_MAD"]) == ["0", "6", "12", "18", "24"]
    assert min(found) < 0.65 * found[0], found
    assert result.report["steps"] == 24
    assert result.modified == len(changed(bad[0], graph)) > 30
    same_nodes(bad[0], graph)

    def error(model: Graph) -> float:
        ours, exact = Session(model, threads=1), Session(start[1].reference, threads=1)
        total = []
        for clip in clips(2, 8):
            for session in (ours, exact):
                session.reset()
            total += [np.abs(a - b).mean() for a, b in zip(ours.alphas(clip.frames()), exact.alphas(clip.frames()),
                                                           strict=True)]
        return float(np.mean(total))

    assert error(graph) < 0.65 * error(bad[0])


def test_without_rates_nothing_is_learned(start: tuple[Graph, Context]):
    """What the test above sees is learning."""
    graph, result = calibrate(start, EVERYTHING | dict.fromkeys(RATES, 0.0), steps=4, gates=2)
    assert len(set(gates(result))) == 1
    assert result.modified == 0
    assert graph.to_bytes() == start[0].to_bytes()


def test_from_plain_ranges():
    graph = network()
    context = run_to("calibrate_ranges", graph, "4", clips(2, 8), recipe=PLAIN, effort=TINY)
    found = gates(calibrate((graph, context), EVERYTHING, steps=12, gates=4)[1])
    assert min(found) < 0.9 * found[0]


def test_what_is_kept_has_the_error_that_was_reported(start: tuple[Graph, Context]):
    graph, result = calibrate(start, EVERYTHING, steps=12, gates=4)
    _, again = calibrate((graph, start[1]), EVERYTHING | dict.fromkeys(RATES, 0.0), steps=1, gates=1)
    assert gates(again)[0] == pytest.approx(min(gates(result)), rel=1e-6)
    assert result.report["closed_loop_MAD"][str(result.report["kept_step"])] == min(gates(result))


@pytest.mark.parametrize(("said", "kept"), [([4.0, 3.0, 1.0, 2.0], 4), ([1.0, 3.0, 2.0, 2.0], 0),
                                            ([3.0, 3.0, 2.0, 1.0], 6), ([2.0, 1.0, 1.0, 3.0], 4)])
def test_the_parameters_of_the_best_gate_are_kept(start: tuple[Graph, Context], said: list[float], kept: int,
                                                  monkeypatch: pytest.MonkeyPatch):
    at_gates: list[dict[str, Tensor]] = []
    left = list(said)

    def gate(self: Any, _: Any) -> float:
        at_gates.append({p.constant: p.parameter.detach().clone() for p in self.learned})
        return left.pop(0)

    monkeypatch.setattr(calibrate_network._Calibration, "_gate", gate)
    recipe = EVERYTHING | {"learn": ("weight", "scale", "bias")}
    graph, result = calibrate(start, recipe, steps=6, gates=3)
    assert result.report["kept_step"] == kept
    assert result.report["closed_loop_MAD"] == dict(zip("0246", said, strict=True))
    best = at_gates[kept // 2]
    for other in at_gates[:kept // 2] + at_gates[kept // 2 + 1:]:
        assert any(not torch.equal(other[n], v) for n, v in best.items())
    for name, value in best.items():
        assert np.array_equal(graph.value(name).values, value.numpy()), name


def test_without_a_recipe_for_the_network_the_graph_is_the_object_it_was(start: tuple[Graph, Context]):
    graph = start[0].copy()
    before, values = graph.to_bytes(), {id(v) for v in graph.values()}
    result = rerun("calibrate_network", graph, start[1])
    assert (result.modified, result.report, graph.to_bytes()) == (0, {}, before)
    assert {id(v) for v in graph.values()} == values


def test_a_reference_is_needed(start: tuple[Graph, Context]):
    with pytest.raises(PassError, match="there is no float reference; run insert_qdq before"):
        run_passes(start[0].copy(), [calibrate_network.CalibrateNetwork()],
                   dataclasses.replace(start[1], reference=None))


# -- what is learned -----------------------------------------------------------------------------------


def test_zero_points_are_learned_as_integers(start: tuple[Graph, Context]):
    graph, result = calibrate(start, EVERYTHING | {"learn": ("zero",), "zero_rate": 0.4}, steps=8, gates=8)
    before, after = zeros_of(start[0]), zeros_of(graph)
    assert changed(start[0], graph) <= set(before)
    for name, value in after.items():
        assert value.dtype == before[name].dtype
        assert value.dtype.name in ("uint4", "uint8")
    if min(gates(result)) < gates(result)[0]:                 # of equal ones the last is kept, in which none may differ
        assert changed(start[0], graph)
    assert len(set(gates(result))) > 1                        # one integer more or less of one tensor shows
    _, again = calibrate((graph, start[1]), EVERYTHING | dict.fromkeys(RATES, 0.0), steps=1, gates=1)
    assert gates(again)[0] == min(gates(result))              # nothing is rounded at the end


@pytest.mark.parametrize("kind", ["weight", "weight_scale", "scale", "bias"])
def test_what_is_named_changes_and_nothing_else(start: tuple[Graph, Context], kind: str,
                                                monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(calibrate_network._Calibration, "_gate", lambda self, _: -float(len(self.streams[0].frames)))
    graph, _ = calibrate(start, EVERYTHING | {"learn": (kind,)}, steps=2, gates=1)
    names = set[str]()
    for node in graph.nodes:
        if node.op == "QuantizeLinear":
            constant = isinstance(node.inputs[0], Constant)
            names |= {node.inputs[0].name} if kind == "weight" and constant else set()
            names |= {node.inputs[1].name} if kind == ("weight_scale" if constant else "scale") else set()
        elif node.op == "Conv" and kind == "bias":
            names.add(node.inputs[2].name)
    found = changed(start[0], graph)
    assert found
    assert found <= names


# -- affine --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calibrated_affine(start: tuple[Graph, Context]) -> dict[str, Any]:
    """A run that learns gamma and beta, with what the network computed with them right before they were absorbed."""
    seen: dict[str, Any] = {}
    real = calibrate_network._absorb
    frames = [torch.from_numpy(f.astype(np.float32) / 255)[None] for f in clips(2, 4)[1].frames()]
    states = [0.5 * torch.randn(1, 4, 32, 48, generator=torch.Generator().manual_seed(k)) for k in range(4)]

    def absorb(shadow: Shadow, layers: Any) -> None:
        held = shadow.run({}, shadow.fixed_values())
        seen["gammas"] = [float(a.gamma) for a in layers]
        seen["betas"] = [float(a.beta) for a in layers]
        seen["steps"] = {n.inputs[0].name: shadow.quantizers[n.outputs[0].outputs[0].outputs[0].name].steps(
            shadow.parameter(n.inputs[0].name)).numpy() for n in shadow.graph.nodes
            if n.op == "QuantizeLinear" and n.attrs.get("axis") is not None}
        for layer in layers:
            held[layer.dequantized] = held[layer.dequantized] * layer.gamma
            if layer.bias is not None:
                held[layer.bias] = shadow.parameter(layer.bias) * layer.gamma + layer.beta
        runs = [shadow.run({**held, "src": f, "r": r}, ("fgr", "pha", "s"))
                for f, r in zip(frames, states, strict=True)]
        seen["outputs"] = [{n: v.numpy() for n, v in outputs.items()} for outputs in runs]
        real(shadow, layers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate_network, "_absorb", absorb)
        patch.setattr(calibrate_network._Calibration, "_gate", lambda self, _: -float(self.streams[0].place))
        seen["graph"], seen["result"] = calibrate(start, PUBLISHED | {"affine_rate": 0.02}, steps=8, gates=1)
    seen["feeds"] = [{"src": f.numpy(), "r": r.numpy()} for f, r in zip(frames, states, strict=True)]
    return seen


def test_gamma_and_beta_are_learned_for_every_layer(calibrated_affine: dict[str, Any]):
    assert len(calibrated_affine["gammas"]) == 9
    assert min(abs(g - 1) for g in calibrated_affine["gammas"]) > 1e-4
    assert max(abs(g - 1) for g in calibrated_affine["gammas"]) > 0.02
    assert max(abs(b) for b in calibrated_affine["betas"]) > 0.02


def test_gamma_and_beta_vanish_without_changing_the_function(start: tuple[Graph, Context],
                                                             calibrated_affine: dict[str, Any]):
    graph = calibrated_affine["graph"]
    same_nodes(start[0], graph)
    exact: list[bool] = []
    for feeds, expected in zip(calibrated_affine["feeds"], calibrated_affine["outputs"], strict=True):
        found, plain = run_onnx(graph, feeds), run_onnx(start[0], feeds)
        for name, value in expected.items():
            assert np.abs(plain[name] - value).mean() > 1e-3     # it did change what the network computes
        exact.append(all(np.abs(found[name] - value).max() < 1e-6 for name, value in expected.items()))
    assert sum(exact) >= len(exact) - 1        # a value next to a tie may fall to the other side, and take others along


def test_rounding_is_what_it_was(start: tuple[Graph, Context], calibrated_affine: dict[str, Any]):
    graph, before = calibrated_affine["graph"], constants(start[0])
    assert len(calibrated_affine["steps"]) == 9
    for node in graph.nodes:
        if node.op != "QuantizeLinear" or node.attrs.get("axis") is None:
            continue
        weight, scale, zero = (np.asarray(v.values) for v in node.inputs)
        integers = quantize(weight, scale, zero, QuantSpec.of(zero.dtype, node.attrs["axis"]))
        assert np.array_equal(integers, calibrated_affine["steps"][node.inputs[0].name])
        old = [before[v.name] for v in node.inputs[:2]]
        assert np.array_equal(integers, quantize(*old, zero, QuantSpec.of(zero.dtype, node.attrs["axis"])))
        some = np.abs(old[0]) > 1e-6
        assert np.array_equal(weight[old[0] == 0], old[0][old[0] == 0])
        factors = np.concatenate([(scale / old[1]).ravel(), weight[some] / old[0][some]])
        assert np.ptp(factors) < 1e-5                         # one gamma for the layer
        assert abs(factors[0] - 1) > 1e-4
    for name, value in zeros_of(graph).items():
        assert np.array_equal(value, before[name])


def test_affine_layers_without_bias_and_of_matmul():
    graph = read("""(float[1,3,32,48] src, float[4,3,3,3] w0, float[48,48] w1, float[4,4,3,3] w2, float[1,4,3,3] w3)
                    => (float[1,1,32,48] pha) {
        a = Conv <pads = [1,1,1,1]> (src, w0)
        b = Relu (a)
        m = MatMul (b, w1)
        d = Relu (m)
        e = Conv <pads = [1,1,1,1]> (d, w2)
        f = Relu (e)
        g = Conv <pads = [1,1,1,1]> (f, w3)
        pha = Sigmoid (g)
    }""")
    context = run_to("calibrate_ranges", graph, "4", clips(2, 4), recipe=PLAIN, effort=TINY)
    found, result = calibrate((graph, context), PUBLISHED | {"affine_rate": 0.01, "teacher": "float"}, steps=4, gates=4)
    narrow = sum(v.dtype.name == "uint4" for v in zeros_of(graph).values())
    assert result.report["parameters"] == narrow + 8
    same_nodes(graph, found)
    again = calibrate((found, context), PUBLISHED | {"affine_rate": 0.0, "scale_rate": 0.0, "teacher": "float"},
                      steps=1, gates=1)[1]
    assert gates(again)[0] == pytest.approx(min(gates(result)), rel=1e-2)


# -- streams and losses --------------------------------------------------------------------------------


def losses(start: tuple[Graph, Context], recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch, **effort: int,
           ) -> list[float]:
    """The loss of every step."""
    found: list[float] = []
    real = Lanes.gradients

    def gradients(*arguments: Any) -> float:
        found.append(real(*arguments))
        return found[-1]

    with monkeypatch.context() as patch:
        patch.setattr(Lanes, "gradients", gradients)
        patch.setattr(calibrate_network._Calibration, "_gate", lambda *_: 0.0)
        calibrate(start, recipe, **effort)
    return found


NOTHING = {"learn": ("bias",), "length": 6, "bias_rate": 0.0, "scale_rate": 0.0}


def test_losses_add_up(start: tuple[Graph, Context], monkeypatch: pytest.MonkeyPatch):
    weights = {"l1": 1.0, "laplacian": 0.25, "mse": 2.0, "temporal": 5.0, "state": 0.5, "foreground": 0.1, "flow": 0.7}
    alone = {name: losses(start, NOTHING | {name: value}, monkeypatch, steps=1, gates=1)
             for name, value in weights.items()}
    assert all(min(values) > 0 for values in alone.values())
    twice = losses(start, NOTHING | {"flow": 1.4}, monkeypatch, steps=1, gates=1)
    np.testing.assert_allclose(twice, 2 * np.array(alone["flow"]), rtol=1e-5)
    together = losses(start, NOTHING | weights, monkeypatch, steps=1, gates=1)
    np.testing.assert_allclose(together, np.sum(list(alone.values()), axis=0), rtol=1e-5)


@pytest.fixture
def work(start: tuple[Graph, Context]) -> Any:
    """The calibration itself, its first step not taken yet."""
    options = dataclasses.replace(start[1].options, effort=dataclasses.replace(TINY, unrolled=2),
                                  recipe=dataclasses.replace(PLAIN, network=NetworkRecipe(**NOTHING, l1=1.0)))
    with Lanes() as lanes:
        context = dataclasses.replace(start[1], options=options)
        yield calibrate_network._Calibration(start[0].copy(), context, options.recipe.network, lanes)


def test_a_stream_runs_on_from_its_own_states(work: Any):
    index = next(k for k in range(8) if len(work._at_next(k).frames) == 6)
    total = []
    for turn in range(3):
        with torch.no_grad():
            total.append(float(work._loss(index)))
        stream = work.streams[index]
        assert stream.place == 2 * (turn + 1)
    frames, number = stream.frames, stream.number
    expected = []
    ours, theirs = torch.zeros(1, 4, 32, 48), torch.zeros(1, 4, 32, 48)
    exact = Shadow(work.context.reference)
    for frame in frames:
        with torch.no_grad():
            a = work.shadow.run({"src": frame, "r": ours}, ("pha", "s"))
            b = exact.run({"src": frame, "r": theirs}, ("pha", "s"))
        ours, theirs = a["s"], b["s"]
        expected.append(float((a["pha"] - b["pha"]).abs().mean()))
    np.testing.assert_allclose(total, np.array(expected).reshape(3, 2).mean(axis=1), rtol=1e-4)
    torch.testing.assert_close(stream.ours["r"], ours, rtol=0, atol=1e-6)
    np.testing.assert_allclose(stream.theirs["r"], theirs.numpy(), rtol=0, atol=1e-5)
    with torch.no_grad():
        work._loss(index)                                     # it is used up: another one begins
    fresh = work.streams[index]
    assert fresh.place == 2
    assert fresh.number == number + 8
    assert not torch.equal(fresh.frames[:2], frames[:2])


def test_gradients_go_through_the_frames_of_a_turn_and_no_further(work: Any):
    learned = [p.parameter.requires_grad_() for p in work.learned]
    assert len(learned) == 9
    index = next(k for k in range(8) if len(work._at_next(k).frames) >= 4)
    exact = Shadow(work.context.reference)
    theirs = torch.zeros(1, 4, 32, 48)
    for turn in range(2):
        stream = work.streams[index]
        state = stream.ours["r"].clone()
        value = work.lanes.gradients(work._loss, [index], learned, 0)
        losses = []
        for frame in stream.frames[2 * turn:2 * turn + 2]:
            made = work.shadow.run({"src": frame, "r": state}, ("pha", "s"))
            with torch.no_grad():
                taught = exact.run({"src": frame, "r": theirs}, ("pha", "s"))
            state, theirs = made["s"], taught["s"]
            losses.append((made["pha"] - taught["pha"]).abs().mean())
        loss = torch.stack(losses).mean()
        assert value == pytest.approx(float(loss.detach()), rel=1e-4)
        for p, gradient in zip(learned, torch.autograd.grad(loss, learned), strict=True):
            assert p.grad is not None
            torch.testing.assert_close(p.grad, gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()))
        assert not work.streams[index].ours["r"].requires_grad


def test_laplacian_is_the_formula():
    rng = np.random.default_rng(0)
    for size in ((24, 40), (32, 48), (18, 7), (1, 5)):
        off = rng.normal(size=(1, 1, *size))
        assert float(laplacian(torch.from_numpy(off))) == pytest.approx(_pyramid(off), rel=1e-6)
    assert float(laplacian(torch.full((1, 1, 32, 48), -0.5))) == pytest.approx(8.0)      # the rest alone, 2^4 |c|
    assert float(laplacian(torch.zeros(1, 1, 32, 48))) == 0.0


def _pyramid(off: NDArray[Any]) -> float:
    total, current = 0.0, off
    for level in range(4):
        if min(current.shape[2:]) < 2:
            break
        height, width = (n // 2 for n in current.shape[2:])
        smaller = current[..., :2 * height, :2 * width].reshape(1, 1, height, 2, width, 2).mean((3, 5))
        total += 2.0 ** level * np.abs(current - _bilinear(smaller[0, 0], current.shape[2:])).mean()
        current = smaller
    return total + 16.0 * float(np.abs(current).mean())


def _bilinear(picture: NDArray[Any], size: tuple[int, ...]) -> NDArray[Any]:
    def weights(n: int, m: int) -> NDArray[Any]:
        at = np.clip((np.arange(m) + 0.5) * n / m - 0.5, 0, None)
        low = np.minimum(at.astype(int), n - 1)
        high = np.minimum(low + 1, n - 1)
        matrix = np.zeros((m, n))
        np.add.at(matrix, (np.arange(m), low), 1 - (at - low))
        np.add.at(matrix, (np.arange(m), high), at - low)
        return matrix

    return weights(picture.shape[0], size[0]) @ picture @ weights(picture.shape[1], size[1]).T


# -- teachers ------------------------------------------------------------------------------------------


def bare(footage: Sequence[Clip]) -> list[Clip]:
    return [dataclasses.replace(c, read_alpha=None) for c in footage]


def test_footage_without_alpha_is_taught_by_the_float_network(start: tuple[Graph, Context]):
    recipe = NOTHING | {"l1": 1.0, "bias_rate": 0.02}
    plain = start[0], dataclasses.replace(start[1], footage=bare(clips(2, 8)))
    by_float = calibrate(start, recipe | {"teacher": "float"}, steps=2)
    assert calibrate(plain, recipe | {"teacher": "float"}, steps=2)[0].to_bytes() == by_float[0].to_bytes()
    fallen_back = calibrate(plain, recipe | {"teacher": "alpha"}, steps=2)
    assert fallen_back[0].to_bytes() == by_float[0].to_bytes()
    assert gates(fallen_back[1]) == gates(by_float[1])
    by_alpha = calibrate(start, recipe | {"teacher": "alpha"}, steps=2)
    assert gates(by_alpha[1])[0] != gates(by_float[1])[0]
    mixed = start[0], dataclasses.replace(start[1], footage=[clips(2, 8)[0], *bare(clips(2, 8)[1:])])
    assert np.isfinite(gates(calibrate(mixed, recipe | {"teacher": "alpha"}, steps=4)[1])).all()


def test_the_true_alpha_is_aimed_at(start: tuple[Graph, Context]):
    """A truth that is 1 everywhere: the biases carry the alpha towards it."""
    def ones(clip: Clip) -> Clip:
        return dataclasses.replace(clip, read_alpha=lambda a, b: iter(
            np.full((len(range(*slice(a, b).indices(len(clip)))), 32, 48), 255, np.uint8)))

    white = start[0], dataclasses.replace(start[1], footage=[ones(c) for c in clips(2, 8)])
    recipe = NOTHING | {"teacher": "alpha", "l1": 1.0, "bias_rate": 10.0}
    graph, result = calibrate(white, recipe, steps=10, gates=2)
    assert gates(result)[-1] < 0.8 * gates(result)[0]
    means = [np.mean(list(Session(g, threads=1).alphas(clips(1, 4)[0].frames()))) for g in (start[0], graph)]
    assert means[1] > means[0] + 0.05


# -- the same every time -------------------------------------------------------------------------------


ALL_AT_ONCE = EVERYTHING | {"learn": (*EVERYTHING["learn"], "affine"), "flow": 0.05, "teacher": "alpha"}


def test_same_bytes_every_time_with_any_number_of_threads(start: tuple[Graph, Context]):
    recipe = ALL_AT_ONCE
    first = calibrate(start, recipe)[0].to_bytes()
    assert first != start[0].to_bytes()
    torch.set_num_threads(2)
    try:
        assert calibrate(start, recipe)[0].to_bytes() == first
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert calibrate(start, recipe, seed=1)[0].to_bytes() != first


def test_resumed_after_a_gate(start: tuple[Graph, Context], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recipe = ALL_AT_ONCE
    whole, result = calibrate(start, recipe, steps=9, gates=3)
    real = Lanes.gradients
    steps = 0

    def gradients(*arguments: Any) -> float:
        nonlocal steps
        steps += 1
        if steps == 5:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Lanes, "gradients", gradients)
        with pytest.raises(KeyboardInterrupt):
            calibrate(start, recipe, Checkpoint(tmp_path / "f", 1), steps=9, gates=3)
        resumed, again = calibrate(start, recipe, Checkpoint(tmp_path / "f", 1, resume=True), steps=9, gates=3)
        assert steps == 5 + 6                                 # from the gate at step 3 on
        last, third = calibrate(start, recipe, Checkpoint(tmp_path / "f", 1, resume=True), steps=9, gates=3)
        assert steps == 5 + 6
    assert resumed.to_bytes() == last.to_bytes() == whole.to_bytes()
    assert again.report == third.report == result.report


# -- other widths and networks -------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "recipe"), [("8", EVERYTHING), ("w4a8", EVERYTHING), ("w4a8", PUBLISHED)])
def test_other_widths(bits: str, recipe: dict[str, Any]):
    graph, context = prepared(network(), bits)
    found, result = calibrate((graph, context), recipe)
    assert np.isfinite(gates(result)).all()
    assert result.report["kept_step"] == 0 or result.modified > 5
    assert (result.modified == 0) == (result.report["kept_step"] == 0)
    same_nodes(graph, found)
    Session(found, threads=1).step(next(clips(1, 1)[0].frames()))


def at(text: str) -> str:
    """A network of 8x8 at the size of the clips."""
    return text.replace(",8,8]", ",32,48]")


def test_feed_forward():
    text = at(FEED_FORWARD).replace("float[3,4,3,3] w2", "float[3,4,3,3] w2, float[1,3,1,1] w3") \
        .replace("(float[1,3,32,48] fgr)", "(float[1,1,32,48] pha)") \
        .replace("fgr = Add (z, src)", "y2 = Add (z, src)\n    pha = Conv (y2, w3)")
    _, result = calibrate(prepared(read(text)), EVERYTHING, steps=30, gates=5)
    assert min(gates(result)) < 0.97 * gates(result)[0]


def test_two_states():
    _, result = calibrate(detuned(prepared(read(at(LSTM)))), EVERYTHING, steps=12, gates=4)
    assert min(gates(result)) < 0.9 * gates(result)[0]


@pytest.mark.parametrize("length", [1, 3])
def test_clips_shorter_than_a_turn(start: tuple[Graph, Context], length: int):
    context = dataclasses.replace(start[1], footage=[*clips(1, length), clips(2, 8)[1]])
    _, result = calibrate((start[0], context), EVERYTHING | {"flow": 0.1}, unrolled=4)
    assert np.isfinite(gates(result)).all()
