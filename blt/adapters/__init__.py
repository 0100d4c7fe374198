"""Foreign checkpoint formats, one module each: a readable name map and a configuration reader."""
