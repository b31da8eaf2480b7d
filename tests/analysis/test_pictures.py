# SPDX-License-Identifier: Apache-2.0
"""The picture of a run is a real picture of its values; a contact sheet shows every sample."""

import json

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from mir_callback import Probe
from mir_callback.analysis.pictures import draw_sheet, plot_run
from mir_callback.errors import ConfigError, HistoryError
from mir_callback.probe.batches import TokenCounts

COLOURS = [(200, 30 * i, 255 - 30 * i) for i in range(7)]


def record(step, per_layer, **fields):
    return {"step": step, "mir": float(np.log10(sum(per_layer))), "per_layer": per_layer, **fields}


HISTORY = [record(step, [3.0 + step / 50, 1.0, 0.2]) for step in range(0, 60, 10)]


@pytest.fixture(scope="module")
def probe():
    sizes = [(64, 20), (20, 64), (300, 300), (1, 1), (5, 500), (640, 480), (64, 64)]
    return Probe.from_pairs(
        [(Image.new("RGB", size, colour), f"text {size}") for size, colour in zip(sizes, COLOURS, strict=True)]
    )


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


@pytest.mark.parametrize("layers", [[None, None], [[2.0, 1.0], None], [[2.0, 1.0], [3.0]]])
def test_a_history_whose_layers_are_missing_or_of_different_number_is_drawn(tmp_path, layers):
    history = [{"step": step, "mir": 2.0 - step, "per_layer": values} for step, values in enumerate(layers)]
    for records in (history, [{k: v for k, v in line.items() if v is not None} for line in history]):
        assert picture(plot_run(records, [], tmp_path / "a.png")).std() > 0


def test_a_loss_is_drawn_at_the_step_it_was_logged_at(tmp_path):
    history = [record(step, [2.0], loss=4.0 / (1 + step), loss_step=step - 5) for step in (10, 20)]
    logged = [{"step": line["loss_step"], "loss": line["loss"]} for line in history]
    bare = [{k: v for k, v in line.items() if k != "loss"} for line in history]
    one, other = plot_run(history, [], tmp_path / "a.png"), plot_run(bare, logged, tmp_path / "b.png")
    assert (picture(one) == picture(other)).all()


def test_runs_are_drawn_from_where_they_lie(tmp_path):
    """The same picture from records at hand, from the history file and from the run's folder with a Trainer's state."""
    losses = [{"step": step, "loss": 4.0 / step} for step in range(1, 60, 5)]
    (tmp_path / "checkpoint-50").mkdir()
    (tmp_path / "checkpoint-50" / "trainer_state.json").write_text(json.dumps({"log_history": losses}))
    file = tmp_path / "mir_history.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in HISTORY) + '{"step": 60, "mi')
    expected = picture(plot_run(HISTORY, losses, tmp_path / "a.png"))
    for source in (file, str(tmp_path)):
        assert np.array_equal(expected, picture(plot_run(source, [], tmp_path / "b.png")))
    with pytest.raises(HistoryError, match="nowhere"):
        plot_run(tmp_path / "nowhere", [], tmp_path / "c.png")


def test_loss_and_error_band_come_from_the_records_when_they_have_them(tmp_path):
    plain = picture(plot_run(HISTORY, [], tmp_path / "a.png"))
    noted = [{**record, "loss": 4.0 - record["step"] / 20} for record in HISTORY]
    logged = [{"step": record["step"], "loss": record["loss"]} for record in noted]
    with_loss = picture(plot_run(noted, [], tmp_path / "b.png"))
    assert not np.array_equal(plain, with_loss)
    assert np.array_equal(with_loss, picture(plot_run(HISTORY, logged, tmp_path / "c.png")))
    sure = [{**record, "mir_se": 0.02} for record in HISTORY]
    assert not np.array_equal(plain, picture(plot_run(sure, [], tmp_path / "d.png")))


def test_colour_bar_lies_beside_its_picture_when_there_is_a_loss(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    plot_run(HISTORY, [{"step": step, "loss": 4.0 / step} for step in range(1, 60, 5)], tmp_path / "a.png")
    (figure,) = figures
    figure.draw_without_rendering()
    curve, heat, beside = figure.axes
    (bar,) = (axes for axes in heat.child_axes)
    box, position = heat.get_position(), bar.get_window_extent().transformed(figure.transFigure.inverted())
    assert box.x1 < position.x0 < box.x1 + 0.03
    assert position.y0 == pytest.approx(box.y0, abs=0.01)
    assert position.y1 == pytest.approx(box.y1, abs=0.01)
    assert beside.get_ylabel() == "training loss"
    assert curve.get_position().x1 == pytest.approx(box.x1)


def test_error_when_there_is_nothing_to_draw(tmp_path):
    with pytest.raises(HistoryError, match="no evaluation has a MIR"):
        plot_run([{"step": 0, "mir": None, "per_layer": None}], [], tmp_path / "run.png")
    assert not (tmp_path / "run.png").exists()


def test_every_image_is_on_the_sheet(probe, tmp_path):
    sheet = picture(draw_sheet(probe, tmp_path / "deeper" / "sheet.png")).reshape(-1, 3)
    for colour in COLOURS:
        assert (sheet == colour).all(axis=1).sum() > 100, colour


def test_token_counts_and_texts_are_written(probe, tmp_path):
    plain = picture(draw_sheet(probe, tmp_path / "a.png"))
    counted = picture(draw_sheet(probe, tmp_path / "b.png", TokenCounts([576] * 7, list(range(7)), "x")))
    other = Probe.from_pairs([(sample.open_image(), "words") for sample in probe.samples])
    assert plain.shape == counted.shape
    assert not np.array_equal(plain, counted)
    assert not np.array_equal(plain, picture(draw_sheet(other, tmp_path / "c.png")))


def test_columns_can_be_chosen(probe, tmp_path):
    narrow = picture(draw_sheet(probe, tmp_path / "a.png", columns=1))
    wide = picture(draw_sheet(probe, tmp_path / "b.png", columns=7))
    assert narrow.shape[0] > 3 * narrow.shape[1]
    assert wide.shape[1] > 4 * wide.shape[0]


def test_error_names_the_file_when_it_is_no_image_file(probe, tmp_path):
    with pytest.raises(ConfigError, match=r"sheet\.txt"):
        draw_sheet(probe, tmp_path / "sheet.txt")
