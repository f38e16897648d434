"""The graph loads what is ONNX and refuses the rest in one line; edits keep the signature; files come out whole."""

from __future__ import annotations

import itertools
import os
import random
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_text import load, ops, parse, run

from models import rvm
from vmq.errors import ModelError, OutputError
from vmq.files import write_atomic
from vmq.graph import IR_VERSION, Constant, Graph, Variable
from vmq.proto import file_size
from vmq.text import format_graph

CHAIN = """(float[1,3,4,4] x, float[3,3,1,1] w_a) => (float[1,3,4,4] y) {
    a = Conv <strides = [1, 1]> (x, w_a)
    y = Relu (a)
}"""


def refused(source: object) -> str:
    """The message with which `source` is refused: one line, of readable length."""
    with pytest.raises(ModelError) as error:
        Graph.load(source)  # type: ignore[arg-type]
    message = str(error.value)
    assert message
    assert "\n" not in message
    assert len(message) < 600
    return message


# -- in and out ---------------------------------------------------------------------------------------------


def test_load_from_file_bytes_and_proto(tmp_path: Path) -> None:
    model = parse(CHAIN)
    model.metadata_props.add(key="author", value="nobody")
    onnx.save(model, tmp_path / "m.onnx")
    before = model.SerializeToString()
    graphs = [Graph.load(s) for s in (tmp_path / "m.onnx", str(tmp_path / "m.onnx"), before, model)]
    assert len({g.to_bytes() for g in graphs}) == 1
    assert model.SerializeToString() == before      # a proto is copied, not edited
    for graph in graphs:
        assert graph.metadata == {"author": "nobody"}
        assert graph.signature() == [("input", "x", "float32", (1, 3, 4, 4)), ("output", "y", "float32", (1, 3, 4, 4))]
        np.testing.assert_array_equal(run(graph)["y"], run(model)["y"])


