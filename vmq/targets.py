"""Where a model is to run, as data: adding a target is adding a row to `TARGETS`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Operands:
    """Which inputs of a multiply-add operator are quantized.

    Attributes:
        activations: indices of inputs that are activations.
        weight: index of the weight, quantized with one scale per output channel when it is constant.
    """

    activations: tuple[int, ...]
    weight: int


@dataclass(frozen=True)
class Target:
    """Where the model is to run: which operators have integer kernels there, and of what kind.

    Attributes:
        compute: multiply-add operators; their operands take the nominal bits.
        carriers: operators with uint8 kernels, every float operand and result quantized.
        pools: carriers that stay float where they read the model's input.
        forms: operators without an integer kernel that are written as some that have one (passes/integer_forms.py).
        movers: operators that hand on their input's integers unchanged, under the input's scale.
        absorbed: operators that vanish into the quantizer after them when they follow a compute node.
        exact: operators that read floats even where integers are at hand, because their integer kernel is wrong.
        integer_layout: lay channels and integers out as ONNX Runtime's CPU kernels are fast with them.
        wide: bits of what 8 are too few for, which is what follows the last layer and averages whose difference is
            taken; None: it stays float.
        saturates: what keeps a 4-bit activation within its 16 levels: "uint8", a Clip of the integers, or "float", a
            Clip of the float value between two Q/DQ pairs.
        adds_pairs: kernels may add two products of 8-bit integers in 16 bits (passes/limit_weights.py).
        containers: how 4-bit weights may be stored, the best first (passes/lower.py says what each is).
    """

    name: str
    compute: Mapping[str, Operands]
    carriers: frozenset[str]
    movers: frozenset[str]
    absorbed: frozenset[str]
    containers: tuple[str, ...]
    exact: frozenset[str] = frozenset()
    pools: frozenset[str] = frozenset()
    forms: frozenset[str] = frozenset()
    integer_layout: bool = False
    saturates: str = "uint8"
    wide: int | None = None
    adds_pairs: bool = False


_LAYERS: Mapping[str, Operands] = MappingProxyType({
    "Conv": Operands((0,), 1),
    "MatMul": Operands((0, 1), 1),
    "Gemm": Operands((0, 1), 1),
})

# What fuses to integer kernels in the CPU execution provider of ONNX Runtime (1.24 to 1.31).
_CPU = Target(
    name="cpu",
    compute=_LAYERS,
    carriers=frozenset({"Add", "Mul", "Concat", "GlobalAveragePool", "Sigmoid", "LeakyRelu"}),
    pools=frozenset({"AveragePool"}),
    forms=frozenset({"HardSigmoid", "HardSwish", "Tanh", "Sub", "Resize"}),
    movers=frozenset({"Split", "Slice", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "MaxPool"}),
    absorbed=frozenset({"Clip", "Relu"}),
    exact=frozenset({"Softmax"}),       # QLinearSoftmax (1.31) overflows on fine grids: the largest values become 0
    integer_layout=True,
    adds_pairs=True,
    containers=("int4cast", "int8", "int4"),
)

TARGETS: Mapping[str, Target] = MappingProxyType({t.name: t for t in (
    _CPU,
    # What the HTP backend of the QNN execution provider (2.7) takes; tools/check_qnn is the judge. Nothing stays float.
    Target(
        name="qnn",
        compute=_LAYERS,
        carriers=frozenset({
            "Add", "Sub", "Mul", "Div", "Concat", "AveragePool", "GlobalAveragePool", "ReduceMean", "Resize", "Sigmoid",
            "HardSigmoid", "HardSwish", "Tanh", "LeakyRelu", "Clip"}),
        movers=frozenset({"Split", "Slice", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "MaxPool"}),
        absorbed=frozenset({"Relu"}),
        wide=16,
        saturates="float",
        containers=("int4", "int4cast", "int8"),
    ),
    # OpenVINO's CPU plugin: a function behind a layer works on its sums, before they are rounded.
    Target(
        name="openvino",
        compute=_LAYERS,
        carriers=frozenset({"Add", "Sub", "Mul", "Concat", "AveragePool", "GlobalAveragePool", "Resize", "LeakyRelu"}),
        movers=frozenset({"Split", "Slice", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "MaxPool"}),
        absorbed=frozenset({"Relu", "HardSwish", "HardSigmoid", "Sigmoid", "Tanh", "Clip"}),
        containers=("int4cast", "int8"),
    ),
)})
"""What `--target` names."""
