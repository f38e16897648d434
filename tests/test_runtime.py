"""A session carries its state over a clip, finds frame, alpha and foreground by shape, and says what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny_matting as tiny
import tiny_recurrent
from onnx_text import load

from vmq.errors import MediaError, ModelError, OptionError
from vmq.graph import Graph
from vmq.runtime import STATES_KEY, Session, create_session
from vmq.states import StatePair


def session(model: onnx.ModelProto, **options: object) -> Session:
    return Session(model.SerializeToString(), threads=1, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("optimize", [True, False])
def test_state_is_carried_and_reset(optimize: bool) -> None:
    clip, runner = tiny.frames(4), session(tiny.model(), optimize=optimize)
    assert runner.state_pairs == (StatePair("last", "next"),)
    for _ in range(2):  # the second time from zero again
        for found, expected in zip(runner.alphas(clip), tiny.alphas(clip), strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-6)
    without_reset = runner.alpha_of(runner.step(clip[0]))
    assert np.abs(without_reset - tiny.alphas(clip[:1])[0]).max() > 0.1


def test_step_returns_outputs_by_name_and_finds_the_pictures() -> None:
    frame = tiny.frames(1)[0]
    runner = session(tiny.model())
    outputs = runner.step(frame)
    assert {name: value.shape for name, value in outputs.items()} == {
        "fgr": (1, 3, 16, 24), "pha": (1, 1, 16, 24), "next": (1, 1, 16, 24)}
    foreground = runner.foreground_of(outputs)
    assert foreground is not None
    np.testing.assert_allclose(foreground, frame / 510, atol=1e-6)
    bare = session(tiny.model(foreground=False))
    assert bare.foreground_of(bare.step(frame)) is None


def test_states_go_from_frame_to_frame_without_a_copy() -> None:
    """What ONNX Runtime gave is what it is fed: numpy arrays that only point to its memory."""
    runner = session(tiny.model())
    for frame in tiny.frames(3):
        outputs = runner.step(frame)
        assert runner.state["last"] is outputs["next"]
        assert runner.feeds(frame)["last"] is outputs["next"]
        assert not outputs["next"].flags.owndata
        assert outputs["next"].flags.c_contiguous


def test_the_order_of_inputs_and_outputs_does_not_matter() -> None:
    model, clip = tiny.model(ratio=True), tiny.frames()
    for values in (model.graph.input, model.graph.output):
        turned = list(reversed(values))
        del values[:]
        values.extend(turned)
    runner = session(model)
    assert runner.frame_input == "src"
    np.testing.assert_allclose(list(runner.alphas(clip)), tiny.alphas(clip), atol=1e-6)


def test_an_alpha_that_is_fed_back_is_both_state_and_alpha() -> None:
    graph = tiny_recurrent.read(tiny_recurrent.LAST_ALPHA)
    runner = Session(graph, threads=1)
    assert runner.state_pairs == (StatePair("last", "pha"),)
    outputs = runner.step(tiny.frames(1, (8, 8))[0])
    np.testing.assert_array_equal(runner.alpha_of(outputs), np.clip(outputs["pha"][0, 0], 0, 1))
    np.testing.assert_array_equal(runner.state["last"], outputs["pha"])


def test_alpha_is_the_picture_of_the_frames_size() -> None:
    """A coarse matte of one channel that stands before alpha is not taken for it."""
    model = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["": 21]> two (float[1, 3, 16, 24] src)
        => (float[1, 1, 8, 12] coarse, float[1, 1, 16, 24] fine) <int64[1] channels = {1}> {
            fine = ReduceMean <keepdims = 1> (src, channels)
            coarse = AveragePool <kernel_shape = [2, 2], strides = [2, 2]> (fine)
        }""")
    runner = session(model)
    assert runner.state_pairs == ()
    assert runner.alpha_of(runner.step(tiny.frames(1)[0])).shape == (16, 24)


def test_free_sizes_start_from_a_state_of_one_value() -> None:
    runner = session(tiny.model(("h", "w")))
    assert runner.size == (None, None)
    for size in ((16, 24), (8, 10)):
        clip = tiny.frames(size=size)
        np.testing.assert_allclose(list(runner.alphas(clip)), tiny.alphas(clip), atol=1e-6)


def test_downsample_ratio() -> None:
    clip, runner = tiny.frames(), session(tiny.model(ratio=True), downsample_ratio=0.25)
    assert runner.takes_ratio
    np.testing.assert_allclose(list(runner.alphas(clip)), tiny.alphas(clip, 0.25), atol=1e-6)
    runner.downsample_ratio = 0.5
    assert runner.downsample_ratio == 0.5
    np.testing.assert_allclose(list(runner.alphas(clip)), tiny.alphas(clip, 0.5), atol=1e-6)
    assert not session(tiny.model()).takes_ratio


@pytest.mark.parametrize("ratio", [0.0, -1.0, 1.01, float("nan")])
def test_ratio_out_of_range(ratio: float) -> None:
    with pytest.raises(OptionError, match="out of range"):
        session(tiny.model(ratio=True), downsample_ratio=ratio)


