"""What a dump shows: numbers that can be checked by hand, and a planted fault named first, by report and by blame."""

from __future__ import annotations

import importlib
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest
from compiling import clips, network
from node_packages import browse, chromium
from tiny_matting import save_pictures
from tiny_recurrent import read

import vmq
from vmq.blame import blame, closure_quantizers, masked, tensor_quantizers
from vmq.cli import main
from vmq.compare import MOST, compare_dumps
from vmq.graph import Graph
from vmq.loop_error import measure_loop
from vmq.report import Inspection, inspect_dump
from vmq.report_html import comparison_page, report_page
from vmq.runtime import Session
from vmq.tensors import BINS, measure_tensors


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dump of a W8A8 compile of a small recurrent network."""
    folder = tmp_path_factory.mktemp("report")
    for clip in clips(2, 10):
        save_pictures(folder / "footage" / clip.name, clip.frames())
    vmq.compile(network(), recipe="mse", calib=[folder / "footage"], dump=folder / "dump",
                command="vmq compile <net>.onnx")
    return folder / "dump"


@pytest.fixture(scope="module")
def seen(dump: Path) -> Inspection:
    return inspect_dump(dump, with_blame=True)


@pytest.fixture(scope="module")
def graphs(dump: Path) -> tuple[Graph, Graph, dict[str, list[str]]]:
    """Float graph, compiled graph, closures."""
    parts = json.loads(next(dump.glob("*_find_closures.json")).read_text())["report"]["blocks"]
    return (Graph.load(next(dump.glob("*_align_channels.onnx"))), Graph.load(next(dump.glob("*_lower.onnx"))),
            {b["name"]: b["nodes"] for b in parts})


@pytest.fixture(scope="module")
def faulty_dump(dump: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same dump with one scale, of a gate of the GRU, 8 times too large from one pass on."""
    return planted(dump, tmp_path_factory.mktemp("faulty") / "dump", "g")


def planted(dump: Path, folder: Path, tensor: str, factor: float = 8.0,
            passes: tuple[str, ...] = ("quantize_biases", "lower")) -> Path:
    """A copy of a dump in which the scale of a tensor is too large after some passes, where it is read too."""
    shutil.copytree(dump, folder)
    for path in (path for name in passes for path in folder.glob(f"*_{name}.onnx")):
        graph = Graph.load(path)
        quantizer = next(n for n in graph.value(tensor).outputs if n.op == "QuantizeLinear")
        nodes = (quantizer, *quantizer.outputs[0].outputs)
        for scale in {id(n.inputs[1]): n.inputs[1] for n in nodes}.values():
            scale.values = np.asarray(scale.values * np.float32(factor))
        graph.save(path)
    return folder


@pytest.fixture(scope="module")
def faulty(faulty_dump: Path) -> Inspection:
    return inspect_dump(faulty_dump, with_blame=True)


# ------------------------------------------------------------------------------------------------- the fault


def test_a_planted_fault_is_named_first(faulty: Inspection, graphs: tuple[Graph, Graph, dict[str, list[str]]]) -> None:
    first = faulty.findings[0]
    assert (first.about, first.name) == ("tensor", "g")
    assert "Pass quantize_biases made its range 8 times as wide" in first.says
    assert first.says in faulty.lines()[0]
    row = next(t for t in faulty.tensors if t.name == "g")
    maker = graphs[0].value("g").inputs[0].name
    assert row.closure == next(name for name, nodes in graphs[2].items() if maker in nodes)
    assert row.misfit_db == pytest.approx(18.06, abs=1.5)          # 20 log10 8: the noise of steps 8 times as large
    assert row.misfit_db == max(t.misfit_db for t in faulty.tensors if t.misfit_db is not None)
    assert any(f.about == "pass" and f.name == "quantize_biases" for f in faulty.findings)


def test_a_fault_is_named_whose_integers_are_read_with_another_scale(dump: Path, tmp_path: Path) -> None:
    """The candidate of the GRU, which a Tanh reads: as a Sigmoid, with twice the scale."""
    found = inspect_dump(planted(dump, tmp_path / "dump", "n"))
    first = found.findings[0]
    assert (first.about, first.name) == ("tensor", "n")
    assert "Pass quantize_biases made its range 8 times as wide" in first.says


