"""A model in ONNX Runtime that carries its recurrent state over a clip.

Which input is the frame and which outputs are alpha and foreground follows from shapes: the frame is the
input [1,3,H,W] that is no state, alpha the output of the frame's size with one channel, the foreground the one with
three. A state is taken for one of them only if no other output is like that (some nets feed back their last alpha).

No state is copied between frames: ONNX Runtime hands its outputs out as arrays over its own memory, and reads what it
is fed where it lies. (Measured from 1.24 on: binding inputs and outputs by hand, into buffers made once, is no faster.)
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from vmq import processes
from vmq.clips import Clip, to_float
from vmq.errors import MediaError, ModelError, OptionError
from vmq.graph import Graph
from vmq.proto import FOUR_BIT
from vmq.quant import quantize
from vmq.spec import Normalization, QuantSpec, check_size
from vmq.states import DataFlow, StatePair, pair_states

NOT_ON_UINT4 = frozenset({"MaxPool", "ReduceMax", "ReduceMin"})
"""What ONNX Runtime puts before the DequantizeLinear that it reads, and has no kernel for on 4-bit integers."""
REUSES_FOUR_BIT = tuple(map(int, ort.__version__.split(".")[:2])) >= (1, 31)
"""ONNX Runtime before 1.31 puts 8-bit tensors into the memory of 4-bit ones, which is half as large."""
STATES_KEY = "vmq.states"
"""Metadata key under which a compiled model names its state pairs, as JSON {input: output}."""

GRIDS_KEY = "vmq.quantized_states"
"""Metadata key for states that are uint8, as JSON {input: {"scale": s, "zero_point": z}}; the first state is all z."""

NORMALIZATION_KEY = "vmq.normalization"
"""Metadata key of models that take (frame - mean) / std, as JSON {"mean": [m], "std": [s]}, one number or three."""

FIRST_ALPHA_KEY = "vmq.first_alpha"
"""Metadata key of models that are told whom to follow: the state that holds the first frame's alpha before it."""

RATIO_PIXELS = 512
"""A model with a downsample ratio works on frames whose longer side has this many pixels, if not told otherwise."""

Array = NDArray[Any]

ort.set_default_logger_severity(3)

_STATE = QuantSpec(8, signed=False)
_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}


def default_ratio(size: tuple[int, int]) -> float:
    """The downsample ratio for frames of `size` (H, W): it brings the longer side down to RATIO_PIXELS."""
    return min(1.0, RATIO_PIXELS / max(size))


