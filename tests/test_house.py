"""The form of the house: which rooms may import which, how long files and functions may be."""

import ast
import functools
import pathlib
import subprocess
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PRODUCT = ("flamingo_jax", "configs", "launch", "data_pipelines")
DATA = ()
"""Files of data rather than code, which may be long."""

FORBIDDEN = {
    "flamingo_jax": ("configs", "launch", "data_pipelines"),
    "data_pipelines": ("configs", "launch"),
    "configs": ("launch",),
    "flamingo_jax/models": (
        "flamingo_jax/tasks",
        "flamingo_jax/training",
        "flamingo_jax/checkpointing",
        "flamingo_jax/inference",
        "flamingo_jax/evaluation",
        "flamingo_jax/interop",
    ),
    "flamingo_jax/tasks": ("flamingo_jax/training", "flamingo_jax/inference"),
    "flamingo_jax/training": ("flamingo_jax/inference", "flamingo_jax/evaluation"),
    "flamingo_jax/inference": (
        "flamingo_jax/training",
        "flamingo_jax/evaluation",
        "flamingo_jax/playground",
    ),
    "flamingo_jax/evaluation": ("flamingo_jax/training", "flamingo_jax/playground"),
    "flamingo_jax/playground": ("flamingo_jax/training",),
    "flamingo_jax/processing": ("flamingo_jax/models", "flamingo_jax/training"),
    "flamingo_jax/partitioning": ("flamingo_jax/models", "flamingo_jax/training"),
}
"""What no file of a room imports, not even within a function."""


def _files(*rooms: str) -> list[pathlib.Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *rooms],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    return [ROOT / name for name in listed if name.endswith(".py") and (ROOT / name).exists()]


@functools.cache
def _tree(file: pathlib.Path) -> ast.Module:
    return ast.parse(file.read_text())


def _module(file: pathlib.Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported(nodes: Iterator[ast.AST]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _at_import(tree: ast.Module) -> Iterator[ast.AST]:
    """Yields the nodes that run when the module is imported."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        yield node
        waiting.extend(ast.iter_child_nodes(node))


def test_no_circle_of_imports() -> None:
    modules = {_module(file): file for file in _files(*PRODUCT)}
    arrows = {
        name: {m for m in _imported(_at_import(_tree(file))) if m in modules and m != name}
        for name, file in modules.items()
    }
    done: set[str] = set()

    def walk(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for after in sorted(arrows[name]):
                walk(after, (*path, name))
            done.add(name)

    for name in arrows:
        walk(name, ())


@pytest.mark.parametrize("room", FORBIDDEN)
def test_imports_point_one_way(room: str) -> None:
    barred = tuple(name.replace("/", ".") for name in FORBIDDEN[room])
    found = [
        f"{file.relative_to(ROOT)} imports {module}"
        for file in _files(room)
        for module in _imported(ast.walk(_tree(file)))
        if any(module == name or module.startswith(name + ".") for name in barred)
    ]
    assert not found


def test_nothing_but_launch_imports_planning() -> None:
    found = [
        f"{file.relative_to(ROOT)} imports {module}"
        for file in _files("flamingo_jax", "configs", "data_pipelines")
        if "planning" not in file.relative_to(ROOT).parts
        for module in _imported(ast.walk(_tree(file)))
        if module.startswith("flamingo_jax.planning")
    ]
    assert not found


def test_no_function_is_long() -> None:
    found = [
        f"{file.relative_to(ROOT)}:{node.lineno} {node.name} has {length} lines"
        for file in _files(*PRODUCT, "tests")
        for node in ast.walk(_tree(file))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or 0) - node.lineno + 1) > 80
    ]
    assert not found


def test_no_file_is_long() -> None:
    lengths = {file: file.read_text().count("\n") for file in _files(*PRODUCT, "tests")}
    long = {str(f.relative_to(ROOT)): n for f, n in lengths.items() if n > 500}
    assert not {name: n for name, n in long.items() if name not in DATA}


def test_lines_are_short() -> None:
    lengths = [
        len(line) for file in _files(*PRODUCT, "tests") for line in file.read_text().split("\n")
    ]
    wide = sum(length >= 96 for length in lengths)
    assert wide <= 0.05 * len(lengths)


def test_public_things_have_docstrings() -> None:
    def bare(file: pathlib.Path, body: list[ast.stmt]) -> Iterator[str]:
        for node in body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_"
            if public and ast.get_docstring(node) is None:
                yield f"{file.relative_to(ROOT)}:{node.lineno} {node.name}"

    found = [
        what
        for file in _files("flamingo_jax", "data_pipelines", "configs")
        for what in bare(file, _tree(file).body)
    ]
    assert not found


def test_no_two_public_classes_have_one_name() -> None:
    places: dict[str, list[str]] = {}
    for file in _files(*PRODUCT):
        for node in _tree(file).body:
            if isinstance(node, ast.ClassDef) and node.name[0] != "_":
                places.setdefault(node.name, []).append(str(file.relative_to(ROOT)))
    assert not {name: found for name, found in places.items() if len(found) > 1}
