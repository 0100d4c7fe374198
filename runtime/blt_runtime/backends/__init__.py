"""Backends execute the graphs. `protocol` defines their interface."""
