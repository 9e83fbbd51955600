"""What a compiled program does, read from its HLO text: loop bodies times their trip counts, which XLA's own analysis leaves out."""

import collections
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast", "ragged-all-to-all")
_BITS = {"pred": 8, "token": 0}
"""Of the types whose name does not say how many."""
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+)(?: \(.*)? \{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\((.*)$")
_SHAPE = re.compile(r"\b(pred|token|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_CALLED = re.compile(r"(?:calls|body|to_apply|branch_computations|true_computation|false_computation)=\{?(%?[\w.\-]+(?:, ?%?[\w.\-]+)*)\}?")


class Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    rest: str
    """Operands and attributes, as they stand."""


class Collective(NamedTuple):
    """kind, e.g. "all-reduce"; groups: the replica groups as they stand in the program; bytes: of its largest operand or result on a device;
    times: how often a step runs it."""

    kind: str
    groups: str
    bytes: int
    times: int


class Summary(NamedTuple):
    """cycles: the TPU compiler's estimate of one step, 0 where it gives none. instructions: lines of the program, a measure of its size."""

    cycles: int
    collectives: list[Collective]
    instructions: int


def summarise(text: str) -> Summary:
    """Raises ValueError where the text has no entry computation."""
    computations, entry = parse(text)
    cycles = 0
    collectives: collections.Counter[tuple[str, str, int]] = collections.Counter()
    for instruction, times in _runs(computations, entry, 1):
        found = _CYCLES.search(instruction.rest)
        cycles += times * int(found[1]) if found else 0
        kind = instruction.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            groups = re.search(r"(?:replica_groups|source_target_pairs)=(\S+?\}\}|\S+)", instruction.rest)
            collectives[kind, groups[1].rstrip(",") if groups else "", _largest(instruction.shape)] += times
    return Summary(cycles, [Collective(*key, times) for key, times in collectives.items()], sum(map(len, computations.values())))


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Every computation's instructions by its name, and the name of the entry."""
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


def _runs(computations: Mapping[str, list[Instruction]], name: str, times: int) -> Iterator[tuple[Instruction, int]]:
    """Every instruction that a computation runs, with how often. Fusions stand for what is in them; of a conditional, every branch counts."""
    for instruction in computations[name]:
        yield instruction, times
        if instruction.opcode in ("while", "conditional", "call", "async-start"):
            trips = int(found[1]) if instruction.opcode == "while" and (found := _TRIPS.search(instruction.rest)) else 1
            for called in _called(instruction.rest):
                if called in computations:
                    yield from _runs(computations, called, times * trips)


def _called(rest: str) -> list[str]:
    return [name.strip().lstrip("%") for group in _CALLED.findall(rest) for name in group.split(",")]


def _largest(shape: str) -> int:
    """Bytes of the largest array of a shape, which may be a tuple: an asynchronous collective holds its operand and its result."""
    return max((_bytes(kind, sizes) for kind, sizes in _SHAPE.findall(shape)), default=0)


def _bytes(kind: str, sizes: str) -> int:
    digits = re.search(r"\d+", kind)
    bits = int(digits[0]) if digits else _BITS[kind]
    return math.prod(int(size) for size in sizes.split(",") if size) * bits // 8
