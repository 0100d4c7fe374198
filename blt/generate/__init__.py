"""Generation: the two PyTorch forms that the runtime is compared with (the slow reference and the cached steps),
conversations on a stream, and the prompts of a file in a batch."""
