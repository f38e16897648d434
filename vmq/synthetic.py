"""The built-in clips: a person moves before a moving background, and the alpha is exactly known.

    frame = round(alpha * foreground + (1 - alpha) * background + noise),   alpha in steps of 1/255

A cut-out portrait (vmq/figure, public domain) gets flyaway hairs, is mirrored, recoloured, and carried along smooth
paths (sideways, up, lean, size), partly out of the picture and back. It is drawn premultiplied at several moments of
the open shutter and averaged, so motion blurs colour and alpha alike; the average alpha, rounded to 8 bits, is both
the truth and what composites the frame. Backgrounds are procedural textures that pan, turn and drift.

Everything follows from (seed, clip index, frame index): any frame, drawn alone, in any order, has the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files
from typing import Any, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from vmq.clips import Clip
from vmq.errors import OptionError
from vmq.pictures import Frame, Size

Array = NDArray[np.float32]

FPS = 25.0
SHUTTER = 0.6  # share of the time between two frames that the shutter is open
MOMENTS = 5  # drawings averaged for motion blur
PADDING = 48  # pixels around the figure, for hairs


def synthetic_clips(size: Size = (288, 512), count: int = 8, frames: int = 32, seed: int = 0) -> list[Clip]:
    """Make clips of a person with exact alpha, drawn when they are read.

    Args:
        size: (H, W), each at least 32.
        count: number of clips; each has its own background, motion, colours and size of the person.
        frames: length of each; a longer clip begins with the very frames of a shorter one.
        seed: another seed, other clips.

    Raises:
        OptionError: a size below 32, or a count or length below 1.
    """
    if min(size) < 32 or count < 1 or frames < 1:
        raise OptionError(
            f"cannot make {count} built-in clips of {frames} frames at {size[1]}x{size[0]}: "
            "need at least 1 clip, 1 frame and 32x32 (or your own footage: --calib)"
        )

    def clip(index: int) -> Clip:
        def read(what: Callable[[Scene, int], Frame]) -> Callable[[int, int | None], Iterator[Frame]]:
            def draw(start: int, stop: int | None) -> Iterator[Frame]:
                for number in range(start, frames if stop is None else stop):
                    yield what(scene(size, seed, index), number)

            return draw

        name = f"built-in-{index}-{_backdrop_kind(index).__name__.strip('_')}"
        return Clip(name, FPS, size, frames, read(Scene.frame), read(Scene.alpha))

    return [clip(index) for index in range(count)]


@dataclass(frozen=True)
class Layers:
    """What a frame is made of, all of one size, RGB: alpha uint8 [H,W], the others float32 [H,W,3] in 0..255."""

    foreground: Array
    alpha: Frame
    background: Array
    noise: Array


@lru_cache(maxsize=4)
def scene(size: Size, seed: int, index: int) -> Scene:
    """Set the scene of a clip."""
    return Scene(size, seed, index)


class Scene:
    """One clip's figure, background and paths of motion.

    Attributes:
        size: (H, W).
        noise: standard deviation of the sensor noise, in steps of 1/255.
    """

    def __init__(self, size: Size, seed: int, index: int) -> None:
        self.size = size
        rng = np.random.default_rng((seed, index))
        height = size[0]
        figure = _with_hairs(_recoloured(_figure(), rng), rng)
        if rng.random() < 0.5:
            figure = np.ascontiguousarray(figure[:, ::-1])
        tall = _figure().shape[0]
        scale = height / tall * (0.84 + 0.16 * (index * 3 % 8) / 2 + rng.uniform(0, 0.1))
        self._largest = scale * 1.1
        self._headroom = (PADDING + 2) * self._largest
        figure = np.pad(figure, [(2, 0), (2, 2), (0, 0)])
        how = cv2.INTER_AREA if self._largest < 1 else cv2.INTER_LINEAR
        self._figure = cast(Array, cv2.resize(figure, None, fx=self._largest, fy=self._largest, interpolation=how))
        self._scale = Path(rng, scale, scale * 0.06, 60)
        self._lean = Path(rng, 0, 0.09, 45)
        leaves = index % 4 == 2  # goes partly out of the picture and comes back
        middle, swing = size[1] * rng.uniform(0.35, 0.65), size[1] * (0.3 if leaves else 0.1)
        self._x = Path(rng, middle, swing, 110 if leaves else 60)
        self._top = Path(rng, height * 0.08, height * 0.06, 40)
        self._backdrop = _backdrop(index, size, rng)
        pan = 0.1 * min(size)
        self._pan = (
            Path(rng, 0, pan, 80),
            Path(rng, 0, pan * 0.6, 90),
            Path(rng, 0, 0.05, 70),
            Path(rng, 1.12, 0.07, 75),
        )
        self._gain = Path(rng, 1, 0.12 if index % 3 == 1 else 0.02, 50)
        self._tint = Path(rng, 0, 0.05 if index % 3 == 2 else 0.0, 60)
        self.noise = float(rng.uniform(0.5, 2.5))
        self._grain = (rng.standard_normal((height + 61, size[1] + 61, 3)) * self.noise).astype(np.float32)
        self._key = seed, index
        self._latest: tuple[int, Array] | None = None  # frame and alpha are often asked for in turn

    def frame(self, number: int) -> Frame:
        """Draw a frame, uint8 [3,H,W] RGB."""
        layers = self.layers(number)
        alpha = layers.alpha.astype(np.float32)[..., None] / np.float32(255)
        image = layers.foreground * alpha + layers.background * (1 - alpha) + layers.noise
        return np.ascontiguousarray(np.clip(np.rint(image), 0, 255).astype(np.uint8).transpose(2, 0, 1))

    def alpha(self, number: int) -> Frame:
        """Draw the exact alpha of a frame, uint8 [H,W]."""
        return _eight_bit(self._drawn(number)[..., 3])

    def layers(self, number: int) -> Layers:
        """Draw what a frame is made of."""
        drawn = self._drawn(number)
        foreground = drawn[..., :3] / np.maximum(drawn[..., 3:], 1e-4)
        gain, tint = self._gain(number), self._tint(number)
        light = _floats([gain * (1 + tint), gain, gain * (1 - tint)])
        rng = np.random.default_rng((*self._key, number))
        top, left = rng.integers(0, 62, 2)
        grain = self._grain[top : top + self.size[0], left : left + self.size[1]]
        background = self._background(number)
        return Layers(
            np.clip(foreground * light, 0, 255), _eight_bit(drawn[..., 3]), np.clip(background * light, 0, 255), grain
        )

    def _drawn(self, number: int) -> Array:
        """Draw the figure, premultiplied RGBA [H,W,4] with alpha 0..1, averaged over the open shutter."""
        latest = self._latest
        if latest is not None and latest[0] == number:
            return latest[1]
        total = np.zeros((*self.size, 4), np.float32)
        for moment in range(MOMENTS):
            time = number + SHUTTER * (moment / (MOMENTS - 1) - 0.5)
            total += cv2.warpAffine(self._figure, self._placed(time), self.size[::-1], flags=cv2.INTER_LINEAR)
        total /= np.float32(MOMENTS)
        self._latest = number, total
        return total

    def _placed(self, time: float) -> NDArray[np.float64]:
        """Where the figure stands, 2x3: it leans about the middle of its lower edge, which stays out of sight."""
        scale, lean = self._scale(time) / self._largest, self._lean(time)
        tall, wide = self._figure.shape[:2]
        cosine, sine = scale * np.cos(lean), scale * np.sin(lean)
        turn = np.array([[cosine, -sine], [sine, cosine]])
        below = self.size[0] + 1 + abs(sine) * wide / 2
        foot = np.array([self._x(time), max(below, self._top(time) + cosine * (tall - self._headroom))])
        return np.column_stack([turn, foot - turn @ np.array([wide / 2, tall])])

    def _background(self, time: float) -> Array:
        right, down, angle, zoom = (path(time) for path in self._pan)
        tall, wide = self._backdrop.shape[:2]
        cosine, sine = zoom * np.cos(angle), zoom * np.sin(angle)
        turn = np.array([[cosine, -sine], [sine, cosine]])
        middle = np.array([self.size[1] / 2 + right, self.size[0] / 2 + down])
        place = np.column_stack([turn, middle - turn @ np.array([wide / 2, tall / 2])])
        return cast(Array, cv2.warpAffine(self._backdrop, place, self.size[::-1], borderMode=cv2.BORDER_REFLECT_101))


class Path:
    """A smooth movement about a middle value: two sine waves, the slower one with the given period in frames."""

    def __init__(self, rng: np.random.Generator, middle: float, amplitude: float, period: float) -> None:
        self._middle = middle
        self._waves = [
            (amplitude * share, 2 * np.pi / (period * stretch * rng.uniform(0.8, 1.25)), rng.uniform(0, 2 * np.pi))
            for share, stretch in ((0.88, 1.0), (0.12, 0.37))
        ]

    def __call__(self, time: float) -> float:
        """Give the value at a time, in frames."""
        return float(self._middle + sum(size * np.sin(speed * time + phase) for size, speed, phase in self._waves))


def _floats(values: object) -> Array:
    return np.asarray(values, np.float32)


def _eight_bit(alpha: Array) -> Frame:
    return np.clip(np.rint(alpha * 255), 0, 255).astype(np.uint8)


@cache
def _figure() -> Array:
    """The cut-out person, RGBA [H,W,4], straight, colours 0..255, alpha 0..1."""

    def read(name: str, mode: int) -> NDArray[Any]:
        data = np.frombuffer(files("vmq").joinpath("figure", name).read_bytes(), np.uint8)
        return np.asarray(cv2.imdecode(data, mode))

    colour = read("colour.jpg", cv2.IMREAD_COLOR)[..., ::-1].astype(np.float32)
    alpha = read("alpha.png", cv2.IMREAD_GRAYSCALE).astype(np.float32) / 255
    return np.dstack([colour, alpha])


def _recoloured(figure: Array, rng: np.random.Generator) -> Array:
    """Give the suit another hue, and move brightness, contrast and white balance a little."""
    colour = figure[..., :3]
    hsv = _floats(cv2.cvtColor(colour / 255, cv2.COLOR_RGB2HSV))
    suit = np.clip((hsv[..., 1] - 0.25) / 0.2, 0, 1)[..., None]
    suit[: round(0.39 * len(suit))] = 0  # head and neck
    hue = (hsv[..., 0] + rng.uniform(0, 360)) % 360
    dress = np.dstack([hue, hsv[..., 1] * rng.uniform(0.3, 0.9), hsv[..., 2] * rng.uniform(0.45, 1.0)])
    other = _floats(cv2.cvtColor(_floats(dress), cv2.COLOR_HSV2RGB)) * 255
    colour = colour * (1 - suit) + other * suit
    colour = (colour - 110) * rng.uniform(0.85, 1.1) + 110 * rng.uniform(0.85, 1.1)
    return _floats(np.dstack([np.clip(colour * rng.uniform(0.94, 1.06, 3), 0, 255), figure[..., 3]]))


def _with_hairs(figure: Array, rng: np.random.Generator) -> Array:
    """Add thin hairs that start at the outline of the head; gives premultiplied RGBA with a border all around."""
    pad = [(PADDING, 0), (PADDING, PADDING)]
    alpha = np.pad(figure[..., 3], pad)
    colour = np.dstack([np.pad(figure[..., channel], pad, mode="edge") for channel in range(3)])
    head = PADDING + 110  # hair ends about here
    outlines, _ = cv2.findContours((alpha[:head] > 0.5).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    outline = max(outlines, key=len)[:, 0, :].astype(np.float64)
    outline = outline[outline[:, 1] < head - 2]
    centre = outline.mean(axis=0)
    fine = 4
    hairs = np.zeros_like(alpha)
    for _ in range(3):  # bundles that overlap add up
        sheet = np.zeros((alpha.shape[0] * fine, alpha.shape[1] * fine), np.uint8)
        for _ in range(int(rng.integers(30, 60))):
            root = outline[rng.integers(len(outline))]
            outward = (root - centre) / np.linalg.norm(root - centre)
            along = np.array([-outward[1], outward[0]]) * rng.choice([-1, 1])
            length, bend = rng.gamma(2.0, 5.0) + 3, rng.uniform(-0.3, 1.6)
            step = np.linspace(0, 1, 12)[:, None]
            curve = root - 3 * outward + length * (outward * step + along * bend * step**2 * 0.7 + [0, 0.3] * step**2)
            strength = int(rng.integers(110, 256))
            cv2.polylines(sheet, [np.rint(curve * fine * 16).astype(np.int32)], False, strength, 2, cv2.LINE_AA, 4)
        bundle = cv2.resize(sheet, alpha.shape[::-1], interpolation=cv2.INTER_AREA).astype(np.float32) / 255
        hairs += (1 - hairs) * bundle
    whole = alpha + (1 - alpha) * hairs
    return np.dstack([colour * whole[..., None], whole])


def _backdrop_kind(index: int) -> Callable[[int, int, np.random.Generator], Array]:
    return (_foliage, _bricks, _sky, _curtain, _tiles, _lights, _shelf, _room)[index % 8]


def _backdrop(index: int, size: Size, rng: np.random.Generator) -> Array:
    """Draw one of the background textures, RGB float32 0..255, a quarter larger than the picture."""
    picture = _backdrop_kind(index)(round(size[0] * 1.25), round(size[1] * 1.25), rng)
    return np.clip(picture, 0, 255).astype(np.float32)


def _value_noise(tall: int, wide: int, rng: np.random.Generator, cell: float, octaves: int) -> Array:
    """Sum of random grids, each half as coarse and half as strong as the one before; mean about 0, range about 1."""
    total = np.zeros((tall, wide), np.float32)
    for octave in range(octaves):
        side = max(cell / 2**octave, 1.0)
        grid = rng.uniform(-0.5, 0.5, (int(tall / side) + 3, int(wide / side) + 3)).astype(np.float32)
        total += cv2.resize(grid, (wide, tall), interpolation=cv2.INTER_CUBIC) * 0.5**octave
    return total


def _mixed(low: object, high: object, share: Array) -> Array:
    """Blend between two colours, or pictures, by share 0..1."""
    a, b = np.asarray(low, np.float32), np.asarray(high, np.float32)
    return a + (b - a) * np.clip(share, 0, 1)[..., None]


def _foliage(tall: int, wide: int, rng: np.random.Generator) -> Array:
    coarse = _value_noise(tall, wide, rng, tall / 4, 6) + 0.5
    fine = _value_noise(tall, wide, rng, tall / 16, 4)
    leaves = _mixed((28, 48, 20), (130, 165, 70), coarse + 0.6 * fine)
    return _mixed(leaves, (225, 230, 215), np.clip(_value_noise(tall, wide, rng, tall / 6, 3) * 6 - 2.4, 0, 0.8))


def _bricks(tall: int, wide: int, rng: np.random.Generator) -> Array:
    high, long = max(tall // 16, 4), max(tall // 7, 8)
    y, x = np.mgrid[0:tall, 0:wide]
    row = y // high
    shifted = x + (row % 2) * (long // 2)
    tone = rng.uniform(-0.25, 0.25, (tall // high + 1, wide // long + 3)).astype(np.float32)[row, shifted // long]
    grain = _value_noise(tall, wide, rng, tall / 10, 5)
    wall = _mixed((120, 80, 66), (176, 128, 106), 0.5 + tone + 0.5 * grain)
    mortar = ((y % high < high * 0.14) | (shifted % long < high * 0.14)).astype(np.float32)
    return _mixed(wall, (190, 184, 174), cv2.GaussianBlur(mortar, (0, 0), 0.8) * 0.8)


def _sky(tall: int, wide: int, rng: np.random.Generator) -> Array:
    down = np.linspace(0, 1, tall, dtype=np.float32)[:, None] * np.ones((1, wide), np.float32)
    sky = _mixed((70, 120, 190), (205, 220, 235), down * 1.2)
    sky = _mixed(sky, (250, 250, 248), np.clip(_value_noise(tall, wide, rng, tall / 3, 5) * 2.2, 0, 0.9))
    ridge = 0.68 + 0.25 * _value_noise(1, wide, rng, tall / 3, 4)
    land = _mixed((60, 78, 52), (128, 132, 90), _value_noise(tall, wide, rng, tall / 10, 5) + 0.5)
    return _mixed(sky, land, np.clip((down - ridge) * tall / 3, 0, 1))


def _curtain(tall: int, wide: int, rng: np.random.Generator) -> Array:
    y, x = np.mgrid[0:tall, 0:wide].astype(np.float32)
    folds = x + tall * 0.04 * np.sin(y / tall * 5) + 10 * _value_noise(tall, wide, rng, tall / 2, 2)
    wave = 0.5 + 0.3 * np.sin(folds * 2 * np.pi / (tall * 0.11)) + 0.2 * np.sin(folds * 2 * np.pi / (tall * 0.047))
    cloth = _mixed((44, 58, 92), (150, 166, 196), wave)
    return cloth + 14 * _value_noise(tall, wide, rng, 4, 2)[..., None]


def _tiles(tall: int, wide: int, rng: np.random.Generator) -> Array:
    y, x = np.mgrid[0:tall, 0:wide].astype(np.float32)
    side = tall / 7
    u, v = (x + 0.25 * y) / side, (y - 0.25 * x) / side
    board = ((np.floor(u) + np.floor(v)) % 2).astype(np.float32)
    tiles = _mixed((206, 200, 188), (96, 112, 116), cv2.GaussianBlur(board, (0, 0), 0.8))
    return tiles + 30 * _value_noise(tall, wide, rng, tall / 5, 5)[..., None]


def _lights(tall: int, wide: int, rng: np.random.Generator) -> Array:
    night = _mixed((14, 16, 30), (62, 52, 66), _value_noise(tall, wide, rng, tall / 2, 4) + 0.5)
    for _ in range(46):
        glow = np.zeros((tall, wide), np.float32)
        where = int(rng.integers(wide)), int(rng.integers(tall))
        cv2.circle(glow, where, int(tall * rng.uniform(0.015, 0.055)), 1.0, -1, cv2.LINE_AA)
        glow = _floats(cv2.GaussianBlur(glow, (0, 0), tall * 0.004))
        night += glow[..., None] * rng.uniform((90, 50, 20), (200, 160, 150)).astype(np.float32) * rng.uniform(0.3, 0.9)
    return night


def _shelf(tall: int, wide: int, rng: np.random.Generator) -> Array:
    picture = _floats(np.full((tall, wide, 3), (66, 46, 34)))
    board = tall // 4
    for top in range(0, tall, board):
        left = 0
        while left < wide:
            thick, high = int(tall * rng.uniform(0.02, 0.06)), int(board * rng.uniform(0.62, 0.88))
            spine = rng.uniform(40, 170) + rng.uniform(-32, 32, 3)
            bottom = top + board - tall // 40
            cv2.rectangle(picture, (left, bottom - high), (left + thick - 2, bottom), spine.tolist(), -1)
            stripe = bottom - int(high * rng.uniform(0.3, 0.8))
            cv2.rectangle(picture, (left, stripe), (left + thick - 2, stripe + 4), (spine * 1.3 + 20).tolist(), -1)
            left += thick
        cv2.rectangle(picture, (0, top + board - tall // 40), (wide, top + board), (128, 92, 62), -1)
    return cv2.GaussianBlur(picture, (0, 0), 0.9) + 16 * _value_noise(tall, wide, rng, tall / 8, 5)[..., None]


def _room(tall: int, wide: int, rng: np.random.Generator) -> Array:
    picture = _floats(np.full((tall, wide, 3), (186, 178, 164)))
    for left in (0.05, 0.4, 0.75):
        x0, x1 = int(wide * left), int(wide * (left + 0.2))
        y0, y1 = int(tall * 0.12), int(tall * 0.62)
        pane = _mixed((150, 190, 226), (240, 244, 246), _value_noise(y1 - y0, x1 - x0, rng, tall / 5, 4) + 0.5)
        picture[y0:y1, x0:x1] = pane
        frame = (232, 230, 224)
        cv2.rectangle(picture, (x0, y0), (x1, y1), frame, max(tall // 60, 1))
        cv2.line(picture, ((x0 + x1) // 2, y0), ((x0 + x1) // 2, y1), frame, max(tall // 80, 1))
        cv2.line(picture, (x0, (y0 + y1) // 2), (x1, (y0 + y1) // 2), frame, max(tall // 80, 1))
    cv2.rectangle(picture, (0, int(tall * 0.78)), (wide, tall), (118, 92, 70), -1)
    cv2.rectangle(picture, (0, int(tall * 0.76)), (wide, int(tall * 0.78)), (214, 208, 200), -1)
    return cv2.GaussianBlur(picture, (0, 0), 1.0) + 22 * _value_noise(tall, wide, rng, tall / 4, 6)[..., None]
