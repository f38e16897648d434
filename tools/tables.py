"""Compare recipes, bit widths and calibration footage: compile, score, and write the tables as Markdown.

Every compile and every evaluation is a `vmq` command in a process of its own, so that time and peak memory are its
own. What it found is kept as one JSON file in --work, under a key made of everything that decides it; what is there
is not computed again, so a run that was stopped continues.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from vmq.bench import processor
from vmq.cost import cost_of, saving
from vmq.errors import MediaError, OptionError, VmqError
from vmq.graph import Graph, write_atomic
from vmq.spec import Bits, Recipe

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
RECIPE_FILES = ROOT / "vmq" / "recipes"
UNLABELLED = tuple(SHARED / "clips" / f"{name}.mp4"
                   for name in ("doctor_typing", "woman_plants", "football_juggle", "stage_singer"))

# ---------------------------------------------------------------------------------------------- what is compared

SEEDS: Mapping[str, tuple[int, ...]] = {"fast": (0, 1, 2), "standard": (0,)}
"""Which seeds each effort is compiled with."""

RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "mse+equalize": ("mse", {"equalize": True}),
    "brecq+gac": ("ptq4vm", {"blocks": "brecq", "network": {"flow": 0.0}}),
    "brecq+gac+ofa": ("ptq4vm", {"blocks": "brecq", "network": {"flow": 0.05}}),
    "qdrop+gac": ("ptq4vm", {"blocks": "qdrop", "network": {"flow": 0.0}}),
    "qdrop+gac+ofa": ("ptq4vm", {"blocks": "qdrop", "network": {"flow": 0.05}}),
}
"""Recipes made here: the shipped one they start from and what changes. A table of the TOML file that is None is left
out, one that is a word comes from the shipped recipe of that name, one that is a mapping is changed in these keys."""


@dataclass(frozen=True)
class Row:
    """One way to compile, shown with a line for each effort.

    Attributes:
        label: what the table calls it.
        recipe: a shipped one or one of `RECIPES`; None: the float network as it is.
        bits: as `vmq compile --bits` takes them.
        footage: what it is calibrated on: calib, unlabelled, or builtin (vmq's own synthetic clips).
        elsewhere: scored on every further --eval instead of on the first.
    """

    label: str
    recipe: str | None = None
    bits: str = "4"
    footage: str = "calib"
    elsewhere: bool = False


@dataclass(frozen=True)
class Table:
    """One table; `size` adds multiply-adds and megabytes, `ratio` how many times the float network's error it is."""

    name: str
    title: str
    rows: tuple[Row, ...]
    size: bool = False
    ratio: bool = False


FLOAT = Row("FP32")
TABLES: tuple[Table, ...] = (
    Table("first-stage", "First stage, W4A4", (
        FLOAT, Row("MSE", "mse"), Row("MSE, equalized", "mse+equalize"), Row("BRECQ", "brecq"), Row("QDrop", "qdrop"),
        Row("vmq", "vmq"))),
    Table("bits", "Bits", (
        FLOAT, *(Row(f"{recipe} {Bits.parse(bits)}", recipe, bits)
                 for recipe in ("ptq4vm", "vmq") for bits in ("8", "w4a8", "4"))), size=True, ratio=True),
    Table("ablation", "Ablation of the second stage, W4A4", (
        FLOAT, Row("BRECQ", "brecq"), Row("BRECQ + GAC", "brecq+gac"), Row("BRECQ + GAC + OFA", "brecq+gac+ofa"),
        Row("QDrop", "qdrop"), Row("QDrop + GAC", "qdrop+gac"), Row("QDrop + GAC + OFA", "qdrop+gac+ofa"))),
    Table("data", "Footage, W4A4", (
        FLOAT, Row("vmq", "vmq"), Row("vmq, other footage, without alpha", "vmq", footage="unlabelled"),
        Row("vmq, built-in clips", "vmq", footage="builtin"),
        Row("FP32", elsewhere=True),
        *(Row(name, recipe, elsewhere=True)
          for name, recipe in (("QDrop", "qdrop"), ("ptq4vm", "ptq4vm"), ("vmq", "vmq")))), ratio=True),
)
MEASURES = ("MAD", "MSE", "Grad", "Conn", "dtSSD", "F")
CAPTION = """\
Means over the clips; with several seeds ± the standard deviation over them. MAD, MSE x 1e3; Grad, Conn in thousands;
dtSSD x 1e2, the first frame of each clip counted as 0 as in the paper; F of alpha over 0.5, higher is better. to FP32:
MAD x 1e3 to the float network's mattes. Minutes and peak memory (MiB, the largest of the seeds) are of
`vmq compile`; ≥: of the part after an interruption."""
SIZE_CAPTION = """\
GFLOPs as in the paper: multiply-adds of one frame, divided by the mean of 32/weight bits and 32/activation bits, at
nominal bits. MB (1e6 bytes): the file. x MAD, x dtSSD: as multiples of FP32's."""


@dataclass(frozen=True)
class Job:
    """One compile; the same one may serve several tables."""

    recipe: str
    bits: str
    effort: str
    seed: int
    footage: str

    @property
    def name(self) -> str:
        return f"{self.recipe}-{Bits.parse(self.bits)}-{self.effort}-{self.seed}-{self.footage}".lower()


# -------------------------------------------------------------------------------------------------- what is kept


class Store:
    """JSON records in a folder, each with a name, and a key made of its parts: everything that decides it.

    Args:
        folder: made when the first record is written.
        keep_old: where there is no record under the key, accept the newest of that name made from the same model.
    """

    def __init__(self, folder: Path, keep_old: bool) -> None:
        self.folder, self.keep_old = folder, keep_old

    def find(self, name: str, parts: Mapping[str, Any]) -> dict[str, Any] | None:
        """The record of that name and key; where old ones are accepted, those have `old` set."""
        exact = _read(self.path(name, parts))
        if exact or not self.keep_old:
            return exact
        same = [r for r in self.all(name) if r["parts"]["model"] == parts["model"] and "error" not in r]
        return same[-1] | {"old": True} if same else None

    def all(self, name: str) -> list[dict[str, Any]]:
        """Every readable record of that name, oldest first."""
        records = [r for p in self.folder.glob(f"{name}.*.json") if (r := _read(p)) and r["name"] == name]
        return sorted(records, key=lambda r: r["time"])

    def save(self, name: str, parts: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
        record = {"name": name, "parts": dict(parts), "time": time.time(), **found}
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path(name, parts), json.dumps(record, indent=1).encode())
        return record

    def path(self, name: str, parts: Mapping[str, Any], suffix: str = "json") -> Path:
        return self.folder / f"{name}.{_digest(json.dumps(parts, sort_keys=True).encode())[:16]}.{suffix}"


def _read(path: Path) -> dict[str, Any] | None:
    with contextlib.suppress(OSError, ValueError):
        record = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(record, dict) and {"name", "parts", "time"} <= record.keys():
            return record
    return None


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def source_version() -> str:
    """A hash over the code and the recipes that decide what a compile gives."""
    files = [p for pattern in ("vmq/*.py", "passes/*.py", "vmq/recipes/*.toml") for p in sorted(ROOT.glob(pattern))]
    return _digest("".join(f"{p.relative_to(ROOT)} {_digest(p.read_bytes())}\n" for p in files).encode())


def _footage(paths: Sequence[Path]) -> str:
    """A hash over the names and sizes of all files in some footage."""
    lines = []
    for path in paths:
        files = sorted(f for f in (path.rglob("*") if path.is_dir() else [path]) if f.is_file())
        if not files:
            raise MediaError(f"there is no footage at {path}; name some with --calib, --unlabelled or --eval")
        lines += [f"{f.relative_to(path.parent)} {f.stat().st_size}" for f in files]
    return _digest("\n".join(lines).encode())


# ------------------------------------------------------------------------------------------------------ recipes


def recipe_text(name: str) -> str:
    """The TOML text of a recipe: a shipped file's, or what `RECIPES` makes of it."""
    base, changes = RECIPES.get(name, (name, {}))
    if not changes:
        return _shipped(base)
    tables = tomllib.loads(_shipped(base))
    for key, change in changes.items():
        if change is None:
            tables.pop(key, None)
        elif isinstance(change, str) and isinstance(tables.get(key), dict):
            tables[key] = tomllib.loads(_shipped(change))[key]
        elif isinstance(change, dict):
            tables[key] = tables.get(key, {}) | change
        else:
            tables[key] = change
    plain = {k: v for k, v in tables.items() if not isinstance(v, dict)}
    parts = {k: v for k, v in tables.items() if isinstance(v, dict)}
    lines = [f"# {base}, changed: {json.dumps(changes)}"]     # TOML writes our kinds of values as JSON does
    lines += [f"{k} = {json.dumps(v)}" for k, v in plain.items()]
    for part, values in parts.items():
        lines += ["", f"[{part}]", *(f"{k} = {json.dumps(v)}" for k, v in values.items())]
    return "\n".join(lines) + "\n"


def same_as_shipped(name: str, folder: Path) -> str:
    """The shipped recipe that one of `RECIPES` equals, so that it is compiled once; else its own name."""
    if name not in RECIPES:
        return name
    with contextlib.suppress(OptionError):      # a bad recipe is for the compile to complain about
        made = dataclasses.replace(Recipe.load(write_recipe(name, folder)), name="")
        for path in sorted(RECIPE_FILES.glob("*.toml")):
            with contextlib.suppress(OptionError):
                if dataclasses.replace(Recipe.load(path.stem), name="") == made:
                    return path.stem
    return name


def write_recipe(name: str, folder: Path) -> str:
    """What `--recipe` takes: a shipped recipe's name, or the file written to `folder`."""
    if name not in RECIPES:
        return name
    path, content = folder / f"{name}.toml", recipe_text(name).encode()
    if not path.exists() or path.read_bytes() != content:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content)
    return str(path)


