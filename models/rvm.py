"""Robust Video Matting (Lin et al., 2021, arXiv:2108.11515) in torch, and its export to ONNX.

    src --downsample--> s --backbone--> f1 f2 f3 f4 (1/2 ... 1/16) --LR-ASPP on f4--> decoder --> fgr, pha

The decoder goes back up from 1/16 to 1/1. At four of its levels a ConvGRU sees one half of the channels and keeps

    h' = (1 - z) * h + z * tanh(conv([x, r * h])),    [r, z] = sigmoid(conv([x, h]))

as the recurrent states r1 (finest) ... r4 (coarsest). With a downsample ratio the network runs on a small image and a
guided filter (He et al.; deep: Wu et al., 2018) brings its result to full size:

    out = up(A) * [src, gray] + up(b),    b = mean(y) - A * mean(x),    A = cov(x, y) / (var(x) + eps)  or learned.

Parameter names are those of the authors' released state dicts, whose weights are GPL-3.0.

    python -m models.rvm --weights rvm_mobilenetv3.pth --size 512x288 -o rvm.onnx
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbones import MobileNetV3, ResNet50, conv_bn
from models.exporting import Parser, WeightsError, fit, load_state, parse_size, written_whole

__all__ = ["INPUT_NAMES", "OUTPUT_NAMES", "REFINERS", "RVM", "VARIANTS", "WeightsError", "build", "export",
           "load_state"]

VARIANTS = ("mobilenetv3", "resnet50")
REFINERS = ("deep", "fast")
INPUT_NAMES = ("src", "r1i", "r2i", "r3i", "r4i")
OUTPUT_NAMES = ("fgr", "pha", "r1o", "r2o", "r3o", "r4o")


class LRASPP(nn.Module):
    """Lite R-ASPP: a 1x1 conv, gated per channel by the pooled input. [N,C,h,w] to [N,channels,h,w]."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.aspp1 = conv_bn(channels_in, channels, 1, nn.ReLU, eps=1e-5)
        self.aspp2 = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels_in, channels, 1, bias=False), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        gated: Tensor = self.aspp1(x) * self.aspp2(x)
        return gated


# ------------------------------------------------------------------------------------------------------ decoder


