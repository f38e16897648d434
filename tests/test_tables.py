"""tools/tables computes what its tables need once, keeps it, goes on after an interruption, and shows errors."""

from __future__ import annotations

import dataclasses
import importlib
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
import cv2
import numpy as np
import pytest
import tiny_matting as tiny

from vmq.clips import open_clips
from vmq.errors import MediaError

MEASURES = ("MAD", "MSE", "Grad", "Conn", "dtSSD", "F")
TOOL = Path(__file__).resolve().parents[1] / "tools" / "tables.py"


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The tool, with two quick rows, one effort and one seed, on code that does not change."""
    monkeypatch.syspath_prepend(TOOL.parent)
    for name in [name for name in sys.modules if name == "tables" or name.partition(".")[0] == "comparison"]:
        monkeypatch.delitem(sys.modules, name)
    module = importlib.import_module("tables")
    set_up(module)
    return module


def set_up(module: ModuleType) -> None:
    rows, bench = module.rows, sys.modules["comparison.bench"]
    two = (rows.FLOAT, rows.Row("MSE", "mse"), rows.Row("equalized", "mse+equalize"))
    module.every, rows.TABLES = rows.TABLES, (rows.Table("small", "Small", two, size=True, ratio=True),)
    rows.SEEDS = {"fast": (0,)}
    bench.source_version = lambda: "as it is"
    module.bench = bench
    module.SHARED = Path("/nowhere")


class Counted:
    """Stands for `run_vmq`: notes the commands and runs them, or pretends to."""

    def __init__(self, tables: ModuleType, real: bool = False) -> None:
        self.tables, self.real = tables, tables.bench.run_vmq
        self.run = self.real if real else self.pretend
        self.commands: list[str] = []
        self.given: list[list[str]] = []
        self.fails: dict[str, Any] = {}
        tables.bench.run_vmq = self

    def __call__(self, arguments: list[str]) -> Any:
        self.given.append(arguments)
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
            shown: Any = {"size_bytes": 2_500_000, "frames": [16, 32],
                          "passes": {"insert_qdq": {"report": {"wider": {"Conv_0": "W8A8"}}}}}
        else:
            shown = {"models": {arguments[1]: {
                "mean": dict.fromkeys(MEASURES, number), "clips": {},
                "fidelity": {"MAD": number / 10, "MSE": 0.0, "dtSSD": 0.0}}}}
        return self.tables.bench.Finished(0, json.dumps(shown), "", 60.0 * number, 100.0 * number)


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
    deadline = time.monotonic() + 300
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
    assert "\n- Not computed yet: equalized fast\n" in text
    counted.fails.clear()
    counted.commands.clear()
    assert tables.main(arguments) == 0
    assert counted.commands == ["compile mse+equalize", "eval"]


def test_a_failing_compile_shows_its_error(tables: ModuleType, arguments: list[str],
                                           capsys: pytest.CaptureFixture[str]) -> None:
    tables.rows.RECIPES["mse+equalize"] = ("mse", {"range_norm": 99.0})
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
    tables.bench.source_version = lambda: "changed"
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
    tables.bench.source_version = lambda: str(len(counted.commands) > 2)
    assert tables.main(arguments) == 2
    assert len(counted.commands) == 3
    assert "source changed" in capsys.readouterr().err


def test_seeds_give_a_mean_and_a_spread(tables: ModuleType, arguments: list[str],
                                        capsys: pytest.CaptureFixture[str]) -> None:
    rows = tables.rows
    rows.SEEDS = {"fast": (0, 1, 2), "standard": (0,)}
    rows.TABLES = (rows.Table("small", "Small", (rows.FLOAT, rows.Row("MSE W4A8", "mse", "w4a8")), size=True),
                   rows.Table("other", "Other", (rows.Row("BRECQ", "brecq"),)))
    counted = Counted(tables)
    assert tables.main([*arguments, "--only", "small", "--effort", "fast"]) == 0
    shown = capsys.readouterr().out
    fast, = ([c.strip() for c in row.split("|")[1:-1]] for row in shown.splitlines() if row.startswith("| MSE"))
    assert fast[1:3] == ["fast", "3"]
    assert fast[column(shown, "MAD")] == "6.00 ± 2.00"       # pretended: 4, 6 and 8
    assert fast[column(shown, "MiB")] == "700"
    assert fast[column(shown, "minutes")] == "3.0"           # the least of 3, 5 and 7
    assert fast[column(shown, "MB")] == "2.50"
    macs = tables.bench.network_multiply_adds(Path(arguments[1]))
    assert fast[column(shown, "GFLOPs")] == f"{macs / 6e9:.2f}"
    assert "\n- Not computed yet: MSE W4A8 standard\n" in shown
    assert "## Other\n\n- Not computed yet: BRECQ fast; BRECQ standard\n" in shown
    assert tables.main([*arguments, "--only", "small", "--effort", "fast", "--seeds", "1"]) == 0
    assert len(counted.commands) == 7


def test_what_another_run_computes_meanwhile_is_not_computed_again(tables: ModuleType) -> None:
    jobs = [tables.Job("mse", bits, "fast", 0, "calib") for bits in ("8", "4")]

    class Shared:
        """Where the first compile takes so long that another run does all the rest."""

        def __init__(self) -> None:
            self.done, self.computed = set[Any](), list[str]()

        def missing(self, job: Any, labels: list[str]) -> tuple[bool, list[str]]:
            return job not in self.done, [label for label in labels if (job, label) not in self.done]

        def last_time(self, job: Any, label: str | None) -> None:
            pass

        def compile(self, job: Any) -> None:
            self.computed.append(job.bits)
            self.done |= {job, jobs[1], (jobs[1], "eval")}

        def evaluate(self, job: Any, label: str) -> None:
            self.computed.append(f"{job.bits} on {label}")
            self.done.add((job, label))

    shared = Shared()
    tables.compute(shared, {job: ["eval"] for job in jobs}, lambda: None)
    assert shared.computed == ["8", "8 on eval"]


def test_recipes_are_made_of_shipped_ones(tables: ModuleType, tmp_path: Path) -> None:
    rows = tables.rows
    load = {name: rows.Recipe.load(rows.write_recipe(name, tmp_path)) for name in rows.RECIPES}
    shipped = {name: rows.Recipe.load(name) for name in ("brecq", "ptq4vm", "vmq")}
    assert [name for name in load if load[name].equalize] == ["mse+equalize"]
    assert load["brecq+gac"].blocks == shipped["brecq"].blocks
    assert load["brecq+gac"].network.flow == 0
    assert load["brecq+gac+ofa"].network == shipped["ptq4vm"].network
    assert dataclasses.replace(load["vmq+gac+ofa"], name="vmq", network=None) == shipped["vmq"]
    assert load["vmq+gac+ofa"].network == shipped["ptq4vm"].network
    assert load["ptq4vm-float"].network == dataclasses.replace(shipped["ptq4vm"].network, teacher="float")
    assert rows.same_as_shipped("brecq+gac+ofa", tmp_path) == "brecq+gac+ofa"


def test_what_is_missing_is_one_line(tables: ModuleType, arguments: list[str],
                                     capsys: pytest.CaptureFixture[str]) -> None:
    assert tables.main([*arguments, "--model", "none.onnx"]) == 2
    assert "vmq fetch" in capsys.readouterr().err
    assert tables.main([*arguments, "--calib", "none"]) == 2
    assert "no footage at" in capsys.readouterr().err


def test_every_row_is_planned(tables: ModuleType, arguments: list[str], tmp_path: Path,
                              capsys: pytest.CaptureFixture[str]) -> None:
    tables.rows.TABLES = tables.every
    for name in ("video", "other"):
        tiny.save_pictures(tmp_path / name / "clip", tiny.frames(2, compiling.SIZE, 3))
    sets = ["--clips", str(tmp_path / "video"), "--unlabelled", str(tmp_path / "other"),
            "--eval", str(tmp_path / "calib")]
    assert tables.main([*arguments, *sets, "--plan"]) == 0
    said = capsys.readouterr()
    assert "other sizes are left out" in said.err
    lines = [row.partition(":")[0] for row in said.out.splitlines()]
    assert len(set(lines)) == len(lines)
    assert len([row for row in lines if row.startswith("compile ")]) == 20
    wanted = {"eval", "calib", "stills with motion", "clips without alpha"}
    assert {row.partition(" against ")[2] for row in lines} - {""} == wanted
    assert not (tmp_path / "work" / "footage").exists()      # nothing is made for a plan

    tiny.save(tmp_path / "free.onnx", ("height", "width"), ratio=True)
    free = ["--dynamic", str(tmp_path / "free.onnx"), "--only", "sizes", "--plan"]
    assert tables.main([*arguments, *sets, *free]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert "compile vmq W4A4 fast, seed 0, on calib at 1920x1080: not done before" in said.out
    assert "score FP32 against eval at 480x270: not done before" in said.out
    assert "14 to compute" in said.out
    assert tables.main([*arguments, *free, "--rows", "qdrop w4a4 at 480"]) == 0
    assert "3 to compute" in capsys.readouterr().out         # compile, score, and the float network beside it
    assert tables.main([*arguments, "--only", "sizes", "--rows", "of no name"]) == 2
    assert "no row is called so; there are FP32 at 480x270, vmq W8A8 at 480x270" in capsys.readouterr().err


def test_another_size_is_compiled_and_scored_from_the_free_network(
        tables: ModuleType, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, free = tables.rows, tiny.save(tmp_path / "free.onnx", ("height", "width"), ratio=True)
    rows.TABLES = (rows.Table("sizes", "Sizes", tuple(
        rows.Row(label, recipe, footage="calib-2", size="64x32", ratio=0.5, on=on)
        for on in ("eval", "stills") for label, recipe in (("FP32", None), ("MSE", "mse"))), frames=True),)
    counted = Counted(tables)
    assert tables.main([*arguments, "--dynamic", free]) == 0
    shown = capsys.readouterr().out
    assert counted.commands == ["eval", "eval", "compile mse", "eval", "eval"]
    compile_, scored = counted.given[2], counted.given[3:]
    assert compile_[1] == free
    assert " ".join(compile_[compile_.index("--size"):][:4]) == "--size 64x32 --downsample-ratio 0.5"
    assert [len(c) for c in open_clips([compile_[compile_.index("--calib") + 1]])] == [2]
    for command in (*counted.given[:2], *scored):
        assert " ".join(command[3:7]) == f"--reference {free} --downsample-ratio 0.5"
        assert [clip.size for clip in open_clips([command[2]])] == [(32, 64)]
    assert line(shown, "FP32 on eval at 64x32")[column(shown, "MAD")] == "2.00"
    assert line(shown, "MSE on stills with motion at 64x32")[column(shown, "frames")] == "16 of 32"    # as pretended


@pytest.mark.usefixtures("tables")
def test_footage_is_made_once_without_loss(tmp_path: Path) -> None:
    footage = sys.modules["comparison.footage"]
    first, second = (tiny.frames(20, compiling.SIZE, seed) for seed in (1, 2))
    for name, pictures in (("a", first), ("b", second)):
        tiny.save_pictures(tmp_path / "given" / name / "com", pictures)
        tiny.save_pictures(tmp_path / "given" / name / "pha", [p[1] for p in pictures])
    given = footage.Given([tmp_path / "given"])
    [path] = footage.first_frames(given, 16, tmp_path / "made").ready()
    clips = open_clips([path])
    assert [(len(clip), clip.has_alpha) for clip in clips] == [(8, True), (8, True)]
    assert all((a == b).all() for a, b in zip(clips[1].frames(), second, strict=False))
    assert all((a == b[1]).all() for a, b in zip(clips[0].alpha() or (), first, strict=False))
    [smaller] = footage.first_frames(given, 4, tmp_path / "made").ready()
    assert [len(clip) for clip in open_clips([smaller])] == [4]

    made = footage.resized(given, (16, 24), tmp_path / "made")
    assert made.ready() == made.ready()
    assert [(clip.size, len(clip)) for clip in open_clips(made.ready())] == [((16, 24), 20)] * 2
    tiny.save_pictures(tmp_path / "plain", first)
    plain = footage.resized(footage.Given([tmp_path / "plain"]), (16, 24), tmp_path / "made")
    assert [(clip.size, len(clip), clip.has_alpha) for clip in open_clips(plain.ready())] == [((16, 24), 20, False)]
    tiny.save_pictures(tmp_path / "given" / "c" / "com", first[:1])
    assert footage.resized(footage.Given([tmp_path / "given"]), (16, 24), tmp_path / "made").key != made.key


@pytest.mark.usefixtures("tables")
def test_stills_move_along_a_straight_way(tmp_path: Path) -> None:
    footage, size = sys.modules["comparison.footage"], (96, 160)
    disc = np.zeros((90, 120, 4), np.uint8)
    cv2.circle(disc, (60, 45), 20, (10, 20, 250, 255), -1)
    (tmp_path / "stills").mkdir()
    cv2.imwrite(str(tmp_path / "stills" / "disc.png"), disc)
    made = [footage.moving_stills(footage.Given([tmp_path / "stills"]), size, tmp_path / name).ready()[0]
            for name in ("one", "two")]
    [clip], [again] = (open_clips([path]) for path in made)
    frames, mattes = list(clip.frames()), list(clip.alpha() or ())
    assert len(frames) == footage.STILL_FRAMES
    assert all((a == b).all() for a, b in zip(frames, again.frames(), strict=True))

    y, x = np.mgrid[:size[0], :size[1]]
    centres = np.array([[(x * m).sum(), (y * m).sum()] for m in mattes]) / [[m.sum()] for m in mattes]
    scale = size[0] / 90                                     # it fits in height, its centre at the frame's middle
    way = footage.motion(size, np.random.default_rng((footage.SEED, 0)))
    placed = np.array([80.0, 45 * scale, 1])
    wanted = [way(n / (len(frames) - 1)) @ placed for n in range(len(frames))]
    assert np.abs(centres - wanted).max() < 0.7
    assert np.hypot(*(centres[-1] - centres[0])) > 3
    for frame, matte in zip(frames, mattes, strict=True):
        assert np.abs(np.median(frame[:, matte == 255], axis=1) - [250, 20, 10]).max() <= 3
        assert np.median(frame[:, matte == 0]) != 0          # a background, not black
    assert np.abs(frames[0][:, :10].astype(int) - frames[-1][:, :10]).mean() > 1     # which moves

    tiny.save_pictures(tmp_path / "plain" / "com", tiny.frames(2, size))
    with pytest.raises(MediaError, match="name some with --stills"):
        footage.moving_stills(footage.Given([tmp_path / "plain"]), size, tmp_path / "three").ready()
    cv2.imwrite(str(tmp_path / "stills" / "grey.png"), disc[..., 0])
    with pytest.raises(MediaError, match="no 8-bit picture with alpha"):
        footage.moving_stills(footage.Given([tmp_path / "stills"]), size, tmp_path / "four").ready()
