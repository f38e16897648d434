"""Mixed precision: for each closure the widths that a budget is best spent on.

    minimise    sum over closures k of s(k, w_k)                    w_k one of W8A8, W4A8, W4A4
    so that     c(W8A8) + sum over k of c(k, w_k) <= budget

    s(k, w)     mean |alpha - alpha of W8A8| x 1e3 over some frames in closed loop, k alone at w, the rest at W8A8
    c(k, w)     what k at w adds to the file, or to the bit operations of a frame: less than nothing

an integer program (Yao et al. 2021, HAWQ-V3), small enough to be solved exactly. Sensitivity and cost are measured:
each trial is what the passes after this one emit when nothing is learned. Learning mends much of the error, so that
sensitivities rank closures and do not foretell the result. What is chosen is emitted once more; where closures of
different widths meet, quantizers come in that no single trial had, and if that breaks the budget, the next best
choice is taken.

The widths of a closure are those of the operands of its layers. A value that layers of several closures read is
quantized to the widest that they want, and from there to the others (passes/insert_qdq.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

from passes.calibrate_ranges import Ranges
from passes.insert_qdq import layer_bits
from vmq import processes
from vmq.checkpoint import Checkpoint
from vmq.clips import sample_clips
from vmq.cost import cost_of
from vmq.errors import OptionError, PassError
from vmq.graph import Graph
from vmq.pipeline import Context, Pass, PassResult
from vmq.runtime import Session
from vmq.spec import Bits, Budget, Chosen

WIDEST = Bits(8, 8)
CHOICES = {"size": (WIDEST, Bits(4, 8)), "bops": (WIDEST, Bits(4, 8), Bits(4, 4))}
"""Widths that a closure may get, the narrowest last: activations take no room in a file."""
FRAMES = 24
"""Frames that sensitivity is measured on ..."""
STRETCH = 6
"""... so many in a row."""
SPARE = {"size": (256, 0.002), "bops": (0, 0.0)}
"""Bytes, and share, of a budget that are left over: learning may part constants that were equal in the trial."""


class ChooseBits(Pass):
    """With --bits auto, measure what each closure loses at 4 bits, and choose widths within the budget.

    Args:
        quantize: the passes after this one.
    """

    name: ClassVar[str] = "choose_bits"
    changes: ClassVar[bool] = False

    def __init__(self, quantize: Sequence[Pass]) -> None:
        self._quantize = [step for step in quantize if step.changes]

    def requires(self, graph: Graph, context: Context) -> None:
        if context.options.budget is not None and ("find_closures" not in context.found or not context.clips):
            raise PassError("there are no closures, or no clip; run find_closures before")

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Leave a `Chosen` of every closure with layers in `context.found`, if there is a budget."""
        if context.options.budget is None:
            return PassResult()
        chosen, report = _Search(graph, context, self._quantize, context.options.budget).run()
        context.found[self.name] = chosen
        return PassResult(report=report)


def best_choice(errors: Sequence[Sequence[float]], costs: Sequence[Sequence[float]], limit: float) -> list[int] | None:
    """Which option of each closure to take so that the sum of errors is smallest and that of costs within a limit.

    Args:
        errors, costs: of each option of each closure, as many of the one as of the other.
        limit: of the sum of costs.

    Returns:
        The index of an option for each closure; None if no choice keeps the limit.
    """
    error, cost = (np.concatenate([np.asarray(row, np.float64) for row in rows]) for rows in (errors, costs))
    owner = np.repeat(np.arange(len(errors)), [len(row) for row in errors])
    one_each = (owner == np.arange(len(errors))[:, None]).astype(np.float64)
    unit = np.abs(cost).max() or 1.0
    found = milp(error / (np.abs(error).max() or 1.0) * 1e3, integrality=np.ones(len(error)), bounds=Bounds(0, 1),
                 constraints=[LinearConstraint(one_each, 1, 1),
                              LinearConstraint(cost[None] / unit, -np.inf, limit / unit)],
                 options={"mip_rel_gap": 0.0})
    if found.x is None:
        return None
    return [int(np.argmax(found.x[owner == k])) for k in range(len(errors))]


