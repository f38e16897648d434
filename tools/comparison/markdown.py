"""How it is shown: the tables as Markdown, from what is kept."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
from collections.abc import Iterator, Sequence
from datetime import date

from comparison import rows
from comparison.bench import Bench
from comparison.rows import Job, Row, Table
from vmq.bench import processor
from vmq.cost import saving
from vmq.spec import Bits

MEASURES = ("MAD", "MSE", "Grad", "Conn", "dtSSD", "F")
CAPTION = """\
Means over the clips; with several seeds ± the standard deviation over them. MAD, MSE x 1e3; Grad, Conn in thousands;
dtSSD x 1e2, the first frame of each clip counted as 0 as in the paper; F of alpha over 0.5, higher is better. to FP32:
MAD x 1e3 to the float network's mattes. Minutes (the least of the seeds, as a shared machine can only add some) and
peak memory (MiB, the largest of the seeds) are of `vmq compile`; ≥: of the part after an interruption. What stayed
above nominal bits stands under each table."""
SIZE_CAPTION = """\
GFLOPs as in the paper: multiply-adds of one frame, divided by the mean of 32/weight bits and 32/activation bits, at
nominal bits. MB (1e6 bytes): the file. x MAD, x dtSSD: as multiples of FP32's."""


def render(bench: Bench) -> str:
    """All tables, from what is kept."""
    lines = [f"# {bench.model.stem}, compared on {bench.main}", "", *CAPTION.splitlines()]
    for table in rows.TABLES:
        caption = [*(SIZE_CAPTION.splitlines() if table.size else []), *table.note.splitlines()]
        lines += ["", f"## {table.title}", "", *([*caption, ""] if caption else [])]
        missing: list[str] = []
        known = list(_lines(bench, table, missing))
        lines += markdown(_head(table), known) if known else []
        below = _above_nominal(bench, table) + ([f"- Not computed yet: {'; '.join(missing)}"] if missing else [])
        lines += [*([""] if known else []), *below] if below else []
    return "\n".join([*lines, "", _footer(bench)]) + "\n"


def _head(table: Table) -> list[str]:
    return ["", "effort", "seeds", *(["frames"] if table.frames else []),
            *(["GFLOPs", "MB"] if table.size else []), *MEASURES, "to FP32",
            *(["x MAD", "x dtSSD"] if table.ratio else []), "minutes", "MiB"]


def _lines(bench: Bench, table: Table, missing: list[str]) -> Iterator[list[str]]:
    """The lines of a table; what nothing is known of goes to `missing`."""
    for row in table.rows:
        for label in bench.sets(row):
            shown = row.label if label == bench.main else f"{row.label} on {label}"
            for effort in rows.SEEDS if row.recipe else ("-",):
                jobs: dict[int, Job | None] = {0: None}
                if row.recipe:
                    jobs = {seed: bench.job(row, effort, seed) for seed in rows.SEEDS[effort]}
                if not any(bench.scored(job, label) or (job and "error" in (bench.compiled(job) or {}))
                           for job in jobs.values()):
                    missing.append(f"{shown} {effort}" if row.recipe else shown)
                    continue
                yield _line(bench, table, row, shown, effort, list(jobs.values()), label)
                for seed, job in jobs.items():
                    for record in (bench.compiled(job) if job else None, bench.scored(job, label)):
                        if record and "error" in record:
                            yield _error(table, [shown, effort, f"seed {seed}" if job else "-"], record["error"])


def _line(bench: Bench, table: Table, row: Row, shown: str, effort: str, jobs: Sequence[Job | None], label: str,
          ) -> list[str]:
    made = [r for job in jobs if job and (r := bench.compiled(job)) and "error" not in r]
    scores = [r for job in jobs if (r := bench.scored(job, label)) and "error" not in r]
    means = [s["mean"] for s in scores if s["mean"]]
    old = " (old)" if any(r.get("old") for r in (*made, *scores)) else ""
    cells = [shown + old, effort, f"{len(scores)}" if row.recipe and scores else "-"]
    if table.frames:
        cells.append("{} of {}".format(*made[0]["compile"]["frames"]) if made else "-")
    if table.size:
        adds = bench.multiply_adds(compute=False)
        bits = Bits.parse(row.bits) if row.recipe else None
        smaller = 1.0 if bits is None else saving(bits.weights, bits.activations)
        sizes = [r["compile"]["size_bytes"] for r in made] if row.recipe else [bench.model.stat().st_size]
        cells += [f"{adds / smaller / 1e9:.2f}" if adds else "-", _mean([s / 1e6 for s in sizes], spread=False)]
    cells += [_mean([m[name] for m in means], digits=3 if name == "F" else 2) for name in MEASURES]
    cells.append(_mean([s["fidelity"]["MAD"] for s in scores]) if row.recipe else "-")
    if table.ratio:
        base = (bench.scored(None, label) or {}).get("mean") or {}
        cells += [_mean([m[name] / base[name] for m in means if base.get(name)]) for name in ("MAD", "dtSSD")]
    whole = [r for r in made if not r["resumed"]]
    least = min((r["seconds"] / 60 for r in whole or made), default=0.0)
    cells += [f"{'' if whole else '≥ '}{least:.1f}" if made else "-",
              f"{max(r['peak'] for r in made):.0f}" if made else "-"]
    return cells


def _error(table: Table, cells: list[str], error: str) -> list[str]:
    cells = [*cells, *[""] * (table.frames + 2 * table.size), f"error: {' '.join(error.split())}"]
    return cells + [""] * (len(_head(table)) - len(cells))


def _mean(values: Sequence[float], digits: int = 2, *, spread: bool = True) -> str:
    if not values:
        return "-"
    text = f"{statistics.fmean(values):.{digits}f}"
    return f"{text} ± {statistics.stdev(values):.{digits}f}" if spread and len(values) > 1 else text


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 2) -> list[str]:
    """A table of which the first `left` columns are words, the others numbers."""
    lines = [f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |" for cells in (head, *rows)]
    return [lines[0], f"|{'---|' * left}{'---:|' * (len(head) - left)}", *lines[1:]]


def _above_nominal(bench: Bench, table: Table) -> list[str]:
    """What stayed above nominal bits, said once for all rows that agree."""
    groups: dict[str, dict[str, None]] = {}
    for row in (row for row in table.rows if row.recipe and bench.sets(row)):
        for job in (bench.job(row, effort, seed) for effort, seeds in rows.SEEDS.items() for seed in seeds):
            record = bench.compiled(job)
            if record and "error" not in record:
                wider = record["compile"]["passes"]["insert_qdq"]["report"]["wider"]
                text = ", ".join(f"{name} {bits}" for name, bits in wider.items()) or "nothing"
                groups.setdefault(f"Above {Bits.parse(row.bits)}: {text}", {})[row.shown] = None
    return [f"- {text} ({'; '.join(labels)})" for text, labels in groups.items()]


def _footer(bench: Bench) -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("vmq", "onnxruntime", "torch"))
    return (f"{date.today().isoformat()}; {processor()}, {cores} cores; {versions}, Python "
            f"{platform.python_version()}; source {bench.source[:12]}, model {bench.sha[:12]}.")
