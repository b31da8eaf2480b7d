# SPDX-License-Identifier: Apache-2.0
"""docs/performance.md quotes the measured tables as they are, and names every one of them."""

import re

from predict import check, measured_rates
from quote import PAGE, RESULTS, quoting


def test_every_quoted_table_is_that_of_its_file():
    page = PAGE.read_text(encoding="utf-8")
    assert page.count("<!-- end -->") >= 5
    assert quoting(page) == page


def test_quoting_puts_back_what_was_changed():
    page = PAGE.read_text(encoding="utf-8")
    assert quoting(page.replace("| ", "|| ")).count("|| ") < page.count("| ")


def test_the_model_says_within_five_percent_what_was_measured_as_a_whole():
    said, took = (float(figure) for figure in re.findall(r"([\d.]+) s ", check(measured_rates())))
    assert abs(said / took - 1.0) < 0.05
    assert (RESULTS / "prediction.md").exists()
