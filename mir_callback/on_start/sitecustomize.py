# SPDX-License-Identifier: Apache-2.0
"""Attach MIR to the Trainer of a launched run, in whichever process it trains.

`mir_callback.launch` puts this folder on the PYTHONPATH of what it runs, so Python imports this file at its start, and
the launcher's flags into an environment variable. Processes that import no Trainer get one finder more, and nothing
else: a Trainer that does not train is left alone, and so are the processes that a training process starts.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

# JSON of the flags ("arguments", as fields of MIRArguments) and of a folder in which training processes leave a note.
VARIABLE = "MIR_CALLBACK_LAUNCHED"
FOLDER = os.path.dirname(os.path.abspath(__file__))
_ROOT = os.path.dirname(os.path.dirname(FOLDER))
_OURS = ("mir_callback", "llava_integration")
_TRAINER = "transformers.trainer"
_LAUNCHER = "python -m mir_callback.launch"


def start(arguments: Mapping[str, Any], notes: str | Path) -> None:
    """Attach MIR to the Trainers of this process, and of those it starts from now on.

    Args:
        arguments: fields of MIRArguments; plain values, paths absolute.
        notes: an existing folder; each process that trains leaves a file there.
    """
    paths = [FOLDER, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    os.environ[VARIABLE] = json.dumps({"arguments": dict(arguments), "notes": str(notes)})
    _watch_imports()


class _Finder:
    """Finds this package where the launcher has it, and the Trainer's module, whose class is then changed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name in _OURS:
            return PathFinder.find_spec(name, [_ROOT])
        spec = PathFinder.find_spec(name, path) if name == _TRAINER else None
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_change(module: Any) -> None:
                execute(module)
                _change(module.Trainer)

            spec.loader.exec_module = execute_and_change  # type: ignore[method-assign]
        return spec


def _watch_imports() -> None:
    if not any(isinstance(each, _Finder) for each in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    if _TRAINER in sys.modules:
        _change(sys.modules[_TRAINER].Trainer)


def _change(trainer_class: Any) -> None:
    """Make `train` attach MIR first, in each process to whatever it trains, but not to what is trained meanwhile."""
    if hasattr(trainer_class.train, "_mir_launched"):
        return
    original, known, is_training, count = trainer_class.train, "", False, 0

    @functools.wraps(original)
    def train(trainer: Any, *args: Any, **keywords: Any) -> Any:
        nonlocal known, is_training, count
        # Taken out, so that jobs which the run starts from here on (evaluations, workers) are not taken for the run.
        known = os.environ.pop(VARIABLE, known)
        if not known or is_training:
            return original(trainer, *args, **keywords)
        is_training, count = True, count + 1
        try:
            _attach(trainer, known, count)
            return original(trainer, *args, **keywords)
        finally:
            is_training = False

    train._mir_launched = True  # type: ignore[attr-defined]
    trainer_class.train = train


def _attach(trainer: Any, words: str, count: int) -> None:
    launched = json.loads(words)
    with suppress(OSError):  # on another node than the launcher's there is no such folder
        (Path(launched["notes"]) / str(os.getpid())).touch()
    from mir_callback import distributed
    from mir_callback.config import MIRArguments
    from mir_callback.console import log
    from mir_callback.errors import UnsupportedModelError
    from mir_callback.integrations.huggingface import MIRCallback, attach_mir, callbacks_of

    remedy = f"Start {_LAUNCHER} on every node, and leave PYTHONPATH and {VARIABLE} as it sets them."
    distributed.require_everywhere(f"MIR was attached to training {count}", remedy)
    arguments = MIRArguments(**launched["arguments"])
    if any(isinstance(each, MIRCallback) for each in callbacks_of(trainer)):
        return
    try:
        attach_mir(trainer, **vars(arguments.probe_source()), **arguments.options())
    except UnsupportedModelError as error:
        if count == 1:
            raise
        log.warning("no MIR in training %d of this process: %s", count, error)  # the first one was what it is for


def _import_the_users() -> None:
    """Import the sitecustomize that this one hides, if there is one."""
    ours = sys.modules.pop(__name__)
    sys.path[:] = [each for each in sys.path if os.path.abspath(each) != FOLDER]
    try:
        import_module(__name__)
    except ModuleNotFoundError as error:
        if error.name != __name__:
            raise
    finally:
        sys.modules.setdefault(__name__, ours)


if __name__ == "sitecustomize":
    if VARIABLE in os.environ:
        _watch_imports()
    _import_the_users()
