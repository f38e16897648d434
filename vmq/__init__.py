"""vmq: post-training quantization of video-matting networks, from ONNX to ONNX.

    import vmq
    result = vmq.compile("rvm.onnx", bits=8, calib=["footage/"], output="rvm_w8a8.onnx")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Result", "__version__", "compile"]

if TYPE_CHECKING:
    from vmq.compiler import Result, compile  # noqa: A004  (the name of what it does)


def __getattr__(name: str) -> Any:
    """Load the compiler when it is asked for: `import vmq` and `vmq --help` stay quick."""
    if name in ("Result", "compile"):
        import importlib

        module = importlib.import_module("vmq.compiler")
        globals().update(Result=module.Result, compile=module.compile)
        return globals()[name]
    raise AttributeError(f"module 'vmq' has no attribute {name!r}")
