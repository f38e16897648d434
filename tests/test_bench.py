"""Models are timed in turn, classified by what they compute in, and set against what the processor can do."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
import tiny_matting as tiny
from compiling import SIZE, network, optimized_ops, run_to

from vmq import cli
from vmq.bench import (
    INSTRUCTIONS,
    PROBE,
    PROBES,
    Measured,
    Result,
    _child,
    _probe,
    bench,
    instructions,
    kind_of,
    processor,
    to_json,
    to_lines,
)
from vmq.bench_child import Kernel, _Model, _profile
from vmq.cost import Cost
from vmq.errors import ModelError, OptionError
from vmq.graph import Graph

FEEDS = {"src": np.full((1, 3, 16, 24), 0.5, np.float32), "last": np.zeros((1, 1, 16, 24), np.float32)}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tests' network at W8A8, and the float one beside it as float.onnx."""
    folder = tmp_path_factory.mktemp("bench")
    network().save(folder / "float.onnx")
    graph = network()
    run_to("lower", graph)
    graph.save(folder / "w8a8.onnx")
    return folder / "w8a8.onnx"


@pytest.fixture(scope="module")
def measured(quantized: Path) -> Result:
    return bench([str(quantized)], baseline=str(quantized.parent / "float.onnx"), threads=1, runs=3)


def made(times: list[float], adds: int = PROBE, kernels: tuple[Kernel, ...] = ()) -> Measured:
    return Measured(np.array(times), (512, 288), False, kernels, Cost(adds, adds * 64, adds / 4e9), 1000, 2000, None)


def test_speedup_is_the_median_of_the_rounds_ratios() -> None:
    """The ratio of the medians would be 20 / 10 = 2."""
    slow, fast = made([10, 20, 40]), made([10, 5, 10])
    result = Result({"a": slow, "b": fast}, "a", {p: np.ones(3) for p in PROBES}, 1)
    assert result.speedup("a") == 1.0
    assert result.speedup("b") == 4.0


def test_the_roofline_follows_from_the_probes() -> None:
    probes = {"float32": np.array([8.0, 4.0, 8.0]), "int8": np.array([2.0, 1.0, 2.0])}
    result = Result({"m": made([30.0, 15.0, 30.0], adds=3 * PROBE)}, "m", probes, 1)
    assert result.peak("int8") == pytest.approx(PROBE / 2e-3)
    assert result.ideal("m", "float32") == pytest.approx(24.0)
    assert result.ideal("m", "int8") == pytest.approx(6.0)
    assert result.reached("m", "float32") == pytest.approx(0.8)
    assert result.reached("m", "int8") == pytest.approx(0.2)


@pytest.mark.parametrize(("kernel", "kind"), [
    (("QLinearConv", "uint8", "uint8"), "integer"), (("QLinearConcat", "float", "uint8"), "integer"),
    (("MatMulIntegerToFloat", "uint8", "float"), "integer"), (("Transpose", "uint8", "uint8"), "integer"),
    (("Clip", "uint8", "uint8"), "integer"), (("Resize", "float", "float"), "float"),
    (("Cast", "uint8", "float"), "float"), (("Conv", "float16", "float16"), "float"),
    (("QuantizeLinear", "float", "uint8"), "quantize"), (("DequantizeLinear", "uint8", "float"), "quantize"),
    (("Gather", "int64", "int64"), "other"), (("Shape", "float", "int64"), "float")])
def test_kinds_of_kernels(kernel: tuple[str, str, str], kind: str) -> None:
    assert kind_of(Kernel(*kernel, 1.0)) == kind


def test_shares_of_run_time() -> None:
    kernels = (Kernel("QLinearConv", "uint8", "uint8", 6.0), Kernel("Resize", "float", "float", 1.5),
               Kernel("Resize", "float", "float", 0.5), Kernel("Tanh", "float", "float", 1.0),
               Kernel("QuantizeLinear", "float", "uint8", 1.0))
    model = made([10.0], kernels=kernels)
    assert model.share("integer") == 0.6
    assert model.share("quantize") == 0.1
    assert model.float_operators == [("Resize", 0.2, 2), ("Tanh", 0.1, 1)]
    assert model.qdq_nodes == 1


def test_a_quantized_model_beside_its_float_one(measured: Result, quantized: Path, tmp_path: Path) -> None:
    loud, quiet = measured.models.values()
    assert list(measured.models) == [measured.baseline, str(quantized)]
    assert measured.baseline.endswith("float.onnx")
    ops = optimized_ops(Graph.load(quantized), tmp_path / "optimized.onnx")
    assert quiet.qdq_nodes == ops["QuantizeLinear"] + ops["DequantizeLinear"]
    assert len(quiet.kernels) == sum(ops.values())
    assert loud.share("integer") == loud.qdq_nodes == 0
    assert 0.2 < quiet.share("integer") < 1.0
    assert sum(quiet.share(k) for k in ("integer", "quantize", "float", "other")) == pytest.approx(1.0)
    left = {op: count for op, _, count in quiet.float_operators}
    assert left["Conv"] == 1                         # the last layer's result is not quantized
    assert left.keys().isdisjoint({"Tanh", "HardSwish", "HardSigmoid", "Resize"})
    assert loud.cost.bops > 15 * quiet.cost.bops
    assert quiet.size_bytes == quantized.stat().st_size
    assert 0 < quiet.memory_bytes < 1 << 30
    assert quiet.minimum_runtime == "1.20"
    assert loud.minimum_runtime is None
    assert quiet.frame == SIZE[::-1]
    assert (quiet.times > 0).all()
    assert quiet.times.shape == (3,)
    assert not multiprocessing.active_children()


