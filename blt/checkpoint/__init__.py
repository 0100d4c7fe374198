"""Checkpoints: `formats` opens one of any format as a `Source`, `models` makes models of it and saves them."""
