"""Optical flow, for a loss that asks consecutive mattes to move as the picture moves.

    flow(p)   where pixel p of the current frame was in the previous one, minus p:  (dx, dy) in pixels
    warp      W(x, flow)(p) = x(p + flow(p)), bilinear
    loss      mean |alpha_t - W(alpha_t-1, flow)|, which PTQ4VM (arXiv:2506.10840) adds with weight 0.05

Where a pixel was covered before, it has no flow. Flow there (f) and flow back (g, from previous to current) tell:

    |f(p) + g(p + f(p))|^2  <  0.01 (|f(p)|^2 + |g(p + f(p))|^2) + 0.5      Sundaram, Brox and Keutzer 2010

Flow comes from DIS (Kroeger et al. 2016, arXiv:1603.03590, in OpenCV), from RAFT (Teed and Deng 2020,
arXiv:2003.12039, in torchvision), or from files. It is computed once for a pair of frames and kept.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any, Protocol, cast

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vmq.clips import natural
from vmq.errors import FetchError, MediaError, OptionError, OutputError
from vmq.files import write_atomic
from vmq.pictures import Frame, Size

Floats = NDArray[np.float32]

FLO_MAGIC = 202021.25
"""The first four bytes of a Middlebury .flo, as float32 ("PIEH" in ASCII); Baker et al. 2011."""
SUFFIXES = frozenset({".flo", ".npz"})
MEMORY = 512 << 20
"""Bytes of flow kept in memory by default: about 450 pairs of 512x288."""
_DIS_LEAST = 32     # OpenCV's DIS reads beyond its pyramid when a side is shorter
_RAFT_LEAST = 128   # RAFT correlates features of an eighth of the size, and halves them three times


class Flow(Protocol):
    """What computes flow: a function of two frames, with a name."""

    @property
    def name(self) -> str:
        """Method and version: the same name, the same flow for the same frames."""

    def __call__(self, previous: Frame, current: Frame, /) -> Floats:
        """Lead from each pixel of the current frame to where it was in the previous one.

        Args:
            previous, current: uint8 [3,H,W] RGB.

        Returns:
            float32 [2,H,W]: (dx, dy) in pixels, x first.
        """
        ...


def open_flow(name: str | Path, cache: Path | None = None) -> Flow | FlowFolder:
    """Choose where flow comes from.

    Args:
        name: "dis" (quick, deterministic), "raft" (more exact; torchvision, which downloads weights of 4 MB), or a
            folder of flow computed elsewhere, see `FlowFolder`.
        cache: a folder that keeps what "dis" or "raft" computes; created when missing.

    Raises:
        OptionError: no such method or folder, or torchvision is missing.
        FetchError: RAFT's weights cannot be downloaded.
        OutputError: `cache` cannot be written.
    """
    if name == "dis":
        return CachedFlow(DisFlow(), cache)
    if name == "raft":
        return CachedFlow(RaftFlow(), cache)
    if not Path(name).is_dir():
        raise OptionError(f"no optical flow named {str(name)!r}, and no such folder: give dis, raft, or a folder of "
                          ".flo or .npz files")
    return FlowFolder(Path(name))


def flows(source: Flow | FlowFolder, frames: Frame, *, clip: str = "", start: int = 0) -> Floats:
    """Flow of each frame but the first to the one before it.

    With `frames[::-1]` it is the flow the other way, last pair first, which `consistent` wants; a `FlowFolder`
    knows one way only.

    Args:
        source: made by `open_flow`.
        frames: uint8 [T,3,H,W] RGB, T at least 1.
        clip: the clip's name, for a `FlowFolder`.
        start: the number of the first frame within the clip, for a `FlowFolder`.

    Returns:
        float32 [T-1,2,H,W], (dx, dy) in pixels.

    Raises:
        MediaError: a file of a `FlowFolder` is missing or damaged.
        OutputError: a cache cannot be written.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1] != 3 or len(frames) == 0:
        raise ValueError(f"expected uint8 [T,3,H,W] with T at least 1, got {frames.dtype} {list(frames.shape)}")
    size = (frames.shape[2], frames.shape[3])
    found = np.empty((len(frames) - 1, 2, *size), np.float32)
    for index in range(len(found)):
        found[index] = source.read(clip, start + index, size) if isinstance(source, FlowFolder) \
            else source(frames[index], frames[index + 1])
    return found


# ------------------------------------------------------------------------------------------------- where it comes from


