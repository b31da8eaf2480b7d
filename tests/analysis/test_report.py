# SPDX-License-Identifier: Apache-2.0
"""The page of runs: what is on it is what was measured, nothing on it comes from elsewhere, nothing in it can run."""

import base64
import hashlib
import io
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from mir_callback import Probe
from mir_callback.analysis import page
from mir_callback.analysis.compare import Recipe, compare
from mir_callback.analysis.load import read_runs
from mir_callback.analysis.page import views
from mir_callback.analysis.page.charts import find_edges, fit_scale, format_tick
from mir_callback.analysis.page.facts import explain_by_norms, paired_error
from mir_callback.analysis.page.views import RunView
from mir_callback.analysis.tables import to_json
from mir_callback.errors import HistoryError
from mir_callback.loggers import log_values
from mir_callback.record import as_records
from tests.analysis.pages import COMPANIONS, page_of, parse, records, view
from tests.samples import pairs

PARTS = Path(page.__file__).parent
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\" onload='alert(3)' & {{ 7 * 7 }}"


def points(path):
    return [tuple(map(float, pair)) for pair in re.findall(r"[ML]([-\d.]+) ([-\d.]+)", path.attributes["d"])]


def picture(element):
    kind, _, code = element.attributes["src"].partition(",")
    assert kind.startswith("data:image/"), kind
    return Image.open(io.BytesIO(base64.b64decode(code)))


def timeline(tree):
    return tree.one("figure", "timeline")


def data_of(tree):
    return json.loads(tree.one("script", id="data").text, parse_constant=lambda name: pytest.fail(name))


def decode(quantity, run=0):
    """The values of (layers, evaluations) that the page's script reads out."""
    codes = np.frombuffer(base64.b64decode(quantity["codes"][run]), "<u2").reshape(quantity["layers"][run], -1)
    share, (low, high) = np.where(codes == 65535, np.nan, codes / 65534), (quantity["low"], quantity["high"])
    return low * (high / low) ** share if quantity["log"] else low + (high - low) * share


def test_curves_stand_where_the_values_are():
    history = records(9)
    losses = [(step, 5.0 / step) for step in range(1, 80, 3)]
    figure = timeline(parse(page_of(view("run", history, losses))))
    mir_points, loss_points = points(figure.one("div", "tall").one("path", "line")), points(figure.one("path", "loss"))
    assert len(mir_points) == len(history)
    assert len(loss_points) == len(losses)
    for expected, values, drawn in (
        ([(r["step"], r["mir"]) for r in history], None, mir_points),
        ([(step, math.log(loss)) for step, loss in losses], None, loss_points),
    ):
        for axis, sign in ((0, 1), (1, -1)):  # upwards is towards zero in SVG
            values, positions = ([point[axis] for point in list_] for list_ in (expected, drawn))
            slope, start = np.polyfit(values, positions, 1)
            assert slope * sign > 0
            np.testing.assert_allclose(positions, slope * np.array(values) + start, atol=0.11)
        assert all(0 <= position <= 1000 for point in drawn for position in point)


def test_band_is_95_percent_around_the_curve():
    history = records(5)
    panel = timeline(parse(page_of(view("run", history)))).one("div", "panel tall")
    curve, outline = points(panel.one("path", "line")), points(panel.one("path", "band"))
    values = [record["mir"] for record in history]
    slope, _ = np.polyfit(values, [y for _, y in curve], 1)
    upper, lower = outline[: len(history)], outline[len(history) :][::-1]
    for record, (_, high), (_, low) in zip(history, upper, lower, strict=True):
        assert low - high == pytest.approx(-2 * 1.96 * record["mir_se"] * slope, abs=0.5)


