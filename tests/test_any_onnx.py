"""Networks that nobody has seen: random ones, recurrent and feed-forward, through everything that compile does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from compiling import clips
from hypothesis import HealthCheck, given, note, settings
from numpy.typing import NDArray
from random_networks import SIZE, Network, networks
from tiny_matting import save_pictures

import vmq
from passes import PIPELINE
from passes.find_closures import find_closures
from vmq.fakequant import FakeQuantize
from vmq.graph import Graph
from vmq.pipeline import Context, Observer, Pass, run_passes
from vmq.recipe import Recipe
from vmq.runtime import Session
from vmq.shadow import Shadow
from vmq.spec import Bits, Options, QuantSpec
from vmq.states import pair_states

pytestmark = pytest.mark.usefixtures("one_thread")
FRAMES = 3
BALANCED = Recipe("balanced", balance=True)
BITS = ("8", "w4a8", "4")
LOOSE = 2.0
"""How many times its expected size a mean squared error may have: rounding is not independent from pixel to pixel."""
LOOSE_WEIGHTS = 10.8
"""And the part of it that comes of weights, of which few may count: 99.9% of chi-squared with one degree of freedom."""


@pytest.fixture(scope="module")
def footage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("footage")
    save_pictures(folder / "clip", clips(1, 4, SIZE)[0].frames())
    return folder


@given(networks())
@settings(max_examples=10, derandomize=True, suppress_health_check=list(HealthCheck))
def test_random_networks(footage: Path, network: Network) -> None:
    check(network, footage)


@given(networks())
@settings(max_examples=40, derandomize=True, suppress_health_check=list(HealthCheck))
def test_balancing_random_networks_changes_no_value(network: Network) -> None:
    note(f"{network.features}")
    graph, names = Graph.load(network.proto), [p.name for p in PIPELINE]
    context = Context(Options(bits=Bits.parse("4"), size=SIZE, pairs=network.pairs, recipe=BALANCED), clips(1, 4, SIZE))
    run_passes(graph, PIPELINE[:names.index("balance_channels")], context)
    before = graph.copy()
    run_passes(graph, [PIPELINE[names.index("balance_channels")]], context)
    one, two = (Session(g, optimize=False, threads=1, pairs=network.pairs) for g in (before, graph))
    for frame in frames():
        ours = two.step(frame)
        for name, value in one.step(frame).items():
            largest = max(1.0, float(np.abs(value).max()))
            loose = 2e-3 if value.dtype == np.float16 else 1e-4
            np.testing.assert_allclose(ours[name], value, rtol=0, atol=loose * largest, err_msg=name)


@pytest.mark.slow
@given(networks())
@settings(max_examples=300, suppress_health_check=list(HealthCheck))
def test_many_random_networks(footage: Path, network: Network) -> None:
    check(network, footage)


def check(network: Network, footage: Path) -> None:
    note(f"{network.features}")
    states_and_closures(network)
    index = sum(map(len, network.features)) % len(BITS)
    context = Context(Options(bits=Bits.parse(BITS[index]), size=SIZE, pairs=network.pairs), clips(1, 4, SIZE))
    names = [p.name for p in PIPELINE]
    graph = Graph.load(network.proto)
    run_passes(graph, PIPELINE[:names.index("find_closures") + 1], context)
    shadow_is_the_runtime(graph, network.pairs)
    compiled(network, BITS[index], footage)


def states_and_closures(network: Network) -> None:
    """States and closures are those that were built."""
    graph = Graph.load(network.proto)
    pairs = pair_states(graph, network.pairs)
    assert {p.input: p.output for p in pairs} == network.states
    found = find_closures(graph, pairs)
    for state in found.states:
        built = network.closures[state.pair.input]
        assert set(state.nodes) == built, (set(state.nodes) - built, built - set(state.nodes))
    for block in found.blocks:
        for closure in network.closures.values():
            assert closure <= set(block.nodes) or not closure & set(block.nodes)


def shadow_is_the_runtime(graph: Graph, pairs: dict[str, str]) -> None:
    """Frame after frame, each with its own states."""
    session, shadow = Session(graph, optimize=False, threads=1, pairs=pairs), Shadow(graph)
    states = {p.input: p.output for p in session.state_pairs}
    feeds = {n: torch.from_numpy(v) for n, v in session.feeds(frames()[0]).items()}
    for frame in frames():
        theirs = session.step(frame)
        with torch.no_grad():
            ours = shadow(feeds | {session.frame_input: torch.from_numpy(session.feeds(frame)[session.frame_input])})
        feeds |= {i: ours[o] for i, o in states.items()}
        for name, value in theirs.items():
            assert ours[name].numpy().dtype == value.dtype
            loose = 2e-3 if value.dtype == np.float16 else 1e-4
            np.testing.assert_allclose(ours[name].numpy(), value, rtol=loose, atol=loose, err_msg=name)


def compiled(network: Network, bits: str, footage: Path) -> None:
    """A valid file that takes the place of the model, with an error that its bits explain."""
    watch = _Watch()
    model: onnx.ModelProto | Path = network.proto
    if "external" in network.features:
        model = footage.parent / "external.onnx"
        onnx.save(network.proto, model, save_as_external_data=True, location="weights.bin", size_threshold=0)
        network.proto = onnx.load(model)
    result = vmq.compile(model, recipe="mse", bits=bits, calib=[footage], size=f"{SIZE[1]}x{SIZE[0]}",
                         effort="fast", pairs=network.pairs, observers=[watch])
    onnx.checker.check_model(result.graph.to_proto(), full_check=True)
    for before, after in zip(Graph.load(network.proto).signature(), result.graph.signature(), strict=True):
        assert before[:3] == after[:3]
        assert len(before[3]) == len(after[3])
        assert all(n == m or (isinstance(m, int) and not isinstance(n, int))
                   for n, m in zip(before[3], after[3], strict=True))
    assert {p.input: p.output for p in Session(result.graph).state_pairs} == network.states
    head = head_of(result.graph)
    exact = Session(watch.reference, optimize=False, threads=1, extra=[head], pairs=network.pairs)
    ours = Session(result.graph, optimize=False, threads=1, extra=[head])
    error = np.mean([np.square(ours.step(f)[head] - exact.step(f)[head]).mean() for f in frames()])
    activations, weights = expected_error(watch.quantized, head, network.pairs)
    note(f"{bits}: error {error:.3g}, expected of activations {activations:.3g}, of weights {weights:.3g}")
    assert error <= LOOSE * activations + LOOSE_WEIGHTS * weights + 1e-9
    assert np.mean(list(shadow_errors(result.graph, head))) <= 0.1 * (activations + weights) + 1e-9


def shadow_errors(graph: Graph, wanted: str) -> Iterator[float]:
    """Mean squared difference of shadow and runtime in a value, frame by frame, both fed alike."""
    session, shadow = Session(graph, optimize=False, threads=1, extra=[wanted]), Shadow(graph)
    for frame in frames():
        feeds = {n: torch.from_numpy(v) for n, v in session.feeds(frame).items()}
        with torch.no_grad():
            ours = shadow.run(feeds, [wanted])[wanted].numpy()
        yield float(np.square(ours - session.step(frame)[wanted]).mean())


class _Watch(Observer):
    """Keeps the float graph and the last one with all quantizers."""

    def started(self, graph: Graph, context: Context, passes: Sequence[Pass]) -> None:  # noqa: ARG002
        self.context = context

    def finished(self, graph: Graph) -> None:  # noqa: ARG002
        assert self.context.reference is not None
        self.reference, self.quantized = self.context.reference, self.context.found["lower"]


def head_of(graph: Graph) -> str:
    """What becomes alpha behind a last sigmoid or clip, which would hide errors."""
    value = graph.value("pha")
    while value.inputs[0].op not in ("Sigmoid", "Clip"):
        value = value.inputs[0].inputs[0]
    return str(value.inputs[0].inputs[0].name)


def expected_error(graph: Graph, wanted: str, pairs: dict[str, str]) -> tuple[float, float]:
    """The mean squared error of a value over FRAMES frames in closed loop, from bits and ranges alone: what quantized
    activations add to it, and what weights do.

    A quantizer of b bits over a range r is noise of variance (r / (2^b - 1))^2 / 12; to first order its share in the
    result is that times the sum of squares of the Jacobian, which random signs v estimate: E[(J^T v)^2].
    """
    shadow = Shadow(graph.copy())
    probes: list[_Probe] = []
    for name, quantizer in shadow.quantizers.items():
        assert isinstance(quantizer, FakeQuantize)
        shadow.quantizers[name] = probe = _Probe(quantizer.spec)
        probes.append(probe)
    session = Session(graph, optimize=False, threads=1, pairs=pairs)
    states = {p.input: p.output for p in session.state_pairs}
    feeds = {n: torch.from_numpy(v) for n, v in session.feeds(frames()[0]).items()}
    results = []
    for frame in frames():
        feeds[session.frame_input] = torch.from_numpy(session.feeds(frame)[session.frame_input])
        made = shadow.run(feeds, [wanted, *states.values()])
        feeds |= {i: made[o] for i, o in states.items()}
        results.append(made[wanted])
    y = torch.stack(results)
    generator, total = torch.Generator().manual_seed(0), [0.0, 0.0]
    of_weight = [p.spec.signed for p in probes for _ in p.noise]
    for _ in range(4):
        signs = torch.randint(0, 2, y.shape, generator=generator) * 2.0 - 1.0
        inputs = [n for p in probes for n in p.noise]
        for gradient, variance, part in zip(torch.autograd.grad((y * signs).sum(), inputs, retain_graph=True,
                                                                materialize_grads=True),
                                            [v for p in probes for v in p.variances()], of_weight, strict=True):
            total[part] += float((gradient.square() * variance).sum()) / (4 * y.numel())
    return total[False], total[True]


class _Probe:
    """In the place of a quantizer: hands on what it gets, and knows how much noise it would add."""

    def __init__(self, spec: QuantSpec) -> None:
        self.spec, self.low, self.high = spec, torch.zeros(()), torch.zeros(())
        self.noise: list[torch.Tensor] = []

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.spec.signed:                           # a weight: the same in every frame
            axes = [a for a in range(x.ndim) if a != self.spec.axis]
            self.low, self.high = -x.abs().amax(axes, keepdim=True), x.abs().amax(axes, keepdim=True)
            self.noise = self.noise or [torch.zeros_like(x, requires_grad=True)]
        else:
            self.low, self.high = torch.minimum(self.low, x.min().detach()), torch.maximum(self.high, x.max().detach())
            self.noise.append(torch.zeros_like(x, requires_grad=True))
        return x + self.noise[-1]

    def variances(self) -> list[torch.Tensor]:
        step = (self.high - self.low).detach() / (2**self.spec.bits - 1)
        return [step.square() / 12] * len(self.noise)


def frames() -> list[NDArray[np.uint8]]:
    return list(clips(1, FRAMES, SIZE)[0].frames())
