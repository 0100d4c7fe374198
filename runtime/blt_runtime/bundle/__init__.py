"""The bundle: its manifest, the specification of its graphs, and the checks at opening."""
