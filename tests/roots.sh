#!/usr/bin/env bash
# Installations of Debian, each in a folder of ~/.cache/ikectx, made by debootstrap: what a new machine has
# (minbase, git and python3), and that with all that the tests need. SUITE is bookworm, trixie or sid.
#
#   tests/roots.sh bare SUITE                  makes the new machine where it is missing, prints its folder
#   tests/roots.sh ready SUITE                 makes the one that is set up (for `ikectx lab run --root`), prints its folder;
#                                              its opt/ikectx/charon runs its strongSwan here (for IKECTX_LAB_CHARON_NSG)
#   tests/roots.sh machine SUITE COMMAND       makes the one in which systemd boots, on which COMMAND (a shell line) has run
#                                              and whose /opt/wheels has this project's dependencies; prints its folder
#   tests/roots.sh fresh SUITE OUT COMMAND...  runs a command in a copy of the new machine, in a copy of this checkout;
#                                              what it writes is lost, but for build/tests, which is the folder OUT here
#
# A command in such a machine runs under this machine's kernel (chroot), with its network; whatever it starts ends
# with it. The kernels for guests are the ones that are built here.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
NAME=roots
. tests/packages.sh

SUITES=" bookworm trixie sid "
DAYS=7 # after so many days a new sid is made, since that changes, and what nobody used is removed
MACHINE_PACKAGES="systemd systemd-sysv systemd-container dbus iputils-ping tcpdump strongswan-pki"
running= # the process of a command inside
CHECKOUT=/root/ikectx # in a new machine
READY=/opt/ikectx     # in one that is set up: its virtual environment is there

alone() { # alone SUITE: waits until no other process makes an installation of it
    mkdir -p "$(cache)"
    exec 9> "$(cache)/root-$1.lock"
    flock 9
}

old() { # old FOLDER...: removes those that are older than DAYS
    find "$@" -maxdepth 0 -mtime +$DAYS -exec rm -rf --one-file-system {} + 2> /dev/null || true
}

make_bare() { # make_bare SUITE: the new machine, and where it is
    local suite=$1 folder keys archive
    folder=$(cache)/root-$suite
    if [ "$suite" = sid ]; then old "$folder"; fi
    if [ ! -d "$folder" ]; then
        archive=$(mirror) || die "no Debian archive is among the sources of apt here"
        install debootstrap debian-archive-keyring
        keys=$(keyring)
        say "making a new machine: $suite"
        mkdir -p "$(cache)/debs-$suite" build
        rm -rf --one-file-system "$folder.new"
        debootstrap --variant=minbase --include=git,python3 --keyring="$keys" --cache-dir="$(cache)/debs-$suite" \
            "$suite" "$folder.new" "$archive" > "build/root-$suite.log" 2>&1 \
            || { tail -5 "build/root-$suite.log" >&2; die "debootstrap failed, see build/root-$suite.log"; }
        touch "$folder.new"
        mv "$folder.new" "$folder"
    fi
    echo "$folder"
}

make_ready() { # make_ready SUITE: the one that is set up, and where it is
    local suite=$1 bare folder digest
    bare=$(make_bare "$suite")
    digest=$( (cat tests/roots.sh tests/setup.sh tests/packages.sh && dependencies) | sha256sum)
    folder=$(cache)/ready-$suite-${digest:0:16}
    if [ ! -d "$folder" ] || [ "$bare" -nt "$folder" ]; then
        say "setting up: $suite"
        rm -rf --one-file-system "$folder" "$folder.new"
        old "$(cache)/ready-$suite-"*
        cp -a "$bare" "$folder.new"
        checkout "$folder.new$READY"
        inside "$suite" "$folder.new" $READY build tests/setup.sh --here >&2
        # only the environment stays: what is tested is the checkout
        find "$folder.new$READY" -mindepth 1 -maxdepth 1 ! -name .venv -exec rm -rf {} +
        charon_elsewhere "$folder" > "$folder.new$READY/charon"
        chmod 755 "$folder.new$READY/charon"
        mv "$folder.new" "$folder"
    fi
    touch "$folder"
    echo "$folder"
}

make_machine() { # make_machine SUITE COMMAND: the one in which systemd boots, and where it is
    local suite=$1 command=$2 bare folder digest
    bare=$(make_bare "$suite")
    digest=$( (cat tests/roots.sh && dependencies && echo "$command") | sha256sum)
    folder=$(cache)/machine-$suite-${digest:0:16}
    if [ ! -d "$folder" ] || [ "$bare" -nt "$folder" ]; then
        say "setting up with systemd: $suite"
        rm -rf --one-file-system "$folder" "$folder.new"
        old "$(cache)/machine-$suite-"*
        cp -a "$bare" "$folder.new"
        mkdir -p build
        dependencies > "$folder.new/root/dependencies"
        inside "$suite" "$folder.new" /root build bash -euc '
            printf "#!/bin/sh\nexit 101\n" > /usr/sbin/policy-rc.d && chmod 755 /usr/sbin/policy-rc.d
            echo "APT::Get::Assume-Yes true;" > /etc/apt/apt.conf.d/unattended
            export DEBIAN_FRONTEND=noninteractive
            apt-get -q update
            eval "$2"
            apt-get -q --no-install-recommends install $1
            python3 -m venv /root/venv
            python3 -c "import json; print(*json.load(open(\"dependencies\"))[0], \"setuptools>=77\", \"wheel\", sep=chr(10))" \
                > requirements
            /root/venv/bin/pip download -q --disable-pip-version-check -d /opt/wheels -r requirements
            rm -rf /root/venv /usr/sbin/policy-rc.d' - "$MACHINE_PACKAGES" "$command" > "build/machine-$suite.log" 2>&1 \
            || { tail -5 "build/machine-$suite.log" >&2; die "see build/machine-$suite.log"; }
        rm -rf "$folder.new/root/build"
        mv "$folder.new" "$folder"
    fi
    touch "$folder"
    echo "$folder"
}