def test_a_grid_that_a_pass_moved_comes_before_one_that_was_never_right(dump: Path, tmp_path: Path) -> None:
    calibrated = [path.stem.partition("_")[2] for path in sorted(dump.glob("*.onnx"))]
    calibrated = calibrated[calibrated.index("calibrate_ranges"):]
    never = planted(dump, tmp_path / "never", "b", 64.0, tuple(calibrated))
    found = inspect_dump(never).findings[0]
    assert (found.name, "Pass" in found.says) == ("b", False)
    both = inspect_dump(planted(never, tmp_path / "both", "g"))
    misfits = {t.name: t.misfit_db for t in both.tensors}
    assert misfits["b"] > misfits["g"]
    assert [f.name for f in both.findings[:2]] == ["g", "b"]


def test_blame_names_the_planted_fault_first(faulty: Inspection) -> None:
    block = next(b for b in faulty.blocks if b.name == faulty.blame[0].name)
    assert block.states == ["r"]
    assert faulty.tensor_blame[0].name == "g"
    assert faulty.tensor_blame == sorted(faulty.tensor_blame, key=lambda b: (-b.gain, b.name))
    assert any(f.about == "closure" and f.name == block.name and " g " in f.says for f in faulty.findings)


@pytest.mark.slow
def test_a_planted_fault_in_rvm_is_named_first(shared: Path, tmp_path: Path) -> None:
    """W4A4, on the built-in clips: what the candidate of the first state's GRU is computed from."""
    from models import rvm

    state = rvm.load_state(shared / "rvm" / "rvm_mobilenetv3.safetensors")
    rvm.export(rvm.build("mobilenetv3", state), tmp_path / "rvm.onnx", size=(144, 256))
    vmq.compile(tmp_path / "rvm.onnx", bits="4", effort="fast", dump=tmp_path / "dump")
    names_the_gate_first(tmp_path / "dump")


def names_the_gate_first(dump: Path) -> None:
    """What the gate reads, 8 times too coarse, is named first by inspect and in both tables of blame."""
    exact = Graph.load(next(dump.glob("*_fold_resizes.onnx")))
    gate = [n for n in exact.nodes if n.op == "Tanh"][-1].inputs[0].inputs[0]
    for path in (*dump.glob("*_quantize_biases.onnx"), *dump.glob("*_lower.onnx")):
        graph = Graph.load(path)
        scale = next(n for n in graph.nodes if n.name == gate.name).inputs[0].inputs[0].inputs[1]
        assert len(scale.outputs) > 1
        scale.values = np.asarray(scale.values * np.float32(8.0))
        graph.save(path)
    found = inspect_dump(dump, with_blame=True)
    first = found.findings[0]
    assert (first.about, first.name) == ("tensor", gate.inputs[0].name)
    assert "Pass quantize_biases made its range 8 times as wide" in first.says
    assert next(iter(found.refit)) == gate.inputs[0].name
    assert next(b for b in found.blocks if b.name == found.blame[0].name).states == ["r1i"]
    print(*found.lines(0), sep="\n")


def test_blame_says_what_a_fitting_grid_brings(faulty: Inspection, seen: Inspection, faulty_dump: Path,
                                               graphs: tuple[Graph, Graph, dict[str, list[str]]]) -> None:
    assert next(iter(faulty.refit)) == "g"
    row = next(t for t in faulty.tensors if t.name == "g")
    assert row.fit == pytest.approx(1 / 8, rel=0.25)
    frames = faulty.frames[:8]
    want = alphas(graphs[0], frames)
    found = Graph.load(next(faulty_dump.glob("*_lower.onnx")))
    mended = found.copy()
    for node in (n for n in mended.value("g").outputs if n.op == "QuantizeLinear"):
        for scale in {id(n.inputs[1]): n.inputs[1] for n in (node, *node.outputs[0].outputs)}.values():
            scale.values = np.asarray(scale.values * np.float32(row.fit))
    errors = [1e3 * float(np.abs(alphas(g, frames) - want).mean()) for g in (found, mended)]
    assert faulty.whole == pytest.approx(errors[0], rel=1e-6)
    assert faulty.refit["g"] == pytest.approx(errors[0] - errors[1], rel=1e-6)
    assert faulty.refit["g"] > 0.5 * (faulty.whole - seen.whole) > 0
    assert f"alpha MAD is {errors[1]:.2f} instead of {errors[0]:.2f}" in faulty.findings[0].says
    assert any(line.endswith(" g") for line in faulty.lines())
    assert "Grids that do not fit" in report_page(faulty)
    assert seen.refit == {}
    assert "Grids that do not fit" not in report_page(seen)


