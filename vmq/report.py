"""Read a dump: what each pass did to the alpha, where the error comes from, and what to try.

The alpha error of a dump is its mean |alpha - float alpha| x 1e3 over the probe frames, in closed loop. What is
measured stands in modules of its own: tensors (noise and range of each), loop_error (over time, through each state) and
blame (what each closure costs). Here it is put together, and vmq/findings.py says it in words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vmq.blame import Blame, blame, closure_quantizers, refit, tensor_quantizers
from vmq.dump import Probe, read_pipeline, read_probe, read_reports
from vmq.findings import Finding, findings_of, unfit
from vmq.graph import Graph
from vmq.layers import homes
from vmq.loop_error import LoopError, measure_loop
from vmq.runtime import Session
from vmq.states import WEIGHTED
from vmq.tensors import Tensor, decibels, measure_tensors

LOWERED = "lower"
"""The pass up to which tensors stand beside their quantizers; what follows lays integers out."""
UNCALIBRATED = "insert_qdq"
"""After this pass every scale is still 1: its dump runs, but scoring it would say nothing."""
REFITS = 8
"""Grids that do not fit, the worst, of which blame measures what a better one brings."""
SCORED_FRAMES = 8
"""Probe frames that dumps, tensors and closures are measured on; the error over time is that of all."""


@dataclass(frozen=True)
class Closure:
    """A block of reconstruction, as it came out.

    Attributes:
        name, nodes: as `find_closures` gave them, with what `fold_resizes` put in.
        label: where its layers stand in the model, for people.
        layers: names of its multiply-add nodes, those of `find_closures`.
        states: inputs of the recurrent states that it updates.
        reads: names of the closures before it that it reads from.
        bits: widths of its layers' weights and of its tensors, as "W4 A4/8"; empty where it has none.
        shape: of what it hands on, without the batch.
        sqnr_db: of what it hands on.
    """

    name: str
    label: str
    nodes: list[str]
    layers: list[str]
    states: list[str]
    reads: list[str]
    bits: str
    shape: list[int]
    sqnr_db: float | None

    @property
    def title(self) -> str:
        """Name, and in brackets what it is."""
        count = f"{len(self.layers)} layer{'s' if len(self.layers) != 1 else ''}"
        return f"{self.name} ({', '.join([self.label or count, *(f'state {s}' for s in self.states)])})"


@dataclass(frozen=True)
class Inspection:
    """What a dump shows.

    Attributes:
        passes: per pass name, modified, seconds, and alpha_MAD (None where the graph did not change or is not
            calibrated yet).
        closures: node names of each recurrent closure.
        tensors: worst SQNR first.
        notes: what the passes noted, with the pass's name before it.
        blocks: all closures, in topological order.
        loop: error over the probe clip.
        blame: of closures, where most is to gain first; empty if not asked for.
        tensor_blame: of the tensors of the first of these, again where most is to gain first; one for each grid.
        refit: of tensors whose grid does not fit, by how much the alpha MAD falls with the best step, most first; of
            blame.
        whole: alpha MAD that gains are of, everything quantized.
        findings: what costs most and what to try, the gravest first.
        wider: what has more bits than nominal.
        chosen: what passes/choose_bits.py reports; empty without a budget.
        setup: command, options, versions and clips of the compile.
        frames: the probe clip, [T,3,H,W].
    """

    passes: list[dict[str, Any]]
    closures: list[list[str]]
    tensors: list[Tensor]
    notes: list[str]
    blocks: list[Closure] = field(default_factory=list)
    loop: LoopError | None = None
    blame: list[Blame] = field(default_factory=list)
    tensor_blame: list[Blame] = field(default_factory=list)
    refit: dict[str, float] = field(default_factory=dict)
    whole: float = 0.0
    findings: list[Finding] = field(default_factory=list)
    wider: dict[str, str] = field(default_factory=dict)
    chosen: dict[str, Any] = field(default_factory=dict)
    setup: dict[str, Any] = field(default_factory=dict)
    frames: NDArray[np.uint8] = field(default_factory=lambda: np.zeros((0, 3, 1, 1), np.uint8))

    def to_json(self) -> dict[str, Any]:
        """The form that scripts rely on."""
        return {"passes": self.passes, "closures": self.closures, "tensors": [t.to_json() for t in self.tensors],
                "notes": self.notes, "findings": [asdict(f) for f in self.findings],
                "blocks": [asdict(b) for b in self.blocks], "loop": self.loop.to_json() if self.loop else None,
                "blame": [b.to_json() for b in self.blame], "tensor_blame": [b.to_json() for b in self.tensor_blame],
                "refit": self.refit, "whole": self.whole, "wider": self.wider, "chosen": self.chosen,
                "setup": self.setup}

    def lines(self, tensors: int = 20) -> list[str]:
        """The tables as text, with the worst `tensors` tensors."""
        lines = []
        for number, found in enumerate(self.findings, 1):
            lines += [f"{number}. {found.says}", f"   {found.hint}"]
        lines += ["", f"{'pass':<20}{'changes':>8}{'seconds':>9}{'alpha MAD':>11}"]
        for entry in self.passes:
            score = "" if entry["alpha_MAD"] is None else f"{entry['alpha_MAD']:.3f}"
            lines.append(f"{entry['name']:<20}{entry['modified']:>8}{entry['seconds']:>9.2f}{score:>11}")
        lines.append("alpha MAD: mean |alpha - float alpha| x 1e3 over the probe frames, closed loop, optimized (where "
                     "integer kernels come in, rounding moves it a little)")
        if self.chosen:
            lines += ["", *chosen_lines(self.chosen, {b.name: b.title for b in self.blocks})]
        lines += ["", f"recurrent closures: {len(self.closures)}"
                  + (f" of {', '.join(str(len(c)) for c in self.closures)} nodes" if self.closures else "")]
        if self.loop is not None and self.loop.states:
            shares = ", ".join(f"{name} {share:.0%}" for name, share in self.loop.through.items())
            lines.append(f"of the error over the clip, through states: {self.loop.through_all:.0%}; "
                         f"through each alone: {shares}")
        if self.blame:
            lines += ["", *_blame_lines(self)]
        lines += ["", f"{'SQNR dB':>8}{'own dB':>8}{'misfit':>8}  tensor (worst {min(tensors, len(self.tensors))} of "
                  f"{len(self.tensors)})"]
        for t in self.tensors[:tensors]:
            own = f"{min(t.own_db, 99.9):>8.1f}" if t.own_db is not None else " " * 8
            misfit = f"{t.misfit_db:>8.1f}" if t.misfit_db is not None else " " * 8
            lines.append(f"{min(t.sqnr_db, 99.9):>8.1f}{own}{misfit}  {t.name}")
        if self.tensors:
            lines.append("SQNR: all error up to here; own: what this tensor's quantizer alone adds; misfit: how far "
                         "that is above what the best range would add")
        if self.notes:
            lines += ["", *(f"note: {n}" for n in self.notes)]
        return lines


def _blame_lines(seen: Inspection) -> list[str]:
    titles = {b.name: b.title for b in seen.blocks}
    lines = [f"{gain:>16.3f}  {name}" for name, gain in seen.refit.items()]
    if lines:
        lines = [f"{'gain':>16}  tensor whose grid does not fit, with the best step", *lines, ""]
    for what, rows in (("closure", seen.blame), (f"tensor of {titles[seen.blame[0].name]}", seen.tensor_blame)):
        lines += [f"{'cost':>8}{'gain':>8}  {what}",
                  *(f"{b.cost:>8.3f}{b.gain:>8.3f}  {titles.get(b.name, b.name)}" for b in rows), ""]
    lines[-1] = "cost: alpha MAD with this alone quantized; gain: what the alpha MAD falls by with this alone in " \
        f"float, from {seen.whole:.3f}"
    return lines


def chosen_lines(report: Mapping[str, Any], titles: Mapping[str, str]) -> list[str]:
    """What passes/choose_bits.py reports, in words: a line on the whole, and a table of the closures."""
    closures, of = report["closures"], {"size": 1e6, "bops": 1e9}[report["of"]]
    unit = {"size": "MB", "bops": "GBOPs"}[report["of"]]
    widths = list(dict.fromkeys(w for c in closures for w in c["sensitivity"]))
    counts = ", ".join(f"{sum(c['bits'] == w for c in closures)} closures {w}" for w in widths)
    head = " ".join(f"{w:>8}" for w in widths)
    return [f"widths within {report['budget']}: {counts}; {report['cost'] / of:.3f} {unit}, W8A8 has "
            f"{report['W8A8'] / of:.3f}",
            f"{head}  chosen  closure",
            *(" ".join(f"{c['sensitivity'][w]:>8.3f}" if w in c["sensitivity"] else " " * 8 for w in widths)
              + f"  {c['bits']:<6}  {titles.get(c['name'], c['name'])}" for c in closures),
            "how far a closure alone at these widths moves alpha from that of W8A8, mean x 1e3, nothing learned"]


def said(value: Any) -> str:
    """A setting in words."""
    if isinstance(value, Mapping):
        return ", ".join(f"{k}={v}" for k, v in value.items()) or "none"
    return "default" if value is None else str(value)


def inspect_dump(folder: Path, progress: Callable[[str, float], None] = lambda _what, _share: None, *,
                 with_blame: bool = False, probe: Probe | None = None) -> Inspection:
    """Measure a dump that `--dump` wrote.

    Args:
        folder: the dump.
        progress: called with (what is being done, share done).
        with_blame: measure also what each closure costs: two runs of the probe frames for each, and one for each grid
            that does not fit.
        probe: another one than the dump's own, of the model's size.

    Raises:
        MediaError: the folder is missing, is no dump, or the compile did not finish.
    """
    pipeline = read_pipeline(folder)
    frames, first_alpha = read_probe(folder) if probe is None else probe
    some = frames[:SCORED_FRAMES]
    dumps = [(e["name"], folder / e["model"]) for e in pipeline["passes"] if e["model"]]
    names = [name for name, _ in dumps]
    floats = names.index(UNCALIBRATED) if UNCALIBRATED in names else len(names)
    float_path = dumps[floats - 1][1] if floats else folder / "00_input.onnx"
    reports = read_reports(folder, pipeline)
    ratio = reports.get("bind_shapes", {}).get("report", {}).get("downsample_ratio", 1.0)
    how: dict[str, Any] = {"downsample_ratio": ratio, "pairs": pipeline["options"]["pairs"], "first_alpha": first_alpha}
    want = np.stack(list(Session(float_path, **how).alphas(some)))
    scores: dict[str, float] = {}
    for index, (name, path) in enumerate(dumps):
        if name != UNCALIBRATED:
            got = np.stack(list(Session(path, **how).alphas(some)))
            scores[name] = float(np.abs(got - want).mean()) * 1e3
        progress("scoring the dumps", (index + 1) / len(dumps))
    passes = [{"name": e["name"], "modified": e["modified"], "seconds": e["seconds"],
               "alpha_MAD": scores.get(e["name"])} for e in pipeline["passes"]]
    parts = reports.get("find_closures", {}).get("report", {})
    named = [node for block in parts.get("blocks", []) for node in block["nodes"]]
    parts = {**parts, **reports.get("fold_resizes", {}).get("report", {}), "named": named}
    base = Inspection(
        passes, parts.get("closures", []), [], [f"{name}: {n}" for name, r in reports.items() for n in r["notes"]],
        wider=reports.get(UNCALIBRATED, {}).get("report", {}).get("wider", {}),
        chosen=reports.get("choose_bits", {}).get("report", {}), frames=frames,
        setup={key: pipeline.get(key) for key in ("command", "options", "versions", "clips")})
    if not names[floats + 1:] or not parts.get("blocks"):
        return base
    reference, quantized = Graph.load(float_path), Graph.load(dict(dumps).get(LOWERED, dumps[-1][1]))
    return _measured(base, parts, reference, quantized, dumps[floats + 1:], how, progress, with_blame)


def _measured(base: Inspection, parts: dict[str, Any], reference: Graph, quantized: Graph,
              dumps: Sequence[tuple[str, Path]], how: dict[str, Any], progress: Callable[[str, float], None],
              with_blame: bool) -> Inspection:
    """The inspection with all that is measured on the compiled model."""
    members = {b["name"]: b["nodes"] for b in parts["blocks"]}
    names = list(members)
    home = {node: names[index] for node, index in homes(quantized, list(members.values())).items()}
    some = base.frames[:SCORED_FRAMES]
    tensors = measure_tensors(reference, quantized, home, some, session=how,
                              progress=lambda share: progress("measuring tensors", share))
    loop = measure_loop(reference, quantized, base.frames, session=how,
                        progress=lambda share: progress("error over time", share))
    blocks = _closures(members, parts, reference, tensors)
    whole, rows, inner, better = 0.0, list[Blame](), list[Blame](), dict[str, float]()
    if with_blame:
        whole, rows = blame(quantized, reference, closure_quantizers(quantized, members), some, session=how,
                            progress=lambda share: progress("blame: closures", share))
        _, inner = blame(quantized, reference, tensor_quantizers(quantized, reference, members, rows[0].name), some,
                         session=how, progress=lambda share: progress("blame: tensors", share))
        better = refit(quantized, reference, {t.name: t.fit for t in unfit(tensors)[:REFITS] if t.fit}, some,
                       session=how, progress=lambda share: progress("blame: grids that do not fit", share))
    found = Inspection(**{**vars(base), "tensors": tensors, "blocks": blocks, "loop": loop, "blame": rows,
                          "tensor_blame": inner, "refit": better, "whole": whole})
    found.findings.extend(findings_of(found, dumps))
    return found


def _closures(members: dict[str, list[str]], parts: dict[str, Any], reference: Graph, tensors: Sequence[Tensor],
              ) -> list[Closure]:
    """The blocks with what they are made of, from the float graph and the tensors' rows."""
    reference.infer_shapes()
    own = {node: name for name, nodes in members.items() for node in nodes}
    nodes = {n.name: n for n in reference.nodes}
    named = set(parts["named"])
    shared = _common([n.name for n in reference.nodes if n.op in WEIGHTED and n.name in named])
    rows = {t.name: t for t in tensors}
    outputs = {v.name: v for v in reference.outputs}
    updates: dict[str, list[str]] = {name: [] for name in members}
    for state in parts.get("states", []):
        for producer in outputs[state["output"]].inputs if state["output"] in outputs else ():
            if producer.name in own:
                updates[own[producer.name]].append(state["input"])
    found = []
    for name, inside in members.items():
        here = [nodes[n] for n in inside if n in nodes]
        reads = {own[p.name] for n in here for v in n.inputs for p in v.inputs if own.get(p.name, name) != name}
        gives = [v for n in here for v in n.outputs
                 if v.name in outputs or any(own.get(r.name) != name for r in v.outputs)]
        measured = [rows[v.name] for v in gives if v.name in rows]
        widths = {kind: sorted({t.bits for t in tensors if t.closure == name and t.kind == kind and t.bits
                                and (kind == "activation" or _is_layer_weight(t.name, here))})
                  for kind in ("weight", "activation")}
        bits = " ".join(f"{letter}{'/'.join(map(str, widths[kind]))}" for letter, kind in
                        (("W", "weight"), ("A", "activation")) if widths[kind])
        shape = next((list(v.shape[1:]) for v in reversed(gives) if v.shape), [])
        layers = [n.name for n in here if n.op in WEIGHTED and n.name in named]
        found.append(Closure(name, _label(layers or inside, len(shared)), list(inside), layers, updates[name],
                             [m for m in members if m in reads], bits, shape,
                             _pooled([t.sqnr_db for t in measured])))
    return found


def _is_layer_weight(name: str, nodes: Sequence[Any]) -> bool:
    return any(n.op in WEIGHTED and any(v.name == name for v in n.inputs) for n in nodes)


def _pooled(values: Sequence[float]) -> float | None:
    """The ratio of tensors together, each with the same weight: of the mean of noise to signal."""
    if not values:
        return None
    return decibels(1.0, float(np.mean([10.0 ** (-v / 10.0) for v in values])))


def _label(names: Sequence[str], skip: int) -> str:
    """What names of nodes have in common, as parts of a path without the first `skip`, or the operator at its end."""
    common = _common(names)
    if len(names) == 1 and len(common) > 1:
        common.pop()
    return "/".join(common[skip:])


def _common(names: Sequence[str]) -> list[str]:
    """The parts of a path that all names begin with."""
    common = []
    for parts in zip(*(n.strip("/").split("/") for n in names), strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return common
