"""tools/tables computes what its tables need once, keeps it, goes on after an interruption, and shows errors."""

from __future__ import annotations

import importlib.util
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import compiling
import pytest
import tiny_matting as tiny

TOOL = Path(__file__).resolve().parents[1] / "tools" / "tables.py"


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The tool, with two quick rows, one effort and one seed, on code that does not change."""
    spec = importlib.util.spec_from_file_location("tables_tool", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "tables_tool", module)
    spec.loader.exec_module(module)
    set_up(module)
    return module


def set_up(module: ModuleType) -> None:
    rows = (module.FLOAT, module.Row("MSE", "mse"), module.Row("equalized", "mse+equalize"))
    module.TABLES = (module.Table("small", "Small", rows, size=True, ratio=True),)
    module.SEEDS = {"fast": (0,)}
    module.source_version = lambda: "as it is"


class Counted:
    """Stands for `run_vmq`: notes the commands and runs them, or pretends to."""

    def __init__(self, tables: ModuleType, real: bool = False) -> None:
        self.tables, self.real = tables, tables.run_vmq
        self.run = self.real if real else self.pretend
        self.commands: list[str] = []
        self.fails: dict[str, Any] = {}
        tables.run_vmq = self

    def __call__(self, arguments: list[str]) -> Any:
        self.commands.append(" ".join([arguments[0], Path(arguments[arguments.index("--recipe") + 1]).stem]
                                      if arguments[0] == "compile" else ["eval"]))
        found = self.fails.get(self.commands[-1])
        if isinstance(found, BaseException):
            raise found
        return found or self.run(arguments)

    def pretend(self, arguments: list[str]) -> Any:
        number = float(1 + len(self.commands))
        if arguments[0] == "compile":
            Path(arguments[-1]).write_bytes(" ".join(arguments).encode())
            shown: Any = {"size_bytes": 2_500_000, "passes": {"insert_qdq": {"report": {"wider": {"Conv_0": "W8A8"}}}}}
        else:
            shown = {"models": {arguments[1]: {
                "mean": dict.fromkeys(self.tables.MEASURES, number), "clips": {},
                "fidelity": {"MAD": number / 10, "MSE": 0.0, "dtSSD": 0.0}}}}
        return self.tables.Finished(0, json.dumps(shown), "", 60.0 * number, 100.0 * number)


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    compiling.network().save(tmp_path / "net.onnx")
    for kind, seed in (("calib", 0), ("eval", 5)):
        clip = tmp_path / kind / "clip"
        tiny.save_pictures(clip / "com", tiny.frames(3, compiling.SIZE, seed))
        tiny.save_pictures(clip / "pha", [frame[0] for frame in tiny.frames(3, compiling.SIZE, seed + 9)])
    return ["--model", str(tmp_path / "net.onnx"), "--calib", str(tmp_path / "calib"),
            "--eval", str(tmp_path / "eval"), "--work", str(tmp_path / "work")]


def line(text: str, label: str) -> list[str]:
    """The cells of the row with that label."""
    return next([c.strip() for c in row.split("|")[1:-1]] for row in text.splitlines() if row.startswith(f"| {label}"))


def column(text: str, name: str) -> int:
    return line(text, " | effort").index(name)


def test_two_rows_are_computed_once(tables: ModuleType, arguments: list[str], tmp_path: Path,
                                    capsys: pytest.CaptureFixture[str]) -> None:
    counted = Counted(tables, real=True)
    assert tables.main(arguments) == 0
    first = capsys.readouterr().out
    assert sorted(counted.commands) == ["compile mse", "compile mse+equalize", "eval", "eval", "eval"]
    assert first == (tmp_path / "work" / "tables.md").read_text()

    float_row, row = line(first, "FP32"), line(first, "MSE")
    evaluated = json.loads(next((tmp_path / "work" / "evaluations").glob("mse-w4a4-*.json")).read_text())
    assert row[column(first, "MAD")] == f"{evaluated['mean']['MAD']:.2f}"
    assert row[column(first, "F")] == f"{evaluated['mean']['F']:.3f}"
    assert float(row[column(first, "to FP32")]) > 1          # 4 bits without learning are not the float network
    ratio = float(row[column(first, "MAD")]) / float(float_row[column(first, "MAD")])
    assert float(row[column(first, "x MAD")]) == pytest.approx(ratio, abs=0.006)
    assert float(row[column(first, "MiB")]) > 100            # torch alone takes more
    assert "Conv_0 W8A8" in first
    assert "(MSE; equalized)" in first

    assert tables.main(arguments) == 0
    assert capsys.readouterr().out == first
    assert len(counted.commands) == 5
    assert tables.main([*arguments, "--plan"]) == 0
    assert "nothing to compute" in capsys.readouterr().out


def test_a_killed_run_continues(tables: ModuleType, arguments: list[str], tmp_path: Path,
                                capsys: pytest.CaptureFixture[str]) -> None:
    script = ("import sys; sys.path[:0] = sys.argv[1:3]; import tables, test_tables; test_tables.set_up(tables); "
              "sys.exit(tables.main(sys.argv[3:]))")
    running = subprocess.Popen([sys.executable, "-c", script, str(TOOL.parent), str(Path(__file__).parent),
                                *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    kept = tmp_path / "work" / "compiles"
    deadline = time.monotonic() + 60
    while not list(kept.glob("mse-*.json")) and time.monotonic() < deadline and running.poll() is None:
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    _, said = running.communicate()
    assert running.returncode == -signal.SIGKILL, said

    before = {p.name: p.stat().st_mtime_ns for p in kept.glob("*.json")}
    assert set(before)
    counted = Counted(tables)
    assert tables.main(arguments) == 0
    assert "compile mse" not in counted.commands
    assert "compile mse+equalize" in counted.commands
    assert before == {name: (kept / name).stat().st_mtime_ns for name in before}
    shown = capsys.readouterr().out
    assert "-" not in {line(shown, name)[column(shown, "MAD")] for name in ("FP32", "MSE", "equalized")}


def test_ctrl_c_keeps_what_is_done(tables: ModuleType, arguments: list[str], tmp_path: Path,
                                   capsys: pytest.CaptureFixture[str]) -> None:
    counted = Counted(tables)
    counted.fails["compile mse+equalize"] = KeyboardInterrupt()
    assert tables.main(arguments) == 130
    assert "continues" in capsys.readouterr().err
    text = (tmp_path / "work" / "tables.md").read_text()
    assert line(text, "MSE")[column(text, "MAD")] != "-"
    assert line(text, "equalized")[column(text, "MAD")] == "-"
    counted.fails.clear()
    counted.commands.clear()
    assert tables.main(arguments) == 0
    assert counted.commands == ["compile mse+equalize", "eval"]


def test_a_failing_compile_shows_its_error(tables: ModuleType, arguments: list[str],
                                           capsys: pytest.CaptureFixture[str]) -> None:
    tables.RECIPES["mse+equalize"] = ("mse", {"range_norm": 99.0})
    counted = Counted(tables)
    counted.run = lambda words: (counted.real if "mse+equalize" in " ".join(words[:6]) else counted.pretend)(words)
    assert tables.main(arguments) == 0
    shown = capsys.readouterr().out
    assert counted.commands == ["eval", "compile mse", "eval", "compile mse+equalize"]
    error = next(row for row in shown.splitlines() if "error:" in row)
    assert error.startswith("| equalized | fast | seed 0 |")
    assert "error: recipe mse+equalize: range_norm is 99.0; give 1 to 10" in error
    assert len(set(map(len, (re.findall(r"(?<!\\)\|", row) for row in shown.splitlines() if row[:1] == "|")))) == 1
    assert line(shown, "MSE")[column(shown, "MAD")] == "4.00"

    assert tables.main(arguments) == 0                       # it may have been bad luck: once more
    assert counted.commands[4:] == ["compile mse+equalize"]


def test_other_code_is_computed_anew_or_marked(tables: ModuleType, arguments: list[str],
                                               capsys: pytest.CaptureFixture[str]) -> None:
    counted = Counted(tables)
    assert tables.main(arguments) == 0
    tables.source_version = lambda: "changed"
    counted.commands.clear()
    assert tables.main([*arguments, "--keep-old"]) == 0
    assert counted.commands == []
    shown = capsys.readouterr().out
    assert line(shown, "MSE (old)")[column(shown, "minutes")] == "3.0"
    assert tables.main([*arguments, "--plan"]) == 0
    planned = capsys.readouterr().out
    assert "compile mse W4A4 fast, seed 0, on calib: 3.0 min last time" in planned
    assert "5 to compute" in planned
    assert tables.main(arguments) == 0
    assert len(counted.commands) == 5
    assert "(old)" not in capsys.readouterr().out


def test_code_that_changes_meanwhile_stops_the_run(tables: ModuleType, arguments: list[str],
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    counted = Counted(tables)
    tables.source_version = lambda: str(len(counted.commands) > 2)
    assert tables.main(arguments) == 2
    assert len(counted.commands) == 3
    assert "source changed" in capsys.readouterr().err


def test_seeds_give_a_mean_and_a_spread(tables: ModuleType, arguments: list[str],
                                        capsys: pytest.CaptureFixture[str]) -> None:
    tables.SEEDS = {"fast": (0, 1, 2), "standard": (0,)}
    tables.TABLES = (tables.Table("small", "Small", (tables.FLOAT, tables.Row("MSE W4A8", "mse", "w4a8")), size=True),
                     tables.Table("other", "Other", (tables.Row("BRECQ", "brecq"),)))
    counted = Counted(tables)
    assert tables.main([*arguments, "--only", "small", "--effort", "fast"]) == 0
    shown = capsys.readouterr().out
    fast, standard = ([c.strip() for c in row.split("|")[1:-1]] for row in shown.splitlines()
                      if row.startswith("| MSE"))
    assert fast[1:3] == ["fast", "3"]
    assert fast[column(shown, "MAD")] == "6.00 ± 2.00"       # pretended: 4, 6 and 8
    assert fast[column(shown, "MiB")] == "700"
    assert fast[column(shown, "MB")] == "2.50"
    assert standard[1:] == ["standard", "-", standard[3], "-", *["-"] * 9]
    macs = tables.network_multiply_adds(Path(arguments[1]))
    assert fast[column(shown, "GFLOPs")] == f"{macs / 6e9:.2f}"
    assert set(line(shown, "BRECQ")[2:]) == {"-"}
    assert tables.main([*arguments, "--only", "small", "--effort", "fast", "--seeds", "1"]) == 0
    assert len(counted.commands) == 7


def test_recipes_are_made_of_shipped_ones(tables: ModuleType, tmp_path: Path) -> None:
    for name in tables.RECIPES:
        recipe = tables.Recipe.load(tables.write_recipe(name, tmp_path))
        assert recipe.equalize == (name == "mse+equalize")
    load = {name: tables.Recipe.load(str(tmp_path / f"{name}.toml")) for name in tables.RECIPES}
    assert load["brecq+gac"].blocks == tables.Recipe.load("brecq").blocks
    assert load["brecq+gac"].network.flow == 0
    assert load["brecq+gac+ofa"].network == tables.Recipe.load("ptq4vm").network
    assert tables.same_as_shipped("brecq+gac+ofa", tmp_path) == "brecq+gac+ofa"


def test_what_is_missing_is_one_line(tables: ModuleType, arguments: list[str],
                                     capsys: pytest.CaptureFixture[str]) -> None:
    assert tables.main([*arguments, "--model", "none.onnx"]) == 2
    assert "vmq fetch" in capsys.readouterr().err
    assert tables.main([*arguments, "--calib", "none"]) == 2
    assert "no footage at" in capsys.readouterr().err
