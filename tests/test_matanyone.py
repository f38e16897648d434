"""A frame of MatAnyone as a graph is a frame of the package's own loop; its memories are states. Needs the package."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
import torch

from models import matanyone
from passes.find_closures import find_closures
from vmq.graph import Graph
from vmq.runtime import Session, pairs_of

SIZE = (80, 96)


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "hydra", None)
    assert matanyone.main(["-o", str(tmp_path / "matanyone.onnx")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: MatAnyone's code is not installed")
    assert "pip install matanyone2-runtime==0.2.0 --no-deps" in said
    assert said.count("\n") == 1


def test_places_without_a_memory_are_not_read() -> None:
    generator = torch.Generator().manual_seed(0)
    keys, key = torch.randn(1, 4, 60, generator=generator), torch.randn(1, 4, 7, generator=generator)
    shrinkages, selection = torch.rand(1, 1, 60, generator=generator) + 1, torch.rand(1, 4, 7, generator=generator)
    shrinkages[:, :, 40:] = 0
    affinity = matanyone._affinity(keys, shrinkages, key, selection)
    torch.testing.assert_close(affinity.sum(1), torch.ones(1, 7))
    assert float(affinity[:, 40:].max()) == 0
    assert int((affinity > 0).sum(1).max()) <= matanyone.TOP
    wanted = -((keys.transpose(1, 2)[:, :, :, None] - key[:, None]) ** 2 * selection[:, None]).sum(2) \
        * shrinkages.transpose(1, 2) / 2
    best = wanted[:, :40].softmax(1)
    assert torch.equal(affinity.argmax(1), best.argmax(1))


@pytest.fixture(scope="module")
def step() -> matanyone.Step:
    pytest.importorskip("matanyone2", reason="the package matanyone2-runtime is not installed")
    return matanyone.build(seed=1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_as_the_package_does_it(step: matanyone.Step, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven frames, so that the memory is written to for a second time."""
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))     # of no use here, but imported
    from hydra import compose, initialize_config_module
    from matanyone2.inference.inference_core import InferenceCore

    path = tmp_path / "matanyone.onnx"
    matanyone.export(step, path, size=SIZE)
    session = Session(path, optimize=False, threads=2)
    mask = torch.zeros(*SIZE)
    mask[20:60, 30:70] = 1
    session.state["mask"] = mask[None, None].numpy()
    with initialize_config_module(version_base="1.3.2", config_module="matanyone2.config"):
        core = InferenceCore(step.network, cfg=compose(config_name="eval_matanyone_config"), device="cpu")
    rng = np.random.default_rng(0)
    for number in range(7):
        frame = rng.random((3, *SIZE), np.float32)
        given = {"mask": 255 * mask, "objects": [1]} if number == 0 else {}
        with torch.no_grad():
            theirs = core.step(torch.from_numpy(frame), **given)[1:].numpy()
        ours = session.feed(frame[None])["pha"]
        np.testing.assert_allclose(ours[0], theirs, atol=1e-3)
    assert ours.std() > 0.01


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_memories_are_states(step: matanyone.Step, tmp_path: Path) -> None:
    path = tmp_path / "matanyone.onnx"
    matanyone.export(step, path, size=SIZE)
    onnx.checker.check_model(str(path), full_check=True)
    graph = Graph.load(path)
    assert json.loads(graph.metadata["vmq.states"]) == matanyone.STATES
    found = {s.pair.input: s.nodes for s in find_closures(graph, pairs_of(graph, None)).states}
    assert list(found) == list(matanyone.STATES)
    assert found["last_pixels"] == ()                       # kept for a frame, not updated
    assert found["values"] == found["sensory"] == found["objects"]      # one update, through alpha
    assert len(found["keys"]) < 20                          # the memory of keys is only shifted
