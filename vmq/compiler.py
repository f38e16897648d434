"""From a float model to a quantized one: what `vmq compile` does, as a function."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch

from passes import PIPELINE
from passes.bind_shapes import BindShapes, frame_size
from vmq import __version__, processes
from vmq.checkpoint import Checkpoint
from vmq.clips import Clip, fingerprint, open_clips, sample_clips
from vmq.dump import Dump
from vmq.errors import MediaError, OptionError, OutputError
from vmq.files import check_output
from vmq.graph import Graph
from vmq.lanes import check_device
from vmq.lock import locked
from vmq.pipeline import Context, Observer, Pass, PassResult, run_passes
from vmq.proto import file_size
from vmq.recipe import Recipe
from vmq.report import chosen_lines
from vmq.runtime import NORMALIZATION_KEY, Session, check_first_alpha
from vmq.spec import EFFORTS, Effort, Options, parse_bits, parse_normalization
from vmq.synthetic import synthetic_clips
from vmq.targets import TARGETS


@dataclass(frozen=True)
class Result:
    """What a compile made.

    Attributes:
        graph: the quantized model.
        path: the file it was written to, if any.
        results: what each pass did, by its name, in order.
        size_bytes: size of the quantized model as a file.
        input_bytes: size of the model that went in, as a file, with its external data.
        frames: how many frames it was calibrated on, of how many given.
        synthetic: True when the built-in clips were used for want of footage.
        squeezed: names of calibration clips of another shape than the model's frames.
    """

    graph: Graph
    path: Path | None
    results: Mapping[str, PassResult]
    size_bytes: int
    input_bytes: int
    frames: tuple[int, int]
    synthetic: bool
    squeezed: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The result in plain JSON types."""
        return {"path": str(self.path) if self.path else None, "size_bytes": self.size_bytes,
                "input_bytes": self.input_bytes, "metadata": self.graph.metadata, "frames": list(self.frames),
                "synthetic": self.synthetic,
                "squeezed": list(self.squeezed),
                "passes": {name: {"modified": r.modified, "notes": list(r.notes), "report": r.report}
                           for name, r in self.results.items()}}

    def lines(self) -> list[str]:
        """What the user should know, a line each."""
        placed, checked = self.results["insert_qdq"].report, self.results["verify"].report
        states = self.results["find_closures"].report.get("states", [])
        loops = checked["MAD_to_float"]
        lines = []
        if self.path:
            lines.append(f"wrote {self.path}: {self.size_bytes / 1e6:.2f} MB; the model that went in has "
                         f"{self.input_bytes / 1e6:.2f} MB, {self.input_bytes / self.size_bytes:.1f} x as much")
        pairs = ", ".join(f"{s['input']} -> {s['output']}" for s in states)
        kept = self.results["expose_states"].report.get("states", {})
        lines.append(f"recurrent states: {pairs or 'none found'}" + (f"; as uint8: {', '.join(kept)}" if kept else ""))
        lines.append(f"quantized {placed['layers']} layers, {placed['weights']} weights, {placed['activations']} "
                     f"activations; wider than nominal: "
                     f"{_short([f'{name} {bits}' for name, bits in placed['wider'].items()]) or 'nothing'}")
        chosen = self.results["choose_bits"].report
        if chosen:
            lines.append(chosen_lines(chosen, {})[0])
            if chosen["of"] == "size" and self.size_bytes > chosen["limit"]:
                lines.append(f"note: the file is {self.size_bytes - chosen['limit']:,.0f} bytes over its budget of "
                             f"{chosen['budget']}; give a smaller one")
        used, given = self.frames
        lines.append(f"calibrated on {used} frames" + (f" in stretches out of {given}" if used < given else ""))
        blocks = self.results["reconstruct_blocks"].report.get("blocks", [])
        if blocks:
            before, after = (float(np.mean([b[key] for b in blocks])) for key in ("error_before", "error_after"))
            lines.append(f"learned {len(blocks)} blocks: error relative to what they give {before:.3f} -> {after:.3f}")
        network = self.results["calibrate_network"].report
        if network:
            gates = list(network["closed_loop_MAD"].values())
            lines.append(f"learned the whole network in {network['steps']} steps: MAD x 1e3 in closed loop "
                         f"{gates[0]:.2f} -> {min(gates):.2f}")
        lines.append(f"alpha against float, MAD x 1e3 over {loops['frames']:.0f} calibration frames: "
                     f"{loops['closed']:.2f} in closed loop, {loops['open']:.2f} on float states")
        lines.append("against the last float-typed graph, optimizations off: the same bits; optimized: "
                     f"{checked['optimized_alpha_differs']:.2%} of 8-bit alpha values differ by rounding")
        lines += [f"note: {name}: {note}" for name, r in self.results.items() for note in r.notes]
        if self.squeezed:
            lines.append(f"calibration frames of {_short(self.squeezed)} have another shape than the model's and were "
                         "squeezed; footage of its shape, or --size of theirs, is better")
        if self.synthetic:
            lines.append("calibrated on the built-in synthetic clips; your own footage (--calib) is better")
        return lines


