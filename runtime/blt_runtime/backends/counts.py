"""What a backend asks of its device, counted for measurements."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Counts:
    """Requests to a device so far, without those that prepare and probe a captured engine. Not exact while several
    threads run calls.

    launches: a captured graph that is replayed is one; a graph that runs uncaptured is as many as it has nodes on the
    device, a TensorRT engine as many as it has layers. A node may be several kernels, so this is the least. unknown:
    uncaptured runs whose nodes are not known, which `launches` does not contain. copies: of one buffer, or of one block
    of buffers, between main memory and the device. waits: for the device, by the host: at the end of a run where the
    provider waits there, and for copies to main memory, once for those of a call.
    """

    launches: int = 0
    unknown: int = 0
    copies: int = 0
    waits: int = 0

    def add(self, launches: int | None = 0, copies: int = 0, waits: int = 0) -> None:
        """launches: None for a run whose nodes are not known."""
        if launches is None:
            self.unknown += 1
        else:
            self.launches += launches
        self.copies += copies
        self.waits += waits

    def since(self, before: Counts) -> Counts:
        """The requests after `before`, which is an earlier copy."""
        pairs = zip(vars(self).items(), vars(before).values(), strict=True)
        return Counts(**{name: value - earlier for (name, value), earlier in pairs})
