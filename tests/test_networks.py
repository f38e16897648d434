"""tools/networks: a line for each network and width, compiled once for the same weights and options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compiling import clips, network
from tiny_matting import save_pictures

import vmq
from tools import networks

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A tiny network and footage for it, as the tool is called in their folder; for `compilings` it is counted."""
    network().save(tmp_path / "tiny.onnx")
    save_pictures(tmp_path / "footage" / "clip", clips(1, 3)[0].frames())
    monkeypatch.chdir(tmp_path)
    compile_ = vmq.compile

    def counted(*given: Any, **options: Any) -> Any:
        compilings.append(options)
        return compile_(*given, **options)

    compilings.clear()
    monkeypatch.setattr(vmq, "compile", counted)
    return ["tiny.onnx", "--calib", "footage", "--eval", "footage", "--recipes", "mse", "--bits", "8", "--rounds", "1",
            "--clips", "1", "--frames", "2"]


compilings: list[dict[str, Any]] = []


def table(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int = 0) -> list[list[str]]:
    """The cells of the lines that the tool prints."""
    assert networks.main(arguments) == code
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")][2:]
    assert {line.count("|") for line in lines} == {networks.HEAD.splitlines()[0].count("|")}
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def test_a_line_each_and_compiled_once(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    exact, ours = table(arguments, capsys)
    assert exact[:2] == ["tiny", "float32"]
    assert ours[:3] == ["tiny", "W8A8", "mse"]
    assert 0 < float(ours[5]) < 50
    assert len(compilings) == 1
    assert compilings[0]["resume"]

    again = table(arguments, capsys)[1]
    assert len(compilings) == 1
    assert again[:8] == ours[:8]


def test_what_is_stale_or_unfinished_is_compiled_again(arguments: list[str],
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    first = table(arguments, capsys)[1]
    next(Path("networks").glob("*.json")).unlink()             # killed between the two files
    assert table(arguments, capsys)[1][:8] == first[:8]
    assert len(compilings) == 2

    changed = network()
    changed.value("w8").values = (3 * np.asarray(changed.value("w8").values)).astype(np.float32)
    changed.save("tiny.onnx")
    assert table(arguments, capsys)[1][5] != first[5]
    assert len(compilings) == 3

    save_pictures(Path("footage/more"), clips(1, 3)[0].frames())
    table(arguments, capsys)
    assert len(compilings) == 4


def test_a_network_that_fails_does_not_end_the_table(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.onnx").write_bytes(b"no model")
    lines = table(["bad.onnx", *arguments, "--recipes", "none.toml", "mse"], capsys, code=2)
    assert [line[:2] for line in lines] == [["bad", ""], ["tiny", "float32"], ["tiny", "W8A8"], ["tiny", "W8A8"]]
    assert lines[0][3].startswith("error: bad.onnx is not an ONNX model")
    assert lines[2][3].startswith("error: recipe")
    assert float(lines[3][5]) > 0
