# SPDX-License-Identifier: Apache-2.0
"""What tests of several folders need."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest


@pytest.fixture
def fresh_process():
    """One whose allocator has nothing in store yet from other tests, where memory is what is tested."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool
