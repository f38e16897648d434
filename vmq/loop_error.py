"""Error over the frames of a clip, and how much of it comes through each recurrent state.

    e_t         = mean |alpha_t - float alpha_t| x 1e3, the compiled model in closed loop
    through(k)  = 1 - mean e^k / mean e,   e^k: as e, but fed the float model's state k before every frame

With all states from the float model the loop is open, and what is left is the error of single frames. The shares of
the states need not add up: states correct each other, and what one lets through another may have seen as well.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vmq.graph import Graph
from vmq.runtime import Session


@dataclass(frozen=True)
class LoopError:
    """Error over a clip.

    Attributes:
        closed, open: e_t of every frame in closed loop, and fed all of the float model's states.
        states: e_t when one state comes from the float model, by the state's input.
        exact, ours: alpha [T,H,W] in 0..1 of the float model and of the compiled one in closed loop.
    """

    closed: list[float]
    open: list[float]
    states: dict[str, list[float]]
    exact: NDArray[np.float32]
    ours: NDArray[np.float32]

    @property
    def through(self) -> dict[str, float]:
        """Share of the closed-loop error that comes through each state; below 0 where the state helps."""
        return {name: self._saved(errors) for name, errors in self.states.items()}

    @property
    def through_all(self) -> float:
        """Share that comes through the states together."""
        return self._saved(self.open)

    def _saved(self, errors: list[float]) -> float:
        whole = float(np.mean(self.closed))
        return 1.0 - float(np.mean(errors)) / whole if whole > 0.0 else 0.0

    def to_json(self) -> dict[str, Any]:
        """In plain JSON types; pictures stay out."""
        return {"closed": self.closed, "open": self.open, "states": self.states, "through": self.through,
                "through_all": self.through_all}


def measure_loop(reference: Graph, quantized: Graph, frames: NDArray[np.uint8], *,
                  session: Mapping[str, Any] | None = None,
                  progress: Callable[[float], None] = lambda _share: None) -> LoopError:
    """Run both models over a clip, [T,3,H,W].

    Args:
        reference: the float model.
        quantized: the compiled one, of the same states.
        frames: the clip, from its beginning.
        session: further arguments of `Session`, such as state pairs.
        progress: called with the share done.
    """
    how = dict(session or {})
    exact, ours = Session(reference, **how), Session(quantized, **how)
    states = [p.input for p in exact.state_pairs]
    runs = len(states) + 3
    wanted, given = [], []
    for index, frame in enumerate(frames):
        given.append(dict(exact.state))
        wanted.append(exact.alpha_of(exact.step(frame)))
        progress((index + 1) / len(frames) / runs)

    def alphas(fed: Collection[str], number: int) -> NDArray[np.float32]:
        ours.reset()
        found = []
        for index, (frame, state) in enumerate(zip(frames, given, strict=True)):
            ours.state |= {name: state[name] for name in fed}
            found.append(ours.alpha_of(ours.step(frame)))
            progress((number + (index + 1) / len(frames)) / runs)
        return np.stack(found)

    want = np.stack(wanted)

    def errors(got: NDArray[np.float32]) -> list[float]:
        return [float(e) for e in np.abs(got - want).mean(axis=(1, 2), dtype=np.float64) * 1e3]

    closed = alphas((), 1)
    return LoopError(errors(closed), errors(alphas(states, 2)) if states else errors(closed),
                 {name: errors(alphas((name,), number)) for number, name in enumerate(states, 3)}, want, closed)
