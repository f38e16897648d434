"""What the documentation says is so: commands parse and run, links resolve, every pass has its page and its example.

Commands are the indented blocks and the ```sh blocks of README.md and docs/. Those of one document are one story:
they run in order, in one folder, on a network of a few thousand multiply-adds and clips of a few frames that bear the
names the document uses; what one command writes the next one reads. What cannot run here stands in NOT_RUN, with the
test that does run it or the reason. A command that nothing here knows fails. Arguments of tools/ are parsed, also where
a sentence names them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import cv2
import numpy as np
import pytest
from compiling import SIZE, network
from onnx_text import load

import vmq.cli
import vmq.compiler
from passes import PIPELINE
from vmq.pipeline import Context, PassResult, run_passes
from vmq.recipe import Recipe
from vmq.spec import EFFORTS, Bits, Budget, Effort, Options
from vmq.synthetic import synthetic_clips
from vmq.text import diff_graphs, format_graph
from vmq.writer import open_writer

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
PASS_PAGES = {path.stem: path for path in PAGES if path.parent.name == "passes"}

NOT_RUN = {
    r"vmq fetch ": "needs the network; tests/test_fetch.py",
    r"torchrun ": "tests/test_processes.py::test_killed_and_resumed_two_processes_write_what_one_writes",
    r"vmq bench ": "takes a quiet machine; tests/test_bench.py",
    r"vmq run \S+ \d ": "needs a camera",
    r"vmq run \S+ \S+ --first-alpha ": "tests/test_first_alpha.py::test_run_is_told_by_a_picture_or_by_the_footage",
    r"python -m models\.rvm ": "needs weights; tests/test_rvm.py",
    r"python -m models\.modnet ": "needs weights; tests/test_modnet.py",
    r"python -m models\.matanyone ": "needs a package and weights; tests/test_matanyone.py",
    r"python3 \S*matte\.py ": "tests/test_examples.py::test_python",
    r"node \S*matte\.mjs ": "tests/test_examples.py::test_javascript",
    r"(g\+\+ .*matte\.cc|\./matte) ": "tests/test_examples.py::test_cpp",
    r"npm install ": "tests/test_examples.py::test_javascript",
    r"tools/check_(qnn|openvino|arm) ": "downloads its own environment; tests/test_check_targets.py runs the parts",
    r"tools/web( |$)": "tests/test_web.py::test_alpha_is_that_of_python",
    r"python3 -m http\.server ": "serves until it is stopped; tests/test_web.py serves the page",
    r"ffmpeg ": "a program of its own; the examples are tested on the frames that it would write",
    r"(pip|python3? -m pip) install ": "needs the network; tools/environment installs in every CI run",
    r"(sudo )?apt(-get)? install ": "needs the network and root",
    r"(python3 -m venv|\.) \.venv": "as tools/environment does in every CI run",
}
"""Commands by how they begin, as a regular expression: the test that runs them, or why none does."""

FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[str, str]]:
    """(info string, content) of the fenced blocks of a page, in order."""
    return FENCE.findall(page.read_text(encoding="utf-8"))


def commands(page: Path) -> list[str]:
    """The commands of a page, in order, continued lines joined, without comments."""
    text = re.sub(r"^```sh\n(.*?)^```$", lambda m: re.sub("^", "    ", m[1], flags=re.MULTILINE),
                  page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    text = FENCE.sub("", text).replace("\\\n", "")
    lines = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    return [line for whole in lines if (line := re.sub(r"\s+#\s.*$", "", whole)) and not line.startswith("#")]


def test_commands_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("Text\n\n    vmq passes   # all\n    vmq run a.onnx b \\\n        -o c\n\n```sh\n# say\nls x\n```\n"
                    "\n```python\n    indented = 1\n```\n")
    assert commands(page) == ["vmq passes", "vmq run a.onnx b         -o c", "ls x"]


# --------------------------------------------------------------------------------------------- commands


@pytest.mark.parametrize("page", [p for p in PAGES if commands(p)], ids=lambda p: str(p.relative_to(ROOT)))
def test_commands(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: Path,
                  capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(vmq.compiler, "EFFORTS", MappingProxyType({name: dataclasses.replace(
        QUICK, name=name) for name in EFFORTS}))
    for command in commands(page):
        for part in re.split(r" && | \| ", command):
            words = shlex.split(re.sub(r"\s[<>]\s*\S+", "", part))
            if words[0] == "vmq":
                vmq.cli._parser().parse_args(words[1:])          # exits, and so fails, if it does not parse
            elif words[0].startswith("tools/"):
                _parse(words)
            if not (reason := _not_run(part)):
                _run(words, compiled, capsys)
            elif test := re.match(r"(tests/\w+\.py)(?:::(\w+))?", reason):
                assert f"def {test[2] or 'test_'}" in (ROOT / test[1]).read_text(encoding="utf-8")


SENTENCES = sorted({" ".join(words.split()) for page in PAGES for words in re.findall(
    r"`(tools/\w+\s[^`]+)`", FENCE.sub("", page.read_text(encoding="utf-8")))})


@pytest.mark.parametrize("command", SENTENCES)
def test_tools_in_sentences(command: str) -> None:
    _parse(shlex.split(command))


def test_an_option_that_a_tool_does_not_have_fails(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["tools/check_qnn", "a.onnx", "--cpu", "max"], ["tools/networks", "--calibration", "b/"],
                  ["tools/check_versions", "--ends", "middle"], ["tools/pictures", "a.onnx"]):
        with pytest.raises(SystemExit):
            _parse(words)
        assert "error: " in capsys.readouterr().err
    for words in (["tools/check_versions", "-k", "states"], ["tools/kill_test", "a.onnx", "--bits", "4"]):
        _parse(words)                                            # the rest goes to pytest, and to vmq compile


def _parse(words: list[str]) -> None:
    """Start a program of tools/ on its arguments, up to where it has parsed them; exits, and so fails, if it cannot."""
    wrapper = ROOT / words[0]
    assert wrapper.stat().st_mode & 0o100, f"{words[0]} is no program"
    runs = re.search(r'(tools/\w+\.py)"?((?: \w+)*) "\$@"$', wrapper.read_text(encoding="utf-8"), re.MULTILINE)
    if runs is None:
        return                                                   # written in bash, without options

    class Parsed(BaseException):
        pass

    def ending(parse: Callable[..., object]) -> Callable[..., NoReturn]:
        def parse_and_end(*args: object) -> NoReturn:
            for name, method in methods.items():                 # one calls the other
                patch.setattr(argparse.ArgumentParser, name, method)
            parse(*args)
            raise Parsed

        return parse_and_end

    methods = {name: getattr(argparse.ArgumentParser, name) for name in ("parse_args", "parse_known_args")}
    with pytest.MonkeyPatch.context() as patch:
        for name, method in methods.items():
            patch.setattr(argparse.ArgumentParser, name, ending(method))
        patch.setattr(sys, "argv", [words[0], *runs[2].split(), *words[1:]])
        patch.setattr(sys, "path", [str(ROOT / "tools"), *sys.path])
        with pytest.raises(Parsed):
            runpy.run_path(str(ROOT / runs[1]), run_name="__main__")


def _not_run(command: str) -> str:
    """Why a command is not run, or nothing if it is; fails for one that is unknown."""
    found = [reason for start, reason in NOT_RUN.items() if re.match(start, f"{command} ")]
    if not found and command.split()[0] not in {"vmq", "cd"} and not command.startswith("tools/"):
        pytest.fail(f"nobody has said how `{command}` is tested: see NOT_RUN in {__file__}")
    if not found and command.startswith("tools/"):
        return "what the checks, or a developer, run as a whole"
    return found[0] if found else ""


def _run(words: list[str], compiled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if words[0] == "cd":
        return
    words = [w for i, w in enumerate(words[1:]) if "--size" not in (w, words[i]) and "--downsample-ratio" not in (
        w, words[i])]                                            # the tiny network has a size of its own
    for before, word in zip(["", *words], words, strict=False):
        if before not in {"-o", "--output", "--dump", "--html"} and not word.startswith("-"):
            _provide(word, compiled)
    assert vmq.cli.main([*words, *(["-q"] if words[0] not in {"passes"} else [])]) == 0, capsys.readouterr().err


def _provide(word: str, compiled: Path) -> None:
    """Make what a word of a command names as an input, if it is a file or folder that is not there yet."""
    path = Path(word)
    if path.exists():
        return
    frames = list(synthetic_clips(SIZE, count=1, frames=3, seed=5)[0].frames())
    alpha = synthetic_clips(SIZE, count=1, frames=3, seed=5)[0].alpha()
    if word.endswith("/") and "dump" not in word:
        for name, pictures in (("com", frames), ("pha", alpha)):
            (path / "clip").mkdir(parents=True, exist_ok=True)
            with open_writer(path / "clip" / name, 25, SIZE) as writer:
                for picture in pictures or ():
                    writer.write(picture)
    elif path.suffix in {".mp4", ".mov"}:
        with open_writer(path, 25, SIZE) as writer:
            for frame in frames:
                writer.write(frame)
    elif path.suffix in {".jpg", ".png"}:
        cv2.imwrite(str(path), np.ascontiguousarray(frames[0].transpose(1, 2, 0)))
    elif path.suffix == ".toml":
        shutil.copy(ROOT / "vmq" / "recipes" / "mse.toml", path)
    elif re.search(r"_w\da\d", path.stem):
        shutil.copy(compiled, path)
    elif path.suffix == ".onnx":
        network().save(path)


QUICK = Effort("quick", calibration=4, bias_frames=2, sequences=2, frames=2, block_iterations=2, block_batch=1,
               steps=2, batch=1, unrolled=1, gates=1, loop_frames=2)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compiled") / "model.onnx"
    vmq.compile(network(), bits="w4a8", recipe="mse", effort="fast", output=path)
    return path


@pytest.mark.parametrize(("page", "number"), [(p, i) for p in PAGES for i, (info, _) in enumerate(blocks(p))
                                              if info == "python"],
                         ids=lambda v: str(v.relative_to(ROOT)) if isinstance(v, Path) else str(v))
def test_python_blocks(page: Path, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                       compiled: Path) -> None:
    code = blocks(page)[number][1]
    body = compile(code, f"{page.name}, block {number}", "exec")
    if "import vmq" not in code and "from vmq" not in code:
        return                                                    # a fragment: what it loops over is the reader's
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(vmq.compiler, "EFFORTS", MappingProxyType(dict.fromkeys(EFFORTS, QUICK)))
    for name in re.findall(r'"([\w./]+(?:\.\w+|/))"', code):
        if "output" not in code.split(name, maxsplit=1)[0].splitlines()[-1].rpartition("=")[0][-8:]:
            _provide(name, compiled)
    exec(body, {"__name__": "__main__"})


# ---------------------------------------------------------------------------------------- links and pages


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), f"{page.relative_to(ROOT)} links to {target}, which is not there"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor in slugs, f"{page.relative_to(ROOT)} links to {target}, a heading that is not there"


def test_every_page_is_linked() -> None:
    linked = {(page.parent / target.partition("#")[0]).resolve() for page in PAGES
              for target in re.findall(r"\]\(([^)\s:]+)\)", page.read_text(encoding="utf-8"))}
    assert [str(p.relative_to(ROOT)) for p in PAGES[1:] if p not in linked and p.name != "README.md"] == []


def test_every_pass_has_its_page() -> None:
    assert sorted(PASS_PAGES) == sorted(step.name for step in PIPELINE)


@pytest.mark.parametrize("name", sorted(PASS_PAGES))
def test_page_of_a_pass(name: str) -> None:
    """The example of a page, an ```onnx block, and what the pass does with it, a ```diff or a ```json block."""
    text = PASS_PAGES[name].read_text(encoding="utf-8")
    assert text.startswith(f"# {name}\n")
    found = {info.split()[0]: (info, content) for info, content in blocks(PASS_PAGES[name]) if info}
    assert "onnx" in found, "an ```onnx block is missing"
    difference, result = example(name, *found["onnx"])
    if name in LEARNS:
        pass
    elif "diff" in found:
        assert _masked(found["diff"][1]) == _masked(difference), f"the pass does this now:\n{difference}"
    else:
        assert difference == ""
    if "json" in found:
        said = json.loads(found["json"][1])
        assert _keys(said) == _keys(json.loads(json.dumps(result.report))), result.report


