"""What `vmq eval` does: score models on clips with known alpha, and say how near they are to a reference model.

Every model runs in closed loop, from the zero state at the first frame of each clip. Its alpha is rounded to 8 bits
before it is scored, as in RVM's evaluation, which scores files. Fidelity scores the same mattes against those of the
reference, so it needs no true alpha; the mean over frames, then over clips.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vmq import processes
from vmq.clips import Clip
from vmq.errors import MediaError, OptionError
from vmq.matting import set_ratio, to_uint8
from vmq.metrics import Scores, dtssd, mad, mean_scores, mse, score_clip
from vmq.pictures import Frame
from vmq.progress import Report, silent
from vmq.runtime import Session, check_first_alpha
from vmq.spec import Normalization

FOOTER = (
    "SAD, Grad, Conn in thousands; MAD, MSE x 1e3; dtSSD x 1e2, the first frame of each clip counted as 0 as in the\n"
    "paper; F x 1. Lower is better, but for F. Mattes rounded to 8 bits; mean: every clip counts the same."
)


@dataclass
class ModelScores:
    """What was found out about one model.

    Attributes:
        clips: by name of the clip; None where its true alpha is not known.
        fidelity: distance to the reference, by measure: MAD x 1e3, MSE x 1e3, dtSSD x 1e2; None without a reference.
    """

    clips: dict[str, Scores | None] = field(default_factory=dict)
    fidelity: dict[str, float] | None = None

    @property
    def mean(self) -> Scores | None:
        """Mean over the clips with known alpha; None if there are none."""
        known = [scores for scores in self.clips.values() if scores is not None]
        return mean_scores(known) if known else None


def evaluate(models: Sequence[str], clips: Sequence[Clip], *, reference: str | None = None, threads: int = 0,
             downsample_ratio: float | None = None, normalization: Normalization | None = None,
             report: Report = silent) -> dict[str, ModelScores]:
    """Score models on clips, by the models' paths.

    Args:
        models: ONNX files; one that is named twice is scored once.
        clips: with or without alpha.
        reference: the model that fidelity is measured against, usually the FP32 one.
        threads: of each session; 0 leaves the choice to ONNX Runtime.
        downsample_ratio: for models that take one; default: as `set_ratio` finds for each clip.
        normalization: what models take whose metadata do not say; default: RGB in 0..1.
        report: told after each frame of each model.

    Raises:
        ModelError: a model cannot be read or run.
        MediaError: a clip cannot be read, has another size than a model takes, or no alpha where one is told the first.
        OptionError: there is neither alpha nor a reference, so nothing to compare with; or a ratio that no model takes.
    """
    if reference is None and not any(clip.has_alpha for clip in clips):
        raise OptionError(f"{clips[0].name} has no alpha to score against: give a set with com/ and pha/, "
                          "or --reference FP32.onnx for the distance to that model")
    sessions = {path: Session(path, threads=threads, normalization=normalization) for path in dict.fromkeys(models)}
    teacher = None if reference is None else Session(reference, threads=threads, normalization=normalization)
    everyone = [*sessions.values()] + ([teacher] if teacher else [])
    if downsample_ratio is not None and not any(session.takes_ratio for session in everyone):
        raise OptionError("no model has an input for a downsample ratio; leave --downsample-ratio out")
    for clip in clips:
        for session in everyone:
            _check_size(session, clip)
            check_first_alpha(session.first_alpha_input, clip)
    own = processes.mine(clips)
    progress = _Counter(report, total=len(everyone) * sum(len(clip) for clip in own))

    def score(clip: Clip) -> dict[str, tuple[Scores | None, tuple[float, float, float] | None]]:
        """Scores of every model on a clip, and its distance to the reference."""
        target = _mattes(teacher, clip, downsample_ratio, progress) if teacher else None
        found = {}
        for path, session in sessions.items():
            mattes = _mattes(session, clip, downsample_ratio, progress)
            true = clip.alpha()
            found[path] = (None if true is None else score_clip(iter(mattes), true),
                           None if target is None else _distance(mattes, target))
        return found

    rows = processes.together([score(clip) for clip in own])
    results = {path: ModelScores({clip.name: row[path][0] for clip, row in zip(clips, rows, strict=True)})
               for path in sessions}
    for path, result in results.items() if teacher else ():
        mean = np.mean([row[path][1] or () for row in rows], axis=0)
        result.fidelity = dict(zip(("MAD", "MSE", "dtSSD"), map(float, mean), strict=True))
    return results


def to_json(results: Mapping[str, ModelScores]) -> dict[str, Any]:
    """The results in the shape that `vmq eval --json` prints."""
    models = {}
    for path, result in results.items():
        models[path] = {
            "mean": result.mean.as_dict() if result.mean else None,
            "clips": {name: scores.as_dict() if scores else None for name, scores in result.clips.items()},
        } | ({"fidelity": result.fidelity} if result.fidelity else {})
    return {"models": models}


def to_lines(results: Mapping[str, ModelScores], reference: str | None = None) -> list[str]:
    """The results as tables: one a model, a line a clip and the mean; then the distances to the reference."""
    lines = []
    for path, result in results.items():
        rows = [(name, scores.as_dict()) for name, scores in result.clips.items() if scores]
        if result.mean:
            lines += [*_table(path, [*rows, ("mean", result.mean.as_dict())]), ""]
    fidelity = [(path, result.fidelity) for path, result in results.items() if result.fidelity]
    if fidelity:
        lines += [*_table(f"distance to {reference or 'the reference'}", fidelity), ""]
    return [*lines, *FOOTER.splitlines()]


def _table(title: str, rows: Sequence[tuple[str, Mapping[str, float]]]) -> list[str]:
    width = max(len(text) for text in (title, *(f"  {name}" for name, _ in rows)))
    head = f"{title:<{width}}" + "".join(f"{column:>10}" for column in rows[0][1])
    return [head] + [f"{'  ' + name:<{width}}" + "".join(f"{value:>10.3f}" for value in values.values())
                     for name, values in rows]


class _Mattes:
    """Alphas of a clip, uint8 [H,W], kept compressed: mattes are mostly 0 and 255."""

    def __init__(self) -> None:
        self._packed: list[tuple[bytes, tuple[int, ...]]] = []

    def append(self, matte: Frame) -> None:
        self._packed.append((zlib.compress(matte.tobytes(), 1), matte.shape))

    def __iter__(self) -> Iterator[Frame]:
        for data, shape in self._packed:
            yield np.frombuffer(zlib.decompress(data), np.uint8).reshape(shape)


class _Counter:
    """Counts the frames of all models over all clips."""

    def __init__(self, report: Report, total: int) -> None:
        self.report, self.total, self.done = report, total, 0

    def step(self, what: str) -> None:
        self.done += 1
        self.report(what, self.done, self.total)


def _mattes(session: Session, clip: Clip, ratio: float | None, progress: _Counter) -> _Mattes:
    set_ratio(session, clip.size, ratio)
    mattes = _Mattes()
    for alpha in session.alphas(clip.frames(), session.told(clip)):
        mattes.append(to_uint8(alpha))
        progress.step(f"{session.label} on {clip.name}")
    return mattes


def _distance(mattes: _Mattes, target: _Mattes) -> tuple[float, float, float]:
    """MAD, MSE and dtSSD of a clip's mattes to the reference's, each the mean over the frames."""
    rows = []
    before: tuple[Frame, Frame] | None = None
    for p, t in zip(mattes, target, strict=True):
        rows.append((mad(p, t), mse(p, t), 0.0 if before is None else dtssd(p, t, *before)))
        before = p, t
    first, second, third = np.mean(rows, axis=0)
    return float(first), float(second), float(third)


def _check_size(session: Session, clip: Clip) -> None:
    height, width = session.size
    if height not in (None, clip.size[0]) or width not in (None, clip.size[1]):
        raise MediaError(f"{session.label} takes frames of {width or 'any'}x{height or 'any'}, but {clip.name} is "
                         f"{clip.size[1]}x{clip.size[0]}: give a dataset of that size, or compile for this one")
