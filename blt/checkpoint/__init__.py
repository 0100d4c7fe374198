"""Checkpoints: one adapter per format, tensors that stay in their files, and the models made of them."""
