"""tools/growth: one table for each thing that grows, with what each compile took."""

from __future__ import annotations

from pathlib import Path

import pytest
from compiling import SIZE, network

from tools import growth
from vmq.clips import open_clips
from vmq.errors import ModelError


def test_prints_what_grows(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = tmp_path / "tiny.onnx"
    network().save(model)
    code = growth.main([str(model), "--frames", "8", "16", "--sizes", "1", "--steps", "2", "--profile"])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in printed.out.splitlines() if line[:1] == "|"]
    first = [row for row in rows if row[0] in ("8", "16") and len(row) == 4]
    assert [row[0] for row in first] == ["8", "16"]
    assert all(float(row[1]) > float(row[2]) > 0.0 and float(row[3]) > 50 for row in first)
    assert [row for row in rows if row[0] == f"{SIZE[1]}x{SIZE[0]}"]
    shares = {row[0]: float(row[1].rstrip("%")) for row in rows if row[-1].endswith("%")}
    assert shares["reconstruct_blocks"] > 0.0
    assert shares["convolution, backward"] > 0.0
    assert 99.0 < sum(shares[kind] for kind, _ in growth.KINDS) + shares["other"] < 101.0


def test_footage_has_the_frames_asked_for(tmp_path: Path):
    [clip] = open_clips([Path(growth.write_footage(tmp_path / "v.mp4", (64, 96), 70))])
    assert (len(clip), clip.size) == (70, (64, 96))


@pytest.mark.parametrize(("arguments", "said"), [
    (["--frames", "7"], "--frames 7: give 8 or more"), (["--frames", "8", "--bits", "3"], "--bits 3 is not known")])
def test_an_error_is_one_line(arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = tmp_path / "tiny.onnx"
    network().save(model)
    assert growth.main([str(model), *arguments]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"tools/growth: error: {said}")
    assert printed.count("\n") == 1
    with pytest.raises(ModelError):
        growth.measure(str(model), {"scale": 0.37})