LEARNS = {"reconstruct_blocks", "calibrate_network"}
"""Passes whose changes differ from processor to processor: of their examples only the report is compared."""


def example(name: str, info: str, text: str) -> tuple[str, PassResult]:
    """The lines that a pass changes in an example, and its result.

    Args:
        name: of the pass.
        info: words behind ```onnx: opset=17, bits=4, recipe=vmq, size=48x32, state=uint8, budget=80%,
            equalize.
        text: the network, in the ONNX text form.
    """
    words = dict(word.partition("=")[::2] for word in info.split()[1:])
    recipe = dataclasses.replace(Recipe.load(words.get("recipe", "mse")), equalize="equalize" in words)
    options = Options(bits=Bits.parse(words.get("bits", "8")), recipe=recipe, effort=QUICK,
                      size=vmq.compiler.parse_size(words.get("size")), state=words.get("state", "float32"),
                      budget=Budget.parse(words["budget"]) if "budget" in words else None)
    graph = load(text, int(words.get("opset", "21")))
    index = [step.name for step in PIPELINE].index(name)
    context = Context(options, synthetic_clips(SIZE, count=1, frames=4, seed=5))
    run_passes(graph, PIPELINE[:index], context)
    before = format_graph(graph)
    result = run_passes(graph, [PIPELINE[index]], context)[0]
    lines = diff_graphs(before, format_graph(graph)).splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith(("---", "+++", "@@"))), result


def _masked(difference: str) -> str:
    """A difference without what calibration computes: long fractions, hashes, int32 values, zero points but 0."""
    without = re.sub(r"-?\d+\.\d{4,}(e-?\d+)?|(?<=#)[0-9a-f]{12}|(?<=uint[48]\[\]\{)[1-9]\d*", "…", difference)
    return re.sub(r"(int32\[\d+\])\{[-\d, ]+\}", r"\1{…}", without).strip()


def _keys(value: Any) -> Any:
    """The shape of a JSON value: keys and types."""
    if isinstance(value, dict):
        return {key: _keys(inner) for key, inner in value.items()}
    return [_keys(inner) for inner in value[:1]] if isinstance(value, list) else type(value) in {int, float} or type(
        value)


@pytest.fixture(autouse=True)
def _quiet_threads() -> Iterator[None]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
