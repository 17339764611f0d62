#!/usr/bin/env bash
# Makes a bare Debian 12 or 13 (root and python3, nothing else) ready for the demo and the tests: Debian packages
# by apt-get, a virtual environment in .venv, kernels for guests. What is there already is left alone.
#
#   tests/setup.sh            everything
#   tests/setup.sh --demo     without the tools that only the tests need, and without building kernels
#   tests/setup.sh --here     for the tests that need no guest
#
# Installing strongSwan's package would start its service; that is prevented while this runs.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
NAME=setup
. tests/packages.sh
extra=dev
guests=yes
case ${1:-} in
    --demo) extra=lab ;;
    --here) guests=no ;;
esac

PACKAGES=(
    charon-systemd strongswan-swanctl strongswan-pki
    libcharon-extra-plugins libcharon-extauth-plugins
    libstrongswan-standard-plugins libstrongswan-extra-plugins
    iproute2 iputils-ping nftables kmod tcpdump
)
# tshark checks the Wireshark dissector in examples/, bird2 runs the configuration in examples/bird in the lab,
# netbase names protocols and ports, and charon shows these names where it finds them.
# spin checks the model of a transfer, which it translates into C.
TEST_PACKAGES=(tshark bird2 netbase spin gcc libc6-dev)
# Other IKE daemons, as mobile nodes of the lab. They are not installed: libreswan and strongSwan conflict.
PEERS=(libreswan openiked)
# Make the new machines of tests/roots.sh.
ROOT_PACKAGES=(debootstrap debian-archive-keyring)
# For a kernel without ESP where no User-Mode Linux is to be had: Debian's own kernel in a virtual machine.
# virtme-ng asks `file` what the kernel is.
VM_PACKAGES=(qemu-system-x86 linux-image-amd64 busybox-static file)

kernel_has_esp() {
    command -v ip > /dev/null || return 1
    modprobe -a -q esp4 esp6 xfrm_user 2> /dev/null || true
    unshare -n ip xfrm state add src 127.0.0.1 dst 127.0.0.2 proto esp spi 0x100 mode tunnel \
        aead 'rfc4106(gcm(aes))' "0x$(printf '00%.0s' {1..20})" 128 2> /dev/null
}

python_fits() { # the interpreter is new enough (and, with "venv", can make virtual environments)
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null || return 1
    [ "${2:-}" != venv ] || "$1" -c 'import ensurepip, venv' 2> /dev/null
}

find_python() {
    local candidate
    for candidate in python3 /usr/bin/python3 python3.13 python3.12 python3.11; do
        candidate=$(command -v "$candidate") && python_fits "$candidate" "${1:-}" || continue
        "$candidate" -c 'import sys; print(sys.executable)' && return # behind a version manager's shim
    done
    return 1
}

make_venv() {
    local python stamp wanted_extra=$extra
    stamp="$(cat pyproject.toml cli/__init__.py | cksum) $root"
    if python_fits .venv/bin/python; then # what the tests need holds what the demo needs
        for extra in "$extra" dev; do
            [ "$(cat ".venv/.ready-$extra" 2> /dev/null)" != "$extra $stamp" ] || return 0
        done
        extra=$wanted_extra
    fi
    if ! python_fits .venv/bin/python; then
        if ! python=$(find_python venv); then
            find_python > /dev/null || die "Python 3.11 or newer is needed"
            install python3-venv
            python=$(find_python venv) || die "no Python here can make a virtual environment"
        fi
        say "making .venv with $python"
        rm -rf .venv
        "$python" -m venv .venv
    fi
    say "installing Python packages into .venv"
    mkdir -p build
    .venv/bin/python -m pip install -q --disable-pip-version-check -e ".[$extra]" > build/pip.log 2>&1 \
        || { tail -20 build/pip.log >&2; die "pip failed, see build/pip.log"; }
    echo "$extra $stamp" > ".venv/.ready-$extra"
}

install "${PACKAGES[@]}"
if [ $extra = dev ]; then
    install "${TEST_PACKAGES[@]}"
    unpack "${PEERS[@]}"
fi
if [ $guests = yes ]; then
    if [ $extra = dev ]; then
        install "${ROOT_PACKAGES[@]}"
        tests/uml.sh || say "tests that run in User-Mode Linux will fail"
    fi
    if ! kernel_has_esp && ! tests/uml.sh --find smp > /dev/null; then install "${VM_PACKAGES[@]}"; fi
fi
make_venv
