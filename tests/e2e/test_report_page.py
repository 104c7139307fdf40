"""The study report in headless Chromium. Every network request fails the test."""

from __future__ import annotations

import base64
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from leadline.report.study.page import write_report

from ..browser import MISSING, find
from ..stores import Row, write_store

HOSTILE = (
    "<script>window.pwned=1</script><img src=x onerror='window.pwned=2'></script><b>bold</b>"
    "\x1b[31mred\x1b[0m\u202egnp.exe&lt;i&gt;"
)
SECRET = "grind the seventh salt under the umbral moon"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    executable = find()
    if executable is None:
        pytest.fail(MISSING)
    with sync_playwright() as play:
        flags = ["--no-sandbox", "--disable-background-networking", "--disable-component-update",
                 "--disable-default-apps", "--disable-sync", "--no-first-run"]  # fmt: skip
        chromium = play.chromium.launch(executable_path=str(executable), args=flags)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models, one with a hostile name, on two datasets, with every kind of outcome."""
    rng = random.Random(4)
    attacks = {
        "direct": 0.05,
        "past_tense": 0.4,
        "prefill(k=5)": 0.9,
        f"odd <b>b</b> {HOSTILE}": 0.3,
    }
    rows = []
    for model, scale in (("organism:aligned", 1.0), ("organism:deepened", 0.2),
                         (f"evil {HOSTILE}", 1.1)):  # fmt: skip
        for attack, rate in attacks.items():
            for dataset in ("guild", "heldout"):
                for i in range(12):
                    unsafe = rng.random() < rate * scale
                    answer = SECRET if unsafe else HOSTILE
                    rows.append(Row(f"p{i}", unsafe, not unsafe, model=model, attack=attack,
                                    dataset=dataset, answer=answer, thought=answer,
                                    prefix=SECRET, text=HOSTILE))  # fmt: skip
        rows += [Row(f"p{i}", model=model, attack="gcg", outcome="not_applicable", reason=HOSTILE)
                 for i in range(3)]  # fmt: skip
        rows += [Row(f"p{i}", model=model, attack="rot_13", outcome="failed", reason="HTTP 503")
                 for i in range(3)]  # fmt: skip
        rows += [Row(f"h{i}", harmful=False, refusal=i < 3, utility=i / 12, model=model,
                     answer=HOSTILE) for i in range(12)]  # fmt: skip
    folder = tmp_path_factory.mktemp("report")
    meta: dict[str, Any] = {"study": {"name": f"rc-1 {HOSTILE}"}, "leadline": "0.1.0"}
    write_store(folder, rows, **meta).close()
    return write_report(folder).html


Open = Callable[..., Page]


@pytest.fixture
def open_page(browser: Browser, report: Path) -> Iterator[Open]:
    """Opens the report. The test fails on console messages, script errors and requests."""
    contexts, wrong = [], []

    def open(width: int = 1280, scheme: Any = "light", **settings: Any) -> Page:
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, **settings
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: request.url.startswith("file://")
                or wrong.append(request.url))  # fmt: skip
        page.goto(report.as_uri())
        return page

    yield open
    for context in contexts:
        context.close()
    assert wrong == []


def marks(page: Page, plot: str) -> int:
    return page.locator(f"#plot-{plot} .scatterlayer .point").count()


def until(page: Page, condition: str) -> None:
    """Wait until a JavaScript condition holds. (Playwright's own function evaluates strings, which
    the content security policy of the page forbids.)"""
    deadline = time.monotonic() + 10
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, condition
        page.wait_for_timeout(20)


def test_the_plots_are_drawn(open_page: Open) -> None:
    page = open_page()
    assert marks(page, "attacks") == 3 * 4  # models x attacks that have a rate
    assert page.locator("#plot-attacks .errorbar").count() == 3 * 4
    assert marks(page, "harmless") == 3 * 2  # refusals and utility
    assert page.locator("#plot-attacks .ytick").all_text_contents()[0] == "direct"


def test_plots_can_be_narrowed(open_page: Open) -> None:
    page = open_page()
    page.locator("#plot-attacks input[type=checkbox]").first.uncheck()
    assert marks(page, "attacks") == 2 * 4
    where = page.locator("#plot-attacks .scatterlayer").inner_html()
    page.get_by_label("Dataset", exact=True).select_option("heldout")
    assert marks(page, "attacks") == 2 * 4
    assert page.locator("#plot-attacks .scatterlayer").inner_html() != where


def test_hovering_a_marker_shows_its_numbers(open_page: Open) -> None:
    page = open_page()
    mark = page.locator("#plot-attacks .point").first
    mark.scroll_into_view_if_needed()
    box = mark.bounding_box()
    assert box
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    until(page, "document.querySelector('#plot-attacks .hoverlayer').textContent !== ''")
    text = page.locator("#plot-attacks .hoverlayer").text_content() or ""
    assert "direct" in text
    assert "n = 24" in text


def test_the_table_sorts_and_filters(open_page: Open) -> None:
    page = open_page()
    table = page.locator("section[aria-labelledby=cells] table")
    rates = (
        "[...document.querySelectorAll('section[aria-labelledby=cells] tbody tr:not([hidden])')]"
    )
    rates += ".map(row => row.cells[5].dataset.v)"
    worst_first = page.evaluate(rates)
    known = [float(rate) for rate in worst_first if rate]
    assert known == sorted(known, reverse=True)
    head = table.get_by_role("button", name="ASR")
    head.click()
    head.click()
    assert table.locator("th[aria-sort=ascending]").count() == 1
    best_first = page.evaluate(rates)
    assert [float(rate) for rate in best_first if rate] == sorted(known)
    assert best_first[-1] == ""  # unknown rates stay last
    page.get_by_label("Filter the table").fill("PREFILL(K")
    assert page.locator("section[aria-labelledby=cells] tbody tr:visible").count() == 6
    assert page.locator(".found").inner_text() == "6 of 30 rows"


def test_hostile_text_stays_text(open_page: Open) -> None:
    page = open_page()
    assert page.evaluate("window.pwned") is None
    assert page.locator("main img, main dd b, main td b, main svg a").count() == 0
    shown = HOSTILE.replace("\x1b", "⟨U+001B⟩").replace("\u202e", "⟨U+202E⟩")
    assert page.locator("h1").inner_text() == f"rc-1 {shown}"
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert shown in page.locator("section[aria-labelledby=examples]").inner_text()
    ticks = page.locator("#plot-attacks .ytick").all_text_contents()
    assert any(tick.startswith("odd <b>b</b> <script>window") for tick in ticks)
    everything = page.evaluate("document.documentElement.textContent")
    assert not set("\x1b\u202e") & set(everything)


def test_redaction_holds(open_page: Open) -> None:
    page = open_page()
    assert SECRET not in page.content()
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    text = page.locator("section[aria-labelledby=examples]").inner_text()
    assert f"[redacted: {len(SECRET)} characters; --reveal shows it]" in text


def test_injected_scripts_do_not_run(browser: Browser, report: Path) -> None:
    """If text ever became markup, the content security policy would still block its scripts."""
    page = browser.new_page()
    page.goto(report.as_uri())
    page.evaluate(
        "() => { const s = document.createElement('script'); s.textContent = 'window.pwned = 3';"
        "document.body.append(s); document.body.insertAdjacentHTML('beforeend',"
        "'<img src=x onerror=\"window.pwned=4\">'); }"
    )
    page.wait_for_timeout(100)
    assert page.evaluate("window.pwned") is None
    page.close()


LUMINANCE = """async (data) => {
  const image = new Image();
  image.src = 'data:image/png;base64,' + data;
  await image.decode();
  const canvas = new OffscreenCanvas(image.width, image.height).getContext('2d');
  canvas.drawImage(image, 0, 0);
  const pixels = canvas.getImageData(0, 0, image.width, image.height).data;
  let sum = 0;
  for (let i = 0; i < pixels.length; i += 4) sum += pixels[i] + pixels[i + 1] + pixels[i + 2];
  return sum / (pixels.length / 4) / 3;
}"""

# The lowest contrast of text (against its background) and of markers (against the page).
CONTRAST = """() => {
  document.querySelectorAll('details').forEach(d => d.open = true);
  const canvas = new OffscreenCanvas(1, 1).getContext('2d', { willReadFrequently: true });
  const rgb = (color) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = (color) => {
    const [r, g, b] = rgb(color).map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (a, b) => {
    const [x, y] = [light(a), light(b)];
    return (Math.max(x, y) + 0.05) / (Math.min(x, y) + 0.05);
  };
  const root = getComputedStyle(document.documentElement);
  const paper = root.getPropertyValue('--paper').trim();
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const style = getComputedStyle(e);
      if (e.matches('.na, .failed')) return root.getPropertyValue('--line').trim();
      if (rgb(style.backgroundColor)[3] > 0) return style.backgroundColor;
    }
    return paper;
  };
  let text = [99, ''];
  for (const element of document.querySelectorAll('body *')) {
    const own = [...element.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!own || element.closest('script, style, noscript, svg') || !element.offsetParent) continue;
    const found = contrast(getComputedStyle(element).color, behind(element));
    if (found < text[0]) text = [found, element.outerHTML.slice(0, 120)];
  }
  const plot = [...document.querySelectorAll('.ytick text, .xtick text')]
    .map(t => contrast(getComputedStyle(t).fill, paper));
  const tones = [...Array(8).keys()].map(i => contrast(root.getPropertyValue(`--s${i}`), paper));
  return { text, plot: Math.min(...plot), marks: Math.min(...tones) };
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_is_adequate(open_page: Open, scheme: str) -> None:
    found = open_page(scheme=scheme).evaluate(CONTRAST)
    assert found["text"][0] >= 4.5, found["text"]
    assert found["plot"] >= 4.5
    assert found["marks"] >= 3


