"""Where a run's reports come from, how scenarios come to guests, and what is told of those without end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from ikectx.errors import KernelError, UsageError
from ikectx_cli.lab import start as lab_start
from ikectx_cli.lab.boot import Job
from ikectx_cli.lab.commands import lab
from ikectx_cli.lab.report import ScenarioReport
from ikectx_cli.lab.start import RunRequest, Share

NAMES = ("handover", "pull", "left")


class Guests:
    """Stands for all guests of a run: each boot runs so many scenarios, and then ends, or is ended."""

    def __init__(self, *ran: int, end: BaseException | int = 0) -> None:
        self.ran, self.end = list(ran), end
        self.requests: list[RunRequest] = []
        self.jobs: list[Job] = []

    async def boot(
        self, guests: Sequence[str], job: Job, output: Callable[[bytes], None], _say: object
    ) -> int:
        assert job.shared is not None
        share, guest = Share(job.shared), int(job.argv[-1])
        request = share.request()
        self.requests.append(request)
        self.jobs.append(job)
        takes, left = share.take(guest), self.ran.pop(0)
        for number in takes:
            output(b"[%s] running\n" % request.names[number].encode())
            await asyncio.sleep(0)
            if left == 0:
                break
            left -= 1
            share.put(
                number, {**ScenarioReport(request.names[number], ok=True).as_json(), "guest": guests[0]}
            )
            if request.logs:
                (share.folder / "logs" / request.label(number)).mkdir(parents=True)
        else:
            return 0
        if isinstance(self.end, BaseException):
            raise self.end
        return self.end


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """This machine needs guests; the function given some makes them the machine's."""
    monkeypatch.setattr(lab_start, "guests", lambda _request: ("uml", "qemu"))

    def put(guests: Guests) -> Guests:
        monkeypatch.setattr(lab_start.lab_guest, "boot", guests.boot)
        return guests

    return put


def silent(_line: str) -> None: ...


def test_another_probe_is_that_of_every_scenario() -> None:
    assert RunRequest(NAMES, interval_ms=0.5).load(0).interval_ms == 0.5
    assert RunRequest(NAMES).load(0).interval_ms == 5.0


def test_a_run_in_a_guest(machine: Any, tmp_path: Path) -> None:
    guests = machine(Guests(3))
    found: dict[int, dict[str, Any]] = {}
    request = RunRequest(NAMES, clock="virtual", delay_ms=3.0, logs=str(tmp_path / "logs"), brief=True)
    reports = lab_start.run(request, silent, found)
    assert [report["scenario"] for report in reports] == list(NAMES)
    assert [found[number] for number in range(3)] == reports
    assert guests.requests == [request]
    assert (guests.jobs[0].clock, guests.jobs[0].root) == ("virtual", Path("/"))
    assert (tmp_path / "logs" / "handover").is_dir()
    assert not guests.jobs[0].shared.exists()


def test_guests_side_by_side_share_the_scenarios(machine: Any) -> None:
    guests = machine(Guests(3, 3))
    said: list[str] = []
    reports = lab_start.run(RunRequest(NAMES, jobs=2), said.append)
    assert [report["scenario"] for report in reports] == list(NAMES)
    assert [job.argv[-1] for job in guests.jobs] == ["1", "2"]
    assert "guest 1 [handover] running" in said


def test_each_scenario_is_taken_once(tmp_path: Path) -> None:
    share = Share.make(tmp_path, RunRequest(NAMES))
    one, other = share.take(1), share.take(2)
    assert [next(one), next(other), next(one)] == [0, 1, 2]
    assert not share.waiting()
    assert list(one) == list(other) == []
    assert (share.taken(1), share.taken(2)) == ([0, 2], [1])


def test_what_is_in_the_folder_of_a_run(tmp_path: Path) -> None:
    request = RunRequest(NAMES, root="/srv/trixie", jobs=2)
    share = Share.make(tmp_path, request)
    assert share.request() == request
    assert (tmp_path / "packages" / "ikectx_cli" / "lab" / "start.py").exists()
    share.put(1, {"scenario": "pull"})
    (tmp_path / "reports" / "000002.part").touch()
    assert share.reports() == {1: {"scenario": "pull"}}


@pytest.mark.parametrize("ran", [1, 2])
def test_a_guest_that_dies_costs_the_scenario_it_ran(machine: Any, ran: int) -> None:
    machine(Guests(ran, 3, end=KernelError("the UML guest ended before its job did")))
    reports = lab_start.run(RunRequest(NAMES), silent)
    assert [report["scenario"] for report in reports] == list(NAMES)
    assert [report["ok"] for report in reports] == [number != ran for number in range(3)]
    assert reports[ran]["error"] == "the UML guest ended before its job did"
    assert (reports[ran]["guest"], reports[ran]["clock"]) == ("uml", "real")


def test_a_job_that_fails_before_its_first_scenario(machine: Any) -> None:
    class Broken(Guests):
        async def boot(
            self, guests: Sequence[str], job: Job, output: Callable[[bytes], None], _: object
        ) -> int:
            output(b"ModuleNotFoundError: cbor2\n")
            return 1

    machine(Broken())
    with pytest.raises(KernelError, match="guest uml ended with status 1: ModuleNotFoundError: cbor2"):
        lab_start.run(RunRequest(NAMES), silent)


@pytest.mark.parametrize("ran", [0, 1, 2])
def test_what_did_not_run_has_failed(machine: Any, ran: int) -> None:
    machine(Guests(ran, end=KeyboardInterrupt()))
    done = CliRunner().invoke(lab, ["run", "--json", "--quiet", *NAMES])
    assert done.exit_code != 0
    reports = json.loads(done.stdout[: done.stdout.rindex("]") + 1])
    assert [report["scenario"] for report in reports] == list(NAMES)
    assert [report["ok"] for report in reports] == [number < ran for number in range(3)]
    assert {report.get("error") for report in reports[ran:]} == {"did not run to its end"}


def test_nothing_can_run(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(_request: RunRequest) -> tuple[str, ...]:
        raise KernelError("this kernel has no ESP")

    monkeypatch.setattr(lab_start, "guests", none)
    done = CliRunner().invoke(lab, ["run", "--json", "--quiet", *NAMES])
    assert isinstance(done.exception, KernelError)
    assert not done.stdout


def test_repeated_runs_have_numbers(machine: Any, tmp_path: Path) -> None:
    request = RunRequest(("pull", "pull", "left"), logs=str(tmp_path))
    assert [request.label(number) for number in range(3)] == ["pull-1", "pull-2", "left"]
    machine(Guests(1, 2, end=KernelError("it died")))
    reports = lab_start.run(request, silent)
    assert (reports[1]["scenario"], reports[1]["run"]) == ("pull", 2)
    assert {path.name for path in tmp_path.iterdir()} == {"pull-1", "left"}


def test_esp_in_user_space_needs_no_guest() -> None:
    assert lab_start.guests(RunRequest(NAMES, "libipsec")) == ("host",)
    with pytest.raises(UsageError, match="--guest host has no virtual time"):
        lab_start.check(RunRequest(NAMES, "libipsec", clock="virtual"))
