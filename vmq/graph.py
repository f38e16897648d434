"""The graph: an ONNX model that passes can walk and edit. The only user of onnx-graphsurgeon.

A graph holds float computation, Q/DQ nodes included, in one flat list of nodes in topological order.
Constants stand beside the nodes that read them (no Constant nodes), every node and value has a unique
name, and control flow (If, Loop, Scan) is refused at the door. Names are for people: nothing in vmq
asks what a node is called.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx_graphsurgeon import Constant, Node, Variable
from onnx_graphsurgeon.logger import G_LOGGER

from vmq.errors import ModelError
from vmq.files import write_atomic
from vmq.proto import FOUR_BIT, constants_as_initializers, first_line, read_proto, refuse_unsupported

__all__ = ["IR_VERSION", "OPSET", "Constant", "Graph", "Node", "Variable"]

OPSET = 21
"""The opset that vmq works in: the first with 4-bit integers in QuantizeLinear."""
IR_VERSION = 10
"""The file version that goes with it; every ONNX Runtime with that opset reads it."""

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
        model, label = read_proto(source)
        try:
            refuse_unsupported(model, label)
            return cls(gs.import_onnx(constants_as_initializers(model)),
                       {p.key: p.value for p in model.metadata_props})
        except ModelError:
            raise
        except (ValueError, KeyError, AttributeError, gs.OnnxGraphSurgeonException) as error:
            raise ModelError(f"{label}: the graph cannot be read ({first_line(error)})") from error

    def to_proto(self) -> onnx.ModelProto:
        """The model as ONNX protobuf."""
        # onnx-graphsurgeon writes 4-bit constants unpacked: a stand-in goes out, the packed form goes in.
        packed = [t for t in self.constants() if t.dtype in FOUR_BIT]
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
            raise ModelError(f"invalid ONNX: {first_line(error)}") from error

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
            raise ModelError(f"shapes do not fit together: {first_line(error)}") from error
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
