"""Guests: which one is taken, what boots it, and what is told when it does not start."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ikectx.errors import KernelError, UsageError
from ikectx_cli.lab import guest as lab_guest
from ikectx_cli.lab import qemu as lab_qemu
from ikectx_cli.lab import uml as lab_uml
from ikectx_cli.lab.boot import (
    CLOCK,
    GUEST,
    Boot,
    Job,
    Marks,
    NotStartedError,
    own_folder,
    run,
    sweep,
)

JOB = Job(("true",))
NOTHING = lab_guest.Means(esp=False, uml=False, qemu_lacks=("file (Debian package)",))
ALL = lab_guest.Means(esp=True, uml=True, qemu_lacks=())


def the_job(**keys: object) -> Job:
    return Job(("true",), **keys)  # type: ignore[arg-type]


# -- which guest --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("guest", "job", "means", "ways"),
    [
        ("auto", JOB, ALL, ("host",)),
        ("auto", JOB, lab_guest.Means(False, True, ()), ("uml", "qemu")),
        ("auto", JOB, lab_guest.Means(False, True, ("file",)), ("uml",)),
        ("auto", JOB, lab_guest.Means(False, False, ()), ("qemu",)),
        ("auto", the_job(clock="virtual"), ALL, ("uml",)),
        ("auto", the_job(root=Path("/srv/trixie")), ALL, ("uml",)),
        ("auto", the_job(cpus=2), ALL, ("uml", "qemu")),
        ("uml", JOB, NOTHING, ("uml",)),
        ("qemu", JOB, ALL, ("qemu",)),
        ("host", JOB, ALL, ("host",)),
    ],
)
def test_the_guest_that_is_taken(guest: str, job: Job, means: lab_guest.Means, ways: tuple[str, ...]) -> None:
    assert lab_guest.ways(guest, job, means) == ways


def test_no_guest_can_be_had() -> None:
    with pytest.raises(KernelError, match=r"IKECTX_UML names; or .*: file \(Debian package\)$"):
        lab_guest.ways("auto", JOB, NOTHING)
    with pytest.raises(KernelError, match=r"virtual time, which tests/uml.sh builds or IKECTX_UML_VIRTUAL"):
        lab_guest.ways("auto", the_job(clock="virtual"), lab_guest.Means(True, False, ()))
    with pytest.raises(KernelError, match="no ESP"):
        lab_guest.ways("host", JOB, NOTHING)


def test_a_root_without_this_projects_python(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no /opt/ikectx/\.venv/bin/python"):
        lab_guest.python(tmp_path)
    (tmp_path / "opt/ikectx/.venv/bin").mkdir(parents=True)
    (tmp_path / "opt/ikectx/.venv/bin/python").symlink_to("/its/own/python3")
    assert lab_guest.python(tmp_path) == "/opt/ikectx/.venv/bin/python"


# -- UML ----------------------------------------------------------------------------------------


@pytest.fixture
def configurations(tmp_path: Path) -> Path:
    folder = tmp_path / "uml"
    folder.mkdir()
    for name in ("small.config", "smp.config", "virtual-time.config"):
        (folder / name).write_text(f"# {name}\n")
    return folder


def program(path: Path, age: float = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o755)
    os.utime(path, (1e9 - age, 1e9 - age))
    return path


def test_the_uml_kernel_that_is_built_for_this_configuration(tmp_path: Path, configurations: Path) -> None:
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache")}

    def found(clock: str) -> Path | None:
        return lab_uml.find_kernel(clock, environment, configurations)

    assert found("real") is None
    digest = lab_uml.digest("real", configurations)
    assert len(digest) == 16 and digest != lab_uml.digest("virtual", configurations)
    cache = tmp_path / "cache" / "ikectx"
    program(cache / f"linux-smp-{digest}-7.2.13", age=100)
    newest = program(cache / f"linux-smp-{digest}-7.2.9")
    program(cache / "linux-smp-0123456789abcdef-7.3")
    (cache / f"linux-smp-{digest}-7.4.part").touch(mode=0o644)
    assert found("real") == newest
    assert found("virtual") is None
    (configurations / "smp.config").write_text("another\n")
    assert found("real") is None


@pytest.mark.parametrize(("clock", "kind"), [("real", "smp"), ("virtual", "virtual")])
def test_the_script_that_builds_uml_kernels_names_them_as_the_lab_does(
    tmp_path: Path, clock: str, kind: str
) -> None:
    environment = {"XDG_CACHE_HOME": str(tmp_path), "PATH": os.environ["PATH"]}

    def told() -> str:
        script = [lab_uml.FOLDER.with_suffix(".sh"), "--find", kind]
        return subprocess.run(script, env=environment, capture_output=True, text=True, check=False).stdout

    assert told() == ""
    built = program(tmp_path / "ikectx" / f"{lab_uml.STEMS[clock]}-{lab_uml.digest(clock)}-7.3.4")
    assert lab_uml.find_kernel(clock, environment) == built
    assert told() == f"{built}\n"
    environment[lab_uml.VARIABLES[clock]] = "/another"
    assert told() == "/another\n"


def test_the_uml_kernel_that_the_environment_names(tmp_path: Path, configurations: Path) -> None:
    mine = program(tmp_path / "linux")
    environment = {"IKECTX_UML": str(mine), "IKECTX_UML_VIRTUAL": str(tmp_path), "HOME": str(tmp_path)}
    assert lab_uml.find_kernel("real", environment, configurations) == mine
    with pytest.raises(KernelError, match=r"IKECTX_UML_VIRTUAL=.*: there is no such program"):
        lab_uml.find_kernel("virtual", environment, configurations)
    assert lab_uml.cache(environment) == tmp_path / ".cache" / "ikectx"
    assert lab_uml.find_kernel("real", {"HOME": str(tmp_path)}, tmp_path / "none") is None


def test_a_uml_command_line() -> None:
    real = lab_uml.command_line(Path("/k"), the_job(cpus=2, memory_mib=512), Path("/own"))
    assert {"mem=512M", "ncpus=2", "init=/own/init", "uml_dir=/own"} <= set(real)
    virtual = lab_uml.command_line(Path("/k"), the_job(clock="virtual"), Path("/own"))
    assert "time-travel=inf-cpu" in virtual
    assert not [word for word in virtual if word.startswith("ncpus")]


def test_what_a_uml_guest_mounts() -> None:
    marks = Marks("7")
    script = lab_uml.init(the_job(shared=Path("/srv/my share")), marks)
    lines = script.splitlines()
    share = "mkdir -p '/mnt/root/srv/my share' && mount --bind '/srv/my share' '/mnt/root/srv/my share'"
    # from here on no path leads to this machine's files but by the share
    assert lines.index(share) < lines.index("mount -o remount,bind,ro /")
    assert f"echo '{marks.begin}'" in lines
    assert script.count("-t overlay") == 1
    other = lab_uml.init(the_job(root=Path("/srv/trixie")), marks)
    assert "mount --bind /srv/trixie /mnt/lower-root" in other
    assert f"/mnt/root{lab_uml.CHECKOUT}" in other


def test_a_checkout_below_tmp_is_in_the_guest(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest has a /tmp of its own, which would hide it."""
    monkeypatch.setattr(lab_uml, "CHECKOUT", Path("/tmp/me/ikectx"))
    monkeypatch.setattr(lab_uml.sys, "prefix", "/tmp/me/ikectx/.venv")
    monkeypatch.setattr(lab_uml.sys, "base_prefix", "/usr")
    script = lab_uml.init(the_job(folder=Path("/run/elsewhere")), Marks()).splitlines()
    (own,) = [number for number, line in enumerate(script) if line.startswith("for name in run tmp")]
    overlays = [line for line in script[own:] if "-t overlay" in line]
    assert len(overlays) == 2
    assert "/run/elsewhere /mnt/lower-0" in overlays[0]
    assert "/tmp/me/ikectx /mnt/lower-1" in overlays[1]