def _shipped(name: str) -> str:
    try:
        return (RECIPE_FILES / f"{name}.toml").read_text(encoding="utf-8")
    except OSError as error:
        raise OptionError(f"there is no shipped recipe {name}; correct the tables in {Path(__file__).name}") from error


# ------------------------------------------------------------------------------------------------- multiply-adds


def network_multiply_adds(model: Path) -> int:
    """Multiply-adds of a model file at the size it is compiled for."""
    from passes import PIPELINE
    from vmq.pipeline import Context, run_passes
    from vmq.spec import Options

    graph = Graph.load(model)
    run_passes(graph, PIPELINE[:[p.name for p in PIPELINE].index("fold_shapes") + 1], Context(Options()))
    return cost_of(graph).multiply_adds


# -------------------------------------------------------------------------------------------------- computing it


@dataclass(frozen=True)
class Finished:
    """A `vmq` command that ended: its exit code, what it printed, wall seconds, peak resident memory in MiB."""

    code: int
    stdout: str
    stderr: str
    seconds: float
    peak: float

    @property
    def error(self) -> str | None:
        """What went wrong, as one line; None if nothing did."""
        if self.code < 0:
            return f"ended by signal {-self.code}" + (" (out of memory?)" if self.code == -9 else "")
        said = [line for line in self.stderr.splitlines() if line.strip()] or [f"exit code {self.code}"]
        return said[-1].strip().removeprefix("vmq: error: ") if self.code else None


