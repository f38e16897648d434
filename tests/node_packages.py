"""What tests of pages and of the JavaScript example need: packages from npm, kept in out/npm, and Chromium."""

from __future__ import annotations

import fcntl
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

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


def chromium() -> str:
    """Chromium or Chrome; skips the test where there is none."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("chromium is not installed")
    return found


def browse(url: str, folder: Path, *words: object) -> dict[str, Any]:
    """What a job of browser.mjs found on a page.

    Args:
        url: of the page.
        folder: for Chromium's profile; camera.y4m in it is what a camera gives.
        words: the job, and what it takes.
    """
    done = subprocess.run([node(), str(ROOT / "tests" / "browser.mjs"), str(package("playwright-core")), chromium(),
                           url, str(folder / "profile"), str(folder / "camera.y4m"), *map(str, words)],
                          capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found
