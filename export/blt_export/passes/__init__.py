"""Graph passes. One rule list a file: `run(model, ...) -> int` works in place and returns the places it changed."""
