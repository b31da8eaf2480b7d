# SPDX-License-Identifier: Apache-2.0
"""The picture of a run is a real picture of its values."""

import numpy as np
import pytest
from PIL import Image

from mir_callback.analysis.figures import plot_run
from mir_callback.errors import HistoryError


def record(step, per_layer, **fields):
    return {"step": step, "mir": float(np.log10(sum(per_layer))), "per_layer": per_layer, **fields}


HISTORY = [record(step, [3.0 + step / 50, 1.0, 0.2]) for step in range(0, 60, 10)]


def picture(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_picture_changes_with_values_and_verdict(tmp_path):
    losses = [{"step": step, "loss": 4.0 / step} for step in range(1, 60, 5)]
    plain = picture(plot_run(HISTORY, losses, tmp_path / "a.png"))
    assert plain.std() > 20
    stopped = [*HISTORY[:-1], {**HISTORY[-1], "verdict": "plateau"}]
    for other in ((HISTORY[:4], losses), (HISTORY, []), (stopped, losses)):
        assert not np.array_equal(plain, picture(plot_run(*other, tmp_path / "b.png")))


@pytest.mark.parametrize(
    "history",
    [
        HISTORY[:1],
        [record(0, [1.0, 1.0]), record(5, [1.0, 1.0])],
        [record(0, [1.0, 0.0]), record(7, [2.0, 0.0])],
        [*HISTORY[:3], {"step": 30, "mir": None, "per_layer": None}],
        [record(step, [0.5] * 80) for step in (0, 1)],
    ],
    ids=["one evaluation", "all equal", "a zero layer", "a failed evaluation", "80 layers"],
)
def test_any_history_with_a_value_can_be_drawn(tmp_path, history):
    assert picture(plot_run(history, [], tmp_path / "run.png")).std() > 20


def test_error_when_there_is_nothing_to_draw(tmp_path):
    with pytest.raises(HistoryError, match="at least one evaluation with a finite MIR"):
        plot_run([{"step": 0, "mir": None, "per_layer": None}], [], tmp_path / "run.png")
    assert not (tmp_path / "run.png").exists()