class Session:
    """One model, ready to run frame after frame.

    Args:
        model: a file, a serialized model, or a graph.
        threads: intra-op threads; 0 leaves the choice to ONNX Runtime.
        optimize: all graph optimizations, or none (the arithmetic as the graph is written).
        downsample_ratio: fed to an input for it, where the model has one.
        extra: names of further values to hand out as outputs.
        pairs: state pairs by hand; default: the model's metadata, or else its topology.
        device: see `create_session`.
        normalization: what the model takes, where its metadata do not say; default: RGB in 0..1.
        first_alpha: alpha of the first frame after every `reset`, uint8 [H,W], for models that are told it.

    Raises:
        ModelError: the model cannot be read or run, or has no input that takes a frame, or takes only a huge one.
    """

    def __init__(self, model: str | os.PathLike[str] | bytes | Graph, *, threads: int = 0, optimize: bool = True,
                 downsample_ratio: float = 1.0, extra: Sequence[str] = (),
                 pairs: Mapping[str, str] | None = None, device: str = "cpu",
                 normalization: Normalization | None = None, first_alpha: NDArray[np.uint8] | None = None) -> None:
        self.label = "model" if isinstance(model, (bytes, Graph)) else str(model)
        graph = model if isinstance(model, Graph) else Graph.load(model)
        self.state_pairs = pairs_of(graph, pairs)
        self._session = create_session(graph, threads=threads, optimize=optimize, extra=extra, label=self.label,
                                       device=device)
        self._states = {p.input: p.output for p in self.state_pairs}
        self._grids = state_grids(graph)
        self.normalization = normalization_of(graph) or normalization
        self.first_alpha_input = first_alpha_of(graph, self.state_pairs)
        self._first_alpha = first_alpha
        self._types = {i.name: _TYPES.get(i.type) for i in self._session.get_inputs()}
        self._shapes = {i.name: [d if isinstance(d, int) else None for d in i.shape]
                        for i in self._session.get_inputs()}
        self.frame_input = self._find_frame()
        if wrong := check_size(self.size):
            raise ModelError(f"{self.label} is made for frames of {self.size[1] or 'any'}x{self.size[0] or 'any'}, and "
                             f"that is more than vmq takes: {wrong}; export it for a smaller size")
        loose = any(d is None for name in self._states for d in self._shapes[name])
        self._loose = graph.copy() if loose else None
        self._constants = self._find_constants(downsample_ratio)
        unsaid = set(self._constants) - set(pairs or {}) if STATES_KEY not in graph.metadata else set[str]()
        if unsaid:
            self._refuse_state(graph, unsaid)
        self.downsample_ratio = downsample_ratio
        self.output_names = [o.name for o in self._session.get_outputs()]
        states = set(self._states.values())
        self._candidates = sorted((o.name for o in graph.outputs), key=states.__contains__)
        self._pictures: dict[int, str] = {}
        self.reset()

    @property
    def constant_inputs(self) -> list[str]:
        """Inputs that are fed the downsample ratio at every frame."""
        return list(self._constants)

    @property
    def size(self) -> tuple[int | None, int | None]:
        """(H, W) that the model takes; None where it takes any."""
        height, width = self._shapes[self.frame_input][2:]
        return height, width

    @property
    def takes_ratio(self) -> bool:
        """Whether the model has an input for a downsample ratio."""
        return bool(self._constants)

    @property
    def downsample_ratio(self) -> float:
        """The ratio fed to such an input, above 0 to 1; OptionError for another."""
        return self._ratio

    @downsample_ratio.setter
    def downsample_ratio(self, ratio: float) -> None:
        if not 0.0 < ratio <= 1.0:
            raise OptionError(f"--downsample-ratio {ratio} is out of range; give above 0 to 1")
        self._ratio = ratio
        self._constants = {name: np.full_like(value, ratio) for name, value in self._constants.items()}

    def reset(self, first_alpha: NDArray[np.uint8] | None = None) -> None:
        """Back to the state before the first frame: zeros (1x1x1x1 where the model takes any shape).

        Args:
            first_alpha: the first frame's alpha, uint8 [H,W], for models that are told by it whom to follow
                (`first_alpha_input`); others do not look at it. Default: what the session was made with.
        """
        state = {name: np.zeros([1 if d is None else d for d in self._shapes[name]], self._types[name] or np.float32)
                 for name in self._states}
        alpha = self._first_alpha if first_alpha is None else first_alpha
        if self.first_alpha_input is not None and alpha is not None:
            kind = state[self.first_alpha_input].dtype
            state[self.first_alpha_input] = to_float(alpha)[None, None].astype(kind)
        self.state: dict[str, Array] = self.encode(state)
        self._first = self.state

    def told(self, clip: Clip) -> NDArray[np.uint8] | None:
        """A clip's first alpha for `reset`, if the model is told it and it is known; else None, and nothing is read."""
        return clip.first_alpha() if self.first_alpha_input is not None else None

    def encode(self, state: Mapping[str, Array]) -> dict[str, Array]:
        """States of another model of the same network as this one takes them: quantized, if here and not there."""
        return {name: quantize(values, *self._grids[name], _STATE).astype(np.uint8)
                if name in self._grids and values.dtype != np.uint8 else values for name, values in state.items()}

    def step(self, frame: NDArray[np.uint8]) -> dict[str, Array]:
        """Run one frame, uint8 [3,H,W] RGB, and keep the new state. Returns all outputs by name, [1,C,H,W].

        Raises:
            MediaError: the frame is not of the size that the model takes.
            ModelError: the model does not run at this size.
        """
        height, width = self.size
        if frame.ndim != 3 or frame.shape[0] != 3 or height not in (None, frame.shape[1]) \
                or width not in (None, frame.shape[2]):
            raise MediaError(f"{self.label} takes frames of {width or 'any'}x{height or 'any'}, got "
                             f"{frame.shape[-1]}x{frame.shape[-2]}; resize the frames, or compile for that size")
        return self.feed(to_float(frame)[None])

    def feeds(self, frame: NDArray[Any]) -> dict[str, Array]:
        """What the next step feeds: the frame (uint8 [3,H,W], or float32 [1,3,H,W] in 0..1), states, constants."""
        if frame.dtype == np.uint8:
            frame = to_float(frame)[None]
        frame = self.normalized(frame)
        return {self.frame_input: frame.astype(self._types[self.frame_input] or np.float32, copy=False),
                **self.state, **self._constants}

    def normalized(self, frames: NDArray[np.float32]) -> NDArray[np.float32]:
        """Frames [...,3,H,W] in 0..1 as the model takes them."""
        return frames if self.normalization is None else self.normalization(frames)

    def feed(self, frame: NDArray[np.float32]) -> dict[str, Array]:
        """As `step`, with a frame of float32 [1,3,H,W] in 0..1."""
        feeds = self.feeds(frame)
        try:
            results = self._session.run(None, feeds)
        except Exception as error:  # onnxruntime raises bare classes of its own
            sized = self._sized_states(frame.shape) if self.state is self._first else None
            try:
                if sized is None:
                    raise
                results = self._session.run(None, feeds | sized)
            except Exception:
                raise ModelError(f"{self.label} does not run at {frame.shape[3]}x{frame.shape[2]}: "
                                 f"{' '.join(str(error).split())[:300]}") from error
        outputs = dict(zip(self.output_names, results, strict=True))
        self.state = {name: outputs[source] for name, source in self._states.items()}
        if not self._pictures:
            for name in self._candidates:
                if outputs[name].ndim == 4 and outputs[name].shape[2:] == frame.shape[2:]:
                    self._pictures.setdefault(outputs[name].shape[1], name)
        return outputs

    def alpha_of(self, outputs: Mapping[str, Array]) -> NDArray[np.float32]:
        """Alpha out of what `step` returned: float32 [H,W] in 0..1; ModelError where the model has none."""
        if 1 not in self._pictures:
            raise ModelError(f"{self.label} has no output [1,1,H,W] of the frame's size that could be alpha; "
                             f"its outputs are {', '.join(f'{n} {[*outputs[n].shape]}' for n in self._candidates)}")
        return np.clip(outputs[self._pictures[1]][0, 0].astype(np.float32), 0.0, 1.0)

    def foreground_of(self, outputs: Mapping[str, Array]) -> NDArray[np.float32] | None:
        """Foreground out of what `step` returned: float32 [3,H,W] in 0..1; None where the model has none."""
        if 3 not in self._pictures:
            return None
        return np.clip(outputs[self._pictures[3]][0].astype(np.float32), 0.0, 1.0)

    def pictures(self) -> dict[int, str]:
        """Names of the outputs of the frame's size by their channels: 1 alpha, 3 foreground (of a static model).

        Raises:
            ModelError: there is no alpha, or the model does not run.
        """
        height, width = (n or 288 for n in self.size)
        state = self.state
        outputs = self.feed(np.zeros((1, 3, height, width), np.float32))
        self.state = state
        self.alpha_of(outputs)
        return dict(self._pictures)

    def alphas(self, frames: Iterable[NDArray[np.uint8]], first_alpha: NDArray[np.uint8] | None = None,
               ) -> Iterator[NDArray[np.float32]]:
        """Alpha of each frame of a clip in closed loop from the state of `reset`: float32 [H,W] in 0..1."""
        self.reset(first_alpha)
        for frame in frames:
            yield self.alpha_of(self.step(frame))

    def _sized_states(self, frame: Sequence[int]) -> dict[str, Array] | None:
        """Zeros of the shapes that states have with frames [1,3,H,W], as far as the graph tells; None if it does not.

        For models that take states of any size, but of the right one from the first frame on.
        """
        if self._loose is None:
            return None
        graph = self._loose.copy()
        next(v for v in graph.inputs if v.name == self.frame_input).shape = list(frame)
        try:
            graph.infer_shapes()
        except ModelError:
            return None
        shapes = {v.name: list(v.shape or ()) for v in graph.outputs}
        sizes = {name: shapes[source] for name, source in self._states.items()}
        if not all(isinstance(d, int) for shape in sizes.values() for d in shape):
            return None
        return {name: np.zeros(shape, self._types[name] or np.float32) for name, shape in sizes.items()
                if list(self.state[name].shape) != shape}

    def _find_frame(self) -> str:
        frames = [n for n, shape in self._shapes.items()
                  if n not in self._states and len(shape) == 4 and shape[0] in (1, None) and shape[1] in (3, None)
                  and self._types[n]]
        exact = [n for n in frames if self._shapes[n][1] == 3]
        if not frames:
            raise ModelError(f"{self.label} has no input [1,3,H,W] for a frame; its inputs are "
                             f"{', '.join(f'{n} {s}' for n, s in self._shapes.items())}")
        return (exact or frames)[0]

    def _find_constants(self, ratio: float) -> dict[str, Array]:
        constants = {}
        for name, shape in self._shapes.items():
            if name == self.frame_input or name in self._states:
                continue
            if self._types[name] is None or len(shape) > 1 or any(d not in (1, None) for d in shape):
                raise ModelError(f"{self.label}: input {name} {shape} is neither frame, state nor downsample ratio; "
                                 "if it is a state, say with which output it goes: --pair IN=OUT")
            constants[name] = np.full([1] * len(shape), ratio, self._types[name])
        return constants


    def _refuse_state(self, graph: Graph, ratios: set[str]) -> None:
        """Raise ModelError for a single number that an output may be the next one of: it may be a state that counts."""
        flow, states = DataFlow(graph), set(self._states.values())
        for source in [v for v in graph.inputs if v.name in ratios]:
            for target in [v for v in graph.outputs if v.name not in states and v.dtype == source.dtype
                           and v.shape is not None and list(v.shape) == list(source.shape or ())]:
                if flow.between(source, target):
                    name = source.name
                    raise ModelError(f"{self.label}: input {name} {self._shapes[name]} may be a state that output "
                                     f"{target.name} is the next one of, or a downsample ratio; say which: --pair "
                                     f"{name}={target.name}, or --pair {name}= for the ratio")


