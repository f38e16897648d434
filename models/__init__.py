"""Networks in torch with exporters to ONNX. They need torch and safetensors only, nothing of vmq."""
