#!/usr/bin/env bash
# Makes a bare Debian 12 machine (root and python3, nothing else) ready for the demo and the tests:
# Debian packages by apt-get, a virtual environment in .venv. What is there already is left alone.
#
#   tests/setup.sh            everything
#   tests/setup.sh --demo     without the tools that only the tests need
#
# Installing strongSwan's package would start its service; that is prevented while this runs.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
extra=dev
[ "${1:-}" = --demo ] && extra=lab

PACKAGES=(
    charon-systemd strongswan-swanctl strongswan-pki
    libcharon-extra-plugins libcharon-extauth-plugins
    libstrongswan-standard-plugins libstrongswan-extra-plugins
    iproute2 iputils-ping nftables kmod tcpdump
)
# tshark checks the Wireshark dissector in examples/, bird2 runs the configuration in examples/bird in the lab.
TEST_PACKAGES=(tshark bird2)
# For a kernel without ESP, and for the tests also without SCTP: Debian's own kernel in a virtual machine.
VM_PACKAGES=(qemu-system-x86 linux-image-amd64 busybox-static)

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

kernel_has_esp() {
    command -v ip > /dev/null || return 1
    modprobe -a -q esp4 esp6 xfrm_user 2> /dev/null || true
    unshare -n ip xfrm state add src 127.0.0.1 dst 127.0.0.2 proto esp spi 0x100 mode tunnel \
        aead 'rfc4106(gcm(aes))' "0x$(printf '00%.0s' {1..20})" 128 2> /dev/null
}

kernel_has_sctp() { # IPPROTO_SCTP is 132
    modprobe -q sctp 2> /dev/null || true
    python3 -c 'import socket; socket.socket(socket.AF_INET, socket.SOCK_STREAM, 132)' 2> /dev/null
}

lacking() { # the packages of the arguments that are not installed
    local name
    for name in "$@"; do
        case $(dpkg-query -W -f '${Status}' "$name" 2> /dev/null) in
            "install ok installed") ;;
            *) echo "$name" ;;
        esac
    done
}

updated=no
install() { # install what is lacking of the arguments
    local wanted guard=/usr/sbin/policy-rc.d status=0
    mapfile -t wanted < <(lacking "$@")
    [ ${#wanted[@]} -eq 0 ] && return
    command -v apt-get > /dev/null || die "no apt-get here: install ${wanted[*]} (or what they are called), then try again"
    [ "$(id -u)" = 0 ] || die "run this as root: ${wanted[*]} must be installed"
    say "installing ${wanted[*]}"
    mkdir -p build
    export DEBIAN_FRONTEND=noninteractive
    if [ $updated = no ]; then
        apt-get -q -o DPkg::Lock::Timeout=600 update > build/apt.log 2>&1 || say "apt-get update failed, trying without"
        updated=yes
    fi
    # Services of the packages are not to start on this machine.
    if [ -e $guard ]; then guard=; else printf '#!/bin/sh\nexit 101\n' > $guard && chmod 755 $guard; fi
    apt-get -q -y -o DPkg::Lock::Timeout=600 --no-install-recommends install "${wanted[@]}" \
        >> build/apt.log 2>&1 || status=$?
    [ -z "$guard" ] || rm -f $guard
    [ $status = 0 ] || { tail -20 build/apt.log >&2; die "apt-get could not install ${wanted[*]}, see build/apt.log"; }
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
[ $extra = lab ] || install "${TEST_PACKAGES[@]}"
if ! kernel_has_esp || { [ $extra != lab ] && ! kernel_has_sctp; }; then install "${VM_PACKAGES[@]}"; fi
make_venv
