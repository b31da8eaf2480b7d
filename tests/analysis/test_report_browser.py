# SPDX-License-Identifier: Apache-2.0
"""The page in a real browser: it draws, it answers, it complains of nothing and asks the network for nothing."""

import json

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
        assert browser.run("document.querySelectorAll('.chart:not([hidden]) path.line').length") > 5


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
    left, top, width, height = area(browser, ".timeline:not([hidden]) .tall .area")
    positions = browser.run("JSON.parse(document.getElementById('data').textContent).x.step[0]")
    for index in (0, 3, 11):
        browser.point_at(left + positions[index] * width, top + height / 2)
        step, mir, loss, verdict = reading(browser)
        assert int(step) == history[index]["step"]
        assert mir == f"{history[index]['mir']:.3f} ± {history[index]['mir_se']:.3f}"
        assert float(loss) == pytest.approx(history[index]["loss"], rel=1e-3)
        assert verdict == history[index]["verdict"]
    left, top, width, height = area(browser, ".timeline:not([hidden]) .map .area")
    browser.point_at(left + positions[5] * width, top + 0.3 * height)
    told = browser.run("document.querySelector('.layer-reading').textContent")
    assert told == f"layer 3, step 50: distance FD {history[5]['per_layer'][2]:.4g}"
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
        chart = "document.querySelectorAll('.timeline:not([hidden]) "
        return [
            browser.run("[...document.querySelectorAll('.timeline:not([hidden])')].map(c => c.dataset.axis).join()"),
            browser.run(f"[...{chart} .layers:not([hidden])')].map(part => part.dataset.quantity).join()"),
            browser.run(f"[...{chart} .tall .line')].map(line => getComputedStyle(line).display).join()"),
            browser.run("getComputedStyle(document.querySelector('.profile .line.moment-first')).display"),
        ]

    assert state() == ["step", "per_layer", "inline,inline", "none"]
    browser.run("document.querySelector('input[name=axis][value=samples]').click()")
    browser.run("document.querySelector('input[name=run][value=\"1\"]').click()")
    browser.run("document.querySelector('input[name=moment][value=first]').click()")
    select = "(s => { s.value = 'cosine'; s.dispatchEvent(new Event('change', {bubbles: true})); })"
    browser.run(select + "(document.querySelector('select[name=quantity]'))")
    chosen = ["samples", "cosine", "inline,none", "inline"]
    assert state() == chosen
    fragment = browser.run("location.hash")
    browser.open(pages / "two.html", fragment=fragment)
    assert state() == chosen
    assert browser.complaints == []


def test_samples_are_ordered_by_effect_when_asked(browser, pages):
    browser.open(pages / "one.html")
    browser.run("document.querySelector('input[name=order][value=effect]').click()")
    effects = browser.run("[...document.querySelectorAll('.samples li')].map(item => Math.abs(item.dataset.effect))")
    assert len(effects) == 12
    assert effects == sorted(effects, reverse=True)
    browser.run("document.querySelector('input[name=order][value=index]').click()")
    order = browser.run("[...document.querySelectorAll('.samples li')].map(item => Number(item.dataset.index))")
    assert order == list(range(12))


def test_page_is_complete_without_its_script(browser, pages, tmp_path):
    text = (pages / "two.html").read_text(encoding="utf-8")
    (tmp_path / "still.html").write_text(text.replace("script-src 'sha256", "script-src 'sha384"), encoding="utf-8")
    browser.open(tmp_path / "still.html")
    assert browser.run("document.querySelectorAll('.timeline:not([hidden]) path.line').length") == 4
    assert browser.run("document.querySelectorAll('.timeline:not([hidden]) img.heat').length") == 14
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
