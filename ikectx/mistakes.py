"""How an error that should not exist is logged: by where it came up, without its text."""

from __future__ import annotations

import logging
import traceback

from .escape import OurText


def log_mistake(log: logging.Logger, what: str, error: BaseException) -> None:
    """Log the places that `error` came through; not what it says, which may hold anything, keys too."""
    where = "".join(traceback.format_tb(error.__traceback__))
    log.error("%s: %s, a mistake in the program:\n%s", what, type(error).__name__, OurText(where))
