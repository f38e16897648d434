"""The passes of the compiler, and the pipeline: read it top to bottom."""

from passes.align_channels import AlignChannels
from passes.balance_channels import BalanceChannels
from passes.bind_shapes import BindShapes
from passes.calibrate_network import CalibrateNetwork
from passes.calibrate_ranges import CalibrateRanges
from passes.check_input import CheckInput
from passes.choose_bits import ChooseBits
from passes.compute_in_float32 import ComputeInFloat32
from passes.correct_biases import CorrectBiases
from passes.double_sizes import DoubleSizes
from passes.equalize import Equalize
from passes.expose_states import ExposeStates
from passes.find_closures import FindClosures
from passes.fit_ranges import FitRanges
from passes.float_forms import FloatForms
from passes.floor_pooling import FloorPooling
from passes.fold_batchnorm import FoldBatchnorm
from passes.fold_resizes import FoldResizes
from passes.fold_shapes import FoldShapes
from passes.fuse_hardswish import FuseHardswish
from passes.insert_qdq import InsertQdq
from passes.integer_forms import IntegerForms
from passes.limit_weights import LimitWeights
from passes.lower import Lower
from passes.move_integers import MoveIntegers
from passes.multiply_pixels import MultiplyPixels
from passes.pack_columns import PackColumns
from passes.quantize_biases import QuantizeBiases
from passes.raise_opset import RaiseOpset
from passes.reconstruct_blocks import ReconstructBlocks
from passes.slim_down import SlimDown
from passes.split_early import SplitEarly
from passes.verify import Verify
from vmq.pipeline import Pass

_PREPARE: tuple[Pass, ...] = (
    CheckInput(),
    RaiseOpset(),
    BindShapes(),
    FoldShapes(),
    ComputeInFloat32(),
    FloorPooling(),
    FuseHardswish(),
    FoldBatchnorm(),
    SplitEarly(),
    AlignChannels(),
    Equalize(),
    BalanceChannels(),
    FindClosures(),
    FoldResizes(),
)
_QUANTIZE: tuple[Pass, ...] = (
    InsertQdq(),
    CalibrateRanges(),
    FitRanges(),
    IntegerForms(),
    CorrectBiases(),
    ReconstructBlocks(),
    CalibrateNetwork(),
    LimitWeights(),
    QuantizeBiases(),
    Lower(),
    MoveIntegers(),
    DoubleSizes(),
    FloatForms(),
    MultiplyPixels(),
    PackColumns(),
    ExposeStates(),
    SlimDown(),
    Verify(),
)
PIPELINE: tuple[Pass, ...] = (*_PREPARE, ChooseBits(_QUANTIZE), *_QUANTIZE)
"""What `vmq compile` runs, in this order."""
