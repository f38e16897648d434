"""tools/kill_test tells which pass a kill hit, and takes a dump along."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tools import kill_test

# In place of vmq: a compile of three stages that shows its progress on a terminal only, as vmq does.
FAKE = r"""
import sys, time
from pathlib import Path
options = dict(zip(sys.argv[3::2], sys.argv[4::2]))
out, dump = Path(options["-o"]), Path(options["--dump"]) if "--dump" in options else None
if sys.argv[2] == "none.onnx":
    sys.exit(print("vmq: error: none.onnx does not exist", file=sys.stderr) or 2)
out.with_name(f".{out.name}.lock").touch()
if dump is not None:
    dump.with_name(f".{dump.name}.lock").touch()
    dump.mkdir(exist_ok=True)
for number, name in enumerate(("first", "second", "third"), 1):
    if sys.stderr.isatty():
        sys.stderr.write(f"\r{name} ({number} of 3): doing: 50%   ")
        sys.stderr.flush()
    if dump is not None:
        (dump / f"0{number}_{name}.onnx").write_text(name)
    time.sleep(30 * (number == 2 and out.parent.name == "killed" and "--resume" not in sys.argv))
out.write_text("the same")
for place in [p for p in (out, dump) if p]:
    place.with_name(f".{place.name}.lock").unlink()
"""


@pytest.fixture(autouse=True)
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fake" / "vmq").mkdir(parents=True)
    (tmp_path / "fake" / "vmq" / "__init__.py").touch()
    (tmp_path / "fake" / "vmq" / "__main__.py").write_text(FAKE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(kill_test, "ROOT", tmp_path / "fake")
    monkeypatch.delenv("PYTHONPATH", raising=False)


@pytest.mark.parametrize("dump", [False, True])
def test_the_stage_of_a_kill_is_told(dump: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kill_test.random.Random, "uniform", lambda *_: 3.0)
    (tmp_path / "work").mkdir()
    kill_test.run(["m.onnx"], 1, 0, tmp_path / "work", dump=dump)
    said = capsys.readouterr().out
    assert "kill 1 after 3.0 s, in second (2 of 3): 0 finished pieces kept\n" in said
    assert "1 kills, 1 compiles that came to their end" in said
    assert (tmp_path / "work" / "killed" / "dump").exists() == dump


def test_another_dump_is_a_failure(tmp_path: Path) -> None:
    dump = tmp_path / "dump"
    dump.mkdir()
    for name, content in (("01_a.onnx", "a"), ("01_a.json", "1"), (".01_a.onnx.x", "")):
        (dump / name).write_text(content)
    before = kill_test.files(dump)
    assert before.keys() == {"01_a.onnx", "01_a.json"}
    (dump / "01_a.json").write_text("2")                        # it tells seconds
    assert kill_test.files(dump) == before
    (dump / "01_a.onnx").write_text("b")
    assert kill_test.files(dump) != before


def test_the_stage_is_that_of_the_last_line() -> None:
    said = "\rinsert_qdq (14 of 30): 0%   \rcalibrate_ranges (15 of 30): running the calibration clips: 40%, 0:03 left"
    assert kill_test.stage(said) == "calibrate_ranges (15 of 30)"
    assert kill_test.stage("vmq: error: no\n") == "before the first pass"


def test_what_went_wrong_is_told(tmp_path: Path) -> None:
    with pytest.raises(kill_test.KillError, match=re.escape("ended with 2: vmq: error: none.onnx does not exist")):
        kill_test.compile_until(["none.onnx"], tmp_path / "out.onnx", None, resume=False)
