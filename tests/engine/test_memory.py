# SPDX-License-Identifier: Apache-2.0
"""Budgets, plans, what counts as a shortage of memory, and how much was taken at most."""

import psutil
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from mir_callback.evaluation import memory
from mir_callback.evaluation.hidden_states import (
    GB,
    Budgets,
    StoragePlan,
    budget_error,
    find_budgets,
    pinned_bytes,
    plan_pass,
)
from mir_callback.evaluation.memory import PeakMemory, free_memory, is_out_of_memory

LAYERS = st.integers(1, 100)
NEED = st.integers(0, 10**12)
BYTES = st.integers(0, 10**14)
WORLD = st.integers(1, 64)
SPARE = st.integers(0, 1)


@given(LAYERS, NEED, BYTES, BYTES, SPARE, WORLD)
def test_a_plan_stays_within_the_budgets_given(layers, need, device, host, spare, world):
    plan = plan_pass(layers, need, need, Budgets(device, host, given=True), spare=spare, world=world)
    assert 0 <= plan.at_once <= plan.count <= layers
    assert plan.at_once * need <= device
    assert plan.count == 0 or plan.at_once >= 1
    if not plan.on_host:
        assert plan.count == 0 or (plan.count + spare) * need <= device
        assert plan.at_once == plan.count
    else:
        assert plan.count * need <= host


@given(LAYERS, NEED, BYTES, BYTES, SPARE, WORLD)
def test_everything_is_kept_at_once_on_the_device_where_it_fits(layers, need, device, host, spare, world):
    assume((layers + spare) * need <= device)
    plan = plan_pass(layers, need, need, Budgets(device, host, given=True), spare=spare, world=world)
    assert plan == StoragePlan(False, layers, layers)


