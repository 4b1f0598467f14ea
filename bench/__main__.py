"""`python -m bench` in a checkout: the same command line as `fastres bench`."""

from __future__ import annotations

import sys

from fastres.cli import guarded

from .command import main

if __name__ == "__main__":
    sys.exit(guarded("bench", lambda: main(sys.argv[1:])))
