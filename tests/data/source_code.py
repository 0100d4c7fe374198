"""Random lines of source code, the same in every run."""

from __future__ import annotations

from random import Random

WORDS = "self index value error path result count line text name node parse token split buffer cache offset"
LINES = (
    "    def {0}_{1}(self, {2}: int) -> str:\n",
    '        """Return the {0} of {1}, or None without {2}."""\n',
    "        if self.{0} is None:\n",
    "            raise ValueError(f'{0} has no {1}: {{{2}}}')\n",
    "        for {0} in self.{1}[{2}:]:\n",
    "            {0} += len({1}) * {3}\n",
    "        return {0}.{1}({2}, {3})\n\n",
)


def code(n_bytes: int) -> bytes:
    """The first `n_bytes` of the lines."""
    random = Random(0)
    lines = ""
    while len(lines) < n_bytes:
        lines += random.choice(LINES).format(*random.choices(WORDS.split(), k=3), random.randrange(1000))
    return lines[:n_bytes].encode()
