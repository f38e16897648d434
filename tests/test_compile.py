"""vmq.compile end to end: what comes out runs, is small, is a drop-in, and is the same every time."""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from compiling import clips, network
from tiny_matting import save_pictures
from tiny_recurrent import read

import vmq
from models import rvm
from vmq.errors import MediaError, ModelError, OptionError, OutputError
from vmq.graph import Graph
from vmq.pipeline import Observer, Pass
from vmq.report import inspect_dump
from vmq.runtime import Session
from vmq.spec import EFFORTS


@pytest.fixture(scope="module")
def footage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small clips on disk."""
    folder = tmp_path_factory.mktemp("footage")
    for clip in clips(2, 4):
        save_pictures(folder / clip.name, clip.frames())
    return folder


@pytest.fixture(scope="module")
def small_rvm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RVM with random weights at 64x96."""
    path = tmp_path_factory.mktemp("rvm") / "rvm.onnx"
    rvm.export(rvm.build("mobilenetv3", seed=1), path, size=(64, 96))
    return path


def test_drop_in_with_the_bits_asked_for(footage: Path, tmp_path: Path):
    graph = network()
    for bits in (8, 4, "w4a8"):
        out = tmp_path / f"{bits}.onnx"
        result = vmq.compile(graph, recipe="mse", bits=bits, calib=[footage], output=out)
        assert result.path == out
        assert Graph.load(out).signature() == graph.signature()
        assert Session(out).step(next(clips()[0].frames()))["pha"].shape == (1, 1, 32, 48)
    assert graph.to_bytes() == network().to_bytes()        # what went in is as it was


def test_same_input_same_bytes(footage: Path):
    first, second = (vmq.compile(network(), recipe="mse", bits=4, calib=[footage], seed=3).graph.to_bytes()
                     for _ in range(2))
    assert first == second
    assert first != vmq.compile(network(), recipe="mse", bits=4, calib=[footage], seed=4).graph.to_bytes()


def test_every_dump_is_valid_and_runs(footage: Path, tmp_path: Path):
    dump = tmp_path / "dump"
    vmq.compile(network(), recipe="mse", bits=4, calib=[footage], dump=dump, output=tmp_path / "out.onnx")
    models = sorted(dump.glob("*.onnx"))
    changed = [m.stem[3:] for m in models]
    assert changed == ["input", "align_channels", "insert_qdq", "calibrate_ranges", "integer_forms", "correct_biases",
                       "quantize_biases", "lower", "move_integers", "slim_down"]
    for path in models:
        onnx.checker.check_model(str(path), full_check=True)
        outputs = Session(path, optimize=False).step(next(clips()[0].frames()))
        assert np.isfinite(outputs["pha"]).all()
    assert models[-1].read_bytes() == (tmp_path / "out.onnx").read_bytes()
    found = inspect_dump(dump)
    said = found.to_json()
    scores = {p["name"]: p["alpha_MAD"] for p in said["passes"]}
    assert scores["calibrate_ranges"] is not None
    assert scores["lower"] == scores["quantize_biases"]
    assert [len(c) for c in said["closures"]] == [11]
    decibels = [t["sqnr_db"] for t in said["tensors"]]
    assert decibels == sorted(decibels)
    assert len(decibels) > 15


@pytest.mark.parametrize("bits", ["8", "w4a8", "4"])
def test_the_default_recipe_learns_at_every_width(bits: str, footage: Path):
    effort = dataclasses.replace(EFFORTS["fast"], sequences=4, frames=2, block_iterations=8)
    learned = vmq.compile(network(), bits=bits, calib=[footage], effort=effort).results["reconstruct_blocks"]
    blocks = learned.report["blocks"]
    before, after = (np.mean([block[key] for block in blocks]) for key in ("error_before", "error_after"))
    assert learned.modified > 10
    assert 0.0 < after < before


def test_inspect_shows_a_planted_fault_and_where_it_begins(footage: Path, tmp_path: Path):
    dump = tmp_path / "dump"
    vmq.compile(network(), recipe="mse", calib=[footage], dump=dump)
    before = {t.name: t.sqnr_db for t in inspect_dump(dump).tensors}
    path, = dump.glob("*_lower.onnx")
    last = Graph.load(path)
    gates = next(n for n in last.value("g").outputs if n.op == "QuantizeLinear")
    gates.inputs[1].values = np.asarray(gates.inputs[1].values * np.float32(64.0))
    last.save(path)
    after = {t.name: t.sqnr_db for t in inspect_dump(dump).tensors}
    assert {"gates", "reset", "update", "kept"} <= {n for n in after if after[n] < before[n] - 15}
    for name in ("a", "d", "joined", "e", "x"):             # what comes before it is as it was
        assert after[name] == before[name]


