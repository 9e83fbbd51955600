#!/bin/bash
# Creates, uses and deletes Cloud TPU VMs with gcloud, without Kubernetes. Run it from the repository's folder.
#
#   export NAME=flamingo ZONE=us-central2-b TYPE=v4-32     # v4-32 is v4:2x2x4: v4 and v5p are named by cores, two per chip
#   launch/tpu_vm/tpu.sh create                            # SLICES=2 for two slices, SPOT=1 for spot capacity
#   NFS=10.0.0.2:/share launch/tpu_vm/tpu.sh setup         # installs this commit on every host, and mounts a Filestore share as /shared
#   BUCKET=my-bucket launch/tpu_vm/tpu.sh setup            # or mounts a bucket as /shared with gcsfuse, to read datasets and exports
#   launch/tpu_vm/tpu.sh start --config=configs/flamingo_3b.py:form=v4_2x2x4,root=/shared --workdir=/shared/runs/3b    # or gs://my-bucket/runs/3b
#   launch/tpu_vm/tpu.sh watch                             # the log of the first host; Ctrl-C does not stop the run
#   launch/tpu_vm/tpu.sh stop                              # saves and stops; `start` resumes
#   launch/tpu_vm/tpu.sh delete
#
# Each host restarts its process depending on the exit code (again.sh). After spot VMs were preempted: delete, create, setup, start.
set -euo pipefail
: "${NAME:=flamingo}" "${ZONE:?set ZONE, such as us-central2-b}" "${SLICES:=1}" "${VERSION:=tpu-ubuntu2204-base}"

tpus() { gcloud compute tpus "$@" --zone="$ZONE"; }

nodes() {
    if [ "$SLICES" = 1 ]; then echo "$NAME"; else seq -f "$NAME-%.0f" 0 $((SLICES - 1)); fi
}

on_all() { # runs a command on every host of every slice in parallel; fails if one fails
    local node pids=() failed=0
    for node in $(nodes); do tpus tpu-vm ssh "$node" --worker=all --command="$1" & pids+=($!); done
    for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
    return $failed
}

create() {
    : "${TYPE:?set TYPE, such as v4-32}"
    local options=(--accelerator-type="$TYPE" --runtime-version="$VERSION")
    if [ "$SLICES" = 1 ]; then options+=(--node-id="$NAME"); else options+=(--node-count="$SLICES" --node-prefix="$NAME"); fi
    if [ -n "${SPOT:-}" ]; then options+=(--spot); fi
    tpus queued-resources create "$NAME" "${options[@]}"
    local state=
    until [ "$state" = ACTIVE ]; do
        state=$(tpus queued-resources describe "$NAME" --format='value(state.state)')
        case $state in FAILED | SUSPENDED) echo "error: $NAME is $state: delete it and create it again" >&2; exit 1 ;; esac
        [ "$state" = ACTIVE ] || sleep "${POLL_SECONDS:-30}"
    done
}

setup() {
    local archive node
    archive=$(mktemp --suffix=.tar.gz)
    git archive --format=tar.gz --output="$archive" HEAD
    for node in $(nodes); do tpus tpu-vm scp "$archive" "$node:flamingo_jax.tar.gz" --worker=all; done
    rm "$archive"
    on_all "set -e
        sudo apt-get update -q && sudo apt-get install -yq nfs-common python3.11 python3.11-venv
        if [ -n '${NFS:-}' ]; then sudo mkdir -p /shared && { mountpoint -q /shared || sudo mount -t nfs '${NFS:-}' /shared; }; fi
        if [ -n '${BUCKET:-}' ]; then
            echo \"deb https://packages.cloud.google.com/apt gcsfuse-\$(lsb_release -cs) main\" | sudo tee /etc/apt/sources.list.d/gcsfuse.list
            curl -s https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee /etc/apt/trusted.gpg.d/gcsfuse.asc > gcsfuse.key
            sudo apt-get update -q && sudo apt-get install -yq gcsfuse
            sudo mkdir -p /shared && { mountpoint -q /shared || sudo gcsfuse -o allow_other --implicit-dirs '${BUCKET:-}' /shared; }
        fi
        mkdir -p flamingo_jax
        if ! flock --nonblock flamingo_jax/again.lock true; then
            echo 'error: a run is going on here: stop it before another commit takes its place' >&2; exit 2
        fi
        tar -xzf flamingo_jax.tar.gz -C flamingo_jax
        # Files of an earlier setup that this commit does not have would still be imported.
        tar -tzf flamingo_jax.tar.gz | grep -v '/\$' | LC_ALL=C sort > flamingo_jax.files.new
        touch flamingo_jax.files
        LC_ALL=C comm -23 flamingo_jax.files flamingo_jax.files.new | (cd flamingo_jax && xargs -r -d '\n' rm -f --)
        mv flamingo_jax.files.new flamingo_jax.files
        cd flamingo_jax
        python3.11 -m venv .venv && .venv/bin/pip install -q -e '.[tpu,bucket]'"
}

start() {
    if [ $# = 0 ]; then echo "error: start wants the flags of launch.train, --config and --workdir first" >&2; exit 2; fi
    # jax reads the index of each process from the metadata of the VM.
    on_all "cd flamingo_jax && export JAX_COMPILATION_CACHE_DIR=\${JAX_COMPILATION_CACHE_DIR:-/shared/compiled}
        setsid nohup bash launch/tpu_vm/again.sh .venv/bin/python -u -m launch.train $(printf '%q ' "$@") >> train.log 2>&1 < /dev/null &"
}

watch() { tpus tpu-vm ssh "$(nodes | head -n 1)" --worker=0 --command="tail -n 100 -F flamingo_jax/train.log"; }

stop() { # returns when the run has ended on all hosts; does nothing on hosts without a run
    on_all 'cd flamingo_jax || exit
        if flock --nonblock again.lock true; then echo "$HOSTNAME: nothing runs here"; exit 0; fi
        kill -TERM "$(cat again.pid)" && flock again.lock true'
}

delete() { tpus queued-resources delete "$NAME" --force --quiet; }

case ${1:-} in
    create | setup | start | watch | stop | delete) "$@" ;;
    *) echo "error: say what to do: create, setup, start, watch, stop or delete" >&2; exit 2 ;;
esac