def pairs_of(graph: Graph, pairs: Mapping[str, str] | None) -> tuple[StatePair, ...]:
    """The states of a model: those that its metadata name, or else those that `pair_states` finds.

    Args:
        graph: the model.
        pairs: pairs by hand; then the metadata do not count.

    Raises:
        ModelError: the metadata are damaged, or the states cannot be told.
        OptionError: as `pair_states`.
    """
    if GRIDS_KEY in graph.metadata or (not pairs and STATES_KEY in graph.metadata):
        try:
            found = tuple(StatePair(str(i), str(o)) for i, o in dict(json.loads(graph.metadata[STATES_KEY])).items())
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise _damaged(graph, STATES_KEY) from error
        inputs, outputs = {v.name for v in graph.inputs}, {v.name for v in graph.outputs}
        for pair in found:
            if pair.input not in inputs or pair.output not in outputs:
                raise ModelError(f"the model's metadata {STATES_KEY} is damaged: it names {pair.input} and "
                                 f"{pair.output}, which are not both in the model")
        return found
    return pair_states(graph, pairs)


def _damaged(graph: Graph, key: str) -> ModelError:
    """What to say of metadata that are not what they should be."""
    wanted = {STATES_KEY: '{"input": "output"}', NORMALIZATION_KEY: '{"mean": [0.5], "std": [0.5]}',
              GRIDS_KEY: '{"input": {"scale": 0.1, "zero_point": 0}} with inputs of the model'}[key]
    return ModelError(f"the model's metadata {key} is damaged: {graph.metadata.get(key, '')[:60]!r} instead of "
                      f"something like {wanted}; export or compile the model again")


