"""Bind free dimensions: the frame to a size, the downsample ratio to a number, states to what one frame gives.

The first states of a dynamic RVM are 1x1x1x1 zeros that the graph expands; run one frame, and the state
outputs say what shape the state inputs have from then on. Inputs keep their names and order; an input for the
ratio stays, unread.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from vmq.errors import ModelError, OptionError
from vmq.graph import Graph
from vmq.pipeline import Context, Pass, PassResult
from vmq.runtime import Session, default_ratio

DEFAULT_SIZE = (288, 512)
"""(height, width) where neither the model nor the user says: the size that RVM is evaluated at."""


class BindShapes(Pass):
    """Bind free dimensions to a size and a downsample ratio; what leaves is static."""

    name: ClassVar[str] = "bind_shapes"

    def run(self, graph: Graph, context: Context) -> PassResult:
        options = context.options
        session = Session(graph, optimize=False, pairs=options.pairs)
        frame = next(v for v in graph.inputs if v.name == session.frame_input)
        size = frame_size(frame, options.size)
        ratio_inputs = [v for v in graph.inputs if v.name in session.constant_inputs]
        if options.downsample_ratio is not None and not ratio_inputs:
            raise OptionError("--downsample-ratio was given, but the model has no input for it; leave it out, or "
                              "export the model with a ratio")
        ratio = options.downsample_ratio or default_ratio(size)
        wanted = {frame.name: [1, 3, *size]}
        shapes = {v.name: list(v.shape or ()) for v in graph.inputs}
        for pair in session.state_pairs:
            wanted[pair.input] = shapes[pair.input]
        if _static(graph) and not ratio_inputs:
            graph.infer_shapes()
            return PassResult(report={"size": list(size)})

        # Twice: the second frame runs on the shapes that the first one left.
        session = Session(graph, optimize=False, pairs=options.pairs, downsample_ratio=ratio)
        outputs: dict[str, Any] = {}
        for _ in range(2):
            try:
                outputs = session.feed(np.full((1, 3, *size), 0.5, np.float32))
            except ModelError as error:
                raise ModelError(f"{error}; try a size divisible by 32, for example "
                                 f"--size {max(32, size[1] // 32 * 32)}x{max(32, size[0] // 32 * 32)}") from error
        for pair in session.state_pairs:
            wanted[pair.input] = list(outputs[pair.output].shape)
        bound = 0
        for value in graph.inputs:
            if value.name in wanted and list(value.shape or ()) != wanted[value.name]:
                value.shape = wanted[value.name]
                bound += 1
        for value in graph.outputs:
            value.shape = list(outputs[value.name].shape)
        for value in ratio_inputs:
            fixed = graph.constant(f"{value.name}_bound", np.full([1] * len(value.shape or ()), ratio, np.float32))
            graph.replace_uses(value, fixed)
            value.shape = [1] * len(value.shape or ())
            bound += 1
        graph.infer_shapes()
        report: dict[str, Any] = {"size": list(size), "states": {p.input: wanted[p.input] for p in session.state_pairs}}
        notes: tuple[str, ...] = ()
        if ratio_inputs:
            report["downsample_ratio"] = ratio
            notes = (f"{ratio_inputs[0].name} is bound to {ratio:g}; what is fed to it is ignored",)
        return PassResult(modified=bound, notes=notes, report=report)

    def ensures(self, graph: Graph, context: Context) -> None:
        if not _static(graph):
            loose = next(v for v in (*graph.inputs, *graph.outputs) if not _is_static(v))
            raise ModelError(f"the shape of {loose.name} stays free ({loose.shape}); export the model for one size")


def frame_size(frame: Any, asked: tuple[int, int] | None) -> tuple[int, int]:
    """(height, width) to bind to: what was asked for, which a static model must agree with."""
    fixed = [d if isinstance(d, int) else None for d in (frame.shape or [None] * 4)[2:]]
    size = asked or tuple(d or default for d, default in zip(fixed, DEFAULT_SIZE, strict=True))
    if any(d is not None and d != s for d, s in zip(fixed, size, strict=True)):
        raise OptionError(f"--size {size[1]}x{size[0]} was asked for, but the model is fixed at {fixed[1] or 'any'}x"
                          f"{fixed[0] or 'any'}; leave --size out, or export the model for that size")
    return size[0], size[1]


def _is_static(value: Any) -> bool:
    return value.shape is not None and all(isinstance(d, int) for d in value.shape)


def _static(graph: Graph) -> bool:
    return all(_is_static(v) for v in (*graph.inputs, *graph.outputs))