def test_json_and_lines_say_the_same(measured: Result, quantized: Path) -> None:
    said = json.loads(json.dumps(to_json(measured)))
    row = said["models"][str(quantized)]
    assert row["median_ms"] == np.median(measured.models[str(quantized)].times)
    assert row["quartiles_ms"][0] <= row["median_ms"] <= row["quartiles_ms"][1]
    assert row["speedup"] == measured.speedup(str(quantized))
    assert {"size_bytes", "integer_share", "bops", "gflops", "multiply_adds", "memory_bytes"} <= set(row)
    assert said["rounds"] == 3
    assert said["threads"] == 1
    text = "\n".join(to_lines(measured))
    assert f"{row['integer_share']:.1%} in integer kernels" in text
    assert f"Conv {next(o['share'] for o in row['float_operators'] if o['op'] == 'Conv'):.1%} (1)" in text
    assert f"{said['peak']['int8'] / 1e9:.1f} G multiply-adds/s in int8" in text
    assert "1 thread; 3 rounds" in text
    assert "needs      ONNX Runtime 1.20 or newer" in text


def test_the_probe_of_int8_is_faster_and_runs_in_integers(measured: Result, tmp_path: Path) -> None:
    for kind in PROBES:
        onnx.save(_probe(kind), tmp_path / f"{kind}.onnx")
    frame = np.random.default_rng(0).integers(0, 256, (1, 128, 36, 64)).astype(np.uint8)
    kernels = _profile(str(tmp_path / "int8.onnx"), 1, {"x": frame}, {}, 2)
    assert {kind_of(k) for k in kernels} == {"integer"}
    if "avx512_vnni" in instructions() or "asimddp" in instructions():
        assert measured.peak("int8") > measured.peak("float32")


def test_states_go_from_frame_to_frame(tmp_path: Path) -> None:
    model = _Model(tiny.save(tmp_path / "m.onnx"), 1, FEEDS, {"last": "next"})
    for expected in tiny.alphas([np.full((3, 16, 24), 127.5)] * 3):  # type: ignore[list-item]
        assert model.run() > 0
        np.testing.assert_allclose(model._feeds["last"][0, 0], np.broadcast_to(expected, (16, 24)), atol=1e-6)
    assert not FEEDS["last"].any()


def test_free_sizes_are_said(tmp_path: Path) -> None:
    path = tiny.save(tmp_path / "free.onnx", ("h", "w"), ratio=True)
    result = bench([path, path], threads=1, runs=1)
    model, = result.models.values()
    assert (model.frame, model.free) == ((512, 288), True)
    assert any("frame      512x288, as an example" in line for line in to_lines(result))


def fails(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Run `vmq bench` where it must fail; returns its one line."""
    assert cli.main(["bench", *words]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("vmq: error: ")
    assert err.count("\n") == 1
    assert not multiprocessing.active_children()
    return err


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = tiny.save(tmp_path / "good.onnx"), tmp_path / "bad.onnx"
    assert "none.onnx does not exist" in fails(capsys, good, str(tmp_path / "none.onnx"))
    bad.write_bytes(b"no model")
    assert "bad.onnx is not an ONNX model" in fails(capsys, good, "--baseline", str(bad))
    onnx.save(onnx.parser.parse_model("""<ir_version: 10, opset_import: ["": 21]> m (double[1, 3, 4, 4] x)
        => (double[1, 1, 4, 4] y) <double[1, 3, 1, 1] w = {1.0, 1.0, 1.0}> { y = Conv (x, w) }"""), bad)
    assert "bad.onnx cannot be loaded by ONNX Runtime" in fails(capsys, str(bad))
    assert "--runs 0" in fails(capsys, good, "--runs", "0")
    assert "--threads -1" in fails(capsys, good, "--threads", "-1")


def test_what_a_process_says_comes_back_as_an_error(tmp_path: Path) -> None:
    path = tiny.save(tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=r"here cannot be run by ONNX Runtime .*: .*last"), \
            _child("here", path, 1, {"src": FEEDS["src"]}, {"last": "next"}) as ask:
        ask("frame")
    with _child("here", path, 1, FEEDS, {"last": "next"}) as ask:
        assert ask("frame") > 0
        process, = multiprocessing.active_children()
        os.kill(process.pid or 0, 9)
        with pytest.raises(ModelError, match="here: the process that runs it ended, exit code -9"):
            ask("frame")
    assert not multiprocessing.active_children()


def test_the_machine_is_named() -> None:
    assert processor()
    assert set(instructions()) <= set(INSTRUCTIONS)


def test_options(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="--runs -3: give 1 or more"):
        bench([tiny.save(tmp_path / "m.onnx")], runs=-3)
