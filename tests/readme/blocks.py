"""README's code blocks, by the heading that they stand under."""

from __future__ import annotations

import re
from dataclasses import dataclass, field


def blocks(text: str) -> dict[str, list[str]]:
    """The blocks under each heading, in their order, without the indentation of a list that they stand in."""
    found: dict[str, list[str]] = {}
    heading = ""
    lines: list[str] | None = None
    indentation = 0
    for line in text.splitlines():
        fence = re.match(r"( *)```", line)
        if fence and lines is None:
            lines, indentation = [], len(fence[1])
        elif fence:
            assert lines is not None
            found.setdefault(heading, []).append("\n".join(lines) + "\n")
            lines = None
        elif lines is not None:
            lines.append(line[indentation:] if not line[:indentation].strip() else line)
        elif line.startswith("#"):
            heading = line.lstrip("# ")
    return found


@dataclass
class Page:
    """README's blocks, and which of them nothing has used yet."""

    found: dict[str, list[str]]
    used: set[tuple[str, int]] = field(default_factory=set)

    def take(self, heading: str, number: int = 0) -> str:
        """A block under a heading. Errors: LookupError if README has it no more."""
        if not 0 <= number < len(self.found.get(heading, ())):
            raise LookupError(f"README has no block {number} under {heading!r}")
        self.used.add((heading, number))
        return self.found[heading][number]

    def unused(self) -> list[tuple[str, int]]:
        everything = {(heading, at) for heading, texts in self.found.items() for at in range(len(texts))}
        return sorted(everything - self.used)
