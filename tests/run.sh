#!/usr/bin/env bash
# Sets up and runs everything; root on Debian 12 or 13 is enough. A second run skips what is there.
#
#   tests/run.sh                  all steps, three at a time
#   tests/run.sh lint unit ...    some of them, one after the other:
#
#   format lint types floors              here
#   unit                                  here; without a name: in new-12 and new-13 alone, whose versions are these
#   live                                  here, with ESP in user space, and guests of every kind
#   kernel scenarios                      here where the kernel has ESP, else in a guest
#   virtual                               scenarios in a guest in virtual time: those that wait long, and the chief ones
#   kills                                 a choice of the cases of `ikectx lab kills`, in guests in virtual time
#   new-12 new-13                         README's two commands in a new Debian 12 and 13, from nothing; unit, on 13 live, too
#   scenarios-13                          a choice of scenarios on Debian 13, in guests
#   readme                                README's commands on three machines that a systemd has booted, in a guest
#   mixed                                 two versions of strongSwan: another one at nsg than at psg and mn
#   all-13 all-sid                        every scenario on Debian 13, and on sid: only when they are named
#   post-quantum                          the live tests of ML-KEM, by the strongSwan of sid: only when it is named
#
# Steps go on after a failure. The closing lines tell what failed and what was skipped, and why; the last one
# counts: "N passed, N failed". What ALL_SECONDS do not suffice for has failed. Exit code 0 only without failures.
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 1
HERE=(format lint types floors unit)
# The longest first, so that all LANES end at the same time. What needs charons waits for them half of its time: three
# lanes fill two processors.
LANES=3
ALL=(format lint types floors new-13 scenarios live new-12 readme virtual kills kernel scenarios-13 mixed)
STEPS=("${ALL[@]}" unit all-13 all-sid post-quantum)
# These wait for a time limit, a minute some of them, or have TCP, which a busy machine stretches: they run in
# virtual time only.
PATIENT=(begins fresh-keys inside-agents-killed inside-stays inside-traffic inside-terminated left lifetime lifetime-meanwhile move-life
    predictive-held silent-mn)
# In virtual time beside these: each way to move, whose limits hold there exactly.
EXACT=(handover handover-v6 handover-encap predictive predictive-v6 reactive reactive-v6 pull by-packet
    collision-all collision-agent collision-reactive nat-upgrade nat-reactive relay-plain-two
    route-unique)
# On Debian 13: each way to move, each way to give an SA other SPIs, and what depends on the versions of nft,
# strongSwan and Python.
CHOICE_13=(handover handover-v6 predictive reactive pull by-packet collision-all collision-agent collision-reactive
    move-esp-esn move-esp-esn-cbc move-life move-rekeyed-ike move-ten-times)
# In a network namespace that has nothing but a loopback: what else runs on this machine hears nothing of it, and the
# other way round.
APART=(unshare --net sh -c 'ip link set lo up && exec "$@"' -)
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
    within 1200 "${APART[@]}" .venv/bin/python -m pytest -q -m "not kernel_esp and not live" --junit-xml "$results/unit.xml"
    count unit "this machine" "$results/unit.xml" $? $((SECONDS - began))
}

step_live() { # real charons here, with ESP in user space
    local began=$SECONDS
    say live
    rm -f "$results/live.xml"
    within 1200 "${APART[@]}" .venv/bin/python -m pytest -q -m live --junit-xml "$results/live.xml" tests/live
    count live "this machine" "$results/live.xml" $? $((SECONDS - began))
}

step_kernel() { # what needs a kernel with ESP: here where it has it, else in a guest
    local where status began=$SECONDS
    say kernel
    rm -f "$results/kernel.xml" "$results/kernel.where"
    within 900 .venv/bin/python -m tests.kernel "$results"
    status=$?
    where=$(cat "$results/kernel.where" 2> /dev/null || echo "no kernel with ESP could be had")
    count kernel "$where" "$results/kernel.xml" $status $((SECONDS - began))
}

