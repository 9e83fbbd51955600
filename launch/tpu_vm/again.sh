#!/bin/bash
# Starts a training command again for as long as its exit code says that this helps; for hosts without a scheduler.
#
#   launch/tpu_vm/again.sh python -m launch.train --config=... --workdir=...
#
# Every host runs its own: where one process dies, the others end too (76), and all meet again at the next start. Where one host's loop has
# ended for good, the others miss it at the start (69) until their restarts are used up. SIGTERM and Ctrl-C go to the command, which saves, and
# end the loop.
MAX_RESTARTS=${MAX_RESTARTS:-10}          # in a row, none of which lasted
LASTED_SECONDS=${LASTED_SECONDS:-3600}    # this long
PAUSE_SECONDS=${PAUSE_SECONDS:-30}

# One at a time: two runs in one workdir would write over each other.
exec 9> again.lock
flock --nonblock 9 || { echo "error: $PWD/again.lock is held: the command runs here already" >&2; exit 2; }
echo $$ > again.pid
# Or it would name whatever process gets this number next.
trap 'rm -f again.pid' EXIT

stopped=
child=
trap 'stopped=1; [ -n "$child" ] && kill -TERM "$child" 2> /dev/null' TERM INT

restarts=0
while :; do
    began=$SECONDS
    "$@" &
    child=$!
    # A signal that came before its number was known has not reached it.
    if [ -n "$stopped" ]; then kill -TERM "$child" 2> /dev/null; fi
    # A signal ends the first wait, while the command is still saving.
    while wait "$child"; code=$?; kill -0 "$child" 2> /dev/null; do :; done
    child=
    case $code in
        # Done; or what no restart mends: 2 bad input, 3 not finite, 4 not learned, 130 Ctrl-C.
        0 | 2 | 3 | 4 | 130) exit $code ;;
    esac
    # 69, 74 to 77 and death by a signal, and 1: a traceback is what JAX makes of many a hardware fault.
    if [ -n "$stopped" ]; then exit $code; fi
    if [ $((SECONDS - began)) -ge "$LASTED_SECONDS" ]; then restarts=0; fi
    if [ "$restarts" -ge "$MAX_RESTARTS" ]; then
        echo "ended with exit code $code after $MAX_RESTARTS restarts in a row: not started again" >&2
        exit $code
    fi
    restarts=$((restarts + 1))
    echo "ended with exit code $code: restart $restarts in $PAUSE_SECONDS s" >&2
    sleep "$PAUSE_SECONDS" 9>&- &
    wait $!
    if [ -n "$stopped" ]; then exit $code; fi
done
