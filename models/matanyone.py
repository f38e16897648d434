"""MatAnyone (Yang et al., 2025, arXiv:2501.14677): one frame of it as ONNX, its memories as explicit states.

The network's code is not here. It is that of the package `matanyone2-runtime`, by its authors and under their
non-commercial licence, which the user installs; this file only says what happens in a frame, without branches:

    features, key = encode(src)
    readout = values @ softmax(top 30 of similarity(keys, key))        from the memory of up to five frames
    pha, sensory = decode(features, transform(readout, objects), sensory)
    value, sensory', summary = encode(src, pha)                        sensory' in every fifth frame
    keys, values, objects = those with (key, value, summary) added     in every fifth frame, the oldest going first

Similarity is the anisotropic L2 of XMem (Cheng and Schwing 2022, eq. 4). The first frame's alpha has to be given in the
state `mask`, which the file's metadata name for it; all other states are zeros at first. The first frame hands it out
and fills the memories.

    pip install matanyone2-runtime==0.2.0 --no-deps; pip install omegaconf hydra-core einops huggingface-hub
    python -m models.matanyone --weights matanyone2.pth --size 512x288 -o matanyone.onnx
"""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.exporting import Parser, fit, load_state, parse_size, written_whole

STRIDE = 16
"""Memories are kept at this share of the frame's size, and sizes are multiples of it."""
SLOTS = 5
"""Frames in memory: the first one, which stays, and four that come and go."""
EVERY = 5
"""A frame in so many is memorized."""
TOP = 30
"""A pixel reads the memory where it is most similar, in so many places."""
NEVER = -1e4
"""A similarity at which softmax gives 0."""
STATES = {"mask": "pha", "count": "count_o", "keys": "keys_o", "shrinkages": "shrinkages_o", "values": "values_o",
          "sensory": "sensory_o", "objects": "objects_o", "last_value": "last_value_o", "last_pixels": "last_pixels_o"}
"""Inputs and outputs that are states."""


class MissingPackageError(ImportError, ValueError):
    """The package with the network's code is not installed."""


class Step(nn.Module):
    """One frame.

    forward: src [1,3,H,W], RGB in 0..1, and the states of the frame before, as `first_states` gives them. Returns pha
    [1,1,H,W] in 0..1 and the other new states, in the order of `STATES`.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def first_states(self, size: tuple[int, int], mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """The states before the first frame of (H, W): zeros, and the alpha of the first frame, [1,1,H,W]."""
        net: Any = self.network
        h, w = size[0] // STRIDE, size[1] // STRIDE
        queries = net.object_transformer.num_queries
        return (torch.zeros(1, 1, *size) if mask is None else mask, torch.zeros(1),
                torch.zeros(1, net.key_dim, SLOTS, h, w), torch.zeros(1, 1, SLOTS, h, w),
                torch.zeros(1, net.value_dim, SLOTS, h, w), torch.zeros(1, 1, net.sensory_dim, h, w),
                torch.zeros(1, 1, queries, net.embed_dim + 1), torch.zeros(1, 1, net.value_dim, h, w),
                torch.zeros(1, net.pixel_dim, h, w))

    def forward(self, src: Tensor, mask: Tensor, count: Tensor, keys: Tensor, shrinkages: Tensor, values: Tensor,
                sensory: Tensor, objects: Tensor, last_value: Tensor, last_pixels: Tensor) -> tuple[Tensor, ...]:
        net: Any = self.network
        first = count == 0
        memorize = first | (count >= EVERY)
        features, pixels = net.encode_image(src)
        key, shrinkage, selection = net.transform_key(features[0])

        affinity = _affinity(keys.flatten(2), shrinkages.flatten(2), key.flatten(2), selection.flatten(2))
        readout = (values.flatten(2) @ affinity).view_as(last_value)
        news = torch.sigmoid(net.temp_sparity(last_pixels, pixels, mask, (readout - last_value)[:, 0])).unsqueeze(1)
        readout = readout * news + last_value * (1 - news)
        fused = net.pixel_fusion(pixels, readout, sensory, mask)
        memory, _ = net.readout_query(fused, objects.unsqueeze(2))
        moved, _, prob = net.segment(features, memory, sensory, update_sensory=True)

        alpha = torch.where(first, mask, prob[:, 1:])
        sensory = torch.where(first, sensory, moved)
        value, deep, summary, _ = net.encode_mask(src, pixels, sensory, alpha)
        return (alpha, torch.where(memorize, torch.ones_like(count), count + 1),
                _memorized(keys, key, first, memorize), _memorized(shrinkages, shrinkage, first, memorize),
                _memorized(values, value[:, 0], first, memorize), torch.where(memorize, deep, sensory),
                torch.where(memorize, objects + summary, objects), value, pixels)


def _affinity(keys: Tensor, shrinkages: Tensor, key: Tensor, selection: Tensor) -> Tensor:
    """How much each pixel reads of each place in memory: [1, places, pixels], each column of sum 1.

    Args:
        keys, shrinkages: of the memory, [1,C,places] and [1,1,places]; places without a memory have shrinkage 0.
        key, selection: of the frame, [1,C,pixels].
    """
    turned = keys.transpose(1, 2)
    distance = turned.square() @ selection - 2 * (turned @ (key * selection)) \
        + (selection * key.square()).sum(1, keepdim=True)
    strength = shrinkages.transpose(1, 2)
    similarity = torch.where(strength > 0, -distance * strength / math.sqrt(keys.shape[1]), NEVER)
    least = similarity.topk(min(TOP, similarity.shape[1]), 1).values[:, -1:]
    return torch.where(similarity >= least, similarity, NEVER).softmax(1)


def _memorized(bank: Tensor, new: Tensor, first: Tensor, memorize: Tensor) -> Tensor:
    """The memory [1,C,SLOTS,h,w] with a frame's [1,C,h,w] in it, if it is to be memorized."""
    new = new.unsqueeze(2)
    added = torch.cat([bank[:, :, :1], bank[:, :, 2:], new], 2)
    with_new = torch.where(first, torch.cat([new, bank[:, :, 1:]], 2), added)
    return torch.where(memorize, with_new, bank)


