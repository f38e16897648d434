"""Run the emitted model in ONNX Runtime and say, with numbers, how far it is from what it should be.

- against the graph that went into `lower`, optimizations off: the same bits, or the compile fails (convolutions that
  `pack_columns` has repacked add up in another order: there it is the integer kernels that must give the same bits;
  of what `float_forms` and `multiply_pixels` add up, float sums may differ by their own rounding and no more);
- optimized against not: integer kernels round where float ones do not, so single steps may differ; the share is
  stated;
- closed loop (own states) against the float reference, beside open loop (the reference's states fed at every
  frame): a recurrent network can be right in every frame and still drift. Error that grows over a clip is said
  loudly, and so is a state that drifts or saturates (vmq/drift.py), by its name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from vmq import processes
from vmq.clips import Clip
from vmq.drift import SATURATED, StateErrors
from vmq.errors import PassError
from vmq.graph import Graph
from vmq.pipeline import Context, Pass, PassResult
from vmq.runtime import Session

EXACT_FRAMES = 3
"""Frames over which emitted and last float-typed graph must agree bit for bit."""
ROUNDING = 1e-4
"""What float sums of a layer may lose by rounding, in parts of the largest value of an output that is made of them."""
SIGMOID = 2.0 ** -21
"""A sigmoid is rounded as numbers near 1 are, also where it is next to 0 in a whole frame."""
LOOP_CLIPS = 4
"""Clips that are run in closed and open loop."""
COLLAPSE = 3.0
"""Closed-loop error at the end of clips, in multiples of open-loop error, that is called a collapse ..."""
GROWTH = 1.5
"""... if it is also so many times that at their start."""


class Verify(Pass):
    """Run the emitted model: same bits as before lowering, share of rounding steps optimized, closed-loop error."""

    name: ClassVar[str] = "verify"
    changes: ClassVar[bool] = False

    def requires(self, graph: Graph, context: Context) -> None:
        if "lower" not in context.found or context.reference is None:
            raise PassError("there is nothing to compare with; run insert_qdq and lower before")

    def run(self, graph: Graph, context: Context) -> PassResult:
        return processes.first(lambda: self._check(graph, context))

    def _check(self, graph: Graph, context: Context) -> PassResult:
        assert context.reference is not None
        unpacked = context.found.get("pack_columns", graph)
        summed = context.found.get("float_sums", unpacked)
        _same_bits(context.found["lower"], summed, context, optimize=False)
        if summed is not unpacked:
            _same_bits(summed, unpacked, context, optimize=True, rounding=ROUNDING)
        _same_bits(unpacked, graph, context, optimize=True)
        steps = _differing(graph, context)
        loops, states = _loops(graph, context.reference, context)
        notes = list[str]()
        if loops["closed_last"] > COLLAPSE * loops["open"] and loops["closed_last"] > GROWTH * loops["closed_first"]:
            notes.append(f"recurrent collapse: MAD to float grows from {loops['closed_first']:.1f} to "
                         f"{loops['closed_last']:.1f} within a clip, while frame by frame on float states it is "
                         f"{loops['open']:.1f}; use more bits or --keep recurrent=8")
        for name, state in states.items():
            if state["last"] > COLLAPSE * state["open"] and state["last"] > GROWTH * state["first"]:
                notes.append(f"state {name} drifts: its error grows from {state['first']:.1%} to {state['last']:.1%} "
                             f"within a clip, while on float states it is {state['open']:.1%}; use more bits or --keep "
                             "recurrent=8")
            if state["saturated"] > state["saturated_in_float"] + SATURATED:
                notes.append(f"state {name} saturates: {state['saturated']:.1%} of it is at the ends of its range, of "
                             f"the float state {state['saturated_in_float']:.1%}; calibrate on longer clips")
        return PassResult(notes=tuple(notes), report={"differing_from_lowered": 0, "optimized_alpha_differs": steps,
                                                      "MAD_to_float": loops, "states": states})


def _same_bits(before: Graph, after: Graph, context: Context, *, optimize: bool, rounding: float = 0.0) -> None:
    """Make sure that two graphs give the same outputs, as integer kernels or, not optimized, in float.

    With `rounding`, each frame begins with the same states, and outputs may differ by so much of their largest value,
    and by what a sigmoid rounds.
    """
    clip = context.clips[0]
    one, other = (Session(g, optimize=optimize, pairs=context.options.pairs) for g in (before, after))
    for session in (one, other):
        session.reset(session.told(clip))
    for index, frame in enumerate(clip.frames(0, EXACT_FRAMES)):
        if rounding:
            other.state = dict(one.state)
        theirs, ours = one.step(frame), other.step(frame)
        theirs |= {p.output: other.encode({p.input: theirs[p.output]})[p.input] for p in other.state_pairs}
        for name, values in theirs.items():
            most = rounding * float(np.abs(values).max()) + SIGMOID if rounding else 0.0
            wrong = np.abs(ours[name] - values) > most if rounding else ours[name] != values
            if wrong.any():
                raise PassError(f"output {name} of the emitted model differs from the graph before lowering in "
                                f"{np.mean(wrong):.2%} of its values at frame {index}; this is a bug in vmq, please "
                                "report it with the dump (--dump DIR)")


def _differing(graph: Graph, context: Context) -> float:
    """Share of 8-bit alpha values that the optimized run gives differently, states fed from the plain run."""
    clip = context.clips[0]
    plain, optimized = Session(graph, optimize=False), Session(graph)
    plain.reset(plain.told(clip))
    differing = total = 0
    for frame in clip.frames(0, EXACT_FRAMES):
        optimized.state = dict(plain.state)
        ours, theirs = (np.rint(s.alpha_of(s.step(frame)) * 255.0) for s in (optimized, plain))
        differing += int((ours != theirs).sum())
        total += ours.size
    return differing / total


def _loops(graph: Graph, reference: Graph, context: Context) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Mean |alpha - float alpha| x 1e3 in closed loop (all, first and last quarter of clips) and in open loop; and of
    every state its error in closed loop (first and last quarter) and in open loop, and how much of it saturates.
    """
    closed, loose = Session(graph), Session(graph)
    exact = Session(reference, pairs=context.options.pairs)
    states, open_states = (StateErrors(graph, closed.state_pairs) for _ in range(2))
    clips = list(context.clips)[:: max(1, len(context.clips) // LOOP_CLIPS)][:LOOP_CLIPS]
    length = context.options.effort.loop_frames
    closes, opens = list[float](), list[float]()
    first, last = list[int](), list[int]()
    for number, clip in enumerate(clips):
        count = min(len(clip), length // len(clips))
        quarter, start = max(1, count // 4), len(closes)
        first += range(start, start + quarter)
        last += range(start + count - quarter, start + count)
        for index, (frame, want) in enumerate(_with_reference(clip.part(0, count), exact, closed, loose)):
            closes.append(float(np.abs(closed.alpha_of(closed.step(frame)) - want).mean()) * 1e3)
            opens.append(float(np.abs(loose.alpha_of(loose.step(frame)) - want).mean()) * 1e3)
            states.add(closed.state, exact.state)
            open_states.add(loose.state, exact.state)
            context.progress("verifying in closed loop", (number + (index + 1) / count) / len(clips))
    errors = np.asarray(closes)
    alpha = {"closed": float(errors.mean()), "closed_first": float(errors[first].mean()),
             "closed_last": float(errors[last].mean()), "open": float(np.mean(opens)), "frames": float(len(errors))}
    return alpha, {name: {
        "first": float(states.error(name)[first].mean()), "last": float(states.error(name)[last].mean()),
        "open": float(open_states.error(name).mean()), "saturated": float(states.saturated(name)[0].mean()),
        "saturated_in_float": float(states.saturated(name)[1].mean())} for name in states.names}


def _with_reference(clip: Clip, exact: Session, closed: Session, loose: Session) -> Iterator[tuple[Any, Any]]:
    """Frames with the reference's alpha; `loose` is given the reference's state before each."""
    exact.reset(exact.told(clip))
    closed.reset(closed.told(clip))
    for frame in clip.frames():
        loose.state = loose.encode(exact.state)
        yield frame, exact.alpha_of(exact.step(frame))