# `python -m vmq`, which Linux ends together with this process, however that ends
START = ("import ctypes, runpy, sys; sys.platform == 'linux' and ctypes.CDLL(None).prctl(1, 9); "
         "runpy.run_module('vmq', run_name='__main__', alter_sys=True)")


def run_vmq(arguments: Sequence[str]) -> Finished:
    """Run a `vmq` command in a process of its own; KeyboardInterrupt when Ctrl-C ended it."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        started = time.monotonic()
        child = subprocess.Popen([sys.executable, "-c", START, *arguments], stdout=out, stderr=err,
                                 env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)})
        try:
            _, status, usage = os.wait4(child.pid, 0)
        except BaseException:
            child.kill()
            child.wait()
            raise
        child.returncode = code = os.waitstatus_to_exitcode(status)
        seconds = time.monotonic() - started
        if code in (130, -2):
            raise KeyboardInterrupt
        out.seek(0)
        err.seek(0)
        peak = usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
        return Finished(code, out.read(), err.read(), seconds, peak)


class SourceChangedError(VmqError):
    """The project's code is not what it was when the run began."""


class Bench:
    """A model, footage, and what is known about both; computes what is missing.

    Args:
        model: the float network.
        footage: what each kind of calibration footage is; builtin is none.
        evals: what is scored on, by label; the first is the main set.
        work: where records and compiled models are kept.
    """

    def __init__(self, model: Path, footage: Mapping[str, Sequence[Path]], evals: Mapping[str, Path], work: Path,
                 keep_old: bool) -> None:
        self.model, self.footage, self.evals, self.keep_old = model, footage, evals, keep_old
        self.compiles = Store(work / "compiles", keep_old)
        self.scores = Store(work / "evaluations", keep_old)
        self.recipes = work / "recipes"
        self.source = source_version()
        if not model.is_file():
            raise OptionError(f"--model {model} is no file; `vmq fetch rvm -o rvm.onnx` gets one")
        self.sha = _digest(model.read_bytes())
        self._hashes: dict[str, str] = {}
        self._names: dict[str, str] = {}

    # -- looking up ----------------------------------------------------------------------------------

    def job(self, row: Row, effort: str, seed: int) -> Job:
        assert row.recipe is not None
        if row.recipe not in self._names:
            self._names[row.recipe] = same_as_shipped(row.recipe, self.recipes)
        return Job(self._names[row.recipe], row.bits, effort, seed, row.footage)

    def compiled(self, job: Job) -> dict[str, Any] | None:
        return self.compiles.find(job.name, self.parts(job))

    def scored(self, job: Job | None, label: str) -> dict[str, Any] | None:
        """The scores of a compiled model, or of the float network, on a set; None while they are not known."""
        made = self.compiled(job) if job else None
        if job and (made is None or "error" in made):
            return None
        return self.scores.find(*self._evaluation(job, made, label))

    def parts(self, job: Job) -> dict[str, Any]:
        return {"model": self.sha, "options": dataclasses.asdict(job), "recipe": recipe_text(job.recipe),
                "footage": self._hash(self.footage.get(job.footage, ())), "source": self.source}

    def _evaluation(self, job: Job | None, made: Mapping[str, Any] | None, label: str) -> tuple[str, dict[str, Any]]:
        name = f"{job.name if job else 'float'}-on-{re.sub(r'[^A-Za-z0-9_-]+', '_', label)}"
        return name, {"model": made["sha256"] if made else self.sha, "reference": self.sha,
                      "footage": self._hash([self.evals[label]]), "source": self.source}

    def _hash(self, paths: Sequence[Path]) -> str:
        key = " ".join(map(str, paths))
        if key not in self._hashes:
            self._hashes[key] = _footage(paths)
        return self._hashes[key]

    # -- computing -----------------------------------------------------------------------------------

    def missing(self, job: Job | None, labels: Sequence[str]) -> tuple[bool, list[str]]:
        """Whether the model must be compiled, and the sets that it is still to be scored on."""
        made = self.compiled(job) if job else None
        lost = job is not None and (made is None or "error" in made)
        unscored = [e for e in labels if lost or (s := self.scored(job, e)) is None or "error" in s]
        lost = lost or (made is not None and bool(unscored) and not Path(self.compiles.folder / made["file"]).exists())
        return lost, unscored

    def last_time(self, job: Job | None, label: str | None) -> float | None:
        """Seconds that a compile (no label) or an evaluation took when it was last done, with whatever code."""
        store = self.scores if label else self.compiles
        name = self._evaluation(job, None, label)[0] if label else job.name if job else ""
        seconds = [r["seconds"] for r in store.all(name) if "error" not in r and not r.get("resumed")]
        return seconds[-1] if seconds else None

    def compile(self, job: Job) -> str | None:
        """Compile, continuing what was interrupted; an error is kept like a result, and returned."""
        self._check_source()
        parts = self.parts(job)
        output = self.compiles.path(job.name, parts, "onnx")
        output.parent.mkdir(parents=True, exist_ok=True)
        resumed = output.with_name(f"{output.name}.unfinished").exists()
        calib = [str(p) for p in self.footage.get(job.footage, ())]
        done = run_vmq(["compile", str(self.model), "--bits", job.bits, "--recipe",
                        write_recipe(job.recipe, self.recipes), "--effort", job.effort, "--seed", str(job.seed),
                        *(["--calib", *calib] if calib else []), "--resume", "--json", "-q", "-o", str(output)])
        found: dict[str, Any] = {"seconds": done.seconds, "peak": done.peak, "resumed": resumed}
        if done.error:
            found["error"] = done.error
        else:
            found |= {"sha256": _digest(output.read_bytes()), "file": output.name, "compile": json.loads(done.stdout)}
        self.compiles.save(job.name, parts, found)
        return done.error

    def evaluate(self, job: Job | None, label: str) -> str | None:
        """Score a compiled model, or the float network, on a set; an error is kept like a result, and returned."""
        self._check_source()
        made = self.compiled(job) if job else None
        model = str(self.compiles.folder / made["file"] if made else self.model)
        done = run_vmq(["eval", model, str(self.evals[label]), "--reference", str(self.model), "--json", "-q"])
        found: dict[str, Any] = {"seconds": done.seconds}
        if done.error:
            found["error"] = done.error
        else:
            scores = json.loads(done.stdout)["models"][model]
            found |= {"mean": scores["mean"] or {}, "clips": scores["clips"], "fidelity": scores["fidelity"]}
        self.scores.save(*self._evaluation(job, made, label), found)
        return done.error

    def multiply_adds(self, compute: bool) -> int | None:
        """Of one frame, in all; None while it is not known and not to be computed."""
        parts = {"model": self.sha, "source": self.source}
        record = self.scores.find("multiply-adds", parts)
        if record is None and compute:
            record = self.scores.save("multiply-adds", parts, {"count": network_multiply_adds(self.model)})
        return record["count"] if record else None

    def _check_source(self) -> None:
        now = source_version()
        if now != self.source and not self.keep_old:
            raise SourceChangedError("vmq's source changed since this run began, so new rows would not compare with "
                                     "those before; run it again, with --keep-old to mix them")
        self.source = now


