"""The runner keeps passes honest: order, truth about changes, invariants, and errors that name the pass."""

# ruff: noqa: ARG002  (the methods of Pass and Observer have one signature)

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import pytest
from onnx_text import load

from vmq.errors import MediaError, ModelError, OptionError, PassError, VmqError
from vmq.graph import Constant, Graph, Node
from vmq.pipeline import INVARIANTS, Context, Observer, Pass, PassResult, run_passes
from vmq.spec import Options

SOURCE = """(float[1,2,4,4] x, float[2,2,1,1] w_a) => (float[1,2,4,4] y) <float s = {0.5}, uint8 z = {0}> {
    a = Conv (x, w_a)  q = QuantizeLinear (a, s, z)  d = DequantizeLinear (q, s, z)  y = Relu (d) }"""


class Does(Pass):
    """Does what it is given, and says that it changed something."""

    name: ClassVar[str] = "does"

    def __init__(self, action: Callable[[Graph], Any] = lambda _: None, modified: int = 1, log: list[str] | None = None,
                 name: str = "does") -> None:
        self.action, self.modified, self.log, self.name = action, modified, log if log is not None else [], name  # type: ignore[misc]

    def requires(self, graph: Graph, context: Context) -> None:
        self.log.append(f"{self.name}.requires")

    def run(self, graph: Graph, context: Context) -> PassResult:
        self.log.append(f"{self.name}.run")
        self.action(graph)
        return PassResult(self.modified)

    def ensures(self, graph: Graph, context: Context) -> None:
        self.log.append(f"{self.name}.ensures")


class Analyses(Does):
    """The same, as an analysis."""

    changes: ClassVar[bool] = False


class Watch(Observer):
    def __init__(self, log: list[str]) -> None:
        self.log = log

    def started(self, graph: Graph, context: Context, passes: Sequence[Pass]) -> None:
        self.log.append(f"started {len(passes)}")

    def before(self, step: Pass, graph: Graph) -> None:
        self.log.append(f"before {step.name}")

    def after(self, index: int, step: Pass, graph: Graph, result: PassResult, seconds: float) -> None:
        assert seconds >= 0
        self.log.append(f"after {index} {step.name} {result.modified}")

    def failed(self, index: int, step: Pass, before: bytes, error: BaseException) -> None:
        Graph.load(before)
        self.log.append(f"failed {index} {step.name} {type(error).__name__}")

    def finished(self, graph: Graph) -> None:
        self.log.append("finished")


def run(*passes: Pass, observers: Sequence[Observer] = (), graph: Graph | None = None) -> list[PassResult]:
    return run_passes(graph or load(SOURCE), passes, Context(Options()), observers)


def rename(graph: Graph) -> None:
    graph.nodes[0].name = "renamed"


def fails(action: Callable[[Graph], Any], **options: Any) -> str:
    with pytest.raises(PassError) as error:
        run(Does(action, **options))
    assert error.value.pass_name == "does"
    message = str(error.value)
    assert message.startswith("pass does failed: ")
    assert "\n" not in message
    return message


def test_order_of_everything() -> None:
    log: list[str] = []
    results = run(Does(rename, log=log, name="one"), Analyses(log=log, name="two"),
                  observers=[Watch(log), Watch(log)])
    assert [r.modified for r in results] == [1, 1]
    both = lambda *lines: [line for line in lines for _ in range(2)]  # noqa: E731
    assert log == [
        *both("started 2", "before one"), "one.requires", "one.run", "one.ensures",
        *both("after 1 one 1", "before two"),
        "two.requires", "two.run", "two.ensures", *both("after 2 two 1", "finished")]
    assert run() == []


def test_nodes_are_in_order_when_ensures_looks() -> None:
    def add(graph: Graph) -> None:
        graph.replace_uses(graph.value("d"), graph.add("Neg", [graph.value("d")], "n", shape=[1, 2, 4, 4]),
                           users=[graph.nodes[3]])

    class Looks(Does):
        def ensures(self, graph: Graph, context: Context) -> None:
            assert [n.op for n in graph.nodes] == ["Conv", "QuantizeLinear", "DequantizeLinear", "Neg", "Relu"]

    run(Looks(add))


def test_lies_about_changes() -> None:
    assert "the graph changed although the pass reports no change" in fails(rename, modified=0)
    with pytest.raises(PassError, match="the graph changed although the pass analyses"):
        run(Analyses(rename))
    with pytest.raises(PassError, match="the graph changed"):
        run(Analyses(lambda g: g.metadata.update(a="b"), modified=0))
    run(Does(modified=0), Analyses(), Analyses(lambda g: g.infer_shapes()),
        Analyses(lambda g: [c.values for c in g.constants()]))


def same_value_name(graph: Graph) -> None:
    graph.value("a").name = "x"


def same_node_name(graph: Graph) -> None:
    graph.nodes[0].name = graph.nodes[1].name


def two_producers(graph: Graph) -> None:
    graph.nodes.append(Node("Neg", "neg", inputs=[graph.inputs[0]], outputs=[graph.value("a")]))


def no_producer(graph: Graph) -> None:
    graph.nodes[0].outputs.clear()


def computed_scale(graph: Graph) -> None:
    graph.nodes[1].inputs[1] = graph.add("Abs", [graph.value("s")], "t", shape=[])


def scale_of(value: float) -> Callable[[Graph], None]:
    def change(graph: Graph) -> None:
        graph.value("s").values = np.array(value, np.float32)

    return change


