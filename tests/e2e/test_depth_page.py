"""The depth page in a browser, with the measured KL of the organisms."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

from leadline.datasets.guild import guild
from leadline.depth.kl.divergence import kl_by_token
from leadline.report.depth.page import write_depth_report

from ..depth_data import ALIGNED, BASE, DEEP, depth_data
from .test_report_page import CONTRAST, HOSTILE, browser, until

__all__ = ["browser"]

HOSTILE_NAME = f"evil {HOSTILE}"
Open = Callable[..., Page]


def with_kl() -> dict[str, Any]:
    """Depth data with the KL measured on the organisms."""
    prompts = list(guild(harmless=False))[::4]
    kl = [
        {"model": model, **point}
        for model in (ALIGNED, DEEP)
        for point in kl_by_token(model, BASE, prompts).to_dict()["points"]
    ]
    return {**depth_data(), "kl": kl}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The usual page, one with hostile texts, one with eight models, and one with one measure."""
    usual = with_kl()
    hostile = depth_data(aligned=HOSTILE_NAME)
    hostile["refusal_prefix"][1]["prefix"] = HOSTILE
    hostile["training"][0]["measure"] = HOSTILE
    many = depth_data()
    for name in ("kl", "prefill", "finetuning", "decoding", "gcg", "token_loss", "gradient_norm"):
        mine = [p for p in many[name] if p["model"] == ALIGNED]
        many[name] += [{**p, "model": f"vendor/model-{i}-instruct"} for i in range(5) for p in mine]
    prefill = [p for p in usual["prefill"] if p["model"] == ALIGNED]
    single = {"models": [ALIGNED], "prefill": prefill}
    pages = {}
    for name, data in {"usual": usual, "hostile": hostile, "many": many, "single": single}.items():
        folder = tmp_path_factory.mktemp(name)
        (folder / "depth.json").write_text(json.dumps(data))
        pages[name] = write_depth_report(folder).html
    return pages


@pytest.fixture
def open_page(browser: Browser, pages: dict[str, Path]) -> Iterator[Open]:
    """Opens a page. At the end of the test, checks that the page had no error and requested no
    other file."""
    contexts, problems = [], []

    def open(name: str = "usual", width: int = 1280, scheme: Any = "light", **more: Any) -> Page:
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, **more
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: request.url.startswith("file://")
                or problems.append(request.url))  # fmt: skip
        page.goto(pages[name].as_uri())
        return page

    yield open
    for context in contexts:
        context.close()
    assert problems == []


# JavaScript functions of a plot's id that return, by panel: the number of curves, the number of
# bands (traces with a fill), and the values of the curves.
LINES = """(id) => [...document.querySelectorAll(`#plot-${id} .chart > div > div`)].map(
  (panel) => panel.data.filter((trace) => trace.mode.startsWith('lines') && !trace.fill).length)"""
BANDS = """(id) => [...document.querySelectorAll(`#plot-${id} .chart > div > div`)].map(
  (panel) => panel.data.filter((trace) => trace.fill).length)"""
VALUES = """(id) => [...document.querySelectorAll(`#plot-${id} .chart > div > div`)].map(
  (panel) => panel.data.filter((trace) => !trace.fill).map((trace) => [...trace.y]))"""


def test_every_plot_draws_a_curve_and_a_band_for_each_model(open_page: Open) -> None:
    page = open_page()
    lines = {"prefill": [3], "kl": [2], "gcg": [2, 2], "decoding": [2, 2, 2, 2],
             "finetuning": [2, 2, 4, 2, 2, 2, 2, 2], "token_loss": [2, 2],
             "training": [1, 1, 1]}  # fmt: skip
    for plot, wanted in lines.items():
        assert page.evaluate(LINES, plot) == wanted, plot
        drawn = page.locator(f"#plot-{plot} .scatterlayer .js-line").count()
        assert drawn >= sum(wanted), plot
    assert page.evaluate(BANDS, "prefill") == [3]
    assert page.evaluate(BANDS, "gcg") == [2, 0]  # the loss has no interval
    assert page.locator("#plot-refusal_prefix .scatterlayer .point").count() == 5


def test_the_kl_of_the_organisms_is_drawn(open_page: Open) -> None:
    ((aligned, deep),) = open_page().evaluate(VALUES, "kl")
    assert aligned[0] > 10 * max(aligned[1:])
    assert sum(deep[1:30]) / 29 > 5


def test_d50_is_marked_at_half(open_page: Open) -> None:
    page = open_page()
    marks = page.evaluate(
        "[...document.querySelectorAll('#plot-prefill .chart > div > div')].flatMap(p => p.data)"
        ".filter(t => t.mode === 'markers').map(t => [2 ** t.x[0] - 1, t.y[0], t.text])"
    )
    ((x, y, text),) = marks  # the D50 of the other models are outside of the doses tried
    assert (round(x, 2), y) == (0.52, 0.5)
    assert text == f"<b>{ALIGNED}</b><br>D50: 0.52 [0.5, 0.61]"


def test_models_can_be_hidden(open_page: Open) -> None:
    page = open_page()
    page.locator("#plot-prefill input[type=checkbox]").nth(1).uncheck()
    assert page.evaluate(LINES, "prefill") == [2]
    assert page.evaluate(LINES, "kl") == [2]


