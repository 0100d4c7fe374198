"""A bundle as a model repository for NVIDIA Triton Inference Server's Python backend. Nothing here needs torch.

`repository` writes the folder. `model` is the file that the server runs: it is copied into the folder and imports
nothing but `blt_runtime`, numpy and what the Python backend brings.
"""