def test_real_topology_small_and_fully_integer(small_rvm: Path, tmp_path: Path):
    footage = tmp_path / "footage"
    for clip in clips(1, 3, (64, 96)):
        save_pictures(footage / clip.name, clip.frames())
    sizes = {}
    for bits in ("8", "4"):
        out = tmp_path / f"rvm_{bits}.onnx"
        result = vmq.compile(small_rvm, recipe="mse", bits=bits, calib=[footage], output=out)
        sizes[bits] = out.stat().st_size
        assert result.results["find_closures"].report["states"]
        assert len(result.results["find_closures"].report["closures"]) == 4
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / f"optimized_{bits}.onnx")
        options.log_severity_level = 4
        ort.InferenceSession(str(out), options, providers=["CPUExecutionProvider"])
        ops = [n.op_type for n in onnx.load(tmp_path / f"optimized_{bits}.onnx").graph.node]
        assert ops.count("QLinearConv") == 79      # all but the head, and two for the ends of rows (fold_resizes)
    assert sizes["4"] <= 2_400_000
    assert sizes["8"] <= 4_400_000


def test_renamed_model_gives_the_same_numbers(small_rvm: Path, tmp_path: Path):
    footage = tmp_path / "footage"
    for clip in clips(1, 2, (64, 96)):
        save_pictures(footage / clip.name, clip.frames())
    proto = onnx.load(small_rvm)
    kept = {v.name for v in (*proto.graph.input, *proto.graph.output)}
    fresh: dict[str, str] = {}
    for node in proto.graph.node:
        node.name = f"n{len(fresh)}"
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name and name not in kept:
                    names[index] = fresh.setdefault(name, f"z{hash(len(fresh)) * 7919 % 104729}")
    for initializer in proto.graph.initializer:
        initializer.name = fresh.get(initializer.name, initializer.name)
    del proto.graph.value_info[:]
    results = [vmq.compile(m, recipe="mse", bits=4, calib=[footage], seed=0).graph for m in (small_rvm, proto)]
    sessions = [Session(g, optimize=False) for g in results]
    assert [n.op for n in results[0].nodes] == [n.op for n in results[1].nodes]
    for frame in clips(1, 2, (64, 96))[0].frames():
        a, b = (s.alpha_of(s.step(frame)) for s in sessions)
        np.testing.assert_array_equal(a, b)


def test_rvm_as_its_users_have_it(tmp_path: Path):
    """The official form: opset 12, free sizes, first states 1x1x1x1, a ratio input, a refiner."""
    path = tmp_path / "dynamic.onnx"
    rvm.export(rvm.build("mobilenetv3", refiner="deep", seed=1), path, dynamic=True, opset=12)
    footage = tmp_path / "footage"
    for clip in clips(1, 2, (64, 96)):
        save_pictures(footage / clip.name, clip.frames())
    result = vmq.compile(path, recipe="mse", bits="w4a8", calib=[footage], size="96x64", downsample_ratio=0.5)
    assert len(result.results["find_closures"].report["states"]) == 4
    signature = {name: shape for _, name, _, shape in result.graph.signature()}
    assert list(signature)[:6] == ["src", "r1i", "r2i", "r3i", "r4i", "downsample_ratio"]
    assert signature["src"] == (1, 3, 64, 96)
    assert signature["r1i"] == signature["r1o"] == (1, 16, 16, 24)
    alphas = list(Session(result.graph).alphas(clips(1, 2, (64, 96))[0].frames()))
    assert np.isfinite(alphas).all()


def test_without_footage_the_built_in_clips_are_used_and_it_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.import_module("vmq.compiler"), "synthetic_clips", lambda size, **_: clips(1, 2, size))
    result = vmq.compile(network(), recipe="mse")
    assert result.synthetic
    assert "your own footage (--calib) is better" in "\n".join(result.lines())


def test_summary_and_json(footage: Path, tmp_path: Path):
    onnx.save(network().to_proto(), tmp_path / "in.onnx", save_as_external_data=True, location="in.bin",
              size_threshold=0)
    result = vmq.compile(tmp_path / "in.onnx", recipe="mse", bits=4, calib=[footage], output=tmp_path / "out.onnx")
    text = "\n".join(result.lines())
    assert "recurrent states: r -> s" in text
    assert "in closed loop" in text
    assert "calibrated on 8 frames\n" in text
    assert "uint8" in text
    said = json.loads(json.dumps(result.to_json()))
    assert said["size_bytes"] == (tmp_path / "out.onnx").stat().st_size
    assert said["input_bytes"] == sum((tmp_path / name).stat().st_size for name in ("in.onnx", "in.bin"))
    assert said["passes"]["lower"]["modified"] > 0


