"""What `doctor` finds: results of checks, and how they are shown.

A check is a function of the `World` that yields outcomes. Levels: ok; note (worth knowing); warn (something
will not work as expected); fail (nothing can be moved, or not safely).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass

from ikectx.errors import IkectxError

from .world import World

LEVELS = ("ok", "note", "warn", "fail")


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check, and what to do about it (possibly of several lines)."""

    check: str
    level: str
    found: str
    fix: str = ""

    def to_json(self) -> dict[str, str]:
        return asdict(self)


Outcome = tuple[str, str] | tuple[str, str, str]
"""(level, result) or (level, result, what to do)."""

Check = Callable[[World], Iterator[Outcome]]
Checks = Sequence[tuple[str, Check]]


def examine(world: World, checks: Checks, for_root: Collection[str] = ()) -> list[Finding]:
    """Run every check; one that cannot run yields the reason, and the others go on.

    `for_root`: names of checks that see nothing, or the wrong thing, without root's rights.
    """
    findings: list[Finding] = []
    reasons: dict[str, str] = {}
    left = [] if world.is_root() else [name for name, _ in checks if name in for_root]
    if left:
        findings.append(
            Finding("rights", "warn", f"only root can check: {', '.join(left)}", "run it as root")
        )
    for name, check in checks:
        if name in left:
            continue
        try:
            findings += [Finding(name, *outcome) for outcome in check(world)]
        except IkectxError as error:
            first = reasons.setdefault(str(error), name)
            if first == name:
                findings.append(Finding(name, "fail", str(error), error.hint))
            else:
                findings.append(Finding(name, "note", f"not checked, because of {first}"))
        except OSError as error:
            findings.append(Finding(name, "warn", f"could not be checked: {error}"))
    return findings


def show_findings(findings: Sequence[Finding]) -> None:
    """Print a table, then what to do, then one closing line."""
    from ..render import printable, say, table

    styles = {"ok": "green", "note": "cyan", "warn": "yellow", "fail": "bold red"}
    table(
        ("check", "", "found"),
        [(item.check, item.level, item.found) for item in findings],
        styles=styles,
        wraps="found",
    )
    told = [item for item in findings if item.fix and item.level != "ok"]
    for fix in dict.fromkeys(item.fix for item in told):
        for item in told:
            if item.fix == fix:
                say(f"{item.level} {item.check}: {item.found}")
        for line in fix.splitlines():
            print(f"    {printable(line)}".rstrip())
    counts = {level: sum(item.level == level for item in findings) for level in LEVELS}
    print(", ".join(f"{count} {level}" for level, count in counts.items()))


def concluded(findings: Sequence[Finding], as_json: bool) -> int:
    """Print the findings; returns the exit code."""
    from ..answers import show_json

    failed = any(finding.level == "fail" for finding in findings)
    if as_json:
        show_json({"ok": not failed, "findings": [finding.to_json() for finding in findings]})
    else:
        show_findings(findings)
    return int(failed)