def test_values_that_are_read_out_are_those_of_the_records():
    history = records(6)
    history[2]["per_layer"] = history[2]["per_layer"][:2]
    losses = [(0, 9.0), (25, 4.5), (50, 1.25), (55, 1.0)]
    tree = parse(page_of(view("run", history, losses)))
    data = data_of(tree)
    (run,) = data["runs"]
    assert run["steps"] == [record["step"] for record in history]
    assert run["mir"] == [f"{record['mir']:.3f} ± {record['mir_se']:.3f}" for record in history]
    assert run["loss"] == ["9", "9", "9", "4.5", "4.5", "1.25"]
    assert run["reason"] == [record["reason"] for record in history]
    choices = [choice.attributes["value"] for choice in tree.one("select", name="quantity").all("option")]
    assert choices == ["per_layer", *COMPANIONS]
    for name, quantity in data["quantities"].items():
        kept = [record[name] if name == "per_layer" else record["companions"][name] for record in history]
        expected = np.array([values + [np.nan] * (4 - len(values)) for values in kept]).T
        np.testing.assert_allclose(decode(quantity), expected, rtol=1e-3)


def test_last_loss_is_the_one_logged_last_when_no_evaluation_followed():
    tree = parse(page_of(view("run", records(6), [(50, 1.25), (55, 1.0)])))
    assert "last loss 1 step 55" in tree.one("dl", "cards").words
    assert tree.one("table", "reading").one("td", data_field="loss").text == "1"


def test_curves_keep_their_extremes_when_there_are_more_evaluations_than_the_eye_tells():
    history = records(3000, layers=2, samples=2, every=1)
    for number, record in enumerate(history):
        record["mir"] = 2 + 0.1 * math.sin(number)
    history[1700]["mir"], history[800]["mir"], history[900] = 5.0, 1.0, {"step": 900, "mir": None, "error": "lost"}
    losses = [(step, 3.0 - (step == 2222)) for step in range(4000)]
    tree = parse(page_of(view("run", history, losses)))
    (run,) = data_of(tree)["runs"]
    assert len(run["steps"]) < 500
    assert {0, 800, 1700, 2999} <= set(run["steps"])
    values = {record["step"]: record["mir"] for record in history}
    assert [float(text.split()[0]) for text in run["mir"]] == pytest.approx([values[s] for s in run["steps"]], abs=6e-4)
    assert len(timeline(tree).all("span", "cross-mark")) == 1
    assert len(points(timeline(tree).one("path", "loss"))) < 500
    assert f"{len(run['steps'])} of 2999 evaluations are drawn" in tree.one("section", aria_labelledby="timeline").words
    assert "lowest MIR 1.000" in tree.one("dl", "cards").words


def test_overview_says_best_last_verdict_and_paired_difference():
    history = records(7, samples=20, seed=3)
    best = min(history[1:], key=lambda record: record["mir"])
    text = parse(page_of(view("run", history))).one("dl", "cards").words
    assert f"{best['mir']:.3f} ± {best['mir_se']:.3f} step {best['step']}" in text
    assert "plateau reason at 60" in text
    differences = np.array(history[-1]["influences"]) - np.array(best["influences"])
    n = len(differences)
    error = np.sqrt(((differences - differences.mean()) ** 2).sum() / (n * (n - 1)))
    assert best is not history[-1]
    assert f"+{history[-1]['mir'] - best['mir']:.3f} ± {error:.3f} from the lowest (± over the probe's samples)" in text
    last, lowest = as_records([history[-1], best])
    assert paired_error(last, lowest) == pytest.approx(error)
    assert paired_error(replace(lowest, probe_fingerprint="other"), last) is None
    assert paired_error(replace(lowest, influences=best["influences"][1:]), last) is None


def test_nothing_is_loaded_and_no_script_but_the_own_may_run():
    text = page_of(view("run", records(5)), probe=Probe.from_pairs(pairs(3)))
    tree = parse(text)
    for element in tree.all():
        for name in ("src", "href", "action", "srcset", "data", "poster", "background"):
            assert element.attributes.get(name, "data:").startswith("data:"), element
        assert not [name for name in element.attributes if name.startswith("on")], element
    styles = tree.one("style").text
    assert "url(" not in styles
    assert "@import" not in styles
    policy = tree.one("meta", http_equiv="Content-Security-Policy").attributes["content"]
    assert policy.startswith("default-src 'none'; img-src data:;")
    scripts = [script for script in tree.all("script") if "type" not in script.attributes]
    hashed = base64.b64encode(hashlib.sha256(scripts[0].text.encode()).digest()).decode()
    assert len(scripts) == 1
    assert f"script-src 'sha256-{hashed}'" in policy


