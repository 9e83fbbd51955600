"""The cluster launchers: JobSets by Kubernetes' schemas, scripts run beside executables that
stand in for srun, scontrol, gcloud and Python.
"""

import fcntl
import functools
import math
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from data_pipelines.build.synthetic_world import build_quickstart
from flamingo_jax import configuring, errors
from flamingo_jax.experiment import Experiment
from launch import command
from tests.processes import one_device

ROOT = pathlib.Path(__file__).parents[2]
SLURM, AGAIN, TPU = (
    ROOT / "launch" / name for name in ("slurm/train.sbatch", "tpu_vm/again.sh", "tpu_vm/tpu.sh")
)
FINAL = [errors.EXIT_BAD_INPUT, errors.EXIT_NOT_FINITE, errors.EXIT_NOT_LEARNED]
PREEMPTED = errors.EXIT_PREEMPTED
RESTARTED = [1, 69, 74, PREEMPTED, 76, 77, 134, 137, 139]
"""What is mended by a start: 1 is a traceback, those above 128 are signals."""

PYTHON = """#!/bin/bash
# Ends with the next code of the file `codes`; one above 128 by that signal; `saves` waits for SIGTERM (once `waiting` is there), takes a while, ends with 75.
echo "$JAX_LOCAL_DEVICE_IDS $(printf '%q ' "$@")" >> started
read -r code < codes
sed -i 1d codes
if [ "$code" = saves ]; then
    trap 'sleep 0.3; exit 75' TERM
    touch waiting
    for ((i = 0; i < 100; i++)); do sleep 0.1; done
    exit 99
fi
if [ "${code:-0}" -gt 128 ]; then kill -$((code - 128)) $$; fi
exit "${code:-0}"
"""  # noqa: E501
SRUN = """#!/bin/bash
# Runs its tasks one after the other and ends with the highest of their codes, as srun does.
trap : TERM
while [[ $1 == --* ]]; do echo "$1" >> srun; shift; done
highest=0
for ((i = 0; i < ${TASKS:-1}; i++)); do
    "$@"
    code=$?
    if [ $code -gt $highest ]; then highest=$code; fi
done
exit $highest
"""
SCONTROL = """#!/bin/bash
echo "$@" >> scontrol
"""
GCLOUD = """#!/bin/bash
# Writes down what it was asked. The commands of ssh run in the folder of their node; states of a queued resource come from the file `states`.
cd "$STUBS"
(flock 8; printf '%s\\x1f' "$@" END >> gcloud) 8> gcloud.lock
case "$*" in
    *" describe "*) read -r state < states; sed -i 1d states; echo "$state" ;;
    *" scp "*) cp "$5" "${6%%:*}/${6#*:}" ;;
    *" ssh "*) for word in "$@"; do case $word in --command=*) cd "$5" && HOME=$PWD bash -c "${word#--command=}" || exit ;; esac; done ;;
esac
"""  # noqa: E501


GIT = """#!/bin/bash
# `git archive --output=FILE HEAD`: the commit is what lies in the folder `commit`.
for word in "$@"; do case $word in --output=*) file=${word#--output=} ;; esac; done
cd "$STUBS/commit" && tar -czf "$file" *
"""


