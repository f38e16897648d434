"""ONNX models as they lie on disk: parsed, checked, and refused where vmq cannot take them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import google.protobuf.message
import ml_dtypes
import numpy as np
import onnx

from vmq.errors import ModelError

LARGEST = (1 << 31) - 1
"""Bytes that protobuf, and so a model, can hold."""
FOUR_BIT = (np.dtype(ml_dtypes.int4), np.dtype(ml_dtypes.uint4))


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
        raise ModelError(f"{path} cannot be read: {first_line(error)}") from error


def read_proto(source: str | os.PathLike[str] | bytes | onnx.ModelProto) -> tuple[onnx.ModelProto, str]:
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
        raise ModelError(f"{label} is not an ONNX model, or is truncated ({first_line(error)})") from error
    if not isinstance(source, bytes):
        try:
            sizes = _bound_external_data(model, label, path.parent)
            onnx.load_external_data_for_model(model, str(path.parent))
            for tensor, size in sizes:                  # onnx itself looks from 1.21 on
                if len(tensor.raw_data) < size:
                    raise ValueError(f"{tensor.name!r} has {size} bytes, and its file holds {len(tensor.raw_data)}")
        except ModelError:
            raise
        except (OSError, RuntimeError, onnx.checker.ValidationError, ValueError, KeyError) as error:
            raise ModelError(f"{label}: its external data cannot be read ({first_line(error)})") from error
    if not model.graph.node or not model.opset_import:
        raise ModelError(f"{label} is not an ONNX model, or is empty: it has no nodes")
    try:
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, ValueError, RuntimeError) as error:
        _, _, where = str(error).partition("==> Context: ")      # names the node
        raise ModelError(f"{label} is not valid ONNX: {first_line(error)}"
                         + (f" ({where.strip()[:200]})" if where else "")
                         + "; export it again, with standard operators only") from error
    return model, label


def _external(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    """The tensors whose data are in another file."""
    return [t for t in _tensors(model.graph) if onnx.external_data_helper.uses_external_data(t)]


def _bound_external_data(model: onnx.ModelProto, label: str, folder: Path) -> list[tuple[onnx.TensorProto, int]]:
    """Note with every tensor in another file how many bytes it has, so that no more than these are read; return both.

    Raises:
        ModelError: they are more than an ONNX file could hold, the model gives another number itself, or names a file
            that is not in its folder.
        ValueError: it gives what is no number.
    """
    sizes = list[tuple[onnx.TensorProto, int]]()
    for tensor in _external(model):
        location = onnx.external_data_helper.ExternalDataInfo(tensor).location
        if not (folder / location).resolve().is_relative_to(folder.resolve()):
            raise ModelError(f"{label}: its external data cannot be read ({tensor.name!r} is in {location}, outside "
                             "the model's folder); put both into one folder")
        kind = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
        size = max(0, math.prod(tensor.dims) * kind.itemsize)
        size = (size + 1) // 2 if kind in FOUR_BIT else size
        sizes.append((tensor, size))
        given = [entry.value for entry in tensor.external_data if entry.key == "length"]
        wrong = next((length for length in given if int(length) != size), None)
        if wrong is not None:
            raise ModelError(f"{label}: its external data cannot be read ({tensor.name!r} has {size} bytes by its type "
                             f"and shape, and {wrong} by its length); export it again")
        if not given:
            tensor.external_data.add(key="length", value=str(size))
    total = sum(size for _, size in sizes)
    if total > LARGEST:
        raise ModelError(f"{label}: its external data are {total / 1e9:.1f} GB, more than vmq takes (2)")
    return sizes


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """All tensors of a graph and of those within it: weights, and what nodes have as attributes."""
    yield from graph.initializer
    for attribute in (a for n in graph.node for a in n.attribute):
        yield from (attribute.t, *attribute.tensors)
        for inner in (attribute.g, *attribute.graphs):
            yield from _tensors(inner)


def refuse_unsupported(model: onnx.ModelProto, label: str) -> None:
    """Raises:
        ModelError: damaged names, sparse weights, control flow, or what is no standard operator or no plain tensor.
    """
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


def constants_as_initializers(model: onnx.ModelProto) -> onnx.ModelProto:
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


def first_line(error: BaseException) -> str:
    """The first line of an error's text that says something, cut to a readable length."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
