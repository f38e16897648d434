"""What is learned of a quantized graph: each kind found once, soft rounding, dropping, Adam, writing back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compiling import network, run_to
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_text import load
from torch import Tensor, nn

from vmq.fakequant import FakeQuantize
from vmq.graph import Constant, Graph
from vmq.lanes import Lanes
from vmq.layers import never_negative
from vmq.learning import KINDS, SETTLED, Adam, Dropped, Parameter, SoftRounding, assign, coarse, mixed, parameters
from vmq.shadow import Shadow
from vmq.spec import QuantSpec

pytestmark = pytest.mark.usefixtures("one_thread")


def quantizer(scales: list[float], bits: int = 4, dtype: torch.dtype = torch.float32) -> FakeQuantize:
    scale = nn.Parameter(torch.tensor(scales, dtype=dtype), requires_grad=False)
    zero = nn.Parameter(torch.zeros(len(scales), dtype=dtype), requires_grad=False)
    return FakeQuantize(scale, zero, QuantSpec(bits, signed=True, axis=0))


def weights(seed: int, scales: list[float], reach: float = 7.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """[len(scales),5,3], of `reach` steps each way."""
    draw = torch.rand((len(scales), 5, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return ((2.0 * draw - 1.0) * reach * torch.tensor(scales, dtype=torch.float64)[:, None, None]).to(dtype)


SCALES = [0.03, 1.7, 2e-4]


# -- soft rounding -------------------------------------------------------------------------------------


def test_soft_rounding_begins_at_the_float_weight():
    weight, scale = weights(0, SCALES), torch.tensor(SCALES)[:, None, None]
    soft = SoftRounding(quantizer(SCALES), weight)
    off = (soft(weight) - weight).abs() / scale
    assert float(off.detach().max()) < 1.1e-3                 # h begins within 0.001 to 0.999
    share = weight / scale - (weight / scale).floor()
    inner = (share > 0.002) & (share < 0.998)
    assert inner.float().mean() > 0.9
    assert float(off.detach()[inner].max()) < 1e-5
    assert torch.equal(soft(torch.full_like(weight, 3.0)), soft(weight))     # it knows its weight


def test_soft_rounding_stays_on_the_grid():
    weight = weights(1, SCALES, reach=20.0)
    soft = SoftRounding(quantizer(SCALES), weight)
    scale = torch.tensor(SCALES)[:, None, None]
    steps = soft(weight).detach() / scale
    assert float(steps.min()) == pytest.approx(-8, rel=1e-6)
    assert float(steps.max()) == pytest.approx(7, rel=1e-6)
    torch.testing.assert_close(steps, (weight / scale).clamp(-8, 7), rtol=0, atol=1.2e-3)


@settings(max_examples=60)
@given(seed=st.integers(0, 10_000), bits=st.sampled_from([4, 8]), reach=st.sampled_from([0.6, 1.0, 1.3]),
       growth=st.sampled_from([1.0, 0.93, 1.21]))
def test_settled_weights_round_to_what_was_learned_and_move_no_further_than_needed(
        seed: int, bits: int, reach: float, growth: float):
    own = quantizer(SCALES, bits)
    weight = weights(seed, SCALES, reach * 2 ** (bits - 1))
    soft = SoftRounding(own, weight)
    with torch.no_grad():
        soft.v.copy_(3.0 * torch.randn(soft.v.shape, generator=torch.Generator().manual_seed(seed)))
        own.scale.mul_(growth)                                # learned along
    settled = weight.clone()
    soft.settle(settled)
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    scale = own.scale.detach()[:, None, None]
    first = torch.tensor(SCALES)[:, None, None]
    up = (1.2 * torch.sigmoid(soft.v.detach()) - 0.1).clamp(0, 1) >= 0.5
    wanted = ((weight / first).floor() + up).clamp(low, high)
    assert torch.equal(own.steps(settled).float(), wanted)
    assert torch.equal(own(settled), wanted * scale)
    right = own.steps(weight).float() == wanted
    moved = settled != weight
    inside = (weight / first).floor() + up == wanted
    beyond = (wanted == low) & (weight / scale < low) | (wanted == high) & (weight / scale > high)
    assert not (moved & beyond & inside).any()                # ends of the grid hold all that is beyond
    assert moved[~right].all()
    off = (settled / scale - wanted).abs()
    assert ((off - SETTLED).abs()[moved & inside] < 1e-5 * (high + 1)).all()
    assert (off[inside & ~beyond] < SETTLED + 1e-5 * (high + 1)).all()
    near = (weight / scale - wanted).abs() < SETTLED - 1e-5 * (high + 1)
    assert not (moved & near & inside).any()


def test_undecided_is_the_formula():
    soft = SoftRounding(quantizer(SCALES), weights(2, SCALES))
    with torch.no_grad():
        soft.v.copy_(torch.linspace(-6, 6, soft.v.numel()).view(soft.v.shape))
    v = soft.v.detach().double().numpy()
    h = np.clip(1.2 / (1.0 + np.exp(-v)) - 0.1, 0.0, 1.0)
    for sharpness in (20.0, 5.0, 2.0):
        expected = (1.0 - np.abs(2.0 * h - 1.0) ** sharpness).sum()
        assert float(soft.undecided(sharpness).detach()) == pytest.approx(expected, rel=1e-5)
    assert set(h[np.abs(v) > 4]) == {0.0, 1.0}
    with torch.no_grad():
        soft.v.copy_(10.0 * soft.v.sign())
    assert float(soft.undecided(20.0).detach()) == 0.0


def test_gradients_of_soft_rounding_are_finite_differences():
    scales = [0.3, 0.05]
    own = quantizer(scales, dtype=torch.float64)
    soft = SoftRounding(own, weights(3, scales, 9.0, torch.float64))
    own.scale.requires_grad_()
    with torch.no_grad():
        soft.v.view(-1)[:6] = torch.tensor([-9.0, 9.0, -3.0, 3.0, -2.0, 2.0])
    source = torch.Generator().manual_seed(0)
    out = torch.randn(soft.v.shape, generator=source, dtype=torch.float64)

    def loss() -> Tensor:
        return (soft(soft.v) * out).square().sum() + 0.3 * soft.undecided(7.0)

    learned = [soft.v, own.scale]
    gradients = torch.autograd.grad(loss(), learned)
    for parameter, gradient in zip(learned, gradients, strict=True):
        flat = parameter.data.view(-1)
        for index in range(flat.numel()):
            ends = []
            for side in (1e-6, -1e-6):
                flat[index] += side
                ends.append(loss().item())
                flat[index] -= side
            assert gradient.view(-1)[index].item() == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5, abs=1e-7)
    assert (gradients[0].view(-1) == 0.0).nonzero().flatten().tolist() == [0, 1, 2, 3]       # h is 0 or 1 there


# -- dropping ------------------------------------------------------------------------------------------


def drawn(work, seed: int = 0) -> Tensor:
    """What `work` gives within a lane, where random numbers are."""
    found = []
    with Lanes() as lanes:
        lanes.gradients(lambda _: (found.append(work()), torch.zeros(()))[1], [0], [], seed)
    return found[0]


def test_without_probability_nothing_is_dropped():
    x, exact = torch.randn(4, 5), torch.randn(4, 5)
    assert mixed(x, exact, 0.0) is x                           # without random numbers, outside of any lane


@pytest.mark.parametrize("probability", [0.5, 0.25, 0.9])
def test_that_share_of_values_is_exact(probability: float):
    x, exact = torch.randn((2, 3, 7, 64, 61), generator=torch.Generator().manual_seed(0))
    assert not bool((x == exact).any())
    y = drawn(lambda: mixed(x, exact, probability))
    taken = y == exact
    assert torch.equal(taken, y != x)                          # one of the two, bit for bit
    share = round(256 * probability) / 256
    deviation = (share * (1 - share) / x.numel()) ** 0.5
    assert abs(float(taken.double().mean()) - share) < 4 * deviation
    for axis in range(4):                                      # and everywhere alike
        for part in taken.unbind(axis):
            assert abs(float(part.double().mean()) - share) < 6 * (share * (1 - share) / part.numel()) ** 0.5
    neighbours = taken[..., 1:] & taken[..., :-1]
    assert abs(float(neighbours.double().mean()) - share ** 2) < 0.01


def test_same_seed_same_choice():
    x, exact = torch.zeros(1000), torch.ones(1000)
    first, again, other = (drawn(lambda: mixed(x, exact, 0.5), seed) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert 300 < int((first != other).sum()) < 700


def test_gradients_go_to_the_value_that_was_taken():
    x, exact = torch.zeros(200, requires_grad=True), torch.ones(200, requires_grad=True)
    y = drawn(lambda: mixed(x, exact, 0.5))
    one, other = torch.autograd.grad(y.sum(), [x, exact])
    assert torch.equal(other, y.detach())
    assert torch.equal(one, 1.0 - y.detach())


def test_dropped_rounds_the_rest():
    scale, zero = nn.Parameter(torch.tensor(0.1)), nn.Parameter(torch.tensor(3.0))
    own = FakeQuantize(scale, zero, QuantSpec(4, signed=False))
    x = torch.randn(5000)
    y = drawn(lambda: Dropped(own, 0.5)(x))
    rounded = own(x).detach()
    assert torch.equal(y.detach(), torch.where(y == x, x, rounded))
    assert 0.45 < float((y == x).double().mean()) < 0.55


# -- Adam ----------------------------------------------------------------------------------------------


def test_adam_is_adam_with_relative_rates():
    source = torch.Generator().manual_seed(0)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source)

    values = [tensor(3, 4), tensor(3), tensor(2)]
    units = [torch.tensor([0.5, 1e-3, 20.0])[:, None], torch.tensor([0.1, 7.0, 1.0]), torch.tensor(3.0)]
    rates = {"weight": 0.02, "scale": 5e-3}
    ours = [Parameter(kind, "", nn.Parameter(v.clone()), u)
            for kind, v, u in zip(("weight", "scale", "scale"), values, units, strict=True)]
    optimizer = Adam(ours, rates)
    theirs, groups = [], []
    for item, value in zip(ours, values, strict=True):        # torch takes one rate for each parameter
        rows = [nn.Parameter(row.clone()) for row in value]
        theirs.append(rows)
        for row, unit in zip(rows, item.unit.flatten().expand(len(rows)), strict=True):
            groups.append({"params": [row], "lr": rates[item.kind] * float(unit)})
    twin = torch.optim.Adam(groups, eps=1e-12)
    full = [g["lr"] for g in twin.param_groups]
    for step in range(20):
        share = 0.5 * (1 + np.cos(np.pi * step / 20))
        for item, rows in zip(ours, theirs, strict=True):
            gradient = tensor(*item.parameter.shape) * 10.0 ** float(tensor(1))
            item.parameter.grad = gradient.clone()
            for row, part in zip(rows, gradient, strict=True):
                row.grad = part.clone()
        for group, rate in zip(twin.param_groups, full, strict=True):
            group["lr"] = rate * share
        optimizer.step(share)
        twin.step()
        assert all(item.parameter.grad is None for item in ours)
    for item, rows, value in zip(ours, theirs, values, strict=True):
        moved = item.parameter.detach() - value
        expected = torch.stack([r.detach() for r in rows]) - value
        assert float(expected.abs().min()) > 0
        torch.testing.assert_close(moved, expected, rtol=1e-5, atol=3e-7 * float(value.abs().max()))


def test_the_first_step_is_as_long_as_its_unit():
    item = Parameter("scale", "s", nn.Parameter(torch.tensor([1.0, 5.0])), torch.tensor([0.1, 50.0]))
    still = Parameter("scale", "t", nn.Parameter(torch.tensor([2.0])), torch.ones(1))
    optimizer = Adam([item, still], {"scale": 0.01})
    item.parameter.grad = torch.tensor([1e-4, -300.0])
    optimizer.step(0.5)
    torch.testing.assert_close(item.parameter.detach(), torch.tensor([1.0 - 0.5e-3, 5.0 + 0.25]))
    assert float(still.parameter.detach()) == 2.0                 # it had no gradient


def test_adam_goes_on_from_its_tensors():
    def run(steps: range, optimizer: Adam, source: torch.Generator) -> None:
        for _ in steps:
            for p in optimizer.learned:
                p.parameter.grad = torch.randn(p.parameter.shape, generator=source)
            optimizer.step()

    def fresh() -> Adam:
        return Adam([Parameter("zero", "z", nn.Parameter(torch.zeros(3)), torch.ones(()))], {"zero": 0.1})

    whole, source = fresh(), torch.Generator().manual_seed(1)
    run(range(4), whole, source)
    kept = [t.clone() for t in whole.tensors()]
    rest = source.get_state()
    run(range(4), whole, source)
    resumed = fresh()
    with torch.no_grad():
        for tensor, value in zip(resumed.tensors(), kept, strict=True):
            tensor.copy_(value)
    resumed.count = 4
    source.set_state(rest)
    run(range(4), resumed, source)
    for one, other in zip(whole.tensors(), resumed.tensors(), strict=True):
        assert torch.equal(one, other)


# -- what there is to learn ----------------------------------------------------------------------------


def expected_constants(graph: Graph) -> dict[str, set[str]]:
    """Names of constants by kind, from what the operators are."""
    found: dict[str, set[str]] = {kind: set() for kind in KINDS}
    for node in graph.nodes:
        if node.op == "QuantizeLinear" and node.inputs[2].dtype.name == "uint4":
            found["scale"].add(node.inputs[1].name)
            if not never_negative(node.inputs[0]):
                found["zero"].add(node.inputs[2].name)
        elif node.op == "QuantizeLinear" and node.inputs[2].dtype.name in ("int4", "int8"):
            found["weight"].add(node.inputs[0].name)
            found["weight_scale"].add(node.inputs[1].name)
        elif node.op == "Conv" and len(node.inputs) > 2:
            found["bias"].add(node.inputs[2].name)
    return found


@pytest.fixture(scope="module")
def quantized() -> Graph:
    graph = network()
    run_to("correct_biases", graph, "4")
    return graph


def test_every_kind_is_found_once(quantized: Graph):
    shadow = Shadow(quantized)
    expected = expected_constants(quantized)
    every = parameters(shadow, KINDS)
    assert len({id(p.parameter) for p in every}) == len(every)
    for kind in KINDS:
        found = parameters(shadow, [kind])
        assert {p.constant for p in found} == expected[kind]
        assert [p.kind for p in found] == [kind] * len(expected[kind])
        assert [p.constant for p in every if p.kind == kind] == [p.constant for p in found]
    assert [len(expected[k]) for k in ("weight", "weight_scale", "bias", "rounding")] == [9, 9, 9, 0]
    for p in every:
        assert p.parameter is shadow.parameter(p.constant)
    frames = {n.inputs[1].name for n in quantized.value("src").outputs
              if n.op == "QuantizeLinear" and n.inputs[2].dtype == np.uint8}
    assert frames
    assert frames.isdisjoint({p.constant for p in every})                 # 8 bits: as good as found


def test_a_scale_that_ties_pairs_together_counts_once(quantized: Graph):
    first, *others = [n for n in quantized.nodes if n.op == "QuantizeLinear" and n.inputs[2].dtype.name == "uint4"]
    tied = quantized.copy()
    for node in tied.nodes:
        if node.op in ("QuantizeLinear", "DequantizeLinear") and node.inputs[1].name == others[0].inputs[1].name:
            for place in (1, 2):
                node.inputs[place] = tied.value(first.inputs[place].name)
    tied.cleanup()
    found = [p.constant for p in parameters(Shadow(tied), ["scale"])]
    assert len(found) == len(set(found)) == len({n.inputs[1].name for n in others})


def test_constants_of_other_tools_that_must_stay_equal_count_once():
    graph = load("""(float[2,3,5] x) => (float[2,3,5] y) <float s = {0.05}, float s2 = {0.05}, uint4 z1 = {7},
                    uint4 z2 = {7}> { q = QuantizeLinear (x, s, z1)  y = DequantizeLinear (q, s2, z2) }""")
    shadow = Shadow(graph)
    found = parameters(shadow, KINDS)
    assert [(p.kind, p.constant) for p in found] == [("scale", "s"), ("zero", "z1")]


@pytest.mark.parametrize(("makes", "learned"), [
    ("Relu (x)", False), ("Sigmoid (x)", False), ("HardSigmoid (x)", False), ("Clip (x, none, six)", True),
    ("Clip (x, none)", False), ("HardSwish (x)", True), ("Identity (x)", True),
    ("Transpose (r)", False), ("Concat <axis = 0> (r, r)", False), ("Concat <axis = 0> (r, x)", True)])
def test_what_is_never_negative_keeps_its_zero_point(makes: str, learned: bool):
    low = "-6" if makes.endswith("six)") else "0"
    graph = load(f"""(float[2,3] x) => (float[n,m] y) <float s = {{0.1}}, uint4 z = {{0}}, float none = {{{low}}}, float
        six = {{6}}> {{ r = Relu (x)  a = {makes}  q = QuantizeLinear (a, s, z)  y = DequantizeLinear (q, s, z) }}""")
    found = [p.kind for p in parameters(Shadow(graph), KINDS)]
    assert found == (["scale", "zero"] if learned else ["scale"])


def test_steps_are_relative(quantized: Graph):
    units = {p.constant: p for p in parameters(Shadow(quantized), KINDS)}
    by_name = {c.name: np.asarray(c.values) for c in quantized.constants()}
    for node in quantized.nodes:
        if node.op == "QuantizeLinear" and isinstance(node.inputs[0], Constant) and node.inputs[0].name in units:
            weight, scale = node.inputs[0].name, node.inputs[1].name
            shape = [-1] + [1] * (by_name[weight].ndim - 1)
            assert np.array_equal(units[weight].unit.numpy(), by_name[scale].reshape(shape))
            assert np.array_equal(units[scale].unit.numpy(), by_name[scale])
        elif node.op == "QuantizeLinear" and node.inputs[2].dtype.name == "uint4":
            assert units[node.inputs[1].name].unit == float(by_name[node.inputs[1].name])
            assert node.inputs[2].name not in units or units[node.inputs[2].name].unit == 1.0
    behind = {"deep": "b", "point": "point"}                   # a layer's result is rounded behind its Relu
    for layer, value in behind.items():
        conv = quantized.value(layer).inputs[0]
        step, = [n.inputs[1].name for n in quantized.value(value).outputs if n.op == "QuantizeLinear"]
        unit = units[conv.inputs[2].name].unit
        assert unit.shape == (8,)
        assert np.array_equal(unit.numpy(), np.full(8, by_name[step]))
    head = units[quantized.value("head").inputs[0].inputs[2].name].unit.numpy()
    assert np.array_equal(head, np.full(4, np.float32(1 / 255)))     # what leaves the network counts in 8-bit steps


def test_of_some_nodes_only(quantized: Graph):
    shadow = Shadow(quantized)
    conv = quantized.value("mixed").inputs[0]
    quantize = conv.inputs[1].inputs[0].inputs[0].inputs[0]
    assert quantize.op == "QuantizeLinear"
    found = parameters(shadow, KINDS, {conv.name, quantize.name})
    assert [(p.kind, p.constant) for p in found] == [
        ("weight", quantize.inputs[0].name), ("weight_scale", quantize.inputs[1].name), ("bias", conv.inputs[2].name)]
    assert parameters(shadow, KINDS, set()) == []


# -- coarse --------------------------------------------------------------------------------------------


def test_stand_ins_clip_and_do_not_round(quantized: Graph):
    quantizers = Shadow(quantized).quantizers
    found = coarse(quantizers)
    wide = {n for n, q in quantizers.items() if isinstance(q, FakeQuantize) and q.spec.dtype.name == "uint8"}
    assert set(found) == wide
    assert 5 < len(wide) < len(quantizers)
    for name in wide:
        own = quantizers[name]
        assert isinstance(own, FakeQuantize)
        scale = float(own.scale.detach())
        ends = own(torch.tensor([-1e6, 1e6])).detach()
        x = torch.linspace(float(ends[0]) - 3 * scale, float(ends[1]) + 3 * scale, 5001)
        y = found[name](x)
        torch.testing.assert_close(y, x.clamp(float(ends[0]), float(ends[1])), rtol=1e-6, atol=1e-6 * scale)
        assert float((y - own(x).detach()).abs().max()) < 0.5001 * scale


# -- writing back --------------------------------------------------------------------------------------


def test_assign_gives_what_differs(quantized: Graph):
    graph, twin = quantized.copy(), quantized.copy()
    before = graph.to_bytes()
    assert assign(graph, twin) == 0
    assert graph.to_bytes() == before
    weight = twin.value("head").inputs[0].inputs[1].inputs[0].inputs[0].inputs[0].inputs[0].name
    scale, zero = (n.name for n in next(n for n in twin.value("src").outputs if n.op == "QuantizeLinear").inputs[1:])
    twin.value(weight).values = twin.value(weight).values + np.float32(0.01)
    twin.value(scale).values = np.float32(0.125).reshape(twin.value(scale).values.shape)
    twin.value(zero).values = np.full_like(twin.value(zero).values, 5)
    twin.constant("of the twin alone", np.ones(3))
    assert assign(graph, twin, {scale}) == 1
    assert float(graph.value(scale).values) == 0.125
    assert assign(graph, twin, {"nothing of this name"}) == 0
    assert assign(graph, twin) == 2
    for name in (weight, scale, zero):
        assert graph.value(name).dtype == quantized.value(name).dtype
        assert np.array_equal(graph.value(name).values, twin.value(name).values)
    twin.value(weight).values[:] = 0.0
    assert graph.value(weight).values.any()                    # a copy, not a view
    assert [n.name for n in graph.nodes] == [n.name for n in quantized.nodes]
