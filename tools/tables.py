"""Compare recipes, bit widths and calibration footage: compile, score, and write the tables as Markdown.

What is computed is kept in --work, so a run that was stopped continues. tools/comparison/ holds the parts: rows.py says
what is compared, footage.py makes what it is scored on, bench.py computes and keeps, markdown.py shows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from comparison import rows
from comparison.bench import Bench
from comparison.footage import Footage, Given, first_frames
from comparison.markdown import render
from comparison.rows import ROOT, Job, Row

from vmq.errors import OptionError, VmqError
from vmq.files import write_atomic
from vmq.spec import Bits

SHARED = ROOT.parent / "shared" / "data"
UNLABELLED = ("doctor_typing", "woman_plants", "football_juggle", "stage_singer")
CLIPS = ("thoughtful_outdoor", "woman_road", "man_selfie_indoor", "mdn_selfie_lime")

# ------------------------------------------------------------------------------------------------ what to compute


def selection(bench: Bench, chosen: Sequence[Row], efforts: Sequence[str], seeds: Sequence[int] | None,
              ) -> dict[Job | None, list[str]]:
    """What each compiled model is to be scored on: the float network, then fast before standard, seed by seed."""
    found: dict[Job | None, dict[str, None]] = {}
    for row in (row for row in chosen if row.recipe is None):
        found.setdefault(None, {}).update(dict.fromkeys(bench.sets(row)))
    pairs = [(e, s) for e in rows.SEEDS if e in efforts for s in rows.SEEDS[e] if seeds is None or s in seeds]
    for effort, seed in pairs:
        for row in (row for row in chosen if row.recipe is not None):
            if labels := bench.sets(row):
                found.setdefault(bench.job(row, effort, seed), {}).update(dict.fromkeys(labels))
    return {job: list(labels) for job, labels in found.items()}


def choose(tables: Sequence[rows.Table], words: Sequence[str] | None) -> list[Row]:
    """The rows of the tables whose labels hold one of the words, and the float network's; all without words."""
    found = [row for table in tables for row in table.rows]
    if words is None:
        return found
    kept = [row for row in found if any(word.lower() in row.shown.lower() for word in words)]
    if not kept:
        raise OptionError(f"--rows {' '.join(words)}: no row is called so; there are "
                          f"{', '.join(dict.fromkeys(row.shown for row in found))}")
    beside = {(row.on, row.size) for row in kept}
    return [row for row in found if row in kept or (row.recipe is None and (row.on, row.size) in beside)]


def plan(bench: Bench, chosen: Mapping[Job | None, Sequence[str]]) -> list[str]:
    """What would be computed, a line each, and how long that took the last time."""
    lines, total, unknown = [], 0.0, 0
    for job, labels in chosen.items():
        lost, unscored = bench.missing(job, labels)
        for label in ([None] if lost else []) + unscored:
            seconds = bench.last_time(job, label)
            total, unknown = total + (seconds or 0.0), unknown + (seconds is None)
            took = "not done before" if seconds is None else f"{seconds / 60:.1f} min last time"
            lines.append(f"{_what(job, label)}: {took}")
    if not lines:
        return ["nothing to compute: everything chosen is kept"]
    return [*lines, f"{len(lines)} to compute: {total / 60:.1f} min, and {unknown} of unknown length"]


def compute(bench: Bench, chosen: Mapping[Job | None, Sequence[str]], after: Callable[[], None]) -> None:
    """Compute what is missing, one thing after the other; `after` is called after each.

    What is missing is looked up as late as possible: another run into the same folder may have computed it.
    """
    jobs = list(chosen.items())
    for index, (job, labels) in enumerate(jobs):
        lost, unscored = bench.missing(job, labels)
        for label in ([None] if lost else []) + unscored:
            count = sum(lost + len(unscored) for lost, unscored in (bench.missing(*rest) for rest in jobs[index:]))
            seconds = bench.last_time(job, label)
            took = "" if seconds is None else f", {seconds / 60:.1f} min last time"
            _say(f"{_what(job, label)} ({count} to go{took})")
            error = bench.compile(job) if job and label is None else bench.evaluate(job, str(label))
            if error:
                _say(f"error: {error}")
            after()
            if error:
                break


def _what(job: Job | None, label: str | None) -> str:
    name = "FP32" if job is None else (f"{job.recipe} {Bits.parse(job.bits)} {job.effort}, seed {job.seed}, "
                                       f"on {job.footage}{f' at {job.size}' if job.size else ''}")
    return f"compile {name}" if label is None else f"score {name} against {label}"