scenarios() { # scenarios STEP WHAT ARGUMENT...: run scenarios of the lab and count them; WHAT says on which machine
    local step=$1 what=$2 status began=$SECONDS
    shift 2
    say "$step"
    rm -rf "$results/$step.json" "$results/$step.logs"
    within 3000 .venv/bin/ikectx lab run "$@" --brief --json --logs "$results/$step.logs" > "$results/$step.json"
    status=$?
    count "$step" "$what; logs in ${results#"$root"/}/$step.logs" "$results/$step.json" $status $((SECONDS - began))
}

on_root() { # on_root SUITE COMMAND ARGUMENT...: the command gets its arguments and the folder of an installation
    local suite=$1 folder
    shift
    if folder=$(within 1200 tests/roots.sh ready "$suite"); then
        "$@" "$folder"
    else
        note 0 1 "$2: FAILED, no installation of $suite could be made"
    fi
}

# A guest mostly waits: two of them do not fill a processor.
step_scenarios() {
    local names name
    for name in $(cd tests/scenarios && echo [a-z]*); do
        [[ " ${PATIENT[*]} " == *" $name "* ]] || names+=("$name")
    done
    scenarios scenarios "on this Debian" "${names[@]}" --jobs 2
}

step_virtual() { # traced, since what is on the critical path of a handover is counted there (path.json)
    mkdir -p "$results/virtual.pictures"
    scenarios virtual "on this Debian" "${PATIENT[@]}" "${EXACT[@]}" --time virtual --trace "$results/virtual.pictures"
}

step_kills() { # the cases of tests/kills.txt; docs/reliability.md has more
    local status cases began=$SECONDS
    mapfile -t cases < tests/kills.txt
    say kills
    rm -rf "$results/kills.json" "$results/kills.logs"
    within 900 .venv/bin/ikectx lab kills "${cases[@]}" --guest uml --time virtual --jobs 2 --json \
        --quiet --logs "$results/kills.logs" > "$results/kills.json"
    status=$?
    count kills "in guests; logs in ${results#"$root"/}/kills.logs" "$results/kills.json" $status $((SECONDS - began))
}

step_scenarios-13() { on_root trixie scenarios scenarios-13 "on Debian 13" "${CHOICE_13[@]}" --jobs 2 --root; }
step_all-13() { on_root trixie scenarios all-13 "on Debian 13" --all --jobs 2 --root; }
step_all-sid() { on_root sid scenarios all-sid "on Debian sid" --all --jobs 2 --root; }

step_mixed() {
    local other=trixie
    [ "$(. /etc/os-release && echo "${VERSION_CODENAME:-}")" != trixie ] || other=bookworm
    on_root $other mixed mixed $other
}

mixed() { # mixed STEP SUITE ROOT: nsg's charon is that of the other installation
    IKECTX_LAB_CHARON_NSG=$3/opt/ikectx/charon \
        scenarios "$1" "nsg with the strongSwan of $2, else on this Debian" handover move-ten-times --guest uml
}

step_post-quantum() { on_root sid post_quantum post-quantum; }

post_quantum() { # post_quantum STEP ROOT: an older charon, at nsg, is that of this machine
    say "$1"
    ml_kem "$1" "strongSwan of sid at all hosts" "$2" "$2/opt/ikectx/charon" "not older"
    ml_kem "$1" "strongSwan of sid at mn and psg" "$2" /usr/sbin/charon-systemd older
}

ml_kem() { # ml_kem STEP WHERE ROOT CHARON TESTS: those live tests, with that charon at nsg
    local began=$SECONDS
    rm -f "$results/$1.xml"
    IKECTX_LAB_CHARON=$3/opt/ikectx/charon IKECTX_LAB_CHARON_NSG=$4 within 600 "${APART[@]}" \
        .venv/bin/python -m pytest -q -m live -k "$5" --junit-xml "$results/$1.xml" tests/live/test_post_quantum.py
    count "$1" "$2" "$results/$1.xml" $? $((SECONDS - began))
}

