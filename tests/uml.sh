#!/usr/bin/env bash
# Builds the two User-Mode Linux kernels of the tests, from Debian's newest kernel source with uml/*.config:
# one with several CPUs, one with virtual time (a kernel has either). 17 minutes of CPU, so nine minutes on
# two CPUs that have nothing else to do (Linux 7.3.4); what is there already is left alone. They go to
# ~/.cache/ikectx, named linux-smp-DIGEST-VERSION and linux-virtual-DIGEST-VERSION, where DIGEST is of the
# configuration: another configuration is another kernel.
#
#   tests/uml.sh                        builds what is missing of both
#   tests/uml.sh --find smp|virtual     prints the kernel that the lab would take, fails where there is none
#
# Exit code 1 where none can be had: no Debian archive, another processor, or none that boots. The lab then does
# with QEMU what that can do.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
NAME=uml
. tests/packages.sh

BUILD_PACKAGES=(gcc libc6-dev make flex bison bc xz-utils)
SUITES=(trixie-backports sid)
OLDEST=6.16 # older ones have no seccomp=on, and die on CPUs with large register state (AMX)
declare -A CONFIGURATION=([smp]=smp.config [virtual]=virtual-time.config)
declare -A VARIABLE=([smp]=IKECTX_UML [virtual]=IKECTX_UML_VIRTUAL)

stem() { # stem KIND: what a kernel's file name begins with, for today's configuration
    local digest
    digest=$(cat tests/uml/small.config "tests/uml/${CONFIGURATION[$1]}" | sha256sum)
    echo "linux-$1-${digest:0:16}-"
}

find_kernel() { # find_kernel KIND: the one that the environment names, else the newest one built
    local named=${VARIABLE[$1]}
    if [ -n "${!named:-}" ]; then echo "${!named}"; else ls -t "$(cache)/$(stem "$1")"* 2> /dev/null | head -n 1 | grep .; fi
}

apt_aside() { # apt_aside PROGRAM ARGUMENT...: apt's programs with sources and lists of their own, in $work
    "$1" -q -o Dir::Etc::SourceList="$work/sources.list" -o Dir::Etc::SourceParts=/dev/null \
        -o Dir::State::Lists="$work/lists" -o Dir::Cache="$work/cache" -o APT::Sandbox::User=root "${@:2}"
}

sources() { # the names of the archive's kernel source packages that will do, newest first
    apt_aside apt-cache search --names-only '^linux-source-[0-9.]+$' | cut -d ' ' -f 1 | sort -rV \
        | while read -r name; do
            if dpkg --compare-versions "${name#linux-source-}" ge $OLDEST; then echo "$name"; fi
        done
}