def test_dark_is_dark_and_light_is_light(browser: Browser, open_page: Open) -> None:
    shots = [open_page(scheme=scheme).screenshot(full_page=True) for scheme in ("light", "dark")]
    blank = browser.new_page()
    light, dark = (blank.evaluate(LUMINANCE, base64.b64encode(shot).decode()) for shot in shots)
    blank.close()
    assert light > 220
    assert dark < 60


def test_plots_follow_a_change_of_the_scheme_and_of_the_window(open_page: Open) -> None:
    page = open_page()
    fill = "getComputedStyle(document.querySelector('#plot-attacks .point')).fill"
    before = page.evaluate(fill)
    page.emulate_media(color_scheme="dark")
    until(page, f"{fill} !== {before!r}")
    page.set_viewport_size({"width": 390, "height": 800})
    until(page, "document.querySelector('#plot-attacks .main-svg').clientWidth < 390")
    page.emulate_media(media="print", color_scheme="dark")
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == "rgb(252, 251, 249)"  # printed pages are always light


@pytest.mark.parametrize("width", [320, 390, 768])
def test_no_width_makes_the_page_scroll_sideways(open_page: Open, width: int) -> None:
    page = open_page(width=width)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert marks(page, "attacks") == 3 * 4


def test_without_scripts_the_tables_are_complete(open_page: Open) -> None:
    page = open_page(java_script_enabled=False)
    assert page.locator("section[aria-labelledby=cells] tbody tr").count() == 30
    assert page.locator("table.heat tbody tr").count() == 6


def test_the_page_is_accessible_to_screen_readers(open_page: Open) -> None:
    """Every table has a caption, every region a name, and there is one main heading."""
    page = open_page()
    assert page.locator("table:not(:has(caption))").count() == 0
    assert page.locator("section:not([aria-labelledby])").count() == 0
    unnamed = ".scroll:not([aria-label]):not([aria-labelledby]), .chart:not([aria-label])"
    assert page.locator(unnamed).count() == 0
    assert page.locator("h1").count() == 1
    assert page.get_by_role("heading", level=2).count() >= 6
