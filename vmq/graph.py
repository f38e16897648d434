"""The graph: an ONNX model that passes can walk and edit. The only user of onnx-graphsurgeon.

A graph holds float computation, Q/DQ nodes included, in one flat list of nodes in topological order.
Constants stand beside the nodes that read them (no Constant nodes), every node and value has a unique
name, and control flow (If, Loop, Scan) is refused at the door. Names are for people: nothing in vmq
asks what a node is called.
"""

from __future__ import annotations

import heapq
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import google.protobuf.message
import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx_graphsurgeon import Constant, Node, Variable
from onnx_graphsurgeon.logger import G_LOGGER

from vmq.errors import ModelError, OutputError

__all__ = ["IR_VERSION", "OPSET", "Constant", "Graph", "Node", "Variable", "check_output", "file_size",
           "write_atomic"]

OPSET = 21
"""The opset that vmq works in: the first with 4-bit integers in QuantizeLinear."""
IR_VERSION = 10
"""The file version that goes with it; every ONNX Runtime with that opset reads it."""

LARGEST = (1 << 31) - 1
"""Bytes that protobuf, and so a model, can hold."""

_FOUR_BIT = (np.dtype(ml_dtypes.int4), np.dtype(ml_dtypes.uint4))

G_LOGGER.severity = G_LOGGER.ERROR


