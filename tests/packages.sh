# Sourced by setup.sh, uml.sh and roots.sh: how these say things, and how they install what is missing.
# NAME is the name that stands before what is said.

say() { printf '%s: %s\n' "$NAME" "$*" >&2; }
die() { say "$*"; exit 1; }

lacking() { # the packages of the arguments that are not installed
    local name
    for name in "$@"; do
        case $(dpkg-query -W -f '${Status}' "$name" 2> /dev/null) in
            "install ok installed") ;;
            *) echo "$name" ;;
        esac
    done
}

progress() { # a line of the terminal for how far apt-get is, which tells that here (APT::Status-Fd)
    local kind percent text
    while IFS=: read -r kind _ percent text; do
        [ ! -t 2 ] || [[ $kind != *status ]] || printf '\r%3d %% %-70.70s' "${percent%%.*}" "$text" >&2
    done
    [ ! -t 2 ] || printf '\r\033[K' >&2
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
    apt-get -q -y -o DPkg::Lock::Timeout=600 -o APT::Status-Fd=4 --no-install-recommends install "${wanted[@]}" \
        4>&1 >> build/apt.log 2>&1 | progress || status=$?
    [ -z "$guard" ] || rm -f $guard
    [ $status = 0 ] || { tail -20 build/apt.log >&2; die "apt-get could not install ${wanted[*]}, see build/apt.log"; }
}

cache() { # the folder for what is made once for all checkouts of this user
    echo "${XDG_CACHE_HOME:-$HOME/.cache}/ikectx"
}

unpack() { # unpack PACKAGE...: those, and what they need and this machine lacks, into a folder, not installed
    # for packages that conflict with others here; the lab finds the folder (`cli/lab/daemons.py`)
    local folder wanted stamp status=0
    folder=$(cache)/unpacked
    stamp="$* of $(. /etc/os-release && echo "${VERSION_CODENAME:-}")"
    [ "$(cat "$folder/stamp" 2> /dev/null)" != "$stamp" ] || return 0
    command -v apt-get > /dev/null || die "no apt-get here: $*"
    say "unpacking $*"
    mkdir -p build
    [ $updated = yes ] || apt-get -q -o DPkg::Lock::Timeout=600 update > build/apt.log 2>&1 || say "apt-get update failed, trying without"
    updated=yes
    # new ones only: what is here in an older version fits
    mapfile -t wanted < <(apt-get -s --no-install-recommends install "$@" | awk '$1 == "Inst" && $3 !~ /^\[/ { print $2 }')
    rm -rf "$folder.new"
    mkdir -p "$folder.new/debs"
    (cd "$folder.new/debs" && apt-get -q -o APT::Sandbox::User=root download "${wanted[@]}") >> build/apt.log 2>&1 || status=$?
    [ $status = 0 ] || { tail -20 build/apt.log >&2; die "apt-get could not fetch ${wanted[*]}, see build/apt.log"; }
    find "$folder.new/debs" -name '*.deb' -exec dpkg -x {} "$folder.new" \;
    rm -r "$folder.new/debs"
    echo "$stamp" > "$folder.new/stamp"
    rm -rf "$folder"
    mv "$folder.new" "$folder"
}

mirror() { # the Debian archive that this machine's apt uses; fails where there is none
    local suite
    suite=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
    apt-get indextargets --format '$(RELEASE) $(REPO_URI)' 'Created-By: Packages' \
        | awk -v "suite=$suite" '$1 == suite || $1 ~ /^(sid|unstable|testing|stable)$/ { found = $2 }
                                 END { if (found == "") exit 1; print found }'
}

keyring() { # the keys of the Debian archive; fails where they are not installed
    local file
    for file in /usr/share/keyrings/debian-archive-keyring.{pgp,gpg}; do
        [ ! -e "$file" ] || { echo "$file"; return; }
    done
    return 1
}