class ConvGRU(nn.Module):
    """A gated recurrent unit of 3x3 convs. x [N,C,h,w] and a state of the same shape (or 1x1x1x1) to the new state."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.ih = nn.Sequential(nn.Conv2d(2 * channels, 2 * channels, 3, padding=1), nn.Sigmoid())
        self.hh = nn.Sequential(nn.Conv2d(2 * channels, channels, 3, padding=1), nn.Tanh())

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        if h.shape != x.shape:
            h = h.expand_as(x)
        r, z = torch.split(self.ih(torch.cat((x, h), 1)), self.channels, 1)
        candidate: Tensor = self.hh(torch.cat((x, r * h), 1))
        return (1 - z) * h + z * candidate


def _halve(x: Tensor) -> Tensor:
    """2x2 mean; an odd edge is the mean of what is there. (Even sizes need no ceil_mode, which some runtimes lack.)"""
    odd = bool(x.shape[2] % 2 or x.shape[3] % 2)
    return F.avg_pool2d(x, 2, 2, ceil_mode=odd, count_include_pad=False)


def _double(x: Tensor, like: Tensor) -> Tensor:
    """Bilinear, twice the size, then cut to the height and width of `like` where those are odd."""
    x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    return x if x.shape[2:] == like.shape[2:] else x[:, :, : like.shape[2], : like.shape[3]]


class _Level(nn.Module):
    """A decoder level: (from the second on) upsample, concat skip and image, conv; then the GRU on half of it."""

    def __init__(self, channels_in: int, channels: int, *, bottom: bool = False) -> None:
        super().__init__()
        self.kept = channels // 2
        if not bottom:
            self.conv = conv_bn(channels_in, channels, 3, nn.ReLU, eps=1e-5)
        self.gru = ConvGRU(self.kept)

    def forward(self, x: Tensor, h: Tensor, skip: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor]:
        if skip:
            x = self.conv(torch.cat((_double(x, skip[-1]), *skip), 1))
        passed, remembered = torch.split(x, self.kept, 1)
        state = self.gru(remembered, h)
        return torch.cat((passed, state), 1), state


class _Output(nn.Module):
    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            *conv_bn(channels_in, channels, 3, nn.ReLU, eps=1e-5),
            *conv_bn(channels, channels, 3, nn.ReLU, eps=1e-5),
        )

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        hidden: Tensor = self.conv(torch.cat((_double(x, image), image), 1))
        return hidden


class Decoder(nn.Module):
    """Features f1..f4 and the image to 16 channels at the image's size, and the four new states r1..r4."""

    def __init__(self, skips: Sequence[int], widths: Sequence[int]) -> None:
        super().__init__()
        f1, f2, f3, f4 = skips
        d3, d2, d1, d0 = widths
        self.decode4 = _Level(f4, f4, bottom=True)
        self.decode3 = _Level(f4 + f3 + 3, d3)
        self.decode2 = _Level(d3 + f2 + 3, d2)
        self.decode1 = _Level(d2 + f1 + 3, d1)
        self.decode0 = _Output(d1 + 3, d0)

    def forward(self, image: Tensor, features: Sequence[Tensor], states: Sequence[Tensor]) -> list[Tensor]:
        s1 = _halve(image)
        s2 = _halve(s1)
        s3 = _halve(s2)
        f1, f2, f3, f4 = features
        x, r4 = self.decode4(f4, states[3])
        x, r3 = self.decode3(x, states[2], (f3, s3))
        x, r2 = self.decode2(x, states[1], (f2, s2))
        x, r1 = self.decode1(x, states[0], (f1, s1))
        return [self.decode0(x, image), r1, r2, r3, r4]


# ------------------------------------------------------------------------------------------------------ refiners


def _with_gray(image: Tensor) -> Tensor:
    return torch.cat((image, image.mean(1, keepdim=True)), 1)


def _line(src: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a * [src, gray] + b, with a and b brought to the size of src first."""
    a, b = (F.interpolate(t, src.shape[2:], mode="bilinear", align_corners=False) for t in (a, b))
    return a * _with_gray(src) + b


class DeepGuidedFilter(nn.Module):
    """Guided filter whose A a network of 1x1 convs predicts from covariance, variance and the decoder's features.

    forward: src [N,3,H,W], small [N,3,h,w], y [N,4,h,w] (foreground residual, alpha), hidden [N,16,h,w] to [N,4,H,W].
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.box_filter = nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False)
        nn.init.constant_(self.box_filter.weight, 1 / 9)
        self.conv = nn.Sequential(
            *conv_bn(8 + hidden, hidden, 1, nn.ReLU, eps=1e-5),
            *conv_bn(hidden, hidden, 1, nn.ReLU, eps=1e-5),
            nn.Conv2d(hidden, 4, 1),
        )

    def forward(self, src: Tensor, small: Tensor, y: Tensor, hidden: Tensor) -> Tensor:
        x = _with_gray(small)
        mean_x, mean_y = self.box_filter(x), self.box_filter(y)
        cov = self.box_filter(x * y) - mean_x * mean_y
        var = self.box_filter(x * x) - mean_x * mean_x
        a = self.conv(torch.cat((cov, var, hidden), 1))
        return _line(src, a, mean_y - a * mean_x)


