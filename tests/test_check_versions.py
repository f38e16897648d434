"""tools/check_versions: lower bounds become pins, a Python that is not there is said; tools/check_runtimes: alphas."""

from __future__ import annotations

import datetime
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny_matting

from tools import check_runtimes, check_versions

PROJECT = '''[project]
dependencies = ["numpy>=1.26; python_version < '3.13'", "onnx-graphsurgeon>=0.5.8"]
[project.optional-dependencies]
test = ["pytest>=8.2"]
'''


def test_lower_bounds_become_pins():
    assert check_versions.oldest(PROJECT) == ["numpy>=1.26,<1.27; python_version < '3.13'",
                                              "onnx-graphsurgeon>=0.5.8,<0.5.9", "pytest>=8.2,<8.3"]
    assert check_versions.oldest((check_versions.ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    with pytest.raises(ValueError, match="numpy"):
        check_versions.oldest(PROJECT.replace("numpy>=1.26", "numpy"))


def test_a_python_that_is_not_here(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It is skipped, not passed: if nothing else runs, nothing was found out."""
    skipped = "Python 3.99, oldest: skipped: no python3.99 here\n"
    assert check_versions.main(["--python", "3.99", "--ends", "oldest", "--cache", str(tmp_path)]) == 1
    assert capsys.readouterr().out == f"{skipped}0 passed, 0 failed, 1 skipped\n"
    monkeypatch.setattr(check_versions, "check", lambda python, *_: None if python == "3.99" else "5 passed")
    assert check_versions.main(["--python", "3.99", "3.11", "--ends", "oldest", "--cache", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{skipped}Python 3.11, oldest: 5 passed\n1 passed, 0 failed, 1 skipped\n"


def test_newest_is_made_anew_on_another_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Day(datetime.date):
        number = 1

        @classmethod
        def today(cls) -> Day:
            return cls(2026, 1, cls.number)

    made = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        if command[1:3] == ["-m", "venv"]:
            made.append(command[3])
            Path(command[3]).mkdir()
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(check_versions.subprocess, "run", run)
    monkeypatch.setattr(check_versions.datetime, "date", Day)
    for end, anew in (("newest", 2), ("oldest", 1)):
        for Day.number in (1, 1, 2, 2):
            check_versions.environment("3.11", end, tmp_path)
        assert made == [str(tmp_path / f"versions-3.11-{end}")] * anew
        made.clear()


def test_runtimes_are_compared_by_their_alpha(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A step in a hundredth of the values is as it is between releases; more of them, or NaN, is a failure."""
    alpha = np.linspace(0.0, 1.0, 1000, dtype=np.float32).reshape(1, 20, 50)
    np.savez(tmp_path / "newest.npz", alpha=alpha, all=alpha.ravel())
    for count, value, code in ((10, 2 / 255, 0), (11, 2 / 255, 1), (1000, 0.9 / 255, 0), (11, np.nan, 1)):
        off = alpha.copy()
        off.ravel()[:count] += value
        np.savez(tmp_path / "1.24.4.npz", alpha=off, all=off.ravel())
        assert check_runtimes.main(["compare", str(tmp_path)]) == code
        said = capsys.readouterr().out
        assert said.startswith("1.24.4 against newest: ")
        assert ("FAILED" in said) == bool(code)


def test_what_a_runtime_gives(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = tiny_matting.model()
    onnx.helper.set_model_props(model, {"vmq.states": '{"last": "next"}'})
    onnx.save(model, tmp_path / "m.onnx")
    assert check_runtimes.main(["run", str(tmp_path / "m.onnx"), str(tmp_path / "out.npz")]) == 0
    assert re.fullmatch(r"onnxruntime [\d.]+: runs\n", capsys.readouterr().out)
    with np.load(tmp_path / "out.npz") as found:
        assert found["alpha"].shape == (4, 16, 24)
        assert found["all"].size == 4 * 5 * 16 * 24           # alpha, foreground, state



def test_a_name_of_a_python_that_does_not_run_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name, code in (("python3.98", 127), ("python3.99", 0)):
        (tmp_path / name).write_text(f"#!/bin/sh\nexit {code}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert [check_versions.runs(p) for p in ("3.97", "3.98", "3.99")] == [False, False, True]
    assert check_versions.check("3.98", "newest", tmp_path, []) is None


def test_a_failed_test_is_a_failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
                                    tmp_path: Path):
    monkeypatch.setattr(check_versions, "environment", lambda *_: Path(sys.executable))
    monkeypatch.setattr(check_versions, "ROOT", tmp_path)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    monkeypatch.setattr(check_versions, "runs", lambda _: True)
    for content, code in (("assert False", 1), ("pass", 0)):
        (tmp_path / "test_one.py").write_text(f"def test_one():\n    {content}\n", encoding="utf-8")
        assert check_versions.main(["--python", version, "--ends", "newest", "-p", "no:cacheprovider"]) == code
        said = capsys.readouterr().out
        assert ("1 passed" in said) == (code == 0)
        assert ("FAILED test_one.py" in said) == (code == 1)


def test_what_cannot_be_installed_is_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def fail(command: list[str], **_: object) -> None:
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(check_versions.subprocess, "run", fail)
    monkeypatch.setattr(check_versions, "runs", lambda _: True)
    said = check_versions.check("3.11", "oldest", tmp_path, [])
    assert said is not None
    assert said.startswith("failed: python3.11 -m venv")
