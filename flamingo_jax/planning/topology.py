"""Describes TPU topologies as meshes of devices that need not exist: on any machine with
libtpu, programs can be compiled for them, but not run.
"""

import importlib.util
import os
import re
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from flamingo_jax.errors import UserError
from flamingo_jax.experiment import MeshConfig
from flamingo_jax.partitioning.mesh import make_mesh


class Chip(NamedTuple):
    """Holds the published properties of a TPU chip.

    memory: bytes of HBM that a program may use. flops: dense bfloat16 FLOPs per second. clock:
    cycles per second, to convert the compiler's estimates. link: bytes per second that a chip
    sends to all of its neighbours together. options: further options of libtpu.
    """

    memory: int
    flops: float
    clock: float
    link: float
    options: dict[str, Any]


CHIPS = {
    # "megacore" joins the two cores of a v4 chip into the one device that programs see.
    "v4": Chip(
        int(30.75 * 2**30),
        275e12,
        1.05e9,
        300e9,
        {"chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1)},
    ),
    "v5e": Chip(int(15.75 * 2**30), 197e12, 1.5e9, 200e9, {}),
    "v5p": Chip(int(95.74 * 2**30), 459e12, 1.75e9, 600e9, {}),
    "v6e": Chip(int(31.25 * 2**30), 918e12, 1.75e9, 448e9, {}),
}


class Topology(NamedTuple):
    """Holds the devices of a topology. name: such as "v4:2x2x4". kind: of its chips, "v4"."""

    name: str
    kind: str
    chip: Chip
    devices: list[jax.Device]

    def mesh(self, config: MeshConfig) -> Mesh:
        """Makes the config's mesh over all chips. Raises UserError if the product of its sizes
        is another number.
        """
        return make_mesh(config, self.devices)


def open_topology(name: str) -> Topology:
    """Opens the topology of a name such as "v4:2x2x4", a kind of chip and the sizes of its
    torus; "2*v4:2x2x4" is two such slices.

    Raises: UserError for a malformed name, an unknown chip, sizes that do not exist, or a
      missing libtpu.
    """
    match = re.fullmatch(r"(?:([1-9]\d*)\*)?((\w+):\d+(?:x\d+)+)", name)
    if not match or match[3] not in CHIPS:
        raise UserError(
            f"--topology={name} must be CHIP:SIZES or SLICES*CHIP:SIZES, such as v4:2x2x4, with"
            f" one of the chips {', '.join(CHIPS)}"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology={name} needs the TPU compiler, which runs without a TPU: pip install"
            " 'flamingo_jax[plan]'"
        )
    slices, chip = int(match[1] or 1), CHIPS[match[3]]
    # Otherwise libtpu waits for a metadata server, which only TPU machines have.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # Several plans may run at the same time, since none of them uses a chip.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=match[2], num_slices=slices, **chip.options
        )
    except Exception as error:  # noqa: BLE001 - XLA raises what it likes, JaxRuntimeError and RuntimeError among it
        raise UserError(
            f"--topology={name} is refused by the TPU compiler: {' '.join(str(error).split())}"
        ) from error
    return Topology(name, match[3], chip, list(described.devices))