def compile(  # noqa: A001  (the name of what it does: vmq.compile)
    model: str | os.PathLike[str] | bytes | onnx.ModelProto | Graph, *, bits: str | int = 8, budget: str | None = None,
    recipe: str = "vmq", calib: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    size: tuple[int, int] | str | None = None, downsample_ratio: float | None = None,
    effort: str | Effort = "standard", target: str = "cpu", container: str = "",
    keep: Mapping[str, int] | None = None, pairs: Mapping[str, str] | None = None, seed: int = 0,
    output: str | os.PathLike[str] | None = None, dump: str | os.PathLike[str] | None = None,
    resume: bool = False, device: str = "cpu", state: str = "float32", mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None, command: str = "",
    observers: Sequence[Observer] = (),
    progress: Callable[[str, float], None] = lambda _what, _share: None,
) -> Result:
    """Quantize a video-matting network after training.

    Args:
        model: the float32 model: a file, bytes, a ModelProto or a Graph. It is not changed.
        bits: 8 (W8A8), 4 (W4A4), "w4a8", "w8a4", or "auto": for each closure what a budget allows.
        budget: with "auto": a file size such as "2.6MB", bit operations of a frame such as "120GBOPs", or their share
            of W8A8's such as "50%".
        recipe: a name that ships with vmq, or a TOML file.
        calib: a path or several: videos, folders of frames, folders with com/ and pha/; none: the built-in
            synthetic clips.
        size: (width, height) in pixels or "WxH", for models with free dimensions.
        downsample_ratio: for models that take one, in (0, 1].
        effort: how much work may be done: fast, standard, thorough, or an Effort (vmq/spec.py) of one's own.
        target: where the model is to run.
        container: how 4-bit weights are stored; default: the target's best way.
        keep: bits of layers that stay wider, by kind (first, last, depthwise, pooled, recurrent) or node name.
        pairs: state inputs and outputs by hand, where topology alone is ambiguous.
        seed: 0 or more, of the samples that ranges are searched on.
        output: the file to write; none: only the result is returned.
        dump: folder for every intermediate result.
        resume: continue what an earlier run with the same `output` and arguments left unfinished.
        device: where learning computes, cpu or cuda; the result is checked on the CPU in any case.
        state: what recurrent states are between frames: float32, as in the model that goes in, or uint8.
        mean, std: what the model takes instead of RGB in 0..1 is (frame - mean) / std, one number or three; noted in
            the file's metadata. Default: what the model's own metadata say, or RGB in 0..1.
        command: noted in the dump as the way to repeat it. Default: the command line that does the same.
        observers: watch the passes.
        progress: called with (what is being done, share done).

    Raises:
        VmqError: bad input, by kind; a file named `output` is as it was before.
    """
    command = command or (command_of(locals()) if dump is not None else "")
    widths, within = parse_bits(bits, budget)
    effort = effort if isinstance(effort, Effort) else _named(EFFORTS, "--effort", effort)
    options = Options(bits=widths, budget=within, recipe=Recipe.load(recipe), effort=effort,
                      target=_named(TARGETS, "--target", target), container=container, size=parse_size(size),
                      downsample_ratio=downsample_ratio, keep=dict(keep or {}), pairs=dict(pairs or {}), seed=seed,
                      device=device, state=state, normalization=parse_normalization(mean, std))
    check_device(device)
    if isinstance(calib, (str, os.PathLike)):
        calib = [calib]
    graph = model.copy() if isinstance(model, Graph) else Graph.load(model)
    if options.normalization is not None:
        graph.metadata[NORMALIZATION_KEY] = json.dumps(options.normalization.to_json())
    writes = processes.rank() == 0
    if output is not None and writes:
        _check_output(Path(output), model)
    if output is not None and dump is not None and Path(output).resolve() == Path(dump).resolve():
        raise OutputError(f"-o {output} and --dump {dump} are one name; the dump is a folder, so give it another")
    input_bytes = file_size(model) if isinstance(model, (str, os.PathLike)) else len(graph.to_bytes())
    footage = fingerprint(calib)
    clips, squeezed = _clips(graph, options, calib)
    frames = options.effort.calibration
    sampled = sample_clips(clips, frames, stretch=min(32, max(8, frames // len(clips))))
    context = Context(options, sampled, clips, progress=progress)
    work = [hashlib.sha256(graph.to_bytes()).hexdigest(), options.describe(), repr(options.recipe),
            repr(options.effort), [(c.name, len(c), c.size) for c in clips], __version__, torch.__version__,
            ort.__version__]
    processes.agree("model, options, footage and versions", repr(work))
    with locked(Path(p) for p in (output, dump) if p is not None and writes):
        if output is not None:
            context.checkpoint = Checkpoint(Path(f"{output}.unfinished"), [*work, footage], resume)
        watchers = [*observers, *([Dump(Path(dump), command)] if dump is not None and writes else []), _Agreement(),
                    _Alpha(options)]
        results = run_passes(graph, PIPELINE, context, watchers)
        _check_unchanged(footage, fingerprint(calib))
        if output is not None and writes:
            graph.save(output)
            context.checkpoint.finish()
    return Result(graph, Path(output) if output is not None else None,
                  {p.name: r for p, r in zip(PIPELINE, results, strict=True)}, len(graph.to_bytes()), input_bytes,
                  frames=(sum(map(len, sampled)), sum(map(len, clips))), synthetic=not calib, squeezed=squeezed)


def command_of(given: Mapping[str, Any]) -> str:
    """The command line that does what `compile` does with these arguments; empty where there is none.

    A model that is no file is that of the dump.
    """
    model = given["model"]
    words = ["vmq", "compile", os.fspath(model) if isinstance(model, (str, os.PathLike))
             else str(Path(given.get("dump") or "") / "00_input.onnx")]
    for name, parameter in inspect.signature(compile).parameters.items():
        value, option = given.get(name), f"--{name.replace('_', '-')}"
        if name in {"model", "command", "observers", "progress", "resume"} or value is None:
            continue
        if name in {"keep", "pairs"}:
            words += [f"--{name.removesuffix('s')}={left}={right}" for left, right in value.items()]
        elif name == "calib":
            paths = [value] if isinstance(value, (str, os.PathLike)) else value
            words += [option, *map(os.fspath, paths)] if paths else []
        elif name in {"mean", "std"}:
            words.append(f"{option}={','.join(map(str, np.atleast_1d(value).tolist()))}")
        elif isinstance(value, Effort) and value not in EFFORTS.values():
            return ""
        elif value != parameter.default:
            said = value.name if isinstance(value, Effort) else "x".join(map(str, value)) \
                if isinstance(value, (tuple, list)) else value
            words.append(f"{option}={said}")
    return shlex.join(words)


class _Agreement(Observer):
    """Makes sure that processes that share the work hold the same graph after every pass."""

    def after(self, index: int, step: Pass, graph: Graph, result: PassResult, seconds: float) -> None:  # noqa: ARG002
        """After a pass that went well."""
        if processes.count() > 1:
            processes.agree(f"graph after {step.name}", hashlib.sha256(graph.to_bytes()).hexdigest())


class _Alpha(Observer):
    """Makes sure that the model gives an alpha as soon as its shapes are bound, and not after all learning."""

    def __init__(self, options: Options) -> None:
        self.options = options

    def after(self, index: int, step: Pass, graph: Graph, result: PassResult, seconds: float) -> None:  # noqa: ARG002
        """After a pass that went well."""
        if isinstance(step, BindShapes):
            Session(graph, optimize=False, pairs=self.options.pairs).pictures()


def _check_output(path: Path, model: Any) -> None:
    """The result can be written, and is not the model that it is made from."""
    check_output(path)
    if isinstance(model, (str, os.PathLike)) and path.exists() and path.samefile(model):
        raise OutputError(f"cannot write {path}: it is the model that goes in; give -o another name")


def _check_unchanged(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Raise MediaError when footage is not what it was when it was opened."""
    changed = [name for name in sorted({*before, *after}) if before.get(name) != after.get(name)]
    if changed:
        raise MediaError(f"{_short(changed)} changed while the model was calibrated on it, so nothing was written; run "
                         "it again when the footage is complete")


def parse_size(size: tuple[int, int] | str | None) -> tuple[int, int] | None:
    """(height, width) of (width, height) or "WxH"; None stays None.

    Raises:
        OptionError: not two whole numbers.
    """
    if size is None:
        return None
    try:
        width, height = (int(n) for n in (size.lower().split("x") if isinstance(size, str) else size))
    except (ValueError, AttributeError) as error:
        raise OptionError(f"--size {size} is not WIDTHxHEIGHT, for example 512x288") from error
    return height, width


def _named(table: Mapping[str, Any], option: str, name: str) -> Any:
    if name not in table:
        raise OptionError(f"{option} {name} is not known; give one of {', '.join(table)}")
    return table[name]


def _clips(graph: Graph, options: Options, calib: Sequence[str | os.PathLike[str]],
           ) -> tuple[list[Clip], tuple[str, ...]]:
    """Calibration clips at the size that the model will have, and the names of those squeezed for it."""
    session = Session(graph, optimize=False, pairs=options.pairs)
    height, width = frame_size(next(v for v in graph.inputs if v.name == session.frame_input), options.size)
    if not calib:
        return synthetic_clips((height, width), seed=options.seed), ()
    paths = [Path(p) for p in calib]
    shapes = {c.name: c.size[1] / c.size[0] for c in open_clips(paths)}
    squeezed = tuple(name for name, shape in shapes.items() if not 0.9 < shape * height / width < 1.1)
    clips = open_clips(paths, (height, width))
    for clip in clips:
        check_first_alpha(session.first_alpha_input, clip)
    return clips, squeezed


def _short(names: Sequence[str]) -> str:
    """Names up to six, then a count."""
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