def weight_of_nan(graph: Graph) -> None:
    weight = graph.nodes[0].inputs[1]
    weight.values = weight.values * np.array([np.nan, 1], np.float32).reshape(2, 1, 1, 1)


def wrong_type(graph: Graph) -> None:
    graph.nodes[0].inputs[1] = graph.constant("w", np.zeros((2, 2, 1, 1), np.int32))


def no_such_operator(graph: Graph) -> None:
    graph.nodes[3].op = "Rolu"


@pytest.mark.parametrize(("action", "says", "found"), [
    (same_value_name, "every name is used once", "x"),
    (same_node_name, "every name is used once", "node "),
    (two_producers, "every value has one producer", "a is produced by 2 nodes"),
    (no_producer, "every value has one producer", "a is produced by 0 nodes"),
    (computed_scale, "scales are constant", "is not constant"),
    (scale_of(0.0), "scales are constant, finite and positive", "has 0.0"),
    (scale_of(-1.0), "scales are constant, finite and positive", "has -1.0"),
    (scale_of(np.inf), "scales are constant, finite and positive", "has inf"),
    (weight_of_nan, "float constants are finite", "w_a holds NaN or infinity"),
    (wrong_type, "onnx.checker accepts the model", "invalid ONNX"),
    (no_such_operator, "onnx.checker accepts the model", "Rolu"),
])
def test_broken_invariants(action: Callable[[Graph], None], says: str, found: str) -> None:
    message = fails(action)
    assert f"left a graph in which it does not hold that {says}" in message
    assert found in message


def test_every_invariant_holds_for_a_good_graph() -> None:
    graph = load(SOURCE)
    assert [holds(graph) for _, holds in INVARIANTS] == [""] * 5


def test_a_cycle_is_the_pass_s_fault() -> None:
    def cycle(graph: Graph) -> None:
        graph.nodes[0].inputs[0] = graph.value("d")

    assert "cycle through node" in fails(cycle)


def drop_input(graph: Graph) -> None:
    graph.nodes[0].inputs[0] = Constant("c", np.zeros((1, 2, 4, 4), np.float32))
    graph.inputs.clear()


def rename_output(graph: Graph) -> None:
    graph.outputs[0].name = "other"


def retype_output(graph: Graph) -> None:
    graph.nodes[3].inputs[0] = graph.value("q")
    graph.nodes[3].op = "Identity"
    graph.outputs[0].dtype = np.dtype(np.uint8)


def more_outputs(graph: Graph) -> None:
    graph.infer_shapes()
    graph.outputs.append(graph.value("d"))


@pytest.mark.parametrize("action", [drop_input, rename_output, retype_output, more_outputs])
def test_the_signature_stays(action: Callable[[Graph], None]) -> None:
    assert "inputs or outputs are not the model's any more" in fails(action)


def raises(error: BaseException) -> Callable[[Graph], None]:
    def action(_: Graph) -> None:
        raise error

    return action


def test_errors_name_the_pass_and_those_before_it() -> None:
    log: list[str] = []
    with pytest.raises(PassError) as error:
        run(Does(rename, name="one"), Analyses(name="two"), Does(raises(KeyError("gone\nand lost")), name="three"),
            Does(log=log, name="four"), observers=[Watch(log)])
    message = str(error.value)
    assert message.startswith("pass three failed (after one, two): KeyError: ")
    assert "\n" not in message
    assert isinstance(error.value.__cause__, KeyError)
    assert log[-1] == "failed 3 three KeyError"
    assert "finished" not in log
    assert "four.run" not in log
    assert str(fails(raises(ZeroDivisionError()))) == "pass does failed: ZeroDivisionError: ZeroDivisionError"
    assert fails(raises(PassError("no such thing"))) == "pass does failed: no such thing"


def test_requires_and_ensures_fail_the_pass() -> None:
    class Demands(Does):
        def requires(self, graph: Graph, context: Context) -> None:
            raise PassError("find_closures did not run")

    class Promises(Does):
        def ensures(self, graph: Graph, context: Context) -> None:
            raise PassError("a Relu stays")

    log: list[str] = []
    with pytest.raises(PassError, match=r"^pass does failed: find_closures did not run$"):
        run(Demands(log=log))
    assert log == []
    with pytest.raises(PassError, match=r"^pass does failed: a Relu stays$"):
        run(Promises())


@pytest.mark.parametrize("error", [ModelError("bad model"), OptionError("bad option"), MediaError("bad video"),
                                   VmqError("bad"), PassError("named before", pass_name="earlier"),
                                   KeyboardInterrupt()])
def test_what_passes_through_unchanged(error: BaseException) -> None:
    log: list[str] = []
    with pytest.raises(type(error)) as caught:
        run(Does(raises(error)), observers=[Watch(log)])
    assert caught.value is error
    assert log == ["started 1", "before does", f"failed 1 does {type(error).__name__}"]


def test_failed_observers_get_the_graph_before_the_pass() -> None:
    seen: list[bytes] = []

    class Keeps(Observer):
        def failed(self, index: int, step: Pass, before: bytes, error: BaseException) -> None:
            seen.append(before)

    def rename_and_raise(graph: Graph) -> None:
        rename(graph)
        raise ValueError("after the change")

    with pytest.raises(PassError):
        run(Does(rename_and_raise), observers=[Keeps()])
    assert seen == [load(SOURCE).to_bytes()]


def test_an_observer_may_leave_all_methods_as_they_are() -> None:
    assert len(run(Does(rename), observers=[Observer()])) == 1
    with pytest.raises(NotImplementedError):
        Pass().run(load(SOURCE), Context(Options()))
    Context(Options()).progress("nothing", 0.5)