class Graph:
    """An ONNX model under compilation.

    Attributes:
        inputs, outputs: the model's signature, as lists of `Variable`.
        metadata: the model's metadata properties.
    """

    def __init__(self, graph: Any, metadata: dict[str, str] | None = None) -> None:
        self._graph = graph
        self.metadata: dict[str, str] = dict(metadata or {})
        self._names: set[str] | None = None
        self._name_everything()
        self.sort()

    # -- in and out ---------------------------------------------------------------------------------

    @classmethod
    def load(cls, source: str | os.PathLike[str] | bytes | onnx.ModelProto) -> Graph:
        """Read a model from a file, from bytes, or from a ModelProto (which is copied).

        Raises:
            ModelError: not a file, not ONNX, truncated, invalid, or holding control flow.
        """
        model, label = _read_proto(source)
        try:
            _refuse_unsupported(model, label)
            return cls(gs.import_onnx(_constants_as_initializers(model)),
                       {p.key: p.value for p in model.metadata_props})
        except ModelError:
            raise
        except (ValueError, KeyError, AttributeError, gs.OnnxGraphSurgeonException) as error:
            raise ModelError(f"{label}: the graph cannot be read ({_first_line(error)})") from error

    def to_proto(self) -> onnx.ModelProto:
        """The model as ONNX protobuf."""
        # onnx-graphsurgeon writes 4-bit constants unpacked: a stand-in goes out, the packed form goes in.
        packed = [t for t in self.constants() if t.dtype in _FOUR_BIT]
        values = {t.name: t.values for t in packed}
        try:
            for tensor in packed:
                tensor.values = np.zeros(1, np.int8)
            proto: onnx.ModelProto = gs.export_onnx(self._graph, do_type_check=False)
        finally:
            for tensor in packed:
                tensor.values = values[tensor.name]
        for initializer in proto.graph.initializer:
            if initializer.name in values:
                initializer.CopyFrom(onnx.numpy_helper.from_array(values[initializer.name], initializer.name))
        # A value's type is inferred again by whoever reads the file; what stands here may be out of date.
        del proto.graph.value_info[:]
        proto.ir_version = max(IR_VERSION, proto.ir_version if self.opset > OPSET else 0)
        proto.producer_name, proto.producer_version = "vmq", ""
        onnx.helper.set_model_props(proto, dict(sorted(self.metadata.items())))
        return proto

    def to_bytes(self) -> bytes:
        """The model as a file's content; the same graph gives the same bytes."""
        return bytes(self.to_proto().SerializeToString(deterministic=True))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model to `path`, whole or not at all.

        Raises:
            OutputError: the file cannot be written.
        """
        write_atomic(Path(path), self.to_bytes())

    def copy(self) -> Graph:
        """An independent copy."""
        return Graph.load(self.to_proto())

    def become(self, other: Graph) -> None:
        """Take over the content of `other`, which must not be used afterwards."""
        self._graph, self.metadata, self._names = other._graph, other.metadata, None

    def check(self) -> None:
        """Run onnx.checker with strict shape inference.

        Raises:
            ModelError: the graph is not valid ONNX.
        """
        try:
            onnx.checker.check_model(self.to_proto(), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, RuntimeError) as error:
            raise ModelError(f"invalid ONNX: {_first_line(error)}") from error

    # -- reading ------------------------------------------------------------------------------------

    @property
    def nodes(self) -> list[Any]:
        """The nodes in topological order (a live list: edit through `add` and `remove`)."""
        nodes: list[Any] = self._graph.nodes
        return nodes

    @property
    def inputs(self) -> list[Any]:
        """The model's inputs."""
        inputs: list[Any] = self._graph.inputs
        return inputs

    @property
    def outputs(self) -> list[Any]:
        """The model's outputs."""
        outputs: list[Any] = self._graph.outputs
        return outputs

    @property
    def opset(self) -> int:
        """Version of the default operator set."""
        return int(self._graph.opset)

    def values(self) -> Iterator[Any]:
        """Every value once: inputs, constants and results, in the order of use."""
        seen: set[int] = set()
        for value in self._every_value():
            if id(value) not in seen:
                seen.add(id(value))
                yield value

    def constants(self) -> Iterator[Any]:
        """Every constant once, in the order of use."""
        return (v for v in self.values() if isinstance(v, Constant))

    def value(self, name: str) -> Any:
        """The value called `name`.

        Raises:
            KeyError: there is none.
        """
        for value in self.values():
            if value.name == name:
                return value
        raise KeyError(name)

    def signature(self) -> list[tuple[str, str, str, tuple[Any, ...]]]:
        """Inputs and outputs as (kind, name, type, shape): what a drop-in model keeps."""
        return [(kind, v.name, np.dtype(v.dtype).name if v.dtype is not None else "?", tuple(v.shape or ()))
                for kind, values in (("input", self.inputs), ("output", self.outputs)) for v in values]

    # -- editing ------------------------------------------------------------------------------------

    def constant(self, hint: str, values: NDArray[Any]) -> Any:
        """A new constant; its name is `hint`, made unique."""
        return Constant(self.unique(hint), np.asarray(values))

    def add(self, op: str, inputs: Sequence[Any], output: str | Any, attrs: dict[str, Any] | None = None,
            shape: Sequence[Any] | None = None, dtype: Any = np.float32) -> Any:
        """Append a node with one output and return that output (call `sort` when all are in).

        `output` is a value that nothing produces yet, or the wished name of a new one.
        """
        if isinstance(output, str):
            output = Variable(self.unique(output), dtype=dtype, shape=shape)
        self.nodes.append(Node(op=op, name=self.unique(op), attrs=dict(attrs or {}),
                               inputs=list(inputs), outputs=[output]))
        return output

    def remove(self, node: Any) -> None:
        """Take a node out; its results must have been replaced before."""
        node.inputs.clear()
        node.outputs.clear()
        self.nodes[:] = [n for n in self.nodes if n is not node]

    def replace_uses(self, old: Any, new: Any, users: Iterable[Any] | None = None) -> None:
        """Let `users` (default: all) read `new` where they read `old`.

        When `old` is a model output and all users move, `new` is produced under the output's name:
        the signature stays.
        """
        users_ids = None if users is None else {id(u) for u in users}
        for node in list(old.outputs):
            if users_ids is None or id(node) in users_ids:
                for index, value in enumerate(node.inputs):
                    if value is old:
                        node.inputs[index] = new
        if users_ids is None and any(o is old for o in self.outputs):
            self._output_takes_over(old, new)

    def _output_takes_over(self, old: Any, new: Any) -> None:
        """Make `new` the model output that `old` was, with its name, type and shape."""
        if isinstance(new, Constant) or not new.inputs or any(o is new for o in self.outputs):
            held = Variable(old.name, dtype=old.dtype, shape=old.shape)   # an input, constant or another output
            self.nodes.append(Node(op="Identity", name=self.unique(f"Identity_{old.name}"), inputs=[new],
                                   outputs=[held]))
        else:
            held, new.name, new.shape, new.dtype = new, old.name, old.shape or new.shape, old.dtype
        old.name = self.unique(f"{old.name}_before")
        self.outputs[:] = [held if o is old else o for o in self.outputs]

    def unique(self, hint: str) -> str:
        """`hint`, or `hint_2`, `hint_3`, ...: the first name that nothing in the graph has."""
        if self._names is None:
            self._names = {v.name for v in self.values()} | {n.name for n in self.nodes}
        name, count = hint, 1
        while name in self._names:
            count += 1
            name = f"{hint}_{count}"
        self._names.add(name)
        return name

    def rename(self, names: Mapping[str, str]) -> int:
        """Give values other names, all at once, so that two may change places; returns how many change."""
        values = [v for v in self.values() if names.get(v.name, v.name) != v.name]
        for value in values:
            value.name = names[value.name]
        self._names = None
        return len(values)

    def sort(self) -> None:
        """Restore topological order, keeping the present order wherever it is free to.

        Raises:
            ModelError: the graph has a cycle.
        """
        nodes = self.nodes
        place = {id(n): i for i, n in enumerate(nodes)}
        waits = [len({id(p) for v in n.inputs for p in v.inputs}) for n in nodes]
        ready = [i for i, count in enumerate(waits) if count == 0]
        order: list[Any] = []
        while ready:
            node = nodes[heapq.heappop(ready)]
            order.append(node)
            for index in {place[id(user)] for v in node.outputs for user in v.outputs}:
                waits[index] -= 1
                if waits[index] == 0:
                    heapq.heappush(ready, index)
        if len(order) < len(nodes):
            stuck = next(n for i, n in enumerate(nodes) if waits[i] > 0)
            raise ModelError(f"the graph has a cycle through node {stuck.name!r} ({stuck.op})")
        nodes[:] = order

    def cleanup(self) -> int:
        """Drop nodes that no output depends on; inputs stay. Returns how many went."""
        before = len(self.nodes)
        needed: set[int] = set()
        stack = [p for v in self.outputs for p in v.inputs]
        while stack:
            node = stack.pop()
            if id(node) not in needed:
                needed.add(id(node))
                stack += [p for v in node.inputs for p in v.inputs]
        for node in [n for n in self.nodes if id(n) not in needed]:
            self.remove(node)
        return before - len(self.nodes)

    def infer_shapes(self) -> None:
        """Fill in the types and shapes of all values, as far as ONNX can tell.

        Raises:
            ModelError: the shapes contradict each other.
        """
        try:
            inferred = onnx.shape_inference.infer_shapes(self.to_proto(), strict_mode=True, data_prop=True)
        except (onnx.shape_inference.InferenceError, RuntimeError) as error:
            raise ModelError(f"shapes do not fit together: {_first_line(error)}") from error
        info = {v.name: v.type.tensor_type for v in (*inferred.graph.value_info, *inferred.graph.output)}
        for value in self.values():
            if isinstance(value, Variable) and value.name in info:
                kind = info[value.name]
                value.dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type) if kind.elem_type else None
                if kind.HasField("shape"):
                    value.shape = [d.dim_value if d.HasField("dim_value") else (d.dim_param or None)
                                   for d in kind.shape.dim]

    def fold_constants(self) -> int:
        """Compute what depends on constants and static shapes alone. Returns how many nodes went."""
        before = len(self.nodes)
        while True:
            count = len(self.nodes)
            self.infer_shapes()
            self._graph.fold_constants(error_ok=False)
            self.cleanup()
            if len(self.nodes) == count:
                break
        self._names = None
        self._name_everything()
        self.sort()
        return before - len(self.nodes)

    # -- inside -------------------------------------------------------------------------------------

    def _every_value(self) -> Iterator[Any]:
        yield from self.inputs
        for node in self.nodes:
            yield from (v for v in node.inputs if v.name)
            yield from (v for v in node.outputs if v.name)
        yield from self.outputs

    def _name_everything(self) -> None:
        """Give nodes without a name, or with one that is taken, a unique one."""
        taken: set[str] = set()
        for index, node in enumerate(self.nodes):
            base = node.name or f"{node.op}_{index}"
            name, count = base, 1
            while name in taken:
                count += 1
                name = f"{base}_{count}"
            node.name = name
            taken.add(name)


