# SPDX-License-Identifier: Apache-2.0
"""The page in a real browser: it draws, it answers, it complains of nothing and asks the network for nothing."""

import json
import math
import re

import pytest

from mir_callback import Probe
from tests.analysis.pages import page_of, records, view
from tests.browser import Browser
from tests.samples import pairs

pytestmark = pytest.mark.browser
HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chromium") / "profile"
    folder.mkdir()
    with Browser(folder) as browser:
        yield browser


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """One run with its samples, and two runs of which one has hostile texts and a failed evaluation."""
    folder = tmp_path_factory.mktemp("pages")
    probe = Probe.from_pairs(pairs(12))
    history = [{**record, "probe_fingerprint": probe.fingerprint} for record in records(12)]
    hostile = [{**record, "reason": HOSTILE} for record in records(9, seed=1)]
    hostile[4] = {"step": 40, "mir": None, "error": HOSTILE}
    (folder / "one.html").write_text(page_of(view("first", history), probe=probe), encoding="utf-8")
    two = page_of(view("first", history), view(HOSTILE, hostile, notes=[HOSTILE]))
    (folder / "two.html").write_text(two, encoding="utf-8")
    (folder / "bare.html").write_text(page_of(view("empty", [])), encoding="utf-8")
    return folder


COLOURS = (
    "map => new Set(new Uint32Array(map.getContext('2d').getImageData(0, 0, map.width, map.height).data.buffer)).size"
)
TIME = "training time, minutes"
GROUNDS, INKS = ("paper", "sheet", "warning"), ("ink", "faint", "focus", "loss", "plateau")


def outside(browser):
    return [address for address in browser.requests[1:] if not address.startswith("data:")]


@pytest.mark.parametrize("name", ["one", "two", "bare"])
@pytest.mark.parametrize(("width", "dark"), [(1200, False), (390, True), (320, False)])
def test_page_renders_silently_and_fits_its_window(browser, pages, name, width, dark):
    browser.open(pages / f"{name}.html", width=width, dark=dark)
    assert browser.complaints == []
    assert browser.requests[0].startswith("file:")
    assert outside(browser) == []
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("window.hacked") is None
    broken = "[...document.images].filter(image => !image.complete || !image.naturalWidth).length"
    assert browser.run(broken) == 0
    if name != "bare":
        flat = "[...document.querySelectorAll('.area')].filter(a => a.offsetParent && a.clientHeight < 5).length"
        assert browser.run(flat) == 0
        assert browser.run("document.querySelectorAll('.chart path.line').length") > 5
        assert browser.run(f"[...document.querySelectorAll('canvas')].map(({COLOURS})).every(count => count > 10)")


def test_no_script_of_others_can_run_and_nothing_can_be_sent(browser, pages):
    browser.open(pages / "one.html")
    browser.run("document.body.append(Object.assign(document.createElement('script'), {text: 'window.hacked = 3'}))")
    assert browser.run("window.hacked") is None
    assert browser.run("fetch('data:,x').then(() => 'sent', () => 'refused')") == "refused"
    assert any("Content Security Policy" in complaint for complaint in browser.complaints)


@pytest.mark.parametrize("dark", [False, True])
def test_words_can_be_read_in_light_and_dark(browser, pages, dark):
    browser.open(pages / "two.html", dark=dark)
    colours = {name: browser.run(colour_of(name)) for name in (*GROUNDS, *INKS)}
    assert (sum(colours["sheet"]) < 200) == dark
    for ground in ("paper", "sheet"):
        for ink in INKS:
            assert contrast(colours[ground], colours[ink]) >= 4.5, (ground, ink)
    assert contrast(colours["warning"], colours["ink"]) >= 4.5


def colour_of(name):
    return f"""(() => {{ const element = document.body.appendChild(document.createElement("i"));
        element.style.color = "var(--{name})";
        return getComputedStyle(element).color.match(/[0-9]+/g).map(Number); }})()"""


def contrast(one, other):
    """The ratio of WCAG 2."""

    def luminance(colour):
        parts = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def reading(browser, run=0):
    cells = f"[...document.querySelectorAll('.reading tr[data-run=\"{run}\"] td')].map(cell => cell.textContent)"
    return browser.run(cells)


def area(browser, selector):
    """Left, top, width and height of a chart's area in the window, once it is in sight."""
    return browser.run(
        f"""(() => {{ const area = document.querySelector({json.dumps(selector)});
        area.scrollIntoView({{block: "center"}});
        const box = area.getBoundingClientRect(); return [box.left, box.top, box.width, box.height]; }})()"""
    )


def test_pointer_reads_the_evaluation_below_it(browser, pages):
    history = records(12)
    browser.open(pages / "one.html")
    assert reading(browser)[0] == "110"
    left, top, width, height = area(browser, ".timeline .tall .area")
    positions = browser.run("JSON.parse(document.getElementById('data').textContent).axes[0].x[0]")
    for index in (0, 3, 11):
        browser.point_at(left + positions[index] * width, top + height / 2)
        step, mir, loss, verdict = reading(browser)
        assert int(step) == history[index]["step"]
        assert mir == f"{history[index]['mir']:.3f} ± {history[index]['mir_se']:.3f}"
        assert float(loss) == pytest.approx(history[index]["loss"], rel=1e-3)
        assert verdict == history[index]["verdict"]
    left, top, width, height = area(browser, ".timeline .map .area")
    browser.point_at(left + positions[5] * width, top + 0.3 * height)
    told, _, value = browser.run("document.querySelector('.layer-reading').textContent").rpartition(" ")
    assert told == "layer 3, step 50: distance FD"
    assert float(value) == pytest.approx(history[5]["per_layer"][2], rel=0.01)
    browser.point_at(2, 2)
    assert reading(browser)[0] == "110"
    assert browser.complaints == []


