"""Graph passes, one a file. `run(model, ...) -> int` works in place and returns how many places it changed."""
