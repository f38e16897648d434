"""MODNet (Ke et al., 2020, arXiv:2011.11961): portrait matting of single frames, in torch, and its export to ONNX.

    src --MobileNetV2--> e2 e4 e8 e16 e32 (1/2 ... 1/32)
    semantic  l8 = conv(up(conv(up(SE(e32)))))                where the person is, at 1/8
    detail    h2 = convs([up(convs([e2, e4, l8, src / 4])), e2])       where the edges are, at 1/2
    fusion    pha = sigmoid(conv([up(conv([up(conv(up(l8))), h2])), src]))

Convolutions of the three branches are followed by IBNorm: half of the channels are batch-normalised, the others
instance-normalised. There is no recurrent state.

The network works on (src - 0.5) / 0.5; that is part of it here, so frames are fed as RGB in 0..1. Parameter names are
those of the authors' checkpoints (Apache-2.0), which hold the backbone twice and may carry the prefix `module.`. The
widths of the backbone and of the detail branch are read off the weights.

    python -m models.modnet --weights modnet_photographic_portrait_matting.ckpt --size 512x288 -o modnet.onnx
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.exporting import Parser, WeightsError, fit, load_state, parse_size, written_whole

MULTIPLE = 32
"""Height and width of frames are multiples of this."""

# Expansion, output channels, repetitions and first stride of the groups of inverted residuals.
_MOBILENETV2 = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
                (6, 320, 1, 1))
_TAPS = (1, 3, 6, 13, 18)
"""Layers of the backbone whose results are its features at 1/2, 1/4, 1/8, 1/16 and 1/32."""


def _up(x: Tensor, factor: float = 2.0) -> Tensor:
    return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)


class _InvertedResidual(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = channels_in * expansion
        widen = [nn.Conv2d(channels_in, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU6()]
        self.conv = nn.Sequential(
            *(widen if expansion > 1 else []),
            nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False), nn.BatchNorm2d(inner), nn.ReLU6(),
            nn.Conv2d(inner, channels, 1, bias=False), nn.BatchNorm2d(channels))
        self.residual = stride == 1 and channels_in == channels

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return x + y if self.residual else y


class MobileNetV2(nn.Module):
    """Features at 1/2, 1/4, 1/8, 1/16 and 1/32; `width` scales all channels but the last 1280."""

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        last = _divisible(32 * width)
        layers: list[nn.Module] = [nn.Sequential(nn.Conv2d(3, last, 3, 2, 1, bias=False), nn.BatchNorm2d(last),
                                                 nn.ReLU6())]
        channels = [last]
        for expansion, base, repetitions, stride in _MOBILENETV2:
            for index in range(repetitions):
                wanted = _divisible(base * width)
                layers.append(_InvertedResidual(last, wanted, stride if index == 0 else 1, expansion))
                last = wanted
                channels.append(last)
        layers.append(nn.Sequential(nn.Conv2d(last, 1280, 1, bias=False), nn.BatchNorm2d(1280), nn.ReLU6()))
        channels.append(1280)
        self.channels = tuple(channels[k] for k in _TAPS)
        self.features = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        found = []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in _TAPS:
                found.append(x)
        return found


def _divisible(channels: float) -> int:
    """Channels as a multiple of eight, at most a tenth less."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


class _Backbone(nn.Module):
    def __init__(self, width: float) -> None:
        super().__init__()
        self.model = MobileNetV2(width)

    def forward(self, x: Tensor) -> list[Tensor]:
        found: list[Tensor] = self.model(x)
        return found


