"""The device mesh: `data` (replicas), `fsdp` (parameters sharded, gathered to use), `model`
(Megatron).
"""

import math
import os
from collections.abc import Iterable, Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from flamingo_jax.errors import UserError
from flamingo_jax.experiment import Experiment, MeshConfig

DATA, FSDP, MODEL = AXES = ("data", "fsdp", "model")
ROWS = (DATA, FSDP)
"""The axes that share a batch's rows."""
BY_VISUAL = ("images", "features", "frame_mask", "jitter")
"""Arrays of a batch whose first axis is a list of its rows' visuals."""


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes a mesh of all `devices` (by default every device of the run) with Auto axes data, fsdp
    and model.

    Where the devices are several slices (TPU pods joined by the data centre's network), the
    outermost part of `data` goes from one slice to the next, so that only the sum of gradients
    crosses that network. Among GPUs any axis may cross hosts; the inner ones stay within a host
    as far as they fit.

    Raises: UserError where the sizes do not multiply to the number of devices, or `data` not to
      that of slices.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    sizes = [config.data, config.fsdp, config.model]
    wanted = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
        raise UserError(
            f"config.mesh is {wanted}: sizes must be 1 or more, and one of them may be -1 for"
            " all devices that are left"
        )
    fixed = math.prod(size for size in sizes if size != -1)
    if count % fixed or (-1 not in sizes and fixed != count):
        hint = f"choose sizes that multiply to {count}, or -1 for one of them"
        if -1 in sizes:
            hint = f"make the product of the other sizes a divisor of {count}"
        raise UserError(f"config.mesh {wanted} does not fit {count} devices: {hint}")
    shape = tuple(count // fixed if size == -1 else size for size in sizes)
    slices = _slices(devices)
    if slices > 1 and shape[0] % slices:
        raise UserError(
            f"config.mesh.data is {shape[0]}, but the {count} devices are {slices} slices,"
            f" which `data` joins: make it a multiple of {slices}"
        )
    # Split where it must be: of a torus of 8 x 12 x 16 no axes together have 32.
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


def _slices(devices: Sequence[jax.Device]) -> int:
    """Returns how many TPU slices the devices are; 1 for devices of another kind.

    XLA gives GPUs (and CPUs) a `slice_index` too, one for each host that it meets, which says
    nothing about their network: NVLink and InfiniBand join hosts as they join GPUs.

    Raises: UserError where the environment tells of several slices and the devices do not.
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
    """Returns where a batch's arrays lie, by their names: rows over data and fsdp, repeated
    over model; the list of visuals over all three.

    Only batches with `visuals` have such a list: the images of contrastive pairs lie with
    their rows. `share` has the hosts' side of this.
    """
    names = set(names)
    listed = BY_VISUAL if "visuals" in names else ()
    return {
        name: NamedSharding(mesh, PartitionSpec(AXES if name in listed else ROWS)) for name in names
    }


def check_batches(experiment: Experiment, mesh: Mesh) -> None:
    """Raises a UserError for the first dataset whose batch does not divide into the mesh's row
    shards times its microbatches.
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