# ------------------------------------------------------------------------------------------------ what to compute


def selection(bench: Bench, tables: Sequence[Table], efforts: Sequence[str], seeds: Sequence[int] | None,
              ) -> dict[Job | None, list[str]]:
    """What each compiled model is to be scored on: the float network, then fast before standard, seed by seed."""
    found: dict[Job | None, dict[str, None]] = {}
    for row in (row for table in tables for row in table.rows if row.recipe is None):
        found.setdefault(None, {}).update(dict.fromkeys(_sets(bench, row)))
    pairs = [(e, s) for e in SEEDS if e in efforts for s in SEEDS[e] if seeds is None or s in seeds]
    for effort, seed in pairs:
        for row in (row for table in tables for row in table.rows if row.recipe is not None):
            if labels := _available(bench, row):
                found.setdefault(bench.job(row, effort, seed), {}).update(dict.fromkeys(labels))
    return {job: list(labels) for job, labels in found.items()}


def _sets(bench: Bench, row: Row) -> list[str]:
    labels = list(bench.evals)
    return labels[1:] if row.elsewhere else labels[:1]


def _available(bench: Bench, row: Row) -> list[str]:
    """The sets a row is scored on; none when there is no footage of the kind it is calibrated on."""
    return _sets(bench, row) if row.footage == "builtin" or bench.footage.get(row.footage) else []