class DisFlow:
    """DIS in its medium preset: about 25 ms for a pair of 512x288; the same bytes for any number of threads."""

    name = f"dis-medium, OpenCV {cv2.__version__}"

    def __call__(self, previous: Frame, current: Frame, /) -> Floats:
        """Flow as `Flow` describes it."""
        height, width = current.shape[1:]
        grey = [cv2.cvtColor(np.ascontiguousarray(frame.transpose(1, 2, 0)), cv2.COLOR_RGB2GRAY)
                for frame in (current, previous)]
        bottom, right = max(0, _DIS_LEAST - height), max(0, _DIS_LEAST - width)
        padded = [cv2.copyMakeBorder(image, 0, bottom, 0, right, cv2.BORDER_REPLICATE) for image in grey]
        method: Any = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        flow = method.calc(padded[0], padded[1], None)
        return np.ascontiguousarray(flow[:height, :width].transpose(2, 0, 1), np.float32)


class RaftFlow:
    """RAFT, the small model, with torchvision's weights.

    Raises:
        OptionError: torchvision is missing, or does not load.
        FetchError: the weights are not reachable, or not what was expected.
    """

    def __init__(self) -> None:
        try:
            version = importlib.import_module("torchvision").__version__
            models = importlib.import_module("torchvision.models.optical_flow")
        except ImportError as error:
            raise OptionError("flow by raft needs torchvision: install vmq[raft], or take dis") from error
        except RuntimeError as error:   # built for another torch
            raise OptionError(f"torchvision does not load ({_line(error)}): install the one for torch "
                              f"{torch.__version__}, or take dis for flow") from error
        weights = models.Raft_Small_Weights.DEFAULT
        try:
            self._model = models.raft_small(weights=weights, progress=False).eval()
        except (OSError, RuntimeError) as error:
            raise FetchError(f"RAFT's weights cannot be fetched ({_line(error)}): put {weights.url} into "
                             f"{Path(torch.hub.get_dir()) / 'checkpoints'}, or take dis for flow") from error
        self.name = f"raft-small {weights.name}, torchvision {version}"

    def __call__(self, previous: Frame, current: Frame, /) -> Floats:
        """Flow as `Flow` describes it."""
        height, width = current.shape[1:]
        bottom, right = (max(_RAFT_LEAST, -(-side // 8) * 8) - side for side in (height, width))
        with torch.inference_mode():
            first, second = (F.pad(torch.from_numpy(frame.astype(np.float32))[None] / 127.5 - 1.0,
                                   (0, right, 0, bottom), mode="replicate") for frame in (current, previous))
            flow = self._model(first, second)[-1][0, :, :height, :width]
        return np.ascontiguousarray(flow.numpy(), np.float32)


class FlowFolder:
    """Flow that was computed elsewhere, a file for each pair of frames.

    FOLDER/CLIP/0000.flo leads from frame 1 of the clip back to frame 0, and so on in natural order of the names;
    the files are Middlebury .flo, or .npz with "flow" as float [2,H,W]. What was computed at another size is scaled.
    A part of a clip (named CLIP@START) finds its files by itself; a folder without clips is that of the clip "".
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[Path, list[Path]] = {}

    def read(self, clip: str, index: int, size: Size) -> Floats:
        """Flow from frame index + 1 of a clip back to frame index, scaled to `size` (H, W): float32 [2,H,W].

        Raises:
            MediaError: it is missing, or the file is damaged.
        """
        name, folder = clip, self.folder / clip
        while not folder.is_dir():
            name, at, offset = name.rpartition("@")
            if not (at and offset.isdecimal()):
                raise MediaError(f"{self.folder / clip} is no folder: put the flow of the clip {clip} there")
            folder, index = self.folder / name, index + int(offset)
        if folder not in self._files:
            self._files[folder] = _listing(folder)
        files = self._files[folder]
        if index >= len(files):
            raise MediaError(f"{folder} holds {len(files)} .flo or .npz files, but the clip needs number {index + 1}: "
                             "each pair of frames needs one")
        flow = read_flow(files[index])
        return flow if flow.shape[1:] == size else scale_flow(torch.from_numpy(flow)[None], size)[0].numpy()


class CachedFlow:
    """Remembers flow by the content of the frames; a `Flow` around another one.

    In memory, the pairs used last; and in a folder, when one is given, as files that other runs find. A file that
    was damaged is computed and written again. The arrays it returns are read-only.

    Args:
        flow: computes what is not known yet.
        folder: created when missing.
        limit: bytes to keep in memory.

    Raises:
        OutputError: the folder cannot be written.
    """

    def __init__(self, flow: Flow, folder: Path | None = None, limit: int = MEMORY) -> None:
        self.name, self.folder, self.limit = flow.name, folder, limit
        self._flow = flow
        self._memory: OrderedDict[str, Floats] = OrderedDict()
        self._bytes = 0
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise OutputError(f"cannot keep flow in {folder}: {error.strerror}; choose another place") from error

    def __call__(self, previous: Frame, current: Frame, /) -> Floats:
        """Flow as `Flow` describes it, read-only."""
        key = hashlib.sha256(repr((self.name, previous.shape, current.shape)).encode())
        for frame in (previous, current):
            key.update(np.ascontiguousarray(frame).data)
        digest = key.hexdigest()
        if digest in self._memory:
            self._memory.move_to_end(digest)
            return self._memory[digest]
        flow = self._stored(digest, previous, current)
        flow.setflags(write=False)
        self._memory[digest] = flow
        self._bytes += flow.nbytes
        while self._bytes > self.limit:
            self._bytes -= self._memory.popitem(last=False)[1].nbytes
        return flow

    def _stored(self, digest: str, previous: Frame, current: Frame) -> Floats:
        """Flow out of the folder, or computed anew and put there."""
        path = None if self.folder is None else self.folder / f"{digest}.npz"
        if path is not None and path.is_file():
            try:
                flow = read_flow(path)
                if flow.shape[1:] == current.shape[1:]:
                    return flow
            except MediaError:
                pass    # damaged: computed again
        flow = self._flow(previous, current)
        if path is not None:
            write_flow(path, flow)
        return flow.copy()


# --------------------------------------------------------------------------------------------------------------- files


def read_flow(path: Path) -> Floats:
    """Read a .flo (Middlebury) or .npz (key "flow", float [2,H,W]): float32 [2,H,W], (dx, dy) in pixels.

    What a .flo marks as unknown (beyond 1e9) stays so: it points out of every frame, where `consistent` is false.

    Raises:
        MediaError: it is missing, damaged, of another kind, or holds NaN or infinity.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise MediaError(f"{path} cannot be read ({error.strerror or error}): check it") from error
    flow = _parse_flo(path, content) if path.suffix.lower() == ".flo" else _parse_npz(path, content)
    if flow.ndim != 3 or flow.shape[0] != 2 or flow.size == 0 or flow.dtype.kind != "f":
        raise MediaError(f"{path} holds {flow.dtype} {list(flow.shape)}: flow is float [2,H,W]")
    with np.errstate(over="ignore"):
        flow = np.ascontiguousarray(flow, np.float32)
    if not np.isfinite(flow).all():
        raise MediaError(f"{path} holds NaN or infinity: compute it again")
    return cast(Floats, flow)


def write_flow(path: Path, flow: Floats) -> None:
    """Write float32 [2,H,W] as .flo or .npz, by the name, whole or not at all.

    Raises:
        OutputError: it cannot be written there, or the name ends in something else.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise OutputError(f"cannot write {path}: flow is kept in files that end in .flo or .npz")
    flow = np.ascontiguousarray(flow, "<f4")
    if path.suffix.lower() == ".npz":
        buffer = io.BytesIO()
        np.savez(buffer, flow=flow)
        return write_atomic(path, buffer.getvalue())
    height, width = flow.shape[1:]
    return write_atomic(path, struct.pack("<fii", FLO_MAGIC, width, height) + flow.transpose(1, 2, 0).tobytes())


def _parse_flo(path: Path, content: bytes) -> NDArray[Any]:
    if len(content) < 12 or struct.unpack("<f", content[:4])[0] != FLO_MAGIC:
        raise MediaError(f"{path} is no Middlebury .flo: it does not begin with PIEH; compute it again")
    width, height = struct.unpack("<ii", content[4:12])
    if width < 1 or height < 1 or len(content) != 12 + 8 * width * height:
        raise MediaError(f"{path} is damaged, {len(content)} bytes are no .flo of {width}x{height}: compute it again")
    return np.frombuffer(content, "<f4", offset=12).reshape(height, width, 2).transpose(2, 0, 1)


def _parse_npz(path: Path, content: bytes) -> NDArray[Any]:
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            names = list(arrays)
            flow = arrays["flow"] if "flow" in names else None
    except Exception as error:  # damage takes many forms, in zip, zlib and numpy
        raise MediaError(f"{path} is no .npz, or damaged ({_line(error)}): compute it again") from error
    if flow is None:
        raise MediaError(f"{path} holds no array named 'flow', but {', '.join(names) or 'nothing'}: name it so")
    return cast("NDArray[Any]", flow)


def _listing(folder: Path) -> list[Path]:
    """List the flow files of a clip in natural order."""
    try:
        files = [entry for entry in folder.iterdir() if entry.suffix.lower() in SUFFIXES and entry.name[0] != "."]
    except OSError as error:
        raise MediaError(f"{folder} cannot be read ({error.strerror}): check its permissions") from error
    if len({file.suffix.lower() for file in files}) > 1:
        raise MediaError(f"{folder} holds both .flo and .npz: keep one kind")
    return sorted(files, key=lambda file: (natural(file.name), file.name))


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


# ------------------------------------------------------------------------------------------------------- what it is for


def warp(x: Tensor, flow: Tensor) -> Tensor:
    """Move x, of the previous frame, to where the current frame has it: x(p + flow(p)), bilinear.

    Beyond the border it takes the border's value. Positions are float64, so that zero flow changes nothing.

    Args:
        x: float [N,C,H,W]; gradients pass.
        flow: float [N,2,H,W], (dx, dy) in pixels.
    """
    if x.ndim != 4 or flow.shape != (x.shape[0], 2, *x.shape[2:]):
        raise ValueError(f"expected [N,C,H,W] and [N,2,H,W] of one size, got {list(x.shape)} and {list(flow.shape)}")
    size = torch.tensor([x.shape[3], x.shape[2]], dtype=torch.float64, device=x.device)
    grid = (2.0 * _positions(flow).permute(0, 2, 3, 1) + 1.0) / size - 1.0
    return F.grid_sample(x.double(), grid, "bilinear", "border", align_corners=False).to(x.dtype)


def consistent(flow_back: Tensor, flow_forward: Tensor) -> Tensor:
    """Where flow can be believed: the pixel was visible before, and the way there and back ends near its start.

    Args:
        flow_back: [N,2,H,W] from the current frame to the previous one, as everywhere here.
        flow_forward: [N,2,H,W] from the previous frame to the current one.

    Returns:
        bool [N,1,H,W] on the current frame; false too where `flow_back` leads out of the frame.
    """
    there, back = flow_back.double(), warp(flow_forward.double(), flow_back)
    energy = (there.square() + back.square()).sum(1, keepdim=True)
    close = (there + back).square().sum(1, keepdim=True) < 0.01 * energy + 0.5
    height, width = flow_back.shape[2:]
    positions = _positions(flow_back)
    x, y = positions[:, :1], positions[:, 1:]
    return close & (x >= -0.5) & (x <= width - 0.5) & (y >= -0.5) & (y <= height - 0.5)


def temporal_loss(alpha_prev: Tensor, alpha_next: Tensor, flow: Tensor, mask: Tensor | None = None) -> Tensor:
    """mean |alpha_next - warp(alpha_prev, flow)|, with gradients through both; PTQ4VM's term, there without a mask.

    Args:
        alpha_prev, alpha_next: float [N,C,H,W], mattes of consecutive frames.
        flow: [N,2,H,W] from the next frame back to the previous one, (dx, dy) in pixels.
        mask: bool or float weights [N,1,H,W] of the mean; where all are 0 the loss is 0.

    Returns:
        A scalar, not weighted: the caller multiplies by the 0.05.
    """
    off = (alpha_next - warp(alpha_prev, flow)).abs()
    if mask is None:
        return off.mean()
    weight = mask.to(off.dtype).expand_as(off)
    return (weight * off).sum() / weight.sum().clamp(min=torch.finfo(off.dtype).tiny)


def scale_flow(flow: Tensor, size: Size) -> Tensor:
    """Flow of the same frames at another size (H, W): resized bilinearly, and its vectors with it.

    Args:
        flow: float [N,2,H,W], (dx, dy) in pixels.
        size: (H, W) of the frames it is for.
    """
    height, width = flow.shape[2:]
    if (height, width) == tuple(size):
        return flow
    factors = torch.tensor([size[1] / width, size[0] / height], dtype=flow.dtype, device=flow.device)
    resized = F.interpolate(flow, tuple(size), mode="bilinear", align_corners=False, antialias=True)
    return resized * factors[:, None, None]


def _positions(flow: Tensor) -> Tensor:
    """Where each pixel's flow leads: float64 [N,2,H,W], x and y in pixels."""
    height, width = flow.shape[2:]
    y, x = torch.meshgrid(torch.arange(height, dtype=torch.float64, device=flow.device),
                          torch.arange(width, dtype=torch.float64, device=flow.device), indexing="ij")
    return flow.double() + torch.stack((x, y))
