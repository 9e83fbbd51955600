"""Describes machines that need not exist: slices of TPUs, for which libtpu compiles programs on
any machine, and nodes of GPUs, of which only the published figures are known here.
"""

import importlib.util
import math
import os
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from flamingo_jax.errors import UserError
from flamingo_jax.experiment import MeshConfig
from flamingo_jax.partitioning.mesh import make_mesh


class Chip(NamedTuple):
    """Holds the published properties of a TPU chip or a GPU.

    memory: bytes of HBM that a program may use. flops: dense bfloat16 FLOPs per second.
    bandwidth: bytes per second between HBM and the chip. link: bytes per second that a chip
    sends to all of its neighbours together. clock: cycles per second, to convert the TPU
    compiler's estimates; 0 for GPUs. options: further options of libtpu.
    """

    memory: int
    flops: float
    bandwidth: float
    link: float
    clock: float = 0.0
    options: Mapping[str, Any] = MappingProxyType({})


# Google's system architecture pages of each version (cloud.google.com/tpu/docs/v4, v5e, v5p,
# v6e) give memory, peak, HBM bandwidth and the interconnect's bandwidth of a chip. The memory
# that programs may use is what libtpu's compiler says.
TPUS = {
    # "megacore" joins the two cores of a v4 chip into the one device that programs see.
    "v4": Chip(
        int(30.75 * 2**30),
        275e12,
        1228e9,
        300e9,
        1.05e9,
        {"chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1)},
    ),
    "v5e": Chip(int(15.75 * 2**30), 197e12, 819e9, 200e9, 1.5e9),
    "v5p": Chip(int(95.74 * 2**30), 459e12, 2765e9, 600e9, 1.75e9),
    "v6e": Chip(int(31.25 * 2**30), 918e12, 1640e9, 448e9, 1.75e9),
}
# NVIDIA's datasheets of the SXM modules: memory, dense bfloat16 (half of the figure "with
# sparsity"), memory bandwidth, and half of NVLink's bandwidth, which counts both directions.
GPUS = {
    "a100": Chip(80 * 10**9, 312e12, 2039e9, 300e9),
    "h100": Chip(80 * 10**9, 989e12, 3350e9, 450e9),
    "h200": Chip(141 * 10**9, 989e12, 4800e9, 450e9),
}


class PlannedMachine(NamedTuple):
    """Holds what is published of a machine: its name, such as "2*v4:2x2x4" or "h200_8", its
    kind of chip, and how many chips it has in all slices or nodes.
    """

    name: str
    kind: str
    chip: Chip
    chips: int
    slices: int

    @property
    def has_compiler(self) -> bool:
        """Returns whether libtpu compiles for these chips without having one."""
        return self.kind in TPUS


class Topology(NamedTuple):
    """Holds the devices of a topology. name: such as "v4:2x2x4". kind: of its chips, "v4"."""

    name: str
    kind: str
    chip: Chip
    devices: list[jax.Device]

    def mesh(self, config: MeshConfig | str) -> Mesh:
        """Makes the config's mesh over all chips. Raises UserError if the product of its sizes
        is another number.
        """
        return make_mesh(config, self.devices)


def find_machine(name: str) -> PlannedMachine:
    """Returns the machine of a name: "v4:2x2x4", a kind of TPU and the sizes of its torus;
    "h200_8", a kind of GPU and how many of them a node has; "2*v4:2x2x4", two such slices, and
    "2*h200_8", two nodes.

    Raises: UserError for a malformed name or an unknown chip.
    """
    tpu = re.fullmatch(r"(?:([1-9]\d*)\*)?(\w+):([1-9]\d*(?:x[1-9]\d*)+)", name)
    gpu = re.fullmatch(r"(?:([1-9]\d*)\*)?([a-z]+\d+)_([1-9]\d{0,2})", name)
    found = tpu or gpu
    chip = found and (TPUS if tpu else GPUS).get(found[2])
    if not found or not chip:
        raise UserError(
            f"--topology={name} must be CHIP:SIZES or SLICES*CHIP:SIZES, such as v4:2x2x4, with"
            f" one of the chips {', '.join(TPUS)}; or GPU_COUNT, such as h200_8, with one of"
            f" {', '.join(GPUS)}"
        )
    slices = int(found[1] or 1)
    each = math.prod(map(int, found[3].split("x")))
    return PlannedMachine(name, found[2], chip, slices * each, slices)


def has_libtpu() -> bool:
    """Returns whether the TPU compiler is installed."""
    return importlib.util.find_spec("libtpu") is not None


def open_topology(name: str) -> Topology:
    """Opens the topology of a machine with TPUs: see `find_machine`.

    Raises: UserError for a malformed name, an unknown chip, GPUs, sizes that do not exist, or
      a missing libtpu.
    """
    machine = find_machine(name)
    if not machine.has_compiler:
        raise UserError(
            f"--topology={name} is a node of GPUs, whose compiler needs one of them: time the"
            " step there with launch.benchmark, or add --inference, which counts bytes"
        )
    if not has_libtpu():
        raise UserError(
            f"--topology={name} needs the TPU compiler, which runs without a TPU: pip install"
            " 'flamingo_jax[plan]'"
        )
    # Otherwise libtpu waits for a metadata server, which only TPU machines have.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # Several plans may run at the same time, since none of them uses a chip.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        described = topologies.get_topology_desc(
            platform="tpu",
            topology_name=name.split("*")[-1],
            num_slices=machine.slices,
            **machine.chip.options,
        )
    except Exception as error:  # noqa: BLE001 - XLA raises what it likes, JaxRuntimeError and RuntimeError among it
        raise UserError(
            f"--topology={name} is refused by the TPU compiler: {' '.join(str(error).split())}"
        ) from error
    return Topology(name, machine.kind, machine.chip, list(described.devices))
