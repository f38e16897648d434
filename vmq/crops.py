"""What learning sees: crops of the footage, frame after frame, and the graph bound to the size of a crop.

A crop of half the width and height costs a quarter, and random rescaling (0.5 to 1 of the frame), mirroring, running
backwards and other colours make many sequences out of few clips: the float network says what is right in them. Crop
number n is drawn from the seed and n alone, so that work can be shared out and resumed.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vmq.clips import Clip
from vmq.errors import ModelError
from vmq.graph import Constant, Graph
from vmq.runtime import Session
from vmq.shadow import Shadow

SHORT_SIDE = 128
"""Crops are halved until their shorter side would be less than this."""
SHORTEST = 8
"""Nor is the shorter side of the smallest state made less than this: a network that looks at a small copy of a large
frame still has something to see."""
WARM_UP = 8
"""At most so many frames warm the state up before a sequence."""
BACKWARDS = 0.15
"""Share of sequences that run backwards."""
GAIN, GAMMA = 0.15, 0.2
"""Each colour is multiplied by 1 - GAIN to 1 + GAIN, and raised to a power of exp(-GAMMA) to exp(GAMMA)."""


def crop_graph(graph: Graph, frame_input: str) -> Graph:
    """A copy of a static graph at the size of a crop: its frame halved as often as `SHORT_SIDE`, `SHORTEST` and its
    shapes allow.

    Args:
        graph: with static shapes.
        frame_input: the input [1,3,H,W].
    """
    best, ratio = graph.copy(), 0.5
    frame = next(v for v in graph.inputs if v.name == frame_input)
    while ratio * min(frame.shape[2:]) >= SHORT_SIDE:
        try:
            smaller = resized(graph, ratio, larger=True)
        except ModelError:
            break
        if min(min(v.shape[2:]) for v in smaller.inputs if _is_picture(v.shape)) < SHORTEST:
            break
        best, ratio = smaller, ratio / 2
    return best


def resized(graph: Graph, ratio: float, *, larger: bool = False) -> Graph:
    """A copy of a static graph whose pictures, states and sizes to resize to are `ratio` times as high and wide.

    Args:
        larger: where that is not whole, they may be a little larger, if all of them are halves of halves, rounded up,
            as strides make them: of 270, 135, 68, 34 and 17 half is 144, 72, 36, 18 and 9.

    Raises:
        ModelError: there is no such size, or the shapes in the graph do not follow.
    """
    copy = graph.copy()
    pooled = {tuple(v.shape) for v in graph.values() if v.shape and len(v.shape) == 4 and not _is_picture(v.shape)}
    sized = []
    for node in copy.nodes:
        place = {"Expand": 1, "Resize": 3}.get(node.op)
        if place is not None and len(node.inputs) > place and isinstance(node.inputs[place], Constant):
            sizes = np.asarray(node.inputs[place].values)
            if sizes.size == 4 and tuple(sizes) not in pooled:
                sized.append((node, place, sizes.tolist()))
    shapes = [v.shape for v in (*graph.inputs, *graph.outputs) if v.shape and _is_picture(v.shape)]
    sides = [_scaled({s[axis] for s in (*shapes, *(s for *_, s in sized))}, ratio, larger) for axis in (2, 3)]

    def scaled(shape: Sequence[int]) -> list[int]:
        return [*shape[:2], sides[0][shape[2]], sides[1][shape[3]]]

    for value in copy.inputs:
        if _is_picture(value.shape):
            value.shape = scaled(value.shape)
    for node, place, sizes in sized:
        node.inputs[place] = copy.constant("size", np.asarray(scaled(sizes), np.int64))
    expected = {v.name: v.shape for v in copy.outputs}
    for value in copy.values():
        if not isinstance(value, Constant) and value.inputs:
            value.shape = None
    copy.infer_shapes()
    for value in copy.outputs:
        shape = expected[value.name]
        want = scaled(shape) if shape and _is_picture(shape) else shape
        if list(value.shape or []) != list(want or []):
            raise ModelError(f"output {value.name} is {value.shape} at {ratio} of the size, not {want}")
    return copy


def _is_picture(shape: Sequence[int]) -> bool:
    return len(shape) == 4 and tuple(shape[2:]) != (1, 1)


def _scaled(sides: Collection[int], ratio: float, larger: bool) -> dict[int, int]:
    """What each of these heights, or widths, becomes."""
    if all(side * ratio == int(side * ratio) for side in sides):
        return {side: int(side * ratio) for side in sides}
    halves = [max(sides)]
    while halves[-1] > min(sides):
        halves.append((halves[-1] + 1) // 2)
    if not larger or not set(sides) <= set(halves):
        raise ModelError(f"sides of {sorted(sides)} cannot be made {ratio} times as large")
    last = math.ceil(halves[0] * ratio / 2 ** (len(halves) - 1))
    return {side: last * 2 ** (len(halves) - 1 - k) for k, side in enumerate(halves)}


class Crops:
    """Random sequences of a fixed size out of clips.

    Args:
        clips: of one size, each read again and again.
        size: (H, W) of the crops, at most that of the clips.
        seed: of everything drawn.
    """

    def __init__(self, clips: Sequence[Clip], size: tuple[int, int], seed: int) -> None:
        self.clips, self.size, self.seed = [c for c in clips if len(c)], size, seed

    @classmethod
    def for_graph(cls, graph: Graph, frame_input: str, clips: Sequence[Clip], seed: int) -> Crops:
        """Of the size of a graph's frames."""
        shape = next(v.shape for v in graph.inputs if v.name == frame_input)
        return cls(clips, (shape[2], shape[3]), seed)

    def draw(self, number: int, length: int, alpha: bool = False) -> tuple[Tensor, Tensor | None]:
        """Sequence number `number`: frames [T,1,3,h,w] and, if asked for and known, alpha [T,1,1,h,w], in 0..1.

        T is `length`, or that of the clip where it is shorter.
        """
        rng = np.random.default_rng((self.seed, 7919, number))
        clip = self.clips[rng.integers(len(self.clips))]
        length = min(length, len(clip))
        start = int(rng.integers(len(clip) - length + 1))
        height, width = self.size
        share = max(height / clip.size[0], width / clip.size[1])
        share += (1.0 - share) * rng.random()
        shape = max(height, round(clip.size[0] * share)), max(width, round(clip.size[1] * share))
        top, left = (int(rng.integers(n - m + 1)) for n, m in zip(shape, self.size, strict=True))
        mirrored, backwards = rng.random() < 0.5, rng.random() < BACKWARDS
        gains, gamma = 1.0 + GAIN * rng.uniform(-1.0, 1.0, 3), np.exp(GAMMA * rng.uniform(-1.0, 1.0))
        curves = np.minimum(np.linspace(0.0, 1.0, 256)[:, None] ** gamma * gains, 1.0)
        curves = np.rint(255.0 * curves).astype(np.uint8)[None]

        def cut(picture: NDArray[np.uint8], colours: NDArray[np.uint8] | None = None) -> Tensor:
            rows: Any = np.ascontiguousarray(picture.transpose(1, 2, 0) if picture.ndim == 3 else picture)
            if shape != rows.shape[:2]:
                rows = cv2.resize(rows, shape[::-1], interpolation=cv2.INTER_AREA)
            rows = rows[top:top + height, left:left + width]
            rows = rows if colours is None else cv2.LUT(np.ascontiguousarray(rows), colours)
            rows = rows[:, ::-1] if mirrored else rows
            rows = rows.reshape(height, width, -1).transpose(2, 0, 1)
            return torch.from_numpy(np.ascontiguousarray(rows)).float() / 255.0

        def stack(pictures: Sequence[Tensor]) -> Tensor:
            return torch.stack(list(pictures)[::-1] if backwards else list(pictures))[:, None]

        mattes = clip.alpha(start, start + length) if alpha else None
        return (stack([cut(f, curves) for f in clip.frames(start, start + length)]),
                None if mattes is None else stack([cut(m) for m in mattes]))