class FastGuidedFilter(nn.Module):
    """Guided filter with the classical A = cov / (var + 1e-5), without parameters; forward as in the deep one.

    Means of squares less squares of means lose, in float32 and divided by so small a number, three digits of alpha.
    So both are taken of the differences d to the pixel in the middle, which changes neither variance nor covariance:

        mean(x) = x + mean(dx),    cov(x, y) = mean(dx * dy) - mean(dx) * mean(dy)
    """

    differences: Tensor
    ninths: Tensor

    def __init__(self) -> None:
        super().__init__()
        others = [k for k in range(9) if k != 4]  # of the 3x3 pixels; outside the image they are 0, and count
        kernels = torch.eye(9)[others] - torch.eye(9)[4]
        self.register_buffer("differences", kernels.view(8, 1, 3, 3).repeat(4, 1, 1, 1), persistent=False)
        self.register_buffer("ninths", torch.full((4, 8, 1, 1), 1 / 9), persistent=False)

    def _mean(self, d: Tensor) -> Tensor:
        return F.conv2d(d, self.ninths, groups=4)

    def forward(self, src: Tensor, small: Tensor, y: Tensor, hidden: Tensor) -> Tensor:  # noqa: ARG002
        x = _with_gray(small)
        dx, dy = (F.conv2d(t, self.differences, padding=1, groups=4) for t in (x, y))
        mean_dx, mean_dy = self._mean(dx), self._mean(dy)
        cov = self._mean(dx * dy) - mean_dx * mean_dy
        var = self._mean(dx * dx) - mean_dx * mean_dx
        a = cov / (var + 1e-5)
        return _line(src, a, y + mean_dy - a * (x + mean_dx))


class _ResizeByFactor(torch.autograd.Function):
    """Bilinear resize by a factor that is a graph input [1]; `F.interpolate` would trace it as a constant."""

    @staticmethod
    def forward(ctx: object, x: Tensor, factor: Tensor) -> Tensor:  # noqa: ARG004
        return _resize(x, float(factor))

    @staticmethod
    def symbolic(g: Any, x: Any, factor: Any) -> Any:  # of the exporter's graph and its values
        ones = g.op("Constant", value_t=torch.ones(2))
        scales = g.op("Concat", ones, factor, factor, axis_i=0)
        no_roi = g.op("Constant", value_t=torch.zeros(0))
        mode = "pytorch_half_pixel"
        return g.op("Resize", x, no_roi, scales, mode_s="linear", coordinate_transformation_mode_s=mode)


_resize_by_factor: Callable[[Tensor, Tensor], Tensor] = _ResizeByFactor.apply


def _resize(x: Tensor, factor: float) -> Tensor:
    return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)


# --------------------------------------------------------------------------------------------------- the network


