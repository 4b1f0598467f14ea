"""What a command raises for input it cannot use."""

from __future__ import annotations


class CommandError(Exception):
    """A user's mistake, or something missing here: one clear sentence, exit status 2."""