class _Search:
    """Trial compiles of a network, and the choice that they lead to."""

    def __init__(self, graph: Graph, context: Context, quantize: Sequence[Pass], budget: Budget) -> None:
        self.graph, self.context, self.quantize, self.budget = graph, context, quantize, budget
        graph = graph.copy()
        graph.infer_shapes()
        blocks = [Chosen(b.name, b.nodes, WIDEST) for b in context.found["find_closures"].blocks]
        found = {"find_closures": context.found["find_closures"]}
        self.widths = {bits: layer_bits(graph, replace(context, found={
            **found, "choose_bits": [replace(b, bits=bits) for b in blocks]})) for bits in CHOICES[budget.of]}
        self.closures = [b for b in blocks if any(n in self.widths[WIDEST] for n in b.nodes)]
        self.clips = sample_clips(context.clips, FRAMES, STRETCH)
        self.ranges = Ranges()

    def run(self) -> tuple[list[Chosen], dict[str, Any]]:
        """The choice, and what to say of it."""
        options = [self._options(c) for c in self.closures]
        narrowest = [len(o) - 1 for o in options]
        whole, narrow = (self._cost(self._emitted(self._picked(options, picks), complete=True))
                         for picks in ([0] * len(options), narrowest))
        limit, text = self.budget.limit(whole), self.budget.text
        if whole <= limit:
            raise OptionError(f"--budget {text} is enough for W8A8, which takes {self.budget.says(whole, whole)}; give "
                              "--bits 8")
        if narrow > limit:
            raise self._too_small(narrow, whole)
        errors, costs = self._measure(options)
        self.closures = [replace(c, sensitivity={str(b): e for b, e in zip(o, error, strict=True)})
                         for c, o, error in zip(self.closures, options, errors, strict=True)]
        spare, share = SPARE[self.budget.of]
        most = limit * (1.0 - share) - spare
        left = most - whole
        while True:
            picks = best_choice(errors, costs, left) or narrowest
            chosen = self._picked(options, picks)
            cost = self._cost(self._emitted(chosen, complete=True))
            if cost <= most or picks == narrowest:
                break
            left -= cost - most
        if cost > limit:
            raise self._too_small(cost, whole)
        return chosen, {
            "budget": text, "of": self.budget.of, "limit": limit, "W8A8": whole, "smallest": narrow, "cost": cost,
            "closures": [{"name": c.name, **c.to_json()} for c in chosen]}

    def _options(self, closure: Chosen) -> list[Bits]:
        """Widths that make a difference in a closure: some layers have theirs in any case."""
        different = dict[tuple[Bits, ...], Bits]()
        for bits, layers in self.widths.items():
            different.setdefault(tuple(layers[n] for n in closure.nodes if n in layers), bits)
        return list(different.values())

    def _picked(self, options: Sequence[Sequence[Bits]], picks: Sequence[int]) -> list[Chosen]:
        return [replace(c, bits=o[k]) for c, o, k in zip(self.closures, options, picks, strict=True)]

    def _measure(self, options: Sequence[Sequence[Bits]]) -> tuple[list[list[float]], list[list[float]]]:
        """Sensitivity and cost of each option of each closure."""
        keep, total, done = self.context.checkpoint, sum(len(o) - 1 for o in options), 0
        base = self._emitted(self.closures)
        alphas, whole = list(self._alphas(base)), self._cost(base)
        errors, costs = [[0.0] for _ in options], [[0.0] for _ in options]
        for k, others in enumerate(options):
            for bits in others[1:]:
                name = f"choose-{self.closures[k].name}-{bits}"
                found = processes.first(lambda name=name: keep.load(name))      # type: ignore[misc]
                if found is None:
                    trial = self._emitted([replace(c, bits=bits) if i == k else c for i, c in enumerate(self.closures)])
                    error = [np.abs(a - b).mean() for a, b in zip(self._alphas(trial), alphas, strict=True)]
                    found = {"error": np.asarray(round(1e3 * float(np.mean(error, dtype=np.float64)), 4)),
                             "cost": np.asarray(self._cost(trial) - whole)}
                    found = processes.together([found])[0]          # all go on with the same numbers
                    keep.save(name, found)
                errors[k].append(float(found["error"]))
                costs[k].append(float(found["cost"]))
                done += 1
                self.context.progress("measuring closures at 4 bits", done / total)
        return errors, costs

    def _emitted(self, closures: Sequence[Chosen], *, complete: bool = False) -> Graph:
        """What a compile at these widths emits if nothing is learned; `complete`: with all the biases it would have."""
        given = self.context.options
        biases = complete and given.recipe.correct_biases
        plain = replace(given.recipe, fit_ranges=False, correct_biases=biases, blocks=None, network=None)
        context = replace(
            self.context, options=replace(given, recipe=plain, effort=replace(given.effort, bias_frames=1)),
            found={"find_closures": self.context.found["find_closures"], "choose_bits": closures,
                   "calibrate_ranges": self.ranges}, checkpoint=Checkpoint(), progress=lambda _what, _share: None)
        trial = self.graph.copy()
        for step in self.quantize:
            step.run(trial, context)
            trial.sort()
        return trial

    def _alphas(self, trial: Graph) -> Iterator[NDArray[np.float32]]:
        session = Session(trial)
        for clip in self.clips:
            yield from session.alphas(clip.frames(), session.told(clip))

    def _cost(self, trial: Graph) -> int:
        if self.budget.of == "size":
            return len(trial.to_bytes())
        trial.infer_shapes()
        return cost_of(trial).bops

    def _too_small(self, smallest: int, whole: int) -> OptionError:
        return OptionError(f"--budget {self.budget.text} cannot be met: the smallest possible is "
                           f"{self.budget.says(smallest, whole)}")
