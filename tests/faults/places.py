# SPDX-License-Identifier: Apache-2.0
"""Output folders on disks that are small or cannot be written."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder whose `run` lies on a disk of 64 KiB; skips where this user may not mount one."""
    run = tmp_path / "run"
    run.mkdir()
    if not _mounted("-t", "tmpfs", "-o", "size=64k", "tmpfs", str(run)):
        pytest.skip("needs the right to mount a tmpfs")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(run)], check=True)


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder whose `run` cannot be written."""
    run = tmp_path / "run"
    run.mkdir()
    if os.getuid() != 0:
        run.chmod(0o555)
        yield tmp_path
        run.chmod(0o755)
        return
    if not _mounted("-t", "tmpfs", "-o", "size=64k,ro", "tmpfs", str(run)):
        pytest.skip("root can write everywhere but on a disk mounted read-only, and may not mount one here")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(run)], check=True)


def _mounted(*words: str) -> bool:
    return subprocess.run(["mount", *words], capture_output=True, check=False).returncode == 0
