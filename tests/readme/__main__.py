"""Boots the guest in which README is followed, and leaves what came of it in a folder.

readme.xml (JUnit: a test for each part of README), readme.log (what was run, and what it said), and after a
failure the journals of the machines.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from ikectx.errors import KernelError
from ikectx_cli.lab.boot import CHECKOUT, Boot, Job, Marks, own_folder, run, tidy
from ikectx_cli.lab.uml import command_line, find_kernel

from .blocks import blocks
from .machines import NAMES

INSTALL = ("Five minutes to two real gateways", 0)
SUITE = "bookworm"
RESULTS = ("readme.xml", "readme.log", "install.log", "journals")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
INIT = """\
#!/bin/sh
export PATH={path}
layer() {{ # layer NAME LOWER TARGET
    mkdir -p /mnt/upper/$1 /mnt/work/$1 "$3"
    mount -t overlay -o "lowerdir=$2,upperdir=/mnt/upper/$1,workdir=/mnt/work/$1" "$1" "$3"
}}
mount -t tmpfs -o mode=755,size=90% guest /mnt
mkdir -p /mnt/lower /mnt/root
mount --bind {root} /mnt/lower
layer installed /mnt/lower /mnt/root
for name in dev proc shared; do mkdir -p /mnt/root/$name; done
mount -t devtmpfs dev /mnt/root/dev
mount -t proc proc /mnt/root/proc
mount --bind {shared} /mnt/root/shared
ip link set lo up
chroot /mnt/root env -i PATH={path} HOME=/root LANG=C.UTF-8 \\
    bash -eu /shared/install > /mnt/root/shared/install.log 2>&1
echo $? > /mnt/root/shared/installed
umount /mnt/root/dev /mnt/root/proc /mnt/root/shared /mnt/root
layer outer /mnt/upper/installed:/mnt/lower /mnt/root
for name in {machines}; do layer $name /mnt/upper/installed:/mnt/lower /mnt/root/machines/$name; done
mkdir -p /mnt/root/shared /mnt/root/checkout /mnt/root/old
mount --bind {shared} /mnt/root/shared
mount --bind {checkout} /mnt/root/checkout
cp {shared}/readme.service /mnt/root/etc/systemd/system/
mkdir -p /mnt/root/etc/systemd/system/multi-user.target.wants
ln -s ../readme.service /mnt/root/etc/systemd/system/multi-user.target.wants/
rm -f /mnt/root/etc/systemd/system/multi-user.target.wants/strongswan.service
mount -o remount,bind,ro /
cd /mnt/root
pivot_root . old
exec chroot . /sbin/init < /dev/console > /dev/console 2>&1
"""
UNIT = """\
[Unit]
Description=Follows README
After=dbus.service

[Service]
Type=oneshot
WorkingDirectory=/checkout
Environment=PYTHONDONTWRITEBYTECODE=1
ExecStart=/shared/run
StandardOutput=tty
StandardError=tty
TTYPath=/dev/console
"""
SECONDS = 900
"""After which the guest is given up. A walk takes some 150 on two busy CPUs."""


def main(results: Path) -> int:
    found = blocks((CHECKOUT / "README.md").read_text())
    heading, number = INSTALL
    install = found[heading][number]
    words = ["tests/roots.sh", "machine", SUITE, install.splitlines()[0]]
    root = Path(
        subprocess.run(words, cwd=CHECKOUT, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    )
    for name in RESULTS:
        shutil.rmtree(results / name, ignore_errors=True)
        (results / name).unlink(missing_ok=True)
    with own_folder("readme") as shared:
        try:
            prepare(shared, found, install)
            with tidy():
                return asyncio.run(walk(shared, root))
        except KernelError as error:
            print(f"readme: {error}", file=sys.stderr)
            return 1
        finally:
            for name in RESULTS:
                if (shared / name).is_dir():
                    shutil.copytree(shared / name, results / name)
                elif (shared / name).exists():
                    shutil.copyfile(shared / name, results / name)


def prepare(shared: Path, found: dict[str, list[str]], install: str) -> None:
    """Write what the guest needs: README's blocks, the first one to be run, this checkout to be cloned."""
    (shared / "blocks.json").write_text(json.dumps(found))
    git = "git -c user.name=readme -c user.email=readme@example.org"
    script = (
        'mkdir "$1/origin"'
        ' && git ls-files -z --cached --others --exclude-standard | xargs -0 cp -a --parents -t "$1/origin"'
        f' && cd "$1/origin" && git init -q && git add -A && {git} commit -q -m "as it is"'
    )
    subprocess.run(["bash", "-euc", script, "-", str(shared)], cwd=CHECKOUT, check=True)
    (shared / "install").write_text(
        "git config --system safe.directory '*'\n"
        "printf '[global]\\nno-index = true\\nfind-links = /opt/wheels\\n' > /etc/pip.conf\n"
        + install.replace(
            "git clone … ", "git clone -q file:///shared/origin "
        )  # README leaves the address open
        + "ikectx --version\n"
    )


async def walk(shared: Path, root: Path) -> int:
    """Boot the guest, show what it says, and return its status. Errors: KernelError."""
    kernel = find_kernel("real")
    if kernel is None:
        raise KernelError("no UML kernel is built", hint="tests/uml.sh builds it")
    marks = Marks()
    commands = "PYTHONPATH=/checkout python3 -m tests.readme.walk /shared"
    run_file = shared / "run"
    run_file.write_text("\n".join(["#!/bin/sh", *marks.around(commands), "systemctl poweroff -ff"]) + "\n")
    (shared / "readme.service").write_text(UNIT)
    quoted = {"root": root, "shared": shared, "checkout": CHECKOUT, "path": PATH, "machines": " ".join(NAMES)}
    (shared / "init").write_text(INIT.format(**quoted))
    for path in (run_file, shared / "init"):
        path.chmod(0o700)
    job = Job(("true",), memory_mib=3072)
    words = [*command_line(kernel, job, shared), "systemd.show_status=no", "systemd.log_target=null"]
    boot = Boot(f"the UML guest ({kernel})", words, marks, patience=300, environment=dict(os.environ))

    def tell(line: bytes) -> None:
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()

    try:
        async with asyncio.timeout(SECONDS):
            return await run(boot, tell)
    except TimeoutError:
        raise KernelError(f"the guest did not come to its end within {SECONDS} s") from None


if __name__ == "__main__":
    folder = Path(sys.argv[1]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    sys.exit(main(folder))
