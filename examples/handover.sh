#!/bin/sh
# Hands the VPN of this mobile node over whenever a link gets an address, without NetworkManager:
#
#     handover.sh wlan0=nsg eth0=psg
#
# From then on it waits for addresses on these interfaces, and asks the gateway that is named for each. A move that
# can be foreseen is announced beforehand: `ikectx mobile handover --to nsg --predictive`; it then completes by
# itself as soon as this node has another address, whether or not this script runs.
set -eu

ikectx=${IKECTX:-ikectx}
[ $# -gt 0 ] || { echo "usage: $0 INTERFACE=GATEWAY..." >&2; exit 2; }

near() {
    # the gateway for an interface, or nothing
    wanted=$1
    shift
    for pair; do
        [ "${pair%%=*}" = "$wanted" ] && { echo "${pair#*=}"; return; }
    done
    return 0
}

# "3: wlan0    inet 198.51.100.7/24 brd ... scope global ..."; what goes begins with "Deleted"
ip -o monitor address | while read -r number interface family address rest; do
    case $number in Deleted*) continue ;; esac
    case $family in inet|inet6) ;; *) continue ;; esac
    case $rest in *'scope global'*) ;; *) continue ;; esac
    case $rest in *tentative*) continue ;; esac
    gateway=$(near "$interface" "$@")
    [ -n "$gateway" ] || continue
    echo "$interface has ${address%%/*}: to $gateway"
    "$ikectx" mobile handover --to "$gateway" --address "${address%%/*}" || echo "failed with $?" >&2
done
