"""Give every layer back the mean that rounding took from it.

Channels that hardly vary are rounded to the same side in every pixel, and the error does not average out: in RVM
the first layer's 8-bit output alone shifts alpha by more than all other tensors together. A bias costs nothing:

    b' = b + E[y] - E[y']        per output channel, y the float layer's result, y' the quantized one's

(Nagel et al. 2019, empirical bias correction). y' is measured with the float result of every earlier layer as
input, so that each layer mends what its own operands, and the tensors between them and the layers before, lost;
nothing is mended twice. The reference's own warm states are fed.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from vmq import processes
from vmq.errors import PassError
from vmq.graph import Constant, Graph, Variable
from vmq.pipeline import Context, Pass, PassResult
from vmq.runtime import Session, create_session

WARM_UP = 4
"""Frames at the start of each clip that only warm the states up."""


class CorrectBiases(Pass):
    """Shift biases so that every layer keeps the mean of its float self, channel by channel."""

    name: ClassVar[str] = "correct_biases"

    def requires(self, graph: Graph, context: Context) -> None:
        if context.reference is None or not context.clips:
            raise PassError("there is no float reference, or no clip; run insert_qdq before")

    def run(self, graph: Graph, context: Context) -> PassResult:
        assert context.reference is not None
        if not context.options.recipe.correct_biases:
            return PassResult()
        names = [n.name for n in _layers(graph)]
        shifts = _mean_errors(graph, context.reference, context) if names else {}
        largest = 0.0
        for node in _layers(graph):
            shift = shifts[node.name]
            bias = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None
            values = shift if bias is None else np.asarray(bias.values, np.float64) + shift
            fresh = graph.constant(f"{node.inputs[1].name}_bias" if bias is None else bias.name,
                                   values.astype(np.float32))
            if len(node.inputs) > 2:
                node.inputs[2] = fresh
            else:
                node.inputs.append(fresh)
            largest = max(largest, float(np.abs(shift).max()))
        return PassResult(modified=len(names), report={"layers": len(names), "largest_shift": largest})


def _layers(graph: Graph) -> list[Any]:
    """Quantized layers that have, or can take, a constant bias."""
    return [n for n in graph.nodes if n.op in ("Conv", "Gemm") and _dequantized(n.inputs[0])
            and _dequantized(n.inputs[1]) and (len(n.inputs) < 3 or isinstance(n.inputs[2], Constant)
                                               or not n.inputs[2].name)]


def _dequantized(value: Any) -> bool:
    return bool(value.inputs) and value.inputs[0].op == "DequantizeLinear"


def _mean_errors(graph: Graph, reference: Graph, context: Context) -> dict[str, NDArray[np.float64]]:
    """E[y] - E[y'] of every layer by node name, [channels], over some frames of every clip."""
    renamed: dict[str, str] = context.found["insert_qdq"]
    apart = graph.copy()
    results, feeds = dict[str, str](), dict[str, str]()
    for node in _layers(apart):
        result = node.outputs[0]
        source = renamed.get(result.name, result.name)
        given = Variable(apart.unique(f"{result.name}_float"), dtype=np.float32, shape=result.shape)
        users = list(result.outputs)
        apart.replace_uses(result, given, users)
        apart.inputs.append(given)
        results[node.name], feeds[given.name] = result.name, source
    exact = Session(reference, pairs=context.options.pairs, extra=list(feeds.values()), device=context.options.device)
    ours = create_session(apart, extra=list(results.values()), device=context.options.device)
    frames = _frames_of(context)

    def compare(number: int) -> tuple[int, dict[str, NDArray[np.float64]]]:
        """How many frames of a clip were measured, and the sum of their errors."""
        clip, count = context.clips[number], 0
        errors = dict.fromkeys(results, np.zeros(()))
        exact.reset(exact.told(clip))
        for index, frame in enumerate(clip.frames(0, min(len(clip), WARM_UP + frames))):
            fed = exact.feeds(frame)
            outputs = exact.step(frame)
            if index < min(WARM_UP, len(clip) - 1):
                continue
            count += 1
            fed |= {name: outputs[source] for name, source in feeds.items()}
            for node, source, y_rounded in zip(results, feeds.values(), ours.run(list(results.values()), fed),
                                               strict=True):
                y = outputs[source]
                axes = (0, *range(2, y.ndim))
                errors[node] = errors[node] + y.mean(axes, np.float64) - y_rounded.mean(axes, np.float64)
        context.progress("comparing means", (number + 1) / len(context.clips))
        return count, errors

    clips = processes.together([compare(k) for k in processes.mine(range(len(context.clips)))])
    measured = sum(count for count, _ in clips)
    return {node: sum((errors[node] for _, errors in clips), np.zeros(())) / measured for node in results}


def _frames_of(context: Context) -> int:
    """Frames measured in each clip."""
    return max(1, context.options.effort.bias_frames // len(context.clips))


