"""Every intermediate result is a file that opens and runs; a failure leaves what it takes to repeat it."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest
from onnx_text import load, run

from vmq.clips import Clip
from vmq.dump import PROBE_FRAMES, Dump
from vmq.errors import MediaError, OutputError, PassError
from vmq.graph import Graph
from vmq.pipeline import Context, Pass, PassResult, run_passes
from vmq.report import inspect_dump
from vmq.spec import Options
from vmq.synthetic import synthetic_clips
from vmq.text import format_graph

SOURCE = "(float[1,2,4,4] x, float[2,2,1,1] w_a) => (float[1,2,4,4] y) { a = Conv (x, w_a)  y = Relu (a) }"


class Append(Pass):
    """Put one more operator before the output."""

    name: ClassVar[str] = "append"

    def __init__(self, op: str) -> None:
        self.op = op

    def run(self, graph: Graph, context: Context) -> PassResult:  # noqa: ARG002
        last = graph.nodes[-1]
        inner = graph.add(last.op, list(last.inputs), "inner", shape=[1, 2, 4, 4])
        last.inputs, last.op = [inner], self.op
        return PassResult(1, notes=("a note",), report={"op": self.op})


class Find(Pass):
    """Find nothing."""

    name: ClassVar[str] = "find"
    changes: ClassVar[bool] = False

    def run(self, graph: Graph, context: Context) -> PassResult:  # noqa: ARG002
        return PassResult(report={"found": []})


class Fail(Pass):
    """Change the graph, then fail."""

    name: ClassVar[str] = "fail"

    def run(self, graph: Graph, context: Context) -> PassResult:  # noqa: ARG002
        graph.nodes[-1].op = "Neg"
        raise KeyError("lost")


def dump(folder: Path, *passes: Pass, clips: list[Clip] | None = None) -> Any:
    run_passes(load(SOURCE), passes, Context(Options(seed=7), clips or []), [Dump(folder, "vmq compile m.onnx")])
    return json.loads((folder / "pipeline.json").read_text())


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_numbered_files(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    pipeline = dump(folder, Append("Abs"), Find(), Append("Neg"))
    assert names(folder) == [
        "00_input.onnx", "00_input.txt", "01_append.diff", "01_append.json", "01_append.onnx", "01_append.txt",
        "02_find.json", "03_append.diff", "03_append.json", "03_append.onnx", "03_append.txt", "pipeline.json"]
    assert set(pipeline["files"]) | {"pipeline.json"} == set(names(folder))
    assert pipeline["finished"] is True
    assert pipeline["command"] == "vmq compile m.onnx"
    assert pipeline["options"]["seed"] == 7
    assert {"vmq", "onnx", "onnxruntime", "numpy", "python", "torch"} <= set(pipeline["versions"])
    assert pipeline["versions"]["model"] == hashlib.sha256((folder / "00_input.onnx").read_bytes()).hexdigest()[:16]
    assert [(p["index"], p["name"], p["modified"], p["model"]) for p in pipeline["passes"]] == [
        (1, "append", 1, "01_append.onnx"), (2, "find", 0, None), (3, "append", 1, "03_append.onnx")]
    assert all(p["seconds"] >= 0 for p in pipeline["passes"])
    report = json.loads((folder / "01_append.json").read_text())
    assert (report["notes"], report["report"], report["name"]) == (["a note"], {"op": "Abs"}, "append")


def test_every_model_opens_and_runs(tmp_path: Path) -> None:
    dump(tmp_path, Append("Abs"), Append("Neg"))
    expected = run(load(SOURCE))["y"]
    for name, sign in (("00_input", 1), ("01_append", 1), ("02_append", -1)):
        model = onnx.load(tmp_path / f"{name}.onnx")
        onnx.checker.check_model(model, full_check=True)
        np.testing.assert_array_equal(run(model)["y"], sign * expected)
        assert (tmp_path / f"{name}.txt").read_text() == format_graph(Graph.load(model))


def test_diffs_say_what_changed(tmp_path: Path) -> None:
    dump(tmp_path, Append("Abs"), Append("Neg"))
    assert (tmp_path / "01_append.diff").read_text() == """\
