"""Crops: what learning sees, drawn repeatably, and graphs bound to the size of a crop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from compiling import clips, network, run_to
from onnx_text import load
from tiny_recurrent import GRU, LSTM, read

from models import rvm
from vmq import crops
from vmq.clips import Clip
from vmq.crops import GAIN, GAMMA, Crops, crop_graph, resized
from vmq.errors import ModelError
from vmq.graph import Constant, Graph
from vmq.learning import assign
from vmq.pictures import Frame
from vmq.runtime import Session
from vmq.shadow import Shadow

pytestmark = pytest.mark.usefixtures("one_thread")


# -- graphs --------------------------------------------------------------------------------------------


def sizes(graph: Graph) -> dict[str, tuple[int, ...]]:
    return {v.name: tuple(v.shape) for v in (*graph.inputs, *graph.outputs)}


def at(text: str, height: int, width: int) -> Graph:
    return read(text.replace(",8,8]", f",{height},{width}]"))


def same_function(one: Graph, other: Graph, tolerance: float) -> None:
    """Both graphs give the same for the same random inputs, over two steps of their states' names."""
    assert one.signature() == other.signature()
    source = torch.Generator().manual_seed(0)
    for _ in range(2):
        feeds = {v.name: torch.rand(tuple(v.shape), generator=source) for v in one.inputs}
        with torch.no_grad():
            ours, theirs = Shadow(one)(feeds), Shadow(other)(feeds)
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=0, atol=tolerance)


@pytest.mark.parametrize("text", [GRU, LSTM])
@pytest.mark.parametrize("ratio", [0.5, 0.25, 1.5])
def test_a_network_at_another_size_is_what_it_is_there(text: str, ratio: float):
    graph = at(text, 16, 24)
    before = graph.to_bytes()
    copy = resized(graph, ratio)
    same_function(copy, at(text, int(16 * ratio), int(24 * ratio)), 0.0)
    assert graph.to_bytes() == before
    for value in copy.values():
        if not isinstance(value, Constant):
            assert value.shape is not None
            assert all(isinstance(d, int) for d in value.shape), value.name


def test_the_runtime_takes_it(tmp_path: Path):
    resized(network(), 0.5).save(tmp_path / "half.onnx")
    session = Session(tmp_path / "half.onnx", optimize=False, threads=1)
    shadow = Shadow(Graph.load(tmp_path / "half.onnx"))
    state = torch.zeros(1, 4, 16, 24)
    for frame in np.random.default_rng(0).integers(0, 256, (3, 3, 16, 24), np.uint8):
        theirs = session.step(frame)
        with torch.no_grad():
            ours = shadow({"src": torch.from_numpy(frame).float()[None] / 255, "r": state})
        state = ours["s"]
        for name, value in theirs.items():
            np.testing.assert_allclose(ours[name].numpy(), value, rtol=0, atol=2e-5)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Graph]:
    """RVM with random weights at a size (H, W)."""
    folder = tmp_path_factory.mktemp("rvm")

    def export(height: int, width: int, refiner: str | None = None, **options: float) -> Graph:
        path = folder / f"{height}x{width}{refiner}.onnx"
        if not path.exists():
            rvm.export(rvm.build(refiner=refiner, seed=1), path, size=(height, width), **options)
        return Graph.load(path)

    return export


def test_rvm_at_half_the_size_is_its_export_there(exported: Callable[..., Graph]):
    half, there = resized(exported(64, 128), 0.5), exported(32, 64)
    assert sizes(half)["r3i"] == (1, 40, 4, 8)
    same_function(half, there, 2e-6)


@pytest.mark.parametrize(("size", "ratio", "becomes"), [
    ((68, 120), 1.0, (48, 64)), ((66, 64), 1.0, (48, 32)), ((270, 480), 0.5, (160, 256))])
def test_rvm_at_a_size_that_cannot_be_halved(exported: Callable[..., Graph], size: tuple[int, int], ratio: float,
                                             becomes: tuple[int, int]):
    refiner = None if ratio == 1.0 else "deep"
    full, smaller = (exported(*s, refiner=refiner, downsample_ratio=ratio) for s in (size, becomes))
    for graph in (full, smaller):
        run_to("fold_shapes", graph, "8", clips(1, 1, sizes(graph)["src"][2:]))
    same_function(resized(full, 0.5, larger=True), smaller, 2e-6)