def state_grids(graph: Graph) -> dict[str, tuple[float, int]]:
    """Scale and zero point of the states that are uint8, by the names of their inputs.

    Raises:
        ModelError: what the metadata say of them is damaged.
    """
    inputs = {v.name for v in graph.inputs}
    try:
        grids = {str(name): (float(g["scale"]), int(g["zero_point"]))
                 for name, g in dict(json.loads(graph.metadata.get(GRIDS_KEY, "{}"))).items()}
        if not all(name in inputs and scale > 0.0 and 0 <= zero <= 255 for name, (scale, zero) in grids.items()):
            raise ValueError
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _damaged(graph, GRIDS_KEY) from error
    return grids


def normalization_of(graph: Graph) -> Normalization | None:
    """What a model takes instead of RGB in 0..1, by its metadata; None where they do not say.

    Raises:
        ModelError: what they say is damaged.
    """
    said = graph.metadata.get(NORMALIZATION_KEY)
    try:
        return None if said is None else Normalization(**{k: tuple(map(float, v)) for k, v in json.loads(said).items()})
    except (ValueError, TypeError, AttributeError, OptionError, RecursionError) as error:
        raise _damaged(graph, NORMALIZATION_KEY) from error


def first_alpha_of(graph: Graph, pairs: Sequence[StatePair]) -> str | None:
    """The state that is the first frame's alpha before it, by a model's metadata; None for models without such.

    Raises:
        ModelError: the metadata name what is no state [1,1,H,W].
    """
    name = graph.metadata.get(FIRST_ALPHA_KEY)
    shapes: dict[str, Any] = {v.name: v.shape or () for v in graph.inputs if v.name in {p.input for p in pairs}}
    if name is not None and (len(shapes.get(name, ())) != 4 or shapes[name][1] != 1):
        raise ModelError(f"the model's metadata {FIRST_ALPHA_KEY} name {name}, which is no state [1,1,H,W]; its states "
                         f"are {', '.join(f'{n} {[*s]}' for n, s in shapes.items()) or 'none'}")
    return name


