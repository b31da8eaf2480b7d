# SPDX-License-Identifier: Apache-2.0
"""What several tests of training need."""

import pytest
import wandb


@pytest.fixture
def wandb_folder(tmp_path, monkeypatch):
    """Where offline runs of wandb go; its service ends with the test."""
    folder = tmp_path / "wandb-run"
    folder.mkdir()
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(folder))
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield folder
    wandb.teardown()
