#!/usr/bin/env bash
# A live tunnel moves between two real gateways, on this one machine: installs what is missing (Debian packages,
# a virtual environment in .venv), then runs the scenario `handover`. Needs root. Options go to the scenario (--json).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[ "$(id -u)" = 0 ] || { echo "demo: network namespaces and XFRM need root: sudo $0 $*" >&2; exit 1; }
"$root/tests/setup.sh" --demo
exec "$root/.venv/bin/ikectx" lab run handover "$@"
