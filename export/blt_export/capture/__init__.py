"""Capture: PyTorch step modules become ONNX graphs."""
