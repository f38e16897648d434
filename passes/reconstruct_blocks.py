"""Block-wise initial quantization: learn each block so that it gives what its float self gives (BIQ).

Block after block in topological order: what goes in comes from the blocks before, already quantized; the target is
what the float network computes there; the loss is

    L = sum over what leaves the block of mean |y' - y|^2, summed over channels (Li et al. 2021, BRECQ)

and, where rounding is learned, AdaRound's regulariser. With a drop probability, values of activations, those that
enter the block and those inside, are left unrounded at random (Wei et al. 2022, QDrop). A block with a recurrent
state is unrolled over the frames of a sequence, from the float network's warm state on, and its new state counts in
the loss like everything else that leaves it (PTQ4VM, arXiv:2506.10840); alpha that leaves with states counts as much.

With `gptq` a block's weights are first rounded layer by layer, each towards what the float layer
gives on the float network's input (vmq/gptq.py). Gradient steps start from there.

A quantizer belongs to the block that makes the value; one that quantizers of several blocks share, to the first.
Float and quantized values at the edges of blocks are computed once and kept until the last block that reads them,
in memory up to `MEMORY` bytes, or half of what is available if that is less, and in temporary files beyond.
"""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from vmq import processes
from vmq.crops import Crops, crop_graph, warm_sequence
from vmq.errors import ModelError, OutputError, PassError
from vmq.fakequant import FakeQuantize
from vmq.graph import Constant, Graph
from vmq.lanes import LANES, Lanes
from vmq.layers import float_source, homes
from vmq.learning import Adam, Dropped, Parameter, SoftRounding, assign, coarse, mixed, parameters
from vmq.memory import available
from vmq.pipeline import Context, Pass, PassResult
from vmq.recipe import BlockRecipe
from vmq.round_layers import Frames, round_layers
from vmq.runtime import Session
from vmq.shadow import Shadow

MEMORY = 2 << 30
"""Bytes of block inputs and outputs that are held in memory, at most; what is more goes to temporary files."""
COLUMNS = 24
"""Frames that a layer's columns are rounded on."""
ITEM = 2
"""Frames that gradients are taken of at a time."""
WORSE = 1.25
"""A block that comes out with more than so many times its error is learned again. Errors are those of a few frames,
with all activations rounded: a little more is no harm, and comes often."""
SHARES = (1.0, 0.1, 0.0)
"""Shares of the recipe's rates in the order in which they are tried: steps that suit a few layers can be too long for a
hundred. Without steps what GPTQ gives is left; a block that is worse with that as well stays as it was."""


class ReconstructBlocks(Pass):
    """Learn rounding and quantizers block by block against the float network's blocks."""

    name: ClassVar[str] = "reconstruct_blocks"

    def requires(self, graph: Graph, context: Context) -> None:
        if context.reference is None or "find_closures" not in context.found:
            raise PassError("there are no blocks, or no float reference; run find_closures and insert_qdq before")

    def run(self, graph: Graph, context: Context) -> PassResult:
        recipe = context.options.recipe.blocks
        if recipe is None:
            return PassResult()
        with Lanes(context.options.device) as lanes, tempfile.TemporaryDirectory(prefix="vmq-") as folder:
            work = _Reconstruction(graph, context, recipe, lanes, Path(folder))
            report = []
            for number, sweep in enumerate(_sweeps(recipe)):
                report += work.sweep(sweep, number)
        return PassResult(modified=work.changed, report={"blocks": report, "crop": list(work.crops.size),
                                                         "sequences": len(work.sequences)})


def _sweeps(recipe: BlockRecipe) -> list[BlockRecipe]:
    """One sweep over the blocks, or two where rounding is learned on float activations first."""
    if not recipe.separate:
        return [recipe]
    weights = tuple(k for k in recipe.learn if k in ("rounding", "weight", "weight_scale", "bias"))
    return [replace(recipe, learn=weights), replace(recipe, learn=tuple(set(recipe.learn) - set(weights)),
                                                    separate=False)]


