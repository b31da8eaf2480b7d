# SPDX-License-Identifier: Apache-2.0
"""The house rules that a machine can check: where imports point, and what the metric needs."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mir_callback"
# From the ground up; a room may import from the rooms below it and from itself.
FLOORS = [
    ["errors", "fs"],
    ["distributed", "metric", "watchdog", "record"],
    ["model", "history", "early_stopping", "schedule"],
    ["probe", "clock"],
    ["config"],
    ["evaluation"],
    ["best_model", "loggers"],
    ["monitor"],
    ["integrations"],
    ["analysis", "checkpoints"],
    ["cli"],
    ["launch", "__main__"],
]
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def room_of(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def name_of(path):
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)


def prefixes_of(names):
    """`a.b.c` is the file a/b.py or a/b/c.py."""
    parts = (name.split(".") for name in names)
    return {".".join(part[:length]) for part in parts for length in range(1, len(part) + 1)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    here = room_of(path)
    for name in imports_of(path):
        parts = name.split(".")
        if parts[0] == "llava_integration":
            pytest.fail(f"{path} imports {name}")
        if parts[0] == "mir_callback":
            there = parts[1]
            assert there == here or LEVEL[there] < LEVEL[here], f"{path} imports {name}"


def test_no_file_needs_itself_by_way_of_others():
    files = {name_of(path): path for path in FILES}
    needs = {name: {there for there in files if there in prefixes_of(imports_of(path))} for name, path in files.items()}
    TopologicalSorter(needs).prepare()


def test_every_room_has_its_floor():
    assert {room_of(path) for path in FILES} == set(LEVEL)


def test_metric_imports_torch_and_numpy_only():
    foreign = {
        name.split(".")[0]
        for path in (PACKAGE / "metric").glob("*.py")
        for name in imports_of(path)
        if name.split(".")[0] not in sys.stdlib_module_names
    }
    assert foreign == {"torch", "numpy", "mir_callback"}


def test_optional_packages_are_not_imported_with_ours():
    # transformers itself imports some of them where they are installed.
    code = (
        "import sys; from transformers import Trainer; before = set(sys.modules); import mir_callback; "
        "print([m for m in ('wandb', 'deepspeed', 'scipy', 'datasets') if m in set(sys.modules) - before])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]"
