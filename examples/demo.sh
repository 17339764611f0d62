#!/usr/bin/env bash
# A live tunnel moves between two real gateways, on this one machine: installs what is missing (Debian packages,
# a virtual environment in .venv), then runs the scenario `handover`. Needs root. Options go to the scenario (--json).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$root/tests/setup.sh" --demo
exec "$root/.venv/bin/ikectx" lab run handover "$@"