def test_everything_from_outside_is_text_when_it_looks_like_html():
    history = records(3)
    for record in history:
        record.update(reason=HOSTILE, verdict=HOSTILE, dtype=HOSTILE, root=HOSTILE, probe_fingerprint=HOSTILE)
        record["companions"][HOSTILE] = [1.0, 2.0, 3.0, 4.0]
        record[HOSTILE] = HOSTILE
    history.append({"step": 90, "mir": None, "error": HOSTILE, "verdict": HOSTILE})
    samples = Probe.from_pairs([(image, HOSTILE) for image, _ in pairs(2)])
    plain = parse(page_of(view("run", records(3)), view("b", records(3)), probe=samples))
    views = [view(HOSTILE, history, settings={HOSTILE: HOSTILE}, notes=[HOSTILE]), view("b", records(3))]
    tree = parse(page_of(*views, probe=samples, notes=[HOSTILE]))
    assert {element.tag for element in tree.all()} <= {element.tag for element in plain.all()} | {
        "aside",
        "strong",
        "ul",
        "li",
        "details",
        "summary",
    }
    assert len(tree.all("script")) == 2
    assert all(name.isidentifier() or "-" in name for e in tree.all() for name in e.attributes)
    assert not [name for e in tree.all() for name in e.attributes if name.startswith("on")]
    assert tree.one("main").text.count(HOSTILE) > 10
    assert data_of(tree)["runs"][0]["name"] == HOSTILE
    assert "49" not in tree.one("header").text


def test_runs_that_were_not_measured_alike_are_said_not_to_compare():
    def warning(*runs):
        return parse(page_of(*runs)).all("aside", "warning")

    other = [{**record, "root": "paper_fast"} for record in records(3)]
    (said,) = warning(view("a", records(3)), view("b", other))
    assert "do not compare" in said.text
    assert "root: exact, paper_fast" in said.text
    assert "probe" not in said.text
    assert not warning(view("a", records(3)), view("b", records(4, seed=1)))
    assert not warning(view("a", records(3)))
    mixed = [*records(3), {**records(4)[3], "probe_fingerprint": "another"}]
    assert "probe: 2 different" in warning(view("a", mixed))[0].text
    rows = parse(page_of(view("a", records(3)), view("b", other))).all("tr", "differs")
    assert [row.one("th").text for row in rows] == ["root"]


def test_fields_of_other_versions_are_shown_when_they_do_not_change():
    history = [{**record, "solver": "new", "speed": record["step"] / 7} for record in records(3)]
    table = parse(page_of(view("run", history))).one("section", aria_labelledby="definition").words
    assert "solver new" in table
    assert "speed" not in table
    mixed = [{**record, "dtype": "float32" if record["step"] else "bfloat16"} for record in records(3)]
    table = parse(page_of(view("run", mixed))).one("section", aria_labelledby="definition").words
    assert "dtype of the hidden states bfloat16, then float32" in table


def test_several_runs_keep_their_numbers_when_one_has_no_value():
    failed = [{"step": 0, "mir": None, "error": "CUDA out of memory"}]
    tree = parse(page_of(view("empty", []), view("good", records(3)), view("failed", failed)))
    table = tree.all("table")[0]
    assert [row.one("th").text for row in table.one("tbody").all("tr")] == ["good", "empty", "failed"]
    assert [row.attributes["data-run"] for row in tree.one("table", "reading").one("tbody").all("tr")] == ["0"]
    assert len(timeline(tree).all("path", "best-outer")) == 1
    assert "failed: step 0: CUDA out of memory" in tree.one("aside", "notes").text


