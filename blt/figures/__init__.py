"""Figures of the command line: PNG by matplotlib, or HTML of its own; one module each, what they share in `page`."""
