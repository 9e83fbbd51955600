"""Analyses the HLO text of a compiled program: cycles, FLOPs and collectives, with loop bodies
multiplied by their trip counts, which XLA's own cost analysis counts once.
"""

import collections
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)
_BITS = {"pred": 8, "token": 0}
"""Bits of the types whose name does not contain them, as "bf16" does."""
# `%body.1 (arg: f32[8]) -> f32[8] {` begins a computation.
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+)(?: \(.*)? \{$")
# `  ROOT %add.2 = f32[8]{0} add(%a, %b), metadata=...` is an instruction.
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\((.*)$")
# `bf16[128,256]`, in tuples several of them.
_SHAPE = re.compile(r"\b(pred|token|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
# In the backend_config of a while loop.
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
# Attributes that name the computations which an instruction calls.
_CALLED = re.compile(
    r"(?:calls|body|to_apply|branch_computations|true_computation|false_computation)=\{?(%?[\w.\-]+(?:,"
    r" ?%?[\w.\-]+)*)\}?"
)


class Instruction(NamedTuple):
    """One line of a compiled program: `name = shape opcode(rest`."""

    name: str
    shape: str
    opcode: str
    rest: str
    """Operands and attributes, unparsed."""


class Collective(NamedTuple):
    """Describes a collective operation.

    kind: such as "all-reduce". group: devices of its first group, as indices into the mesh (of
      a
    permutation: a sender and its receiver). bytes: size of its largest operand or result on a
    device. times: how often a step runs it.
    """

    kind: str
    group: tuple[int, ...]
    bytes: int
    times: int


class Summary(NamedTuple):
    """Holds what a device does in one step.

    cycles: the TPU compiler's estimate, 0 on other backends. flops: of matrix products and
    convolutions. instructions: number of lines of the program, a measure of its size.
    """

    cycles: int
    flops: int
    collectives: list[Collective]
    instructions: int


def summarise(text: str) -> Summary:
    """Summarises the HLO text of a program.

    Raises: ValueError if the text has no entry computation.
    """
    computations, entry = parse(text)
    cycles = flops = 0
    collectives: collections.Counter[tuple[str, tuple[int, ...], int]] = collections.Counter()
    inner = {name: _flops(computations, name) for name in computations}
    for name, times in _runs(computations, entry, 1):
        for instruction in computations[name]:
            found = _CYCLES.search(instruction.rest)
            cycles += times * int(found[1]) if found else 0
            # An asynchronous collective is a pair of -start and -done; count its start.
            kind = instruction.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                collectives[kind, first_group(instruction.rest), _largest(instruction.shape)] += (
                    times
                )
    # Cycles are noted on a fusion as a whole, but its products are inside, so this pass also
    # enters fusions.
    for name, times in _runs(computations, entry, 1, (*LOOPS_AND_CALLS, "fusion")):
        flops += times * inner[name]
    return Summary(
        cycles,
        flops,
        [Collective(*key, times) for key, times in collectives.items()],
        sum(map(len, computations.values())),
    )


def first_group(attributes: str) -> tuple[int, ...]:
    """Parses the first group of a collective, in any of XLA's notations; () if none is given,
    which means all devices.
    """
    # replica_groups=mesh['x'=2,'y'=4] {'y'}: the axes along which a group varies.
    if found := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?: device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?"
        r" \{([^}]*)\}",
        attributes,
    ):
        names, sizes = zip(
            *((name, int(size)) for name, size in re.findall(r"'?([\w.]+)'?=(\d+)", found[1])),
            strict=True,
        )
        order = np.arange(math.prod(sizes))
        if found[2]:
            order = order.reshape(_numbers(found[2])).transpose(
                _numbers(found[3]) if found[3] else None
            )
        varies = re.findall(r"'([\w.]+)'", found[4])
        return tuple(
            order.reshape(sizes)[tuple(slice(None) if name in varies else 0 for name in names)]
            .ravel()
            .tolist()
        )
    # replica_groups=[groups,size]<=[dims]T(permutation): an iota, transposed and reshaped.
    if found := re.search(
        r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes
    ):
        order = (
            np.arange(math.prod(_numbers(found[3])))
            .reshape(_numbers(found[3]))
            .transpose(_numbers(found[4]) if found[4] else None)
        )
        return tuple(order.reshape(int(found[1]), int(found[2]))[0].tolist())
    # replica_groups={{0,1},{2,3}}: every group is listed.
    if found := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", attributes):
        return tuple(_numbers(found[1]))
    return ()


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Returns ({name of a computation: its instructions}, name of the entry computation)."""
    computations: dict[str, list[Instruction]] = {}
    entry = current = ""
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = header[2]
            computations[current] = []
            entry = current if header[1] else entry
        elif current and (found := _INSTRUCTION.match(line)):
            computations[current].append(Instruction(*found.groups()))
    if not entry:
        raise ValueError("the text has no ENTRY computation, so that it is no HLO module")
    return computations, entry


def _trips(computations: Mapping[str, list[Instruction]], rest: str) -> int:
    """Returns how often a loop runs: the compiler's annotation, else n of a condition `i < n`
    with i counting from 0, else 1.
    """
    if found := _TRIPS.search(rest):
        return int(found[1])
    condition = re.search(r"condition=%?([\w.\-]+)", rest)
    instructions = {i.name: i for i in computations.get(condition[1], [])} if condition else {}
    for instruction in instructions.values():
        if instruction.opcode == "compare" and "direction=LT" in instruction.rest:
            operands = [
                instructions[name]
                for name in re.findall(r"%([\w.\-]+)", instruction.rest)
                if name in instructions
            ]
            limits = [
                int(i.rest.partition(")")[0])
                for i in operands
                if i.opcode == "constant" and re.match(r"\d+\)", i.rest)
            ]
            return max(limits, default=1)
    return 1


LOOPS_AND_CALLS = ("while", "conditional", "call", "async-start")


def _runs(
    computations: Mapping[str, list[Instruction]],
    name: str,
    times: int,
    through: Sequence[str] = LOOPS_AND_CALLS,
) -> Iterator[tuple[str, int]]:
    """Yields (name, how often it runs) of every computation that a computation runs, itself
    first. All branches of a conditional count.

    through: the opcodes whose computations are entered; without "fusion", a fusion counts as
    one instruction.
    """
    yield name, times
    for instruction in computations[name]:
        if instruction.opcode in through:
            trips = _trips(computations, instruction.rest) if instruction.opcode == "while" else 1
            for called in _called(instruction.rest):
                if called in computations:
                    yield from _runs(computations, called, times * trips, through)


def _flops(computations: Mapping[str, list[Instruction]], name: str) -> int:
    """Counts FLOPs of products and convolutions directly in a computation, 2 per
    multiply-add.
    """
    shapes = {instruction.name: _sizes(instruction.shape) for instruction in computations[name]}
    total = 0
    for instruction in computations[name]:
        if instruction.opcode not in ("dot", "convolution"):
            continue
        operands = [
            shapes.get(operand, [])
            for operand in re.findall(r"%([\w.\-]+)", instruction.rest.partition(")")[0])
        ]
        if len(operands) != 2:
            continue
        left, right = operands
        result = _sizes(instruction.shape)
        if instruction.opcode == "dot":
            # 2 FLOPs for each element of the result and of the contracted axes.
            axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
            total += (
                2
                * math.prod(result)
                * (math.prod(left[axis] for axis in _numbers(axes[1])) if axes and axes[1] else 1)
            )
        else:
            total += 2 * _taps(left, right, result, instruction.rest)
    return total


def _taps(left: Sequence[int], right: Sequence[int], result: Sequence[int], attributes: str) -> int:
    """Counts the multiplications of a convolution, without taps on padding or between dilated
    inputs: TPU programs express all matrix products as convolutions, and in batched products
    most taps fall there.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    assert labels, "a convolution has labels"
    window = (
        dict(re.findall(r"(\w+)=([\dx_\-]+)", found[1]))
        if (found := re.search(r"window=\{([^}]*)\}", attributes))
        else {}
    )

    def numbers(name: str) -> list[int] | None:
        return [int(n) for n in window[name].split("x")] if name in window else None

    # Batch, output features and input features; spatial taps are counted per axis below.
    taps = result[labels[3].index("b")] * result[labels[3].index("f")] * right[labels[2].index("i")]
    for axis in filter(str.isdigit, labels[1]):
        place = int(axis)
        size, kernel, out = (
            left[labels[1].index(axis)],
            right[labels[2].index(axis)],
            result[labels[3].index(axis)],
        )
        stride, spread, step = (
            (numbers(name) or [1] * (place + 1))[place]
            for name in ("stride", "lhs_dilate", "rhs_dilate")
        )
        low = int(window["pad"].split("x")[place].split("_")[0]) if "pad" in window else 0
        # Position in the dilated input of every (output, kernel) pair along this axis.
        at = np.arange(out)[:, None] * stride + np.arange(kernel) * step - low
        taps *= int(((at >= 0) & (at <= (size - 1) * spread) & (at % spread == 0)).sum())
    return taps


def _sizes(shape: str) -> list[int]:
    """Returns the sizes of the first array in a shape."""
    found = _SHAPE.search(shape)
    return _numbers(found[2]) if found and found[2] else []


def _called(rest: str) -> list[str]:
    return [
        name.strip().lstrip("%") for group in _CALLED.findall(rest) for name in group.split(",")
    ]


def _largest(shape: str) -> int:
    """Returns the bytes of the largest array in a shape, which may be a tuple: an asynchronous
    collective has both its operand and its result.
    """
    return max((_bytes(kind, sizes) for kind, sizes in _SHAPE.findall(shape)), default=0)


def _bytes(kind: str, sizes: str) -> int:
    digits = re.search(r"\d+", kind)
    bits = int(digits[0]) if digits else _BITS[kind]
    return math.prod(int(size) for size in sizes.split(",") if size) * bits // 8