def test_samples_are_shown_with_what_they_add():
    samples = pairs(5)
    probe = Probe.from_pairs(samples)
    history = [{**record, "probe_fingerprint": probe.fingerprint} for record in records(3, samples=5)]
    cards = parse(page_of(view("run", history), probe=probe)).one("ol", "samples").all("li")
    assert len(cards) == 5
    shown = sorted(zip(samples, history[-1]["influences"], strict=True), key=lambda pair: -abs(pair[1]))
    for card, ((image, text), influence) in zip(cards, shown, strict=True):
        assert text in card.one("p", "text").text
        assert card.one("span", "effect").text == f"{influence / 5:+.4f}"
        shown = picture(card.one("img")).convert("RGB")
        assert shown.width / shown.height == pytest.approx(image.width / image.height, rel=0.02)
        small = [np.asarray(i.resize((4, 4), Image.Resampling.BOX)).astype(int) for i in (image.convert("RGB"), shown)]
        assert np.abs(small[0] - small[1]).mean() < 6
    foreign = parse(page_of(view("run", records(3, samples=5)), probe=probe)).one("ol", "samples")
    assert not foreign.all("span", "effect"), "influences of another probe's samples"
    assert not parse(page_of(view("run", history))).all("ol", "samples")


def test_axes_are_those_that_all_runs_have():
    def axes(*runs):
        return [choice.attributes["data-axis"] for choice in parse(page_of(*runs)).all("input", name="axis")]

    bare = [{name: record[name] for name in ("step", "mir", "per_layer")} for record in records(3)]
    resumed = [{**record, "elapsed": 1.0 if record["step"] == 20 else record["elapsed"]} for record in records(4)]
    assert axes(view("a", records(4))) == ["step", "log", "time", "samples", "tokens", "epoch"]
    assert axes(view("a", records(4)), view("b", bare)) == ["step", "log"]
    assert "time" in axes(view("a", resumed))  # by the time of training, which goes on
    lost = [{**record, "train_seconds": None} for record in resumed]
    assert "time" not in axes(view("a", lost))


def test_time_is_that_of_training_where_it_is_known_and_else_named_otherwise():
    known = page_of(view("a", records(4)))
    lost = page_of(view("a", [{**record, "train_seconds": None} for record in records(4)]))
    assert "training time, seconds" in known
    assert "time since the start, seconds" not in known
    assert "time since the start, seconds" in lost


def test_a_run_of_unknown_definition_does_not_compare_with_others():
    bare = [{**record, "probe_fingerprint": None} for record in records(4)]
    tree = parse(page_of(view("a", records(4)), view("b", bare)))
    assert "probe: not known of b" in tree.one("aside", "warning").words
    assert not parse(page_of(view("b", bare))).all("aside", "warning")


@pytest.mark.parametrize("first_step", [0, 500])
def test_lowest_mir_is_what_is_logged_as_mir_best(first_step):
    """A value before the first training step does not count; that of weights trained before does."""
    history = [{**record, "step": record["step"] + first_step} for record in records(5)]
    history[0]["mir"] = min(record["mir"] for record in history) - 1.0
    text = parse(page_of(view("run", history, settings={"planned steps": 590}))).one("dl", "cards").words
    logged = log_values(*(lambda found: (found[-1], found))(as_records(history)))
    assert f"lowest MIR {logged['mir_best']:.3f}" in text
    assert f"step {logged['mir_best_step']}" in text
    assert (f"{history[0]['mir']:.3f} before the first training step" in text) == (first_step == 0)
    assert f"step {40 + first_step} of 590" in text


def shrinking(before, after, fall, layers=3):
    """Two evaluations between which MIR falls, with the norm ratios of their layers."""
    return as_records(
        {"step": step, "mir": mir, "per_layer": [10**mir / layers] * layers, "companions": {"norm_ratio": ratios}}
        for step, mir, ratios in ((0, 2.0, [1.0] * layers), (10, 3.0, before), (20, 3.0 - fall, after))
    )


