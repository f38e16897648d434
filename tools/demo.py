"""The main job from end to end: fetch RVM, compile it at 8 and 4 bits on the built-in clips, matte a clip, score.

Every step is a `vmq` command, printed before it runs; what is made goes to out/demo. The clips that it is scored
on are others than those it is calibrated on.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np

from vmq.clips import Clip, open_clips
from vmq.runtime import Session
from vmq.synthetic import synthetic_clips
from vmq.writer import open_writer

ROOT = Path(__file__).resolve().parents[1]
EVALUATION_SEED = 1
"""The built-in clips that `vmq compile` calibrates on have seed 0."""
BITS = ("8", "w4a8", "4")
PICTURE_FRAME = 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="an RVM you have, 512x288 or free size, instead of fetching one")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "demo", help="default: out/demo")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    model = args.model or args.out / "rvm.onnx"
    if not model.exists():
        vmq("fetch", "rvm", "-o", str(model))
    clips = write_clips(args.out / "clips")
    compiled = []
    for bits in BITS:
        compiled.append(args.out / f"rvm_{'w8a8' if bits == '8' else 'w4a4' if bits == '4' else bits}.onnx")
        vmq("compile", str(model), "--bits", bits, "--effort", "fast", "-o", str(compiled[-1]))
    vmq("run", str(compiled[0]), str(clips / "builtin_0" / "com"), "-o", str(args.out / "matte.mp4"),
        "--background", "#3070b0")
    vmq("eval", *map(str, [model, *compiled]), str(clips), "--reference", str(model))
    picture = write_picture(open_clips([clips])[0], [model, *compiled], args.out / "matte.png")
    print(f"\na clip before a new background: {args.out / 'matte.mp4'}\n"
          f"input, alpha of {', '.join(p.stem for p in [model, *compiled])}, and composite: {picture}")
    return 0


def vmq(*arguments: str) -> None:
    """Run a vmq command, shown as it would be typed."""
    shown = [str(Path(a).relative_to(ROOT)) if a.startswith(str(ROOT)) else a for a in arguments]
    print(f"\n$ vmq {' '.join(shown)}", flush=True)
    code = subprocess.run([sys.executable, "-m", "vmq", *arguments], check=False).returncode
    if code:
        sys.exit(code)


def write_clips(folder: Path) -> Path:
    """Built-in clips as files, in the layout of RVM's test sets: CLIP/com/*.png and CLIP/pha/*.png."""
    for index, clip in enumerate(synthetic_clips(count=2, frames=24, seed=EVALUATION_SEED)):
        target = folder / f"builtin_{index}"
        if target.exists():
            continue
        target.mkdir(parents=True)
        alpha = clip.alpha()
        assert alpha is not None
        for name, frames in (("com", clip.frames()), ("pha", alpha)):
            with open_writer(target / name, clip.fps, clip.size) as writer:
                for frame in frames:
                    writer.write(frame)
    return folder


def write_picture(clip: Clip, models: list[Path], path: Path) -> Path:
    """One moment side by side: input, alpha of each model, and the second model's composite on a new background."""
    frames = list(clip.frames(0, PICTURE_FRAME + 1))
    tiles = [frames[-1].transpose(1, 2, 0)]
    composite = tiles[0]
    for index, model in enumerate(models):
        session = Session(model)
        for frame in frames:
            outputs = session.step(frame)
        alpha = session.alpha_of(outputs)[..., None]
        tiles.append(np.repeat(np.rint(alpha * 255), 3, axis=2).astype(np.uint8))
        if index == 1:
            foreground = session.foreground_of(outputs)
            colours = frame / 255.0 if foreground is None else foreground
            over = colours.transpose(1, 2, 0) * alpha + np.array([0.19, 0.44, 0.69]) * (1 - alpha)
            composite = np.rint(over * 255).astype(np.uint8)
    tiles.append(composite)
    rows = [np.concatenate(tiles[i:i + 3], axis=1) for i in range(0, len(tiles), 3)]
    height, width = rows[0].shape[:2]
    rows = [np.pad(r, ((0, 0), (0, width - r.shape[1]), (0, 0)), constant_values=255) for r in rows]
    image = cv2.resize(np.concatenate(rows), (width // 2, height * len(rows) // 2), interpolation=cv2.INTER_AREA)
    path.write_bytes(cv2.imencode(".png", image[..., ::-1])[1].tobytes())
    return path


if __name__ == "__main__":
    sys.exit(main())
