"""Lanes: gradients of several items are those of their mean, whatever the number of threads, and repeatably."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from vmq.lanes import LANES, Lanes, generator


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """torch with its number of threads as it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def model() -> tuple[list[nn.Parameter], list[Tensor]]:
    source = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=source)) for shape in ((6, 5, 3, 3), (6,), (4,))]
    return parameters, [torch.randn(1, 5, 9, 11, generator=source) for _ in range(5)]


def loss_of(parameters: list[nn.Parameter], noise: float = 0.0):
    def loss(x: Tensor) -> Tensor:
        y = torch.conv2d(x, parameters[0], parameters[1]).tanh()
        if noise:
            y = y + noise * torch.randn(y.shape, generator=generator())
        return y.square().mean() + y.abs().mean()
    return loss


def test_gradients_are_those_of_the_mean():
    parameters, items = model()
    loss = loss_of(parameters)
    mean = torch.stack([loss(x) for x in items]).mean()
    expected = torch.autograd.grad(mean, parameters[:2])
    with Lanes() as lanes:
        value = lanes.gradients(loss, items, parameters, seed=3)
    assert value == pytest.approx(float(mean.detach()), rel=1e-6)
    for parameter, gradient in zip(parameters, expected, strict=False):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-7)
    assert parameters[2].grad is None              # the loss does not depend on it


def test_a_parameter_that_only_some_items_use():
    parameters, _ = model()
    with Lanes() as lanes:
        value = lanes.gradients(lambda k: parameters[k].square().sum(), [1, 2, 2, 2], parameters, seed=0)
    one, two = (parameters[k].detach() for k in (1, 2))
    assert value == pytest.approx(float((one.square().sum() + 3 * two.square().sum()) / 4))
    assert parameters[0].grad is None
    torch.testing.assert_close(parameters[1].grad, one / 2)
    torch.testing.assert_close(parameters[2].grad, two * 1.5)


def test_a_loss_that_depends_on_nothing_has_no_gradient():
    parameters, _ = model()
    with Lanes() as lanes:
        assert lanes.gradients(lambda k: torch.tensor(float(k)), [1, 4], parameters, seed=0) == 2.5
    assert [p.grad for p in parameters] == [None] * 3


def test_same_bits_for_any_number_of_threads_and_every_time():
    parameters, items = model()
    found = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        with Lanes() as lanes:
            value = lanes.gradients(loss_of(parameters, 0.1), items, parameters, seed=11)
        found.append((value, *(p.grad.clone() for p in parameters[:2] if p.grad is not None)))
    for other in found[1:]:
        assert other[0] == found[0][0]
        assert all(torch.equal(a, b) for a, b in zip(other[1:], found[0][1:], strict=True))
    with Lanes() as lanes:
        assert lanes.gradients(loss_of(parameters, 0.1), items, parameters, seed=12) != found[0][0]


def test_random_numbers_go_by_seed_and_place():
    drawn: dict[tuple[int, int], Tensor] = {}
    weight = nn.Parameter(torch.ones(()))

    def loss(key: tuple[int, int]) -> Tensor:
        drawn[key] = torch.rand(4, generator=generator())
        return weight

    with Lanes() as lanes:
        for seed in (0, 1):
            lanes.gradients(loss, [(seed, place) for place in range(3)], [weight], seed)
        first = drawn.pop((1, 2))
        assert not any(torch.equal(first, other) for other in drawn.values())
        lanes.gradients(loss, [(7, 0), (7, 1), (1, 2)], [weight], 1)
    assert torch.equal(drawn[1, 2], first)


def test_one_thread_inside_and_the_old_number_after():
    torch.set_num_threads(3)
    barrier = threading.Barrier(LANES, timeout=20)

    def look(_: int) -> tuple[int, int, bool]:
        barrier.wait()                             # as many at a time as there are lanes
        return threading.get_ident(), torch.get_num_threads(), torch.is_grad_enabled()

    with Lanes() as lanes:
        assert torch.get_num_threads() == 1
        seen = lanes.map(look, range(2 * LANES))
        assert lanes.map(lambda k: k * k, range(7)) == [0, 1, 4, 9, 16, 25, 36]
    assert torch.get_num_threads() == 3
    assert len({s[0] for s in seen}) == LANES
    assert threading.get_ident() not in {s[0] for s in seen}
    assert {s[1:] for s in seen} == {(1, False)}


@pytest.mark.parametrize("how", ["map", "gradients"])
def test_an_exception_in_a_lane_comes_out(how: str):
    torch.set_num_threads(2)
    weight = nn.Parameter(torch.ones(()))

    def work(k: int) -> Tensor:
        if k == 2:
            raise ZeroDivisionError("item two")
        return weight * k

    def run() -> None:
        with Lanes() as lanes:
            if how == "map":
                lanes.map(work, range(4))
            else:
                lanes.gradients(work, range(4), [weight], 0)

    with pytest.raises(ZeroDivisionError, match="item two"):
        run()
    assert torch.get_num_threads() == 2
    assert not [t for t in threading.enumerate() if t.name.startswith("lane")]
