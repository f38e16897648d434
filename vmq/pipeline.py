"""Passes, and the runner that takes a graph through a list of them.

A pass is `requires -> run -> ensures`. A transformation edits the graph in place and says truthfully how many
places it changed; an analysis changes nothing and leaves what it found in the context. After every pass the
runner checks the invariants of `INVARIANTS`. Dumps, timing and progress are observers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from vmq.checkpoint import Checkpoint
from vmq.clips import Clip
from vmq.errors import ModelError, PassError, VmqError
from vmq.graph import Constant, Graph
from vmq.spec import Options


@dataclass(frozen=True)
class PassResult:
    """What a pass did.

    Attributes:
        modified: places in the graph that changed; 0 says that the graph is the object it was.
        notes: one line each: a node that was left alone and why, or what the user should know.
        report: numbers and findings in plain JSON types.
    """

    modified: int = 0
    notes: tuple[str, ...] = ()
    report: dict[str, Any] = field(default_factory=dict)


@dataclass
class Context:
    """What passes share.

    Attributes:
        options: what was asked for.
        clips: calibration clips, already of the model's size; of long footage, stretches.
        footage: all of it, where learning draws its sequences from; by default the clips.
        found: what analyses found, by the name of the pass.
        reference: the float graph as it was before quantization.
        progress: called with (what is being done, share done from 0 to 1).
        checkpoint: keeps what long work has finished, for a resumed run.
    """

    options: Options
    clips: Sequence[Clip] = ()
    footage: Sequence[Clip] = ()
    found: dict[str, Any] = field(default_factory=dict)
    reference: Graph | None = None
    progress: Callable[[str, float], None] = lambda _what, _share: None
    checkpoint: Checkpoint = field(default_factory=Checkpoint)


class Pass:
    """One idea that changes a graph, or finds something out about it.

    Subclasses set `name` (a verb phrase, also the file's name) and implement `run`; the first line of their
    docstring is what `vmq passes` prints.
    """

    name: ClassVar[str]
    changes: ClassVar[bool] = True
    """False for an analysis: the runner checks that the graph stays as it was."""
    retypes: ClassVar[bool] = False
    """True for a pass that may change the types of the model's inputs and outputs; names and order stay in any case."""

    def requires(self, graph: Graph, context: Context) -> None:
        """Raise PassError when something is missing that an earlier pass should have left."""

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Do it."""
        raise NotImplementedError

    def ensures(self, graph: Graph, context: Context) -> None:
        """Raise PassError when the pass did not reach what it promises."""


class Observer:
    """Watches a pipeline run; every method may be left as it is."""

    def started(self, graph: Graph, context: Context, passes: Sequence[Pass]) -> None:
        """Before the first pass."""

    def before(self, step: Pass, graph: Graph) -> None:
        """Before a pass."""

    def after(self, index: int, step: Pass, graph: Graph, result: PassResult, seconds: float) -> None:
        """After a pass that went well; `index` counts from 1."""

    def failed(self, index: int, step: Pass, before: bytes, error: BaseException) -> None:
        """After a pass that raised, or left an invalid graph; `before` is the model it was given."""

    def finished(self, graph: Graph) -> None:
        """After the last pass."""


def run_passes(graph: Graph, passes: Sequence[Pass], context: Context, observers: Sequence[Observer] = (),
               ) -> list[PassResult]:
    """Take `graph` through `passes` in order, in place.

    Raises:
        PassError: a pass failed or broke an invariant; names the pass and those before it.
        VmqError: bad input that a pass found, as the pass raised it.
    """
    for observer in observers:
        observer.started(graph, context, passes)
    results: list[PassResult] = []
    for index, step in enumerate(passes, 1):
        for observer in observers:
            observer.before(step, graph)
        before, signature, started = graph.to_bytes(), graph.signature(), time.perf_counter()
        try:
            step.requires(graph, context)
            result = step.run(graph, context)
            _sort(graph)
            step.ensures(graph, context)
            _check(step, graph, result, before, signature)
        except BaseException as error:
            for observer in observers:
                observer.failed(index, step, before, error)
            if isinstance(error, VmqError) or not isinstance(error, Exception):
                if isinstance(error, PassError) and not error.pass_name:
                    raise _failure(step, passes[:index - 1], error) from error
                raise
            raise _failure(step, passes[:index - 1], error) from error
        results.append(result)
        for observer in observers:
            observer.after(index, step, graph, result, time.perf_counter() - started)
    for observer in observers:
        observer.finished(graph)
    return results


def _failure(step: Pass, earlier: Sequence[Pass], error: Exception) -> PassError:
    said = " ".join(str(error).split()) or type(error).__name__
    kind = "" if isinstance(error, PassError) else f"{type(error).__name__}: "
    after = f" (after {', '.join(p.name for p in earlier)})" if earlier else ""
    return PassError(f"pass {step.name} failed{after}: {kind}{said}", pass_name=step.name)


def _sort(graph: Graph) -> None:
    try:
        graph.sort()
    except ModelError as error:      # not the input's fault: that had no cycle
        raise PassError(str(error)) from error


def _check(step: Pass, graph: Graph, result: PassResult, before: bytes,
           signature: list[tuple[str, str, str, tuple[Any, ...]]]) -> None:
    if (result.modified == 0 or not step.changes) and graph.to_bytes() != before:
        raise PassError(f"the graph changed although the pass {'reports no change' if step.changes else 'analyses'}")
    if step.changes and result.modified:
        for says, holds in INVARIANTS:
            found = holds(graph)
            if found:
                raise PassError(f"left a graph in which it does not hold that {says}: {found}")
    kept = 2 if step.retypes else 3
    if [s[:kept] for s in graph.signature()] != [s[:kept] for s in signature]:
        raise PassError("inputs or outputs are not the model's any more")


def _unique_names(graph: Graph) -> str:
    seen: set[str] = set()
    names: list[str] = [v.name for v in graph.values()]
    for name in names + [f"node {n.name}" for n in graph.nodes]:
        if name in seen:
            return name
        seen.add(name)
    return ""


def _produced_once(graph: Graph) -> str:
    inputs = {id(v) for v in graph.inputs}
    for value in graph.values():
        want = 0 if isinstance(value, Constant) or id(value) in inputs else 1
        if len(value.inputs) != want:
            return f"{value.name} is produced by {len(value.inputs)} nodes"
    return ""


def _good_scales(graph: Graph) -> str:
    for node in graph.nodes:
        if node.op in ("QuantizeLinear", "DequantizeLinear"):
            scale = node.inputs[1]
            if not isinstance(scale, Constant):
                return f"the scale of {node.name} is not constant"
            values = np.asarray(scale.values)
            if not (np.isfinite(values).all() and (values > 0).all()):
                return f"{node.name} has {values.ravel()[~(np.isfinite(values.ravel()) & (values.ravel() > 0))][0]}"
    return ""


def _finite_constants(graph: Graph) -> str:
    for constant in graph.constants():
        if constant.dtype in (np.float32, np.float64, np.float16) and not np.isfinite(constant.values).all():
            return f"{constant.name} holds NaN or infinity"
    return ""


def _valid(graph: Graph) -> str:
    try:
        graph.check()
    except ModelError as error:
        return str(error)
    return ""


INVARIANTS: Sequence[tuple[str, Callable[[Graph], str]]] = (
    ("every name is used once", _unique_names),
    ("every value has one producer, inputs and constants none", _produced_once),
    ("scales are constant, finite and positive", _good_scales),
    ("float constants are finite", _finite_constants),
    ("onnx.checker accepts the model", _valid),
)
"""What holds after every transformation: (in words, a check that returns what it found, or nothing)."""

