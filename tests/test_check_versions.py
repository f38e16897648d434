"""tools/check_versions: lower bounds become pins, and a Python that is not there is said."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tools import check_versions

PROJECT = '''[project]
dependencies = ["numpy>=1.26", "onnx-graphsurgeon>=0.5.8"]
[project.optional-dependencies]
test = ["pytest>=8.2"]
'''


def test_lower_bounds_become_pins():
    assert check_versions.oldest(PROJECT) == ["numpy>=1.26,<1.27", "onnx-graphsurgeon>=0.5.8,<0.5.9",
                                              "pytest>=8.2,<8.3"]
    assert check_versions.oldest((check_versions.ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    with pytest.raises(ValueError, match="numpy"):
        check_versions.oldest(PROJECT.replace("numpy>=1.26", "numpy"))


def test_a_python_that_is_not_here(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert check_versions.main(["--python", "3.99", "--ends", "oldest", "--cache", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "Python 3.99, oldest: there is no python3.99 here\n"


def test_a_failed_test_is_a_failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
                                    tmp_path: Path):
    monkeypatch.setattr(check_versions, "environment", lambda *_: Path(sys.executable))
    monkeypatch.setattr(check_versions, "ROOT", tmp_path)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    monkeypatch.setattr(check_versions.shutil, "which", lambda name: name)
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
    monkeypatch.setattr(check_versions.shutil, "which", lambda name: name)
    said = check_versions.check("3.11", "oldest", tmp_path, [])
    assert said is not None
    assert said.startswith("failed: python3.11 -m venv")
