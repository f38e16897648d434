"""What an inspection of a dump says in words: what costs most and what to try, the gravest first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vmq.graph import Graph
from vmq.tensors import Tensor, range_of

if TYPE_CHECKING:
    from vmq.report import Closure, Inspection

MISFIT_DB = 15.0
"""A grid whose noise is so far above what its levels allow is called unfit. Ranges that were searched on long footage
are up to 12 dB wide of a short clip."""


@dataclass(frozen=True)
class Finding:
    """Something that costs quality.

    Attributes:
        about: tensor, closure, state, pass or model.
        name: of what it is about.
        says: what was found, in a sentence or two.
        hint: what to try.
    """

    about: str
    name: str
    says: str
    hint: str


def findings_of(seen: Inspection, dumps: Sequence[tuple[str, Path]]) -> list[Finding]:
    """What costs most, the gravest first."""
    titles = {b.name: b.title for b in seen.blocks}
    found = _misfits(seen, dumps, titles)
    scores = [(p["name"], p["alpha_MAD"]) for p in seen.passes if p["alpha_MAD"] is not None]
    scores = [s for s in scores if s[0] in dict(dumps)]
    rises = [(after - before, name, before, after)
             for (_, before), (name, after) in pairwise(scores)
             if after > 1.05 * before and after - before > 0.05]
    if rises:
        _, name, before, after = max(rises)
        found.append(Finding("pass", name, f"Pass {name} made alpha worse: MAD {before:.2f} before it, {after:.2f} "
                             "after it.", f"Look at {name}'s .diff in the dump."))
    if seen.blame:
        found += _blamed(seen, titles)
    found += _loop(seen)
    if not found or found[0].about in ("state", "pass"):
        found.insert(0, _weakest(seen, titles))
    return found


def unfit(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Activations whose grid does not fit, the worst first; weights' scales are learned to clip."""
    found = [t for t in tensors if t.kind == "activation" and t.misfit_db is not None
             and t.misfit_db >= MISFIT_DB and t.sqnr_db < 60]
    return sorted(found, key=lambda t: (-(t.misfit_db or 0.0), t.name))


def _misfits(seen: Inspection, dumps: Sequence[tuple[str, Path]], titles: dict[str, str]) -> list[Finding]:
    """Grids that do not fit, those first that a pass moved: what was never better may be the price of a shared grid."""
    worst = unfit(seen.tensors)
    graphs = [(step, Graph.load(path)) for step, path in dumps] if worst else []
    told = {t.name: _rescaled(t.name, graphs) for t in worst}
    found = []
    for t in sorted(worst, key=lambda t: (not told[t.name], -seen.refit.get(t.name, 0.0)))[:3]:
        says = (f"The grid of {t.kind} {t.name} in {titles.get(t.closure, t.closure)} does not fit: its {t.levels} "
                f"levels reach from {t.low:.3g} to {t.high:.3g}, values on the probe frames from {t.smallest:.3g} to "
                f"{t.largest:.3g}; {t.used} levels are used, and its noise is {t.misfit_db:.0f} dB above what "
                f"{t.bits} bits can do.")
        better = f"With the best step for it alpha MAD is {seen.whole - seen.refit[t.name]:.2f} instead of " \
            f"{seen.whole:.2f}." if t.name in seen.refit else ""
        found.append(Finding("tensor", t.name, " ".join(part for part in (says, told[t.name], better) if part),
                             "Calibrate on footage that looks like this clip, or compile again: no pass should leave a "
                             "scale like this." if told[t.name] else
                             "Calibrate on footage that looks like this clip (`--calib`), or on more of it."))
    return found


def _rescaled(name: str, graphs: Sequence[tuple[str, Graph]]) -> str:
    """After which pass the width of a tensor's grid changed most, if it at least doubled or halved."""
    ends = [(step, range_of(graph, name)) for step, graph in graphs]
    widths = [(step, found[1] - found[0]) for step, found in ends if found is not None and found[1] > found[0]]
    jumps = [(abs(np.log2(new / old)), step, new / old) for (_, old), (step, new) in pairwise(widths)]
    size, step, factor = max(jumps, default=(0.0, "", 1.0))
    if size < 1.0:
        return ""
    return f"Pass {step} made its range {factor:.3g} times as wide as it was."


