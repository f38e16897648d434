"""Calibrate the whole network, unrolled in time, on its own alpha: PTQ4VM's second stage, and ours.

Streams of frames run through the float network (the teacher) and the quantized one side by side, each from its own
state. A step takes the next few frames of some streams, sends gradients back through these, and leaves the new states
for the stream's next turn (truncated backpropagation through time): the states are warm, and they are the quantized
network's own. The loss is a weighted sum of

    l1          mean |p - t|                                  p alpha, t the teacher's or the true one
    laplacian   sum over levels k of 2^k mean |L_k(p - t)|    (Hou and Liu 2019, as in RVM's training)
    mse         mean (p - t)^2                                (PTQ4VM's GAC)
    temporal    mean ((p_n - p_n-1) - (t_n - t_n-1))^2        (RVM's training)
    state       mean (h' - h)^2 / E h^2                       every recurrent state
    foreground  mean |f' - f|
    flow        mean |p_n - warp(p_n-1)|                      (PTQ4VM's OFA, vmq/flow.py)

`affine` is PTQ4VM's global affine calibration: y = gamma * conv(x) + beta for every layer, rounding frozen. gamma goes
into weight scale and bias and beta into the bias when the pass ends, so the graph stays what it was, Q, DQ and layers.
The other kinds are constants of the graph already (vmq/learning.py).

A short unrolled loss on crops sees neither a recurrence that drifts nor whole frames. So every now and then, and at
the end, ONNX Runtime runs the graph over clips as they are, in closed loop from the zero state, and the parameters
with the least error there are kept; those before the first step are among them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from vmq import processes
from vmq.clips import Clip
from vmq.crops import Crops, crop_graph
from vmq.errors import PassError
from vmq.flow import consistent, flows, open_flow, temporal_loss
from vmq.graph import Constant, Graph
from vmq.lanes import Lanes
from vmq.learning import Adam, Parameter, assign, coarse, parameters
from vmq.pipeline import Context, Pass, PassResult
from vmq.recipe import NetworkRecipe
from vmq.runtime import Session, create_session
from vmq.shadow import Shadow

LEVELS = 4
"""Levels of the Laplacian pyramid."""
GATE_CLIPS = 4
"""Clips that are run in closed loop."""
STREAMS = 8
"""Streams that take turns."""
WARM_UP = 10
"""Steps over which rates grow to their full size, at most a tenth of all."""
LONGEST = 1.0
"""Gradients of weights are scaled down to this norm."""


class CalibrateNetwork(Pass):
    """Learn what is left end to end: alpha, states and flicker, unrolled from the network's own warm states."""

    name: ClassVar[str] = "calibrate_network"

    def requires(self, graph: Graph, context: Context) -> None:
        if context.reference is None:
            raise PassError("there is no float reference; run insert_qdq before")

    def run(self, graph: Graph, context: Context) -> PassResult:
        recipe = context.options.recipe.network
        if recipe is None:
            return PassResult()
        with Lanes(context.options.device) as lanes:
            work = _Calibration(graph, context, recipe, lanes)
            report = work.run()
        return PassResult(modified=assign(graph, work.shadow.graph), report=report)


@dataclass(frozen=True)
class _Affine:
    """gamma and beta of one layer, and the names of what they scale and shift."""

    gamma: nn.Parameter
    beta: nn.Parameter
    weight: str
    dequantized: str
    scale: str
    bias: str | None


class _Stream:
    """A sequence that is run on with every turn, and where it stands in it."""

    def __init__(self, number: int) -> None:
        self.number, self.place = number, 0
        self.frames = torch.empty(0)
        self.truth: Tensor | None = None
        self.ours: dict[str, Tensor] = {}
        self.theirs: dict[str, NDArray[Any]] = {}