def alphas(graph: Graph, frames: np.ndarray) -> np.ndarray:
    return np.stack(list(Session(graph).alphas(frames)))


def test_gains_are_of_the_graph_that_they_were_measured_on(faulty: Inspection) -> None:
    """That is not the last one, which here has no fault."""
    scores = {p["name"]: p["alpha_MAD"] for p in faulty.passes if p["alpha_MAD"] is not None}
    assert list(scores)[-1] != "lower"
    assert faulty.whole == pytest.approx(scores["lower"], rel=1e-6)
    gain = faulty.blame[0].gain
    assert any(f"falls from {scores['lower']:.2f} to {scores['lower'] - gain:.2f}." in f.says for f in faulty.findings)


def test_nothing_is_unfit_without_a_fault(seen: Inspection) -> None:
    assert not [f for f in seen.findings if "does not fit" in f.says or f.about == "pass"]
    assert max(t.misfit_db for t in seen.tensors if t.misfit_db is not None) < 12.0


# -------------------------------------------------------------------------------------------------- masking


def test_masking_everything_gives_the_float_model_and_nothing_the_compiled_one(
        graphs: tuple[Graph, Graph, dict[str, list[str]]]) -> None:
    exact, ours, closures = graphs
    everything = set().union(*closure_quantizers(ours, closures).values())
    assert everything == {n.name for n in ours.nodes if n.op == "DequantizeLinear"}
    before = ours.to_bytes()
    for floats, same, least in ((everything, exact, 1e-6), (set[str](), ours, 0.0)):     # forms add up once more
        one, two = (Session(g, optimize=False, pairs={"r": "s"}) for g in (masked(ours, exact, floats), same))
        for frame in clips(1, 4)[0].frames():
            a, b = one.step(frame), two.step(frame)
            for name in ("pha", "fgr", "s"):
                np.testing.assert_allclose(a[name], b[name], rtol=0.0, atol=least)
    assert ours.to_bytes() == before


def test_the_quantizers_of_a_closure_fall_apart_into_those_of_its_tensors(
        graphs: tuple[Graph, Graph, dict[str, list[str]]]) -> None:
    exact, ours, closures = graphs
    for name, nodes in closure_quantizers(ours, closures).items():
        units = tensor_quantizers(ours, exact, closures, name)
        assert sorted(n for unit in units.values() for n in unit) == sorted(nodes)
        assert set(units) <= {v.name for v in exact.values()}


def test_tensors_on_one_grid_are_blamed_together(graphs: tuple[Graph, Graph, dict[str, list[str]]]) -> None:
    """What a Split hands on is rounded again behind it: to bypass one quantizer alone changes nothing."""
    exact, ours, closures = graphs
    name = next(name for name, nodes in closures.items() if exact.value("gates").inputs[0].name in nodes)
    units = tensor_quantizers(ours, exact, closures, name)
    assert "gates" in units
    assert not {"reset", "update"} & set(units)
    _, (found,) = blame(ours, exact, {"gates": units["gates"]}, np.stack(list(clips(1, 3)[0].frames())))
    assert found.gain != 0.0


def test_cost_and_gain_are_what_masks_give(graphs: tuple[Graph, Graph, dict[str, list[str]]]) -> None:
    exact, ours, closures = graphs
    frames = np.stack(list(clips(1, 3)[0].frames()))
    units = closure_quantizers(ours, closures)
    name = list(units)[1]
    whole, (found,) = blame(ours, exact, {name: units[name]}, frames)
    everything = {n.name for n in ours.nodes if n.op == "DequantizeLinear"}

    def error(graph: Graph) -> float:
        a, b = (np.stack(list(Session(g, pairs={"r": "s"}).alphas(frames))) for g in (graph, exact))
        return float(np.abs(a - b).mean()) * 1e3

    assert found.cost == pytest.approx(error(masked(ours, exact, everything - units[name])), rel=1e-6)
    assert whole == pytest.approx(error(ours), rel=1e-6)
    assert found.gain == pytest.approx(error(ours) - error(masked(ours, exact, units[name])), rel=1e-6)
    assert found.cost > 0.0


