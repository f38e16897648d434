"""Block-wise reconstruction: blocks come closer to their float selves, repeatably, and nothing else changes."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from compiling import changed, clips, constants, network, rerun, run_to
from numpy.typing import NDArray
from tiny_recurrent import FEED_FORWARD, GRU, LSTM, read

from passes import reconstruct_blocks
from vmq import round_layers
from vmq.checkpoint import Checkpoint
from vmq.errors import PassError
from vmq.gptq import Moments
from vmq.graph import Graph
from vmq.lanes import LANES, Lanes
from vmq.layers import never_negative
from vmq.pipeline import Context, run_passes
from vmq.quant import quantize
from vmq.recipe import BlockRecipe, Recipe
from vmq.runtime import Session, create_session
from vmq.shadow import Shadow
from vmq.spec import EFFORTS, QuantSpec

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = dataclasses.replace(EFFORTS["fast"], calibration=8, bias_frames=4, sequences=3, frames=2, block_iterations=6,
                           steps=4, loop_frames=8)
PLAIN = Recipe("plain", range_steps=20, correct_biases=False)


class Kept(Checkpoint):
    """A checkpoint in memory that knows what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: dict[str, dict[str, NDArray[Any]]] = {}

    def save(self, name: str, arrays: Any) -> None:
        assert name not in self.entries
        self.entries[name] = {n: np.array(a) for n, a in arrays.items()}

    def load(self, name: str) -> dict[str, NDArray[Any]] | None:
        return self.entries.get(name)


def at(text: str) -> str:
    """A network of 8x8 at the size of the clips."""
    return text.replace(",8,8]", ",32,48]")


def prepared(graph: Graph, bits: str = "4") -> tuple[Graph, Context]:
    context = run_to("correct_biases", graph, bits, recipe=PLAIN, effort=TINY)
    return graph, context


@pytest.fixture(scope="module")
def start() -> tuple[Graph, Context]:
    """The network at 4 bits with ranges."""
    return prepared(network())


def reconstruct(start: tuple[Graph, Context], iterations: int = TINY.block_iterations, checkpoint: Any = None,
                **recipe: Any) -> tuple[Graph, Any]:
    """A reconstructed copy and what the pass reported."""
    graph, context = start[0].copy(), start[1]
    if checkpoint is not None:
        context = dataclasses.replace(context, checkpoint=checkpoint)
    result = rerun("reconstruct_blocks", graph, context,
                   effort=dataclasses.replace(TINY, block_iterations=iterations),
                   recipe=dataclasses.replace(PLAIN, blocks=BlockRecipe(**recipe)))
    return graph, result


def parts(graph: Graph) -> dict[str, set[str]]:
    """Names of constants, by what they are."""
    found: dict[str, set[str]] = {k: set() for k in ("weight", "weight_scale", "scale", "zero", "bias")}
    for node in graph.nodes:
        if node.op == "QuantizeLinear" and node.inputs[2].dtype.name == "uint4":
            found["scale"].add(node.inputs[1].name)
            if not never_negative(node.inputs[0]):
                found["zero"].add(node.inputs[2].name)
        elif node.op == "QuantizeLinear" and node.attrs.get("axis") is not None:
            found["weight"].add(node.inputs[0].name)
            found["weight_scale"].add(node.inputs[1].name)
        elif node.op == "Conv" and len(node.inputs) > 2:
            found["bias"].add(node.inputs[2].name)
    return found


def integers(graph: Graph) -> dict[str, NDArray[Any]]:
    """The integers of every quantized weight."""
    return {node.inputs[0].name: quantize(
        np.asarray(node.inputs[0].values), np.asarray(node.inputs[1].values), np.asarray(node.inputs[2].values),
        QuantSpec.of(node.inputs[2].dtype, node.attrs["axis"])) for node in graph.nodes
        if node.op == "QuantizeLinear" and node.inputs[0].name in parts(graph)["weight"]}


# -- learning ------------------------------------------------------------------------------------------


