"""Lowerings: what the `blt` operators become in each flavour. The graphs before this step are the same."""
