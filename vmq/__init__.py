"""vmq: post-training quantization of video-matting networks, from ONNX to ONNX."""

__version__ = "0.1.0"
