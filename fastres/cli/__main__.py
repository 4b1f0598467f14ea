"""`python -m fastres.cli`, for where the `fastres` script is not on PATH."""

from __future__ import annotations

import sys

from fastres.cli import main

sys.exit(main())
