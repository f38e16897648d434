"""The measures against hand-computed cases, against loops written from the definitions, and in what must not matter."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from vmq.errors import MediaError
from vmq.metrics import Scores, conn, dtssd, fscore, grad, mad, mean_scores, mse, sad, score_clip

Matte = NDArray[np.uint8]


def mattes(seed: int, count: int = 2, shape: tuple[int, int] = (17, 23)) -> list[Matte]:
    """Blobs with soft edges, so that the parts of Conn and the gradients are not mere noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: shape[0], : shape[1]]
    result = []
    for _ in range(count):
        matte = np.zeros(shape)
        for _ in range(4):
            distance = np.hypot(y - rng.uniform(0, shape[0]), x - rng.uniform(0, shape[1]))
            matte = np.maximum(matte, np.clip(rng.uniform(1, 6) - distance / rng.uniform(0.7, 3), 0, 1))
        result.append(np.rint(np.clip(matte + rng.normal(0, 0.04, shape), 0, 1) * 255).astype(np.uint8))
    return result


def test_hand_computed_differences() -> None:
    true = np.zeros((4, 5), np.uint8)
    pred = true.copy()
    pred[0, 0], pred[1, 1] = 255, 51
    assert sad(pred, true) == pytest.approx(1.2 / 1000)
    assert mad(pred, true) == pytest.approx(1.2 / 20 * 1e3)
    assert mse(pred, true) == pytest.approx(1.04 / 20 * 1e3)


def test_hand_computed_dtssd() -> None:
    zero, one = np.zeros((2, 2), np.uint8), np.full((2, 2), 255, np.uint8)
    corner = np.array([[255, 0], [0, 0]], np.uint8)
    assert dtssd(one, one, zero, zero) == 0  # both changed alike
    assert dtssd(one, zero, zero, zero) == pytest.approx(100)
    assert dtssd(corner, zero, zero, zero) == pytest.approx(50)  # sqrt(1/4)
    assert dtssd(zero, one, one, zero) == pytest.approx(200)  # in opposite directions


def test_hand_computed_fscore() -> None:
    true = np.array([[255, 255, 0, 0]], np.uint8)
    assert fscore(np.array([[255, 0, 0, 0]], np.uint8), true) == pytest.approx(2 * 1 / (1 + 2))
    assert fscore(np.array([[128, 128, 127, 0]], np.uint8), true) == 1  # 128/255 is above a half, 127/255 is not
    assert fscore(np.zeros((1, 4), np.uint8), true) == 0
    assert fscore(np.zeros((1, 4), np.uint8), np.zeros((1, 4), np.uint8)) == 1


def test_hand_computed_conn() -> None:
    # The right pixel leaves the largest part at 0.1 for want of a bridge: l = 0, so d = 1 in truth, 0 where missed.
    true = np.array([[255, 255, 0, 255]], np.uint8)
    pred = np.array([[255, 255, 0, 0]], np.uint8)
    assert conn(pred, true) == pytest.approx(1 / 1000)
    # A prediction of 0.9 follows the truth up to 0.9: d = 0.1 in the truth, which is below 0.15 and forgiven.
    assert conn(np.array([[230]], np.uint8), np.array([[255]], np.uint8)) == pytest.approx(0, abs=1e-9)
    # One of 0.8 = 204/255 is itself a threshold, and still belongs at it: d = 0.2 in the truth.
    assert conn(np.array([[204]], np.uint8), np.array([[255]], np.uint8)) == pytest.approx(0.2 / 1000, rel=1e-5)


def test_connected_is_by_sides_not_corners() -> None:
    diagonal = np.array([[255, 255, 0], [255, 0, 0], [0, 0, 255]], np.uint8)
    missed = diagonal.copy()
    missed[2, 2] = 0
    touching = np.array([[255, 255, 0], [255, 255, 0], [0, 0, 255]], np.uint8)
    touching_missed = touching.copy()
    touching_missed[2, 2] = 0
    assert conn(missed, diagonal) == pytest.approx(1 / 1000)
    assert conn(touching_missed, touching) == pytest.approx(1 / 1000)


