"""The device mesh and how batches are sharded over it. Its axes are `data` (replicas), `fsdp`
(parameters sharded, and gathered where they are used) and `model` (tensor parallelism as in
Megatron).
"""

import math
import os
import re
from collections.abc import Iterable, Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from flamingo_jax.errors import UserError
from flamingo_jax.experiment import Experiment, MeshConfig

DATA, FSDP, MODEL = AXES = ("data", "fsdp", "model")
ROWS = (DATA, FSDP)
"""The mesh axes over which a batch's rows are sharded."""
BY_VISUAL = ("images", "features", "frame_mask", "jitter")
"""Arrays of a batch whose first axis is the list of visuals, not rows."""


def make_mesh(config: MeshConfig | str, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes a mesh of all `devices` (by default every device of the run) with Auto axes data,
    fsdp and model.

    With several TPU slices (joined by the data centre's network) the outermost part of `data`
    runs across slices, so that only the sum of gradients crosses that network. Among GPUs any
    axis may cross hosts; the inner ones stay within a host as far as they fit.

    Args:
      config: the sizes of the axes, or a text such as "data=2,model=4" (see `mesh_config`).

    Raises: UserError where the sizes do not multiply to the number of devices, or `data` is no
      multiple of the number of slices.
    """
    devices = jax.devices() if devices is None else devices
    shape, count = mesh_shape(config, len(devices)), len(devices)
    slices = _slices(devices)
    if slices > 1 and shape[0] % slices:
        data = "the mesh's data" if isinstance(config, str) else "config.mesh.data"
        raise UserError(
            f"{data} is {shape[0]}, but the {count} devices are {slices} slices,"
            f" which `data` joins: make it a multiple of {slices}"
        )
    # A physical axis may be split between mesh axes: of a torus of 8 x 12 x 16, for example,
    # no set of whole axes has 32 devices.
    if slices == 1:
        array = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        array = mesh_utils.create_hybrid_device_mesh(
            (shape[0] // slices, *shape[1:]),
            (slices, 1, 1),
            devices,
            allow_split_physical_axes=True,
        )
    return Mesh(array, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_shape(config: MeshConfig | str, count: int) -> tuple[int, int, int]:
    """Returns the sizes of the axes data, fsdp and model of a mesh of `count` devices, which
    need not exist; see `make_mesh`.

    Raises: UserError where the sizes do not multiply to `count`.
    """
    name = "config.mesh"
    if isinstance(config, str):
        config, name = mesh_config(config), "the mesh"
    sizes = (config.data, config.fsdp, config.model)
    wanted = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
        raise UserError(
            f"{name} is {wanted}: sizes must be 1 or more, and one of them may be -1 for"
            " all devices that are left"
        )
    # The sizes that are given; an axis of -1 gets the quotient.
    fixed = math.prod(size for size in sizes if size != -1)
    if count % fixed or (-1 not in sizes and fixed != count):
        hint = f"choose sizes that multiply to {count}, or -1 for one of them"
        if -1 in sizes:
            hint = f"make the product of the other sizes a divisor of {count}"
        raise UserError(f"{name} {wanted} does not fit {count} devices: {hint}")
    data, fsdp, model = (count // fixed if size == -1 else size for size in sizes)
    return data, fsdp, model


def mesh_config(text: str) -> MeshConfig:
    """Parses the sizes of a mesh, the one grammar of --mesh and `make_mesh`: "data=2,model=4".

    An axis that is not named has size 1, but `data` takes all devices that are left.

    Raises: UserError for anything else.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        found = re.fullmatch(rf"\s*({'|'.join(AXES)})\s*=\s*(-1|\d{{1,6}})\s*", part)
        if found is None or found[1] in sizes:
            raise UserError(
                f"the mesh {text!r} must be AXIS=SIZE,... with each of {', '.join(AXES)} at most"
                " once, such as data=2,model=4"
            )
        sizes[found[1]] = int(found[2])
    remaining = 1 if -1 in sizes.values() else MeshConfig.data
    return MeshConfig(**{DATA: remaining, **sizes})


def _slices(devices: Sequence[jax.Device]) -> int:
    """Returns the number of TPU slices; 1 for other devices.

    XLA gives GPUs (and CPUs) a `slice_index` too, one per host, which says nothing about the
    network between them.

    Raises: UserError where the environment has several slices, but the devices do not say
      which they belong to.
    """
    if any(device.platform != "tpu" for device in devices):
        return 1
    found = {getattr(device, "slice_index", None) for device in devices}
    told = os.environ.get("MEGASCALE_NUM_SLICES", "1")
    if None in found and told != "1":
        raise UserError(
            f"the environment tells of {told} slices (MEGASCALE_NUM_SLICES), but jax"
            f" {jax.__version__} does not say which devices are of which: install another"
            " version of jax, or start each slice as a run of its own"
        )
    return len(found)


def batch_shardings(names: Iterable[str], mesh: Mesh) -> dict[str, NamedSharding]:
    """Returns the shardings of a batch's arrays by name: rows over data and fsdp, replicated
    over model; the list of visuals over all three.

    Only batches with `visuals` have such a list; the images of contrastive pairs are sharded
    as rows. `host_shard` says which part each process reads.
    """
    names = set(names)
    listed = BY_VISUAL if "visuals" in names else ()
    return {
        name: NamedSharding(mesh, PartitionSpec(AXES if name in listed else ROWS)) for name in names
    }


def check_batches(experiment: Experiment, mesh: Mesh) -> None:
    """Raises UserError for the first dataset whose batch size is no multiple of the mesh's row
    shards times the dataset's microbatches.
    """
    shards = mesh.shape[DATA] * mesh.shape[FSDP]
    for place, datasets in (("data", experiment.data), ("held_out", experiment.held_out)):
        for name, dataset in datasets.items():
            parts = dataset.microbatches
            if parts < 1:
                raise UserError(
                    f"config.{place}.{name}.microbatches is {parts}, but must be 1 or more"
                )
            divisor, size = shards * parts, dataset.batch_size
            if size < 1 or size % divisor:
                what = f"{mesh.shape[DATA]} (data) x {mesh.shape[FSDP]} (fsdp) devices" + (
                    f" x {parts} microbatches" if parts > 1 else ""
                )
                near = max(round(size / divisor), 1) * divisor
                raise UserError(
                    f"config.{place}.{name}.batch_size is {size}, but {what} share it: make it"
                    f" a multiple of {divisor}, such as {near}"
                )