# -------------------------------------------------------------------------------------------------- tensors

PLAIN = """(float[1,3,8,8] src, float[1,3,1,1] wc) => (float[1,1,8,8] pha) {
    y = Mul (src, wc)
    pha = ReduceMax <keepdims = 1> (y, waxis)
}"""


def test_numbers_of_a_tensor_by_hand() -> None:
    exact = read(PLAIN.replace("float[1,3,1,1] wc", "float[1,3,1,1] wc, int64[1] waxis"))
    exact.value("waxis").values = np.array([1])
    exact.value("wc").values = np.ones((1, 3, 1, 1), np.float32)
    exact.infer_shapes()
    ours = exact.copy()
    y, pha = ours.value("y"), ours.nodes[-1]
    scale, zero = ours.constant("scale", np.array(0.05, np.float32)), ours.constant("zero", np.array(0, np.uint8))
    integers = ours.add("QuantizeLinear", [y, scale, zero], "y_q", {}, y.shape, np.uint8)
    pha.inputs[0] = ours.add("DequantizeLinear", [integers, scale, zero], "y_dq", {}, y.shape)
    ours.sort()
    frames = np.zeros((2, 3, 8, 8), np.uint8)
    frames[1] = np.arange(192, dtype=np.uint8).reshape(3, 8, 8)
    row = next(t for t in measure_tensors(exact, ours, {}, frames) if t.name == "y")
    values = frames.astype(np.float32) / 255.0
    rounded = np.rint(values / np.float32(0.05)) * np.float32(0.05)
    expected = 10 * np.log10((values.astype(float) ** 2).sum() / ((values - rounded).astype(float) ** 2).sum())
    assert row.sqnr_db == pytest.approx(expected, abs=0.01)
    assert row.own_db == pytest.approx(expected, abs=0.01)
    assert (row.bits, row.levels, row.used) == (8, 256, len(np.unique(np.rint(values / np.float32(0.05)))))
    assert (row.low, row.high) == (0.0, pytest.approx(12.75))
    assert row.clipped == 0.0
    assert row.misfit_db is not None
    assert row.misfit_db > 15.0                                  # steps of 0.05 where 1/255 would do
    assert len(row.histogram) == BINS
    assert sum(row.histogram) == pytest.approx(1.0, abs=0.01)
    assert not any(row.histogram[:BINS // 6])                    # nothing below 0


def test_rows_of_weights(seen: Inspection) -> None:
    weights = {t.name: t for t in seen.tensors if t.kind == "weight"}
    assert {"w0_aligned", "w1", "w2", "w3", "w4", "w6", "w7", "w8"} <= set(weights)
    for row in weights.values():
        assert row.flips == 0.0                                  # nothing is learned
        assert row.own_db is not None
        assert row.own_db > 30.0


def test_every_quantized_tensor_has_its_closure(seen: Inspection) -> None:
    names = {b.name for b in seen.blocks}
    assert all(t.closure in names for t in seen.tensors if t.bits is not None)
    assert {t.name for t in seen.tensors if t.bits is not None} >= {
        "src", "r", "g", "s", "a", "w0_aligned", "n", "new", "gate", "f3"}


def test_results_of_functions_have_the_grids_that_these_fix(seen: Inspection) -> None:
    rows = {t.name: t for t in seen.tensors}
    for name, low, high in (("new", -1.0, 127 / 128), ("gate", 0.0, 255 / 256)):        # Tanh, HardSigmoid
        row = rows[name]
        assert (row.bits, row.low, row.high, row.misfit_db) == (8, low, high, None)
        assert row.closure == rows["n" if name == "new" else "f3"].closure
        assert row.own_db is not None
        assert 20.0 < row.own_db < 60.0
        assert low <= row.smallest < row.largest <= 1.0


# ------------------------------------------------------------------------------------------------ closures

RESIZED = """(float[1,3,32,48] src, float[4,3,3,3] w0, float[4,7,3,3] w1, float[1,4,3,3] w2)
    => (float[1,1,32,48] pha) {
    factors = Constant <value_floats = [1.0, 1.0, 2.0, 2.0]> ()
    a = Conv <pads = [1,1,1,1], strides = [2,2]> (src, w0)
    b = Resize <mode = "linear"> (a, , factors)
    c = Concat <axis = 1> (b, src)
    d = Conv <pads = [1,1,1,1]> (c, w1)
    e = Relu (d)
    f = Conv <pads = [1,1,1,1]> (e, w2)
    pha = Sigmoid (f)
}"""


def test_closures_hold_what_folding_a_resize_made(tmp_path: Path) -> None:
    graph = read(RESIZED)
    for node in graph.nodes:
        node.name = f"/net/part_{node.outputs[0].name}/{node.op}"
    vmq.compile(graph, recipe="mse", effort="fast", dump=tmp_path)
    folded = Graph.load(next(tmp_path.glob("*_fold_resizes.onnx")))
    assert sum(n.op == "Conv" for n in folded.nodes) == 5                 # the ends of rows have their own
    found = inspect_dump(tmp_path)
    assert sorted(n for b in found.blocks for n in b.nodes) == sorted(n.name for n in folded.nodes)
    assert [b.reads for b in found.blocks] == [[], *([b.name] for b in found.blocks[:-1])]
    assert [n for b in found.blocks for n in b.layers] == [f"/net/part_{x}/Conv" for x in "adf"]
    assert found.blocks[0].label == "part_a"


# ------------------------------------------------------------------------------------------------ over time


def test_exact_states_leave_the_open_loop(graphs: tuple[Graph, Graph, dict[str, list[str]]]) -> None:
    exact, ours, _ = graphs
    frames = np.stack(list(clips(1, 6)[0].frames()))
    found = measure_loop(exact, ours, frames)
    assert found.states == {"r": found.open}                     # of one state, alone is all
    assert found.closed[0] == found.open[0]                      # both begin with zeros
    assert found.closed[1:] != found.open[1:]
    assert found.through == {"r": pytest.approx(1 - np.mean(found.open) / np.mean(found.closed))}
    assert found.closed[3] == pytest.approx(float(np.abs(found.ours[3] - found.exact[3]).mean()) * 1e3, rel=1e-4)
    same = measure_loop(exact, exact, frames)
    assert same.closed == same.open == [0.0] * 6
    assert same.through == {"r": 0.0}


# --------------------------------------------------------------------------------------------- side by side


def test_two_dumps_of_one_compile_and_a_fault(dump: Path, faulty_dump: Path) -> None:
    found = compare_dumps(dump, faulty_dump)
    assert found.settings == {}
    assert found.same_clip
    assert {c.name for c in found.worse} >= {"g", "gates", "reset", "update"}
    assert all(c.gain == 0.0 for c in found.tensors if c.name in {"a", "d", "e", "x", "w0"})     # before the fault
    assert found.worse == sorted(found.worse, key=lambda c: c.gain)
    assert len(found.worse) <= MOST
    scores = {name: (a, b) for name, a, b in found.passes}
    assert scores["calibrate_ranges"][0] == scores["calibrate_ranges"][1]
    assert scores["lower"][0] < scores["lower"][1]
    assert found.alpha[0] < found.alpha[1]
    assert found.verdict.name == str(dump)
    assert str(dump) in found.lines()[0]


def renamed() -> Graph:
    """The network with other names for everything but its inputs and outputs."""
    graph = network()
    kept = {v.name for v in (*graph.inputs, *graph.outputs)}
    for number, node in enumerate(graph.nodes):
        node.name = f"node{number}"
    for number, value in enumerate(list(graph.values())):
        if value.name not in kept:
            value.name = f"value{number}"
    return graph


def test_a_renamed_model_with_other_bits(dump: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vmq.compile(renamed(), bits="w4a8", recipe="mse", effort="fast", calib=[dump.parent / "footage"],
                dump=tmp_path / "b")
    assert json.loads((tmp_path / "b" / "pipeline.json").read_text())["command"].startswith(
        f"vmq compile {tmp_path / 'b' / '00_input.onnx'} --bits=w4a8 --recipe=mse --calib ")
    page = tmp_path / "page.html"
    assert main(["inspect", str(dump), str(tmp_path / "b"), "--json", "-q", "--html", str(page)]) == 0
    said = json.loads(capsys.readouterr().out)
    assert {"bits": ["W8A8", "W4A8"], "effort": ["standard", "fast"]}.items() <= said["settings"].items()
    names = {c["name"] for c in said["worse"]}
    assert names & {"w1", "w2", "w3", "w4", "w6", "w7"}            # 4-bit weights, called as in the first
    assert said["alpha_MAD"][0] < said["alpha_MAD"][1]
    assert {p["name"] for p in said["passes"]} >= {"calibrate_ranges", "lower"}
    found = Page(page.read_text(encoding="utf-8"))
    assert {"settings", "pipeline", "time", "better", "worse", "tensors"} <= set(found.ids)
    assert json.loads(page.read_text().partition('id="data">')[2].partition("</script>")[0]) == said
    rows = page.read_text().partition('id="pipeline"')[2].partition("</table>")[0]
    assert [p["name"] for p in said["passes"] if f">{p['name']}</th>" in rows] == [
        p["name"] for p in said["passes"] if p["alpha_MAD"] != [None, None]]


def test_what_cannot_be_compared(dump: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(dump), str(tmp_path), "-q"]) == 2
    assert f"{tmp_path} is not a dump" in capsys.readouterr().err
    assert main(["inspect", str(dump), str(dump), "--blame", "-q"]) == 2
    assert "--blame looks into one dump" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------- page


class Page(HTMLParser):
    """Collects what a page is made of; complains about tags that do not close."""

    VOID = frozenset({"meta", "link", "img", "br", "input", "path", "circle"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.ids: list[str] = []
        self.text: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.ids += [v for k, v in attrs if k == "id" and v]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.text.setdefault(self.open[-1], []).append(data)


@pytest.fixture(scope="module")
def page(seen: Inspection) -> str:
    return report_page(seen)


def test_the_page_is_whole_and_needs_nothing(page: str) -> None:
    found = Page(page)
    assert len(found.ids) == len(set(found.ids))
    assert {"answer", "pictures", "pipeline", "closures", "time", "tensors", "wider", "reproduce"} <= set(found.ids)
    for tag, attrs in found.tags:
        source = attrs.get("src") or (attrs.get("href") if tag == "link" else None) or "data:"
        assert source.startswith("data:"), (tag, attrs)
        if tag == "a":
            assert str(attrs["href"])[1:] in found.ids
        if tag == "img":
            assert attrs["alt"]
    assert "http" not in page.replace("http-equiv", "")
    assert "@import" not in page
    assert "url(" not in page
    assert page.count("<h1") == 1
    assert "&lt;net&gt;.onnx" in page                            # what users typed is text, not markup


def test_the_page_says_what_json_says(page: str, seen: Inspection) -> None:
    data = json.loads(page.partition('<script type="application/json" id="data">')[2].partition("</script>")[0])
    assert data == json.loads(json.dumps(seen.to_json()))
    for entry in seen.passes:
        assert f">{entry['name']}</th>" in page
        if entry["alpha_MAD"] is not None:
            assert f'<td class="n">{entry["alpha_MAD"]:.3f}</td>' in page
    rows = page.partition('id="tensor-table"')[2].partition("</table>")[0]
    assert rows.count("<tr data-text") == len(seen.tensors)
    for tensor in seen.tensors[:10]:
        assert f'data-v="{tensor.sqnr_db:.6g}">{tensor.sqnr_db:.1f}<' in rows
    for closure in seen.blame:
        assert f'data-v="{closure.cost:.6g}">{closure.cost:.3f}<' in page
        assert f'data-v="{closure.gain:.6g}">{closure.gain:.3f}<' in page
    assert page.index(seen.findings[0].says.split("`")[0][:40]) < page.index("<nav")    # the answer comes first


def test_the_command_writes_page_and_json(dump: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(dump), "-q", "--json", "--html", str(tmp_path / "page.html")]) == 0
    said = json.loads(capsys.readouterr().out)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert json.loads(page.partition('id="data">')[2].partition("</script>")[0]) == said
    assert said["blame"] == []
    assert main(["inspect", str(dump), "-q", "--html", str(tmp_path / "no" / "page.html")]) == 2
    assert "there is no folder" in capsys.readouterr().err


@pytest.fixture(scope="module")
def comparison(dump: Path, faulty_dump: Path) -> str:
    return comparison_page(compare_dumps(dump, faulty_dump))


@pytest.mark.parametrize("kind", ["page", "comparison"])
def test_a_browser_shows_it_at_any_width_and_by_keyboard(kind: str, request: pytest.FixtureRequest,
                                                         tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(request.getfixturevalue(kind), encoding="utf-8")
    found = browse((tmp_path / "page.html").as_uri(), tmp_path, "report", 1280, 390)
    assert found["complaints"] == []
    assert found["foreign"] == []
    for width in ("1280", "390"):
        here = found[width]
        assert here["wide"] <= here["window"] == int(width)
        assert [s["number"] for s in here["stops"]] == here["controls"]     # all, in the order of the page
        assert set(here["scrolling"]) <= set(here["controls"])
        assert [s["name"] for s in here["stops"] if not s["marked"] or not s["seen"]] == []
        assert not here["moved"]
        scrolling = {s["name"] for s in here["stops"] if s["number"] in here["scrolling"]}
        assert not scrolling & {"Passes", "Values", "Tensors of the worst closure"}      # these fit, on a phone too
    opened = [s["opened"] for width in ("1280", "390") for s in found[width]["stops"] if s["tag"] == "SUMMARY"]
    assert set(opened) == ({"Enter", "Space"} if kind == "page" else set())


def test_a_report_does_what_its_keys_say(page: str, seen: Inspection, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    found = browse((tmp_path / "page.html").as_uri(), tmp_path, "keys", 390, "w0_aligned")
    names = [t.name for t in seen.tensors]
    assert found["skipped"] == "#pictures"
    assert sorted(found["up"]) == sorted(names)
    assert found["up"] == found["down"][::-1] != names
    assert found["named"] == ["w0_aligned"]
    kinds = {t.name: t.kind for t in seen.tensors}
    assert found["kind"] == "activation"
    assert found["left"] == [n for n in found["down"] if kinds[n] == "activation"]
    assert found["shown"] == f"{len(found['left'])} of {len(names)} shown"
    assert found["complaints"] == []
    assert found["foreign"] == []


# -------------------------------------------------------------------------------------------------- its pictures

SMALL = """<!DOCTYPE html><style>body { margin: 0; background: rgb(0, 0, 200) }
p { margin: 0; height: 100vh; box-sizing: border-box; border: 4px solid rgb(0, 95, 0) }
@media (max-width: 390px) { p { background: rgb(200, 0, 0) } }</style><p></p><p></p>"""


@pytest.fixture
def screenshots(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    chromium()
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1] / "tools")
    return importlib.import_module("screenshots")


def test_screenshots_are_of_their_widths(screenshots: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(SMALL)
    assert screenshots.main([str(tmp_path / "page.html"), str(tmp_path)]) == 0
    for width, height, inside in ((1280, screenshots.SHOWN[1280], (0, 0, 200)),
                                  (390, screenshots.SHOWN[390], (200, 0, 0))):
        picture = cv2.imread(str(tmp_path / f"report-{width}.png"))[..., ::-1]
        assert picture.shape == (height, width, 3)
        assert (picture[4:-4, 4:-4] == inside).all()
        for edge in (picture[:4], picture[-4:], picture[:, :4], picture[:, -4:]):
            assert (edge == (0, 95, 0)).all()


def test_screenshots_of_a_dump(screenshots: ModuleType, dump: Path, page: str, seen: Inspection, tmp_path: Path,
                               monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    assert screenshots.main([str(tmp_path / "page.html"), str(tmp_path)]) == 0
    first = [(tmp_path / f"report-{width}.png").read_bytes() for width in (1280, 390)]
    monkeypatch.setattr(screenshots, "inspect_dump", lambda folder, *, with_blame: {(dump, True): seen}[
        folder, with_blame])
    assert screenshots.main([str(dump), str(tmp_path)]) == 0
    assert [(tmp_path / f"report-{width}.png").read_bytes() for width in (1280, 390)] == first
    assert screenshots.main([str(tmp_path / "none.html"), str(tmp_path)]) == 2
    assert "none.html is not there; give a dump" in capsys.readouterr().err
    assert screenshots.main([str(tmp_path / "page.html"), str(tmp_path / "none")]) == 2
    assert "there is no folder" in capsys.readouterr().err
