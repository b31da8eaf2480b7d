# SPDX-License-Identifier: Apache-2.0
"""Examples in docstrings: they run, and every public class and function has one."""

import doctest
import importlib
import inspect
import pkgutil

import mir_callback
from mir_callback.probe.adapters import Adapter

MODULES = sorted(
    each.name
    for each in pkgutil.walk_packages(mir_callback.__path__, "mir_callback.")
    # The first runs the `mir` command, the second needs axolotl: tests/loops/test_plugins.py
    if each.name not in ("mir_callback.__main__", "mir_callback.integrations.axolotl")
)
RUNNER_OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
PUBLIC = {name: getattr(mir_callback, name) for name in mir_callback.__all__} | {"Adapter": Adapter}


def docstrings_of(value):
    """Its own, and those of the methods that it defines."""
    methods = [getattr(value, name) for name in vars(value)] if inspect.isclass(value) else []
    return [inspect.getdoc(each) or "" for each in (value, *(m for m in methods if inspect.isroutine(m)))]


def test_examples_run():
    runner = doctest.DocTestRunner(optionflags=RUNNER_OPTIONS)
    report = []
    for name in MODULES:
        for test in doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(name)):
            runner.run(test, out=report.append)
    assert runner.tries > len(PUBLIC)
    assert runner.failures == 0, "".join(report)


def test_a_public_name_is_a_class_or_a_function_and_has_an_example():
    assert [name for name, value in PUBLIC.items() if not (inspect.isclass(value) or inspect.isroutine(value))] == []
    marks = (">>>", "```", "Example::")
    without = [
        name for name, value in PUBLIC.items() if not any(m in text for text in docstrings_of(value) for m in marks)
    ]
    assert without == []