def test_norms_explain_a_fall_when_their_squares_make_half_of_it():
    found = explain_by_norms(shrinking([10.0, 10.0, 2.0], [1.0, 5.0, 2.0], 1.0))
    assert (found.start, found.end, found.layers) == (10, 20, "1 to 2")
    assert found.by_norms == pytest.approx(2 * (1 + math.log10(2)) / 3)
    assert found.before / found.after == pytest.approx(10 ** (found.by_norms / 2))
    assert explain_by_norms(shrinking([10.0] * 3, [3.0] * 3, 1.0)).by_norms == 1.0, "no more than the fall"
    assert explain_by_norms(shrinking([8.0, 2.0, 8.0], [4.0, 2.0, 4.0], 0.3)).layers == "1, 3"


@pytest.mark.parametrize(
    "measured",
    [
        shrinking([2.0] * 3, [1.5] * 3, 1.0),  # a quarter of the fall
        shrinking([2.0] * 3, [3.0] * 3, 1.0),  # norms grew
        shrinking([4.0] * 3, [1.5] * 3, 0.5),  # not much longer than text in the end: the square law does not hold
        shrinking([10.0] * 3, [1.0] * 3, 0.01),  # nothing to explain
        shrinking([10.0] * 3, [1.0] * 2, 1.0),  # not the same layers
        shrinking([10.0] * 3, [0.0] * 3, 1.0),
        shrinking([10.0] * 3, [1.0] * 3, -1.0),  # the peak is last
        as_records([{"step": 0, "mir": 2.0}, {"step": 1, "mir": 1.0}]),
    ],
)
def test_norms_explain_nothing_otherwise(measured):
    assert explain_by_norms(measured) is None


def test_page_says_when_a_fall_may_be_of_norms_only():
    falls = [record.to_dict() for record in shrinking([10.0] * 3, [4.0] * 3, 1.0)]
    (said,) = parse(page_of(view("run", falls))).all("p", "norms")
    assert all(number in said.text for number in ("1.00", "step 10 to 20", "from 10 to 4", "layers 1 to 3", "0.80"))
    stays = [record.to_dict() for record in shrinking([4.0] * 3, [4.0] * 3, 1.0)]
    assert not parse(page_of(view("run", stays))).all("p", "norms")


def test_fingerprints_and_inner_settings_are_in_details_only():
    history = [{**record, "storage_device": "cpu", "passes": 1, "pixels_fingerprint": "p1x"} for record in records(3)]
    mixed = [{**record, "probe_fingerprint": "0ther", "passes": 2} for record in history]
    tree = parse(page_of(view("a", history), view("b", mixed)))
    told = tree.one("main").text
    for details in tree.all("details"):
        told = told.replace(details.text, "")
    for word in ("d3d069cd243898ce", "4d49d6bb6949b59f", "p1x", "0ther", "storage", "passes"):
        assert word not in told
        assert word in tree.one("section", aria_labelledby="definition").text


def test_failed_evaluations_and_verdicts_are_marked():
    history = records(6)
    history[2] = {"step": 20, "mir": None, "error": "RuntimeError: broken", "verdict": "no data"}
    history[3]["verdict"] = "rising"
    tree = parse(page_of(view("run", history)))
    mark = timeline(tree).one("span", "cross-mark")
    assert mark.attributes["title"] == "step 20: RuntimeError: broken"
    kinds = [(bar.classes - {"bar"}).pop() for bar in timeline(tree).one("div", "ribbon").all("rect")]
    assert kinds == ["going-on", "failed", "rising", "going-on", "plateau"]
    assert len(timeline(tree).all("path", "stop")) == 1
    assert "5 and 1 failed" in tree.one("dl", "cards").text
    keys = timeline(tree).one("p", "ribbons").all("span", "chip")
    assert [(key.classes - {"chip"}).pop() for key in keys] == ["going-on", "failed", "rising", "plateau"]