class _Reconstruction:
    def __init__(self, graph: Graph, context: Context, recipe: BlockRecipe, lanes: Lanes, folder: Path) -> None:
        assert context.reference is not None
        self.graph, self.context, self.lanes, self.folder = graph, context, lanes, folder
        session = Session(context.reference, optimize=False, pairs=context.options.pairs)
        self.frame, self.states = session.frame_input, {p.input: p.output for p in session.state_pairs}
        self.alpha = session.pictures()[1]
        exact = crop_graph(context.reference, self.frame)
        self.device = context.options.device
        self.exact = Shadow(exact, self.device)
        self.shadow = Shadow(crop_graph(graph, self.frame), self.device)
        effort = context.options.effort
        self.crops = Crops.for_graph(exact, self.frame, context.footage or context.clips, context.options.seed)
        self.blocks = _with_quantizers(self.shadow.graph, context.found["find_closures"].blocks)
        self.sources = _float_names(self.shadow.graph, context.found["insert_qdq"])
        self.quantizers = dict(self.shadow.quantizers)
        self.learned: set[str] = set()
        self.changed = self.bytes = 0
        self.room = min(MEMORY, available() / (2 * processes.count()))
        self.sequences = lanes.map(lambda k: warm_sequence(k, self.crops, effort.frames, self.exact, session),
                                   range(effort.sequences))
        self.batchable = processes.first(self._runs_in_batches)

    def sweep(self, recipe: BlockRecipe, number: int) -> list[dict[str, Any]]:
        """Learn every block once; what each lost before and after, relative to its float output's power."""
        floats = {self.frame: self._stacked([s[self.frame] for s in self.sequences]),
                  **{i: self._stacked([s[i] for s in self.sequences]) for i in self.states}}
        ours = dict(floats)
        self.shadow.quantizers.update(self.quantizers)
        if recipe.separate:
            self.shadow.quantizers.update(
                (n, _unchanged) for n, q in self.quantizers.items() if not _own(q).spec.signed)
        edges = [(self.shadow.boundary(nodes), self.exact.boundary(reference))
                 for nodes, reference in self.blocks]
        report = []
        for index, (((reads, gives), (float_reads, float_gives)), (nodes, _)) in enumerate(
                zip(edges, self.blocks, strict=True)):
            if not gives:
                continue
            needed = tuple(dict.fromkeys((*float_gives, *(self.sources[g] for g in gives))))
            self._advance(self.exact, floats, float_reads, needed, {})
            states = {i: g for i, o in self.states.items() if i in reads
                      for g in sorted(gives, key=o.__ne__)[:1] if o in (g, self.sources[g])}
            taught = [(g, self.sources[g]) for g in gives if floats[self.sources[g]].is_floating_point()]
            block = _Block(reads, gives, taught, states, float_reads, self._shares(taught, states, floats))
            key = f"blocks-{number}-{index}"
            report.append(self._learn(block, nodes, floats, ours, recipe, key, (index, len(edges))))
            self._advance(self.shadow, ours, reads, gives, block.states)
            later = {n for (r, _), (f, _) in edges[index + 1:] for n in (*r, *f, *(self.sources.get(x, x) for x in r))}
            for store in (floats, ours):
                for name in set(store) - later - {self.frame, *self.states}:
                    self.bytes -= store.pop(name).nbytes
        return report

    def _shares(self, taught: Sequence[tuple[str, str]], states: dict[str, str], floats: dict[str, Tensor],
                ) -> dict[str, float]:
        """What the error of each output of a block counts for: 1, as published.

        A memory may have a thousand times the power of alpha, which would count for nothing. So where alpha leaves a
        block together with states it counts as much as all else, and each output by its error relative to its power.
        """
        others = [g for g, source in taught if source != self.alpha]
        if not states or not others or len(others) == len(taught):
            return {g: 1.0 for g, _ in taught}
        powers = {g: _power(floats[source]) for g, source in taught}
        least, whole = 1e-6 * max(powers.values()), sum(powers.values())
        return {g: whole / (2 * (len(others) if g in others else len(taught) - len(others)) * max(power, least))
                for g, power in powers.items()}

    # -- data ---------------------------------------------------------------------------------------

    def _stacked(self, sequences: list[list[Tensor]]) -> Tensor:
        """[S, T, 1, ...]; clips shorter than a sequence repeat their last frame."""
        longest = max(map(len, sequences))
        return torch.stack([torch.stack([*s, *s[-1:] * (longest - len(s))]) for s in sequences])

    def _new(self, count: int, length: int, value: Tensor) -> Tensor:
        """Room for values like this one, [count,length,...], in memory while there is some, else in a file."""
        shape, kind = (count, length, *value.shape), value.dtype
        size = math.prod(shape) * kind.itemsize
        self.bytes += size
        if self.bytes <= self.room:
            with contextlib.suppress(RuntimeError, MemoryError):        # there is none: a file it is
                return torch.empty(shape, dtype=kind, device=self.device)
        try:
            with tempfile.NamedTemporaryFile(dir=self.folder) as file:      # the mapping keeps the file's room
                os.posix_fallocate(file.fileno(), 0, size)      # a page without room would end the process later
                return torch.from_file(file.name, shared=True, size=math.prod(shape), dtype=kind).reshape(shape)
        except OSError as error:
            raise OutputError(f"cannot keep {size >> 20} MB of what enters blocks in {self.folder.parent} "
                              f"({error.strerror}); make room there, or set TMPDIR to a folder with room") from error

    @torch.no_grad()
    def _advance(self, shadow: Shadow, store: dict[str, Tensor], reads: Iterable[str], gives: Sequence[str],
                 states: dict[str, str]) -> None:
        """Compute what leaves a block from what enters it, for every frame of every sequence, into the store."""
        reads, gives = tuple(reads), tuple(g for g in gives if g not in store)
        if not gives:
            return
        held = shadow.run({}, shadow.fixed_values()) if shadow is self.shadow else {}
        count, length = store[self.frame].shape[:2]

        def run(s: int, length: int = length) -> dict[str, list[Tensor]]:
            results: dict[str, list[Tensor]] = {g: [] for g in gives}
            carried: dict[str, Tensor] = {}
            for t in range(length):
                made = shadow.run({**held, **{n: store[n][s, t].to(self.device) for n in reads}, **carried}, gives)
                carried = {i: made[o] for i, o in states.items()}
                for name, value in made.items():
                    results[name].append(value)
            return results

        for name, values in run(0, 1).items():
            store[name] = self._new(count, length, values[0])

        def fill(s: int) -> None:
            for name, values in run(s).items():
                store[name][s] = torch.stack(values)

        self.lanes.map(fill, range(count))
        for s in range(count) if processes.count() > 1 else ():
            for name in gives:
                sent = store[name][s].to(self.device)         # some may have it in memory and others in a file
                processes.spread(sent, s)
                store[name][s] = sent

    @torch.no_grad()
    def _runs_in_batches(self) -> bool:
        """Whether several frames can be stacked along the first axis."""
        def feeds(s: int) -> dict[str, Tensor]:
            return {n: values[0] for n, values in self.sequences[s].items()}

        one, other = feeds(0), feeds(len(self.sequences) - 1)
        outputs = tuple(v.name for v in self.exact.graph.outputs)
        try:
            both = self.exact.run({n: torch.cat([one[n], other[n]]) for n in one}, outputs)
        except ModelError:
            return False
        alone = [self.exact.run(f, outputs) for f in (one, other)]
        return all(both[n].shape[1:] == alone[0][n].shape[1:] and torch.allclose(
            both[n], torch.cat([a[n] for a in alone]), atol=1e-3) for n in outputs)

    # -- learning -----------------------------------------------------------------------------------

    def _learn(self, block: _Block, nodes: set[str], floats: dict[str, Tensor], ours: dict[str, Tensor],
               recipe: BlockRecipe, key: str, place: tuple[int, int]) -> dict[str, Any]:
        context, shadow = self.context, self.shadow
        weights, activations = _quantizers_of(shadow, nodes)
        before = self._loss(block, floats, ours)
        learn = recipe.learn if block.taught else ()
        learned = [p for p in parameters(shadow, learn, nodes) if p.constant not in self.learned]
        rounded = {n: w for n, w in weights.items() if "rounding" in learn and w not in self.learned}
        names = {*rounded.values(), *(p.constant for p in learned)}
        saved = context.checkpoint.load(key)
        if saved is not None:
            self._put({name: torch.from_numpy(value) for name, value in saved.items()})
            after = self._loss(block, floats, ours)
        else:
            start = self._values({*weights.values(), *names})
            if recipe.gptq and block.taught:
                self._round_layers(block, weights, recipe, floats, ours)
            begin, after = self._values(start), before
            for share in SHARES if names else ():
                self._put(begin)
                self._search(block, learned, rounded, activations, floats, ours, recipe, key, place, share)
                after = self._loss(block, floats, ours)
                if after <= WORSE * before:
                    break
            else:
                self._put(start)
                after = self._loss(block, floats, ours)
            if names:
                context.checkpoint.save(key, {n: shadow.parameter(n).detach().cpu().numpy() for n in sorted(names)})
        shadow.write_back()
        self.changed += assign(self.graph, shadow.graph, names)
        self.learned |= names
        context.progress(f"block {place[0] + 1} of {place[1]}, error {before:.4f} -> {after:.4f}",
                         (place[0] + 1) / place[1])
        return {"layers": len(weights), "error_before": before, "error_after": after}

    def _values(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: self.shadow.parameter(name).detach().clone() for name in names}

    @torch.no_grad()
    def _put(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self.shadow.parameter(name).copy_(value)

    def _search(self, block: _Block, learned: list[Parameter], rounded: dict[str, str], activations: Iterable[str],
                floats: dict[str, Tensor], ours: dict[str, Tensor], recipe: BlockRecipe, key: str,
                place: tuple[int, int], share: float) -> None:
        """Gradient steps at a share of the recipe's rates, from the parameters as they are; then all is rounded."""
        quantizers, original = self.shadow.quantizers, dict(self.shadow.quantizers)
        soft = {w: SoftRounding(_own(original[name]), self.shadow.parameter(w)) for name, w in rounded.items()}
        if share:
            stand_ins = {} if recipe.separate else coarse({n: original[n] for n in activations})
            for name in activations:
                if name in stand_ins:
                    quantizers[name] = stand_ins[name]
                elif recipe.drop > 0.0 and not recipe.separate:
                    quantizers[name] = Dropped(_own(original[name]), recipe.drop)
            quantizers.update((name, soft[w]) for name, w in rounded.items())
            every = [*learned, *(Parameter("rounding", w, s.v, torch.ones(())) for w, s in soft.items())]
            self._descend(block, every, list(soft.values()), floats, ours, recipe, key, place, share)
        quantizers.update(original)
        for weight, rounding in soft.items():
            rounding.settle(self.shadow.parameter(weight))

    def _round_layers(self, block: _Block, weights: dict[str, str], recipe: BlockRecipe, floats: dict[str, Tensor],
                      ours: dict[str, Tensor]) -> None:
        """Round the columns of the block's weights that are not learned yet."""
        shadow, (count, length) = self.shadow, ours[self.frame].shape[:2]
        rng = np.random.default_rng((self.context.options.seed, 53))
        picks: list[tuple[int, int, Any]] = [(int(k) // length, int(k) % length, rng.random(2))
                                             for k in rng.permutation(count * length)[:COLUMNS]]

        def given(k: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            s, t, _ = picks[k]
            own, exact = ({n: store[n][s, t].to(self.device) for n in names}
                          for store, names in ((ours, block.reads), (floats, block.float_reads)))
            return own, exact

        twins = {v.name: node for node in self.exact.graph.nodes for v in node.outputs}
        layers = []
        for node in shadow.graph.nodes:
            name = weights.get(node.inputs[1].name) if len(node.inputs) > 1 else None
            if name is not None and name not in self.learned and len(node.inputs[1].outputs) == 1:
                layers.append((node, twins.get(self.sources[node.outputs[0].name]), name))
        round_layers(shadow, self.exact, layers, Frames(given, [p[2] for p in picks]),
                     lambda: shadow.run({}, self._fixed(block)), self.lanes, biased="bias" in recipe.learn,
                     scaled="weight_scale" in recipe.learn)

    def _descend(self, block: _Block, learned: list[Parameter], soft: list[SoftRounding], floats: dict[str, Tensor],
                 ours: dict[str, Tensor], recipe: BlockRecipe, key: str, place: tuple[int, int],
                 share: float) -> None:
        effort, seed = self.context.options.effort, self.context.options.seed
        iterations = effort.block_iterations
        optimizer = Adam(learned, {kind: rate * share for kind, rate in recipe.rates_for(iterations).items()})
        for p in learned:
            p.parameter.requires_grad_()
        count, length = ours[self.frame].shape[:2]
        rng = np.random.default_rng((seed, *map(int, key.split("-")[1:])))
        frames, size = max(LANES, effort.block_batch), ITEM if self.batchable and not block.states else 1
        for step in range(iterations):
            picked: list[tuple[int, int | None]]
            if block.states:
                picked = [(int(s), None) for s in rng.permutation(count)[:max(LANES, frames // length)]]
            else:
                picked = [(int(k) // length, int(k) % length) for k in rng.permutation(count * length)[:frames]]
            progress = max(0.0, (step / iterations - 0.2) / 0.8)
            sharpness = 20.0 - 18.0 * progress if step >= 0.2 * iterations else 0.0
            parts = max(LANES, math.ceil(len(picked) / size))
            items = [picked[k::parts] for k in range(parts)]

            def loss(item: list[tuple[int, int | None]], sharpness: float = sharpness) -> Tensor:
                total = self._error(block, item, floats, ours, recipe.drop if not recipe.separate else 0.0)
                for rounding in soft if sharpness else ():
                    total = total + recipe.rounding_weight * rounding.undecided(sharpness)
                return total

            self.lanes.gradients(loss, [i for i in items if i], [p.parameter for p in learned],
                                 seed * 100003 + place[0] * 50021 + step)
            cosine = 0.5 * (1.0 + math.cos(math.pi * step / iterations))
            # rounding is decided at the end, when the regulariser is sharpest
            optimizer.step(cosine, constant=("rounding",))
            self.context.progress(f"block {place[0] + 1} of {place[1]}",
                                  (place[0] + (step + 1) / iterations) / place[1])
        for p in learned:
            p.parameter.requires_grad_(False)

    def _error(self, block: _Block, item: list[tuple[int, int | None]], floats: dict[str, Tensor],
               ours: dict[str, Tensor], drop: float) -> Tensor:
        """Mean squared error, summed over channels, of what leaves the block."""
        def read(store: dict[str, Tensor], name: str, t: int | None) -> Tensor:
            return torch.cat([store[name][s, t if frame is None else frame] for s, frame in item]).to(self.device)

        times: Sequence[int | None] = range(ours[self.frame].shape[1]) if item[0][1] is None else (None,)
        held = self.shadow.run({}, self._fixed(block)) if len(times) > 1 else {}
        carried: dict[str, Tensor] = {}
        total = torch.zeros(())
        for t in times:
            given = {}
            for name in block.reads:
                value = carried.get(name)
                if value is None:
                    value = read(ours, name, t)
                    if drop > 0.0 and name not in self.states and name != self.frame and value.is_floating_point():
                        value = mixed(value, read(floats, self.sources.get(name, name), t), drop)
                given[name] = value
            made = self.shadow.run({**held, **given}, block.gives)
            carried = {i: made[o] for i, o in block.states.items()}
            for name, target in block.taught:
                off = (made[name] - read(floats, target, t)).square()
                total = total + block.shares[name] * off.sum() * (off.shape[1] if off.ndim > 1 else 1) / off.numel()
        return total / len(times)

    def _fixed(self, block: _Block) -> tuple[str, ...]:
        if block.fixed is None:
            wanted = self.shadow.needed(block.reads, block.gives)
            block.fixed = tuple(n for n in self.shadow.fixed_values() if n in wanted)
        return block.fixed

    @torch.no_grad()
    def _loss(self, block: _Block, floats: dict[str, Tensor], ours: dict[str, Tensor]) -> float:
        """The block's error relative to the power of what its float self gives, over a few sequences."""
        length = ours[self.frame].shape[1]
        count = min(4, ours[self.frame].shape[0])
        items = [[(s, None)] if block.states else [(s, t)] for s in range(count) for t in range(length)][:8]
        powers = sum(_power(floats[n][:count]) for _, n in block.taught)
        errors = self.lanes.map(lambda item: float(self._error(block, item, floats, ours, 0.0)), items)
        return float(np.mean(errors)) / max(powers, 1e-12)


class _Block:
    """The edges of a block: what enters and leaves it; of that, what is no index or mask, with its name in the float
    network; states; what enters it there; what each error counts for."""

    def __init__(self, reads: tuple[str, ...], gives: tuple[str, ...], taught: list[tuple[str, str]],
                 states: dict[str, str], float_reads: tuple[str, ...], shares: dict[str, float]) -> None:
        self.reads, self.gives, self.taught, self.states = reads, gives, taught, states
        self.float_reads, self.shares = float_reads, shares
        self.fixed: tuple[str, ...] | None = None


def _power(values: Tensor) -> float:
    """The mean square of values [S,T,N,C,...], summed over channels."""
    return float(values.square().mean()) * values.shape[3 if values.ndim > 3 else -1]


def _unchanged(x: Tensor) -> Tensor:
    return x


def _own(quantizer: Callable[[Tensor], Tensor]) -> FakeQuantize:
    assert isinstance(quantizer, FakeQuantize)
    return quantizer


def _quantizers_of(shadow: Shadow, nodes: set[str]) -> tuple[dict[str, str], list[str]]:
    """Of a block: dequantized weights with the constants behind them, and dequantized activations."""
    weights, activations = dict[str, str](), list[str]()
    for node in shadow.graph.nodes:
        name = node.outputs[0].name
        if node.name not in nodes or name not in shadow.quantizers:
            continue
        value = node.inputs[0].inputs[0].inputs[0]
        if not isinstance(value, Constant):
            activations.append(name)
        elif isinstance(shadow.quantizers[name], FakeQuantize) and _own(shadow.quantizers[name]).spec.signed:
            weights[name] = value.name
    return weights, activations


def _with_quantizers(graph: Graph, blocks: Sequence[Any]) -> list[tuple[set[str], set[str]]]:
    """Each block's nodes with the quantizers that belong to it, beside its nodes in the float graph."""
    grouped: list[tuple[set[str], set[str]]] = [(set(), set(block.nodes)) for block in blocks]
    for name, index in homes(graph, [block.nodes for block in blocks]).items():
        grouped[index][0].add(name)
    return grouped


def _float_names(graph: Graph, renamed: dict[str, str]) -> dict[str, str]:
    """What each value of the quantized graph stands for in the float one."""
    return {v.name: renamed.get(s.name, s.name) for v in graph.values() for s in [float_source(v)]}