# -- QEMU ---------------------------------------------------------------------------------------


def test_the_newest_kernel_with_esp_and_9p(tmp_path: Path) -> None:
    boot, modules = tmp_path / "boot", tmp_path / "modules"
    boot.mkdir()
    for version, files in {
        "6.1.0-9-amd64": ("net/ipv4/esp4.ko", "fs/9p/9p.ko"),
        "6.1.0-10-amd64": ("net/ipv4/esp4.ko.xz", "fs/9p/9p.ko.xz"),
        "6.1.0-11-cloud-amd64": ("net/ipv4/esp4.ko",),
    }.items():
        (boot / f"vmlinuz-{version}").touch()
        for name in files:
            path = modules / version / "kernel" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    assert lab_qemu.find_kernel(boot, modules) == boot / "vmlinuz-6.1.0-10-amd64"
    assert lab_qemu.find_kernel(tmp_path, modules) is None


def test_an_emulated_cpu(tmp_path: Path) -> None:
    told = tmp_path / "cpuinfo"
    assert not lab_qemu.emulated(told)
    told.write_text("model name\t: QEMU TCG CPU version 2.5+\n")
    assert lab_qemu.emulated(told)
    told.write_text("model name\t: A real one\n")
    assert not lab_qemu.emulated(told)


def test_the_virtual_machine_caches_all_that_python_starts_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab_qemu.sys, "prefix", "/home/me/.venv")
    monkeypatch.setattr(lab_qemu.sys, "base_prefix", "/opt/python")
    script = lab_qemu.inside(JOB, Marks())
    for path in ("/usr", "/home/me/.venv", "/opt/python", lab_qemu.CHECKOUT):
        assert f"mount --bind /run/cached{path} {path}" in script
    monkeypatch.setattr(lab_qemu.sys, "base_prefix", "/usr")
    assert lab_qemu.inside(JOB, Marks()).count(" /usr\n") == 1