class _Projection(nn.Module):
    def __init__(self, channels_in: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y


class RVM(nn.Module):
    """Robust Video Matting, one frame at a time.

    forward: src [N,3,H,W], RGB in 0..1; the states r1..r4 of the frame before (1x1x1x1 zeros at first);
    downsample_ratio as a float, or as a tensor [1] that stays an input when exported. Returns fgr [N,3,H,W],
    pha [N,1,H,W], both in 0..1, and the new states.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, variant: str = "mobilenetv3", refiner: str | None = None) -> None:
        super().__init__()
        if variant == "mobilenetv3":
            self.backbone: MobileNetV3 | ResNet50 = MobileNetV3()
            aspp, widths = 128, (80, 40, 32, 16)
        elif variant == "resnet50":
            self.backbone = ResNet50()
            aspp, widths = 256, (128, 64, 32, 16)
        else:
            raise ValueError(f"no RVM variant {variant!r}; there are: {', '.join(VARIANTS)}")
        if refiner not in {None, *REFINERS}:
            raise ValueError(f"no refiner {refiner!r}; there are: {', '.join(REFINERS)}")
        *skips, deepest = self.backbone.channels
        self.aspp = LRASPP(deepest, aspp)
        self.decoder = Decoder((*skips, aspp), widths)
        self.project_mat = _Projection(widths[-1])
        self.refiner: DeepGuidedFilter | FastGuidedFilter | None = None
        if refiner is not None:
            self.refiner = DeepGuidedFilter(widths[-1]) if refiner == "deep" else FastGuidedFilter()
        self.register_buffer("mean", torch.tensor((0.485, 0.456, 0.406)).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor((0.229, 0.224, 0.225)).view(1, 3, 1, 1), persistent=False)

    def forward(
        self, src: Tensor, r1: Tensor, r2: Tensor, r3: Tensor, r4: Tensor,
        downsample_ratio: float | Tensor = 1.0,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        small = src
        if isinstance(downsample_ratio, Tensor):
            small = _resize_by_factor(src, downsample_ratio)
        elif downsample_ratio != 1:
            small = _resize(src, downsample_ratio)
        *skips, deepest = self.backbone((small - self.mean) / self.std)
        hidden, *states = self.decoder(small, (*skips, self.aspp(deepest)), (r1, r2, r3, r4))
        y = self.project_mat(hidden)
        if small is not src:
            if self.refiner is None:
                raise ValueError("a downsample ratio other than 1 needs a refiner")
            y = self.refiner(src, small, y, hidden)
        residual, alpha = torch.split(y, [3, 1], 1)
        return ((residual + src).clamp(0, 1), alpha.clamp(0, 1), *states)


def build(
    variant: str = "mobilenetv3", state: Mapping[str, Tensor] | None = None, *,
    refiner: str | None = None, seed: int = 0,
) -> RVM:  # fmt: skip
    """The network in eval mode with the weights of `state`, or with random ones.

    `project_seg.*` is never used, `refiner.*` only by the deep refiner; both may be present or not.

    Raises:
        WeightsError: a tensor is missing, unexpected, of another shape, or not finite.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = RVM(variant, refiner).eval().requires_grad_(requires_grad=False)
        if state is None:
            _keep_signal_alive(model)
            return model
    unused = ("project_seg.",) if refiner == "deep" else ("project_seg.", "refiner.")
    given = {name: value for name, value in state.items() if not name.startswith(unused)}
    fit(model, given, f"RVM {variant} with refiner {refiner or 'none'}",
        hints={"refiner.": "the fast refiner needs no weights"})
    return model


def _keep_signal_alive(model: RVM) -> None:
    """Random weights under which every layer matters: torch's own let it fade, and alpha is then 0 everywhere."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module is not getattr(model.refiner, "box_filter", None):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
    model.project_mat.conv.load_state_dict({"bias": torch.full((4,), 0.5)}, strict=False)


# --------------------------------------------------------------------------------------------------------- export


class _Traced(nn.Module):
    """The model as the exporter sees it: with a ratio fixed, or with one as the last input."""

    def __init__(self, model: RVM, *ratio: float) -> None:
        super().__init__()
        self.model, self.ratio = model, ratio

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = self.model(*inputs, *self.ratio)
        return outputs


def export(
    model: RVM, path: Path | str, *, size: tuple[int, int] = (288, 512), downsample_ratio: float = 1.0,
    dynamic: bool = False, keep_bn: bool = False, opset: int | None = None,
) -> None:  # fmt: skip
    """Write `model` as ONNX: inputs src, r1i..r4i (, downsample_ratio), outputs fgr, pha, r1o..r4o.

    Args:
        model: from `build`; it needs a refiner if `dynamic`, or if the downsample ratio is not 1.
        path: appears when complete, never half-written.
        size: height and width of src. Not used by `dynamic`.
        downsample_ratio: fixed in the file, above 0 up to 1. Not used by `dynamic`, where it is an input [1].
        dynamic: every size is free and first states are 1x1x1x1 zeros, as in the authors' own ONNX files.
        keep_bn: leave BatchNormalization as nodes instead of folding it into the convs.
        opset: 12 to 20; 17 by default, 12 if `dynamic`.

    Raises:
        ValueError: an option has a value that cannot be used, or two contradict each other.
        OSError: the file cannot be written.
    """
    path = Path(path)
    opset = opset or (12 if dynamic else 17)
    reduced = dynamic or downsample_ratio != 1
    if not 12 <= opset <= 20:
        raise ValueError(f"opset {opset} cannot be exported; use 12 to 20")
    if not 0 < downsample_ratio <= 1:
        raise ValueError(f"downsample ratio {downsample_ratio} is not above 0 and at most 1")
    if reduced != (model.refiner is not None):
        what = "a dynamic model" if dynamic else f"downsample ratio {downsample_ratio}"
        raise ValueError(f"{what} {'needs a refiner' if reduced else 'leaves a refiner nothing to do'}")

    module = _Traced(model, *([] if dynamic else [downsample_ratio])).eval()
    names = [*INPUT_NAMES]
    axes = None
    if dynamic:
        # 49 stays odd at each level (49, 25, 13, 7), and states of 1x1x1x1 differ from the shapes they expand to:
        # so the trace holds every crop and every expansion.
        inputs = (torch.rand(1, 3, 98, 98), *(torch.zeros(1, 1, 1, 1) for _ in range(4)), torch.tensor([0.5]))
        names.append("downsample_ratio")
        axes = {"src": {0: "batch", 2: "height", 3: "width"}}
        axes |= {name: {0: "batch", 1: f"{name}_channels", 2: "height", 3: "width"} for name in OUTPUT_NAMES[:2]}
        axes |= {name: dict(enumerate(_state_axes(name))) for name in (*INPUT_NAMES[1:], *OUTPUT_NAMES[2:])}
    else:
        if min(size) * downsample_ratio < 16:
            raise ValueError(f"{size[1]}x{size[0]} at downsample ratio {downsample_ratio} is below 16 pixels")
        src = torch.rand(1, 3, *size)
        with torch.no_grad():
            states = module(src, *(torch.zeros(1, 1, 1, 1) for _ in range(4)))[2:]
        inputs = (src, *(torch.zeros_like(state) for state in states))

    # Two habits of the exporter: it puts the module back into the mode found, and in eval mode it merges equal
    # constants and reads them through Identity nodes. This mode is the wrapper's own and changes no BatchNorm.
    module.training = keep_bn
    with written_whole(path) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer, about the shapes it is meant to fix; of the exporter's age
        torch.onnx.export(
            module, inputs, temporary, input_names=names, output_names=list(OUTPUT_NAMES), dynamic_axes=axes,
            opset_version=opset, dynamo=False,
            training=torch.onnx.TrainingMode.PRESERVE if keep_bn else torch.onnx.TrainingMode.EVAL,
        )  # fmt: skip


def _state_axes(state: str) -> list[str]:
    return [f"{state}_{axis}" for axis in ("batch", "channels", "height", "width")]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = Parser(
        prog="python -m models.rvm",
        description="Export Robust Video Matting (weights: GPL-3.0, by its authors) to ONNX.",
        epilog="example: python -m models.rvm --weights rvm_mobilenetv3.pth --size 512x288 -o rvm.onnx",
    )
    add = parser.add_argument
    add("--weights", type=Path, metavar="FILE", help=".pth or .safetensors; random weights without it")
    add("--variant", choices=VARIANTS, default="mobilenetv3")
    add("--refiner", choices=REFINERS, help="guided filter to full size (with --dynamic: deep by default)")
    add("--keep-bn", action="store_true", help="leave BatchNormalization unfolded")
    add("--size", type=parse_size, default=(288, 512), metavar="WxH", help="of the input video (default 512x288)")
    add("--downsample-ratio", type=float, default=1.0, metavar="R", help="run on a smaller image (default 1)")
    add("--dynamic", action="store_true", help="free sizes and a downsample_ratio input")
    add("--opset", type=int, metavar="N", help="default 17; 12 with --dynamic")
    add("--seed", type=int, default=0, metavar="N", help="of random weights")
    add("-o", "--output", type=Path, required=True, metavar="FILE")
    options = parser.parse_args(arguments)
    refiner = options.refiner or ("deep" if options.dynamic else None)

    def write() -> None:
        state = load_state(options.weights) if options.weights else None
        model = build(options.variant, state, refiner=refiner, seed=options.seed)
        export(
            model, options.output, size=options.size, downsample_ratio=options.downsample_ratio,
            dynamic=options.dynamic, keep_bn=options.keep_bn, opset=options.opset,
        )  # fmt: skip

    return parser.finish(options.output, f"RVM {options.variant}", write)


if __name__ == "__main__":
    sys.exit(main())
