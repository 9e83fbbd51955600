"""Opens the devices that a command uses a trained model on: one, or a mesh, which may span the
devices of several processes.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jax.sharding import Mesh

HELP = (
    "Devices along each axis, as data=2,model=4, or fsdp=8: rows of prompts over data and fsdp,"
    " heads over model; -1, or data where it is not named, for all that are left. By default one"
    " device is used. Several processes use one mesh when each gets the same command, and finds"
    " its place as launch.train does."
)
"""What --help says of --mesh."""

FROZEN_DTYPES = ("float32", "bfloat16", "int8")
DTYPE_HELP = (
    "Dtype of the language model's and the vision encoder's weights; by default as in the export."
    " int8 takes half of bfloat16's memory; `launch.benchmark int8` says what it changes."
)
"""What --help says of --frozen_dtype."""


def open_mesh(text: str) -> "Mesh | None":
    """Makes the mesh of --mesh over all devices, after joining the run's other processes if
    there are any; None for the empty text.

    Raises: UserError for a mesh that does not fit the devices, or processes that do not know
      their place.
    """
    if not text:
        return None
    # Imported here, since --help and bad input must not wait for jax.
    import jax

    from flamingo_jax.distributed.process_info import detect_process
    from flamingo_jax.partitioning.cpu_devices import configure_cpu_devices
    from flamingo_jax.partitioning.mesh import make_mesh, mesh_config

    mesh_config(text)  # Before waiting for other processes.
    process = detect_process()
    if process is not None:
        configure_cpu_devices(several_processes=True)
        jax.distributed.initialize(
            process.address, process.count, process.index, process.local_devices
        )
    return make_mesh(text)


def is_first_process() -> bool:
    """Returns whether this process is the one that prints and writes: every process of a mesh
    has the same results.
    """
    import jax

    return jax.process_index() == 0


def keep_compiled_programs() -> None:
    """Keeps compiled programs on this machine's disk, so that a later command of the same shapes
    does not compile them again; a cache that JAX's own settings name is used as it is.
    """
    import jax

    from flamingo_jax.paths import machine_compilation_cache

    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(machine_compilation_cache()))


def is_only_process() -> bool:
    """Returns whether no other process takes part."""
    import jax

    return jax.process_count() == 1
