"""Does the error of a quantized recurrent network grow with time? Thousands of frames beside the float network.

Both run in closed loop over one long film without being reset. The film repeats a cycle of scenes, one for each clip,
and a scene holds what recurrence finds hard (see `Film`). A cycle shows the same frames every time, so whatever
changes from cycle to cycle has grown in the states. Of every cycle the mean error of alpha and of each state is taken,
and a straight line through them says how fast it grows. It drifts if that line rises by more than `GROWTH` of its mean
over the run, and by more than three times its standard error.

How long a network needs after a cut, a flash and the like is counted where the true alpha is known: frames until its
error is back to that of the quiet frames of the scene.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from vmq.clips import Clip, open_clips
from vmq.drift import SATURATED, StateErrors
from vmq.errors import MediaError, ModelError, OptionError, VmqError
from vmq.graph import Graph
from vmq.matting import set_ratio
from vmq.progress import Progress
from vmq.runtime import Session
from vmq.synthetic import scene, synthetic_clips

SCENE = 128
"""Frames of a scene."""
EVENTS = {"cut": (0, 0), "flash": (40, 41), "black": (60, 68), "away": (88, 108)}
"""What happens in a scene, from and before which frame; the person is away only where the clip is a built-in one."""
QUIET = 12
"""So many frames after an event count as quiet."""
CYCLES = 4
"""A film repeats its cycle at least so often, with fewer clips if need be."""
KEPT = 64
"""Frames of a clip that are played forth and back."""
GROWTH = 0.1
"""Growth over the whole run, relative to the mean, that is called drift."""

Frame = NDArray[np.uint8]


@dataclass(frozen=True)
class Shot:
    """A frame of the film, uint8 [3,H,W], its true alpha, uint8 [H,W], if known, and its place within its scene."""

    frame: Frame
    alpha: Frame | None
    place: int


class Film:
    """Scenes without end: each clip forth and back, a white frame, black frames, the person gone and back.

    Args:
        clips: one for each scene, of the models' size.
        backgrounds: of each clip, how to draw a frame without the person by its number; None where that is not known.

    Attributes:
        events: what happens in it, as `EVENTS`.
    """

    def __init__(self, clips: Sequence[Clip], backgrounds: Sequence[Any]) -> None:
        self.clips, self.backgrounds, self.cycle = clips, backgrounds, SCENE * len(clips)
        self.events = {n: when for n, when in EVENTS.items() if n != "away" or any(backgrounds)}

    def shots(self) -> Iterator[Shot]:
        """One cycle after the other."""
        while True:
            for clip, background in zip(self.clips, self.backgrounds, strict=True):
                yield from self._scene(clip, background)

    def _scene(self, clip: Clip, background: Any) -> Iterator[Shot]:
        count = min(KEPT, len(clip))
        frames = list(clip.frames(0, count))
        mattes = clip.alpha(0, count)
        alphas: list[Frame] | None = None if mattes is None else list(mattes)
        there_and_back = [*range(count), *range(count - 2, 0, -1)]
        for place in range(SCENE):
            number = there_and_back[place % len(there_and_back)]
            frame, alpha = frames[number], None if alphas is None else alphas[number]
            if _within("flash", place):
                frame = np.full_like(frame, 255)
            elif _within("black", place):
                frame = np.zeros_like(frame)
            elif background is not None and _within("away", place):
                frame, alpha = background(number), None if alpha is None else np.zeros_like(alpha)
            yield Shot(frame, alpha, place)


def _within(event: str, place: int) -> bool:
    first, end = EVENTS[event]
    return first <= place < end


def built_in_film(size: tuple[int, int], frames: int, seed: int) -> Film:
    """A film of the built-in clips at a size (H, W)."""
    clips = synthetic_clips(size, seed=seed)[:max(1, frames // (CYCLES * SCENE))]

    def background(index: int) -> Any:
        def draw(number: int) -> Frame:
            layers = scene(size, seed, index).layers(number)
            picture = np.clip(np.rint(layers.background + layers.noise), 0, 255).astype(np.uint8)
            return np.ascontiguousarray(picture.transpose(2, 0, 1))
        return draw

    return Film(clips, [background(index) for index in range(len(clips))])


def own_film(paths: Sequence[Path], size: tuple[int, int], frames: int) -> Film:
    """A film of footage, read at a size (H, W)."""
    clips = open_clips(paths, size)[:max(1, frames // (CYCLES * SCENE))]
    return Film(clips, [None] * len(clips))


@dataclass(frozen=True)
class Trend:
    """A value over the cycles of a film.

    Attributes:
        means: of each whole cycle.
        slope, error: rise per 1,000 frames, and its standard error.
        drifts: see the top of this file.
    """

    means: list[float]
    slope: float
    error: float
    drifts: bool

    @classmethod
    def of(cls, series: NDArray[np.float64], cycle: int) -> Trend:
        """The trend of a value that was measured in every frame."""
        means = series[:len(series) // cycle * cycle].reshape(-1, cycle).mean(axis=1)
        times = np.arange(len(means)) - (len(means) - 1) / 2
        rise = float((times * means).sum() / (times ** 2).sum())
        off = means - means.mean() - rise * times
        error = float(np.sqrt((off ** 2).sum() / max(1, len(means) - 2) / (times ** 2).sum()))
        growth = rise * (len(means) - 1)
        drifts = not np.isfinite(means).all() or (growth > GROWTH * float(means.mean()) and rise > 3.0 * error)
        return cls(means.tolist(), rise * 1000 / cycle, error * 1000 / cycle, bool(drifts))


@dataclass
class LongRun:
    """What a long run measured.

    Attributes:
        frames, cycle, scenes: length of the film and of its cycle, and scenes in that.
        alpha: MAD x 1e3 between the two networks' alpha in every frame.
        states: errors and saturation of every state.
        truth: MAD x 1e3 to the true alpha in every frame: the float network's, the quantized one's; NaN if not known.
        places: place of every frame within its scene.
        events: what happened in a scene.
    """

    frames: int
    cycle: int
    scenes: int
    alpha: NDArray[np.float64]
    states: StateErrors
    truth: NDArray[np.float64]
    places: NDArray[np.int64]
    events: Mapping[str, tuple[int, int]] = field(default_factory=lambda: EVENTS)

    def trends(self) -> dict[str, Trend]:
        """Of alpha and of every state's error."""
        return {"alpha": Trend.of(self.alpha, self.cycle),
                **{n: Trend.of(self.states.error(n), self.cycle) for n in self.states.names}}

    def saturated(self) -> dict[str, tuple[float, float]]:
        """Share of every state on its first and last step over the last cycle: quantized, float."""
        return {n: tuple(float(s[-self.cycle:].mean()) for s in self.states.saturated(n))  # type: ignore[misc]
                for n in self.states.names}

    def recovery(self) -> dict[str, list[list[int]]]:
        """Of every event: frames until all is quiet again, of the float network and of the quantized one.

        Scenes in which a network's error is mostly NaN do not count for it.
        """
        ends = sorted({last for _, last in self.events.values()})
        found: dict[str, list[list[int]]] = {}
        scenes = [slice(s, s + SCENE) for s in range(0, self.frames - SCENE + 1, SCENE)]
        for which in range(2):
            for scene_ in scenes:
                errors, places = self.truth[which, scene_], self.places[scene_]
                quiet = [p for p in places if p - max(e for e in ends if e <= p) >= QUIET
                         and not any(a <= p < b for a, b in self.events.values())]
                usual = float(np.median(errors[quiet]))
                if not np.isfinite(usual):
                    continue
                for event, (_, end) in self.events.items():
                    after = errors[end:end + QUIET] <= 1.25 * usual + 0.5
                    found.setdefault(event, [[], []])[which].append(int(np.argmax(after)) if after.any() else QUIET)
        return found

    def problems(self) -> list[str]:
        """What is wrong, a line each."""
        said = []
        if not np.isfinite(self.alpha).all():
            said.append(f"alpha is NaN or infinite from frame {int(np.argmin(np.isfinite(self.alpha)))} on")
        for name, trend in self.trends().items():
            if trend.drifts:
                what = name if name == "alpha" else f"state {name}"
                said.append(f"{what} drifts: error {trend.means[0]:.4g} in the first cycle, {trend.means[-1]:.4g} in "
                            "the last")
        for name, (ours, theirs) in self.saturated().items():
            if ours > theirs + SATURATED:
                said.append(f"state {name} saturates: {ours:.1%} of it is at the ends of its range, in float "
                            f"{theirs:.1%}")
        return said

    def lines(self) -> list[str]:
        """The report."""
        lines = [f"{self.frames} frames: {self.frames / self.cycle:.1f} cycles of {self.scenes} x {SCENE} frames",
                 f"{'error against float':<24} {'first cycle':>11} {'last cycle':>11} {'rise/1000 frames':>24} "
                 f"{'saturated':>10} {'in float':>9}"]
        full = self.saturated()
        for name, trend in self.trends().items():
            what = "alpha, MAD x 1e3" if name == "alpha" else f"state {name}, relative"
            shares = "" if name == "alpha" else f"{full[name][0]:>10.2%} {full[name][1]:>9.2%}"
            lines.append(f"{what:<24} {trend.means[0]:>11.4f} {trend.means[-1]:>11.4f} "
                         f"{f'{trend.slope:+.5f} +- {trend.error:.5f}':>24} {shares}")
        for event, (exact, ours) in self.recovery().items():
            shown = [f"{np.mean(n):.1f} (at most {max(n)})" if n else "unknown (NaN)" for n in (exact, ours)]
            lines.append(f"frames to recover after {event:<6} float {shown[0]}, quantized {shown[1]}")
        return lines + [f"PROBLEM: {p}" for p in self.problems()] + ([] if self.problems() else ["no drift"])

    def to_json(self) -> dict[str, Any]:
        """The same in plain JSON types."""
        return {"frames": self.frames, "cycle": self.cycle,
                "trends": {n: {"cycles": t.means, "rise_per_1000_frames": t.slope, "standard_error": t.error,
                               "drifts": t.drifts} for n, t in self.trends().items()},
                "saturated": {n: {"quantized": a, "float": b} for n, (a, b) in self.saturated().items()},
                "recovery": {e: {"float": a, "quantized": b} for e, (a, b) in self.recovery().items()},
                "problems": self.problems()}


