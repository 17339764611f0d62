#!/bin/sh
# tshark with the dissector beside this file, for captures that are there:
#
#   examples/tshark.sh -r psg.pcap -Y 'cxtp || update_spi'
#
# All options are tshark's own. Wireshark 4.4 and later run no Lua script for root, and an older one warns: who
# is root runs it as nobody here, with no right but to read every file (CAP_DAC_READ_SEARCH), so that captures
# and keys need not be open to others. tshark can write nothing then: let the shell write what it prints.
set -eu
script=lua_script:$(dirname "$0")/ikectx.lua
[ "$(id -u)" = 0 ] || exec tshark -X "$script" "$@"
as_nobody() { # CAPABILITY COMMAND...: a container may not have every capability
    can=$1
    shift
    exec setpriv --reuid=nobody --regid=nogroup --clear-groups --no-new-privs \
        --inh-caps="-all,+$can" --ambient-caps="-all,+$can" --bounding-set="-all,+$can" "$@"
}
can=dac_read_search
(as_nobody $can true) 2> /dev/null || can=dac_override
as_nobody $can tshark -X "$script" "$@"