def naive_grad(pred: Matte, true: Matte) -> float:
    sigma, half = 1.4, 4
    kernel = np.zeros((9, 9))
    for i in range(9):
        for j in range(9):
            u, v = i - half, j - half
            bell = math.exp(-(u * u) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))
            slope = -v * math.exp(-(v * v) / (2 * sigma**2)) / (sigma**3 * math.sqrt(2 * math.pi))
            kernel[i, j] = bell * slope
    kernel /= math.sqrt((kernel**2).sum())

    def magnitude(matte: Matte) -> NDArray[np.float64]:
        values = matte / 255
        values = (values - values.min()) / (values.max() - values.min())
        result = np.zeros(values.shape)
        for y in range(values.shape[0]):
            for x in range(values.shape[1]):
                across = down = 0.0
                for i in range(9):
                    for j in range(9):
                        row = min(max(y + i - half, 0), values.shape[0] - 1)
                        column = min(max(x + j - half, 0), values.shape[1] - 1)
                        across += kernel[i, j] * values[row, column]
                        down += kernel[j, i] * values[row, column]
                result[y, x] = math.hypot(across, down)
        return result

    return float(((magnitude(true) - magnitude(pred)) ** 2).sum() / 1000)


def naive_conn(pred: Matte, true: Matte) -> float:
    def parts(mask: NDArray[np.bool_]) -> list[set[tuple[int, int]]]:
        left = {(int(y), int(x)) for y, x in np.argwhere(mask)}
        found = []
        while left:
            part, queue = set(), [min(left)]
            left.discard(queue[0])
            while queue:
                y, x = queue.pop()
                part.add((y, x))
                for near in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                    if near in left:
                        left.discard(near)
                        queue.append(near)
            found.append(part)
        return found

    level = np.full(true.shape, -1.0)
    for step in range(1, 11):
        mask = (true.astype(int) * 10 >= step * 255) & (pred.astype(int) * 10 >= step * 255)
        found = parts(mask)
        largest: set[tuple[int, int]] = max(found, key=len) if found else set()
        for y in range(true.shape[0]):
            for x in range(true.shape[1]):
                if level[y, x] < 0 and (y, x) not in largest:
                    level[y, x] = (step - 1) / 10
    level[level < 0] = 1
    total = 0.0
    for y in range(true.shape[0]):
        for x in range(true.shape[1]):
            phi = []
            for matte in (true, pred):
                d = matte[y, x] / 255 - level[y, x]
                phi.append(1 - (d if d >= 0.15 else 0))
            total += abs(phi[0] - phi[1])
    return total / 1000


@pytest.mark.parametrize("seed", range(6))
def test_grad_and_conn_equal_the_loops_of_their_definitions(seed: int) -> None:
    pred, true = mattes(seed)
    assert grad(pred, true) == pytest.approx(naive_grad(pred, true), rel=2e-5)
    assert conn(pred, true) == pytest.approx(naive_conn(pred, true), rel=2e-5, abs=1e-9)
    assert min(grad(pred, true), conn(pred, true)) > 1e-4  # the comparison is about something


@pytest.mark.parametrize("seed", range(4))
def test_a_clip_is_the_mean_over_its_frames(seed: int) -> None:
    preds, trues = mattes(seed, 5), mattes(seed + 100, 5)
    totals = np.zeros(7)
    for number, (pred, true) in enumerate(zip(preds, trues, strict=True)):
        size, change, both, hits = pred.size, 0.0, 0, 0
        absolute = squared = 0.0
        for y in range(pred.shape[0]):
            for x in range(pred.shape[1]):
                p, t = int(pred[y, x]) / 255, int(true[y, x]) / 255
                absolute += abs(p - t)
                squared += (p - t) ** 2
                both += (p > 0.5) + (t > 0.5)
                hits += p > 0.5 and t > 0.5
                if number:
                    q, u = int(preds[number - 1][y, x]) / 255, int(trues[number - 1][y, x]) / 255
                    change += ((p - q) - (t - u)) ** 2
        totals += [
            absolute / 1000,
            absolute / size * 1e3,
            squared / size * 1e3,
            naive_grad(pred, true),
            naive_conn(pred, true),
            math.sqrt(change / size) * 1e2,
            2 * hits / both,
        ]
    scores = score_clip(iter(preds), iter(trues))
    assert list(scores.as_dict().values()) == pytest.approx(list(totals / 5), rel=2e-5)
    assert list(scores.as_dict()) == ["SAD", "MAD", "MSE", "Grad", "Conn", "dtSSD", "F"]