def test_data_and_step_can_be_chosen_with_the_keyboard(open_page: Open) -> None:
    page = open_page()
    before = page.evaluate(VALUES, "token_loss")
    step = page.get_by_label("after step")
    step.focus()
    page.keyboard.press("ArrowRight")
    after = page.evaluate(VALUES, "token_loss")
    assert after[0][0][0] < before[0][0][0]
    assert page.locator("#plot-token_loss output").inner_text() == "5"
    assert step.get_attribute("aria-valuetext") == "5"
    page.get_by_label("fine-tuned on").select_option("benign examples")
    assert page.evaluate(LINES, "token_loss") == [2, 0]  # without gradient norms
    assert page.evaluate(VALUES, "token_loss")[0][0][0] < after[0][0][0]


def test_hovering_a_point_shows_its_numbers(open_page: Open) -> None:
    page = open_page()
    mark = page.locator("#plot-gcg .chart > div:first-child .point").first
    mark.scroll_into_view_if_needed()
    box = mark.bounding_box()
    assert box
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    until(page, "document.querySelector('#plot-gcg .hoverlayer').textContent !== ''")
    text = page.locator("#plot-gcg .hoverlayer").first.text_content() or ""
    assert "steps of the search: 0" in text
    assert "75% [55%, 88%], n = 24" in text


def test_the_table_of_numbers_can_be_opened_expanded_and_sorted(open_page: Open) -> None:
    page = open_page()
    section = page.locator("section[aria-labelledby=token_loss]")
    section.locator("summary", has_text="Numbers").click()
    first = section.locator(".numbers").first
    assert first.locator("tbody tr:visible").count() == 100
    first.get_by_role("button", name="Show all").click()
    assert first.locator("tbody tr:visible").count() == 2 * 2 * 3 * 36
    first.get_by_role("button", name="nats").click()
    values = first.evaluate("e => [...e.querySelectorAll('td.asr')].map(c => Number(c.dataset.v))")
    assert values == sorted(values, reverse=True)


def test_hostile_names_are_escaped(open_page: Open) -> None:
    page = open_page("hostile")
    assert page.evaluate("window.pwned") is None
    assert page.locator("main img, main td b b, main svg a, main li b").count() == 0
    shown = HOSTILE_NAME.replace("\x1b", "⟨U+001B⟩").replace("\u202e", "⟨U+202E⟩")
    assert shown[:40] in page.locator(".glance").inner_text()
    assert page.locator(".glance tbody th").first.get_attribute("title") == shown
    assert shown in page.locator("#plot-prefill .controls").inner_text()
    ticks = page.locator("#plot-refusal_prefix .ytick").all_text_contents()
    assert any(tick.startswith("<script>window.pwned=1</script>") for tick in ticks)
    everything = page.evaluate("document.documentElement.textContent")
    assert not set("\x1b\u202e") & set(everything)


def test_the_summary_links_to_the_sections(open_page: Open) -> None:
    page = open_page()
    page.locator(".glance a", has_text="Fine-tuning steps").click()
    assert page.url.endswith("#finetuning")
    assert page.locator("#finetuning").count() == 1
    broken = "[...document.querySelectorAll('main a')].filter(a => !document.querySelector(a.hash))"
    assert page.evaluate(f"{broken}.length") == 0


@pytest.mark.parametrize("name", ["usual", "many", "single", "hostile"])
@pytest.mark.parametrize("width", [320, 768, 1280])
def test_the_page_does_not_scroll_sideways(open_page: Open, name: str, width: int) -> None:
    page = open_page(name, width)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("#plot-prefill .main-svg").count() > 0


def test_eight_models_are_all_drawn(open_page: Open) -> None:
    page = open_page("many")
    assert page.evaluate(LINES, "prefill") == [8]
    tones = page.evaluate(
        "document.querySelector('#plot-prefill .chart > div > div').data"
        ".filter(t => t.mode === 'lines+markers').map(t => t.line.color + t.marker.symbol)"
    )
    assert len(set(tones)) == 8


def test_the_page_of_one_measure(open_page: Open) -> None:
    page = open_page("single")
    assert page.locator(".plot").count() == 1
    assert page.evaluate(LINES, "prefill") == [1]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_is_adequate(open_page: Open, scheme: str) -> None:
    found = open_page(scheme=scheme).evaluate(CONTRAST)
    assert found["text"][0] >= 4.5, found["text"]
    assert found["plot"] >= 4.5
    assert found["marks"] >= 3


def test_plots_follow_colour_scheme_window_width_and_print(open_page: Open) -> None:
    page = open_page()
    first = "document.querySelector('#plot-prefill .point')"
    before = page.evaluate(f"getComputedStyle({first}).fill")
    page.emulate_media(color_scheme="dark")
    until(page, f"getComputedStyle({first}).fill !== {before!r}")
    page.set_viewport_size({"width": 390, "height": 800})
    until(page, "document.querySelector('#plot-prefill .main-svg').clientWidth < 390")
    page.emulate_media(media="print", color_scheme="dark")
    until(page, f"getComputedStyle({first}).fill === {before!r}")


def test_without_scripts_the_tables_have_every_number(open_page: Open) -> None:
    page = open_page(java_script_enabled=False)
    assert page.locator(".glance tbody tr").count() == 3
    assert page.locator("section[aria-labelledby=prefill] table").first.locator(
        "tbody tr").count() == 24  # fmt: skip
    page.locator("section[aria-labelledby=prefill] summary").first.click()
    assert page.locator("section[aria-labelledby=prefill] tbody tr").first.is_visible()


def test_tables_sections_and_plots_have_accessible_names(open_page: Open) -> None:
    page = open_page()
    assert page.locator("table:not(:has(caption))").count() == 0
    assert page.locator("section:not([aria-labelledby])").count() == 0
    unnamed = ".scroll:not([aria-label]):not([aria-labelledby]), .chart:not([aria-label])"
    assert page.locator(unnamed).count() == 0
    assert page.locator("h1").count() == 1
