"""`python -m blt.cli` is `blt`."""

from blt.cli import main

if __name__ == "__main__":
    main()