step_readme() {
    local began=$SECONDS
    say readme
    rm -f "$results/readme.xml"
    within 900 .venv/bin/python -m tests.readme "$results"
    count readme "three machines with systemd in a UML guest; ${results#"$root"/}/readme.log" "$results/readme.xml" \
        $? $((SECONDS - began))
}

step_new-12() { new new-12 bookworm "${HERE[@]}"; }
step_new-13() { new new-13 trixie "${HERE[@]}" live; }

new() { # new STEP SUITE STEP...: README's commands, as a newcomer runs them; with these steps of the tests
    local step=$1 suite=$2 where="a new machine with Debian ${1#new-}" began=$SECONDS good bad all_bad=0 text status
    say "$step"
    rm -rf "${results:?}/$step"
    shift 2
    within 2400 tests/roots.sh fresh "$suite" "$results/$step" bash -c '
        examples/demo.sh && touch build/tests/demo.passed
        tests/run.sh "$@"' - "$@"
    status=$?
    if [ -e "$results/$step/demo.passed" ]; then
        note 1 0 "$step: demo passed, $where"
    else
        note 0 1 "$step: demo FAILED, $where"
    fi
    if [ -s "$results/$step/tally" ]; then
        while IFS=$'\t' read -r good bad text; do
            note "$good" "$bad" "$step: $text"
            all_bad=$((all_bad + bad))
        done < "$results/$step/tally"
    fi
    [ $status -eq 0 ] || [ $all_bad -gt 0 ] || note 0 1 "$step: tests FAILED: did not come to their end (exit code $status), $where"
    note 0 0 "$step: $((SECONDS - began)) s in all"
}

next() { # the next of the steps that nobody has begun; fails where there is none
    local step
    exec 8> "$results/lock" && flock 8
    read -r step < "$results/queue" && sed -i 1d "$results/queue" && echo "$step"
}

lane() { # begins one step after the other, and prints what each printed when it is over
    local step
    while step=$(next); do
        echo "== $step begins"
        tally=$results/tally.$step
        "step_$step" > "$results/$step.out" 2>&1
        (flock 8 && cat "$results/$step.out") 8> "$results/lock"
    done
}

main() {
    local step lane lanes=() guests=--here steps=("$@")
    for step in "${steps[@]}"; do
        [[ " ${STEPS[*]} " == *" $step "* ]] || { echo "no step $step; there are: ${STEPS[*]}" >&2; exit 2; }
        [[ " ${HERE[*]} " == *" $step "* ]] || guests=
    done
    [ $# -gt 0 ] || guests=
    [ "$(id -u)" = 0 ] || { echo "network namespaces and XFRM need root: sudo $0 $*" >&2; exit 1; }
    tests/setup.sh $guests || { echo "0 passed, 1 failed"; exit 1; }
    mkdir -p "$results"
    rm -f "$results"/tally*
    if [ $# -gt 0 ]; then
        for step in "${steps[@]}"; do "step_$step"; done
    else
        limit=$((SECONDS + ALL_SECONDS))
        printf '%s\n' "${ALL[@]}" > "$results/queue"
        set -m # process groups of their own, so that nothing of them stays when this script is stopped
        for ((lane = 0; lane < LANES; lane++)); do
            lane &
            lanes+=($!)
        done
        set +m
        trap 'for lane in "${lanes[@]}"; do kill -TERM -- "-$lane" 2> /dev/null; done' EXIT
        wait "${lanes[@]}"
        for step in "${ALL[@]}"; do
            cat "$results/tally.$step" >> "$tally" || note 0 1 "$step: FAILED, ended without a word"
        done
    fi
    say "what ran"
    cut -f 3 "$tally"
    awk -F '\t' '{ good += $1; bad += $2 } END { print good " passed, " bad + 0 " failed"; exit bad > 0 }' "$tally"
}

main "$@"
