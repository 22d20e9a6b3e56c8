"""Tests of the report page in a real browser, opened from a file."""

import pytest
from gate_reports import TEXTS, run_gates, save_random_adapter

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def opened(browser, tiny_backbone, tmp_path_factory):
    """The browser with the report of two adapters on two texts with generated responses."""
    folder = tmp_path_factory.mktemp("report")
    save_random_adapter(folder / "tuned", tiny_backbone)
    save_random_adapter(folder / "other", tiny_backbone, seed=1)
    other = ["--adapter", str(folder / "other")]
    assert run_gates(folder, *other, "--generate", "3", out="report.html") == 0
    browser.get(f"file://{folder / 'report.html'}")
    return browser


def count_colors(browser, selector):
    """The number of colors on a canvas."""
    return browser.execute_script(
        "const c = document.querySelector(arguments[0]);"
        "const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        "const seen = new Set();"
        "for (let i = 0; i < d.length; i += 4) if (d[i + 3] > 250) seen.add(d.slice(i, i + 3).join());"
        "return seen.size",
        selector,
    )


def test_page_opens_without_errors_and_runs_no_text_as_script(opened):
    assert [entry for entry in opened.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    assert opened.title == "Gate report"


def test_summary_separates_generated_responses(opened):
    table = opened.find_element("css selector", "section table")
    assert [cell.text for cell in table.find_elements("css selector", "tbody th")] == [
        "prompt",
        "response, generated",
    ]
    picture = opened.find_element("css selector", "svg[aria-label^='distribution of gates']")
    assert len(picture.find_elements("css selector", "polyline")) == 2
    assert "┈ response, generated" in picture.text
    chart = "svg[aria-label='mean gate of response, generated tokens by layer']"
    assert len(opened.find_elements("css selector", chart)) == 2


def test_strip_shows_text_in_colors(opened):
    strips = opened.find_elements("css selector", ".strip")
    assert len(strips) == 2
    tokens = strips[0].find_elements("css selector", ".token")
    assert "".join(token.get_property("textContent") for token in tokens).startswith(TEXTS[0])
    assert len([token for token in tokens if "response" in token.get_attribute("class")]) <= 3
    assert len({token.value_of_css_property("background-color") for token in tokens}) > 3


def test_hovering_over_token_shows_its_gates(opened):
    from selenium.webdriver import ActionChains

    token = opened.find_elements("css selector", ".strip .token")[4]
    ActionChains(opened).move_to_element(token).perform()
    drill = opened.find_element("id", "drill")
    assert "token 5 of " in drill.text
    grid = drill.find_element("css selector", ".grid")
    assert [cell.text for cell in grid.find_elements("css selector", "tbody th")] == [
        *("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
    ]
    values = [cell.get_attribute("title") for cell in grid.find_elements("css selector", "tbody td")]
    expected = opened.execute_script(
        "const adapter = report.adapters[0];"
        "return adapter.modules.map((m, k) => [m.layer, m.name, adapter.gates[0][k][4]])"
    )
    assert sorted(values) == sorted(f"layer {layer}, {name}: {gate:.4f}" for layer, name, gate in expected)


def test_arrow_keys_move_between_tokens(opened):
    from selenium.webdriver import Keys

    first = opened.find_element("css selector", '.token[data-adapter="0"][data-token="0"]')
    first.click()
    first.send_keys(Keys.ARROW_RIGHT)
    opened.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert opened.switch_to.active_element.get_attribute("data-token") == "2"
    assert "token 3 of " in opened.find_element("id", "drill").text
    opened.switch_to.active_element.send_keys(Keys.END)
    assert opened.switch_to.active_element.get_attribute("class").endswith("response")


def test_heatmaps_change_with_text_and_module(opened):
    from selenium.webdriver.support.select import Select

    assert count_colors(opened, ".heatmap") > 10
    width = opened.find_element("css selector", ".heatmap").get_property("width")
    Select(opened.find_element("id", "text")).select_by_index(1)
    assert opened.find_element("css selector", ".heatmap").get_property("width") != width
    before = opened.execute_script("return document.querySelector('.heatmap').toDataURL()")
    Select(opened.find_element("id", "module")).select_by_visible_text("down_proj")
    assert opened.execute_script("return document.querySelector('.heatmap').toDataURL()") != before


def test_profiles_and_extremes_exist_for_both_adapters(opened):
    assert len(opened.find_elements("css selector", "svg[aria-label='mean gate by position']")) == 2
    assert len(opened.find_elements("css selector", "td.context b")) > 20