def check_output(path: Path) -> None:
    """Find out before the work, not after it, that a file has nowhere to go.

    Raises:
        OutputError: it is a folder or a device, or its folder does not exist or is not writable.
    """
    try:
        if path.is_dir():
            raise OutputError(f"cannot write {path}: it is a folder; give a file name")
        if path.exists() and not path.is_file():
            raise OutputError(f"cannot write {path}: it is a device, which would be replaced; give a file name")
        if not path.parent.is_dir():
            raise OutputError(f"cannot write {path}: there is no folder {path.parent}; create it, or choose another")
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}; choose another place") from error
    if not os.access(path.parent, os.W_OK):
        raise OutputError(f"cannot write {path}: {path.parent} is not writable; choose another place")


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: into a temporary file beside it, then moved into place.

    Raises:
        OutputError: as `check_output`, or the disk is full.
    """
    check_output(path)
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as handle:
            temporary = Path(handle.name)
            try:
                handle.write(content)
                handle.flush()
                os.fsync(handle.fileno())
                temporary.chmod(0o644)
                temporary.replace(path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(f"cannot write {path}: {reason}; make room, or choose another place") from error


def file_size(path: str | os.PathLike[str]) -> int:
    """Bytes of a model's file, and of the files beside it that hold its external data.

    Raises:
        ModelError: the file cannot be read.
    """
    path = Path(path)
    try:
        model = onnx.load_from_string(path.read_bytes())
        names = {onnx.external_data_helper.ExternalDataInfo(t).location for t in _external(model)}
        return sum((path.parent / name).stat().st_size for name in {path.name, *names})
    except (OSError, google.protobuf.message.DecodeError) as error:
        raise ModelError(f"{path} cannot be read: {_first_line(error)}") from error


def _read_proto(source: str | os.PathLike[str] | bytes | onnx.ModelProto) -> tuple[onnx.ModelProto, str]:
    """Parse and check a model; returns it with the name to call it by in messages."""
    if isinstance(source, onnx.ModelProto):
        copy = onnx.ModelProto()
        copy.CopyFrom(source)
        return copy, "model"
    label = "model" if isinstance(source, bytes) else str(source)
    try:
        if not isinstance(source, bytes):
            path = Path(source)
            if path.is_dir():
                raise ModelError(f"{label} is a folder; give an ONNX file")
            if path.exists() and not path.is_file():
                raise ModelError(f"{label} is a device or a pipe; give an ONNX file")
            if path.exists() and path.stat().st_size > LARGEST:
                raise ModelError(f"{label} has {path.stat().st_size / 1e9:.1f} GB, and an ONNX file at most 2; give an "
                                 "ONNX file")
            model = onnx.load_from_string(path.read_bytes())
        else:
            model = onnx.load_from_string(source)
    except ModelError:
        raise
    except FileNotFoundError as error:
        raise ModelError(f"{label} does not exist; give an ONNX file (`vmq fetch rvm` gets one)") from error
    except OSError as error:
        raise ModelError(f"{label} cannot be read: {error.strerror or error}") from error
    except (google.protobuf.message.DecodeError, ValueError) as error:
        raise ModelError(f"{label} is not an ONNX model, or is truncated ({_first_line(error)})") from error
    if not isinstance(source, bytes):
        try:
            _bound_external_data(model, label)
            onnx.load_external_data_for_model(model, str(path.parent))
        except ModelError:
            raise
        except (OSError, onnx.checker.ValidationError, ValueError, KeyError) as error:
            raise ModelError(f"{label}: its external data cannot be read ({_first_line(error)})") from error
    if not model.graph.node or not model.opset_import:
        raise ModelError(f"{label} is not an ONNX model, or is empty: it has no nodes")
    try:
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, ValueError, RuntimeError) as error:
        _, _, where = str(error).partition("==> Context: ")      # names the node
        raise ModelError(f"{label} is not valid ONNX: {_first_line(error)}"
                         + (f" ({where.strip()[:200]})" if where else "")
                         + "; export it again, with standard operators only") from error
    return model, label


def _external(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    """The tensors whose data are in another file."""
    return [t for t in _tensors(model.graph) if onnx.external_data_helper.uses_external_data(t)]


def _bound_external_data(model: onnx.ModelProto, label: str) -> None:
    """Note with every tensor in another file how many bytes it has, so that no more than these are read.

    Raises:
        ModelError: they are more than an ONNX file could hold, or the model gives another number itself.
        ValueError: it gives what is no number.
    """
    total = 0
    for tensor in _external(model):
        kind = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
        size = max(0, math.prod(tensor.dims) * kind.itemsize)
        size = (size + 1) // 2 if kind in _FOUR_BIT else size
        total += size
        given = [entry.value for entry in tensor.external_data if entry.key == "length"]
        wrong = next((length for length in given if int(length) != size), None)
        if wrong is not None:
            raise ModelError(f"{label}: its external data cannot be read ({tensor.name!r} has {size} bytes by its type "
                             f"and shape, and {wrong} by its length); export it again")
        if not given:
            tensor.external_data.add(key="length", value=str(size))
    if total > LARGEST:
        raise ModelError(f"{label}: its external data are {total / 1e9:.1f} GB, more than vmq takes (2)")


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """All tensors of a graph and of those within it: weights, and what nodes have as attributes."""
    yield from graph.initializer
    for attribute in (a for n in graph.node for a in n.attribute):
        yield from (attribute.t, *attribute.tensors)
        for inner in (attribute.g, *attribute.graphs):
            yield from _tensors(inner)


def _refuse_unsupported(model: onnx.ModelProto, label: str) -> None:
    texts: list[Any] = [model.graph.name, *(t for p in model.metadata_props for t in (p.key, p.value))]
    if any(isinstance(t, bytes) for t in texts):     # protobuf hands out what is not UTF-8 as bytes
        raise ModelError(f"{label} is damaged: names or metadata in it are not UTF-8")
    for value in (*model.graph.input, *model.graph.output):
        if not value.type.HasField("tensor_type"):
            raise ModelError(f"{label}: {value.name} is no tensor; export the model with tensors only")
        kind = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))
        if kind.isbuiltin != 1:       # numpy does not know it by itself: bfloat16, float8, 4 bits
            raise ModelError(f"{label}: {value.name} is {kind.name}; export the model in float32")
    for tensor in model.graph.initializer:
        if onnx.external_data_helper.uses_external_data(tensor):
            raise ModelError(f"{label}: the data of {tensor.name!r} are in another file; give the model's path")
    if model.graph.sparse_initializer:
        raise ModelError(f"{label}: weight {model.graph.sparse_initializer[0].values.name!r} is stored sparse, which "
                         "is not supported; export the model with dense weights")
    for node in model.graph.node:
        name = node.name or (node.output[0] if node.output else "?")
        if any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in node.attribute):
            raise ModelError(f"{label}: node {name!r} is {node.op_type}, and control flow is not supported; "
                             "export the model without it (trace one path)")
        if node.domain not in ("", "ai.onnx"):
            raise ModelError(f"{label}: node {name!r} is {node.domain}.{node.op_type}, which is not a standard "
                             "ONNX operator; export the model with standard operators only")


def _constants_as_initializers(model: onnx.ModelProto) -> onnx.ModelProto:
    """Turn Constant nodes into initializers, all stored alike, and take initializers out of the inputs."""
    graph = model.graph
    kept = []
    for node in graph.node:
        if node.op_type != "Constant":
            kept.append(node)
            continue
        attribute = node.attribute[0]
        if attribute.name == "value":
            tensor = onnx.TensorProto()
            tensor.CopyFrom(attribute.t)
        elif attribute.name in ("value_float", "value_floats"):
            tensor = onnx.numpy_helper.from_array(np.asarray(onnx.helper.get_attribute_value(attribute), np.float32))
        elif attribute.name in ("value_int", "value_ints"):
            tensor = onnx.numpy_helper.from_array(np.asarray(onnx.helper.get_attribute_value(attribute), np.int64))
        else:
            raise ModelError(f"constant {node.output[0]!r} is a {attribute.name}, which is not supported")
        tensor.name = node.output[0]
        graph.initializer.append(tensor)
    for tensor in graph.initializer:       # as they are written again once a pass has read their values
        if not tensor.HasField("raw_data"):
            tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor), tensor.name))
        tensor.ClearField("data_location")
        tensor.ClearField("doc_string")
    del graph.node[:]
    graph.node.extend(kept)
    names = {i.name for i in graph.initializer}
    inputs = [i for i in graph.input if i.name not in names]
    del graph.input[:]
    graph.input.extend(inputs)
    return model


def _first_line(error: BaseException) -> str:
    """The first line of an error's text that says something, cut to a readable length."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