def check_first_alpha(name: str | None, clip: Clip) -> None:
    """Raise MediaError for a clip without alpha where a state called `name` takes the first frame's."""
    if name is not None and not clip.has_alpha:
        raise MediaError(f"the model is told whom to follow by the first frame's alpha (state {name}), and {clip.name} "
                         "has none; give footage with alpha, in folders com/ and pha/")


def create_session(graph: Graph, *, threads: int = 0, optimize: bool = True, extra: Sequence[str] = (),
                   label: str = "model", device: str = "cpu") -> Any:
    """A bare onnxruntime.InferenceSession of a graph, with the values called `extra` as further outputs.

    On the device "cuda" nodes run on the GPU as far as the installed ONNX Runtime can, the others on the CPU.

    Raises:
        ModelError: ONNX Runtime does not take the graph.
        OptionError: `threads` is negative.
    """
    if threads < 0:
        raise OptionError(f"--threads {threads}: give 0 (all) or more")
    options = ort.SessionOptions()
    options.graph_optimization_level = (ort.GraphOptimizationLevel.ORT_ENABLE_ALL if optimize
                                        else ort.GraphOptimizationLevel.ORT_DISABLE_ALL)
    options.intra_op_num_threads = threads or processes.threads()
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")   # several sessions share the cores
    proto = graph.to_proto()
    present = {o.name for o in proto.graph.output}
    proto.graph.output.extend(onnx.ValueInfoProto(name=n) for n in dict.fromkeys(extra) if n not in present)
    options.enable_mem_reuse = REUSES_FOUR_BIT or not any(c.dtype in FOUR_BIT for c in graph.constants())
    four_bit = any(c.dtype == np.dtype(ml_dtypes.uint4) for c in graph.constants())
    disabled = ["ClipQuantRewrite"] if four_bit else []       # it throws where it meets a 4-bit zero point
    if four_bit and any(n.op in NOT_ON_UINT4 for n in graph.nodes):
        disabled.append("QDQSelectorActionTransformer")
    providers = list[Any]()
    if device == "cuda" and "CUDAExecutionProvider" in ort.get_available_providers():
        providers = [("CUDAExecutionProvider", {"device_id": processes.gpu()})]
    try:
        return ort.InferenceSession(proto.SerializeToString(), options, providers=[*providers, "CPUExecutionProvider"],
                                    disabled_optimizers=disabled)
    except Exception as error:  # onnxruntime raises bare classes of its own
        raise ModelError(f"{label} cannot be loaded by ONNX Runtime {ort.__version__}: "
                         f"{' '.join(str(error).split())[:300]}") from error
