"""Lowerings: what the `blt` operators become in each flavour. Before this step, both flavours have the same graphs."""