def test_arrow_keys_go_through_the_evaluations(browser, pages):
    browser.open(pages / "two.html")
    browser.run("document.querySelector('.timeline').focus()")
    browser.press("Home")
    assert [reading(browser, run)[0] for run in (0, 1)] == ["0", "0"]
    for _ in range(4):
        browser.press("ArrowRight")
    assert reading(browser)[0] == "40"
    assert reading(browser, 1)[0] in ("30", "50"), "the run that failed there tells its nearest value"
    browser.run("document.querySelector('.profile').focus()")
    browser.press("ArrowRight")
    assert browser.run("document.querySelector('.profile output').textContent").startswith("layer 1: first last ")
    assert browser.complaints == []


def test_choices_show_and_hide_and_outlive_a_reload(browser, pages):
    browser.open(pages / "two.html")

    def state():
        return [
            browser.run("document.querySelector('.timeline .xlabel').textContent"),
            browser.run("document.querySelector('.colours .what').textContent"),
            browser.run("[...document.querySelectorAll('.tall .line')].map(line => line.getClientRects().length)"),
            browser.run("document.querySelector('.profile g.moment-first').getClientRects().length"),
        ]

    assert state() == ["optimizer step", "distance FD", [1, 1], 0]
    browser.run("document.querySelector('[data-axis=samples]').click()")
    browser.run("document.querySelector('input[name=run][value=\"1\"]').click()")
    browser.run("document.querySelector('input[name=moment][value=first]').click()")
    select = "(s => { s.value = 'cosine'; s.dispatchEvent(new Event('change', {bubbles: true})); })"
    browser.run(select + "(document.querySelector('select[name=quantity]'))")
    chosen = ["training samples seen", "cosine of the means", [1, 0], 1]
    assert state() == chosen
    fragment = browser.run("location.hash")
    browser.open(pages / "two.html", fragment=fragment)
    assert state() == chosen
    assert browser.complaints == []


def test_everything_moves_to_where_it_lies_on_the_chosen_axis(browser, tmp_path):
    """Time runs unevenly over the steps: curve, band, verdicts, loss and the columns of the heat map follow it."""
    history = records(5, layers=1)
    for record, seconds, distance in zip(history, (0, 10, 20, 30, 400), (1.0, 2.0, 4.0, 8.0, 16.0), strict=True):
        record.update(train_seconds=seconds, mir=math.log10(distance), per_layer=[distance])
    history[3] |= {"verdict": "rising"}
    (tmp_path / "page.html").write_text(page_of(view("run", history)), encoding="utf-8")
    browser.open(tmp_path / "page.html")

    def across(selector):
        path = browser.run(f"document.querySelector('{selector}').getAttribute('d')")
        return [float(x) for x in re.findall(r"[ML]([\d.]+) ", path)]

    def colours(*shares):
        pixel = "document.querySelector('canvas').getContext('2d').getImageData({}, 0, 1, 1).data.join()"
        return len({browser.run(pixel.format(round(1200 * share))) for share in shares})

    axes = browser.run("JSON.parse(document.getElementById('data').textContent).axes")
    steps, times = ([1000 * x for x in axis["x"][0]] for axis in axes if axis["label"] in (TIME, "optimizer step"))
    assert times[3] < 200 < 900 < times[4]
    for name, expected, columns in (("time", times, 2), ("step", steps, 3), ("time", times, 2)):
        browser.run(f"document.querySelector('[data-axis={name}]').click()")
        assert across(".tall .line") == pytest.approx(expected, abs=0.2)
        assert across(".timeline .loss") == pytest.approx(expected, abs=0.2)
        assert across(".tall .band")[:5] == pytest.approx(expected, abs=0.2)
        bar = [
            browser.run(f"Number(document.querySelector('rect.rising').getAttribute('{at}'))") for at in ("x", "width")
        ]
        assert bar == pytest.approx([(expected[2] + expected[3]) / 2, (expected[4] - expected[2]) / 2], abs=1)
        assert colours(0.1, 0.5, 0.9) == columns
    assert [told for told in browser.complaints if "getImageData" not in told] == []  # that is the test's own


def test_curves_are_complete_without_the_script(browser, pages, tmp_path):
    text = (pages / "two.html").read_text(encoding="utf-8")
    (tmp_path / "still.html").write_text(text.replace("script-src 'sha256", "script-src 'sha384"), encoding="utf-8")
    browser.open(tmp_path / "still.html")
    assert browser.run("document.querySelectorAll('.timeline path.line').length") == 4
    assert reading(browser)[0] == "110"
    visible = "[...document.querySelectorAll('.controls, .hint')].some(part => part.offsetHeight > 0)"
    assert not browser.run(visible), "no switches that do nothing"


def test_paper_is_light_when_the_screen_is_dark(browser, pages, tmp_path):
    browser.open(pages / "one.html", dark=True)
    browser.print_media()
    assert sum(browser.run(colour_of("ink"))) < 200
    assert browser.run("getComputedStyle(document.documentElement).colorScheme") == "light"
    assert browser.run("document.querySelector('.controls').offsetHeight") == 0
    browser.pdf(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