class _Calibration:
    def __init__(self, graph: Graph, context: Context, recipe: NetworkRecipe, lanes: Lanes) -> None:
        assert context.reference is not None
        self.context, self.recipe, self.lanes, self.graph = context, recipe, lanes, graph.copy()
        session = Session(context.reference, optimize=False, pairs=context.options.pairs)
        pictures = session.pictures()
        self.normalized, self.first_alpha = session.normalized, session.first_alpha_input
        self.labelled = recipe.teacher == "alpha" or self.first_alpha is not None
        self.frame, self.states = session.frame_input, {p.input: p.output for p in session.state_pairs}
        self.alpha, self.foreground = pictures[1], pictures.get(3)
        teacher = crop_graph(context.reference, self.frame)
        self.device = context.options.device
        self.shadow = Shadow(crop_graph(graph, self.frame), self.device)
        size = next(v.shape for v in teacher.inputs if v.name == self.frame)[2:]
        self.crops = Crops(context.footage or context.clips, (size[0], size[1]), context.options.seed + 1)
        self.start = {v.name: torch.zeros(v.shape, device=self.device) for v in self.shadow.graph.inputs
                      if v.name in self.states}
        self.outputs = tuple(dict.fromkeys((self.alpha, *self.states.values(), *(
            (self.foreground,) if self.foreground and recipe.foreground else ()))))
        self.teacher = create_session(teacher, threads=1, device=self.device)
        self.powers: dict[str, float] = {}
        self.streams = [_Stream(k) for k in range(STREAMS)]
        self.affine = _affines(self.shadow) if "affine" in recipe.learn else []
        self.learned = parameters(self.shadow, set(recipe.learn) - {"affine"})
        for layer in self.affine:
            self.learned += [Parameter("affine", "", layer.gamma, torch.ones(())),
                             Parameter("affine", "", layer.beta, torch.ones(()))]
        self.flow = open_flow("dis") if recipe.flow else None

    def run(self) -> dict[str, Any]:
        """Learn; returns the report."""
        effort, recipe = self.context.options.effort, self.recipe
        steps = effort.steps
        rates = {"affine": recipe.affine_rate, "weight": recipe.weight_rate, "scale": recipe.scale_rate,
                 "weight_scale": recipe.weight_scale_rate, "zero": recipe.zero_rate, "bias": recipe.bias_rate}
        optimizer = Adam(self.learned, rates)
        weights = [p.parameter for p in self.learned if p.kind == "weight"]
        self._measure_states()
        goals = self._goals()
        at = sorted({round(steps * (k + 1) / effort.gates) for k in range(effort.gates)})
        first, best, history = self._resume(optimizer)
        if not history:
            history.append((0, self._gate(goals)))
            best = [p.parameter.detach().clone() for p in self.learned]
        for p in self.learned:
            p.parameter.requires_grad_()
        losses: list[float] = []
        exact = dict(self.shadow.quantizers)
        self.shadow.quantizers.update(coarse(exact))
        for step in range(first, steps):
            turn = [(step * effort.batch + k) % STREAMS for k in range(effort.batch)]
            losses.append(self.lanes.gradients(self._loss, turn, [p.parameter for p in self.learned],
                                               self.context.options.seed * 100003 + step, turn))
            nn.utils.clip_grad_norm_([w for w in weights if w.grad is not None], LONGEST)
            ramp = min(1.0, (step + 1) / min(WARM_UP, max(1, steps // 10)))
            optimizer.step(ramp * 0.5 * (1.0 + math.cos(math.pi * step / steps)))
            self.context.progress(f"loss {np.mean(losses[-20:]):.4f}", (step + 1) / steps)
            if step + 1 in at:
                history.append((step + 1, self._gate(goals)))
                if history[-1][1] <= min(h[1] for h in history):
                    best = [p.parameter.detach().clone() for p in self.learned]
                self._keep(optimizer, best, history)
        self.shadow.quantizers.update(exact)
        with torch.no_grad():
            for p, value in zip(self.learned, best, strict=True):
                p.parameter.requires_grad_(False).copy_(value)
            _absorb(self.shadow, self.affine)
        self.shadow.write_back()
        kept = min(history, key=lambda h: (h[1], -h[0]))[0]
        return {"steps": steps, "parameters": sum(p.parameter.numel() for p in self.learned), "kept_step": kept,
                "closed_loop_MAD": {str(k): v for k, v in history}}

    # -- losses -------------------------------------------------------------------------------------

    def _loss(self, index: int) -> Tensor:
        """The loss over a stream's next frames; the stream moves on."""
        recipe, stream = self.recipe, self._at_next(index)
        count = min(self.context.options.effort.unrolled, len(stream.frames))
        times = range(stream.place, stream.place + count)
        frames = stream.frames[times.start:times.stop]
        taught, stream.theirs = self._teach(frames, stream.theirs)
        held, state, total, last = self._held(), stream.ours, torch.zeros(()), None
        pairs = self._flows(frames) if self.flow is not None else None
        for t, frame in enumerate(torch.from_numpy(self.normalized(frames.numpy())).to(self.device)):
            made = self.shadow.run({**held, self.frame: frame, **state}, self.outputs)
            state = {i: made[o] for i, o in self.states.items()}
            alpha = made[self.alpha]
            off = alpha - (taught[t][self.alpha] if stream.truth is None else stream.truth[times[t]])
            if recipe.l1:
                total = total + recipe.l1 / count * off.abs().mean()
            if recipe.laplacian:
                total = total + recipe.laplacian / count * laplacian(off)
            if recipe.mse:
                total = total + recipe.mse / count * off.square().mean()
            for o in self.states.values() if recipe.state else ():
                total = total + recipe.state / count / len(self.states) / self.powers[o] * (
                    made[o] - taught[t][o]).square().mean()
            if self.foreground and recipe.foreground:
                total = total + recipe.foreground / count * (
                    made[self.foreground] - taught[t][self.foreground]).abs().mean()
            if last is not None and recipe.temporal:
                total = total + recipe.temporal / (count - 1) * (off - last[1]).square().mean()
            if last is not None and pairs is not None:
                total = total + recipe.flow / (count - 1) * temporal_loss(last[0], alpha, *pairs[t - 1])
            last = alpha, off
        stream.place += count
        stream.ours = {i: v.detach() for i, v in state.items()}
        return total

    def _flows(self, frames: Tensor) -> list[tuple[Tensor, Tensor | None]]:
        """Flow from each frame back to the one before, [1,2,h,w], and where it is to be believed."""
        pictures: NDArray[np.uint8] = (frames[:, 0] * 255.0).round().to(torch.uint8).numpy()
        assert self.flow is not None
        back = [torch.from_numpy(f)[None].to(self.device) for f in flows(self.flow, pictures)]
        if not self.recipe.occlusion:
            return [(f, None) for f in back]
        forth = [torch.from_numpy(f)[None].to(self.device) for f in flows(self.flow, pictures[::-1])[::-1].copy()]
        return [(b, consistent(b, f)) for b, f in zip(back, forth, strict=True)]

    def _at_next(self, index: int) -> _Stream:
        """The stream with some frames left, from the zero state where it begins anew."""
        stream, unrolled = self.streams[index], self.context.options.effort.unrolled
        if stream.place and stream.place + unrolled > len(stream.frames):
            stream = self.streams[index] = _Stream(stream.number + STREAMS)
        if not stream.place:
            stream.ours = self._draw(stream)
            stream.theirs = _as_arrays(stream.ours)
        return stream

    def _draw(self, stream: _Stream) -> dict[str, Tensor]:
        """Put new frames into a stream; returns the states before them."""
        length = max(self.context.options.effort.unrolled, self.recipe.length)
        short = np.random.default_rng((self.context.options.seed, 31, stream.number)).integers(1, length + 1)
        stream.frames, truth = self.crops.draw(stream.number, length, alpha=self.labelled)
        stream.truth = None if truth is None or self.recipe.teacher != "alpha" else truth.to(self.device)
        if stream.number < STREAMS:           # so that they do not all begin anew at once
            stream.frames = stream.frames[:max(self.context.options.effort.unrolled, int(short))]
        return self._first(truth)

    def _first(self, truth: Tensor | None) -> dict[str, Tensor]:
        """The states before a sequence with this alpha, [T,1,1,h,w]."""
        if truth is None or self.first_alpha is None:
            return dict(self.start)
        return self.start | {self.first_alpha: truth[0].to(self.device)}

    def _teach(self, frames: Tensor, state: dict[str, NDArray[Any]],
               ) -> tuple[list[dict[str, Tensor]], dict[str, NDArray[Any]]]:
        """What the teacher gives in each frame, and the state that it ends in."""
        taught = []
        for frame in self.normalized(frames.numpy()):
            made = dict(zip(self.outputs, self.teacher.run(self.outputs, {self.frame: frame, **state}),
                            strict=True))
            state = {i: made[o] for i, o in self.states.items()}
            taught.append({n: torch.from_numpy(v).to(self.device) for n, v in made.items()})
        return taught, state

    def _measure_states(self) -> None:
        """Note the power of the teacher's states."""
        def powers(stream: _Stream) -> dict[str, float]:
            length = max(8, self.context.options.effort.unrolled)
            frames, truth = self.crops.draw(stream.number, length, alpha=self.labelled)
            taught, _ = self._teach(frames, _as_arrays(self._first(truth)))
            return {name: float(np.mean([float(m[name].square().mean()) for m in taught]))
                    for name in self.states.values()}

        for found in processes.together([powers(s) for s in processes.mine(self.streams[:GATE_CLIPS])]):
            for name, power in found.items():
                self.powers[name] = self.powers.get(name, 1e-12) + power / GATE_CLIPS

    # -- gates --------------------------------------------------------------------------------------

    def _goals(self) -> list[tuple[Clip, list[NDArray[np.float32]]]]:
        """Clips that this process looks at closed-loop error on, with the alpha to aim at in each frame."""
        assert self.context.reference is not None
        footage = [c for c in self.context.footage or self.context.clips if len(c)]
        clips = footage[::max(1, len(footage) // GATE_CLIPS)][:GATE_CLIPS]
        length = max(4, self.context.options.effort.loop_frames // len(clips))
        teacher = Session(self.context.reference, pairs=self.context.options.pairs)
        goals = []
        for clip in (c.part(0, min(len(c), length)) for c in processes.mine(clips)):
            truth = clip.alpha() if self.recipe.teacher == "alpha" else None
            goals.append((clip, [a.copy() for a in teacher.alphas(clip.frames(), teacher.told(clip))] if truth is None
                          else [(t / np.float32(255.0)).astype(np.float32) for t in truth]))
        return goals

    def _gate(self, goals: Sequence[tuple[Clip, list[NDArray[np.float32]]]]) -> float:
        """Mean |p - t| x 1e3 of the graph with what is learned so far, in closed loop from the zero state."""
        with torch.no_grad():
            held = {n: self.shadow.parameter(n).detach().clone() for layer in self.affine
                    for n in (layer.weight, layer.scale, layer.bias) if n is not None}
            _absorb(self.shadow, self.affine)
        self.shadow.write_back()
        assign(self.graph, self.shadow.graph)
        with torch.no_grad():
            for name, value in held.items():
                self.shadow.parameter(name).copy_(value)
        session = Session(self.graph, pairs=self.context.options.pairs)
        errors = [np.mean([np.abs(a - t).mean() for a, t in zip(
            session.alphas(clip.frames(), session.told(clip)), goal, strict=True)]) for clip, goal in goals]
        return 1e3 * float(np.mean(processes.together(errors)))

    def _held(self) -> dict[str, Tensor]:
        """Quantized weights, and what affine corrections make of them and of biases, for all frames of a sequence."""
        held = self.shadow.run({}, self.shadow.fixed_values())
        for layer in self.affine:
            held[layer.dequantized] = held[layer.dequantized] * layer.gamma
            if layer.bias is not None:
                held[layer.bias] = layer.gamma * self.shadow.parameter(layer.bias) + layer.beta
        return held

    # -- resuming -----------------------------------------------------------------------------------

    def _keep(self, optimizer: Adam, best: list[Tensor], history: list[tuple[int, float]]) -> None:
        arrays = {f"t{k}": t.cpu().numpy() for k, t in enumerate(optimizer.tensors())}
        arrays |= {f"b{k}": t.cpu().numpy() for k, t in enumerate(best)}
        own = [{"": np.array((s.number, s.place)), **{
            f"{whose}{name}": torch.as_tensor(value).cpu().numpy()
            for whose in ("ours", "theirs") for name, value in getattr(s, whose).items()}}
            for s in processes.mine(self.streams)]
        for k, stream in enumerate(processes.together(own)):
            arrays |= {f"s{k}{name}": value for name, value in stream.items()}
        self.context.checkpoint.save("network", arrays | {"history": np.array(history)})

    @torch.no_grad()
    def _resume(self, optimizer: Adam) -> tuple[int, list[Tensor], list[tuple[int, float]]]:
        saved = self.context.checkpoint.load("network")
        if saved is None:
            return 0, [], []
        history = [(int(k), float(v)) for k, v in saved["history"]]
        for k, tensor in enumerate(optimizer.tensors()):
            tensor.copy_(torch.from_numpy(saved[f"t{k}"]))
        optimizer.count = history[-1][0]
        for k in processes.mine(range(STREAMS)):
            number, place = (int(n) for n in saved[f"s{k}"])
            stream = self.streams[k] = _Stream(number)
            if place:
                self._draw(stream)
                stream.place = place
                stream.ours = {n: torch.from_numpy(saved[f"s{k}ours{n}"]).to(self.device) for n in self.start}
                stream.theirs = {n: saved[f"s{k}theirs{n}"] for n in self.start}
        best = [torch.from_numpy(saved[f"b{k}"]).to(self.device) for k in range(len(self.learned))]
        return history[-1][0], best, history


def _as_arrays(state: Mapping[str, Tensor]) -> dict[str, NDArray[np.float32]]:
    return {name: value.cpu().numpy() for name, value in state.items()}


def laplacian(off: Tensor) -> Tensor:
    """sum over levels k of 2^k mean |L_k|, of the Laplacian pyramid of a picture [N,C,H,W], rest included."""
    total, current = torch.zeros(()), off
    for level in range(LEVELS):
        if min(current.shape[2:]) < 2:
            break
        smaller = F.avg_pool2d(current, 2)
        band = current - F.interpolate(smaller, current.shape[2:], mode="bilinear")
        total = total + 2.0 ** level * band.abs().mean()
        current = smaller
    return total + 2.0 ** LEVELS * current.abs().mean()


def _affines(shadow: Shadow) -> list[_Affine]:
    """gamma and beta for every layer with a quantized constant weight that it shares with no other."""
    found = []
    for node in shadow.graph.nodes:
        source = node.inputs[1].inputs if len(node.inputs) > 1 else []
        if node.op in ("QuantizeLinear", "DequantizeLinear") or not source or source[0].op != "DequantizeLinear" \
                or len(node.inputs[1].outputs) != 1 or node.op not in ("Conv", "Gemm", "MatMul"):
            continue
        quantize = source[0].inputs[0].inputs[0]
        if not isinstance(quantize.inputs[0], Constant) or len(quantize.inputs[0].outputs) != 1:
            continue
        bias = node.inputs[2] if len(node.inputs) > 2 and isinstance(node.inputs[2], Constant) else None
        if len(node.inputs) > 2 if bias is None else len(bias.outputs) > 1:
            continue
        weight = shadow.parameter(quantize.inputs[0].name)
        found.append(_Affine(nn.Parameter(weight.new_ones(())), nn.Parameter(weight.new_zeros(())),
                             quantize.inputs[0].name, node.inputs[1].name, quantize.inputs[1].name,
                             None if bias is None else bias.name))
    return found


def _absorb(shadow: Shadow, layers: Sequence[_Affine]) -> None:
    """gamma into weights, their scales and biases, beta into biases: the same function without them."""
    for layer in layers:
        gamma = layer.gamma.clamp(min=1e-3)
        for name in (layer.weight, layer.scale):
            shadow.parameter(name).mul_(gamma)
        if layer.bias is not None:
            shadow.parameter(layer.bias).mul_(gamma).add_(layer.beta)
