# SPDX-License-Identifier: Apache-2.0
"""Measured tables are quoted as they are, each in one place."""

import re

import pytest
from predict import check, measured_rates
from quote import PAGES, RESULTS, quoted, quoting


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_every_quoted_table_is_that_of_its_file(page):
    text = page.read_text(encoding="utf-8")
    assert quoting(text) == text, "run `python benchmarks/quote.py`"
    assert quoting(text.replace("| ", "|| ")).count("|| ") < text.count("| ")  # what was changed is put back


def test_every_table_of_make_bench_is_quoted_once():
    names = [name for page in PAGES for name in quoted(page.read_text(encoding="utf-8"))]
    made = re.findall(r"\$\(RESULTS\)/(\w+\.md)", (RESULTS.parents[1] / "Makefile").read_text(encoding="utf-8"))
    assert sorted(names) == sorted({*made} - {"gpu_parts.md"})  # that one is summed up in words


def test_the_model_says_within_five_percent_what_was_measured_as_a_whole():
    said, took = (float(figure) for figure in re.findall(r"([\d.]+) s ", check(measured_rates())))
    assert abs(said / took - 1.0) < 0.05
    assert (RESULTS / "prediction.md").exists()
