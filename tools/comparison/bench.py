"""What is kept, and what is computed: records of compiles and evaluations, each a `vmq` command of its own.

Every compile and every evaluation is a process of its own, so that time and peak memory are its own. What it found is
kept as one JSON file under a key made of everything that decides it; what is there is not computed again.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comparison.footage import Footage, Given, digest, moving_stills, resized
from comparison.rows import ROOT, Job, Row, recipe_text, same_as_shipped, write_recipe
from vmq.cost import cost_of
from vmq.errors import OptionError, VmqError
from vmq.files import write_atomic
from vmq.graph import Graph
from vmq.runtime import Session


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
        return self.folder / f"{name}.{digest(json.dumps(parts, sort_keys=True).encode())[:16]}.{suffix}"


def _read(path: Path) -> dict[str, Any] | None:
    with contextlib.suppress(OSError, ValueError):
        record = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(record, dict) and {"name", "parts", "time"} <= record.keys():
            return record
    return None


def source_version() -> str:
    """A hash over the code and the recipes that decide what a compile gives."""
    files = [p for pattern in ("vmq/*.py", "passes/*.py", "vmq/recipes/*.toml") for p in sorted(ROOT.glob(pattern))]
    return digest("".join(f"{p.relative_to(ROOT)} {digest(p.read_bytes())}\n" for p in files).encode())


def network_multiply_adds(model: Path) -> int:
    """Multiply-adds of a model file at the size it is compiled for."""
    from passes import PIPELINE
    from vmq.pipeline import Context, run_passes
    from vmq.spec import Options

    graph = Graph.load(model)
    run_passes(graph, PIPELINE[:[p.name for p in PIPELINE].index("fold_shapes") + 1], Context(Options()))
    return cost_of(graph).multiply_adds


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


STILLS, CLIPS = "stills with motion", "clips without alpha"
"""Sets made of what --stills and --clips name."""
SIZE = (288, 512)
"""(height, width) that `vmq compile` binds free sizes to."""


@dataclass(frozen=True)
class TestSet:
    """What is scored on, and the float network that it is scored with.

    Attributes:
        footage: frames of the size that the network takes.
        network: the float network.
        ratio: its downsample ratio, where it takes one and the size alone does not tell.
    """

    footage: Footage
    network: Path
    ratio: float | None = None


class Bench:
    """A network, footage, and what is known about both; computes what is missing.

    Args:
        model: the float network.
        footage: what each kind of calibration footage is; builtin is none.
        evals: what is scored on, by label; the first is the main set.
        work: where records, compiled models and made footage are kept.
        keep_old: as `Store` takes it.
        dynamic: the float network with free sizes; None: `model`, where its sizes are free.
        stills: pictures with alpha, or clips with alpha; without any there is no set of stills.
        clips: without alpha; without any there is no set of them.
    """

    def __init__(self, model: Path, footage: Mapping[str, Footage], evals: Mapping[str, Path], work: Path,
                 keep_old: bool, dynamic: Path | None = None, stills: Sequence[Path] = (), clips: Sequence[Path] = (),
                 ) -> None:
        self.model, self.footage, self.keep_old = model, footage, keep_old
        self.compiles = Store(work / "compiles", keep_old)
        self.scores = Store(work / "evaluations", keep_old)
        self.recipes, self.made = work / "recipes", work / "footage"
        self.source = source_version()
        if not model.is_file():
            raise OptionError(f"--model {model} is no file; `vmq fetch rvm -o rvm.onnx` gets one")
        height, width = Session(model).size
        self.dynamic = dynamic or (model if height is None or width is None else None)
        self.stills, self.clips = Given(stills), Given(clips)
        self._shas: dict[Path, str] = {}
        self._names: dict[str, str] = {}
        self._sets = {label: TestSet(Given([path]), model) for label, path in evals.items()}
        self.main, *self.elsewhere = self._sets
        size = height or SIZE[0], width or SIZE[1]
        if stills:
            self._sets[STILLS] = TestSet(moving_stills(self.stills, size, self.made), model)
        if clips:
            self._sets[CLIPS] = TestSet(resized(self.clips, size, self.made), model)

    @property
    def sha(self) -> str:
        """Of the float network."""
        return self._sha(self.model)

    # -- looking up ----------------------------------------------------------------------------------

    def job(self, row: Row, effort: str, seed: int) -> Job:
        assert row.recipe is not None
        if row.recipe not in self._names:
            self._names[row.recipe] = same_as_shipped(row.recipe, self.recipes)
        return Job(self._names[row.recipe], row.bits, effort, seed, row.footage, row.size, row.ratio)

    def sets(self, row: Row) -> list[str]:
        """Labels of the sets that a row is scored on; none when there is no footage or network for it."""
        if row.footage != "builtin" and row.footage not in self.footage:
            return []
        labels = {"eval": [self.main], "elsewhere": self.elsewhere, "stills": [STILLS], "clips": [CLIPS]}[row.on]
        labels = [label for label in labels if label in self._sets]
        return [self._sized(label, row) for label in labels if self.dynamic] if row.size else labels

    def _sized(self, label: str, row: Row) -> str:
        """The label of a set at the size of a row."""
        assert self.dynamic is not None
        width, height = (int(n) for n in row.size.split("x"))
        sized = f"{label} at {row.size}"
        if sized not in self._sets:
            source = self._sets[label].footage
            made = (moving_stills(self.stills, (height, width), self.made) if label == STILLS else
                    resized(source if isinstance(source, Given) else self.clips, (height, width), self.made))
            self._sets[sized] = TestSet(made, self.dynamic, row.ratio)
        return sized

    def compiled(self, job: Job) -> dict[str, Any] | None:
        return self.compiles.find(job.name, self.parts(job))

    def scored(self, job: Job | None, label: str) -> dict[str, Any] | None:
        """The scores of a compiled model, or of the float network, on a set; None while they are not known."""
        made = self.compiled(job) if job else None
        if job and (made is None or "error" in made):
            return None
        return self.scores.find(*self._evaluation(job, made, label))

    def parts(self, job: Job) -> dict[str, Any]:
        footage = self.footage[job.footage] if job.footage != "builtin" else Given(())
        return {"model": self._sha(self._network(job)), "options": job.options, "recipe": recipe_text(job.recipe),
                "footage": footage.key, "source": self.source}

    def _network(self, job: Job) -> Path:
        """The float network that is compiled."""
        return self.dynamic if job.size and self.dynamic else self.model

    def _evaluation(self, job: Job | None, made: Mapping[str, Any] | None, label: str) -> tuple[str, dict[str, Any]]:
        name = f"{job.name if job else 'float'}-on-{re.sub(r'[^A-Za-z0-9_-]+', '_', label)}"
        on = self._sets[label]
        reference = self._sha(on.network)
        parts = {"model": made["sha256"] if made else reference, "reference": reference, "footage": on.footage.key,
                 "source": self.source}
        return name, parts | ({"ratio": on.ratio} if on.ratio else {})

    def _sha(self, path: Path) -> str:
        if path not in self._shas:
            self._shas[path] = digest(path.read_bytes())
        return self._shas[path]

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
        calib = [] if job.footage == "builtin" else [str(p) for p in self.footage[job.footage].ready()]
        done = run_vmq(["compile", str(self._network(job)), "--bits", job.bits, "--recipe",
                        write_recipe(job.recipe, self.recipes), "--effort", job.effort, "--seed", str(job.seed),
                        *(["--size", job.size] if job.size else []), *_ratio(job.ratio),
                        *(["--calib", *calib] if calib else []), "--resume", "--json", "-q", "-o", str(output)])
        found: dict[str, Any] = {"seconds": done.seconds, "peak": done.peak, "resumed": resumed}
        if done.error:
            found["error"] = done.error
        else:
            found |= {"sha256": digest(output.read_bytes()), "file": output.name, "compile": json.loads(done.stdout)}
        self.compiles.save(job.name, parts, found)
        return done.error

    def evaluate(self, job: Job | None, label: str) -> str | None:
        """Score a compiled model, or the float network, on a set; an error is kept like a result, and returned."""
        self._check_source()
        made = self.compiled(job) if job else None
        on = self._sets[label]
        model, [footage] = str(self.compiles.folder / made["file"] if made else on.network), on.footage.ready()
        done = run_vmq(["eval", model, str(footage), "--reference", str(on.network), *_ratio(on.ratio), "--json", "-q"])
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


def _ratio(ratio: float | None) -> list[str]:
    return ["--downsample-ratio", f"{ratio:g}"] if ratio else []