def test_half_precision() -> None:
    model, clip = tiny.model(), tiny.frames()
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            half = onnx.numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(onnx.numpy_helper.from_array(half, tensor.name))
    runner = session(model)
    found = list(runner.alphas(clip))
    assert found[0].dtype == np.float32
    assert runner.state["last"].dtype == np.float16
    np.testing.assert_allclose(found, tiny.alphas(clip), atol=2e-3)


def test_states_of_free_size_that_the_first_frame_must_fit() -> None:
    """A state joined with features has to have their size from the first frame on; one that is expanded has not."""
    model = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["": 21]> net (
            float[1, 3, height, width] src, float[1, 2, h, w] r
        ) => (
            float[1, 1, height, width] pha, float[1, 2, h, w] s
        ) <int64[2] parts = {2, 3}, int64[1] channels = {1}, float[4] scales = {1.0, 1.0, 2.0, 2.0}> {
            half = AveragePool <kernel_shape = [2, 2], strides = [2, 2]> (src)
            joined = Concat <axis = 1> (half, r)
            kept, other = Split <axis = 1> (joined, parts)
            s = Add (kept, r)
            mean = ReduceMean (other, channels)
            pha = Resize <mode = "nearest"> (mean, , scales)
        }""")
    runner = session(model)
    for size in ((16, 24), (32, 16)):
        outputs = runner.step(tiny.frames(1, size)[0])
        assert runner.state["r"].shape == (1, 2, size[0] // 2, size[1] // 2)
        assert outputs["pha"].shape == (1, 1, *size)
        runner.reset()


def test_extra_outputs_are_handed_out_and_taken_for_nothing_else() -> None:
    runner = session(tiny.model(), extra=["mean", "pha"])
    outputs = runner.step(tiny.frames(1)[0])
    assert list(outputs) == ["fgr", "pha", "next", "mean"]
    np.testing.assert_array_equal(runner.alpha_of(outputs), np.clip(outputs["pha"][0, 0], 0, 1))


def test_pairs_from_metadata_and_by_hand() -> None:
    graph = Graph.load(tiny.model())
    graph.metadata[STATES_KEY] = json.dumps({"last": "pha"})
    assert Session(graph, threads=1).state_pairs == (StatePair("last", "pha"),)
    assert Session(graph, threads=1, pairs={"last": "next"}).state_pairs == (StatePair("last", "next"),)


@pytest.mark.parametrize("text", ["{", "[1]", "3", "null", '{"last": "gone"}', '{"gone": "next"}',
                                  pytest.param("[" * 100_000, id="deep")])
def test_damaged_metadata(text: str) -> None:
    graph = Graph.load(tiny.model())
    graph.metadata[STATES_KEY] = text
    with pytest.raises(ModelError, match=r"metadata vmq\.states is damaged: (it names|'.*' instead of .*; export)"):
        Session(graph, threads=1)


@pytest.mark.parametrize(("size", "said"), [((30_000, 30_000), "30000x30000, .*more than 16384 pixels a side"),
                                            (("h", 20_000), "20000xany, .*16384 pixels"),
                                            ((8000, 8000), "8000x8000, .*more than 33.6 million pixels")])
def test_a_model_for_huge_frames(size: tuple[object, object], said: str) -> None:
    """Said when it is opened, before anything of that size is made."""
    with pytest.raises(ModelError, match=f"is made for frames of {said}.*export it for a smaller size"):
        session(tiny.model(size))
    session(tiny.model((4320, 7680)))


@pytest.mark.parametrize("shape", [(3, 16, 25), (3, 15, 24), (1, 16, 24), (16, 24)])
def test_frames_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(MediaError, match="takes frames of 24x16"):
        session(tiny.model()).step(np.zeros(shape, np.uint8))


def test_models_that_take_no_frame() -> None:
    with pytest.raises(ModelError, match=r"no input \[1,3,H,W\]"):
        session(onnx.parser.parse_model("""<ir_version: 10, opset_import: ["": 21]> m (float[1, 4] x)
            => (float[1, 4] y) { y = Relu (x) }"""))
    with pytest.raises(ModelError, match=r"no input \[1,3,H,W\] for a frame; its inputs are x \[2, 3, 4, 4\]"):
        session(onnx.parser.parse_model("""<ir_version: 10, opset_import: ["": 21]> m (float[2, 3, 4, 4] x)
            => (float[2, 3, 4, 4] y) { y = Relu (x) }"""))
    with pytest.raises(ModelError, match=r"input other .* is neither frame, state nor downsample ratio"):
        session(onnx.parser.parse_model("""<ir_version: 10, opset_import: ["": 21]> m
            (float[1, 3, 4, 4] x, float[1, 5, 4, 4] other) => (float[1, 8, 4, 4] y)
            { y = Concat <axis = 1> (x, other) }"""))


COUNTER = """<ir_version: 10, opset_import: ["": 21]> m (float[1, 3, 4, 4] x, float[1] count)
    => (float[1, 1, 4, 4] pha, float[1] counted) <float one = {1.0}, int64[1] channels = {1}> {
    mean = ReduceMean (x, channels)  pha = Mul (mean, count)  counted = Add (count, one) }"""


def test_a_single_number_that_may_be_a_state_or_a_ratio() -> None:
    """Taken for the ratio, it would be 1 at every frame without a word."""
    with pytest.raises(ModelError, match=r"input count \[1\] may be a state .*: --pair count=counted, or --pair count= "
                       "for the ratio"):
        session(onnx.parser.parse_model(COUNTER))
    model = onnx.parser.parse_model(COUNTER)
    for pairs, wanted in (({"count": "counted"}, [1, 2, 3]), ({"count": ""}, [2, 2, 2])):
        runner = session(model, pairs=pairs)
        assert runner.takes_ratio == (wanted[0] == 2)
        assert [float(runner.step(f)["counted"][0]) for f in tiny.frames(3, (4, 4))] == wanted
    onnx.helper.set_model_props(model, {"vmq.states": "{}"})
    assert session(model).takes_ratio


def test_a_model_without_alpha() -> None:
    runner = session(onnx.parser.parse_model("""<ir_version: 10, opset_import: ["": 21]> m (float[1, 3, 4, 4] x)
        => (float[1, 3, 4, 4] y) { y = Relu (x) }"""))
    with pytest.raises(ModelError, match=r"no output \[1,1,H,W\] .* its outputs are y"):
        next(runner.alphas(tiny.frames(1, (4, 4))))


def test_a_model_that_runs_at_some_sizes_only(tmp_path: Path) -> None:
    model = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["": 21]> m (float[1, 3, h, w] x)
        => (float[1, 1, a, b] y) <int64[4] shape = {1, 1, 12, 4}> { y = Reshape (x, shape) }""")
    onnx.save(model, tmp_path / "m.onnx")
    runner = Session(tmp_path / "m.onnx", threads=1)
    runner.step(np.zeros((3, 4, 4), np.uint8))
    with pytest.raises(ModelError, match=r"m\.onnx does not run at 5x4: ") as error:
        runner.step(np.zeros((3, 4, 5), np.uint8))
    assert "\n" not in str(error.value)