--- before
+++ after
@@ -4 +4,2 @@
-%y = Relu(%a)
+%inner = Relu(%a)
+%y = Abs(%inner)
"""
    assert "+%y = Neg(%inner_2)" in (tmp_path / "02_append.diff").read_text()


def test_failure_leaves_a_reproducer(tmp_path: Path) -> None:
    with pytest.raises(PassError):
        dump(tmp_path, Append("Abs"), Fail())
    assert {"01_append.onnx", "02_fail.failed.onnx", "02_fail.failed.json"} < set(names(tmp_path))
    assert (tmp_path / "02_fail.failed.onnx").read_bytes() == (tmp_path / "01_append.onnx").read_bytes()
    said = json.loads((tmp_path / "02_fail.failed.json").read_text())
    assert said["pass"] == "fail"
    assert "KeyError" in said["error"]
    assert any("lost" in line for line in said["traceback"])
    assert said["reproduce"] == "vmq compile m.onnx"
    assert said["model_before_the_pass"] == "02_fail.failed.onnx"
    assert said["options"]["seed"] == 7
    assert "onnxruntime" in said["versions"]
    assert json.loads((tmp_path / "pipeline.json").read_text())["finished"] is False


def test_probe_frames(tmp_path: Path) -> None:
    clips = synthetic_clips((32, 48), count=1, frames=PROBE_FRAMES + 3)
    pipeline = dump(tmp_path, Find(), clips=list(clips))
    frames = np.load(tmp_path / "probe.npz")["frames"]
    np.testing.assert_array_equal(frames, np.stack(list(clips[0].frames(0, PROBE_FRAMES))))
    assert pipeline["clips"] == [{"name": clips[0].name, "frames": PROBE_FRAMES + 3}]


def test_a_second_compile_replaces_the_first(tmp_path: Path) -> None:
    dump(tmp_path, Append("Abs"), Append("Neg"), clips=list(synthetic_clips((32, 48), count=1, frames=2)))
    with pytest.raises(PassError):
        dump(tmp_path, Append("Abs"), Fail())
    own = {"notes.md", "01_holiday.jpg", "01_notes.txt", "02_append.onnx"}
    for name in own:
        (tmp_path / name).write_text("mine")        # what the user put beside the dump stays
    dump(tmp_path, Find())
    assert set(names(tmp_path)) == own | {"00_input.onnx", "00_input.txt", "01_find.json", "pipeline.json"}
    assert all((tmp_path / name).read_text() == "mine" for name in own)


def test_what_a_kill_leaves_is_not_in_the_way(tmp_path: Path) -> None:
    (tmp_path / ".pipeline.json.x7y8z9").write_bytes(b"{")
    Dump(tmp_path)


@pytest.mark.parametrize("name", ["pipeline.json", "01_first.json", "probe.npz"])
def test_broken_files_of_a_dump_are_named(name: str, tmp_path: Path) -> None:
    entry = {"index": 1, "name": "first", "modified": 0, "seconds": 0.1, "model": None}
    files = {"pipeline.json": {"finished": True, "passes": [entry], "options": {"pairs": {}}},
             "01_first.json": {"report": {}, "notes": []}}
    whole = {**{n: json.dumps(content).encode() for n, content in files.items()}, "probe.npz": b""}
    with io.BytesIO() as probe:
        np.savez(probe, frames=np.zeros((2, 3, 16, 24), np.uint8))
        whole["probe.npz"] = probe.getvalue()
    for content in (b"[" * 100_000, b"{}", b"[1]", b"null", b"\xff", b"", whole["probe.npz"][:200], None, *(
            [json.dumps(files["pipeline.json"] | {"passes": [entry | {"seconds": "x"}]}).encode()] * (name[0] == "p"))):
        for file, good in whole.items():
            (tmp_path / file).write_bytes(good)
        if content is None:
            os.truncate(tmp_path / name, 64_000_000_000)
        else:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(MediaError, match=name.replace(".", r"\.")):
            inspect_dump(tmp_path)


@pytest.mark.parametrize("foreign", ["holiday.jpg", "00_input.onnx", "pipeline.json"])
@pytest.mark.parametrize("content", ["mine", "[]", "{}", '{"files": 3}'])
def test_foreign_folders_are_refused(tmp_path: Path, foreign: str, content: str) -> None:
    (tmp_path / foreign).write_text(content)
    with pytest.raises(OutputError, match=re.escape(f"{tmp_path} holds files that are no dump; give")) as error:
        Dump(tmp_path)
    assert "\n" not in str(error.value)
    assert names(tmp_path) == [foreign]
    assert (tmp_path / foreign).read_text() == content


@pytest.mark.parametrize("content", ["[1]", "null", '{"finished": true}', '{"finished": true, "passes": []}'])
def test_a_pipeline_file_of_another_kind_is_no_dump(tmp_path: Path, content: str) -> None:
    (tmp_path / "pipeline.json").write_text(content)
    with pytest.raises(MediaError, match=r"is not a dump \(no readable pipeline\.json\)"):
        inspect_dump(tmp_path)


def test_nothing_outside_the_folder_is_deleted(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "dump").mkdir()
    (tmp_path / "dump" / "pipeline.json").write_text(json.dumps({"files": ["../precious", str(tmp_path / "precious")]}))
    Dump(tmp_path / "dump")
    assert (tmp_path / "precious").read_text() == "mine"


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "dump", tmp_path / ("n" * 300)):
        with pytest.raises(OutputError, match="cannot write the dump to") as error:
            Dump(folder)
        assert "\n" not in str(error.value)
        assert "None" not in str(error.value)
