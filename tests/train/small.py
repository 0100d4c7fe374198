"""Settings that make the tiny configuration even smaller, for tests that compile it."""

ONE_LAYER = ("model.latent.n_layers=1", "model.decoder.n_layers=1")
"""One block of each kind has every operation of a step. A second one doubles the seconds of compilation."""
