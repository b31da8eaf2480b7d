# SPDX-License-Identifier: Apache-2.0
"""The most memory that a block of work takes."""

import os
import subprocess
import sys
import threading

import pytest
import torch

from mir_callback.evaluation.memory import peak_memory


def test_peak_is_seen_below_and_above_the_highest_use_so_far():
    # A process of its own: whether a use is the highest so far depends on everything before it.
    code = """
import time, torch
from mir_callback.evaluation.memory import peak_memory
MB = 2**20
def use(megabytes, seconds=0.0):
    block = torch.ones(megabytes * MB, dtype=torch.uint8)
    time.sleep(seconds)
    return len(block)
cpu = torch.device("cpu")
with peak_memory(cpu) as first:
    use(300)
held = torch.ones(100 * MB, dtype=torch.uint8)
with peak_memory(cpu) as second:
    use(100, seconds=0.1)
with peak_memory(cpu) as third:
    pass
print(*(round(meter.extra_bytes / MB) for meter in (first, second, third)))
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert [int(word) for word in done.stdout.split()] == pytest.approx([300, 100, 0], abs=12)


def test_the_thread_that_samples_is_gone_afterwards_also_after_an_error():

    before = threading.active_count()
    with pytest.raises(KeyError), peak_memory(torch.device("cpu")):  # noqa: PT012 - it lives only inside
        assert threading.active_count() == before + 1
        raise KeyError
    assert threading.active_count() == before