def test_rvm_with_refiner(exported: Callable[..., Graph]):
    full, half = (exported(*size, refiner="deep", downsample_ratio=0.5) for size in ((64, 128), (32, 64)))
    for graph in (full, half):
        run_to("fold_shapes", graph, "8", clips(1, 1, sizes(graph)["src"][2:]))
    same_function(resized(full, 0.5), half, 2e-6)


def test_quantized_at_half_the_size():
    large, small = resized(network(), 2.0), network()
    run_to("calibrate_ranges", small, "4")
    run_to("insert_qdq", large, "4", clips(1, 1, (64, 96)))
    assert assign(large, small, {c.name for c in small.constants() if c.dtype != np.int64}) > 30
    half = resized(large, 0.5)
    assert [n.name for n in half.nodes] == [n.name for n in large.nodes]
    same_function(half, small, 0.0)
    assert len(Shadow(half).quantizers) == len(Shadow(large).quantizers) > 30


STRIDED = """(float[1,3,{0},{1}] src, float[4,3,3,3] w0, float[1,7,1,1] w1, float[4,4,3,3] w2, float[4] wscales)
        => (float[1,1,{0},{1}] pha) {{
    a = Conv <strides = [2,2], pads = [1,1,1,1]> (src, w0)
    b = Conv <strides = [2,2], pads = [1,1,1,1], group = 1> (a, w2)
    c = Resize <mode = "nearest"> (b, , wscales)
    d = Concat <axis = 1> (c, src)
    pha = Conv (d, w1)
}}"""


def strided(height: int, width: int) -> Graph:
    graph = read(STRIDED.format(height, width))
    graph.value("wscales").values = np.array([1, 1, 4, 4], np.float32)
    return graph


def test_sizes_that_do_not_halve_are_refused():
    apart = load("""(float[1,3,9,8] src, float[1,3,4,8] r) => (float[1,3,9,8] pha, float[1,3,4,8] s) {
        pha = Relu (src)  s = Relu (r) }""")
    with pytest.raises(ModelError, match=r"sides of \[4, 9\] cannot be made 0.5 times as large"):
        resized(apart, 0.5, larger=True)           # 4 is neither half of 9 nor rounded up
    with pytest.raises(ModelError, match=r"sides of \[9\] cannot be made 0.5 times as large"):
        resized(at(GRU, 9, 8), 0.5)
    same_function(resized(strided(16, 24), 0.5), strided(8, 12), 0.0)
    with pytest.raises(ModelError):
        resized(strided(8, 12), 0.5)               # the inner sizes, 2 and 3, are odd
    reshaped = load("""(float[1,3,8,8] src) => (float[1,3,8,8] pha) <int64[3] flat = {1, 3, 64},
        int64[4] full = {1, 3, 8, 8}> { a = Reshape (src, flat)  b = Relu (a)  pha = Reshape (b, full) }""")
    with pytest.raises(ModelError):
        resized(reshaped, 0.5)


def test_a_pooled_state_keeps_its_size():
    graph = read("""(float[1,3,8,8] src, float[1,4,1,1] r, float[4,3,3,3] w0, float[1,4,1,1] w1)
                    => (float[1,1,8,8] pha, float[1,4,1,1] s) {
        a = Conv <pads = [1,1,1,1]> (src, w0)
        p = GlobalAveragePool (a)
        s = Add (p, r)
        b = Mul (a, s)
        pha = Conv (b, w1)
    }""")
    assert sizes(resized(graph, 0.5)) == {"src": (1, 3, 4, 4), "r": (1, 4, 1, 1), "pha": (1, 1, 4, 4),
                                          "s": (1, 4, 1, 1)}