def _say(text: str) -> None:
    print(f"tables: {text}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------- command line


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    try:
        tables = [table for table in rows.TABLES if not args.only or table.name in args.only]
        work = args.work.resolve()
        evals = _labelled(args.eval or [SHARED / "vm-mini" / "eval"])
        stills = args.stills or [SHARED / "stills" if (SHARED / "stills").exists() else next(iter(evals.values()))]
        bench = Bench(args.model.resolve(), _footage(args, work / "footage"), evals, work, args.keep_old,
                      args.dynamic and args.dynamic.resolve(), stills, _present(args.clips, CLIPS))
        wanted = choose(tables, args.rows)
        chosen = selection(bench, wanted, args.effort, args.seeds)
        if bench.dynamic is None and any(row.size for row in wanted):
            _say("other sizes are left out: name the network with free sizes with --dynamic")
        if args.plan:
            print("\n".join(plan(bench, chosen)))
            return 0
        output = args.output or args.work / "tables.md"
        output.parent.mkdir(parents=True, exist_ok=True)
        compute(bench, chosen, lambda: write_atomic(output, render(bench).encode()))
        # Last, because a child's peak memory counts what its parent held when it was started.
        bench.multiply_adds(compute=any(table.size for table in tables))
        text = render(bench)
        write_atomic(output, text.encode())
        print(text, end="")
        _say(f"wrote {output}")
    except (VmqError, OSError) as error:
        _say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        _say("interrupted; the same command continues")
        return 130
    return 0


def _footage(args: argparse.Namespace, folder: Path) -> dict[str, Footage]:
    """What is calibrated on, by its kind; a kind that there is nothing of is left out."""
    calib = Given(args.calib)
    found: dict[str, Footage] = {"calib": calib}
    if unlabelled := _present(args.unlabelled, UNLABELLED):
        found["unlabelled"] = Given(unlabelled)
    for kind in {row.footage for table in rows.TABLES for row in table.rows if row.footage.startswith("calib-")}:
        found[kind] = first_frames(calib, int(kind.removeprefix("calib-")), folder)
    return found


def _present(given: Sequence[Path] | None, names: Sequence[str]) -> list[Path]:
    """What was given, else those of the development clips that are there."""
    paths = [SHARED / "clips" / f"{name}.mp4" for name in names]
    return [p for p in paths if p.exists()] if given is None else list(given)


def _labelled(paths: Sequence[Path]) -> dict[str, Path]:
    """Sets by what tables call them: the folder's name, with its parent's where two have the same."""
    found = [p.resolve() for p in paths]
    names = [p.name for p in found]
    return {p.name if names.count(p.name) == 1 else f"{p.parent.name}/{p.name}": p for p in found}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tables", description=(__doc__ or "").partition("\n\n")[0])
    add = parser.add_argument
    add("--model", type=Path, default=Path("rvm.onnx"), help="the float network (default: rvm.onnx here)")
    add("--calib", type=Path, nargs="+", default=[SHARED / "vm-mini" / "calib"], metavar="PATH",
        help="footage with alpha to calibrate on (default: the development data)")
    add("--unlabelled", type=Path, nargs="+", metavar="PATH", help="footage without alpha to calibrate on")
    add("--eval", type=Path, action="append", metavar="DIR",
        help="what is scored on; a second and further ones count as what calibration never saw")
    add("--dynamic", type=Path, metavar="FILE",
        help="the same network with free sizes, for the table of sizes (default: --model, if its sizes are free)")
    add("--stills", type=Path, nargs="+", metavar="PATH",
        help="pictures with alpha, or clips with alpha whose first frames are taken, to be moved (default: the "
             "development data, else --eval)")
    add("--clips", type=Path, nargs="+", metavar="PATH", help="footage without alpha to score on")
    add("--work", type=Path, default=ROOT / "out" / "tables", metavar="DIR",
        help="where results and compiled models are kept (default: out/tables)")
    add("--only", nargs="+", choices=[table.name for table in rows.TABLES], metavar="NAME",
        help=f"tables to compute: {', '.join(table.name for table in rows.TABLES)}; the others show what is kept")
    add("--rows", nargs="+", metavar="WORD",
        help="of these tables, compute only rows whose name holds one of the words (270 for 480x270)")
    add("--effort", nargs="+", choices=list(rows.SEEDS), default=list(rows.SEEDS), help="efforts to compute")
    add("--seeds", nargs="+", type=int, metavar="N", help="seeds to compute")
    add("--keep-old", action="store_true", help="accept results of other code or options, and mark them")
    add("--plan", action="store_true", help="only say what would be computed, and how long it took last time")
    add("-o", "--output", type=Path, metavar="FILE", help="default: tables.md in --work")
    return parser


if __name__ == "__main__":
    sys.exit(main())
