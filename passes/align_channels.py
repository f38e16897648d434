"""Give convolutions behind a Concat a multiple of four input channels, by channels of zeros.

ONNX Runtime's integer convolutions take four input channels at a time; with 35 instead of 36, RVM's most expensive
one is about five times slower. All four of RVM's decoder concats end in the 3-channel image and are one channel
short. A channel of zeros under weights of zero changes no value. It is written as an Expand of one number, which
the runtime computes once at load: the file stays small.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from vmq.graph import Constant, Graph
from vmq.pipeline import Context, Pass, PassResult

MULTIPLE = 4
"""Input channels that an integer kernel takes at a time."""


class AlignChannels(Pass):
    """Widen concats in front of convolutions by channels of zeros to a multiple of four."""

    name: ClassVar[str] = "align_channels"

    def run(self, graph: Graph, context: Context) -> PassResult:
        widened = 0
        for concat in [n for n in graph.nodes if n.op == "Concat" and n.attrs.get("axis") == 1]:
            joined = concat.outputs[0]
            shape: list[Any] = list(joined.shape or [])
            if len(shape) != 4 or not all(isinstance(d, int) for d in shape) or shape[1] % MULTIPLE == 0 \
                    or any(o is joined for o in graph.outputs) or not joined.outputs \
                    or not all(_takes_channels(reader, joined) for reader in joined.outputs):
                continue
            missing = -shape[1] % MULTIPLE
            fill = [shape[0], missing, *shape[2:]]
            zeros = graph.add("Expand", [graph.constant("nothing", np.zeros((1, 1, 1, 1), np.float32)),
                                         graph.constant("fill", np.asarray(fill, np.int64))], "zeros", shape=fill)
            concat.inputs.append(zeros)
            joined.shape = [shape[0], shape[1] + missing, *shape[2:]]
            for reader in joined.outputs:
                weight = reader.inputs[1]
                values = np.pad(np.asarray(weight.values), ((0, 0), (0, missing), (0, 0), (0, 0)))
                reader.inputs[1] = graph.constant(f"{weight.name}_aligned", values)
            widened += 1
        return PassResult(modified=widened, report={"concats": widened})


def _takes_channels(node: Any, value: Any) -> bool:
    """True for an ordinary convolution of `value` whose weight can be widened."""
    return node.op == "Conv" and node.inputs[0] is value and node.attrs.get("group", 1) == 1 \
        and isinstance(node.inputs[1], Constant) and all(v is not value for v in node.inputs[1:])
