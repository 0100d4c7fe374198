"""Figures of the command line: PNG or HTML, one module per figure; `page` holds the shared parts."""