def plan(bench: Bench, chosen: Mapping[Job | None, Sequence[str]]) -> list[str]:
    """What would be computed, a line each, and how long that took the last time."""
    lines, total, unknown = [], 0.0, 0
    for job, labels in chosen.items():
        lost, unscored = bench.missing(job, labels)
        for label in ([None] if lost else []) + unscored:
            seconds = bench.last_time(job, label)
            total, unknown = total + (seconds or 0.0), unknown + (seconds is None)
            took = "not done before" if seconds is None else f"{seconds / 60:.1f} min last time"
            lines.append(f"{_what(job, label)}: {took}")
    if not lines:
        return ["nothing to compute: everything chosen is kept"]
    return [*lines, f"{len(lines)} to compute: {total / 60:.1f} min, and {unknown} of unknown length"]


def compute(bench: Bench, chosen: Mapping[Job | None, Sequence[str]], after: Callable[[], None]) -> None:
    """Compute what is missing, one thing after the other; `after` is called after each."""
    work = {job: bench.missing(job, labels) for job, labels in chosen.items()}
    left = sum(lost + len(unscored) for lost, unscored in work.values())
    for job, (lost, unscored) in work.items():
        error = None
        for label in ([None] if lost else []) + unscored:
            if error is None:
                seconds = bench.last_time(job, label)
                took = "" if seconds is None else f", {seconds / 60:.1f} min last time"
                _say(f"{_what(job, label)} ({left} to go{took})")
                error = bench.compile(job) if job and label is None else bench.evaluate(job, str(label))
                if error:
                    _say(f"error: {error}")
                after()
            left -= 1


