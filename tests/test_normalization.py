"""Models that take (frame - mean) / std instead of RGB in 0..1: ONNX Runtime on frames normalised by hand judges."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compiling import clips, network
from tiny_matting import save_pictures

import vmq
from vmq.cli import main
from vmq.clips import to_float
from vmq.errors import ModelError, OptionError
from vmq.graph import Graph
from vmq.runtime import NORMALIZATION_KEY, Session
from vmq.shadow import Shadow
from vmq.spec import EFFORTS, Normalization, parse_normalization

MEAN, STD = (0.5, 0.4, 0.45), (0.25, 0.2, 0.3)


@pytest.fixture(scope="module")
def footage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("footage")
    for clip in clips():
        save_pictures(folder / clip.name, clip.frames())
    return folder


def by_hand(graph: Graph) -> list[np.ndarray[Any, Any]]:
    """Alpha of a clip's frames that are normalised here."""
    session, mean, std = Session(graph, optimize=False), np.float32(MEAN), np.float32(STD)
    session.normalization = None
    return [session.alpha_of(session.feed((to_float(f)[None] - mean[:, None, None]) / std[:, None, None]))
            for f in clips()[0].frames()]


@pytest.mark.parametrize("said", [True, False])
def test_session_feeds_what_the_model_takes(said: bool) -> None:
    graph = network()
    if said:
        graph.metadata[NORMALIZATION_KEY] = json.dumps({"mean": MEAN, "std": STD})
    session = Session(graph, optimize=False, normalization=Normalization((9.0,)) if said else Normalization(MEAN, STD))
    for ours, want in zip(session.alphas(clips()[0].frames()), by_hand(graph), strict=True):
        np.testing.assert_allclose(ours, want, atol=1e-6)


def test_one_number_stands_for_three() -> None:
    frames = np.random.default_rng(0).random((2, 3, 4, 5), np.float32)
    np.testing.assert_array_equal(Normalization((0.5,), (0.5,))(frames), Normalization((0.5,) * 3, (0.5,) * 3)(frames))
    np.testing.assert_allclose(Normalization((0.5,), (0.5,))(frames), 2.0 * frames - 1.0, atol=1e-7)


def test_compiled_for_what_it_takes(footage: Path) -> None:
    shown = vmq.compile(network(), bits=8, recipe="mse", calib=footage, mean=MEAN, std=STD, effort="fast")
    blind = vmq.compile(network(), bits=8, recipe="mse", calib=footage, effort="fast")
    assert json.loads(shown.graph.metadata[NORMALIZATION_KEY]) == {"mean": list(MEAN), "std": list(STD)}
    assert NORMALIZATION_KEY not in blind.graph.metadata
    want = by_hand(network())
    errors = [float(np.mean([np.abs(a - b).mean() for a, b in zip(by_hand(made.graph), want, strict=True)]))
              for made in (shown, blind)]
    assert errors[0] < 0.02 < 8.0 * errors[0] < errors[1], errors


def test_learned_on_what_it_takes(footage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fed = dict[str, list[float]]()
    run = Shadow.run

    def watched(self: Shadow, feeds: Any, outputs: Any) -> Any:
        if "src" in feeds and "pha" in outputs:
            fed.setdefault("alpha", []).append(float(feeds["src"].min()))
        elif "src" in feeds:
            fed.setdefault("blocks", []).append(float(feeds["src"].min()))
        return run(self, feeds, outputs)

    monkeypatch.setattr(Shadow, "run", watched)
    effort = dataclasses.replace(EFFORTS["fast"], sequences=2, frames=2, block_iterations=2, steps=2, loop_frames=4)
    vmq.compile(network(), bits=4, recipe="ptq4vm", calib=footage, mean=MEAN, std=STD, effort=effort)
    assert max(fed["blocks"]) < -0.9        # black is -2 in red and green, -1.5 in blue
    assert max(fed["alpha"]) < -0.9


def test_commands(footage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, made = tmp_path / "float.onnx", tmp_path / "int.onnx"
    network().save(plain)
    numbers = ["--mean", ",".join(map(str, MEAN)), "--std", ",".join(map(str, STD))]
    assert main(["compile", str(plain), "--recipe", "mse", "--effort", "fast", "--calib", str(footage), *numbers,
                 "-o", str(made), "-q"]) == 0
    reports = []
    for more in (numbers, []):      # the compiled file says itself what it takes, the float one does not
        assert main(["eval", str(made), str(footage), "--reference", str(plain), "--json", "-q", *more]) == 0
        reports.append(json.loads(capsys.readouterr().out)["models"][str(made)]["fidelity"]["MAD"])
    assert reports[0] < 20.0 < 8.0 * reports[0] < reports[1]
    folder = footage / clips()[0].name
    for model, more in ((plain, numbers), (made, [])):
        assert main(["run", str(model), str(folder), "--alpha", "-o", str(tmp_path / model.stem), "-q", *more]) == 0


@pytest.mark.parametrize("numbers", [["--mean", "0.5,0.5"], ["--std", "0"], ["--std", "1,1,-1"], ["--mean", "nan"],
                                     ["--mean", "half"]])
def test_bad_numbers(numbers: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) if numbers[1] == "half" else contextlib.nullcontext():
        assert main(["compile", "model.onnx", *numbers, "-o", str(tmp_path / "out.onnx")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert numbers[1] in said
    assert numbers[0] in said


@pytest.mark.parametrize("text", ["{", "[1]", '{"mean": [1, 2]}', '{"std": [0]}', '{"scale": [1]}', '{"mean": "x"}',
                                  pytest.param("[" * 100_000, id="deep")])
def test_damaged_metadata(text: str) -> None:
    graph = network()
    graph.metadata[NORMALIZATION_KEY] = text
    with pytest.raises(ModelError, match=r"metadata vmq\.normalization is damaged"):
        Session(graph)


def test_a_number_from_python() -> None:
    assert parse_normalization(0.5, None) == Normalization((0.5,), (1.0,))
    assert parse_normalization(None, (1, 2, 3)) == Normalization((0.0,), (1.0, 2.0, 3.0))
    assert parse_normalization(None, None) is None


def test_numbers_that_make_no_sense() -> None:
    with pytest.raises(OptionError, match="give one number or three"):
        vmq.compile(network(), mean=(0.1, 0.2))