def run(reference: Session, model: Session, graph: Graph, film: Film, frames: int,
        report: Any = lambda *_: None) -> LongRun:
    """Run both over the first `frames` frames of a film.

    Raises:
        OptionError: they are fewer than two cycles.
        ModelError: the states of the two have different shapes.
    """
    if frames < 2 * film.cycle:
        raise OptionError(f"--frames {frames}: a cycle has {film.cycle}; give at least two cycles")
    states = StateErrors(graph, model.state_pairs)
    alpha, truth, places = np.full(frames, np.nan), np.full((2, frames), np.nan), np.zeros(frames, np.int64)
    reference.reset()
    model.reset()
    for index, shot in zip(range(frames), film.shots(), strict=False):
        exact, ours = (s.alpha_of(s.step(shot.frame)) for s in (reference, model))
        alpha[index], places[index] = 1e3 * np.abs(ours - exact).mean(), shot.place
        if shot.alpha is not None:
            truth[:, index] = [1e3 * np.abs(a - shot.alpha / np.float32(255.0)).mean() for a in (exact, ours)]
        if index == 0:
            _compare_states(model, reference)
        states.add(model.state, reference.state)
        report("frames", index + 1, frames)
    return LongRun(frames, film.cycle, len(film.clips), alpha, states, truth, places, film.events)