unpack() { # unpack PACKAGE: its tree is then $work/source, without what no configuration here needs
    local package=$1 name=${1#linux-}
    say "fetching $package"
    (cd "$work" && apt_aside apt-get download "$package" > apt.log 2>&1) || { tail -5 "$work/apt.log" >&2; return 1; }
    rm -rf "$work/source"
    mkdir "$work/source"
    dpkg-deb --fsys-tarfile "$work/$package"_*.deb | tar -xO "./usr/src/linux-$name.tar.xz" \
        | tar -xJ -C "$work/source" --strip-components=1 --exclude='*/Documentation/*/*' \
            --exclude='*/drivers/gpu/*.[ch]' --exclude='*/drivers/media/*.[ch]' --exclude='*/drivers/net/wireless/*.[ch]' \
            --exclude='*/drivers/net/ethernet/*.[ch]' --exclude='*/sound/*.[ch]' --exclude='*.dts' --exclude='*.dtsi' \
        || return 1
    rm "$work/$package"_*.deb
}

configure() { # configure KIND: all that is asked for must be in (but what not every version has)
    local line
    mkdir -p "$work/$1"
    cat tests/uml/small.config "tests/uml/${CONFIGURATION[$1]}" > "$work/$1.config"
    make -s -C "$work/source" ARCH=um O="$work/$1" KCONFIG_ALLCONFIG="$work/$1.config" allnoconfig > /dev/null
    while read -r line; do
        grep -qxF "$line" "$work/$1/.config" || { say "this kernel has no $line"; return 1; }
    done < <(grep '^CONFIG_' "$work/$1.config" | grep -v '^CONFIG_PROC_SYSCTL=')
}

boots() { # boots KERNEL: it gets as far as its first program, whose end then ends the kernel (it aborts)
    printf '#!/bin/sh\necho booted\n' > "$work/init"
    chmod +x "$work/init"
    (
        ulimit -c 0
        timeout 60 "$1" seccomp=on mem=128M rootfstype=hostfs rootflags=/ ro init="$work/init" \
            uml_dir="$work" con=null con0=fd:0,fd:1 loglevel=0 < /dev/null || true
    ) > "$work/boot.log" 2>&1
    grep -q booted "$work/boot.log"
}

build() { # build SOURCE-PACKAGE KIND...: into the cache; fails where that one will not build or boot
    local package=$1 kind began=$SECONDS version
    shift
    unpack "$package" || return 1
    for kind in "$@"; do configure "$kind" || return 1; done
    version=$(make -s -C "$work/source" ARCH=um kernelversion)
    say "building Linux $version ($*), some nine minutes on two CPUs"
    # one make for both, so that no processor waits while the other links
    printf 'all: %s\n%s:\n\t+@$(MAKE) -s -C %s ARCH=um O=%s/$@ linux\n.PHONY: all %s\n' \
        "$*" "$*" "$work/source" "$work" "$*" > "$work/both.mk"
    make -s -j "$(nproc)" -f "$work/both.mk" > "$work/make.log" 2>&1 || { tail -5 "$work/make.log" >&2; return 1; }
    for kind in "$@"; do
        strip -o "$work/linux-$kind" "$work/$kind/linux"
        boots "$work/linux-$kind" || { say "Linux $version ($kind) does not boot here"; return 1; }
    done
    for kind in "$@"; do mv "$work/linux-$kind" "$(cache)/$(stem "$kind")$version"; done
    say "built in $((SECONDS - began)) s: $*"
}

main() {
    local kind archive keys suite package wanted=()
    if [ "${1:-}" = --find ]; then find_kernel "$2"; return; fi
    for kind in smp virtual; do find_kernel "$kind" > /dev/null || wanted+=("$kind"); done
    [ ${#wanted[@]} -gt 0 ] || return 0
    [ "$(uname -m)" = x86_64 ] || die "User-Mode Linux runs on x86_64 only, this is $(uname -m)"
    mkdir -p "$(cache)"
    exec 9> "$(cache)/uml.lock"
    flock 9 # another checkout may be building the same
    wanted=()
    for kind in smp virtual; do find_kernel "$kind" > /dev/null || wanted+=("$kind"); done
    [ ${#wanted[@]} -gt 0 ] || return 0
    command -v apt-get > /dev/null || die "no apt-get here, and Debian's kernel source is had by it"
    archive=$(mirror) || die "no Debian archive is among the sources of apt here"
    install "${BUILD_PACKAGES[@]}" debian-archive-keyring
    keys=$(keyring)
    work=$(mktemp -d "$(cache)/uml.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    mkdir -p "$work"/{lists,cache/archives}/partial
    for suite in "${SUITES[@]}"; do echo "deb [signed-by=$keys] $archive $suite main"; done > "$work/sources.list"
    apt_aside apt-get update > "$work/apt.log" 2>&1 || { tail -5 "$work/apt.log" >&2; die "no list of kernel sources"; }
    for package in $(sources); do
        if build "$package" "${wanted[@]}"; then return 0; fi
    done
    die "no kernel source of ${SUITES[*]} makes a kernel that boots here"
}

main "$@"
