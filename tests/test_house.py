# SPDX-License-Identifier: Apache-2.0
"""The house rules that a machine can check: where imports point, and what the metric needs."""

import ast
import functools
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

from transformers import TrainerCallback

from mir_callback import MIRCallback, Probe, attach_mir
from tests.samples import pairs
from tests.training.runs import make_trainer

PACKAGE = Path(__file__).parents[1] / "mir_callback"
# From the ground up; a room may import from the rooms below it and from itself.
FLOORS = [
    ["errors", "fs"],
    ["distributed", "lock", "metric", "watchdog", "record", "trend"],
    ["model", "history", "early_stopping", "second_opinion", "schedule", "lr_schedule"],
    ["probe", "clock", "arguments"],
    ["config"],
    ["evaluation"],
    ["best_model", "loggers", "console"],
    ["monitor"],
    ["integrations"],
    ["analysis", "checkpoints"],
    ["cli", "on_start"],
    ["launch", "__main__"],
]
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@functools.cache
def imports_of(path):
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    return found


def room_of(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def name_of(path):
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)


def prefixes_of(names):
    """`a.b.c` is the file a/b.py or a/b/c.py."""
    parts = (name.split(".") for name in names)
    return {".".join(part[:length]) for part in parts for length in range(1, len(part) + 1)}


def is_upwards(path, name):
    package, *rooms = name.split(".")
    if package == "mir_callback" and rooms:
        return rooms[0] != room_of(path) and LEVEL[rooms[0]] >= LEVEL[room_of(path)]
    return package == "llava_integration"


def test_imports_point_downwards():
    assert [f"{path}: {name}" for path in FILES for name in imports_of(path) if is_upwards(path, name)] == []


def test_no_file_needs_itself_by_way_of_others():
    files = {name_of(path): path for path in FILES}
    needs = {name: files.keys() & prefixes_of(imports_of(path)) for name, path in files.items()}
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
        "print([m for m in ('wandb', 'deepspeed', 'scipy', 'datasets', 'lightning') if m in set(sys.modules) - before])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]"


def test_an_evaluation_passes_the_files_that_the_architecture_names(tmp_path):
    callback = attach_mir(make_trainer(tmp_path, steps=2), Probe.from_pairs(pairs(4)), every=1, stop="plateau")
    passed = set()

    def note(frame, event, _argument):
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(PACKAGE):
            passed.add(str(path.relative_to(PACKAGE)))

    class Tracer(TrainerCallback):
        """From the Trainer's event on; the history is the last to be reached."""

        def on_step_begin(self, args, state, control, **kwargs):
            callback.on_step_end = lambda *given, **named: traced(*given, **named)

    def traced(*given, **named):
        sys.setprofile(note)
        try:
            return MIRCallback.on_step_end(callback, *given, **named)
        finally:
            sys.setprofile(None)

    callback._trainer.add_callback(Tracer())
    callback._trainer.train()
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    _, _, section = page.partition("## One evaluation")
    path = re.findall(r"^ *\d+ +(\S+\.py)", section, re.MULTILINE)
    libraries = re.findall(r"`((?:\w+/)?\w+\.py)`", section.partition("What these call")[2].partition("\n\n")[0])
    after = {"loggers.py", "console.py"}  # what the line on the disk is followed by
    assert len(path) == 13
    assert set(path) <= passed
    assert passed - {*path, *libraries} - after == {name for name in passed if name.startswith("metric/")}


def test_the_architecture_names_every_file_of_a_room_and_no_other():
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    tree = page.partition("## Rooms")[2].partition("```")[2].partition("```")[0]
    files = {path.name for path in FILES if path.parent.name not in ("page", "cli") and not path.stem.startswith("__")}
    assert set(re.findall(r"\w+\.py", tree)) == files
