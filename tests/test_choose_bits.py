"""Mixed precision: the best choice, budgets that are kept, a sensitive closure that is found out."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compiling import clips, network, run_to
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_matting import save_pictures
from tiny_recurrent import read

import vmq
from passes.choose_bits import best_choice
from vmq.checkpoint import Checkpoint
from vmq.cli import main
from vmq.cost import cost_of
from vmq.errors import OptionError
from vmq.graph import Graph
from vmq.report import inspect_dump
from vmq.spec import Bits, Budget

pytestmark = pytest.mark.usefixtures("one_thread")

# Three closures of one layer of the same size, and one at each end.
CHAIN = """(float[1,3,32,48] src, float[8,3,1,1] w0, float[8,8,1,1] w1, float[8,8,1,1] w2, float[8,8,1,1] w3,
            float[1,8,1,1] w4) => (float[1,1,32,48] pha) {
    a = Conv (src, w0)
    ra = Relu (a)
    b = Conv (ra, w1)
    rb = Relu (b)
    c = Conv (rb, w2)
    rc = Relu (c)
    d = Conv (rc, w3)
    rd = Relu (d)
    p = Conv (rd, w4)
    pha = Sigmoid (p)
}"""


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[list[int]], list[list[int]], int]:
    """Errors and costs of up to three options of up to five closures, and a limit."""
    counts = draw(st.lists(st.integers(1, 3), min_size=1, max_size=5))
    errors = [draw(st.lists(st.integers(0, 999), min_size=n, max_size=n)) for n in counts]
    costs = [draw(st.lists(st.integers(-500, 0), min_size=n, max_size=n)) for n in counts]
    return errors, costs, draw(st.integers(-2600, 100))


@given(problems())
@settings(max_examples=150)
def test_no_choice_is_better(problem: tuple[list[list[int]], list[list[int]], int]) -> None:
    errors, costs, limit = problem
    every = [(sum(e[k] for e, k in zip(errors, picks, strict=True)), sum(c[k] for c, k in zip(costs, picks,
                                                                                              strict=True)))
             for picks in itertools.product(*(range(len(row)) for row in errors))]
    best = min((error for error, cost in every if cost <= limit), default=None)
    found = best_choice(errors, costs, limit)
    if best is None:
        assert found is None
    else:
        assert found is not None
        assert sum(c[k] for c, k in zip(costs, found, strict=True)) <= limit
        assert sum(e[k] for e, k in zip(errors, found, strict=True)) == best


@pytest.mark.parametrize(("text", "of", "limit"), [
    ("2.6MB", "size", 2.6e6), ("800 kb", "size", 8e5), ("123456B", "size", 123456.0), (" 1GB", "size", 1e9),
    ("40GBOPs", "bops", 4e10), ("1.5tbops", "bops", 1.5e12), ("7BOPs", "bops", 7.0), ("50%", "bops", 500.0),
    ("99.5 %", "bops", 995.0), (".5%", "bops", 5.0)])
def test_budgets(text: str, of: str, limit: float) -> None:
    budget = Budget.parse(text)
    assert (budget.of, budget.text) == (of, text)
    assert budget.limit(1000.0) == pytest.approx(limit, rel=1e-12)


@pytest.mark.parametrize("text", ["", "2.6", "MB", "-1MB", "0MB", "1e6B", "100%", "5M%", "2MiB", "half", "1.2.3MB"])
def test_what_is_no_budget(text: str) -> None:
    with pytest.raises(OptionError, match=r"--budget .* is not known; give a file size such as 2\.6MB"):
        Budget.parse(text)


@given(st.integers(1, 10**13), st.integers(1, 10**13), st.sampled_from(["1MB", "1BOPs", "1%"]))
def test_what_a_budget_says_is_enough(cost: int, more: int, text: str) -> None:
    budget = Budget.parse(text)
    said = budget.says(cost, cost + more)
    if said != "100%":
        again = Budget.parse(said)
        assert again.of == budget.of
        assert again.limit(cost + more) >= cost * (1 - 1e-12)


@pytest.mark.parametrize(("options", "says"), [
    (["--bits", "auto"], "--bits auto needs a --budget: a file size such as 2.6MB"),
    (["--budget", "2MB"], "--budget 2MB is for --bits auto, not --bits 8"),
    (["--bits", "w4a8", "--budget", "2MB"], "--budget 2MB is for --bits auto, not --bits w4a8"),
    (["--bits", "auto", "--budget", "two"], "--budget two is not known"),
    (["--bits", "automatic"], "--bits automatic is not known; give 8, 4, w4a8, w8a4, or auto with a --budget")])
def test_options_that_do_not_go_together(options: list[str], says: str, tmp_path: Path,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    network().save(tmp_path / "net.onnx")
    assert main(["compile", str(tmp_path / "net.onnx"), "-q", *options]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"vmq: error: {says}")
    assert said.count("\n") == 1


def chain(sensitive: int = 0) -> Graph:
    """The chain with weights that 4 bits hold exactly, but those of one layer.

    In that one there is a large weight for a channel that is always 0: it decides the scale, and that rounds the
    others to 0 at 4 bits.
    """
    graph, rng = read(CHAIN), np.random.default_rng(4)
    for k in range(5):
        weight = graph.value(f"w{k}")
        values = rng.integers(-7, 8, weight.shape) * 0.12
        values[:, 0] = 0.84
        if k < 4:
            values[7] = 0.0
        if k == sensitive > 0:
            values[:7, 7] = 21.0
        weight.values = values.astype(np.float32)
    return graph


@pytest.mark.parametrize("sensitive", [1, 3])
def test_a_sensitive_closure_stays_at_8_bits(sensitive: int) -> None:
    graph = chain(sensitive)
    context = run_to("expose_states", graph, "4", budget=Budget.parse("60%"))
    inner = {c.nodes[0]: c for c in context.found["choose_bits"][1:4]}
    widths = [str(c.bits) for c in inner.values()]
    assert widths[sensitive - 1] == "W8A8"
    assert all(w != "W8A8" for k, w in enumerate(widths, 1) if k != sensitive)
    moved = [c.sensitivity["W4A8"] for c in inner.values()]
    assert moved[sensitive - 1] > 20.0
    assert all(m < 0.05 * moved[sensitive - 1] for k, m in enumerate(moved, 1) if k != sensitive)


def test_bit_operations_are_kept_and_widths_are_those_of_keep() -> None:
    graph, whole = chain(2), chain(2)
    context = run_to("expose_states", graph, "4", budget=Budget.parse("60%"))
    run_to("expose_states", whole)
    assert cost_of(graph).bops <= 0.6 * cost_of(whole).bops
    chosen = context.found["choose_bits"]
    assert sorted(str(c.bits) for c in chosen[1:4]) == ["W4A4", "W4A4", "W8A8"]
    by_hand = chain(2)
    run_to("expose_states", by_hand, "4", keep={n: 8 for c in chosen for n in c.nodes
                                                if n.startswith("Conv") and c.bits == Bits(8, 8)})
    graph.metadata = by_hand.metadata = {}
    assert graph.to_bytes() == by_hand.to_bytes()


def test_budgets_that_cannot_be_and_that_need_no_choice() -> None:
    with pytest.raises(OptionError, match=r"--budget 10% cannot be met: the smallest possible is \d[\d.]*%$") as caught:
        run_to("expose_states", chain(), "4", budget=Budget.parse("10%"))
    smallest = str(caught.value).rpartition(" ")[2]
    graph, whole = chain(), chain()
    run_to("expose_states", graph, "4", budget=Budget.parse(smallest))       # what it says is possible
    run_to("expose_states", whole)
    assert cost_of(graph).bops <= Budget.parse(smallest).limit(cost_of(whole).bops)
    with pytest.raises(OptionError, match=r"--budget 5MB is enough for W8A8, which takes [\d.]+KB; give --bits 8$"):
        run_to("expose_states", chain(), "4", budget=Budget.parse("5MB"))


def test_a_choice_that_was_interrupted_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[str]()
    real = Checkpoint.save

    def save(self: Checkpoint, name: str, arrays: Any) -> None:
        real(self, name, arrays)
        seen.append(name)
        if len(seen) == 2:
            raise KeyboardInterrupt

    def compiled(resume: bool, name: str) -> bytes:
        return vmq.compile(chain(1), bits="auto", budget="60%", recipe="mse", effort="fast", resume=resume,
                           calib=tmp_path / "footage", output=tmp_path / name).graph.to_bytes()

    for clip in clips(1, 6):
        save_pictures(tmp_path / "footage" / clip.name, clip.frames())
    monkeypatch.setattr(Checkpoint, "save", save)
    with pytest.raises(KeyboardInterrupt):
        compiled(False, "out.onnx")
    assert seen == ["choose-block01-W4A8", "choose-block01-W4A4"]
    resumed = compiled(True, "out.onnx")
    assert seen[2:] == [f"choose-block0{k}-{bits}" for k in (2, 3) for bits in ("W4A8", "W4A4")]
    assert resumed == compiled(False, "other.onnx") == (tmp_path / "out.onnx").read_bytes()


def test_the_file_size_is_kept_and_told(tmp_path: Path) -> None:
    save_pictures(tmp_path / "footage" / "one", clips(1, 6)[0].frames())
    wide = read(CHAIN.replace("[8,", "[64,").replace(",8,", ",64,"))
    sizes = [vmq.compile(wide, bits=bits, recipe="mse", effort="fast", calib=tmp_path / "footage").size_bytes
             for bits in ("8", "w4a8")]
    assert sizes[0] - sizes[1] > 3 * 64 * 64 // 2 - 600
    middle = sum(sizes) // 2 + 300                       # the metadata name the closures
    result = vmq.compile(wide, bits="auto", budget=f"{middle}B", recipe="mse", effort="fast",
                         calib=tmp_path / "footage", output=tmp_path / "out.onnx", dump=tmp_path / "dump")
    assert (tmp_path / "out.onnx").stat().st_size == result.size_bytes <= middle
    report = result.results["choose_bits"].report
    assert report["cost"] == pytest.approx(result.size_bytes, abs=256)
    assert sorted(c["bits"] for c in report["closures"][1:4]) == ["W4A8", "W4A8", "W8A8"]
    said = json.loads(result.graph.metadata["vmq.closures"])
    assert said == {c["name"]: {"bits": c["bits"], "sensitivity": c["sensitivity"]} for c in report["closures"]}
    options = json.loads(result.graph.metadata["vmq.options"])
    assert (options["bits"], options["budget"]) == ("auto", f"{middle}B")
    assert any(line.startswith(f"widths within {middle}B: ") for line in result.lines())
    seen = inspect_dump(tmp_path / "dump")
    assert seen.chosen == report
    table = [line.split()[:3] for line in seen.lines() if " W4A8 " in line or " W8A8 " in line]
    for closure in report["closures"]:
        if len(closure["sensitivity"]) == 2:
            assert [f"{v:.3f}" for v in closure["sensitivity"].values()] + [closure["bits"]] in table
