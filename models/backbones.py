"""The backbones of Robust Video Matting, each with a dilated last stage (Chen et al. 2017, arXiv:1706.05587).

MobileNetV3-Large (Howard et al. 2019, arXiv:1905.02244) and ResNet50 (He et al. 2015, arXiv:1512.03385). Parameter
names are torchvision's.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

# Kernel, expanded and output channels, squeeze-excitation, hard swish, stride, dilation of each inverted residual.
_MOBILENETV3_LARGE = (
    (3, 16, 16, False, False, 1, 1),
    (3, 64, 24, False, False, 2, 1),
    (3, 72, 24, False, False, 1, 1),
    (5, 72, 40, True, False, 2, 1),
    (5, 120, 40, True, False, 1, 1),
    (5, 120, 40, True, False, 1, 1),
    (3, 240, 80, False, True, 2, 1),
    (3, 200, 80, False, True, 1, 1),
    (3, 184, 80, False, True, 1, 1),
    (3, 184, 80, False, True, 1, 1),
    (3, 480, 112, True, True, 1, 1),
    (3, 672, 112, True, True, 1, 1),
    (5, 672, 160, True, True, 1, 2),  # dilated instead of strided from here on: the deepest features stay at 1/16
    (5, 960, 160, True, True, 1, 2),
    (5, 960, 160, True, True, 1, 2),
)


def conv_bn(
    channels_in: int, channels: int, kernel: int, act: type[nn.Module] | None, *,
    stride: int = 1, dilation: int = 1, groups: int = 1, eps: float = 1e-3,
) -> nn.Sequential:  # fmt: skip
    """A convolution, padded to keep its size, with normalisation and activation."""
    conv = nn.Conv2d(channels_in, channels, kernel, stride, kernel // 2 * dilation, dilation, groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels, eps), *([act()] if act else []))


class _SqueezeExcitation(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        wanted = channels // 4
        squeezed = max(8, (wanted + 4) // 8 * 8)  # the nearest multiple of 8 ...
        squeezed += 8 if squeezed < 0.9 * wanted else 0  # ... that loses no more than a tenth
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.fc2(F.relu(self.fc1(F.adaptive_avg_pool2d(x, 1))))
        return F.hardsigmoid(gate) * x


class _InvertedResidual(nn.Module):
    def __init__(
        self, channels_in: int, kernel: int, expanded: int, channels: int, se: bool, hard_swish: bool,
        stride: int, dilation: int,
    ) -> None:  # fmt: skip
        super().__init__()
        act = nn.Hardswish if hard_swish else nn.ReLU
        layers: list[nn.Module] = []
        if expanded != channels_in:
            layers.append(conv_bn(channels_in, expanded, 1, act))
        layers.append(conv_bn(expanded, expanded, kernel, act, stride=stride, dilation=dilation, groups=expanded))
        if se:
            layers.append(_SqueezeExcitation(expanded))
        layers.append(conv_bn(expanded, channels, 1, None))
        self.block = nn.Sequential(*layers)
        self.shortcut = stride == 1 and channels_in == channels

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(x)
        return x + y if self.shortcut else y


class MobileNetV3(nn.Module):
    """MobileNetV3-Large without its classifier. [N,3,H,W] to 16, 24, 40 and 960 channels at 1/2, 1/4, 1/8, 1/16."""

    channels = (16, 24, 40, 960)

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [conv_bn(3, 16, 3, nn.Hardswish, stride=2)]
        width = 16
        for row in _MOBILENETV3_LARGE:
            layers.append(_InvertedResidual(width, *row))
            width = row[2]
        layers.append(conv_bn(width, 960, 1, nn.Hardswish))
        self.features = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        taps = []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in {1, 3, 6, 16}:
                taps.append(x)
        return taps


class _Bottleneck(nn.Module):
    def __init__(self, channels_in: int, width: int, stride: int, dilation: int, project: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = None
        if project:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels_in, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet50(nn.Module):
    """ResNet50 without its classifier. [N,3,H,W] to 64, 256, 512 and 2048 channels at 1/2, 1/4, 1/8, 1/16."""

    channels = (64, 256, 512, 2048)

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = self._stage(64, 64, blocks=3, stride=1)
        self.layer2 = self._stage(256, 128, blocks=4, stride=2)
        self.layer3 = self._stage(512, 256, blocks=6, stride=2)
        self.layer4 = self._stage(1024, 512, blocks=3, stride=1, dilation=2)

    @staticmethod
    def _stage(channels_in: int, width: int, blocks: int, stride: int, dilation: int = 1) -> nn.Sequential:
        first = _Bottleneck(channels_in, width, stride, 1, project=True)
        rest = (_Bottleneck(4 * width, width, 1, dilation, project=False) for _ in range(blocks - 1))
        return nn.Sequential(first, *rest)

    def forward(self, x: Tensor) -> list[Tensor]:
        f1 = F.relu(self.bn1(self.conv1(x)))
        f2 = self.layer1(F.max_pool2d(f1, 3, 2, 1))
        f3 = self.layer2(f2)
        return [f1, f2, f3, self.layer4(self.layer3(f3))]
