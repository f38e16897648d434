"""vmq: post-training quantization of video-matting networks, from ONNX to ONNX.

    import vmq
    result = vmq.compile("rvm.onnx", bits=8, calib=["footage/"], output="rvm_w8a8.onnx")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Result", "Session", "VmqError", "__version__", "compile"]

if TYPE_CHECKING:
    from vmq.compiler import Result, compile  # noqa: A004  (the name of what it does)
    from vmq.errors import VmqError
    from vmq.runtime import Session

_HOMES = {"Result": "vmq.compiler", "Session": "vmq.runtime", "VmqError": "vmq.errors", "compile": "vmq.compiler"}


def __getattr__(name: str) -> Any:
    """Load what is asked for: `import vmq` and `vmq --help` stay quick."""
    if name not in _HOMES:
        raise AttributeError(f"module 'vmq' has no attribute {name!r}")
    import importlib

    globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return globals()[name]


def __dir__() -> list[str]:
    return __all__
