"""Train a small MODNet on composites with alpha: minutes on a CPU, the same weights every time.

    L = |pha - a| (edges count fivefold) + |detail - a| at edges + 10 (semantic - a at 1/16)^2

(Ke et al. 2020 eq. 2 to 4, with the same supervision of all three branches.) It learns a few people in front of a few
backgrounds, no more; its errors under quantization mean something, its mattes of strangers do not. The result is a
state dict for `python -m models.modnet --weights`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models import modnet
from models.exporting import parse_size, written_whole
from vmq.clips import Clip, open_clips
from vmq.errors import MediaError, OptionError, VmqError
from vmq.files import check_output
from vmq.synthetic import synthetic_clips

WARM_UP = 20
"""Steps over which the rate rises."""
WIDTHS = (0.25, 0.5, 0.75, 1.0)
"""Widths of the backbone: 8, 16, 24 and 32 channels of its first layer, by which `modnet.build` knows them."""


class Footage:
    """All frames with their alpha in memory, and batches of them: cropped, mirrored, of other brightness and colour."""

    def __init__(self, clips: Sequence[Clip], size: tuple[int, int], seed: int) -> None:
        for clip in clips:
            if not clip.has_alpha:
                raise MediaError(f"{clip.name} has no alpha; give folders with com/ and pha/")
        self.size, self.rng = size, np.random.default_rng(seed)
        self.frames = torch.from_numpy(np.stack([f for clip in clips for f in clip.frames()]))
        self.alphas = torch.from_numpy(np.stack([a for clip in clips for a in clip.alpha() or ()]))[:, None]

    def batch(self, count: int) -> tuple[Tensor, Tensor]:
        """Frames [N,3,H,W] and alpha [N,1,H,W], both in 0..1."""
        made = [self._one(int(k)) for k in self.rng.integers(0, len(self.frames), count)]
        return torch.cat([f for f, _ in made]), torch.cat([a for _, a in made])

    def _one(self, index: int) -> tuple[Tensor, Tensor]:
        both = torch.cat([self.frames[index], self.alphas[index]])[None].float() / 255
        height, width = both.shape[2:]
        share = self.rng.uniform(0.75, 1.0)
        h, w = round(height * share), round(width * share)
        top, left = self.rng.integers(0, height - h + 1), self.rng.integers(0, width - w + 1)
        both = F.interpolate(both[:, :, top:top + h, left:left + w], self.size, mode="bilinear", antialias=True)
        if self.rng.random() < 0.5:
            both = both.flip(3)
        gamma, gains = self.rng.uniform(0.7, 1.4), torch.from_numpy(self.rng.uniform(0.8, 1.2, (1, 3, 1, 1))).float()
        return (both[:, :3].clamp(0, 1) ** gamma * gains).clamp(0, 1), both[:, 3:].clamp(0, 1)


def losses(model: modnet.MODNet, frames: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """What is minimised, and the mean |pha - a| alone."""
    matte, l8, h2 = model.predict(frames)
    semantic, detail = model.heads(frames, l8, h2)
    edge = (F.max_pool2d(alpha, 9, 1, 4) + F.max_pool2d(-alpha, 9, 1, 4) > 0.1).float()
    off = (matte - alpha).abs()
    whole = (off * (1 + 4 * edge)).mean() + (edge * (detail - alpha).abs()).mean() \
        + 10 * (semantic - F.avg_pool2d(alpha, 16)).square().mean()
    return whole, off.mean().detach()


def train(footage: Footage, *, steps: int, batch: int, rate: float, hr: int, width: float, seed: int) -> modnet.MODNet:
    """A MODNet that has seen `steps` batches."""
    model = modnet.build(hr=hr, width=width, seed=seed).train().requires_grad_(requires_grad=True)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min(
        (k + 1) / WARM_UP, 0.5 * (1 + np.cos(np.pi * k / steps)) + 1e-3))
    started, seen = time.perf_counter(), list[float]()
    for step in range(1, steps + 1):
        loss, off = losses(model, *footage.batch(batch))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        seen.append(float(off))
        if step % 25 == 0 or step == steps:
            print(f"step {step} of {steps}: MAD x 1e3 {np.mean(seen[-25:]) * 1e3:.1f}, "
                  f"{time.perf_counter() - started:.0f} s", flush=True)
    return model.eval().requires_grad_(requires_grad=False)


def check(options: argparse.Namespace) -> None:
    """Find before the training what would end it, or make its result useless.

    Raises:
        OptionError: an option is out of range.
        OutputError: the weights cannot be written.
    """
    for name, least in (("steps", 1), ("batch", 1), ("threads", 1), ("detail", 4)):
        if getattr(options, name) < least:
            raise OptionError(f"--{name} {getattr(options, name)}: give {least} or more")
    height, width = options.size
    if min(options.size) < modnet.MULTIPLE or height % modnet.MULTIPLE or width % modnet.MULTIPLE:
        raise OptionError(f"--size {width}x{height}: MODNet takes multiples of {modnet.MULTIPLE}")
    if options.width not in WIDTHS:
        raise OptionError(f"--width {options.width}: give one of {', '.join(map(str, WIDTHS))}, which the weights tell "
                          "when they are exported")
    check_output(options.output)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Train a small MODNet on footage with alpha.",
                                     epilog="example: tools/train_modnet footage/ -o modnet_small.pth")
    add = parser.add_argument
    add("footage", nargs="*", type=Path, help="folders with com/ and pha/, or of such (default: built-in clips)")
    add("--size", type=parse_size, default=(96, 160), metavar="WxH", help="of what is learned on (default 160x96)")
    add("--steps", type=int, default=1500)
    add("--batch", type=int, default=4)
    add("--rate", type=float, default=2e-3)
    add("--detail", type=int, default=16, metavar="N", help="channels of the detail branch (default 16; authors: 32)")
    add("--width", type=float, default=0.5, help="of the backbone: 0.25, 0.5 (default), 0.75, or 1 as the authors")
    add("--threads", type=int, default=1, help="other numbers give other last digits")
    add("--seed", type=int, default=0)
    add("-o", "--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    larger = (options.size[0] * 5 // 4, options.size[1] * 5 // 4)
    try:
        check(options)
        torch.set_num_threads(options.threads)
        clips = open_clips(options.footage, larger) if options.footage else synthetic_clips(larger, seed=options.seed)
        model = train(Footage(clips, options.size, options.seed), steps=options.steps, batch=options.batch,
                      rate=options.rate, hr=options.detail, width=options.width, seed=options.seed)
        with written_whole(options.output) as temporary:
            torch.save(model.state_dict(), temporary)
    except (VmqError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.output}: MODNet trained on {len(clips)} clips; "
          f"export it with python -m models.modnet --weights {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