@torch.no_grad()
def warm_sequence(number: int, crops: Crops, frames: int, exact: Shadow, session: Session) -> dict[str, list[Tensor]]:
    """What goes into a float network in each of some frames: the frames, and the states that it is in by then.

    Args:
        number: of the sequence; it decides how many frames warm the states up, `WARM_UP` at most.
        crops: where it comes from.
        frames: how many; a shorter clip gives fewer.
        exact: the network at the size of the crops.
        session: of the same network at full size, which knows what its inputs are.

    Returns:
        Tensors by name of the input, one a frame.
    """
    device = exact.device
    warm = int(np.random.default_rng((crops.seed, number)).integers(WARM_UP + 1))
    pictures, truth = crops.draw(number, warm + frames, alpha=session.first_alpha_input is not None)
    states = {p.input: p.output for p in session.state_pairs}
    kept: dict[str, list[Tensor]] = {session.frame_input: [], **{i: [] for i in states}}
    state = {v.name: torch.zeros(v.shape, device=device) for v in exact.graph.inputs if v.name in states}
    if session.first_alpha_input is not None and truth is not None:
        state[session.first_alpha_input] = truth[0].to(device)
    first = max(0, len(pictures) - frames)
    for t, frame in enumerate(torch.from_numpy(session.normalized(pictures.numpy())).to(device)):
        if t >= first:
            kept[session.frame_input].append(frame)
            for name, value in state.items():
                kept[name].append(value)
        new = exact.run({session.frame_input: frame, **state}, tuple(states.values()))
        state = {i: new[o] for i, o in states.items()}
    return kept
