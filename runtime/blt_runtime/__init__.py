"""Run exported Byte Latent Transformers: numpy and a backend's library, no torch, no onnx."""
