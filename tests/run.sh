#!/usr/bin/env bash
# Sets up and runs everything; root on Debian 12 or 13 is enough. A second run skips what is there.
#
#   tests/run.sh                  all steps; those for a virtual machine run beside the others
#   tests/run.sh lint unit ...    some of: format lint types floors unit live kernel scenarios; one after the other
#
# Steps go on after a failure. The closing lines tell what failed and what was skipped, and why; the last one
# counts: "N passed, N failed". What ALL_SECONDS do not suffice for has failed. Exit code 0 only without failures.
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 1
HERE=(format lint types floors unit live)
GUEST=(kernel scenarios)
STEPS=("${HERE[@]}" "${GUEST[@]}")
HOUSES=(ikectx vici_bridge mobike_ext cli)
results=$root/build/tests
tally=$results/tally
ALL_SECONDS=2280
OUT_OF_TIME=124 # exit code of `timeout`
limit=7200      # seconds from here, for steps that were asked for by name

say() { printf '\n== %s\n' "$*"; }

note() { printf '%s\t%s\t%s\n' "$1" "$2" "$3" >> "$tally"; } # note PASSED FAILED TEXT: what the last lines tell

check() { # check NAME COMMAND...: one check that passes or fails
    local name=$1 began=$SECONDS
    shift
    say "$name"
    if "$@"; then
        note 1 0 "$name: passed, $((SECONDS - began)) s, this machine"
    else
        note 0 1 "$name: FAILED, $((SECONDS - began)) s, this machine"
    fi
}

count() { # count NAME WHERE REPORT STATUS SECONDS: add up what pytest or the lab wrote into REPORT
    local numbers good bad skipped line
    if ! numbers=$(.venv/bin/python tests/summary.py "$3"); then
        note 0 1 "$1: FAILED without a report (exit code $4), $5 s, $2"
        return
    fi
    read -r good bad skipped <<< "$numbers"
    [ "$4" -eq 0 ] || [ "$bad" -gt 0 ] || bad=1
    note "$good" "$bad" "$1: $good passed, $bad failed, $skipped skipped, $5 s, $2"
    [ "$4" -ne $OUT_OF_TIME ] || note 0 0 "    ended by its limit of time"
    while read -r line; do note 0 0 "    $line"; done < <(tail -n +2 <<< "$numbers")
}

within() { # within SECONDS COMMAND...: end it after so long, or when the time for all of this is over
    local most=$1 rest=$((limit - SECONDS))
    shift
    # told to end, pytest and the lab still write what they have; they end what they began themselves
    timeout --foreground -k 60 $((rest < 1 ? 1 : rest < most ? rest : most)) "$@"
}

step_format() { check format .venv/bin/ruff format --check .; }
step_lint() { check lint .venv/bin/ruff check .; }
step_types() { check types .venv/bin/mypy "${HOUSES[@]}"; }
step_floors() { check floors .venv/bin/lint-imports --no-logo; }

step_unit() {
    local began=$SECONDS
    say unit
    rm -f "$results/unit.xml"
    within 1200 .venv/bin/python -m pytest -q -m "not kernel_esp and not live" --junit-xml "$results/unit.xml"
    count unit "this machine" "$results/unit.xml" $? $((SECONDS - began))
}

step_live() { # real charons here, with ESP in user space
    local began=$SECONDS
    say live
    rm -f "$results/live.xml"
    within 1200 .venv/bin/python -m pytest -q -m live --junit-xml "$results/live.xml" tests/live
    count live "this machine" "$results/live.xml" $? $((SECONDS - began))
}

step_kernel() { # what needs a kernel with ESP: here where it has it, else in a virtual machine
    local where status began=$SECONDS
    say kernel
    rm -f "$results/kernel.xml" "$results/kernel.where"
    within 900 .venv/bin/python tests/kernel.py "$results"
    status=$?
    where=$(cat "$results/kernel.where" 2> /dev/null || echo "no kernel with ESP could be had")
    count kernel "$where" "$results/kernel.xml" $status $((SECONDS - began))
}

step_scenarios() { # on real charons: here or in a virtual machine, as the lab decides and says
    local status began=$SECONDS
    say scenarios
    rm -rf "$results/scenarios.json" "$results/logs"
    within 3000 .venv/bin/ikectx lab run --all --brief --json --logs "$results/logs" \
        > "$results/scenarios.json"
    status=$?
    count scenarios "see above; logs in ${results#"$root"/}/logs" "$results/scenarios.json" $status $((SECONDS - began))
}

main() {
    local step steps=("$@") guests=--here
    [ ${#steps[@]} -gt 0 ] || steps=("${STEPS[@]}")
    for step in "${steps[@]}"; do
        [[ " ${STEPS[*]} " == *" $step "* ]] || { echo "no step $step; there are: ${STEPS[*]}" >&2; exit 2; }
    done
    [ "$(id -u)" = 0 ] || { echo "network namespaces and XFRM need root: sudo $0 $*" >&2; exit 1; }
    for step in "${GUEST[@]}"; do [[ " ${steps[*]} " != *" $step "* ]] || guests=; done
    tests/setup.sh $guests || { echo "0 passed, 1 failed"; exit 1; }
    mkdir -p "$results"
    rm -f "$results"/tally*
    if [ $# -gt 0 ]; then
        for step in "${steps[@]}"; do "step_$step"; done
    else
        limit=$ALL_SECONDS
        # a virtual machine mostly waits for its one emulated processor, and real charons for each other
        set -m # a process group of its own, so that nothing of it stays when this script is stopped
        (tally=$results/tally.guest && for step in "${GUEST[@]}"; do "step_$step"; done) > "$results/guest.log" 2>&1 &
        guest=$!
        set +m
        trap 'kill -TERM -- -$guest 2> /dev/null' EXIT
        for step in "${HERE[@]}"; do "step_$step"; done
        wait "$guest"
        cat "$results/guest.log"
    fi
    say "what ran"
    cat "$results"/tally* | cut -f 3
    cat "$results"/tally* | awk -F '\t' '{ good += $1; bad += $2 } END { print good " passed, " bad + 0 " failed"; exit bad > 0 }'
}

main "$@"
