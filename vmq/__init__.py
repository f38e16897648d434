"""vmq: post-training quantization of video-matting networks, from ONNX to ONNX."""
