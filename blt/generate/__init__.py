"""The two PyTorch forms of generation that the runtime is compared with: the slow reference and the cached steps."""