# ------------------------------------------------------------------------------------------------- the package


def _attend(module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, blocked: Tensor | None,
            ) -> Tensor:
    """What nn.MultiheadAttention computes, in operators that have integer kernels; `blocked` where it may not look."""
    width = module.embed_dim // module.num_heads
    assert module.in_proj_weight is not None
    parts = zip((query, key, value), module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3), strict=True)
    q, k, v = (nn.functional.linear(x, w, b).unflatten(2, (module.num_heads, width)).transpose(1, 2)
               for x, w, b in parts)
    scores = q @ k.transpose(2, 3) / math.sqrt(width)
    if blocked is not None:
        scores = torch.where(blocked[:, None], NEVER, scores)
    out: Tensor = module.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    return out


class _Attention(nn.Module):
    """Stands in for nn.MultiheadAttention, batch first."""

    def __init__(self, module: nn.MultiheadAttention) -> None:
        super().__init__()
        self.module = module

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any,
                ) -> tuple[Tensor, None]:
        return _attend(self.module, query, key, value, attn_mask), None


class _Blocked:
    """Stands in for the query transformer's mask: half of the queries see the foreground, half the background.

    A query that might look nowhere may look everywhere.
    """

    def __init__(self, queries: int) -> None:
        self.half = queries // 2

    def __call__(self, logits: Tensor, selector: object = None, seg_pass: bool = False) -> Tensor:  # noqa: ARG002
        foreground = (logits >= 0).flatten(2)
        both = torch.cat([~foreground, foreground], 1).float()
        both = both * (1 - both.amin(2, keepdim=True))
        blocked: Tensor = both.repeat_interleave(self.half, 1) > 0.5
        return blocked


def build(state: Mapping[str, Tensor] | None = None, *, seed: int = 0) -> Step:
    """The step with the weights of `state`, or with random ones, in eval mode.

    Raises:
        MissingPackageError: matanyone2-runtime is not installed.
        WeightsError: a tensor is missing, unexpected, of another shape, or not finite.
    """
    try:
        from hydra import compose, initialize_config_module
        from matanyone2.model.matanyone2 import MatAnyone2
        from omegaconf import open_dict
    except ImportError as error:
        raise MissingPackageError(
            f"MatAnyone's code is not installed ({error}); pip install matanyone2-runtime==0.2.0 --no-deps, and "
            "omegaconf hydra-core einops huggingface-hub") from error
    with initialize_config_module(version_base="1.3.2", config_module="matanyone2.config"):
        config = compose(config_name="eval_matanyone_config")
    with open_dict(config):
        config.model.pretrained_resnet = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = MatAnyone2(config, single_object=True).eval().requires_grad_(False)
        if state is None:
            _keep_signal_alive(network)
    if state is not None:
        fit(network, state, "MatAnyone")
    transformer = network.object_transformer
    transformer._get_aux_mask = _Blocked(transformer.num_queries)
    for block in transformer.blocks:
        block.read_from_pixel.cross_attn = _Attention(block.read_from_pixel.cross_attn)
        block.self_attn.self_attn = _Attention(block.self_attn.self_attn)
        block.read_from_query.cross_attn = _Attention(block.read_from_query.cross_attn)
    return Step(network).eval()