dependencies() { # the Python packages that the project names
    python3 -c 'import json, tomllib
with open("pyproject.toml", "rb") as file: project = tomllib.load(file)["project"]
print(json.dumps([project["dependencies"], project["optional-dependencies"]]))'
}

charon_elsewhere() { # charon_elsewhere ROOT: a script that runs that installation's charon in another one
    # its plugins are looked for in one place; the lab starts it in a mount namespace of its own
    cat << END
#!/bin/sh
mount --bind $1/usr/lib/ipsec /usr/lib/ipsec
exec $1/lib64/ld-linux-x86-64.so.2 --library-path $1/usr/lib/ipsec:$1/usr/lib/x86_64-linux-gnu $1/usr/sbin/charon-systemd
END
}

checkout() { # checkout FOLDER: a copy of this one, without what git ignores
    mkdir -p "$1"
    git ls-files -z --cached --others --exclude-standard | xargs -0 cp -a --parents -t "$1"
}

inside() { # inside SUITE ROOT FOLDER OUT COMMAND...: run it in that root, in that folder of it; OUT is its build/tests
    local suite=$1 there=$2 folder=$3 out=$4 name status=0 exports=()
    shift 4
    mkdir -p "$(cache)/debs-$suite" "$(cache)/pip" "$there/root/.cache/pip" "$there$folder/build/tests"
    # this machine's way to the package registries
    for name in $(compgen -e PIP_) http_proxy https_proxy no_proxy HTTP_PROXY HTTPS_PROXY NO_PROXY; do
        [ -z "${!name:-}" ] || exports+=("$name=${!name}")
    done
    [ -z "${PIP_CERT:-}" ] || exports+=(PIP_CERT=/run/certificates)
    apt-config dump | grep -E '^Acquire::(https?::|Check-Valid-Until|Retries)' > "$there/etc/apt/apt.conf.d/this-machine" || true
    for name in IKECTX_UML IKECTX_UML_VIRTUAL; do
        [ ! -e "$there/opt/${name,,}" ] || exports+=("$name=/opt/${name,,}")
    done
    # packages that were fetched before need not be fetched again
    find "$(cache)/debs-$suite" -name '*.deb' -exec cp -nl -t "$there/var/cache/apt/archives" {} +
    # in the background, since a shell that waits for a program in the foreground hears no signal
    unshare --mount --pid --fork --kill-child -- bash -euc '
        there=$1
        mount --bind "$there" "$there" # `ip netns exec` wants its root folder to be a mount
        mount -t proc proc "$there/proc"
        mount --rbind /sys "$there/sys"
        mount --rbind /dev "$there/dev"
        for name in run tmp; do mount -t tmpfs -o mode=1777 "$name" "$there/$name"; done
        [ -z "${PIP_CERT:-}" ] || cp "$PIP_CERT" "$there/run/certificates"
        cp /etc/resolv.conf "$there/etc/resolv.conf"
        mount --bind "$2" "$there/root/.cache/pip"
        mount --bind "$4" "$there$3/build/tests"
        shift 4
        exec chroot "$there" "$@"' \
        - "$there" "$(cache)/pip" "$folder" "$out" \
        env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 \
        "${exports[@]}" env -C "$folder" "$@" &
    running=$!
    wait $running || status=$?
    find "$there/var/cache/apt/archives" -name '*.deb' -exec cp -nl -t "$(cache)/debs-$suite" {} +
    return $status
}

fresh() { # fresh SUITE OUT COMMAND...
    local suite=$1 out=$2 bare kernel
    shift 2
    bare=$(make_bare "$suite")
    exec 9>&- # made
    mkdir -p "$out"
    out=$(cd "$out" && pwd)
    copy=$(mktemp -d "$(cache)/fresh-$suite.XXXXXX")
    trap 'rm -rf --one-file-system "$copy"' EXIT
    cp -a --reflink=auto "$bare/." "$copy"
    checkout "$copy$CHECKOUT"
    mkdir -p "$copy$CHECKOUT/build"
    for kernel in smp:ikectx_uml virtual:ikectx_uml_virtual; do
        tests/uml.sh --find "${kernel%:*}" > "$copy/kernel" && cp "$(cat "$copy/kernel")" "$copy/opt/${kernel#*:}"
    done
    rm -f "$copy/kernel"
    inside "$suite" "$copy" $CHECKOUT "$out" "$@"
}

case ${1:-} in
    bare | ready | machine | fresh) [[ $SUITES == *" ${2:-} "* ]] || die "which of$SUITES?" ;;
    *) die "what? One of: bare, ready, machine, fresh" ;;
esac
trap '[ -z "$running" ] || kill -KILL "$running" 2> /dev/null; exit 143' TERM INT
[ "$(id -u)" = 0 ] || die "debootstrap and chroot need root: sudo $0 $*"
alone "$2"
case $1 in
    bare) make_bare "$2" ;;
    ready) make_ready "$2" ;;
    machine) make_machine "$2" "${3:?}" ;;
    fresh) fresh "${@:2}" ;;
esac
