"""Generation: the two PyTorch forms that the runtime is compared with (the slow reference and the cached steps), and
conversations on a stream."""