def test_feed_forward_is_fine(footage: Path):
    graph = read("""(float[1,3,32,48] src, float[4,3,3,3] w0, float[1,4,3,3] w1) => (float[1,1,32,48] pha) {
        a = Conv <pads = [1,1,1,1]> (src, w0)
        b = Relu (a)
        c = Conv <pads = [1,1,1,1]> (b, w1)
        pha = Sigmoid (c)
    }""")
    assert "recurrent states: none found" in "\n".join(vmq.compile(graph, recipe="mse", calib=[footage]).lines())


@pytest.mark.parametrize("shape", [(8, 48, 48), (1, 48, 48), (48,)], ids=str)
def test_a_matmul_whose_constant_is_no_matrix_stays_float(shape: tuple[int, ...], footage: Path):
    """It has no scale per column in integer kernels; what is around it runs in integers."""
    graph = read(f"""(float[1,3,32,48] src, float[8,3,3,3] w0, float{list(shape)} w1, float[1,8,1,1] w2)
                    => (float[1,1,32,48] pha) <int64[1] last = {{3}}> {{
        a = Conv <pads = [1,1,1,1]> (src, w0)
        b = Relu (a)
        c = MatMul (b, w1)
        {"row = Unsqueeze (c, last)" if len(shape) == 1 else "row = Identity (c)"}
        d = Mul (b, row)
        e = Conv (d, w2)
        pha = Sigmoid (e)
    }}""")
    for name in ("w1", "w2"):                              # alpha is to be between 0 and 1, not at its ends
        graph.value(name).values = (graph.value(name).values / 8).astype(np.float32)
    result = vmq.compile(graph, recipe="mse", bits=8, calib=[footage])
    assert "its weight is no matrix on the right; stays float" in "\n".join(result.lines())
    frame = next(clips()[0].frames())
    want, ours = (Session(g).step(frame)["pha"] for g in (graph, result.graph))
    assert want.std() > 0.01
    np.testing.assert_allclose(ours, want, atol=0.05)