def executable(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def lines(path: pathlib.Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def until(condition: Callable[[], object]) -> None:
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("waited for 60 s")


@pytest.fixture
def stubs(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    for name, text in {
        "python": PYTHON,
        "srun": SRUN,
        "scontrol": SCONTROL,
        "gcloud": GCLOUD,
    }.items():
        executable(tmp_path / "bin" / name, text)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("STUBS", str(tmp_path))
    return tmp_path


def codes(folder: pathlib.Path, *values: object) -> None:
    (folder / "codes").write_text("".join(f"{value}\n" for value in values))


@pytest.mark.parametrize("script", [SLURM, AGAIN, TPU], ids=lambda path: path.name)
def test_the_scripts_are_bash(script: pathlib.Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK)


def slurm_environment(restarts: int, **more: str) -> dict[str, str]:
    return (
        os.environ
        | {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts), "SLURM_GPUS_ON_NODE": "4"}
        | more
    )


def slurm(folder: pathlib.Path, *values: object, **environment: str) -> int:
    """Runs the job, again for as long as it queues itself again, and returns its last exit
    code.
    """
    codes(folder, *values)
    restarts = 0
    while True:
        done = subprocess.run(
            [SLURM, "--config=a b"],
            cwd=folder,
            env=slurm_environment(restarts, **environment),
            capture_output=True,
        )
        queued = lines(folder / "scontrol")
        assert queued == ["requeue 7"] * len(queued)
        if len(queued) == restarts:
            return done.returncode
        assert done.returncode == 0
        restarts = len(queued)


@pytest.mark.parametrize("code", RESTARTED)
def test_slurm_starts_again(stubs: pathlib.Path, code: int) -> None:
    assert slurm(stubs, code, code, 0) == 0
    assert lines(stubs / "started") == ["0,1,2,3 -u -m launch.train --config=a\\ b "] * 3
    assert lines(stubs / "srun") == ["--kill-on-bad-exit=0", "--wait=0"] * 3


def test_slurm_gives_the_tasks_the_cores_of_the_job(stubs: pathlib.Path) -> None:
    """Since 22.05 srun does not take them from the job's own --cpus-per-task."""
    assert slurm(stubs, 0, SLURM_CPUS_PER_TASK="64") == 0
    assert lines(stubs / "srun")[2] == "--cpus-per-task=64"


@pytest.mark.parametrize("code", [0, *FINAL, 130])
def test_slurm_ends_for_good(stubs: pathlib.Path, code: int) -> None:
    assert slurm(stubs, code) == code
    assert len(lines(stubs / "started")) == 1


def test_slurm_hears_the_one_process_that_knows_better(stubs: pathlib.Path) -> None:
    assert slurm(stubs, 76, 3, 137, TASKS="3") == 3
    assert lines(stubs / "scontrol") == []


def test_slurm_starts_again_where_one_process_of_several_was_lost(stubs: pathlib.Path) -> None:
    assert slurm(stubs, 76, 137, 76, 0, 0, 0, TASKS="3") == 0
    assert lines(stubs / "scontrol") == ["requeue 7"]


def test_slurm_has_a_limit(stubs: pathlib.Path) -> None:
    assert slurm(stubs, *[PREEMPTED] * 9, MAX_RESTARTS="2") == PREEMPTED
    assert len(lines(stubs / "started")) == 3


def test_slurm_lets_a_process_save_on_sigterm(stubs: pathlib.Path) -> None:
    codes(stubs, "saves")
    job = subprocess.Popen(
        [SLURM],
        cwd=stubs,
        env=slurm_environment(0),
        start_new_session=True,
        stderr=subprocess.PIPE,
    )
    until((stubs / "waiting").exists)
    # As SLURM signals all that is in a job.
    os.killpg(job.pid, signal.SIGTERM)
    _, told = job.communicate(timeout=60)
    assert job.returncode == 0 and b"ended with exit code 75: queued again" in told
    assert lines(stubs / "scontrol") == ["requeue 7"]


def test_what_slurm_is_asked_for() -> None:
    asked = [line.removeprefix("#SBATCH --") for line in lines(SLURM) if line.startswith("#SBATCH")]
    assert {"requeue", "ntasks-per-node=1", "open-mode=append"} <= set(asked)
    (sent,) = (option for option in asked if option.startswith("signal="))
    # Without "B:", which would send it to the batch shell alone.
    name, _, seconds = sent.removeprefix("signal=").partition("@")
    assert name == "TERM" and int(seconds) >= 120


def again(folder: pathlib.Path, *values: object, **environment: str) -> int:
    codes(folder, *values)
    environment = {"PAUSE_SECONDS": "0"} | environment
    return subprocess.run(
        [AGAIN, "python", "-m", "launch.train", "a b"],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
    ).returncode


@pytest.mark.parametrize("code", RESTARTED)
def test_a_host_starts_again(stubs: pathlib.Path, code: int) -> None:
    assert again(stubs, code, code, 0) == 0
    assert [line.strip() for line in lines(stubs / "started")] == ["-m launch.train a\\ b"] * 3


@pytest.mark.parametrize("code", [0, *FINAL, 130])
def test_a_host_ends_for_good(stubs: pathlib.Path, code: int) -> None:
    assert again(stubs, 76, code) == code
    assert len(lines(stubs / "started")) == 2


def test_a_host_has_a_limit_on_starts_that_did_not_last(stubs: pathlib.Path) -> None:
    assert again(stubs, *[76] * 9, MAX_RESTARTS="2") == 76
    assert len(lines(stubs / "started")) == 3
    assert again(stubs, *[76] * 9, 0, MAX_RESTARTS="2", LASTED_SECONDS="0") == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_host_lets_the_process_save_and_starts_no_other(stubs: pathlib.Path, number: int) -> None:
    codes(stubs, "saves", 0)
    # Where the tests run in the background, they ignore SIGINT, and so would their children.
    heard = functools.partial(signal.signal, number, signal.SIG_DFL)
    loop = subprocess.Popen([AGAIN, "python"], cwd=stubs, start_new_session=True, preexec_fn=heard)
    until((stubs / "waiting").exists)
    second = subprocess.run([AGAIN, "python"], cwd=stubs, capture_output=True, text=True)
    assert (
        second.returncode == errors.EXIT_BAD_INPUT
        and "the command runs here already" in second.stderr
    )
    os.kill(int((stubs / "again.pid").read_text()), number)
    assert loop.wait(timeout=60) == PREEMPTED
    assert len(lines(stubs / "started")) == 1


def tpu(
    folder: pathlib.Path, *arguments: str, expect: int = 0, **environment: str
) -> list[list[str]]:
    """The calls of gcloud that a command makes, without "compute tpus" in front and the zone
    behind.
    """
    (folder / "gcloud").unlink(missing_ok=True)
    environment = {"ZONE": "z", "NAME": "n", "TYPE": "v4-32", "POLL_SECONDS": "0"} | environment
    done = subprocess.run(
        [TPU, *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == expect, done.stderr
    written = (folder / "gcloud").read_text() if (folder / "gcloud").exists() else ""
    calls = [call.split("\x1f")[:-1] for call in written.split("END\x1f")[:-1]]
    assert all(call[:2] == ["compute", "tpus"] and call[-1] == "--zone=z" for call in calls)
    return [call[2:-1] for call in calls]


def test_tpu_machines_are_made_and_deleted(stubs: pathlib.Path) -> None:
    (stubs / "states").write_text("PROVISIONING\nACTIVE\nACTIVE\nFAILED\n")
    machine = ["--accelerator-type=v4-32", "--runtime-version=tpu-ubuntu2204-base"]
    ask = ["queued-resources", "describe", "n", "--format=value(state.state)"]
    assert tpu(stubs, "create") == [
        ["queued-resources", "create", "n", *machine, "--node-id=n"],
        ask,
        ask,
    ]
    several = [*machine, "--node-count=2", "--node-prefix=n", "--spot"]
    assert tpu(stubs, "create", SLICES="2", SPOT="1") == [
        ["queued-resources", "create", "n", *several],
        ask,
    ]
    tpu(stubs, "create", expect=1)
    assert tpu(stubs, "delete") == [["queued-resources", "delete", "n", "--force", "--quiet"]]
    for wrong in ([], ["destroy"], ["start"]):
        assert tpu(stubs, *wrong, expect=2) == []


def commit(stubs: pathlib.Path, *files: str) -> None:
    """Makes these the commit that setup brings, each with its name in it."""
    executable(stubs / "bin" / "git", GIT)
    shutil.rmtree(stubs / "commit", ignore_errors=True)
    for name in files:
        executable(stubs / "commit" / name, name)


def test_tpu_machines_get_this_commit(stubs: pathlib.Path) -> None:
    nodes = [stubs / "n-0", stubs / "n-1"]
    for name in ("sudo", "python3.11"):
        executable(stubs / "bin" / name, f'#!/bin/bash\necho {name} "$@" >> made\n')
    for node in nodes:
        executable(node / "flamingo_jax/.venv/bin/pip", '#!/bin/bash\necho pip "$@" >> made\n')
    commit(stubs, "setup.py", "a/old.py", "a/b.py", "a/it's c.py")
    calls = tpu(stubs, "setup", SLICES="2", NFS="10.0.0.2:/share")
    assert [call[:2] + call[3:5] for call in calls[:2]] == [
        ["tpu-vm", "scp", f"n-{i}:flamingo_jax.tar.gz", "--worker=all"] for i in (0, 1)
    ]
    assert sorted(call[:4] for call in calls[2:]) == [
        ["tpu-vm", "ssh", f"n-{i}", "--worker=all"] for i in (0, 1)
    ]
    for node in nodes:
        assert "sudo mount -t nfs 10.0.0.2:/share /shared" in lines(node / "made")
        assert lines(node / "flamingo_jax/made") == [
            "python3.11 -m venv .venv",
            "pip install -q -e .[tpu,bucket]",
        ]
        assert (node / "flamingo_jax/a/old.py").read_text() == "a/old.py"
        # Somebody's own, and a run's.
        (node / "flamingo_jax/a/mine.py").touch()
        (node / "flamingo_jax/train.log").touch()
    commit(stubs, "setup.py", "a/b.py", "c.py")
    tpu(stubs, "setup", SLICES="2")
    for node in nodes:
        found = {
            path.relative_to(node / "flamingo_jax").as_posix()
            for path in (node / "flamingo_jax").rglob("*")
            if path.is_file()
        }
        assert found == {
            "setup.py",
            "a/b.py",
            "c.py",
            "a/mine.py",
            "train.log",
            "made",
            "again.lock",
            ".venv/bin/pip",
        }
    with open(nodes[0] / "flamingo_jax/again.lock") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        commit(stubs, "setup.py")
        tpu(stubs, "setup", SLICES="2", expect=1)
    assert (nodes[0] / "flamingo_jax/c.py").exists()
    executable(stubs / "n-1/flamingo_jax/.venv/bin/pip", "#!/bin/bash\nexit 1\n")
    tpu(stubs, "setup", SLICES="2", expect=1)


def test_tpu_machines_start_on_every_node_and_stop_saved(stubs: pathlib.Path) -> None:
    folders = [stubs / f"n-{i}" / "flamingo_jax" for i in (0, 1)]
    for folder in folders:
        executable(folder / ".venv/bin/python", PYTHON)
        executable(folder / "launch/tpu_vm/again.sh", AGAIN.read_text())
        codes(folder, 75, "saves")
    flags = ["--config=configs/flamingo_3b.py:v4_2x2x4", "--config.name=it's here"]
    calls = tpu(stubs, "start", *flags, SLICES="2", PAUSE_SECONDS="0")
    assert sorted(call[:4] for call in calls) == [
        ["tpu-vm", "ssh", f"n-{i}", "--worker=all"] for i in (0, 1)
    ]
    for folder in folders:
        until(lambda folder=folder: len(lines(folder / "started")) == 2)
        assert [shlex.split(line) for line in lines(folder / "started")] == [
            ["-u", "-m", "launch.train", *flags]
        ] * 2
        until((folder / "waiting").exists)
    tpu(stubs, "stop", SLICES="2")
    for folder in folders:
        assert lines(folder / "started")[2:] == [] and not (folder / "again.pid").exists()
        # Left by a host that lost its power; the number is another process's by now.
        (folder / "again.pid").write_text(str(os.getpid()))
        assert "ended with exit code 75: restart 1" in (folder / "train.log").read_text()
    tpu(stubs, "stop", SLICES="2")


JOBSET = {
    "spec": {
        "failurePolicy",
        "network",
        "replicatedJobs",
        "successPolicy",
        "coordinator",
        "suspend",
        "ttlSecondsAfterFinished",
        "managedBy",
    },
    "failurePolicy": {"maxRestarts", "restartStrategy", "rules"},
    "rule": {"name", "action", "onJobFailureReasons", "targetReplicatedJobs"},
    "network": {"enableDNSHostnames", "subdomain", "publishNotReadyAddresses"},
    "replicatedJob": {"name", "groupName", "replicas", "template", "dependsOn"},
}
"""The fields of a JobSet by its API reference, v1alpha2; what is in a job's template is
Kubernetes' own.
"""


def jobset(name: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The JobSet's spec, its one replicated job, and the container of its pods."""
    made = yaml.safe_load((ROOT / "launch/gke" / f"{name}.yaml").read_text())
    assert (made["apiVersion"], made["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = made["spec"]["replicatedJobs"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    return made, job, container


@pytest.mark.parametrize("name", ["tpu", "gpu"])
def test_jobsets_have_the_fields_of_their_api(name: str) -> None:
    made, job, _ = jobset(name)
    spec = made["spec"]
    assert (
        made.keys() <= {"apiVersion", "kind", "metadata", "spec"}
        and spec.keys() <= JOBSET["spec"]
        and job.keys() <= JOBSET["replicatedJob"]
    )
    assert (
        spec.get("network", {}).keys() <= JOBSET["network"]
        and spec["failurePolicy"].keys() <= JOBSET["failurePolicy"]
    )
    assert spec["failurePolicy"]["restartStrategy"] in ("Recreate", "BlockingRecreate")
    for rule in spec["failurePolicy"]["rules"]:
        assert {"name", "action"} <= rule.keys() <= JOBSET["rule"]


@pytest.mark.parametrize("name", ["tpu", "gpu"])
def test_the_jobs_within_are_what_kubernetes_takes(name: str) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    version, (_, job, _) = kubernetes_validate.latest_version(), jobset(name)
    batch = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "job"},
        "spec": job["template"]["spec"],
    }
    kubernetes_validate.validate(batch, version, strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(
            batch | {"spec": batch["spec"] | {"backofLimit": 0}}, version, strict=True
        )


@pytest.mark.parametrize("name", ["tpu", "gpu"])
def test_jobsets_start_again_by_exit_code(name: str) -> None:
    made, job, container = jobset(name)
    policy, spec = made["spec"]["failurePolicy"], job["template"]["spec"]
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule == {
        "action": "FailJob",
        "onExitCodes": {"containerName": container["name"], "operator": "In", "values": FINAL},
    }
    # A job that fails by that policy fails the set; any other failure is of this reason, which
    # no rule names, so that the set starts again.
    assert spec["backoffLimit"] == 0 and spec["template"]["spec"]["restartPolicy"] == "Never"
    (fatal,) = policy["rules"]
    assert (fatal["action"], fatal["onJobFailureReasons"]) == (
        "FailJobSet",
        ["PodFailurePolicy"],
    )
    assert 10 <= policy["maxRestarts"] <= 1000
    assert container["command"] == ["python", "-u", "-m", "launch.train"]


def experiment(container: dict[str, Any]) -> Experiment:
    """The container's config with its overrides."""
    values = dict(argument.removeprefix("--").split("=", 1) for argument in container["args"])
    assert values.pop("workdir").startswith("/shared/")
    config = command.load_config(values.pop("config"))
    config.update_from_flattened_dict(
        {key.removeprefix("config."): int(value) for key, value in values.items()}
    )
    return configuring.from_config(Experiment, config)


def test_the_tpu_jobset_is_of_one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    _, job, container = jobset("tpu")
    spec = job["template"]["spec"]
    chips = math.prod(
        int(side)
        for side in spec["template"]["spec"]["nodeSelector"][
            "cloud.google.com/gke-tpu-topology"
        ].split("x")
    )
    assert (
        spec["parallelism"]
        == spec["completions"]
        == chips // container["resources"]["limits"]["google.com/tpu"]
    )
    environment = {variable["name"]: variable["value"] for variable in container["env"]}
    assert int(environment["JAX_NUM_PROCESSES"]) == job["replicas"] * spec["completions"]
    mesh = experiment(container).mesh
    assert (mesh.data, mesh.data * mesh.fsdp * mesh.model) == (
        job["replicas"],
        job["replicas"] * chips,
    )


def test_the_gpu_jobset_tells_each_pod_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    made, job, container = jobset("gpu")
    spec, name = job["template"]["spec"], made["metadata"]["name"]
    environment = {variable["name"]: variable for variable in container["env"]}
    host, port = environment["JAX_COORDINATOR_ADDRESS"]["value"].split(":")
    assert host == f"{name}-{job['name']}-0-0.{name}" and 1024 < int(port) < 32768
    assert made["spec"]["network"]["enableDNSHostnames"]
    assert (
        job["replicas"] == 1
        and int(environment["JAX_NUM_PROCESSES"]["value"])
        == spec["parallelism"]
        == spec["completions"]
    )
    place = environment["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert (
        place == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
        and spec["completionMode"] == "Indexed"
    )
    mesh = experiment(container).mesh
    assert (
        mesh.data * mesh.fsdp * mesh.model
        == spec["parallelism"] * container["resources"]["limits"]["nvidia.com/gpu"]
    )


@pytest.mark.parametrize("name", ["tpu", "gpu"])
def test_jobsets_read_and_write_what_is_mounted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    _, _, container = jobset(name)
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    found = experiment(container)
    datasets = [*found.data.values(), *found.held_out.values()]
    folders = [found.tokenizer, found.vision_encoder_from, found.language_model_from]
    environment = {variable["name"]: variable.get("value") for variable in container["env"]}
    folders += [dataset.path for dataset in datasets] + [environment["JAX_COMPILATION_CACHE_DIR"]]
    assert all(any(folder.startswith(f"{m}/") for m in mounts) for folder in folders)


def test_a_bucket_takes_the_place_of_the_claim() -> None:
    volume, claim = yaml.safe_load_all((ROOT / "launch/gke/bucket.yaml").read_text())
    for name in ("tpu", "gpu"):
        _, job, _ = jobset(name)
        volumes = job["template"]["spec"]["template"]["spec"]["volumes"]
        (mounted,) = (one for one in volumes if one["name"] == "shared")
        assert mounted["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert volume["spec"]["csi"]["driver"] == "gcsfuse.csi.storage.gke.io"
    assert claim["spec"]["volumeName"] == volume["metadata"]["name"]
    assert volume["spec"]["claimRef"] == claim["metadata"]
    assert volume["spec"]["storageClassName"] == claim["spec"]["storageClassName"]
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    for made in (volume, claim):
        kubernetes_validate.validate(made, kubernetes_validate.latest_version(), strict=True)


def test_tpu_machines_mount_a_bucket(stubs: pathlib.Path) -> None:
    node = stubs / "n"
    for name in ("sudo", "python3.11", "curl", "lsb_release"):
        executable(stubs / "bin" / name, f'#!/bin/bash\necho {name} "$@" >> made\n')
    executable(node / "flamingo_jax/.venv/bin/pip", '#!/bin/bash\necho pip "$@" >> made\n')
    commit(stubs, "setup.py")
    tpu(stubs, "setup", BUCKET="my-bucket")
    mounted = "sudo gcsfuse -o allow_other --implicit-dirs my-bucket /shared"
    assert mounted in lines(node / "made")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The storage of a cluster: the datasets and the tokenizer that tiny forms read."""
    folder = tmp_path_factory.mktemp("shared")
    build_quickstart(folder / "data", limit=8)
    return folder


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The image's working folder: what the Dockerfile copies there, and nothing else."""
    folder = tmp_path_factory.mktemp("image")
    for line in lines(ROOT / "launch/gke/Dockerfile"):
        for name in line.split()[1:-1] if line.startswith("COPY") else ():
            if (ROOT / name).is_dir():
                shutil.copytree(
                    ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__")
                )
            else:
                shutil.copy(ROOT / name, folder)
    return folder


REAL_PYTHON = f'#!/bin/bash\nexec {sys.executable} "$@"\n'
STEPS = ("--config.training.steps=1", "--config.training.evaluate_batches=1")


def there(environment: dict[str, str], folder: pathlib.Path) -> dict[str, str]:
    """A machine's environment: its own python comes first."""
    return one_device() | environment | {"PATH": f"{folder}/bin:{os.environ['PATH']}"}


@pytest.mark.parametrize("name", ["tpu", "gpu"])
def test_a_pod_of_the_jobset_starts(
    name: str, image: pathlib.Path, shared: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """The container's own command, in the image's folder and with the claim mounted; but for
    the size of the model and the other pods.
    """
    _, _, container = jobset(name)
    executable(tmp_path / "bin/python", REAL_PYTHON)

    def here(text: str) -> str:
        return re.sub(r"form=\w+", "form=tiny", text).replace("/shared", str(shared))

    arguments = [here(word) for word in container["args"] if ".mesh." not in word]
    environment = {v["name"]: here(v["value"]) for v in container["env"] if "value" in v}
    alone = {"JAX_NUM_PROCESSES": "1"}
    done = subprocess.run(
        [*container["command"], *arguments, "--prepare"],
        cwd=image,
        env=there(environment | alone, tmp_path),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "all is prepared" in done.stderr, done.stderr


def test_a_slurm_job_trains(image: pathlib.Path, shared: pathlib.Path, stubs: pathlib.Path) -> None:
    executable(stubs / "bin/python", REAL_PYTHON)
    flags = [
        f"--config=configs/lm_1b4.py:form=tiny,root={shared}",
        f"--workdir={shared}/runs/job",
        *STEPS,
    ]
    task = {
        "SLURM_NTASKS": "1",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_STEP_NODELIST": "node3",
    }
    task |= {"SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "1", "SLURM_CPUS_PER_TASK": "2"}
    folder = shutil.copytree(image, stubs / "repository")
    script = shutil.copy(SLURM, stubs)
    done = subprocess.run(
        [script, *flags], cwd=folder, env=there(task, stubs), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (shared / "runs/job/checkpoints/1/manifest.json").exists()
    assert lines(folder / "srun")[2] == "--cpus-per-task=2"


def test_a_tpu_machine_trains(
    image: pathlib.Path,
    shared: pathlib.Path,
    stubs: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Set up from the commit, started by its own command, ended by itself."""
    for name in ("sudo", "python3.11"):
        executable(stubs / "bin" / name, "#!/bin/bash\n")
    commit(stubs)
    shutil.copytree(image, stubs / "commit")
    shutil.copytree(ROOT / "launch/tpu_vm", stubs / "commit/launch/tpu_vm", dirs_exist_ok=True)
    machine = stubs / "n/flamingo_jax"
    executable(machine / ".venv/bin/pip", "#!/bin/bash\n")
    executable(machine / ".venv/bin/python", REAL_PYTHON)
    tpu(stubs, "setup")
    monkeypatch.delenv("XLA_FLAGS")
    tpu(
        stubs,
        "start",
        f"--config=configs/lm_1b4.py:form=tiny,root={shared}",
        f"--workdir={shared}/runs/vm",
        *STEPS,
        JAX_COMPILATION_CACHE_DIR=os.environ["JAX_COMPILATION_CACHE_DIR"],
    )
    until(lambda: (machine / "again.pid").exists())
    for _ in range(600):
        if not (machine / "again.pid").exists():
            break
        time.sleep(0.1)
    assert (shared / "runs/vm/checkpoints/1/manifest.json").exists(), (
        machine / "train.log"
    ).read_text()


def test_the_image_holds_every_package() -> None:
    copied = {
        line.split()[1] for line in lines(ROOT / "launch/gke/Dockerfile") if line.startswith("COPY")
    }
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"} <= copied
