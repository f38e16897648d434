"""What people use today to quantize a video-matting network, beside vmq: one table, from one command.

Every peer runs in an environment of its own, made at first use. All get the same float network, the same frames
(recorded in closed loop: each with the states that the float network had then) and the same evaluation: `vmq eval`,
in closed loop with the quantized network's own states, and one `vmq bench` of all models in turn. What fails is a row
with its error. Every row is kept as a JSON file, so a run that was stopped continues.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from check_targets import environment
from comparison.bench import Store, run_vmq, source_version
from comparison.footage import Given, digest
from comparison.markdown import markdown
from comparison.mending import mend
from comparison.rows import ROOT

from vmq.bench import bench, processor
from vmq.clips import open_clips, sample_clips
from vmq.errors import ModelError, OptionError, VmqError
from vmq.files import write_atomic
from vmq.runtime import Session
from vmq.spec import EFFORTS, Bits

SHARED = ROOT.parent / "shared" / "data"
SCRIPTS = Path(__file__).with_name("peer_scripts")
RUNNER = SCRIPTS / "quantize.py"
SETUP_MINUTES = 60.0
"""How long an environment may take to be made."""

# ------------------------------------------------------------------------------------------------- what is compared


@dataclass(frozen=True)
class Peer:
    """A tool.

    Attributes:
        name: what the table calls it.
        script: tools/peer_scripts/with_SCRIPT.py.
        packages: what its environment holds, the tool itself first, as NAME==VERSION.
        variants: what `script` is asked for, and what the table says of it.
    """

    name: str
    script: str
    packages: tuple[str, ...]
    variants: Mapping[str, str]

    @property
    def package(self) -> str:
        """Name of the tool's package; also of its environment, and what --only takes."""
        return self.packages[0].partition("==")[0]

    @property
    def version(self) -> str:
        return self.packages[0].partition("==")[2]


RUNTIME, TORCH = "onnxruntime==1.31.1", "torch==2.13.0"
PEERS: tuple[Peer, ...] = (
    Peer("ONNX Runtime quantize_static", "onnxruntime", (RUNTIME, "onnx==1.23.0"), {
        "u8s8": "U8S8, MinMax, per channel", "w4a8": "W4A8, MinMax, per channel", "w4a4": "W4A4, MinMax, per channel"}),
    Peer("NNCF", "nncf", ("nncf==3.4.0", "onnx", RUNTIME), {"default": "default preset", "mixed": "mixed preset"}),
    Peer("AMD Quark", "quark", ("amd-quark==0.13", RUNTIME, TORCH), {
        "u8s8": "U8S8, MinMax, per channel", "A8W8": "A8W8 preset",
        "u8s8-adaround-16-200": "U8S8, AdaRound, 16 frames, 200 iterations a layer"}),
    Peer("AIMET-ONNX", "aimet", ("aimet-onnx==2.42.0", TORCH), {
        "w8a8": "W8A8", "w4a8": "W4A8", "w4a4": "W4A4", "w4a8-seqmse-16": "W4A8, SeqMSE, 16 frames",
        "w4a8-adaround-16-200": "W4A8, AdaRound, 16 frames, 200 iterations a layer"}),
    Peer("ESP-PPQ", "ppq", ("esp-ppq==1.3.12", TORCH), {"esp_ppq": "default, opset mended"}),
    Peer("PPQ", "ppq", ("ppq==0.6.6", TORCH), {"ppq": "default"}),
    Peer("onnx-neural-compressor", "onnx_neural_compressor", ("onnx-neural-compressor==1.0", "prettytable", "scipy"), {
        "default": "default; prettytable and scipy added, without which it does not import"}),
    Peer("Olive", "olive", ("olive-ai==0.13.0", "requests", RUNTIME, TORCH), {
        "u8s8": "OnnxStaticQuantization, U8S8, per channel; requests added, without which it does not import"}),
    Peer("onnxruntime-tools", "onnxruntime_tools", ("onnxruntime-tools==1.7.0",), {"default": "default"}),
)


@dataclass(frozen=True)
class Row:
    """A line of the table, but for the float network's: what to call it, and where its model comes from.

    Attributes:
        key: name of its records.
        peer, variant: who makes the model; None for vmq.
        bits: of a model that vmq compiles here.
        file: a model that is there already.
    """

    key: str
    tool: str
    version: str
    settings: str
    peer: Peer | None = None
    variant: str = ""
    bits: str = ""
    file: Path | None = None