def test_rules_that_only_observe_and_new_stages_are_marked():
    history = [{**record, "verdict": "going on", "stage": "projector"} for record in records(8)]
    for record in history[4:]:
        record.update(would_stop=True, reason="only observing, would stop: flat", stage="all")
    tree = parse(page_of(view("run", history)))
    panel = timeline(tree).one("div", "panel tall")
    assert [note.text for note in panel.all("span", "note top")] == [
        "would stop, step 40",
        "other parameters train, step 40",
    ]
    assert len(panel.all("path", "stop")) == len(panel.all("path", "stage")) == 1
    assert "would stop" in tree.one("dl", "cards").words
    kinds = [bar.classes - {"bar"} for bar in timeline(tree).one("div", "ribbon").all("rect")]
    assert kinds == [{"going-on"}, {"plateau"}]


def test_loss_on_the_probe_is_shown_when_it_was_measured():
    history = [{**record, "probe_loss": 2 - 0.1 * number} for number, record in enumerate(records(4))]
    tree = parse(page_of(view("run", history)))
    lines = timeline(tree).all("path", "loss")
    assert [len(points(line)) for line in lines] == [4, 4]
    assert [("on-probe" in line.classes) for line in lines] == [False, True]


def test_second_opinions_are_drawn_where_they_were_measured():
    history = [{**record, "scale_free_mir": 0.3 - 0.1 * number} for number, record in enumerate(records(4))]
    for record in history[1:]:
        record.update(vision_gain=0.2 * record["step"], vision_gain_se=0.01)
    shown = timeline(parse(page_of(view("run", history)))).words
    assert shown.index("scale-free MIR") < shown.index("vision gain")
    panels = timeline(parse(page_of(view("run", history)))).all("div", "panel medium")
    assert [len(points(line)) for panel in panels[:2] for line in panel.all("path", "line")] == [4, 3]
    assert "vision gain" not in page_of(view("run", records(4)))


def test_page_that_is_written_again_reloads_itself():
    run = view("run", records(3))
    assert parse(page_of(run, reload_seconds=30.0)).one("body").attributes["data-reload"] == "30.0"
    assert "data-reload" not in parse(page_of(run)).one("body").attributes
    assert page_of(run) == page_of(run)