def test_halved_as_often_as_allowed(monkeypatch: pytest.MonkeyPatch):
    def height(graph: Graph) -> int:
        return sizes(crop_graph(graph, "src"))["src"][2]

    assert crops.SHORT_SIDE == 128
    assert height(at(GRU, 256, 512)) == 128
    assert height(at(GRU, 254, 512)) == 254
    assert height(at(GRU, 1024, 512)) == 256       # the shorter side counts
    monkeypatch.setattr(crops, "SHORT_SIDE", 8)
    assert height(at(GRU, 32, 40)) == 8
    assert height(at(GRU, 36, 72)) == 9
    assert height(at(GRU, 17, 64)) == 9
    assert height(at(GRU, 14, 64)) == 14           # of 7 the network would see too little
    assert height(strided(64, 32)) == 16
    assert height(strided(48, 48)) == 12           # 12 / 4 is whole, 6 / 4 is not
    monkeypatch.setattr(crops, "SHORT_SIDE", 1)
    assert height(strided(48, 48)) == 12
    assert crop_graph(at(GRU, 9, 9), "src").to_bytes() == at(GRU, 9, 9).to_bytes()


# -- drawing -------------------------------------------------------------------------------------------


def made(frames: np.ndarray, alpha: np.ndarray | None, name: str = "made") -> Clip:
    """A clip of given frames uint8 [T,3,H,W] and mattes [T,H,W]."""
    def reader(pictures: np.ndarray) -> Callable[[int, int | None], Iterator[Frame]]:
        return lambda start, stop: iter(pictures[start:stop])

    height, width = frames.shape[2:]
    return Clip(name, 25.0, (height, width), len(frames), reader(frames), None if alpha is None else reader(alpha))


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Colours as they are."""
    monkeypatch.setattr(crops, "GAIN", 0.0)
    monkeypatch.setattr(crops, "GAMMA", 0.0)


def noise(count: int = 12, height: int = 40, width: int = 56, seed: int = 0) -> Clip:
    """Noise whose alpha is its green channel."""
    frames = np.random.default_rng(seed).integers(0, 256, (count, 3, height, width), np.uint8)
    return made(frames, frames[:, 1])


@pytest.mark.usefixtures("plain")
def test_alpha_is_cut_like_its_frame():
    drawn = Crops([noise(), noise(9, seed=1)], (20, 28), seed=3)
    rescaled = 0
    for number in range(30):
        frames, alpha = drawn.draw(number, 4, alpha=True)
        assert frames.shape == (4, 1, 3, 20, 28)
        assert alpha is not None
        assert alpha.shape == (4, 1, 1, 20, 28)
        assert frames.dtype == alpha.dtype == torch.float32
        assert 0.0 <= float(frames.min()) < float(frames.max()) <= 1.0
        assert torch.equal(alpha, frames[:, :, 1:2])
        rescaled += float(frames.std()) < 0.27     # 0.289 is that of the noise itself
    assert rescaled > 20


def test_colours_change_alike_in_a_sequence_and_alpha_does_not():
    footage = [noise()]
    highest, lowest, middle = [], [], []
    for number in range(40):
        frames, alpha = Crops(footage, (40, 56), seed=1).draw(number, 3, alpha=True)
        assert alpha is not None
        green, truth = frames[:, 0, 1].numpy(), alpha[:, 0, 0].numpy()
        assert np.array_equal(np.sort(np.unique(np.rint(truth * 255))), np.arange(256))
        curve = [np.unique(green[truth == v]) for v in np.unique(truth)]
        assert all(len(c) == 1 for c in curve)     # one value for a value, in every frame
        assert (np.diff(np.concatenate(curve)) >= 0).all()
        assert curve[0] == 0.0
        assert 0.0 <= float(frames.min()) < float(frames.max()) <= 1.0
        ends = [float(frames[:, 0, c].max()) for c in range(3)]
        highest.append(max(ends))
        lowest.append(min(ends))
        middle.append(float(curve[128][0] / curve[255][0]) if curve[255] < 1.0 else 0.5)
    assert 1 - GAIN - 1 / 255 <= min(lowest) < 1 - 0.8 * GAIN
    assert max(highest) == 1.0
    assert any(a != b for a, b in zip(highest, lowest, strict=True))
    dark, bright = 0.5 ** np.exp(GAMMA), 0.5 ** np.exp(-GAMMA)
    assert dark - 0.01 < min(middle) < 0.5 - 0.7 * (0.5 - dark)
    assert bright + 0.01 > max(middle) > 0.5 + 0.7 * (bright - 0.5)


def test_a_number_is_always_the_same_sequence():
    footage = [noise(), noise(seed=1), noise(seed=2)]
    one, other = Crops(footage, (20, 28), seed=5), Crops(footage, (20, 28), seed=5)
    forth = [one.draw(k, 3, alpha=True) for k in range(6)]
    back = [other.draw(k, 3, alpha=True) for k in reversed(range(6))][::-1]
    for a, b in zip(forth, back, strict=True):
        assert torch.equal(a[0], b[0])
        assert a[1] is not None
        assert b[1] is not None
        assert torch.equal(a[1], b[1])
    for k in range(6):
        frames, alpha = one.draw(k, 3)
        assert torch.equal(frames, forth[k][0])
        assert alpha is None                       # it was not asked for
        assert not torch.equal(forth[k][0], Crops(footage, (20, 28), seed=6).draw(k, 3)[0])
        assert all(not torch.equal(forth[k][0], forth[j][0]) for j in range(k))
    assert Crops(footage, (20, 28), 5).draw(1 << 40, 3)[0].shape == (3, 1, 3, 20, 28)


@pytest.mark.usefixtures("plain")
def test_crops_of_the_clips_size_are_its_frames():
    """Perhaps mirrored, perhaps backwards; every start, every clip and both directions come up."""
    footage = [noise(7), noise(5, seed=1)]
    arrays = [np.stack(list(c.frames())).astype(np.float32) / np.float32(255) for c in footage]
    drawn = Crops(footage, (40, 56), seed=0)
    found = []
    for number in range(150):
        frames = drawn.draw(number, 3)[0][:, 0].numpy()
        matches = [(c, start, mirrored, backwards) for c, array in enumerate(arrays)
                   for start in range(len(array) - 2) for mirrored in (False, True) for backwards in (False, True)
                   if np.array_equal(frames[::-1 if backwards else 1, :, :, ::-1 if mirrored else 1],
                                     array[start:start + 3])]
        assert len(matches) == 1
        found += matches
    assert {m[:2] for m in found} == {(0, s) for s in range(5)} | {(1, s) for s in range(3)}
    assert 0.35 < np.mean([m[2] for m in found]) < 0.65
    assert 0.05 < np.mean([m[3] for m in found]) < 0.27
    assert 0.35 < np.mean([m[0] for m in found]) < 0.65


@pytest.mark.usefixtures("plain")
def test_the_scale_is_anything_from_the_crop_to_the_frame():
    """On a ramp the slope says how much a frame was made smaller, and where the cut is."""
    ramp = np.broadcast_to(np.linspace(0, 255, 200).astype(np.uint8), (2, 3, 100, 200))
    drawn = Crops([made(np.ascontiguousarray(ramp), None)], (50, 100), seed=0)
    widths, lefts = [], []
    for number in range(60):
        frames, alpha = drawn.draw(number, 1, alpha=True)
        assert alpha is None
        row = frames[0, 0, 0, 7].numpy()
        slope = abs(float(row[-1] - row[0])) / 99
        widths.append(1.0 / slope)
        lefts.append(float(min(row[0], row[-1])))
    assert 97 < min(widths) < 110
    assert 190 < max(widths) < 205
    assert min(lefts) < 0.03
    assert max(lefts) > 0.3


def test_short_clips_give_what_they_have():
    drawn = Crops([noise(2)], (40, 56), seed=0)
    frames, alpha = drawn.draw(0, 9, alpha=True)
    assert len(frames) == 2
    assert alpha is not None
    assert len(alpha) == 2
    empty = dataclasses.replace(noise(2), length=0)
    drawn = Crops([empty, noise(3), empty], (40, 56), seed=0)
    assert all(len(drawn.draw(k, 5)[0]) == 3 for k in range(12))


def test_footage_with_and_without_alpha():
    bare = dataclasses.replace(noise(), read_alpha=None)
    drawn = Crops([noise(seed=1), bare], (20, 28), seed=0)
    assert {drawn.draw(k, 2, alpha=True)[1] is None for k in range(20)} == {True, False}
    for k in range(4):
        assert torch.equal(Crops([bare], (20, 28), 0).draw(k, 2, alpha=True)[0],
                           Crops([noise()], (20, 28), 0).draw(k, 2, alpha=True)[0])