@given(LAYERS, st.integers(1, 10**12), BYTES, BYTES, WORLD)
def test_a_plan_needs_the_fewest_passes_there_can_be(layers, need, device, host, world):
    budgets = Budgets(device, host, given=True)
    plan = plan_pass(layers, need, need, budgets, world=world)
    # Rows in host memory come back to the device, so nothing helps if not one layer fits there.
    most = min(layers, max(device, host) // need) if device >= need else 0
    if most == 0:
        assert plan.count == 0
        return
    passes, left = 0, layers
    while left:
        left -= plan_pass(left, need, need, budgets, world=world).count
        passes += 1
    assert passes == -(-layers // most)


@given(LAYERS, st.integers(1, 10**12), BYTES, BYTES, SPARE, WORLD)
def test_one_layer_is_kept_whatever_is_free_without_a_budget(layers, need, device, host, spare, world):
    plan = plan_pass(layers, need, need, Budgets(device, host, given=False), spare=spare, world=world)
    assert plan.at_once >= 1


@given(LAYERS, NEED, NEED, BYTES, BYTES, WORLD)
def test_a_larger_budget_never_keeps_less(layers, need, more, device, host, world):
    small = plan_pass(layers, need, need, Budgets(device, host, given=True), world=world)
    large = plan_pass(layers, need, need, Budgets(device + more, host, given=True), world=world)
    assert large.count >= small.count


@given(st.integers(2, 100), st.integers(1, 10**9), st.integers(1, 200), WORLD)
def test_layers_from_the_host_come_in_multiples_of_the_ranks(layers, need, fitting, world):
    assume(fitting < layers)
    plan = plan_pass(layers, need, need, Budgets(fitting * need, layers * need, given=True), world=world)
    assert plan.on_host
    assert plan.count == layers
    assert plan.at_once % world == 0 or plan.at_once == fitting < world


@given(st.integers(1, 2**50))
def test_pinned_memory_comes_in_powers_of_two(size):
    taken = pinned_bytes(size)
    assert size <= taken < 2 * size
    assert taken.bit_count() == 1


@given(st.floats(1e-9, 1e6), st.floats(0.01, 0.999))
def test_the_remedy_named_for_a_small_budget_is_large_enough(need_gb, part):
    need = need_gb * GB
    message = str(budget_error(part * need_gb, need))
    advised = float(message.split("at least ")[1].split(",")[0])
    assert need <= advised * GB * (1 + 1e-9)
    assert advised <= 1.12 * need_gb


def write_group(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(str(text))


def test_memory_left_in_a_container_is_that_of_its_tightest_group(tmp_path):
    membership = tmp_path / "cgroup"
    membership.write_text("0::/outer/inner\n")
    root = tmp_path / "fs"
    write_group(root / "outer", memory__max=1000, memory__current=900, memory__stat="anon 5\ninactive_file 50\n")
    write_group(root / "outer/inner", memory__max="max", memory__current=700, memory__stat="inactive_file 1\n")
    assert memory._available_in_cgroups(membership, root) == [150]
    write_group(root / "outer/inner", memory__max="600")
    assert sorted(memory._available_in_cgroups(membership, root)) == [0, 150]


def test_memory_left_in_a_container_of_the_older_kind(tmp_path):
    membership = tmp_path / "cgroup"
    membership.write_text("5:cpu,cpuacct:/x\n4:memory:/not/shown/in/here\n0::/\n")
    files = {"memory__limit_in_bytes": 1000, "memory__usage_in_bytes": 400, "memory__stat": "total_inactive_file 7\n"}
    write_group(tmp_path / "fs/memory", **files)
    assert memory._available_in_cgroups(membership, tmp_path / "fs") == [607]
    assert memory._available_in_cgroups(tmp_path / "nowhere", tmp_path / "fs") == []


def test_the_default_budget_is_shared_by_the_ranks_of_a_machine():
    cpu = torch.device("cpu")
    alone, shared = (find_budgets(cpu, None, ranks) for ranks in (1, 4))
    assert 0 < shared.device < 0.5 * alone.device
    assert alone.device <= 0.5 * psutil.virtual_memory().total
    assert alone.host == 0  # the same memory
    assert find_budgets(cpu, 2.5, 4) == Budgets(2_500_000_000, 0, given=True)


def test_real_shortages_are_known_and_other_errors_are_none():
    with pytest.raises(RuntimeError) as of_torch:
        torch.empty(1 << 50)
    with pytest.raises(MemoryError) as of_python:
        bytearray(1 << 60)
    assert is_out_of_memory(of_torch.value)
    assert is_out_of_memory(of_python.value)
    assert is_out_of_memory(torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    for other in (None, RuntimeError("shapes do not match"), ValueError("out of memory"), KeyError("x")):
        assert not is_out_of_memory(other)


def test_what_a_failure_held_is_freed_when_it_is_let_go_of():
    def fail():
        held = torch.ones(1000)
        holders.append(held.untyped_storage()._weak_ref())
        try:
            raise KeyError
        except KeyError as cause:
            raise RuntimeError("out of memory") from cause

    holders = []
    try:
        fail()
    except RuntimeError as error:
        kept = error
    assert not torch.UntypedStorage._expired(holders[0])
    free_memory(kept, torch.device("cpu"))
    assert torch.UntypedStorage._expired(holders[0])


def peaks():
    """MiB seen above the highest use so far without a sample; and below it with one, and without."""
    cpu, megabyte = torch.device("cpu"), 2**20
    first = PeakMemory(cpu)
    del_soon = torch.ones(300 * megabyte, dtype=torch.uint8)
    del del_soon
    found = [first.sample()]
    held = torch.ones(100 * megabyte, dtype=torch.uint8)
    for sampled in (True, False):
        peak = PeakMemory(cpu)
        block = torch.ones(100 * megabyte, dtype=torch.uint8)
        if sampled:
            peak.sample()
        del block
        found.append(peak.sample())
    return [round(each / megabyte) for each in found], len(held)


def test_peak_is_exact_above_the_highest_use_so_far_and_sampled_below(fresh_process):
    assert fresh_process.submit(peaks).result(120)[0] == pytest.approx([300, 100, 0], abs=12)
