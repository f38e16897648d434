"""Make the file smaller without changing a value: equal constants once, short names for what vmq added.

A quantized graph has a thousand scales and zero points, many of them equal, and as many values between Q and DQ, whose
names are those of the float model's values with endings. Together they are a twentieth of a 4-bit file. Values that
the float graph has keep their names; others get the initials of their operator and a number.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any, ClassVar

import numpy as np

from vmq.errors import PassError
from vmq.graph import Graph
from vmq.pipeline import Context, Pass, PassResult

SMALL = 4096
"""Constants of at most so many bytes are compared."""


class SlimDown(Pass):
    """Store equal constants once, and give values that vmq added short names."""

    name: ClassVar[str] = "slim_down"

    def requires(self, graph: Graph, context: Context) -> None:
        if context.reference is None:
            raise PassError("there is no float graph to tell its values by; run insert_qdq before")

    def run(self, graph: Graph, context: Context) -> PassResult:
        assert context.reference is not None
        shared = _share_constants(graph)
        renamed = _shorten_names(graph, {v.name for v in context.reference.values()})
        return PassResult(modified=shared + renamed, report={"shared_constants": shared, "short_names": renamed})


def _share_constants(graph: Graph) -> int:
    """Let readers of a small constant read the first of its type, shape and bytes; how many are gone."""
    first = dict[tuple[str, tuple[int, ...], bytes], Any]()
    shared = 0
    for constant in list(graph.constants()):
        values = np.asarray(constant.values)
        if values.nbytes > SMALL or any(o is constant for o in graph.outputs):
            continue
        known = first.setdefault((values.dtype.name, values.shape, values.tobytes()), constant)
        if known is not constant:
            graph.replace_uses(constant, known)
            shared += 1
    graph.cleanup()
    return shared


def _shorten_names(graph: Graph, known: set[str]) -> int:
    """Give values that nodes make, inputs and outputs aside, short names unless they are known ones; how many."""
    fixed = known | {v.name for v in (*graph.inputs, *graph.outputs)} | {c.name for c in graph.constants()}
    numbers = dict[str, Iterator[int]]()
    names = dict[str, str]()
    for node in graph.nodes:
        initials = "".join(c for c in node.op if c.isupper()).lower() or "v"
        for value in node.outputs:
            if value.name and value.name not in fixed:
                names[value.name] = next(name for n in numbers.setdefault(initials, count(1))
                                         if (name := f"{initials}{n}") not in fixed)
    return graph.rename(names)