def _keep_signal_alive(network: nn.Module) -> None:
    """Random weights under which alpha is not one number everywhere, and similarities are what exp can take."""
    decoder: Any = network.mask_decoder
    nn.init.normal_(decoder.pred_mat.weight, std=0.1)
    nn.init.constant_(decoder.pred_mat.bias, 0.5)
    keys: Any = network.key_proj
    nn.init.normal_(keys.key_proj.weight, std=0.002)


# ------------------------------------------------------------------------------------------------------- export


@contextmanager
def _area_as_average() -> Iterator[None]:
    """Let F.interpolate shrink areas by AveragePool: sizes divide here, and the tracer loses them otherwise."""
    interpolate = F.interpolate

    def averaged(x: Tensor, size: Any = None, scale_factor: Any = None, mode: str = "nearest", **options: Any,
                 ) -> Tensor:
        if mode != "area":
            resized: Tensor = interpolate(x, size, scale_factor, mode, **options)
            return resized
        rows = round(1 / scale_factor) if size is None else int(x.shape[-2]) // int(size[0])
        return F.avg_pool2d(x, rows)

    F.interpolate = averaged
    try:
        yield
    finally:
        F.interpolate = interpolate


def export(step: Step, path: Path | str, *, size: tuple[int, int] = (288, 512), opset: int = 17) -> None:
    """Write the step as ONNX: inputs src and the states, outputs pha and the new states; metadata name the pairs.

    Args:
        step: from `build`.
        path: appears when complete, never half-written.
        size: height and width of src, multiples of 16, with room for 30 places in memory.
        opset: 17 to 20.

    Raises:
        ValueError: an option has a value that cannot be used.
        OSError: the file cannot be written.
    """
    import onnx

    path = Path(path)
    if any(n % STRIDE for n in size) or size[0] * size[1] < TOP * STRIDE**2:
        raise ValueError(f"{size[1]}x{size[0]}: MatAnyone takes multiples of {STRIDE}, at least 96x80 in all")
    if not 17 <= opset <= 20:
        raise ValueError(f"opset {opset} cannot be exported; use 17 to 20")
    inputs = (torch.rand(1, 3, *size), *step.first_states(size))
    with torch.no_grad():
        step(*inputs)                        # the package keeps its positional encodings, which are constants then
    with written_whole(path) as temporary, _area_as_average(), warnings.catch_warnings():
        warnings.simplefilter("ignore")      # of the tracer, about the shapes it is meant to fix
        torch.onnx.export(step, inputs, temporary, input_names=["src", *STATES], output_names=list(STATES.values()),
                          opset_version=opset, dynamo=False)
        model = onnx.load(temporary)
        onnx.helper.set_model_props(model, {"vmq.states": json.dumps(STATES), "vmq.first_alpha": "mask"})
        onnx.save(model, temporary)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = Parser(
        prog="python -m models.matanyone",
        description="Export one frame of MatAnyone, with its memories as states, to ONNX. The network's code is the "
                    "package matanyone2-runtime, under its authors' non-commercial licence.",
        epilog="example: python -m models.matanyone --weights matanyone2.pth --size 512x288 -o matanyone.onnx",
    )
    add = parser.add_argument
    add("--weights", type=Path, metavar="FILE", help=".pth or .safetensors; random weights without it")
    add("--size", type=parse_size, default=(288, 512), metavar="WxH", help="of the video (default 512x288)")
    add("--opset", type=int, default=17, metavar="N", help="default 17")
    add("--seed", type=int, default=0, metavar="N", help="of random weights")
    add("-o", "--output", type=Path, required=True, metavar="FILE")
    options = parser.parse_args(arguments)

    def write() -> None:
        step = build(load_state(options.weights) if options.weights else None, seed=options.seed)
        export(step, options.output, size=options.size, opset=options.opset)

    return parser.finish(options.output, "a frame of MatAnyone", write)


if __name__ == "__main__":
    sys.exit(main())