def test_a_model_that_the_runtime_refuses(capfd: pytest.CaptureFixture[str]) -> None:
    model = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["": 21]> m (double[1, 3, 4, 4] x)
        => (double[1, 1, 4, 4] y) <double[1, 3, 1, 1] w = {1.0, 1.0, 1.0}> { y = Conv (x, w) }""")
    with pytest.raises(ModelError, match="cannot be loaded by ONNX Runtime") as error:
        session(model)
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")  # the runtime's own log stays quiet


@pytest.mark.parametrize(("node", "shape"), [
    ("MaxPool <kernel_shape = [2,2], strides = [2,2]> (read)", "1,2,2,3"), ("ReduceMax (read, axes)", "1,2,1,6"),
    ("ReduceMin (read, axes)", "1,2,1,6")])
def test_integers_of_4_bits_that_the_runtime_has_no_kernel_for(node: str, shape: str) -> None:
    """It moves these operators onto the integers that they read, and then refuses what it has made."""
    graph = load(f"""(float[1,2,4,6] x) => (float[{shape}] y)
            <float scale = {{0.1}}, uint4 zero = {{3}}, int64[1] axes = {{2}}> {{
        steps = QuantizeLinear (x, scale, zero)  read = DequantizeLinear (steps, scale, zero)
        found = {node}
        q = QuantizeLinear (found, scale, zero)  y = DequantizeLinear (q, scale, zero) }}""")
    feeds = {"x": np.random.default_rng(0).uniform(-0.2, 1.2, (1, 2, 4, 6)).astype(np.float32)}
    found = [create_session(graph, optimize=o).run(None, feeds)[0] for o in (False, True)]
    assert np.array_equal(*found)
    assert found[0].std() > 0


def test_negative_threads() -> None:
    with pytest.raises(OptionError, match="--threads -1"):
        Session(tiny.model().SerializeToString(), threads=-1)


def test_rvm_against_the_authors_outputs(shared: Path, tmp_path: Path) -> None:
    """The exported RVM follows the authors' web model over three frames, states carried by the session."""
    from models import rvm

    reference = np.load(shared / "rvm" / "reference_288x512.npz")
    source = reference["src"].reshape(-1, 3, 288, 512)
    state = rvm.load_state(shared / "rvm" / "rvm_mobilenetv3.safetensors")
    rvm.export(rvm.build("mobilenetv3", state), tmp_path / "rvm.onnx", size=(288, 512))
    runner = Session(tmp_path / "rvm.onnx", threads=2)
    for frame, expected in zip(source, reference["pha"].reshape(-1, 288, 512), strict=True):
        error = np.abs(runner.alpha_of(runner.feed(frame[None])) - expected)
        assert error.max() < 1.5e-3
        assert error.mean() < 1.2e-5