def test_parts_of_the_page_are_installed_with_the_package(tmp_path):
    root = Path(__file__).parents[2]
    for name in ("setup.py", "README.md"):
        shutil.copy(root / name, tmp_path)
    shutil.copytree(root / "mir_callback", tmp_path / "mir_callback", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", "built"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    built = {path.name for path in (tmp_path / "built" / "mir_callback" / "analysis" / "page").iterdir()}
    assert built == {path.name for path in PARTS.iterdir()} - {"__pycache__"}


def test_error_when_there_are_no_runs():
    with pytest.raises(HistoryError, match="no run"):
        page_of()


NUMBERS = st.floats(-1e12, 1e12)
AMOUNTS = st.floats(0, 1e12)
COUNTS = st.integers(0, 10**12)
LAYERS = st.lists(AMOUNTS, min_size=1, max_size=5)
RECORDS = st.fixed_dictionaries(
    {"step": st.integers(0, 10**9), "mir": st.none() | NUMBERS},
    optional={
        "per_layer": st.none() | LAYERS,
        "per_layer_se": LAYERS,
        "mir_se": st.none() | AMOUNTS,
        "influences": st.lists(NUMBERS, min_size=1, max_size=4),
        "companions": st.dictionaries(
            st.sampled_from(COMPANIONS) | st.text(), st.lists(NUMBERS, min_size=1, max_size=5)
        ),
        "loss": st.none() | NUMBERS,
        "seconds": AMOUNTS,
        "elapsed": AMOUNTS,
        "epoch": AMOUNTS,
        "samples_seen": COUNTS,
        "tokens_seen": AMOUNTS,
        "train_seconds": AMOUNTS,
        "eval_seconds": AMOUNTS,
        "peak_memory_bytes": st.none() | COUNTS,
        "verdict": st.none() | st.sampled_from(["no data", "going on", "plateau", "rising", "too noisy"]) | st.text(),
        "reason": st.none() | st.text(),
        "error": st.text(),
        "would_stop": st.booleans(),
        "stage": st.none() | st.text(max_size=2),
        "probe_loss": st.none() | AMOUNTS,
        "scale_free_mir": st.none() | NUMBERS,
        "vision_gain": st.none() | NUMBERS,
        "vision_gain_se": st.none() | AMOUNTS,
        "probe_fingerprint": st.none() | st.text(max_size=3),
        "root": st.sampled_from(["exact", "paper_fast"]),
        "num_samples": st.none() | st.integers(0, 10**6),
    },
)
HISTORIES = st.lists(RECORDS, max_size=7, unique_by=lambda record: record["step"]).map(
    lambda found: sorted(found, key=lambda record: record["step"])
)
RUNS = st.builds(
    view, name=st.text(), history=HISTORIES, losses=st.lists(st.tuples(st.integers(0, 10**9), NUMBERS)).map(sorted)
)


@settings(max_examples=60, deadline=None, phases=set(settings().phases) - {Phase.shrink})
@given(st.lists(RUNS, min_size=1, max_size=3))
def test_page_is_whole_whatever_the_records_hold(runs):
    tree = parse(page_of(*runs))
    assert "nan" not in "".join(path.attributes["d"] for path in tree.all("path")).lower()
    assert len(data_of(tree)["runs"]) == sum(bool(run.moments) for run in runs)


def test_columns_of_a_heat_map_end_half_way_between_evaluations():
    np.testing.assert_allclose(find_edges([0.1, 0.3, 0.7]), [0.0, 0.2, 0.5, 0.9])
    np.testing.assert_allclose(find_edges([0.2, 0.4, 0.9]), [0.1, 0.3, 0.65, 1.0])
    np.testing.assert_allclose(find_edges([0.4]), [0.0, 1.0])


@given(
    st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=6),
    st.sampled_from(["linear", "log"]),
    st.integers(2, 8),
)
def test_scale_shows_all_values_in_order_with_ticks_inside(values, kind, count):
    values = sorted(values)
    scale = fit_scale(values, kind)
    visible = [value for value in values if value > 1e-299] if scale.kind == "log" else values
    positions = scale(visible)
    assert np.all((positions >= -1e-9) & (positions <= 1 + 1e-9))
    assert np.all(np.diff(positions) >= -1e-9)
    ticks = [position for position, _ in scale.ticks(count)]
    assert all(-1e-6 <= position <= 1 + 1e-6 for position in ticks)
    assert ticks == sorted(ticks)
    assert len(ticks) <= 3 * count + 3


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.05, "0.05"), (1200, "1200"), (25_000, "25k"), (-3_000_000, "\u22123M"), (2e9, "2B")],
)
def test_tick_labels_are_short(value, text):
    assert format_tick(value) == text


@pytest.mark.parametrize("numbers", [(900,), (900, 1, 450, 7)])
def test_a_page_and_a_comparison_need_values_of_layers_of_few_evaluations_only(tmp_path, numbers):
    paths = [tmp_path / f"{index}.jsonl" for index in range(len(numbers))]
    rng = np.random.default_rng(1)
    for path, number in zip(paths, numbers, strict=True):
        lines = records(number, layers=3)
        for values in lines:
            values["mir"] = float(rng.normal(2, 0.5))
            values["companions"]["norm_ratio"] = (2 + 10 ** (values["mir"] / 2) * rng.random(3)).tolist()
        path.write_text("".join(json.dumps(values) + "\n" for values in lines))
    written = []
    for layers_of in (None, views.list_drawn):
        runs, _ = read_runs(paths, layers_of)
        found = compare(runs)
        written.append((page_of(*(RunView.from_run(run, Recipe(run.name, (run,))) for run in runs)), to_json(found)))
    assert written[0] == written[1]
    assert sum(each.per_layer is not None for each in runs[0].records) < 0.6 * numbers[0]
    assert to_json(compare(read_runs(paths, lambda _: ())[0])) == written[0][1]
