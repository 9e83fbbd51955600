"""JobSets by Kubernetes' schemas, and what they start."""

import math
from typing import Any

import pytest
import yaml

from flamingo_jax import configuring
from flamingo_jax.experiment import Experiment
from launch import command
from tests.launch.launchers import (
    FINAL,
    ROOT,
    jobset,
)

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