def test_saved_file_is_the_model(tmp_path: Path) -> None:
    graph = load(CHAIN)
    graph.metadata["b"], graph.metadata["a"] = "2", "1"
    graph.save(tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").read_bytes() == graph.to_bytes()
    proto = onnx.load(tmp_path / "m.onnx")
    onnx.checker.check_model(proto, full_check=True)
    assert proto.ir_version == IR_VERSION
    assert [(p.key, p.value) for p in proto.metadata_props] == [("a", "1"), ("b", "2")]
    again = Graph.load(tmp_path / "m.onnx")
    assert again.to_bytes() == graph.to_bytes()
    assert again.metadata == graph.metadata


def test_constant_nodes_become_initializers() -> None:
    graph = load("""(float[2] x) => (float[2] y, float[1] c) {
        c = Constant <value = float[1] {3.0}> ()
        f = Constant <value_float = 0.5> ()
        fs = Constant <value_floats = [1.0, 2.0]> ()
        i = Constant <value_int = 1> ()
        is = Constant <value_ints = [0, 0]> ()
        n = Cast <to = 1> (i)
        m = Cast <to = 1> (is)
        s1 = Sum (x, c, f, fs, n, m)
        y = Identity (s1)
    }""")
    assert ops(graph) == ["Cast", "Cast", "Sum", "Identity"]
    assert {c.name: c.values.tolist() for c in graph.constants()} == {
        "c": [3.0], "f": 0.5, "fs": [1.0, 2.0], "i": 1, "is": [0, 0]}
    found = run(graph, {"x": np.array([0.0, 10.0], np.float32)})
    np.testing.assert_array_equal(found["y"], [5.5, 16.5])
    np.testing.assert_array_equal(found["c"], [3.0])
    assert "string" in refused(parse("(float[2] x) => (float[2] y) { c = Constant <value_string = \"a\"> ()"
                                     " y = Relu (x) }"))


def test_initializers_among_the_inputs() -> None:
    model = parse(CHAIN)
    model.graph.input.append(helper.make_tensor_value_info("w_a", TensorProto.FLOAT, [3, 3, 1, 1]))
    assert [v.name for v in Graph.load(model).inputs] == ["x"]


def test_nodes_without_a_name_or_with_one_name() -> None:
    model = parse("(float[2] x) => (float[2] y) { a = Relu (x)  b = Neg (a)  c = Exp (b)  d = Neg (c)  y = Abs (d) }")
    for node, name in zip(model.graph.node, ["n", "n", "", "", "n_2"], strict=True):
        node.name = name
    graph = Graph.load(model)
    names = [n.name for n in graph.nodes]
    assert names[0] == "n"
    assert len(set(names)) == 5
    assert all(names)
    np.testing.assert_allclose(run(graph, {"x": np.array([-1.0, 1.0], np.float32)})["y"], [1, 1 / np.e], rtol=1e-6)


@pytest.mark.parametrize(("dtype", "low"), [(ml_dtypes.int4, -8), (ml_dtypes.uint4, 0)])
@pytest.mark.parametrize("shape", [(1,), (2,), (3,), (16,), (3, 5), (4, 4, 1, 1)])
def test_four_bit_constants_survive(dtype: type, low: int, shape: tuple[int, ...], tmp_path: Path) -> None:
    graph = load("(float[2] x) => (float[2] y) { y = Relu (x) }")
    values = (np.arange(np.prod(shape)).reshape(shape) * 7 % 16 + low).astype(dtype)
    scale, zero = graph.constant("scale", np.array(0.5, np.float32)), graph.constant("zero", np.array(3, dtype))
    graph.outputs.append(graph.add("DequantizeLinear", [graph.constant("q", values), scale, zero], "dq", shape=shape))
    graph.sort()
    wanted = (values.astype(np.float32) - 3) * 0.5
    for other in (graph, graph.copy(), Graph.load(graph.to_bytes())):
        np.testing.assert_array_equal(np.asarray(other.value("q").values), values)
        assert np.asarray(other.value("q").values).dtype == np.dtype(dtype)
        assert other.to_bytes() == graph.to_bytes()
        np.testing.assert_array_equal(run(other)["dq"], wanted)
    np.testing.assert_array_equal(np.asarray(graph.value("q").values), values)     # writing does not touch it
    graph.save(tmp_path / "m.onnx")
    stored = next(i for i in onnx.load(tmp_path / "m.onnx").graph.initializer if i.name == "q")
    assert len(stored.raw_data) == (values.size + 1) // 2                          # two in a byte
    graph.check()


def test_same_graph_same_bytes_and_copies_are_independent() -> None:
    graph = load(CHAIN)
    first = graph.to_bytes()
    assert load(CHAIN).to_bytes() == first == graph.to_bytes()
    copy = graph.copy()
    copy.metadata["k"] = "v"
    copy.nodes[0].attrs["strides"] = [2, 2]
    copy.nodes[0].inputs[1].values = np.zeros((3, 3, 1, 1), np.float32)
    copy.inputs[0].name = "z"
    copy.remove(copy.nodes[1])
    assert graph.to_bytes() == first


def test_become() -> None:
    graph, other = load(CHAIN), load("(float[2] x) => (float[2] y) { y = Abs (x) }")
    assert graph.unique("y") == "y_2"
    other.metadata["k"] = "v"
    wanted = other.to_bytes()
    graph.become(other)
    assert graph.to_bytes() == wanted
    assert graph.metadata == {"k": "v"}
    assert graph.unique("w_a") == "w_a"      # the names of the old content are free


def test_atomic_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "m.onnx"
    write_atomic(target, b"old")
    failures = ((OSError(28, "No space left on device"), OutputError), (KeyboardInterrupt(), KeyboardInterrupt))
    for failure, raised in failures:
        def fail(_: int, failure: BaseException = failure) -> None:
            raise failure

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            with pytest.raises(raised) as error:
                load(CHAIN).save(target)
        assert "\n" not in str(error.value)
        assert target.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [target]     # no half-written file stays
    load(CHAIN).save(target)
    assert Graph.load(target).to_bytes() == load(CHAIN).to_bytes()


def test_unwritable_places(tmp_path: Path) -> None:
    graph = load(CHAIN)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"")
    for place in ("none/m.onnx", "folder", "file/m.onnx", "n" * 300):
        with pytest.raises(OutputError, match="cannot write") as error:
            graph.save(tmp_path / place)
        assert "\n" not in str(error.value)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OutputError, match="it is a device"):
        graph.save(tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder", "pipe"]
    assert list((tmp_path / "folder").iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_folder_without_permission(tmp_path: Path) -> None:
    write_atomic(tmp_path / "m.onnx", b"old")
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OutputError, match="is not writable"):
            load(CHAIN).save(tmp_path / "m.onnx")
    finally:
        tmp_path.chmod(0o700)
    assert (tmp_path / "m.onnx").read_bytes() == b"old"


# -- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["onnx", "json", "textproto", "onnxtxt", "mp4"])
def test_not_onnx(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"m.{suffix}"
    for content in (b"", b"hello", b"{}", b"\xff\xfe\x00", bytes(1000), os.urandom(64)):
        path.write_bytes(content)
        assert "not an ONNX model" in refused(path)
        assert "not an ONNX model" in refused(content)
    path.write_bytes(parse(CHAIN).SerializeToString())       # whatever it is called
    assert ops(Graph.load(path)) == ["Conv", "Relu"]


def test_missing_and_folder(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "m.onnx")
    assert "is a folder" in refused(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    assert "cannot be read" in refused(tmp_path / "file" / "m.onnx")


def test_truncated_anywhere() -> None:
    content = parse(CHAIN).SerializeToString()
    for length in range(len(content)):
        refused(content[:length])


def test_truncated_real_model(tmp_path: Path) -> None:
    """Near both ends of a 15 MB file, and at random."""
    rvm.export(rvm.build(), tmp_path / "rvm.onnx", size=(64, 64))
    content = (tmp_path / "rvm.onnx").read_bytes()
    rng = random.Random(0)
    for length in {*range(0, 12, 3), *rng.sample(range(len(content)), 12), *range(len(content) - 8, len(content))}:
        refused(content[:length])
    (tmp_path / "cut.onnx").write_bytes(content[:len(content) // 2])
    assert "cut.onnx is not an ONNX model, or is truncated" in refused(tmp_path / "cut.onnx")
    graph = Graph.load(content)
    before = graph.to_bytes()
    for constant in graph.constants():
        assert constant.values.size      # reading the values does not change what is written
    assert graph.to_bytes() == before


def test_damaged_bytes_load_or_are_refused() -> None:
    model = parse(CHAIN)
    model.metadata_props.add(key="key", value="value")
    content, rng, refusals = model.SerializeToString(), random.Random(0), 0
    for _ in range(1500):
        damaged = bytearray(content)
        for _ in range(rng.choice([1, 1, 2])):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            Graph.load(bytes(damaged)).to_bytes()
        except ModelError as error:
            refusals += 1
            assert "\n" not in str(error)  # noqa: PT017
    assert 300 < refusals < 1500


def test_control_flow_and_custom_operators() -> None:
    message = refused(parse("""(bool c, float[2] x) => (float[2] y) {
        y = If (c) <then_branch = g1 () => (float[2] p) { p = Relu (x) },
                    else_branch = g2 () => (float[2] q) { q = Abs (x) }>
    }"""))
    assert "'y' is If" in message
    assert "control flow" in message
    message = refused(parse("""(int64 n, bool c, float[2] x) => (float[2] y) {
        y = Loop (n, c, x) <body = g (int64 i, bool go, float[2] p) => (bool goes, float[2] q) {
            goes = Identity (go)  q = Relu (p) }>
    }"""))
    assert "'y' is Loop" in message
    assert "control flow" in message
    model = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["" : 21, "com.acme" : 1]>
        m (float[2] x) => (float[2] y) { y = com.acme.Frobnicate (x) }""")
    model.graph.node[0].name = "frob"
    assert "'frob' is com.acme.Frobnicate" in refused(model)


def test_no_such_operator_and_broken_wiring() -> None:
    content = parse(CHAIN).SerializeToString()
    unknown = refused(content.replace(b"Relu", b"Rolu"))
    assert "not valid ONNX: No Op registered for Rolu" in unknown
    assert "OpType: Rolu); export it again" in unknown
    assert "not valid ONNX" in refused(parse("(float[2] x) => (float[2] y) { y = Relu (z) }").SerializeToString())
    assert "not valid ONNX" in refused(parse("(float[2] x) => (float[2] y) { y = Relu (x)  y = Abs (x) }"
                                             ).SerializeToString())


def test_types_that_numpy_does_not_know() -> None:
    for kind, name in (("bfloat16", "bfloat16"), ("uint4", "uint4"), ("float8e5m2", "float8_e5m2")):
        message = refused(parse(f"({kind}[4] x) => ({kind}[4] y) {{ y = Identity (x) }}"))
        assert f"x is {name}; export the model in float32" in message
    message = refused(parse("(float[4] x) => (seq(float[4]) y) { y = SequenceConstruct (x) }"))
    assert "y is no tensor" in message


def test_sparse_weights() -> None:
    model = parse("(float[4] x, float[4] w) => (float[4] y) { y = Add (x, w) }")
    del model.graph.input[1]
    values = helper.make_tensor("w", TensorProto.FLOAT, [1], [2.0])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, helper.make_tensor(
        "w_indices", TensorProto.INT64, [1], [3]), [4]))
    assert "'w' is stored sparse" in refused(model)


def test_external_data(tmp_path: Path) -> None:
    model = parse(CHAIN)
    folder = tmp_path / "model"
    folder.mkdir()
    external = onnx.ModelProto()
    external.CopyFrom(model)
    onnx.save(external, folder / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    content = (folder / "m.onnx").read_bytes()
    assert Graph.load(folder / "m.onnx").to_bytes() == Graph.load(model).to_bytes()

    assert file_size(folder / "m.onnx") == len(content) + (folder / "w.bin").stat().st_size
    refused(content)                                  # bytes have no folder to look in
    pointing = onnx.load_from_string(content)
    assert "another file" in refused(pointing)
    (folder / "w.bin").write_bytes(b"123")
    assert "external data" in refused(folder / "m.onnx")
    (folder / "w.bin").unlink()
    assert "external data" in refused(folder / "m.onnx")

    (tmp_path / "outside.bin").write_bytes(bytes(1000))
    (folder / "link.bin").symlink_to(tmp_path / "outside.bin")
    (folder / "loop.bin").symlink_to(folder / "loop.bin")
    for place in ("../outside.bin", str(tmp_path / "outside.bin"), "link.bin", "loop.bin", "x" * 5000, "a\0b"):
        next(e for e in pointing.graph.initializer[0].external_data if e.key == "location").value = place
        (folder / "m.onnx").write_bytes(pointing.SerializeToString())
        assert "external data cannot be read" in refused(folder / "m.onnx")


# -- editing ------------------------------------------------------------------------------------------------


def test_replace_uses_of_an_inner_value() -> None:
    graph = load("(float[2] x) => (float[2] y, float[2] z) { a = Neg (x)  y = Add (a, a)  z = Abs (a) }")
    a, z = graph.value("a"), graph.nodes[2]
    fresh = graph.add("Exp", [graph.inputs[0]], "e", shape=[2])
    graph.replace_uses(a, fresh, users=[z])
    assert a.outputs == [graph.nodes[1], graph.nodes[1]]
    graph.replace_uses(a, fresh)
    graph.sort()
    assert not a.outputs
    assert graph.cleanup() == 1
    x = np.array([0.0, 1.0], np.float32)
    found = run(graph, {"x": x})
    np.testing.assert_allclose(found["y"], 2 * np.exp(x), rtol=1e-6)
    np.testing.assert_allclose(found["z"], np.exp(x), rtol=1e-6)


def test_replace_uses_of_an_output_by_a_result() -> None:
    graph = load("(float[2] x) => (float[2] y) { a = Relu (x)  y = Neg (a) }")
    signature, old = graph.signature(), graph.outputs[0]
    fresh = graph.add("Exp", [graph.value("a")], "fresh", dtype=None)
    graph.replace_uses(old, fresh)
    graph.sort()
    assert graph.cleanup() == 1
    assert graph.signature() == signature
    assert ops(graph) == ["Relu", "Exp"]
    np.testing.assert_allclose(run(graph, {"x": np.array([-1.0, 1.0], np.float32)})["y"], [1.0, np.e], rtol=1e-6)


def test_a_user_other_than_the_output_may_move_alone() -> None:
    graph = load("(float[2] x) => (float[2] y, float[2] z) { y = Relu (x)  z = Neg (y) }")
    graph.replace_uses(graph.outputs[0], graph.inputs[0], users=[graph.nodes[1]])
    found = run(graph, {"x": np.array([-1.0, 1.0], np.float32)})
    np.testing.assert_array_equal(found["y"], [0, 1])
    np.testing.assert_array_equal(found["z"], [1, -1])


@pytest.mark.parametrize("what", ["input", "constant", "output"])
def test_an_output_cannot_be_an_input_a_constant_or_another_output(what: str) -> None:
    graph = load("(float[2] x) => (float[2] y, float[2] z) { y = Relu (x)  z = Neg (x) }")
    signature = graph.signature()
    new = {"input": graph.inputs[0], "output": graph.outputs[1],
           "constant": graph.constant("y", np.array([5, 6], np.float32))}[what]
    graph.replace_uses(graph.outputs[0], new)
    graph.sort()
    graph.cleanup()
    graph.check()
    assert graph.signature() == signature
    x = np.array([-1.0, 1.0], np.float32)
    found = run(Graph.load(graph.to_bytes()), {"x": x})
    np.testing.assert_array_equal(found["y"], {"input": x, "output": -x, "constant": [5, 6]}[what])
    np.testing.assert_array_equal(found["z"], -x)


def test_add_and_unique_names() -> None:
    graph = load("(float[2] x) => (float[2] y) { a = Relu (x)  y = Neg (a) }")
    one, two = graph.add("Abs", [graph.value("a")], "a"), graph.add("Abs", [graph.value("a")], "a")
    assert (one.name, two.name, graph.constant("a", np.zeros(1)).name) == ("a_2", "a_3", "a_4")
    given = Variable("mine", dtype=np.float32)
    assert graph.add("Add", [one, two], given, {}) is given
    names = [n.name for n in graph.nodes] + [v.name for v in graph.values()]
    assert len(names) == len(set(names))


def test_sort_is_stable_and_finds_cycles() -> None:
    text = """(float[2] x) => (float[2] y, float[2] z) {
        a = Relu (x)  b = Abs (x)  c = Neg (a)  d = Exp (b)  y = Add (c, d)  z = Sub (d, a) }"""
    wanted = format_graph(load(text))
    graph = load(text)
    graph.sort()
    assert format_graph(graph) == wanted                     # what is in order stays as it is
    for order in itertools.permutations(range(6)):
        graph = load(text)
        nodes = list(graph.nodes)
        graph.nodes[:] = [nodes[i] for i in order]
        graph.sort()
        seen = {"x"}
        for node in graph.nodes:
            assert all(v.name in seen for v in node.inputs)
            seen.update(v.name for v in node.outputs)
        graph.sort()
        again = [n.op for n in graph.nodes]
        graph.sort()
        assert [n.op for n in graph.nodes] == again
    graph = load(text)
    graph.nodes[0].inputs[0] = graph.value("c")
    with pytest.raises(ModelError, match=r"cycle through node '.+' \((Relu|Neg)\)"):
        graph.sort()


def test_cleanup_keeps_inputs_and_drops_the_rest() -> None:
    graph = load("""(float[2] x, float[2] unread) => (float[2] y) {
        dead = Abs (unread)  deader = Neg (dead)
        half, other = Split <num_outputs = 2> (x)  y = Concat <axis = 0> (half, half) }""")
    assert graph.cleanup() == 2
    assert graph.cleanup() == 0
    assert [v.name for v in graph.inputs] == ["x", "unread"]
    assert ops(graph) == ["Split", "Concat"]                # a result that nobody reads does not matter
    graph.check()


def test_optional_inputs_that_are_left_out() -> None:
    graph = load("(float[4] x) => (float[4] y) <float top = {1.0}> { y = Clip (x, , top) }")
    assert [v.name for v in graph.nodes[0].inputs] == ["x", "", "top"]
    assert sorted(v.name for v in graph.values()) == ["top", "x", "y"]
    graph = graph.copy()
    np.testing.assert_array_equal(run(graph, {"x": np.array([-5, 0, 1, 2], np.float32)})["y"], [-5, 0, 1, 1])


def test_infer_shapes() -> None:
    graph = load("(float[1,3,8,h] x, float[4,3,3,3] w_a) => (float[n] y) { a = Conv (x, w_a)  b = Cast <to = 7> (a)"
                 "  c = Shape (b)  d = Cast <to = 1> (c)  y = Neg (d) }")
    graph.infer_shapes()
    assert graph.value("a").shape[:3] == [1, 4, 6]
    assert not isinstance(graph.value("a").shape[3], int)
    assert graph.value("b").dtype == np.int64
    assert graph.value("y").shape == [4]
    wrong = load("(float[2] x, float[3] z) => (float[2] y) { a = Relu (x)  y = Add (a, z) }")
    with pytest.raises(ModelError, match="shapes do not fit together") as error:
        wrong.infer_shapes()
    assert "\n" not in str(error.value)


def test_check() -> None:
    graph = load(CHAIN)
    graph.check()
    graph.nodes[0].attrs["strides"] = [1, 1, 1]
    with pytest.raises(ModelError, match="invalid ONNX") as error:
        graph.check()
    assert "\n" not in str(error.value)


def test_fold_constants() -> None:
    graph = load("""(float[1,3,4,6] x) => (float[1,2,6,6] y, int64[4] s) <int64[4] d = {0, -1, 2, 0}> {
        s = Shape (x)
        target = Add (s, d)
        moved = Reshape (x, target)
        y = Relu (moved)
    }""")
    before = run(graph)
    assert graph.fold_constants() == 2
    assert ops(graph) == ["Reshape", "Relu"]
    assert graph.fold_constants() == 0
    graph.check()
    assert [v.name for v in graph.outputs] == ["y", "s"]
    assert isinstance(graph.outputs[1], Constant)
    for name, value in run(Graph.load(graph.to_bytes())).items():
        np.testing.assert_array_equal(value, before[name])


def test_value_by_name() -> None:
    graph = load(CHAIN)
    assert graph.value("a").inputs == [graph.nodes[0]]
    with pytest.raises(KeyError, match="nothing"):
        graph.value("nothing")


def test_numpy_types_of_constants_survive() -> None:
    graph = load("(float[2] x) => (float[2] y) { y = Relu (x) }")
    for dtype in (np.float64, np.float16, np.int8, np.uint8, np.int32, np.int64, bool):
        value = graph.constant(np.dtype(dtype).name, np.array([[0, 1], [1, 1]], dtype))
        graph.outputs.append(graph.add("Identity", [value], "o", shape=[2, 2], dtype=dtype))
    for node, copied in zip(graph.nodes[1:], graph.copy().nodes[1:], strict=True):
        a, b = node.inputs[0].values, copied.inputs[0].values
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_initializer_of_raw_and_of_typed_data_are_the_same() -> None:
    model = parse(CHAIN)
    array = numpy_helper.to_array(model.graph.initializer[0])
    typed = parse(CHAIN)
    typed.graph.initializer[0].CopyFrom(helper.make_tensor("w_a", TensorProto.FLOAT, array.shape, array.ravel()))
    typed.graph.initializer[0].doc_string = "a weight"
    graph = Graph.load(typed)
    assert graph.to_bytes() == Graph.load(model).to_bytes()
    assert graph.nodes[0].inputs[1].values.size     # reading a value does not change what is written
    assert graph.to_bytes() == Graph.load(model).to_bytes()
