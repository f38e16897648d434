"""Models beside each other on a clip: moments of it, and one column of pixels over time, where flicker shows.

One PNG: a row for each moment with the input, alpha of every model, and how the last one differs from the first

    white where equal, red where it gives more, blue where it gives less: full colour at a difference of 1 / GAIN

and below them the same for one column of pixels, time from left to right. All models run in closed loop over the clip
from its first frame. Steady edges are smooth lines there, flicker is a comb.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from vmq.clips import Clip, open_clips
from vmq.errors import ModelError, OptionError, VmqError
from vmq.files import check_output, write_atomic
from vmq.matting import set_ratio, to_uint8
from vmq.pictures import Frame
from vmq.runtime import Session

GAIN = 4.0
"""Of differences."""
MARGIN = 6
"""Pixels between tiles."""
HEADER = 28
"""Pixels for a line of words."""


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    try:
        check_output(args.output)
        if len(args.models) < 2:
            raise OptionError("name two models or more: what is compared with, first, and what is compared")
        names = [_named(text) for text in args.models]
        clip, found = _run(args.clip, names, args.frames)
        frames = np.stack(list(clip.frames(0, len(found[0]))))
        moments = args.moments or [len(frames) * k // 4 for k in (1, 2, 3)]
        if not all(0 <= moment < len(frames) for moment in moments):
            raise OptionError(f"--moments {' '.join(map(str, moments))}: {clip.name} has frames 0 to {len(frames) - 1}")
        column = soft_column(found[0]) if args.column is None else args.column
        if not 0 <= column < clip.size[1]:
            raise OptionError(f"--column {column}: {clip.name} has columns 0 to {clip.size[1] - 1}")
        picture = draw([name for name, _ in names], frames, found, moments, column, args.width)
        data = cv2.imencode(".png", np.ascontiguousarray(picture[..., ::-1]))[1]
        write_atomic(args.output, data.tobytes())
    except (VmqError, OSError) as error:
        print(f"pictures: error: {error}", file=sys.stderr)
        return 2
    print(f"{args.output}: frames {', '.join(map(str, moments))} of {clip.name}, column {column} over {len(frames)}")
    return 0


def draw(names: Sequence[str], frames: Frame, alphas: Sequence[Frame], moments: Sequence[int], column: int,
         width: int) -> Frame:
    """The picture, uint8 [h,w,3] RGB.

    Args:
        names: of the models.
        frames: [T,3,H,W] RGB.
        alphas: of each model, [T,H,W].
        moments: frames that are shown.
        column: of pixels that is shown over time.
        width: of a tile.
    """
    size = width, round(width * frames.shape[2] / frames.shape[3])
    rows = []
    for moment in moments:
        shown = [frames[moment].transpose(1, 2, 0), *(a[moment] for a in alphas)]
        rows.append((f"frame {moment}", [_fit(_colour(tile), size) for tile in shown],
                     _fit(difference(alphas[-1][moment], alphas[0][moment]), size)))
    over_time = [frames[..., column].transpose(2, 0, 1), *(a[..., column].T for a in alphas)]
    rows.append((f"column {column}, frames 0 to {len(frames) - 1} from left to right",
                 [_fit(_colour(tile), size) for tile in over_time],
                 _fit(difference(over_time[-1], over_time[1]), size)))
    heads = ["input", *names, f"{names[-1]} - {names[0]}, x {GAIN:g}"]
    whole = [_words(heads, size[0])]
    for words, tiles, last in rows:
        line = [part for tile in (*tiles, last) for part in (tile, np.full((size[1], MARGIN, 3), 128, np.uint8))]
        whole += [np.concatenate(line[:-1], axis=1), _words([words, *[""] * (len(heads) - 1)], size[0])]
    return np.concatenate(whole)


def difference(ours: Frame, theirs: Frame) -> Frame:
    """Of mattes uint8 [h,w], as colours uint8 [h,w,3]: red more, blue less, white equal."""
    off = np.clip((ours.astype(np.float32) - theirs) * GAIN, -255, 255)
    return np.dstack([255 + np.minimum(off, 0), 255 - np.abs(off), 255 - np.maximum(off, 0)]).astype(np.uint8)


def soft_column(alphas: Frame) -> int:
    """The column of [T,H,W] with most values between 0.1 and 0.9: where edges of the person are."""
    return int(((alphas > 25) & (alphas < 230)).sum(axis=(0, 1)).argmax())


def _run(path: Path, models: Sequence[tuple[str, Path]], most: int | None) -> tuple[Clip, list[Frame]]:
    """The clip at the models' size, and alpha of each, uint8 [T,H,W]."""
    sessions = [Session(file) for _, file in models]
    sizes = {session.size for session in sessions if None not in session.size}
    if len(sizes) > 1:
        raise ModelError(f"models take frames of {' and '.join(f'{w}x{h}' for h, w in sizes)}; give models of one size")
    height, width = next(iter(sizes), (None, None))
    clips = open_clips([path], (height, width) if height and width else None)
    if len(clips) > 1:
        raise OptionError(f"{path} holds {len(clips)} clips ({clips[0].name}, {clips[1].name}, ...); name one of them")
    clip, found = clips[0], []
    for session in sessions:
        set_ratio(session, clip.size, None)
        found.append(np.stack([to_uint8(alpha) for alpha in session.alphas(clip.frames(0, most), session.told(clip))]))
    return clip, found


def _fit(tile: Frame, size: tuple[int, int]) -> Frame:
    """To (width, height): averaged to shrink, pixels repeated to grow."""
    shrinks = size[0] <= tile.shape[1] and size[1] <= tile.shape[0]
    return np.asarray(cv2.resize(tile, size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_NEAREST), np.uint8)


def _colour(tile: Frame) -> Frame:
    return tile if tile.ndim == 3 else np.repeat(tile[..., None], 3, axis=2)


def _words(texts: Sequence[str], width: int) -> NDArray[np.uint8]:
    """A line of words, each above or below a tile of that width; one alone may run on."""
    line = np.full((HEADER, len(texts) * (width + MARGIN) - MARGIN, 3), 255, np.uint8)
    for index, text in enumerate(texts):
        place = index * (width + MARGIN) + 2, HEADER - 9
        cv2.putText(line, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1, cv2.LINE_AA)
    return line


def _named(text: str) -> tuple[str, Path]:
    """NAME=FILE, or a file that is called by its stem."""
    name, found, file = text.partition("=")
    path = Path(file if found else text)
    if not path.is_file():
        raise OptionError(f"{path} is no file; give models as FILE or NAME=FILE")
    return name if found else path.stem, path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pictures", description=(__doc__ or "").partition("\n\n")[0], epilog=(
        "example: tools/pictures FP32=rvm.onnx QDrop=rvm_qdrop.onnx vmq=rvm_w4a4.onnx --clip talk.mp4 -o talk.png"))
    add = parser.add_argument
    add("models", nargs="+", metavar="[NAME=]FILE", help="what is compared with, then what is compared")
    add("--clip", type=Path, required=True, metavar="PATH", help="a video, a folder of frames, or one with com/")
    add("--frames", type=int, metavar="N", help="run so many frames (default: all)")
    add("--moments", type=int, nargs="+", metavar="N", help="frames to show (default: at each quarter)")
    add("--column", type=int, metavar="X", help="column of pixels (default: the one with most soft alpha)")
    add("--width", type=int, default=384, metavar="N", help="of a tile, in pixels (default: 384)")
    add("-o", "--output", type=Path, required=True, metavar="FILE.png")
    return parser


if __name__ == "__main__":
    sys.exit(main())