def _what(job: Job | None, label: str | None) -> str:
    name = "FP32" if job is None else (f"{job.recipe} {Bits.parse(job.bits)} {job.effort}, seed {job.seed}, "
                                       f"on {job.footage}")
    return f"compile {name}" if label is None else f"score {name} against {label}"


def _say(text: str) -> None:
    print(f"tables: {text}", file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------------------- the Markdown


def render(bench: Bench) -> str:
    """All tables, from what is kept."""
    lines = [f"# {bench.model.stem}, compared on {next(iter(bench.evals))}", "", *CAPTION.splitlines()]
    for table in TABLES:
        lines += ["", f"## {table.title}", "", *([*SIZE_CAPTION.splitlines(), ""] if table.size else [])]
        lines += _markdown(_head(table), list(_lines(bench, table)))
        wider = _above_nominal(bench, table)
        lines += ["", *wider] if wider else []
    return "\n".join([*lines, "", _footer(bench)]) + "\n"


def _head(table: Table) -> list[str]:
    return ["", "effort", "seeds", *(["GFLOPs", "MB"] if table.size else []), *MEASURES, "to FP32",
            *(["x MAD", "x dtSSD"] if table.ratio else []), "minutes", "MiB"]


def _lines(bench: Bench, table: Table) -> Iterator[list[str]]:
    for row in table.rows:
        for label in _sets(bench, row):
            shown = f"{row.label} on {label}" if row.elsewhere else row.label
            for effort in SEEDS if row.recipe else ("-",):
                jobs: dict[int, Job | None] = {0: None}
                if row.recipe:
                    seeds = SEEDS[effort] if _available(bench, row) else ()
                    jobs = {seed: bench.job(row, effort, seed) for seed in seeds}
                yield _line(bench, table, row, shown, effort, list(jobs.values()), label)
                for seed, job in jobs.items():
                    for record in (bench.compiled(job) if job else None, bench.scored(job, label)):
                        if record and "error" in record:
                            yield _error(table, [shown, effort, f"seed {seed}" if job else "-"], record["error"])


def _line(bench: Bench, table: Table, row: Row, shown: str, effort: str, jobs: Sequence[Job | None], label: str,
          ) -> list[str]:
    made = [r for job in jobs if job and (r := bench.compiled(job)) and "error" not in r]
    scores = [r for job in jobs if (r := bench.scored(job, label)) and "error" not in r]
    means = [s["mean"] for s in scores if s["mean"]]
    old = " (old)" if any(r.get("old") for r in (*made, *scores)) else ""
    cells = [shown + old, effort, f"{len(scores)}" if row.recipe and scores else "-"]
    if table.size:
        adds = bench.multiply_adds(compute=False)
        bits = Bits.parse(row.bits) if row.recipe else None
        smaller = 1.0 if bits is None else saving(bits.weights, bits.activations)
        sizes = [r["compile"]["size_bytes"] for r in made] if row.recipe else [bench.model.stat().st_size]
        cells += [f"{adds / smaller / 1e9:.2f}" if adds else "-", _mean([s / 1e6 for s in sizes], spread=False)]
    cells += [_mean([m[name] for m in means], digits=3 if name == "F" else 2) for name in MEASURES]
    cells.append(_mean([s["fidelity"]["MAD"] for s in scores]) if row.recipe else "-")
    if table.ratio:
        base = (bench.scored(None, label) or {}).get("mean") or {}
        cells += [_mean([m[name] / base[name] for m in means if base.get(name)]) for name in ("MAD", "dtSSD")]
    after = "≥ " if any(r["resumed"] for r in made) else ""
    cells += [after + _mean([r["seconds"] / 60 for r in made], 1, spread=False) if made else "-",
              f"{max(r['peak'] for r in made):.0f}" if made else "-"]
    return cells


def _error(table: Table, cells: list[str], error: str) -> list[str]:
    cells = [*cells, *(["", ""] if table.size else []), f"error: {' '.join(error.split())}"]
    return cells + [""] * (len(_head(table)) - len(cells))


def _mean(values: Sequence[float], digits: int = 2, *, spread: bool = True) -> str:
    if not values:
        return "-"
    text = f"{statistics.fmean(values):.{digits}f}"
    return f"{text} ± {statistics.stdev(values):.{digits}f}" if spread and len(values) > 1 else text


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |" for cells in (head, *rows)]
    return [lines[0], f"|---|---|{'---:|' * (len(head) - 2)}", *lines[1:]]


def _above_nominal(bench: Bench, table: Table) -> list[str]:
    """What stayed above nominal bits, said once for all rows that agree."""
    groups: dict[str, dict[str, None]] = {}
    for row in (row for row in table.rows if row.recipe and _available(bench, row)):
        for job in (bench.job(row, effort, seed) for effort in SEEDS for seed in SEEDS[effort]):
            record = bench.compiled(job)
            if record and "error" not in record:
                wider = record["compile"]["passes"]["insert_qdq"]["report"]["wider"]
                text = ", ".join(f"{name} {bits}" for name, bits in wider.items()) or "nothing"
                groups.setdefault(f"Above {Bits.parse(row.bits)}: {text}", {})[row.label] = None
    return [f"- {text} ({'; '.join(labels)})" for text, labels in groups.items()]


def _footer(bench: Bench) -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("vmq", "onnxruntime", "torch"))
    return (f"{date.today().isoformat()}; {processor()}, {cores} cores; {versions}, Python "
            f"{platform.python_version()}; source {bench.source[:12]}, model {bench.sha[:12]}.")


