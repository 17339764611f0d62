"""Where a run's reports come from, and what is told of a run that did not come to its end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from ikectx.errors import KernelError
from ikectx_cli import lab_start
from ikectx_cli.lab import lab
from ikectx_cli.lab_report import Report

NAMES = ("handover", "pull", "left")


class Guest:
    """A VM that runs some scenarios, and then ends, or is ended."""

    def __init__(self, ran: int, end: BaseException | None = None) -> None:
        self.ran, self.end = ran, end
        self.request = lab_start.Request(())

    def __call__(self, argv: Sequence[str], *, shared: Path, **_: Any) -> int:
        results, request = argv[-2:]
        self.request = lab_start.Request(**json.loads(request))
        reports = [Report(name, ok=True).as_json() for name in self.request.names[: self.ran]]
        Path(results).write_text("".join(json.dumps(report) + "\n" for report in reports))
        if self.request.logs:
            Path(self.request.logs, "handover").mkdir(parents=True)
        if self.end is not None:
            raise self.end
        return 0


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """This machine needs a VM; the function given one makes that the machine's."""
    monkeypatch.setattr(lab_start, "choose", lambda _esp: "vm")

    def put(guest: Guest) -> Guest:
        monkeypatch.setattr(lab_start.lab_vm, "run_in_vm", guest)
        return guest

    return put


def test_a_run_in_a_vm(machine: Any, tmp_path: Path) -> None:
    guest = machine(Guest(3))
    given: list[dict[str, Any]] = []
    request = lab_start.Request(NAMES, delay_ms=3.0, logs=str(tmp_path / "logs"), brief=True)
    reports = lab_start.run(request, lambda _line: None, given.append)
    assert [report["scenario"] for report in reports] == list(NAMES)
    assert given == reports
    assert (guest.request.esp, guest.request.delay_ms, guest.request.brief) == ("kernel", 3.0, True)
    assert (tmp_path / "logs" / "handover").is_dir()


@pytest.mark.parametrize(
    "end", [KeyboardInterrupt(), KernelError("the VM ended before its command did"), None]
)
@pytest.mark.parametrize("ran", [1, 2])
def test_what_did_not_run_has_failed(machine: Any, ran: int, end: BaseException | None) -> None:
    machine(Guest(ran, end))
    done = CliRunner().invoke(lab, ["run", "--json", "--quiet", *NAMES])
    assert done.exit_code != 0
    reports = json.loads(done.stdout[: done.stdout.rindex("]") + 1])
    assert [report["scenario"] for report in reports] == list(NAMES)
    assert [report["ok"] for report in reports] == [number < ran for number in range(3)]
    assert {report.get("error") for report in reports[ran:]} == {"did not run to its end"}


def test_a_run_that_is_ended_before_its_first_scenario(machine: Any) -> None:
    machine(Guest(0, KeyboardInterrupt()))
    done = CliRunner().invoke(lab, ["run", "--json", "--quiet", *NAMES])
    assert [report["ok"] for report in json.loads(done.stdout[: done.stdout.rindex("]") + 1])] == [False] * 3


def test_nothing_can_run(machine: Any) -> None:
    machine(Guest(0, KernelError("no VM can boot here")))
    done = CliRunner().invoke(lab, ["run", "--json", "--quiet", *NAMES])
    assert isinstance(done.exception, KernelError)
    assert not done.stdout
