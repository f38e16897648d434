"""Models that are told whom to follow by the first frame's alpha. This one sees nobody when told nobody."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from compiling import SIZE, clips, run_to
from tiny_matting import save_pictures
from tiny_recurrent import read

import vmq
from vmq.cli import main
from vmq.errors import MediaError, ModelError
from vmq.graph import Graph
from vmq.recipe import Recipe
from vmq.report import inspect_dump
from vmq.runtime import FIRST_ALPHA_KEY, Session
from vmq.shadow import Shadow
from vmq.spec import EFFORTS

NETWORK = """(float[1,3,32,48] src, float[1,1,32,48] last, float[8,4,3,3] w0, float[8] w0b, float[1,8,3,3] w1)
           => (float[1,1,32,48] pha) {
    both = Concat <axis = 1> (src, last)
    a = Conv <pads = [1,1,1,1]> (both, w0, w0b)
    b = Relu (a)
    c = Conv <pads = [1,1,1,1]> (b, w1)
    likely = Sigmoid (c)
    near = MaxPool <kernel_shape = [3,3], pads = [1,1,1,1]> (last)
    pha = Mul (near, likely)
}"""


def network() -> Graph:
    """A network that follows what its last alpha is near to, and names that for the first frame's."""
    graph = read(NETWORK)
    graph.metadata |= {"vmq.states": json.dumps({"last": "pha"}), FIRST_ALPHA_KEY: "last"}
    return graph


@pytest.fixture(scope="module")
def footage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips with alpha, as com/ and pha/."""
    folder = tmp_path_factory.mktemp("footage")
    for clip in clips():
        save_pictures(folder / clip.name / "com", clip.frames())
        save_pictures(folder / clip.name / "pha", clip.alpha() or ())
    return folder


def test_session_begins_with_it() -> None:
    clip, session = clips()[0], Session(network(), optimize=False)
    assert session.first_alpha_input == "last"
    first = clip.first_alpha()
    assert first is not None
    assert np.max([a.max() for a in session.alphas(clip.frames())]) == 0.0
    told = list(session.alphas(clip.frames(), first))
    assert min(a.max() for a in told) > 0.1
    session.reset()
    assert session.state["last"].max() == 0.0
    session = Session(network(), optimize=False, first_alpha=first)
    np.testing.assert_array_equal(session.state["last"][0, 0], first.astype(np.float32) / np.float32(255))
    np.testing.assert_array_equal(list(session.alphas(clip.frames())), told)


def test_free_sizes() -> None:
    graph = read(NETWORK.replace("32,48", "height,width"))
    graph.metadata |= network().metadata
    for old, new in zip(network().constants(), graph.constants(), strict=True):
        new.values = old.values
    clip = clips()[0]
    ours, theirs = (list(Session(g, optimize=False).alphas(clip.frames(), clip.first_alpha()))
                    for g in (graph, network()))
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(("recipe", "state"), [("mse", "float32"), ("vmq", "uint8"), ("ptq4vm", "float32")])
def test_compiled_and_scored_with_it(recipe: str, state: str, footage: Path, tmp_path: Path,
                                     capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    fed = dict[bool, list[float]]()
    run = Shadow.run

    def watched(self: Shadow, feeds: Any, outputs: Any) -> Any:
        if "last" in feeds and "src" in feeds:
            fed.setdefault("pha" in outputs, []).append(float(feeds["last"].detach().max()))
        return run(self, feeds, outputs)

    monkeypatch.setattr(Shadow, "run", watched)
    effort = dataclasses.replace(EFFORTS["fast"], sequences=2, frames=2, block_iterations=2, steps=2, loop_frames=4)
    made = vmq.compile(network(), bits=8, recipe=recipe, calib=footage, effort=effort, state=state,
                       output=tmp_path / "int.onnx", dump=tmp_path / "dump")
    assert all(min(seen) > 0.0 for seen in fed.values())
    assert bool(fed) == (recipe != "mse")
    assert made.graph.metadata[FIRST_ALPHA_KEY] == "last"
    network().save(tmp_path / "float.onnx")
    assert main(["eval", str(tmp_path / "int.onnx"), str(footage), "--reference", str(tmp_path / "float.onnx"),
                 "--json", "-q"]) == 0
    assert 0.0 < json.loads(capsys.readouterr().out)["models"][str(tmp_path / "int.onnx")]["fidelity"]["MAD"] < 5.0
    seen = inspect_dump(tmp_path / "dump").loop
    assert seen is not None
    assert seen.exact.max(axis=(1, 2)).min() > 0.1
    assert max(seen.closed) < 10.0


def test_footage_without_alpha(footage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frames, model = footage / clips()[0].name / "com", tmp_path / "float.onnx"
    network().save(model)
    with pytest.raises(MediaError, match=r"state last\), and com has none; give footage with alpha"):
        vmq.compile(network(), calib=frames)
    for words in (["compile", str(model), "--calib", str(frames), "-o", str(tmp_path / "out.onnx")],
                  ["eval", str(model), str(frames), "--reference", str(model)],
                  ["run", str(model), str(frames), "--alpha", "-o", str(tmp_path / "out")]):
        assert main([*words, "-q"]) == 2
        said = capsys.readouterr().err
        assert "told whom to follow by the first frame's alpha" in said
        assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_run_is_told_by_a_picture_or_by_the_footage(footage: Path, tmp_path: Path) -> None:
    clip, model = footage / clips()[0].name, tmp_path / "float.onnx"
    network().save(model)
    first = clip / "pha" / "0000.png"
    larger = tmp_path / "larger.png"
    cv2.imwrite(str(larger), cv2.resize(cv2.imread(str(first)), (2 * SIZE[1], 2 * SIZE[0]),
                                        interpolation=cv2.INTER_NEAREST))
    for name, words in (("a", [str(clip)]), ("b", [str(clip / "com"), "--first-alpha", str(first)]),
                        ("c", [str(clip / "com"), "--first-alpha", str(larger)])):
        assert main(["run", str(model), *words, "--alpha", "-o", str(tmp_path / name), "-q"]) == 0
    mattes = [[cv2.imread(str(p), 0) for p in sorted((tmp_path / name).iterdir())] for name in "abc"]
    assert np.max(mattes[0]) > 25
    np.testing.assert_array_equal(mattes[0], mattes[1])
    np.testing.assert_array_equal(mattes[0], mattes[2])


def test_models_that_are_not_told(footage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    graph = network()
    graph.metadata[FIRST_ALPHA_KEY] = "src"
    with pytest.raises(ModelError, match=r"src, which is no state \[1,1,H,W\]; its states are last \[1, 1, 32, 48\]"):
        Session(graph)
    del graph.metadata[FIRST_ALPHA_KEY]
    graph.save(tmp_path / "float.onnx")
    clip = footage / clips()[0].name
    assert main(["run", str(tmp_path / "float.onnx"), str(clip), "--first-alpha", str(clip / "pha" / "0000.png"),
                 "-o", str(tmp_path / "out")]) == 2
    assert "is not told whom to follow; leave --first-alpha out" in capsys.readouterr().err


def test_it_is_not_read_where_no_model_is_told_it() -> None:
    def read(start: int, stop: int | None) -> Any:
        raise MediaError(f"read from {start} to {stop}")

    clip, graph = dataclasses.replace(clips()[0], read_alpha=read), network()
    with pytest.raises(MediaError, match="read from 0 to 1"):
        run_to("calibrate_ranges", graph, footage=[clip])
    graph = network()
    del graph.metadata[FIRST_ALPHA_KEY]
    run_to("verify", graph, footage=[clip], recipe=Recipe.load("mse"))