# ---------------------------------------------------------------------------------------------------- command line


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    try:
        tables = [table for table in TABLES if not args.only or table.name in args.only]
        unlabelled = [p for p in UNLABELLED if p.exists()] if args.unlabelled is None else args.unlabelled
        footage = {"calib": [p.resolve() for p in args.calib], "unlabelled": [p.resolve() for p in unlabelled]}
        bench = Bench(args.model.resolve(), footage, _labelled(args.eval or [SHARED / "vm-mini" / "eval"]),
                      args.work.resolve(), args.keep_old)
        chosen = selection(bench, tables, args.effort, args.seeds)
        if args.plan:
            print("\n".join(plan(bench, chosen)))
            return 0
        output = args.output or args.work / "tables.md"
        output.parent.mkdir(parents=True, exist_ok=True)
        compute(bench, chosen, lambda: write_atomic(output, render(bench).encode()))
        # Last, because a child's peak memory counts what its parent held when it was started.
        bench.multiply_adds(compute=any(table.size for table in tables))
        text = render(bench)
        write_atomic(output, text.encode())
        print(text, end="")
        _say(f"wrote {output}")
    except (VmqError, OSError) as error:
        _say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        _say("interrupted; the same command continues")
        return 130
    return 0


def _labelled(paths: Sequence[Path]) -> dict[str, Path]:
    """Sets by what tables call them: the folder's name, with its parent's where two have the same."""
    found = [p.resolve() for p in paths]
    names = [p.name for p in found]
    return {p.name if names.count(p.name) == 1 else f"{p.parent.name}/{p.name}": p for p in found}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tables", description=(__doc__ or "").partition("\n\n")[0])
    add = parser.add_argument
    add("--model", type=Path, default=Path("rvm.onnx"), help="the float network (default: rvm.onnx here)")
    add("--calib", type=Path, nargs="+", default=[SHARED / "vm-mini" / "calib"], metavar="PATH",
        help="footage with alpha to calibrate on (default: the development data)")
    add("--unlabelled", type=Path, nargs="+", metavar="PATH", help="footage without alpha to calibrate on")
    add("--eval", type=Path, action="append", metavar="DIR",
        help="what is scored on; a second and further ones are shown at the end of the table of footage")
    add("--work", type=Path, default=ROOT / "out" / "tables", metavar="DIR",
        help="where results and compiled models are kept (default: out/tables)")
    add("--only", nargs="+", choices=[table.name for table in TABLES], metavar="NAME",
        help=f"tables to compute: {', '.join(table.name for table in TABLES)}; the others show what is kept")
    add("--effort", nargs="+", choices=list(SEEDS), default=list(SEEDS), help="efforts to compute")
    add("--seeds", nargs="+", type=int, metavar="N", help="seeds to compute")
    add("--keep-old", action="store_true", help="accept results of other code or options, and mark them")
    add("--plan", action="store_true", help="only say what would be computed, and how long it took last time")
    add("-o", "--output", type=Path, metavar="FILE", help="default: tables.md in --work")
    return parser


if __name__ == "__main__":
    sys.exit(main())
