"""One escape for text that came from outside: identities, names and reasons of peers and mobile nodes.

Such text may have newlines, which forge lines of a log, and ESC, which controls a terminal. Whatever shows it
to a person passes it through `escaped`, and every line of the agents' logs goes through `Escaping`.
"""

from __future__ import annotations

import logging


class OurText(str):
    """Text that this program made, possibly of several lines: it is logged as it is."""

    __slots__ = ()


def escaped(text: str, keep: str = "") -> str:
    r"""The text with each character that is not printable written as \xNN, \uNNNN or \UNNNNNNNN.

    Control characters, line and paragraph separators and marks that turn the direction of writing are such
    characters. A backslash stays as it is, because identities as DOMAIN\user have one. `keep`: characters
    that are left as they are all the same.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char in keep else _code(char) for char in text)


def _code(char: str) -> str:
    number = ord(char)
    if number <= 0xFF:
        return f"\\x{number:02x}"
    return f"\\u{number:04x}" if number <= 0xFFFF else f"\\U{number:08x}"


class Escaping(logging.Filter):
    """Escapes the arguments of log messages; for the handler of a program's log.

    The message's own text is the program's. Messages of other libraries come ready-made and are escaped as a
    whole, except for their newlines. The lines of a traceback are indented, so that none is taken for a
    message, because the last ones may have text from outside.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """True: no message is left out."""
        if not record.args:
            record.msg = escaped(str(record.msg), keep="\n")
        elif isinstance(record.args, tuple):
            record.args = tuple(_safe(arg) for arg in record.args)
        else:
            record.args = {key: _safe(arg) for key, arg in record.args.items()}
        if record.exc_info and not record.exc_text:
            lines = _PLAIN.formatException(record.exc_info).splitlines()
            record.exc_text = "\n".join(f"    {escaped(line)}" for line in lines)
        return True


_PLAIN = logging.Formatter()


def _safe(value: object) -> object:
    if value is None or isinstance(value, int | float | OurText):
        return value
    return escaped(str(value))