class TestBadInput:
    """One clear line, and nothing written."""

    def test_nan_weights(self, footage: Path, tmp_path: Path):
        graph = network()
        graph.value("w4").values = np.full((8, 8, 1, 1), np.nan, np.float32)
        with pytest.raises(ModelError, match=r"weight 'w4'.*holds 64 values that are NaN or infinite"):
            vmq.compile(graph, recipe="mse", calib=[footage], output=tmp_path / "out.onnx")
        assert list(tmp_path.iterdir()) == []

    def test_quantized_already(self, footage: Path):
        once = vmq.compile(network(), recipe="mse", calib=[footage]).graph
        with pytest.raises(ModelError, match=r"quantized already: node .* is .*Linear; give the float model"):
            vmq.compile(once, calib=[footage])

    def test_two_candidates_for_a_state(self, footage: Path):
        graph = read("""(float[1,3,32,48] src, float[1,4,32,48] r, float[4,3,3,3] w0, float[1,4,3,3] w1)
                        => (float[1,1,32,48] pha, float[1,4,32,48] s, float[1,4,32,48] t) {
            a = Conv <pads = [1,1,1,1]> (src, w0)
            s = Add (a, r)
            t = Sub (a, r)
            u = Add (s, t)
            pha = Conv <pads = [1,1,1,1]> (u, w1)
        }""")
        with pytest.raises(ModelError, match="--pair") as caught:
            vmq.compile(graph, calib=[footage])
        assert "\n" not in str(caught.value)
        result = vmq.compile(graph, recipe="mse", calib=[footage], pairs={"r": "s"})
        assert "recurrent states: r -> s" in "\n".join(result.lines())
        assert Session(result.graph).state_pairs[0].output == "s"      # the file remembers

    def test_size_that_a_static_model_does_not_have(self, footage: Path):
        with pytest.raises(OptionError, match="--size 64x32 was asked for, but the model is fixed at 48x32"):
            vmq.compile(network(), calib=[footage], size="64x32")

    def test_size_that_does_not_divide(self, footage: Path):
        graph = read("""(float[1,3,H,W] src, float[4,3,2,2] w0, float[1,7,1,1] w1, float[4] wscales)
                        => (float[1,1,H,W] pha) {
            a = Conv <strides = [2,2]> (src, w0)
            b = Resize <mode = "nearest"> (a, , wscales)
            c = Concat <axis = 1> (b, src)
            pha = Conv (c, w1)
        }""")
        graph.value("wscales").values = np.array([1, 1, 2, 2], np.float32)
        assert vmq.compile(graph, recipe="mse", calib=[footage], size="48x32").size_bytes > 0
        with pytest.raises(ModelError, match=r"does not run at 49x33.*try a size divisible by 32") as caught:
            vmq.compile(graph, calib=[footage], size="49x33")
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(("last", "shape"), [
        ("c = Conv <pads = [1,1,1,1]> (b, w1)  pha = Squeeze (c, axis)", "1,32,48"),
        ("pha = Conv <pads = [1,1,1,1], strides = [2,2]> (b, w1)", "1,1,16,24"),
        ("pha = Conv <pads = [1,1,1,1]> (b, w2)", "1,2,32,48"),
    ], ids=["three axes", "half the size", "two channels"])
    def test_an_alpha_of_another_shape_is_found_before_the_work(self, last: str, shape: str, footage: Path):
        class Passed(Observer):
            def before(self, step: Pass, graph: Graph) -> None:  # noqa: ARG002
                names.append(step.name)

        graph = read(f"""(float[1,3,32,48] src, float[4,3,3,3] w0, float[1,4,3,3] w1, float[2,4,3,3] w2)
                        => (float[{shape}] pha) <int64[1] axis = {{1}}> {{
            a = Conv <pads = [1,1,1,1]> (src, w0)
            b = Relu (a)
            {last}
        }}""")
        names: list[str] = []
        with pytest.raises(ModelError, match=r"no output \[1,1,H,W\] .* its outputs are pha \[") as caught:
            vmq.compile(graph, recipe="mse", calib=[footage], observers=[Passed()])
        assert shape.replace(",", ", ") in str(caught.value)
        assert names[-1] == "bind_shapes"

    def test_outputs_that_cannot_be_written_are_found_before_the_work(self, footage: Path, tmp_path: Path):
        class Started(Observer):
            def started(self, *_: object) -> None:
                raise AssertionError("the work began")

        model = tmp_path / "model.onnx"
        network().save(model)
        for output, says in ((tmp_path / "no" / "out.onnx", "there is no folder"), (tmp_path, "it is a folder"),
                             (model, "it is the model that goes in")):
            with pytest.raises(OutputError, match=says):
                vmq.compile(model, calib=[footage], output=output, observers=[Started()])
        assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]

    def test_one_path_is_a_path(self, footage: Path):
        assert vmq.compile(network(), recipe="mse", calib=str(footage)).results["calibrate_ranges"].report["frames"] > 0

    def test_an_existing_file_survives_a_failed_compile(self, footage: Path, tmp_path: Path):
        out = tmp_path / "out.onnx"
        out.write_bytes(b"precious")
        with pytest.raises(OptionError, match="--keep nonsense"):
            vmq.compile(network(), calib=[footage], output=out, keep={"nonsense": 8})
        assert out.read_bytes() == b"precious"
        assert [p.name for p in tmp_path.iterdir()] == ["out.onnx"]

    def test_options_that_make_no_sense(self, footage: Path):
        for options, says in (({"bits": 3}, "--bits 3 is not known"), ({"recipe": "magic"}, "recipe 'magic'"),
                              ({"target": "toaster"}, "--target toaster"), ({"container": "zip"}, "--container zip"),
                              ({"size": "big"}, "--size big is not WIDTHxHEIGHT"),
                              ({"downsample_ratio": 2.0}, "--downsample-ratio 2.0")):
            with pytest.raises(OptionError, match=says):
                vmq.compile(network(), calib=[footage], **options)  # type: ignore[arg-type]
        with pytest.raises(MediaError):
            vmq.compile(network(), calib=["/nonexistent"])


def test_results_are_frozen(footage: Path):
    result = vmq.compile(network(), recipe="mse", calib=[footage])
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.path = None  # type: ignore[misc]


def test_the_function_is_not_shadowed_by_a_module():
    import vmq.cli
    import vmq.compiler
    assert vmq.compile is vmq.compiler.compile
    assert callable(vmq.compile)


def test_footage_of_another_shape_is_squeezed_and_said(tmp_path: Path):
    for name, size in (("wide", (32, 96)), ("same", (64, 96))):
        save_pictures(tmp_path / name, clips(1, 2, size)[0].frames())
    result = vmq.compile(network(), recipe="mse", calib=[tmp_path / "wide", tmp_path / "same"])
    assert result.squeezed == ("wide",)
    assert "calibration frames of wide have another shape" in "\n".join(result.lines())