def _compare_states(model: Session, reference: Session) -> None:
    for name, state in model.state.items():
        if name not in reference.state:
            raise ModelError(f"{reference.label} has no state {name} as {model.label} has; give those that belong "
                             "together")
        if state.shape != reference.state[name].shape:
            wide, narrow = ("x".join(map(str, s.state[name].shape)) for s in (model, reference))
            raise ModelError(f"state {name} is {wide} in {model.label} and {narrow} in {reference.label}"
                             + ("; give the --downsample-ratio that the first is compiled for" if reference.takes_ratio
                                else "; give those that belong together"))


# ------------------------------------------------------------------------------------------------------------- picture


def plot(result: LongRun) -> Frame:
    """Errors over time as a picture, uint8 [H,W,3] BGR: a panel for alpha and one for every state.

    Grey is every frame, black the mean of each scene; lines mark where cycles begin.
    """
    series = {"alpha against float, MAD x 1e3": result.alpha,
              **{f"state {n}, relative error": result.states.error(n) for n in result.states.names}}
    width, height, left, gap = 1200, 150, 70, 26
    picture = np.full((len(series) * (height + gap) + gap, left + width + 20, 3), 255, np.uint8)

    def text(words: str, x: int, y: int) -> None:
        cv2.putText(picture, words, (x, y), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)

    for row, (name, values) in enumerate(series.items()):
        top = gap + row * (height + gap)
        values = np.nan_to_num(values, nan=0.0, posinf=0.0)
        most = float(np.quantile(values, 0.998)) or 1.0

        def points(x: Any, y: Any, top: int = top, most: float = most) -> Any:
            along = left + np.asarray(x) / result.frames * width
            up = top + height * (1.0 - np.clip(np.asarray(y) / most, 0.0, 1.0))
            return [np.rint(np.stack([along, up], axis=1)).astype(np.int32)]

        for start in range(0, result.frames, result.cycle):
            x = int(left + start / result.frames * width)
            cv2.line(picture, (x, top), (x, top + height), (225, 225, 225), 1)
        cv2.polylines(picture, points(np.arange(len(values)), values), False, (190, 190, 190), 1)
        whole = values[:len(values) // SCENE * SCENE].reshape(-1, SCENE).mean(axis=1)
        cv2.polylines(picture, points((np.arange(len(whole)) + 0.5) * SCENE, whole), False, (0, 0, 0), 1, cv2.LINE_AA)
        cv2.rectangle(picture, (left, top), (left + width, top + height), (120, 120, 120), 1)
        text(name, left + 6, top - 6)
        text(f"{most:.3g}", 6, top + 10)
        text("0", 6, top + height)
    text(f"{result.frames} frames", left + width - 90, picture.shape[0] - 8)
    return picture


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tools/long_run", description=(__doc__ or "").partition("\n")[0],
                                     epilog="Exit code: 0 no drift, 1 something drifts or saturates, 2 an error.")
    add = parser.add_argument
    add("reference", metavar="FP32.onnx", help="the float model, of the other's frame size")
    add("model", metavar="MODEL.onnx", help="the quantized model")
    add("--frames", type=int, default=10_000, metavar="N", help="length of the film (default: 10000)")
    add("--clips", nargs="+", type=Path, metavar="PATH", help="footage (default: the built-in clips)")
    add("--plot", type=Path, metavar="FILE.png", help="errors over time as a picture")
    add("--seed", type=int, default=0, metavar="N", help="of the built-in clips (default: 0)")
    add("--downsample-ratio", type=float, metavar="R",
        help="for models that take one (default: what brings the longer side down to 512 pixels)")
    add("--threads", type=int, default=0, metavar="N", help="default: as many as ONNX Runtime likes")
    add("--json", action="store_true", help="print JSON instead of text")
    add("-q", "--quiet", action="store_true", help="no progress")
    args = parser.parse_args(arguments)
    try:
        graph = Graph.load(args.model)
        model, reference = Session(graph, threads=args.threads), Session(args.reference, threads=args.threads)
        height, width = model.size
        if height is None or width is None or reference.size not in ((None, None), (height, width)):
            raise ModelError(f"{args.reference} and {args.model} take frames of different sizes; give those that "
                             "belong together")
        if not model.state_pairs:
            raise ModelError(f"{args.model} has no recurrent state, so nothing in it can drift")
        if args.downsample_ratio is not None and not (model.takes_ratio or reference.takes_ratio):
            raise OptionError("no model has an input for a downsample ratio; leave --downsample-ratio out")
        for session in (model, reference):
            set_ratio(session, (height, width), args.downsample_ratio)
        film = (own_film(args.clips, (height, width), args.frames) if args.clips
                else built_in_film((height, width), args.frames, args.seed))
        started = time.perf_counter()
        with Progress(quiet=args.quiet or args.json) as progress:
            result = run(reference, model, graph, film, args.frames, progress)
        if args.plot is not None and not cv2.imwrite(str(args.plot), plot(result)):
            raise MediaError(f"{args.plot} cannot be written; end it in .png, in a folder that is there")
    except VmqError as error:
        print(f"tools/long_run: error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result.to_json(), indent=1) if args.json else "\n".join(
        [*result.lines(), f"{time.perf_counter() - started:.0f} s"]))
    return 1 if result.problems() else 0


if __name__ == "__main__":
    sys.exit(main())