def errors(result: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    before, after = (np.array([b[k] for b in result.report["blocks"]]) for k in ("error_before", "error_after"))
    return before, after


def test_blocks_come_closer_to_their_float_selves(start: tuple[Graph, Context]):
    graph, result = reconstruct(start, 40, learn=("weight", "bias"), drop=0.0)
    before, after = errors(result)
    assert len(before) == 4
    assert sum(b["layers"] for b in result.report["blocks"]) == 9
    assert (after <= 1.1 * before).all()
    assert after[2] < 0.85 * before[2]                        # the recurrent one, over several frames
    assert after.sum() < 0.85 * before.sum()
    assert result.report["crop"] == [32, 48]
    assert result.report["sequences"] == 3
    assert result.modified == len(changed(start[0], graph)) >= 10
    assert [(n.op, n.name) for n in graph.nodes] == [(n.op, n.name) for n in start[0].nodes]
    errors_of = {}
    for name, model in (("before", start[0]), ("after", graph)):       # and so does the network as it runs
        session, exact = Session(model, threads=1), Session(start[1].reference, threads=1)
        errors_of[name] = np.mean([np.abs(session.step(f)["s"] - exact.step(f)["s"]).mean()
                                   for f in clips(1, 8)[0].frames()])
    assert errors_of["after"] < errors_of["before"]


def test_without_rates_nothing_is_learned(start: tuple[Graph, Context]):
    """What the test above sees is learning."""
    graph, result = reconstruct(start, 3, learn=("weight", "bias", "scale", "zero", "weight_scale"), drop=0.0,
                                weight_rate=0.0, bias_rate=0.0, scale_rate=0.0, zero_rate=0.0)
    before, after = errors(result)
    assert np.array_equal(before, after)
    assert result.modified == 0
    assert graph.to_bytes() == start[0].to_bytes()


def test_rounding_is_learned_on_float_activations_first(start: tuple[Graph, Context]):
    _, result = reconstruct(start, 40, learn=("rounding", "scale"), separate=True, drop=0.0)
    before, after = errors(result)
    assert len(before) == 8
    assert after[1] < 0.85 * before[1]
    assert after[3] < 0.85 * before[3]
    assert (before[4:] > before[:4]).all()                    # the second sweep has rounded activations, too


def test_rounding_columns_first_starts_far_nearer(start: tuple[Graph, Context]):
    learn = ("rounding", "bias")
    _, plain = reconstruct(start, 1, learn=learn, drop=0.0)
    graph, result = reconstruct(start, 1, learn=learn, drop=0.0, gptq=True)
    (_, without), (before, after) = errors(plain), errors(result)
    assert after.mean() < 0.75 * without.mean()
    assert np.all(after < 1.05 * before)
    assert changed(start[0], graph) <= parts(graph)["weight"] | parts(graph)["bias"]


def test_what_frames_say_of_columns_is_added_up_at_once(start: tuple[Graph, Context], monkeypatch: pytest.MonkeyPatch):
    """Of a layer with 4608 inputs, what one frame says takes 340 MB."""
    made = Moments.of.__func__
    alive, most = weakref.WeakSet[Moments](), list[int]()

    def counted(kind: type[Moments], *columns: Any) -> Moments:
        found: Moments = made(kind, *columns)
        alive.add(found)
        most.append(len(alive))
        return found

    monkeypatch.setattr(Moments, "of", classmethod(counted))
    monkeypatch.setattr(Moments, "__hash__", object.__hash__)
    reconstruct(start, 1, gptq=True)
    assert len(most) > 20
    assert max(most) <= LANES + 2            # what was found so far, and the part before


def test_what_layers_read_is_computed_from_what_those_before_read(start: tuple[Graph, Context],
                                                                  monkeypatch: pytest.MonkeyPatch):
    real, steps = Shadow._call, list[int]()

    def run(most: int) -> bytes:
        monkeypatch.setattr(round_layers, "KEPT", most)
        steps.append(0)
        return reconstruct(start, 1, learn=("rounding", "bias"), gptq=True)[0].to_bytes()

    def counted(self: Shadow, step: Any, arguments: list[Any]) -> Any:
        steps[-1] += step.op == "Conv"
        return real(self, step, arguments)

    monkeypatch.setattr(Shadow, "_call", counted)
    assert run(0) == run(1 << 29)
    assert steps[1] < steps[0]


@pytest.mark.parametrize("gptq", [False, True])
def test_a_block_that_came_out_worse_is_left_as_it_was(start: tuple[Graph, Context], gptq: bool,
                                                       monkeypatch: pytest.MonkeyPatch):
    kept = Kept()
    monkeypatch.setattr(reconstruct_blocks, "SHARES", (1.0,))
    wild: dict[str, Any] = {"learn": ("rounding", "weight_scale", "scale", "bias"), "gptq": gptq, "bias_rate": 1e3}
    found, result = reconstruct(start, 3, checkpoint=kept, **wild)
    assert found.to_bytes() == start[0].to_bytes()
    rows = result.report["blocks"]
    assert [r["error_after"] for r in rows] == pytest.approx([r["error_before"] for r in rows], rel=1e-5)
    again, _ = reconstruct(start, 3, checkpoint=kept, **wild)
    assert again.to_bytes() == found.to_bytes()
    monkeypatch.setattr(reconstruct_blocks, "WORSE", 1e30)
    worse = reconstruct(start, 3, **wild)[1].report["blocks"]
    assert worse[0]["error_after"] > 1.25 * worse[0]["error_before"]


def test_a_block_that_came_out_worse_is_learned_again_in_shorter_steps(start: tuple[Graph, Context],
                                                                       monkeypatch: pytest.MonkeyPatch):
    options: dict[str, Any] = {"learn": ("rounding", "bias"), "gptq": True}
    rates = {"rounding_rate": 1e-3, "bias_rate": 1e-3}
    longer = {kind: 64 * rate for kind, rate in rates.items()}
    monkeypatch.setattr(reconstruct_blocks, "SHARES", (1.0,))
    want, usual = reconstruct(start, 3, **options, **rates)
    monkeypatch.setattr(reconstruct_blocks, "SHARES", (1e6, 1 / 64))
    got, result = reconstruct(start, 3, **options, **longer)
    assert got.to_bytes() == want.to_bytes()
    assert result.report == usual.report


def test_where_all_steps_are_too_long_what_rounding_columns_gives_is_kept(start: tuple[Graph, Context]):
    wild: dict[str, Any] = {"learn": ("rounding", "bias"), "gptq": True, "bias_rate": 1e9}
    found, result = reconstruct(start, 3, **wild)
    still, columns = reconstruct(start, 3, **wild | {"bias_rate": 0.0, "rounding_rate": 0.0, "rounding_weight": 0.0})
    assert found.to_bytes() == still.to_bytes()
    before, after = errors(result)
    assert after == pytest.approx(errors(columns)[1])
    assert np.all(after < 1.05 * before)


def test_columns_that_were_rounded_are_kept(start: tuple[Graph, Context], monkeypatch: pytest.MonkeyPatch):
    kept = Kept()
    options: dict[str, Any] = {"learn": ("rounding", "bias"), "gptq": True, "checkpoint": kept}
    first, _ = reconstruct(start, 1, **options)
    monkeypatch.setattr(round_layers, "round_columns", None)
    kept_entries = dict(kept.entries)
    again, _ = reconstruct(start, 1, **options)
    assert kept.entries == kept_entries
    assert first.to_bytes() == again.to_bytes()


def test_without_a_recipe_for_blocks_the_graph_is_the_object_it_was(start: tuple[Graph, Context]):
    graph = start[0].copy()
    before, values = graph.to_bytes(), {id(v) for v in graph.values()}
    result = rerun("reconstruct_blocks", graph, start[1])
    assert result.modified == 0
    assert result.report == {}
    assert graph.to_bytes() == before
    assert {id(v) for v in graph.values()} == values


def test_blocks_and_a_reference_are_needed(start: tuple[Graph, Context]):
    step = reconstruct_blocks.ReconstructBlocks()
    for context in (dataclasses.replace(start[1], reference=None), dataclasses.replace(start[1], found={})):
        with pytest.raises(PassError, match="run find_closures and insert_qdq before"):
            run_passes(start[0].copy(), [step], context)


# -- what changes --------------------------------------------------------------------------------------


def test_rounding_alone_rounds_up_or_down(start: tuple[Graph, Context]):
    graph, result = reconstruct(start, learn=("rounding",), drop=0.5, rounding_rate=5e-3)
    kinds = parts(start[0])
    assert changed(start[0], graph) <= kinds["weight"]
    assert result.modified > 5
    before, after = integers(start[0]), integers(graph)
    assert len(after) == 9
    moved = 0
    for node in start[0].nodes:
        if node.op != "QuantizeLinear" or node.inputs[0].name not in kinds["weight"]:
            continue
        spec = QuantSpec.of(node.inputs[2].dtype)
        weight, scale = np.asarray(node.inputs[0].values), np.asarray(node.inputs[1].values)
        down = np.floor(weight / scale.reshape(-1, 1, 1, 1))
        now = after[node.inputs[0].name]
        assert ((now == np.clip(down, spec.qmin, spec.qmax)) | (now == np.clip(down + 1, spec.qmin, spec.qmax))).all()
        moved += int((now != before[node.inputs[0].name]).sum())
    assert moved > 20                                         # not all are rounded to nearest any more


@pytest.mark.parametrize(("learn", "kinds"), [
    (("scale",), {"scale"}), (("zero",), {"zero"}), (("bias",), {"bias"}), (("weight_scale",), {"weight_scale"}),
    (("rounding", "weight_scale", "scale", "zero", "bias"), {"weight", "weight_scale", "scale", "zero", "bias"})])
def test_what_is_named_changes_and_nothing_else(start: tuple[Graph, Context], learn: tuple[str, ...],
                                                kinds: set[str]):
    graph, _ = reconstruct(start, learn=learn, zero_rate=5e-3, rounding_rate=5e-3)
    found, known = changed(start[0], graph), parts(start[0])
    assert found
    assert found <= set().union(*(known[k] for k in kinds))
    for kind in kinds:
        assert found & known[kind], kind
    for name, value in constants(graph).items():
        assert value.dtype == constants(start[0])[name].dtype
        if name in known["scale"] | known["weight_scale"]:
            assert (value > 0).all()


def test_the_first_sweep_leaves_activations_alone_and_nothing_is_learned_twice(start: tuple[Graph, Context]):
    kept = Kept()
    graph, _ = reconstruct(start, checkpoint=kept, learn=("rounding", "scale", "weight_scale", "zero"), separate=True,
                           drop=0.0)
    known = parts(start[0])
    sweeps = [[set(a) for n, a in kept.entries.items() if n.startswith(f"blocks-{k}-")] for k in (0, 1)]
    assert set().union(*sweeps[0]) == known["weight"] | known["weight_scale"]
    assert set().union(*sweeps[1]) == {
        n for n in known["scale"] | known["zero"] if n in set().union(*sweeps[1])} != set()
    names = [n for sweep in sweeps for entry in sweep for n in entry]
    assert len(names) == len(set(names))
    finished = constants(graph)
    for entry in kept.entries.values():                       # nobody touched it after it was learned
        for name, value in entry.items():
            if name not in known["zero"]:
                assert np.array_equal(finished[name], value), name


@pytest.mark.parametrize("separate", [False, True])
def test_everything_that_quantizes_is_learned_once(start: tuple[Graph, Context], separate: bool):
    kept = Kept()
    reconstruct(start, 2, kept, learn=("rounding", "weight_scale", "scale", "zero", "bias"), separate=separate,
                drop=0.0)
    names = [n for entry in kept.entries.values() for n in entry]
    assert len(names) == len(set(names))
    known = parts(start[0])
    assert set(names) == set().union(*known.values())


# -- states --------------------------------------------------------------------------------------------


def blocks_of(start: tuple[Graph, Context], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The blocks that the pass works with."""
    found: list[Any] = []
    real: Callable[..., Any] = reconstruct_blocks._Block

    def block(*arguments: Any) -> Any:
        found.append(real(*arguments))
        return found[-1]

    monkeypatch.setattr(reconstruct_blocks, "_Block", block)
    reconstruct(start, 1, learn=("bias",), drop=0.0)
    return found


def test_alpha_counts_as_much_as_the_states_that_leave_with_it(start: tuple[Graph, Context],
                                                               monkeypatch: pytest.MonkeyPatch):
    """Powers 0.25, 80,000 and 2: without shares an error of a hundredth in alpha would count for nothing."""
    shares = reconstruct_blocks._Reconstruction._shares
    work: Any = SimpleNamespace(alpha="pha")
    floats = {"pha": torch.full((2, 3, 1, 1, 4, 4), 0.5), "memory": torch.full((2, 3, 1, 8, 2, 2), 100.0),
              "small": torch.ones(2, 3, 1, 2, 2, 2), "none": torch.zeros(2, 3, 1, 2, 2, 2)}
    powers = {"pha": 0.25, "memory": 80_000.0, "small": 2.0}
    taught = [(f"{n}_q", n) for n in powers]
    found = shares(work, taught, {"m": "memory_q"}, floats)
    assert {n: found[f"{n}_q"] * p for n, p in powers.items()} == pytest.approx(
        {"pha": 80_002.25 / 2, "memory": 80_002.25 / 4, "small": 80_002.25 / 4})
    assert found == shares(work, taught, {"m": "memory_q"}, {n: 1 * v for n, v in floats.items()})
    silent = shares(work, [("pha_q", "pha"), ("none_q", "none")], {"m": "none_q"}, floats)
    assert silent["none_q"] <= 1e6
    for alone, states in ((taught, {}), (taught[1:], {"m": "memory_q"}), (taught[:1], {"m": "pha_q"})):
        assert shares(work, alone, states, floats) == {g: 1.0 for g, _ in alone}
    blocks = [b for b in blocks_of(start, monkeypatch) if b.states]
    assert [set(b.shares.values()) != {1.0} for b in blocks] == [
        any(n == "pha" for _, n in b.taught) and len(b.taught) > 1 for b in blocks]


@pytest.mark.parametrize(("text", "states"), [("", {"r": "s"}), (GRU, {"r": "s"}), (LSTM, {"h": "h2", "c": "c2"})])
def test_the_recurrent_block_is_unrolled_and_its_new_states_count(
        text: str, states: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    blocks = blocks_of(prepared(read(at(text)) if text else network()), monkeypatch)
    recurrent, = [b for b in blocks if b.states]
    assert recurrent.states.keys() == states.keys()
    assert set(states) <= set(recurrent.reads)
    sources = dict(recurrent.taught)
    for state, given in recurrent.states.items():
        assert sources[given] == states[state] or given == states[state]
        assert given in recurrent.gives                       # what leaves a block is in its loss


def test_a_state_is_carried_by_the_quantized_block(start: tuple[Graph, Context], monkeypatch: pytest.MonkeyPatch):
    """Unrolled, the block gives what the network gives in closed loop from that state."""
    seen: dict[str, Any] = {}
    real = reconstruct_blocks._Reconstruction._advance

    def advance(self: Any, shadow: Any, store: Any, reads: Any, gives: Any, states: Any) -> None:
        real(self, shadow, store, reads, gives, states)
        if states and shadow is self.shadow:
            seen.update(given=next(iter(states.values())), store=dict(store), frame=self.frame,
                        shadow=shadow, quantizers=dict(shadow.quantizers))

    monkeypatch.setattr(reconstruct_blocks._Reconstruction, "_advance", advance)
    reconstruct(start, 1, learn=("bias",), drop=0.0, bias_rate=0.0)
    shadow, store = seen["shadow"], seen["store"]
    shadow.quantizers.update(seen["quantizers"])
    for s in range(3):
        state = store["r"][s, 0]
        for t in range(2):
            with torch.no_grad():
                made = shadow.run({"src": store["src"][s, t], "r": state}, ["s", seen["given"]])
            state = made["s"]
            torch.testing.assert_close(store[seen["given"]][s, t], made[seen["given"]], rtol=0, atol=1e-5)
        assert not torch.allclose(store["r"][s, 1], store[seen["given"]][s, 0], atol=1e-4)     # not the float state


def test_the_error_of_a_recurrent_block_is_that_of_all_its_frames(start: tuple[Graph, Context],
                                                                  monkeypatch: pytest.MonkeyPatch):
    checked = []
    real = reconstruct_blocks._Reconstruction._learn

    def learn(self: Any, block: Any, nodes: Any, floats: Any, ours: Any, *rest: Any) -> Any:
        if block.states:
            item = [(0, None), (2, None)]
            found = float(self._error(block, item, floats, ours, 0.0))
            total = []
            for s, _ in item:
                given = {n: ours[n][s, 0] for n in block.reads}
                for t in range(2):
                    made = self.shadow.run(given | {n: ours[n][s, t] for n in block.reads if n != "r"}, block.gives)
                    given["r"] = made[block.states["r"]]
                    total += [float((made[g] - floats[name][s, t]).square().sum(1).mean())
                              for g, name in block.taught]
            checked.append((found, sum(total) / 4))
        return real(self, block, nodes, floats, ours, *rest)

    monkeypatch.setattr(reconstruct_blocks._Reconstruction, "_learn", learn)
    reconstruct(start, 1, learn=("bias",), drop=0.0)
    (found, expected), = checked
    assert found == pytest.approx(expected, rel=1e-4)


def test_warm_float_states_come_in(start: tuple[Graph, Context], monkeypatch: pytest.MonkeyPatch):
    sequences: list[Any] = []
    real = reconstruct_blocks._Reconstruction._stacked
    monkeypatch.setattr(reconstruct_blocks._Reconstruction, "_stacked",
                        lambda self, s: sequences.append(real(self, s)) or sequences[-1])
    reconstruct(start, 1, learn=("bias",), drop=0.0)
    frames, states = sequences[:2]
    assert frames.shape == (3, 2, 1, 3, 32, 48)
    assert states.shape == (3, 2, 1, 4, 32, 48)
    exact = create_session(start[1].reference, optimize=False, threads=1)
    for s in range(3):
        made, = exact.run(["s"], {"src": frames[s, 0].numpy(), "r": states[s, 0].numpy()})
        np.testing.assert_allclose(states[s, 1].numpy(), made, rtol=0, atol=1e-5)
    assert sum(bool(states[s, 0].any()) for s in range(3)) >= 2


# -- the same every time -------------------------------------------------------------------------------

VMQ = {"learn": ("rounding", "weight_scale", "scale", "zero", "bias"), "drop": 0.5, "gptq": True}


@pytest.fixture(scope="module")
def learned(start: tuple[Graph, Context]) -> bytes:
    return reconstruct(start, **VMQ)[0].to_bytes()


def test_two_runs_give_the_same_bytes(start: tuple[Graph, Context], learned: bytes):
    assert learned != start[0].to_bytes()
    assert reconstruct(start, **VMQ)[0].to_bytes() == learned


def test_any_number_of_threads_gives_the_same_bytes(start: tuple[Graph, Context], learned: bytes):
    torch.set_num_threads(2)
    try:
        assert reconstruct(start, **VMQ)[0].to_bytes() == learned
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_another_seed_gives_others(start: tuple[Graph, Context], learned: bytes):
    context = start[1]
    other = start[0], dataclasses.replace(context, options=dataclasses.replace(context.options, seed=1))
    assert reconstruct(other, **VMQ)[0].to_bytes() != learned


@pytest.mark.parametrize(("name", "value"), [("MEMORY", 0), ("available", lambda: 1000)])
def test_what_does_not_fit_in_memory_goes_to_files(start: tuple[Graph, Context], learned: bytes, name: str, value: Any,
                                                   monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reconstruct_blocks, name, value)
    files = 0
    real = torch.from_file

    def from_file(*arguments: Any, **options: Any) -> torch.Tensor:
        nonlocal files
        files += 1
        return real(*arguments, **options)

    monkeypatch.setattr(torch, "from_file", from_file)
    assert reconstruct(start, **VMQ)[0].to_bytes() == learned
    assert files > 10


def test_room_is_given_back(start: tuple[Graph, Context], monkeypatch: pytest.MonkeyPatch):
    seen: list[tuple[int, int]] = []
    real = reconstruct_blocks._Reconstruction._learn

    def learn(self: Any, block: Any, nodes: Any, floats: Any, ours: Any, *rest: Any) -> Any:
        inputs = {self.frame, *self.states}
        seen.append((self.bytes, sum(v.nbytes for s in (floats, ours) for n, v in s.items() if n not in inputs)))
        return real(self, block, nodes, floats, ours, *rest)

    monkeypatch.setattr(reconstruct_blocks._Reconstruction, "_learn", learn)
    reconstruct(start, 1, learn=("bias",), separate=True, drop=0.0)
    assert all(counted == held for counted, held in seen)
    assert len({counted for counted, _ in seen}) > 2


def test_what_was_kept_is_not_learned_again(start: tuple[Graph, Context], learned: bytes, tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch):
    assert reconstruct(start, checkpoint=Checkpoint(tmp_path / "f", 1), **VMQ)[0].to_bytes() == learned
    files = sorted(p.name.partition("-")[2] for p in (tmp_path / "f").iterdir())
    assert files == [f"blocks-0-{k}.npz" for k in range(4)]
    next(p for p in (tmp_path / "f").iterdir() if p.name.endswith("-2.npz")).unlink()
    steps = 0
    real = Lanes.gradients

    def gradients(*arguments: Any) -> float:
        nonlocal steps
        steps += 1
        return real(*arguments)

    monkeypatch.setattr(Lanes, "gradients", gradients)
    again = Checkpoint(tmp_path / "f", 1, resume=True)
    assert reconstruct(start, checkpoint=again, **VMQ)[0].to_bytes() == learned
    assert steps == TINY.block_iterations                     # of the one block that was missing
    assert reconstruct(start, checkpoint=again, **VMQ)[0].to_bytes() == learned
    assert steps == TINY.block_iterations


# -- other networks ------------------------------------------------------------------------------------

UNBATCHED = """(float[1,3,32,48] src, float[4,3,3,3] w0, float[4,4,3,3] w1, float[1,4,3,3] w2)
        => (float[1,1,32,48] pha) <int64[3] flat = {1, 4, 1536}, int64[4] full = {1, 4, 32, 48}> {
    a = Conv <pads = [1,1,1,1]> (src, w0)
    b = Relu (a)
    c = Reshape (b, flat)
    d = Reshape (c, full)
    e = Conv <pads = [1,1,1,1]> (d, w1)
    f = Relu (e)
    g = Conv <pads = [1,1,1,1]> (f, w2)
    pha = Sigmoid (g)
}"""


def batchable(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    found: list[bool] = []
    real = reconstruct_blocks._Reconstruction._runs_in_batches
    monkeypatch.setattr(reconstruct_blocks._Reconstruction, "_runs_in_batches",
                        lambda self: found.append(real(self)) or found[-1])
    return found


def test_a_model_that_takes_one_frame_at_a_time(monkeypatch: pytest.MonkeyPatch):
    found = batchable(monkeypatch)
    _, result = reconstruct(prepared(read(UNBATCHED)), 20, learn=("weight", "bias"), drop=0.0)
    assert found == [False]
    before, after = errors(result)
    assert after.sum() < before.sum()
    assert result.modified > 2


def test_a_quantizer_of_two_blocks_is_learned_with_the_first():
    start = prepared(read(UNBATCHED))
    before, behind = (next(n for n in start[0].value(v).outputs if n.op == "QuantizeLinear") for v in ("b", "c"))
    assert before.inputs[1] is behind.inputs[1]               # a Reshape hands integers on
    kept = Kept()
    reconstruct(start, 1, kept, learn=("rounding", "weight_scale", "scale"), drop=0.0)
    names = [n for entry in kept.entries.values() for n in entry]
    assert len(names) == len(set(names))
    assert before.inputs[1].name in kept.entries["blocks-0-0"]


def test_batches_only_save_time(start: tuple[Graph, Context], monkeypatch: pytest.MonkeyPatch):
    """Frame by frame the gradients are the same but for the order of sums."""
    found = batchable(monkeypatch)
    together = reconstruct(start, 1, learn=("bias",), drop=0.0)[0]
    assert found == [True]
    monkeypatch.setattr(reconstruct_blocks._Reconstruction, "_runs_in_batches", lambda _: False)
    apart = reconstruct(start, 1, learn=("bias",), drop=0.0)[0]
    names = changed(start[0], together)
    one, other, old = (constants(g) for g in (together, apart, start[0]))
    assert len(names) >= 3
    moved = np.concatenate([(one[n] - old[n]).ravel() for n in names])
    off = np.concatenate([(one[n] - other[n]).ravel() for n in names])
    assert (np.abs(off) < 1e-3 * np.abs(moved).max()).mean() > 0.9


def test_feed_forward():
    graph = read(at(FEED_FORWARD).replace("float[3,4,3,3] w2", "float[3,4,3,3] w2, float[1,3,1,1] w3")
                 .replace("(float[1,3,32,48] fgr)", "(float[1,1,32,48] pha)").replace(
                     "fgr = Add (z, src)", "y2 = Add (z, src)\n    pha = Conv (y2, w3)"))
    before, after = errors(reconstruct(prepared(graph), 20, learn=("weight",), drop=0.0)[1])
    assert after.sum() < before.sum()


MASKED = """(float[1,3,32,48] src, float[4,3,3,3] w0, float[4,4,3,3] w1, float[4,4,3,3] w2, float[1,4,1,1] w3)
        => (float[1,1,32,48] pha) <float[1] zero = {0}> {
    a = Conv <pads = [1,1,1,1]> (src, w0)
    m = Less (a, zero)
    b = Conv <pads = [1,1,1,1]> (a, w1)
    c = Where (m, b, a)
    d = Conv <pads = [1,1,1,1]> (c, w2)
    n = Not (m)
    e = Where (n, d, b)
    pha = Conv (e, w3)
}"""


@pytest.mark.parametrize("room", [1 << 30, 0])
def test_masks_cross_from_block_to_block(room: int, monkeypatch: pytest.MonkeyPatch):
    """What is true or false is handed on as it is, in memory or in files, and nothing is learned of it."""
    monkeypatch.setattr(reconstruct_blocks, "MEMORY", room)
    graph, context = prepared(read(MASKED))
    closures = context.found["find_closures"]
    nodes = [n.name for n in graph.nodes if any(n.name in b.nodes for b in closures.blocks)]
    context.found["find_closures"] = dataclasses.replace(closures, blocks=tuple(
        dataclasses.replace(closures.blocks[0], name=n, nodes=(n,)) for n in nodes))
    before, after = errors(reconstruct((graph, context), 20, learn=("rounding", "bias"), gptq=True)[1])
    assert (before == 0.0).sum() == 2                         # Less and Not
    assert 0.0 < after.sum() < before.sum()


@pytest.mark.parametrize("bits", ["8", "w4a8"])
def test_other_widths(bits: str):
    start = prepared(network(), bits)
    graph, result = reconstruct(start, **VMQ)
    assert result.modified > 20
    before, after = errors(result)
    assert np.isfinite(after).all()
    assert (after < 3 * before + 1e-3).all()
    Session(graph, threads=1).step(next(clips(1, 1)[0].frames()))


def test_clips_shorter_than_a_sequence(start: tuple[Graph, Context]):
    for footage in (clips(2, 1), [clips(1, 1)[0], clips(2, 5)[1]]):
        context = dataclasses.replace(start[1], footage=footage)
        _, result = reconstruct((start[0], context), 2, learn=("bias",), drop=0.0)
        assert np.isfinite(errors(result)[1]).all()
