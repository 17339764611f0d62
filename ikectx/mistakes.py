"""Logging of exceptions that end a task: mistakes in the program by the place they came from, without their
text."""

from __future__ import annotations

import logging
import traceback

from .errors import IkectxError
from .escape import OurText


def log_mistake(log: logging.Logger, what: str, error: BaseException) -> None:
    """Log the places that `error` came through. Its text is left out, because it may contain keys."""
    where = "".join(traceback.format_tb(error.__traceback__))
    log.error("%s: %s, a mistake in the program:\n%s", what, type(error).__name__, OurText(where))


def log_failure(log: logging.Logger, what: str, error: BaseException) -> None:
    """Log the end of a task that nobody waits for: the text of an IkectxError, else as a mistake."""
    if isinstance(error, IkectxError):
        log.error("%s failed: %s", what, error)
    else:
        log_mistake(log, what, error)
