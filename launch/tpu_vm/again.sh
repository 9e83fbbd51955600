#!/bin/bash
# Runs a training command and restarts it as long as its exit code says that this may help; for hosts without a scheduler.
#
#   launch/tpu_vm/again.sh python -m launch.train --config=... --workdir=...
#
# Every host runs its own loop. When one process dies, the others exit too (76), and all connect again at the next start. If the loop of one host
# has ended for good, the others wait for it in vain (69) until their restarts are used up. SIGTERM and Ctrl-C are forwarded to the command,
# which saves, and end the loop.
MAX_RESTARTS=${MAX_RESTARTS:-10}          # restarts in a row that each lasted less than
LASTED_SECONDS=${LASTED_SECONDS:-3600}    # these seconds
PAUSE_SECONDS=${PAUSE_SECONDS:-30}

# One loop per host at a time: two runs in the same workdir would overwrite each other.
exec 9> again.lock
flock --nonblock 9 || { echo "error: $PWD/again.lock is held: the command runs here already" >&2; exit 2; }
echo $$ > again.pid
# Otherwise it would name the next process that gets this id.
trap 'rm -f again.pid' EXIT

stopped=
child=
trap 'stopped=1; [ -n "$child" ] && kill -TERM "$child" 2> /dev/null' TERM INT

restarts=0
while :; do
    began=$SECONDS
    "$@" &
    child=$!
    # Forward a signal that arrived before the process id was known.
    if [ -n "$stopped" ]; then kill -TERM "$child" 2> /dev/null; fi
    # A signal interrupts the first wait while the command is still saving, so wait again.
    while wait "$child"; code=$?; kill -0 "$child" 2> /dev/null; do :; done
    child=
    case $code in
        # Finished, or a code that a restart cannot fix: 2 bad input, 3 not finite, 4 not learned, 130 Ctrl-C.
        0 | 2 | 3 | 4 | 130) exit $code ;;
    esac
    # Restart after 69, 74 to 77, a signal, and 1, since JAX reports many hardware faults as a traceback.
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