def _blamed(seen: Inspection, titles: dict[str, str]) -> list[Finding]:
    found, whole = list[Finding](), seen.whole
    blocks = {b.name: b for b in seen.blocks}
    worst, first = seen.blame[0], max(seen.blame, key=lambda b: b.cost)
    if worst.gain > 0.0:
        inner = f" In it, most is to gain at {seen.tensor_blame[0].name} ({seen.tensor_blame[0].gain:.2f})." \
            if seen.tensor_blame and seen.tensor_blame[0].gain > 0.0 else ""
        found.append(Finding("closure", worst.name, f"Most is to gain at {titles[worst.name]}: with it alone in "
                             f"float, alpha MAD falls from {whole:.2f} to {whole - worst.gain:.2f}.{inner}",
                             _widen(blocks[worst.name])))
    if first.name != worst.name or worst.gain <= 0.0:
        found.append(Finding("closure", first.name, f"{titles[first.name]} costs most alone: with nothing else "
                             f"quantized, alpha MAD is {first.cost:.2f} (everything quantized: {whole:.2f}).",
                             _widen(blocks[first.name])))
    return found


def _widen(block: Closure) -> str:
    if "4" in block.bits and block.layers:
        what = "layer" if len(block.layers) == 1 else f"{len(block.layers)} layers"
        return f"Keep its {what} at 8 bits: `{' '.join(f'--keep {name}=8' for name in block.layers)}`."
    return "It has 8 bits already: calibrate on more footage that looks like yours (`--calib`)."


def _loop(seen: Inspection) -> list[Finding]:
    """Findings about states and about error that grows."""
    found = list[Finding]()
    loop = seen.loop
    if loop is None or not loop.states:
        return found
    quarter = max(1, len(loop.closed) // 4)
    begin, end = (float(np.mean(part)) for part in (loop.closed[:quarter], loop.closed[-quarter:]))
    name, share = max(loop.through.items(), key=lambda item: item[1])
    recurrent = [b for b in seen.blocks if b.states]
    hint = "Keep the state updates at 8 bits: `--keep recurrent=8`." if any("4" in b.bits for b in recurrent) else \
        "The state updates have 8 bits already; calibrate on longer footage of this kind."
    if share > 0.1:
        found.append(Finding("state", name, f"{share:.0%} of the error over the clip comes through state {name}"
                             + (f", {loop.through_all:.0%} through all {len(loop.states)} states."
                                if len(loop.states) > 1 else "."), hint))
    if len(loop.closed) >= 8 and end > 1.5 * begin and end > 1.5 * float(np.mean(loop.open)):
        found.append(Finding("model", "growth", f"The error grows within the clip, from {begin:.2f} in its first "
                             f"quarter to {end:.2f} in its last.", hint))
    return found


def _weakest(seen: Inspection, titles: dict[str, str]) -> Finding:
    """Without blame and without an unfit grid: the noisiest quantizer that alpha feels."""
    noisy = [t for t in seen.tensors if t.own_db is not None]
    if not noisy:
        return Finding("model", "", "Nothing is quantized.", "Compile with --bits 8 or 4.")
    t = min(noisy, key=lambda t: (t.own_db if t.own_db is not None else 0.0, t.name))
    block = next((b for b in seen.blocks if b.name == t.closure), None)
    return Finding("tensor", t.name, f"No grid is unfit. The noisiest quantizer is that of {t.kind} {t.name} in "
                   f"{titles.get(t.closure, t.closure)}: {t.own_db:.1f} dB on {t.bits} bits.",
                   (_widen(block) + " " if block else "")
                   + ("" if seen.blame else "`vmq inspect DUMP --blame` measures what each closure costs."))