def test_the_first_frame_counts_as_zero_in_dtssd() -> None:
    zero, one = np.zeros((3, 3), np.uint8), np.full((3, 3), 255, np.uint8)
    scores = score_clip([one, zero, one, zero], [zero] * 4)
    assert scores.dtSSD == pytest.approx((0 + 100 + 100 + 100) / 4)
    assert scores.dtSSD_later == pytest.approx(100)
    single = score_clip([one], [zero])
    assert (single.dtSSD, single.dtSSD_later) == (0, 0)


def test_equal_mattes_score_perfectly() -> None:
    clip = mattes(3, 3)
    assert score_clip(clip, clip) == Scores(0, 0, 0, 0, 0, 0, 1, 0)


MEASURES = (sad, mad, mse, grad, conn, fscore)


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000))
def test_mirroring_and_exchanging_change_nothing(seed: int) -> None:
    pred, true = mattes(seed)
    for measure in MEASURES:
        value = measure(pred, true)
        assert measure(true, pred) == pytest.approx(value, rel=1e-6, abs=1e-9)
        if measure is not conn:  # of two parts of one size Conn takes the first, and mirrors turn the order round
            assert measure(pred[:, ::-1].copy(), true[:, ::-1].copy()) == pytest.approx(value, rel=1e-4)
            assert measure(pred.T.copy(), true.T.copy()) == pytest.approx(value, rel=1e-4)


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000))
def test_floats_are_eight_bit_mattes_over_255(seed: int) -> None:
    pred, true = mattes(seed)
    for kind in (np.float32, np.float64):
        for measure in MEASURES:
            assert measure((pred / 255).astype(kind), true) == pytest.approx(measure(pred, true), rel=1e-6)
    assert sad(pred, true) == pytest.approx(mad(pred, true) * pred.size / 1e6)


def test_grad_does_not_see_a_constant() -> None:
    flat, other = np.full((12, 12), 90, np.uint8), np.full((12, 12), 200, np.uint8)
    assert grad(flat, other) == 0
    _, true = mattes(1)
    assert grad((true // 2).astype(np.uint8), (true // 2 * 2).astype(np.uint8)) == pytest.approx(0, abs=1e-6)


def test_mean_of_clips_weighs_each_the_same() -> None:
    pred, true = mattes(5, 4), mattes(6, 4)
    short, long = score_clip(pred[:1], true[:1]), score_clip(pred, true)
    mean = mean_scores([short, long])
    assert pytest.approx((short.MAD + long.MAD) / 2) == mean.MAD
    assert mean.dtSSD_later == pytest.approx(long.dtSSD_later / 2)
    with pytest.raises(ValueError, match="no scores"):
        mean_scores([])


@pytest.mark.parametrize(
    ("pred", "true", "words"),
    [
        ([], [], "no mattes"),
        ([(4, 4)] * 2, [(4, 4)] * 3, "only 2 predicted mattes"),
        ([(4, 4)] * 3, [(4, 4)] * 2, "only 2 true mattes"),
        ([(4, 4), (4, 5)], [(4, 4)] * 2, r"matte 1 is \(4, 5\)"),
    ],
)
def test_clips_that_do_not_match_are_refused(pred: list[Any], true: list[Any], words: str) -> None:
    with pytest.raises(MediaError, match=words):
        score_clip((np.zeros(shape, np.uint8) for shape in pred), (np.zeros(shape, np.uint8) for shape in true))