def rows(only: Sequence[str], ours: Sequence[Path] | None, bits: Sequence[str], effort: str) -> list[Row]:
    """The rows that are asked for: peers whose package is in `only` (all if empty), then vmq's own."""
    known = {p.package for p in PEERS}
    if unknown := [name for name in only if name not in known]:
        raise OptionError(f"--only {unknown[0]} is no peer; give some of {', '.join(sorted(known))}")
    found = [Row(f"{peer.package}-{variant}", peer.name, peer.version, settings, peer, variant)
             for peer in PEERS if not only or peer.package in only for variant, settings in peer.variants.items()]
    version = importlib.metadata.version("vmq")
    if ours is not None:
        return found + [Row(f"vmq-{path.stem}", "vmq", version, path.name, file=path) for path in ours]
    return found + [Row(f"vmq-{Bits.parse(b)}-{effort}".lower(), "vmq", version,
                        f"{Bits.parse(b)}, --effort {effort}", bits=b) for b in bits]


# ---------------------------------------------------------------------------------------------------- computing it


class Comparison:
    """A float network, footage, and what is known of each row.

    Args:
        model: the float network, of a fixed size.
        calib: footage to calibrate on, of which at most `frames` frames are used.
        evaluation: a set with known alpha.
        cache: where environments are kept.
        work: where records and models are kept.
        limit: minutes that a peer may take for a row.
        effort: of vmq's compiles.
    """

    def __init__(self, model: Path, calib: Sequence[Path], frames: int, evaluation: Path, cache: Path, work: Path,
                 limit: float, effort: str) -> None:
        if not model.is_file():
            raise OptionError(f"--model {model} is no file; `vmq fetch rvm -o rvm.onnx` gets one")
        self.model, self.calib, self.evaluation, self.cache, self.work = model, calib, evaluation, cache, work
        self.frames, self.limit, self.effort = frames, limit, effort
        self.sha = digest(model.read_bytes())
        self.source = source_version()
        self.made, self.scores, self.times = (Store(work / name, keep_old=False)
                                              for name in ("models", "evaluations", "benches"))
        self.calib_hash, self.eval_hash = Given(calib).key, Given([evaluation]).key
        self._broken: dict[str, str] = {}

    # -- making models -------------------------------------------------------------------------------

    def parts(self, row: Row) -> dict[str, Any]:
        """Everything that decides a row's model."""
        found: dict[str, Any] = {"model": self.sha, "footage": self.calib_hash}
        if row.peer:
            scripts = [RUNNER, SCRIPTS / "frames.py", SCRIPTS / f"with_{row.peer.script}.py"]
            return found | {"frames": self.frames, "packages": list(row.peer.packages), "variant": row.variant,
                            "script": digest(b"".join(path.read_bytes() for path in scripts)),
                            "python": platform.python_version()}
        if row.file:
            return {"file": digest(row.file.read_bytes())}
        return found | {"bits": row.bits, "effort": self.effort, "source": self.source}

    def record(self, row: Row) -> dict[str, Any] | None:
        """What is known of a row's model: its file, or its error; None while nothing is, or its file is gone."""
        found = self.made.find(row.key, self.parts(row))
        if found and found.get("stopped") and found["limit"] < self.limit:
            return None
        return found if found is None or "error" in found or self.path(found).is_file() else None

    def path(self, record: Mapping[str, Any]) -> Path:
        return self.made.folder / str(record["file"])

    def make(self, row: Row) -> None:
        """Make a row's model; an error is kept like a result."""
        parts = self.parts(row)
        output = self.made.path(row.key, parts, "onnx")
        output.parent.mkdir(parents=True, exist_ok=True)
        if row.file:
            shutil.copyfile(row.file, output)
            found: dict[str, Any] = {}
        elif row.peer:
            found = self._quantize(row.peer, row.variant, output)
        else:
            done = run_vmq(["compile", str(self.model), "--bits", row.bits, "--effort", self.effort, "--calib",
                            *map(str, self.calib), "--json", "-q", "-o", str(output)])
            found = {"seconds": done.seconds} | ({"error": done.error} if done.error else {})
        if "error" not in found:
            found |= {"file": output.name, "sha256": digest(output.read_bytes())}
        self.made.save(row.key, parts, found)

    def _quantize(self, peer: Peer, variant: str, output: Path) -> dict[str, Any]:
        home = self.cache / "peers" / peer.package
        error = self._broken.get(peer.package)
        if error is None:
            home.mkdir(parents=True, exist_ok=True)
            try:
                python = environment(home, peer.packages, SETUP_MINUTES * 60)
            except (subprocess.SubprocessError, OSError) as raised:
                said = (getattr(raised, "stderr", None) or str(raised)).strip().splitlines()
                error = self._broken[peer.package] = f"does not install: {said[-1] if said else raised}"
        if error is not None:
            return {"error": error, "seconds": None}
        found = run_peer(python, peer.script, variant, self.model, self.recorded(), output, self.limit * 60)
        if "error" not in found:
            try:
                mend(output, self.model)
            except ModelError as raised:
                found["error"] = str(raised)
        return found

    def recorded(self) -> Path:
        """The folder of calibration frames, an .npz each; recorded if they are not there yet."""
        folder = self.work / "frames" / digest(f"{self.sha} {self.calib_hash} {self.frames}".encode())[:16]
        if not folder.is_dir():
            _say("recording calibration frames with the float network's states")
            unfinished = folder.with_suffix(".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            record_frames(self.model, self.calib, self.frames, unfinished)
            unfinished.rename(folder)
        return folder

    # -- measuring them ------------------------------------------------------------------------------

    def scored(self, row: Row | None) -> dict[str, Any] | None:
        """The scores of a row's model, or of the float network; None while they are not known."""
        sha = self._sha(row)
        return None if sha is None else self.scores.find(*self._evaluation(row, sha))

    def score(self, row: Row | None) -> None:
        """Score a row's model, or the float network; an error is kept like a result."""
        sha, made = self._sha(row), self.record(row) if row else None
        assert sha is not None
        path = str(self.path(made) if made else self.model)
        done = run_vmq(["eval", path, str(self.evaluation), "--reference", str(self.model), "--json", "-q"])
        found: dict[str, Any] = {"seconds": done.seconds}
        if done.error:
            found["error"] = f"{'does not run: ' if row else ''}{done.error.removeprefix(f'{path}: ')}"
        else:
            scores = json.loads(done.stdout)["models"][path]
            found |= {"mean": scores["mean"], "clips": scores["clips"], "fidelity": scores["fidelity"]}
        self.scores.save(*self._evaluation(row, sha), found)

    def timed(self, chosen: Sequence[Row], threads: int, runs: int, *, compute: bool) -> dict[str, Any] | None:
        """What one bench of all models that run found, by row ("" is the float network); None if it is not known."""
        paths = {"": self.model}
        for row in chosen:
            scores, made = self.scored(row), self.record(row)
            if scores and made and "error" not in scores:
                paths[row.key] = self.path(made)
        parts = {"models": {key: digest(path.read_bytes()) for key, path in paths.items()}, "threads": threads,
                 "runs": runs, "runtime": ort.__version__, "source": self.source, "processor": processor()}
        found = self.times.find(f"threads-{threads}", parts)
        if found is None and compute:
            _say(f"timing {len(paths)} models in turn, threads: {threads}")
            result = bench([str(path) for path in paths.values()], baseline=str(self.model), threads=threads,
                           runs=runs)
            models = {}
            for key, path in paths.items():
                model = result.models[str(path)]
                models[key] = {
                    "speedup": result.speedup(str(path)), "median_ms": float(np.median(model.times)),
                    "integer_share": model.share("integer"),
                    "fused": sum(k.op in ("QLinearConv", "ConvInteger") for k in model.kernels)}
            found = self.times.save(f"threads-{threads}", parts, {"models": models})
        return found["models"] if found else None

    def _sha(self, row: Row | None) -> str | None:
        if row is None:
            return self.sha
        made = self.record(row)
        return None if made is None or "error" in made else str(made["sha256"])

    def _evaluation(self, row: Row | None, sha: str) -> tuple[str, dict[str, Any]]:
        return row.key if row else "float", {
            "model": sha, "reference": self.sha, "footage": self.eval_hash, "source": self.source,
            "runtime": ort.__version__}


def run_peer(python: Path, script: str, variant: str, model: Path, frames: Path, output: Path, limit: float,
             ) -> dict[str, Any]:
    """Let a peer make its model, in its environment: seconds that it took, versions, and the error if there was one.

    Args:
        python: of the environment.
        script, variant: of the peer.
        model: the float network.
        frames: folder of recorded frames.
        output: what the peer is to write; what it prints goes to a .log beside it.
        limit: seconds; a peer that takes longer is ended, with all that it started.
    """
    report = Path(f"{output}.json")
    report.unlink(missing_ok=True)
    output.unlink(missing_ok=True)
    folder = output.with_suffix(".work")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    started, stopped = time.monotonic(), False
    with output.with_suffix(".log").open("wb") as log:
        child = subprocess.Popen(
            [python.absolute(), RUNNER, script, variant, model.resolve(), frames.resolve(), output.resolve()],
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, cwd=folder,
            env={k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")})
        try:
            child.wait(limit)
        except subprocess.TimeoutExpired:
            stopped = True
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    found: dict[str, Any] = {"seconds": time.monotonic() - started, "limit": limit / 60}
    shutil.rmtree(folder, ignore_errors=True)
    if stopped:
        return found | {"stopped": True, "error": f"not finished within {limit / 60:g} min"}
    try:
        told = json.loads(report.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        code = child.returncode
        return found | {"error": f"ended by signal {-code}" + (" (out of memory?)" if code == -9 else "")
                        if code < 0 else f"ended with exit code {code}; see {log.name}"}
    report.unlink()
    return found | {"versions": told["versions"]} | ({"error": told["error"]} if told["error"] else {})


def record_frames(model: Path, calib: Sequence[Path], count: int, folder: Path) -> None:
    """Write the network's inputs at each of at most `count` frames of the footage, an .npz each.

    The frames are those that `vmq compile` would take as so many; states run through each clip from zero.
    """
    session = Session(str(model))
    height, width = session.size
    if not height or not width:
        raise ModelError(f"{model} takes any size, and most peers take none such; give one of a fixed size")
    clips = open_clips(calib, (height, width))
    number = 0
    for clip in sample_clips(clips, count, stretch=min(32, max(8, count // len(clips)))):
        session.reset()
        for frame in clip.frames():
            np.savez(folder / f"{number:05}.npz", **session.feeds(frame))
            session.step(frame)
            number += 1


# ----------------------------------------------------------------------------------------------------- the Markdown

HEAD = ("tool", "version", "variant", "result", "minutes", "MB", "MAD", "dtSSD", "to FP32", "speed, 1 thread",
        "speed, 2 threads", "convs in int8", "integer share")
CAPTION = """\
The same float network, the same calibration frames with the states it had then, the same clips in closed loop.
MAD x 1e3 and dtSSD x 1e2 to the true alpha, means over the clips, the first frame of each counted as 0 in dtSSD as in
the paper; to FP32: MAD x 1e3 to the float network's mattes. Minutes on {cores} cores; learned rounding had {limit:g}
minutes like every row. Speed: as multiples of FP32's, all models in turn in one run. Convs in int8: convolutions that
the runtime fuses into integer kernels; integer share: of the run time on one thread."""


def render(comparison: Comparison, chosen: Sequence[Row], runs: int) -> str:
    """The table, from what is kept."""
    caption = CAPTION.format(cores=_cores(), limit=comparison.limit)
    times = [comparison.timed(chosen, threads, runs, compute=False) or {} for threads in (1, 2)]
    base = comparison.scored(None)
    lines = [_line(["FP32", "", "", ""], {"seconds": None}, comparison.model, base, [t.get("") for t in times])]
    for row in chosen:
        made = comparison.record(row)
        names = [row.tool, row.version, row.settings]
        if made is None:
            lines.append([*names, "not computed", *[""] * (len(HEAD) - 4)])
            continue
        scores = comparison.scored(row)
        error = made.get("error") or (scores or {}).get("error")
        if error and "error" in made:
            lines.append([*names, error, _minutes(made), *[""] * (len(HEAD) - 5)])
        else:
            lines.append(_line([*names, error or "worked"], made, comparison.path(made),
                               None if error else scores, [t.get(row.key) for t in times]))
    return "\n".join([caption, "", *markdown(HEAD, lines, left=4), "", _footer(comparison)]) + "\n"


def _line(names: list[str], made: Mapping[str, Any], path: Path, scores: Mapping[str, Any] | None,
          times: Sequence[Mapping[str, Any] | None]) -> list[str]:
    cells = [*names, _minutes(made), f"{path.stat().st_size / 1e6:.2f}"]
    if scores is None or "error" in scores:
        cells += ["", "", ""]
    else:
        mean = scores["mean"] or {}
        cells += [f"{mean[name]:.2f}" if name in mean else "-" for name in ("MAD", "dtSSD")]
        cells.append(f"{scores['fidelity']['MAD']:.2f}")
    cells += [f"{found['speedup']:.2f} x" if found else "" for found in times]
    first = times[0]
    return [*cells, *([str(first["fused"]), f"{first['integer_share']:.0%}"] if first else ["", ""])]


def _minutes(made: Mapping[str, Any]) -> str:
    return "-" if made.get("seconds") is None else f"{made['seconds'] / 60:.1f}"


def _footer(comparison: Comparison) -> str:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("vmq", "onnxruntime", "onnx"))
    height, width = Session(str(comparison.model)).size
    return (f"{date.today().isoformat()}; {processor()}, {_cores()} cores; scored and timed with {versions}, Python "
            f"{platform.python_version()}; {comparison.model.name} {width}x{height} ({comparison.sha[:12]}), "
            f"{comparison.frames} frames at most.")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---------------------------------------------------------------------------------------------------- command line


def compute(comparison: Comparison, chosen: Sequence[Row], retry: bool) -> Iterator[None]:
    """Compute what is missing, one thing after the other; yields after each."""
    if (scores := comparison.scored(None)) is None or "error" in scores:
        _say("scoring FP32")
        comparison.score(None)
        yield
    for number, row in enumerate(chosen, 1):
        made = comparison.record(row)
        if made is None or (retry and "error" in made):
            _say(f"{row.tool}, {row.settings} ({number} of {len(chosen)})")
            comparison.make(row)
            yield
            made = comparison.record(row)
        if made and "error" in made:
            _say(f"{row.tool}, {row.settings}: {made['error']}")
        elif (scores := comparison.scored(row)) is None or (retry and "error" in scores):
            comparison.score(row)
            yield


def _say(text: str) -> None:
    print(f"peers: {text}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    try:
        for name in ("frames", "limit", "runs"):
            if getattr(args, name) <= 0:
                raise OptionError(f"--{name} {getattr(args, name)}: give more than 0")
        comparison = Comparison(args.model.resolve(), [p.resolve() for p in args.calib], args.frames,
                                args.eval.resolve(), args.cache.expanduser().resolve(), args.work.resolve(),
                                args.limit, args.effort)
        chosen = rows(args.only, args.ours, args.bits, args.effort)
        output = args.output or args.work / "peers.md"
        output.parent.mkdir(parents=True, exist_ok=True)
        for _ in compute(comparison, chosen, args.retry):
            write_atomic(output, render(comparison, chosen, args.runs).encode())
        for threads in (1, 2):
            comparison.timed(chosen, threads, args.runs, compute=True)
        text = render(comparison, chosen, args.runs)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="peers", description=(__doc__ or "").partition("\n\n")[0])
    add = parser.add_argument
    add("--model", type=Path, default=Path("rvm.onnx"), help="the float network, of a fixed size (default: rvm.onnx)")
    add("--calib", type=Path, nargs="+", default=[SHARED / "vm-mini" / "calib"], metavar="PATH",
        help="footage to calibrate on (default: the development data)")
    add("--frames", type=int, default=256, metavar="N", help="of it that are used, at most (default: 256)")
    add("--eval", type=Path, default=SHARED / "vm-mini" / "eval", metavar="DIR", help="footage with alpha to score on")
    add("--only", nargs="+", default=[], metavar="PEER",
        help=f"peers to run: {', '.join(peer.package for peer in PEERS)} (default: all)")
    ours = parser.add_mutually_exclusive_group()
    ours.add_argument("--ours", type=Path, nargs="*", metavar="FILE",
                      help="models that vmq compiled, instead of compiling some")
    ours.add_argument("--bits", nargs="+", default=["8", "w4a8", "4"], metavar="BITS",
                      help="what vmq compiles (default: 8 w4a8 4)")
    add("--effort", choices=list(EFFORTS), default="standard", help="of vmq's compiles (default: standard)")
    add("--limit", type=float, default=30.0, metavar="MINUTES", help="that a row of a peer may take (default: 30)")
    add("--runs", type=int, default=50, metavar="N", help="rounds of the timing (default: 50)")
    add("--retry", action="store_true", help="compute rows that failed once more")
    add("--cache", type=Path, default=Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "vmq", metavar="DIR",
        help="where environments are kept (default: ~/.cache/vmq)")
    add("--work", type=Path, default=ROOT / "out" / "peers", metavar="DIR",
        help="where results and models are kept (default: out/peers)")
    add("-o", "--output", type=Path, metavar="FILE", help="default: peers.md in --work")
    return parser


if __name__ == "__main__":
    sys.exit(main())