class _IBNorm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.halves = [channels // 2, channels - channels // 2]
        self.bnorm = nn.BatchNorm2d(self.halves[0])
        self.inorm = nn.InstanceNorm2d(self.halves[1])

    def forward(self, x: Tensor) -> Tensor:
        first, second = torch.split(x, self.halves, 1)
        return torch.cat([self.bnorm(first), self.inorm(second)], 1)


class _Conv(nn.Module):
    """A convolution that keeps the size (or halves it), with IBNorm and Relu unless it is `plain`."""

    def __init__(self, channels_in: int, channels: int, kernel: int, stride: int = 1, *, plain: bool = False) -> None:
        super().__init__()
        conv = nn.Conv2d(channels_in, channels, kernel, stride, kernel // 2)
        self.layers = nn.Sequential(conv, *([] if plain else [_IBNorm(channels), nn.ReLU()]))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return y


class _SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(channels, channels // 4, bias=False), nn.ReLU(),
                                nn.Linear(channels // 4, channels, bias=False), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        gate: Tensor = self.fc(x.mean((2, 3)))
        return x * gate[:, :, None, None]


class _Semantic(nn.Module):
    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        _, _, c8, c16, c32 = channels
        self.se_block = _SqueezeExcite(c32)
        self.conv_lr16x = _Conv(c32, c16, 5)
        self.conv_lr8x = _Conv(c16, c8, 5)
        self.conv_lr = _Conv(c8, 1, 3, 2, plain=True)

    def forward(self, e32: Tensor) -> Tensor:
        y: Tensor = self.conv_lr8x(_up(self.conv_lr16x(_up(self.se_block(e32)))))
        return y


class _Detail(nn.Module):
    def __init__(self, channels: Sequence[int], hr: int) -> None:
        super().__init__()
        self.tohr_enc2x = _Conv(channels[0], hr, 1)
        self.conv_enc2x = _Conv(hr + 3, hr, 3, 2)
        self.tohr_enc4x = _Conv(channels[1], hr, 1)
        self.conv_enc4x = _Conv(2 * hr, 2 * hr, 3)
        self.conv_hr4x = nn.Sequential(_Conv(2 * hr + channels[2] + 3, 2 * hr, 3), _Conv(2 * hr, 2 * hr, 3),
                                       _Conv(2 * hr, hr, 3))
        self.conv_hr2x = nn.Sequential(_Conv(2 * hr, 2 * hr, 3), _Conv(2 * hr, hr, 3), _Conv(hr, hr, 3),
                                       _Conv(hr, hr, 3))
        self.conv_hr = nn.Sequential(_Conv(hr + 3, hr, 3), _Conv(hr, 1, 1, plain=True))

    def forward(self, x: Tensor, e2: Tensor, e4: Tensor, l8: Tensor) -> Tensor:
        e2 = self.tohr_enc2x(e2)
        h4 = self.conv_enc2x(torch.cat([_up(x, 0.5), e2], 1))
        h4 = self.conv_enc4x(torch.cat([h4, self.tohr_enc4x(e4)], 1))
        h4 = self.conv_hr4x(torch.cat([h4, _up(l8), _up(x, 0.25)], 1))
        h2: Tensor = self.conv_hr2x(torch.cat([_up(h4), e2], 1))
        return h2


class _Fusion(nn.Module):
    def __init__(self, channels: Sequence[int], hr: int) -> None:
        super().__init__()
        self.conv_lr4x = _Conv(channels[2], hr, 5)
        self.conv_f2x = _Conv(2 * hr, hr, 3)
        self.conv_f = nn.Sequential(_Conv(hr + 3, hr // 2, 3), _Conv(hr // 2, 1, 1, plain=True))

    def forward(self, x: Tensor, l8: Tensor, h2: Tensor) -> Tensor:
        l2 = _up(self.conv_lr4x(_up(l8)))
        y: Tensor = self.conv_f(torch.cat([_up(self.conv_f2x(torch.cat([l2, h2], 1))), x], 1))
        return y


class MODNet(nn.Module):
    """MODNet for frames [N,3,H,W], RGB in 0..1, H and W multiples of 32.

    Args:
        hr: channels of the detail branch; the authors use 32.
        width: of the backbone; the authors use 1.
    """

    def __init__(self, hr: int = 32, width: float = 1.0) -> None:
        super().__init__()
        self.backbone = _Backbone(width)
        channels = self.backbone.model.channels
        self.lr_branch = _Semantic(channels)
        self.hr_branch = _Detail(channels, hr)
        self.f_branch = _Fusion(channels, hr)

    def forward(self, src: Tensor) -> Tensor:
        """Alpha [N,1,H,W] in 0..1."""
        return self.predict(src)[0]

    def predict(self, src: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Alpha, and what `heads` learns from: features of the semantic branch at 1/8 and of the detail one at 1/2."""
        x = (src - 0.5) / 0.5
        e2, e4, _, _, e32 = self.backbone(x)
        l8 = self.lr_branch(e32)
        h2 = self.hr_branch(x, e2, e4, l8)
        return torch.sigmoid(self.f_branch(x, l8, h2)), l8, h2

    def heads(self, src: Tensor, l8: Tensor, h2: Tensor) -> tuple[Tensor, Tensor]:
        """The semantic [N,1,H/16,W/16] and detail [N,1,H,W] predictions, both in 0..1: for training only."""
        x = (src - 0.5) / 0.5
        detail = self.hr_branch.conv_hr(torch.cat([_up(h2), x], 1))
        return torch.sigmoid(self.lr_branch.conv_lr(l8)), torch.sigmoid(detail)


def build(state: Mapping[str, Tensor] | None = None, *, hr: int = 32, width: float = 1.0, seed: int = 0) -> MODNet:
    """The network in eval mode with the weights of `state`, whose widths count, or with random ones.

    Raises:
        WeightsError: a tensor is missing, unexpected, of another shape, or not finite.
    """
    if state is not None:
        given = {name.removeprefix("module."): value for name, value in state.items()}
        given = {name: value for name, value in given.items() if not name.startswith("lr_branch.backbone.")} | {
            name.removeprefix("lr_branch."): value for name, value in given.items()
            if name.startswith("lr_branch.backbone.")}
        try:
            hr = len(given["hr_branch.tohr_enc2x.layers.0.weight"])
            width = len(given["backbone.model.features.0.0.weight"]) / 32
        except KeyError as error:
            raise WeightsError(f"the weights do not fit MODNet: {error.args[0]} is missing") from None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MODNet(hr, width).eval().requires_grad_(requires_grad=False)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    if state is not None:
        fit(model, given, "MODNet")
    return model


def export(
    model: MODNet, path: Path | str, *, size: tuple[int, int] = (288, 512), dynamic: bool = False,
    keep_bn: bool = False, opset: int = 17,
) -> None:  # fmt: skip
    """Write `model` as ONNX: input src, output pha.

    Args:
        model: from `build`.
        path: appears when complete, never half-written.
        size: height and width of src, multiples of 32. Not used by `dynamic`.
        dynamic: height and width are free.
        keep_bn: leave BatchNormalization as nodes instead of folding it into the convs right before.
        opset: 12 to 20.

    Raises:
        ValueError: an option has a value that cannot be used.
        OSError: the file cannot be written.
    """
    path = Path(path)
    if not 12 <= opset <= 20:
        raise ValueError(f"opset {opset} cannot be exported; use 12 to 20")
    if not dynamic and (min(size) < MULTIPLE or any(n % MULTIPLE for n in size)):
        raise ValueError(f"{size[1]}x{size[0]}: MODNet takes multiples of {MULTIPLE}")
    axes = {name: {2: "height", 3: "width"} for name in ("src", "pha")} if dynamic else None
    model.eval()
    wrapper = nn.Sequential(model)
    wrapper.training = keep_bn               # the mode that the exporter finds, and puts the model back into
    with written_whole(path) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")      # of the exporter's age
        torch.onnx.export(
            wrapper, (torch.rand(1, 3, *((64, 96) if dynamic else size)),), temporary, input_names=["src"],
            output_names=["pha"], dynamic_axes=axes, opset_version=opset, dynamo=False,
            training=torch.onnx.TrainingMode.PRESERVE if keep_bn else torch.onnx.TrainingMode.EVAL,
        )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = Parser(
        prog="python -m models.modnet",
        description="Export MODNet (weights: Apache-2.0, by its authors) to ONNX.",
        epilog="example: python -m models.modnet --weights modnet_photographic_portrait_matting.ckpt -o modnet.onnx",
    )
    add = parser.add_argument
    add("--weights", type=Path, metavar="FILE", help=".ckpt, .pth or .safetensors; random weights without it")
    add("--size", type=parse_size, default=(288, 512), metavar="WxH", help="of the frames (default 512x288)")
    add("--dynamic", action="store_true", help="leave height and width free")
    add("--keep-bn", action="store_true", help="leave BatchNormalization unfolded")
    add("--opset", type=int, default=17, metavar="N", help="default 17")
    add("--seed", type=int, default=0, metavar="N", help="of random weights")
    add("-o", "--output", type=Path, required=True, metavar="FILE")
    options = parser.parse_args(arguments)

    def write() -> None:
        model = build(load_state(options.weights) if options.weights else None, seed=options.seed)
        export(model, options.output, size=options.size, dynamic=options.dynamic, keep_bn=options.keep_bn,
               opset=options.opset)

    return parser.finish(options.output, "MODNet", write)


if __name__ == "__main__":
    sys.exit(main())