def test_what_a_virtual_machine_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    assert {"file (Debian package)", "busybox-static (Debian package)"} <= set(lab_qemu.missing())


# -- folders ------------------------------------------------------------------------------------


def test_the_folder_of_a_killed_process_is_removed(tmp_path: Path) -> None:
    for name in ("ikl-run-999999999-x", "ikl-uml-999999999-y", "ikl-default", "ikl-a-lab-name"):
        (tmp_path / name).mkdir()
    with own_folder("run", tmp_path) as mine:
        assert sweep(tmp_path) == ["ikl-run-999999999-x", "ikl-uml-999999999-y"]
        assert mine.is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ikl-a-lab-name", "ikl-default"]


# -- a boot -------------------------------------------------------------------------------------


def console(script: str, *, marks: Marks | None, **keys: float) -> tuple[int, list[bytes]]:
    """Runs a guest that is a shell script; gives its status and what its job said."""
    said: list[bytes] = []
    boot = Boot("the guest", ["sh", "-c", script], marks, **keys)  # type: ignore[arg-type]
    return asyncio.run(run(boot, said.append)), said


def test_a_job_between_its_marks() -> None:
    marks = Marks()
    script = "\n".join(["echo booting", *marks.around("sh -c 'echo out; echo err >&2; printf rest; exit 3'")])
    assert console(script + "\nsleep 1000", marks=marks) == (3, [b"out\n", b"err\n", b"rest"])


def test_a_guest_that_ends_tells_its_last_words() -> None:
    script = "echo 'FileNotFoundError: file' >&2; exit 1"
    with pytest.raises(NotStartedError, match=r"the guest ended before .*\n  FileNotFoundError: file$"):
        console(script, marks=Marks())
    with pytest.raises(NotStartedError, match=r"did not start within 0 s; it said last:\n  hello"):
        console("echo hello; sleep 1000", marks=Marks(), patience=0.3)
    with pytest.raises(NotStartedError, match="said nothing"):
        console("", marks=Marks())


def test_a_program_that_outlives_its_guest_holds_the_console() -> None:
    # in a process of its own, because at its end it would say what it must not
    program = """
import asyncio
from ikectx_cli.lab.boot import Boot, Marks, NotStartedError, run
try:
    asyncio.run(run(Boot("it", ["sh", "-c", "setsid sleep 20 & exit 0"], Marks(), 0.3), print))
except NotStartedError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("it did not start within 0 s and said nothing\n", "")


def test_a_guest_that_ends_before_its_job() -> None:
    marks = Marks()
    with pytest.raises(KernelError, match="ended before its job did; its last line was: Kernel panic"):
        console(f"echo '{marks.begin}'; echo Kernel panic", marks=marks)


def test_a_program_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/no/such/folder")
    with pytest.raises(NotStartedError, match="setpriv"):
        console("true", marks=None)


def test_a_guest_that_does_not_start_gives_way_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, str]] = []

    async def broken(_job: Job, _output: object) -> int:
        raise NotStartedError("the UML guest ended before it had started; it said last:\n  AMX")

    async def fine(job: Job, _output: object) -> int:
        ran.append((job.environment[GUEST], job.environment[CLOCK]))
        return 5

    monkeypatch.setattr(lab_guest, "_BOOTS", {"uml": broken, "qemu": fine})
    said: list[str] = []
    assert asyncio.run(lab_guest.boot(("uml", "qemu"), JOB, lambda _line: None, said.append)) == 5
    assert ran == [("qemu", "real")]
    assert "AMX" in said[0] and "trying guest qemu instead" in said[0]
    with pytest.raises(NotStartedError):
        asyncio.run(lab_guest.boot(("uml",), JOB, lambda _line: None, said.append))


def test_the_guest_that_is_this_machine(tmp_path: Path) -> None:
    said: list[bytes] = []
    job = Job((sys.executable, "-c", "import os; print(os.getcwd(), os.environ['X'])"), folder=tmp_path)
    job = Job(job.argv, tmp_path, environment={"X": "y"})
    assert asyncio.run(lab_guest.boot(("host",), job, said.append, said.append)) == 0  # type: ignore[arg-type]
    assert said == [f"{tmp_path} y\n".encode()]
