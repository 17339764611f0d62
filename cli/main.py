"""The entry point `ikectx`: starts the updown hook directly, and the command line for everything else."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line with `args` (default: this process's) and exit with its code."""
    args = list(sys.argv[1:] if args is None else args)
    if args[:1] == ["updown"]:
        from . import updown

        updown.main(args[1:])
    from .commands import run

    sys.exit(run(args))


if __name__ == "__main__":
    main()
