"""Packages from npm for the tests of the page and of the JavaScript example; kept in out/npm between runs."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = {"onnxruntime-node": "1.30.0", "playwright-core": "1.65.1"}


def node() -> str:
    """Node.js 18 or newer; skips the test where there is none."""
    found = shutil.which("node")
    if found is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not installed")
    return found


def package(name: str) -> Path:
    """The folder in which Node.js finds a package; installs it the first time, skips where npm cannot."""
    node()
    folder = ROOT / "out" / "npm"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)                 # tests in several processes install one after the other
        if not (folder / "node_modules" / name / "package.json").exists():
            done = subprocess.run(["npm", "install", "--silent", "--ignore-scripts", "--no-save", "--prefix", folder,
                                   f"{name}@{VERSIONS[name]}"],
                                  capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"npm cannot install {name}: {(done.stderr or done.stdout).strip()[-200:]}")
    return folder
