"""The page of training runs, with runs whose files are written while it is open."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Locator, Page, expect

from ldm.training.metrics import MetricsFile
from tests.page.conftest import Opener
from tests.page.test_accessibility import serious_faults
from tests.report.runs import write_run
from tests.serving.servers import serving

pytestmark = pytest.mark.page

KEY = "0123456789abcdef"
VIEWS = ("Curves", "Images", "Report", "Config")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs that differ in a learning rate, and a folder of none."""
    folder = tmp_path_factory.mktemp("runs")
    for name, rate in (("second", 0.5), ("first", 0.002)):
        made = write_run(tmp_path_factory.mktemp(name), f"vae.train.learning_rate={rate}")
        shutil.move(made, folder / name)
        os.utime(folder / name)
    (folder / "broken").mkdir()
    (folder / "broken" / "config.yaml").write_text("[")
    os.utime(folder / "broken", (0, 0))
    os.utime(folder / "broken" / "config.yaml", (0, 0))
    return folder


@pytest.fixture(scope="module")
def url(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(tmp_path_factory.mktemp("served"), sources={}, runs=runs) as server:
        yield server.url


def chart(page: Page, title: str, stage: str = "VAE") -> Locator:
    """The chart of this title."""
    section = page.get_by_role("region", name=stage, exact=True)
    return section.locator("figure").filter(has=page.get_by_role("heading", name=title, exact=True))


def choose(page: Page, *names: str) -> None:
    """Choose these runs."""
    page.get_by_role("button", name=names[0], exact=True).click()
    for name in names[1:]:
        page.get_by_label(f"Compare {name}").check()


def test_the_runs_are_listed_and_the_curves_of_all_stages_shown(open_page: Opener, url: str) -> None:
    page = open_page(url)
    expect(page).to_have_url(re.compile("/page/runs.html"))
    expect(page.locator(".run")).to_have_count(3)
    expect(page.locator(".run", has_text="broken")).to_contain_text("holds nothing of a training")
    choose(page, "first")
    for stage in ("VAE", "CLIP", "Denoiser"):
        expect(chart(page, "Loss", stage).locator(".line")).not_to_have_count(0)
    expect(chart(page, "Loss").locator(".legend")).to_have_text("training0.025validation0.25")
    expect(chart(page, "Throughput").get_by_role("img")).to_have_accessible_name("Throughput: samples/s ends at 10")


def test_runs_are_compared_in_one_chart(open_page: Opener, url: str) -> None:
    page = open_page(url)
    choose(page, "first", "second")
    loss = chart(page, "Loss")
    expect(loss.locator(".legend li")).to_have_text(
        [re.compile(f"^{run}, {split}") for run in ("first", "second") for split in ("training", "validation")]
    )
    page.reload()
    expect(page.get_by_role("heading", name="first · second")).to_be_visible()
    page.get_by_role("tab", name="Config").click()
    rows = page.locator("#panel tbody tr")
    expect(rows.filter(has_text="vae.train.learning_rate")).to_have_text("vae.train.learning_rate0.0020.5")
    expect(rows.filter(has_text="clip.train.learning_rate")).to_have_count(0)
    page.get_by_label("Only fields that differ").uncheck()
    expect(rows.filter(has_text="clip.train.learning_rate")).to_have_count(1)


def test_smoothing_axis_and_filter_change_the_charts(open_page: Opener, url: str) -> None:
    page = open_page(url)
    choose(page, "first")
    line = chart(page, "Loss").locator(".line.c0 path").last
    rough = line.get_attribute("d")
    page.get_by_label("Smoothing").fill("0.95")
    expect(line).not_to_have_attribute("d", rough or "")
    page.get_by_label("Smoothing").fill("0")
    expect(chart(page, "Loss").locator(".raw")).to_have_count(0)
    page.get_by_label("Values").select_option("linear")
    expect(chart(page, "Loss").locator(".grid")).not_to_contain_text("(log)")
    page.get_by_label("Values").select_option("log")
    expect(chart(page, "Throughput").locator(".grid")).to_contain_text("(log)")
    page.get_by_label("Charts").fill("psnr")
    expect(page.locator(".chart:visible h4")).to_have_text(["Reconstruction: PSNR"] * 3)


def test_steps_are_zoomed_and_values_read_with_mouse_and_keyboard(open_page: Opener, url: str) -> None:
    page = open_page(url)
    choose(page, "first")
    plot = chart(page, "Loss").get_by_role("img")
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 100)
    expect(chart(page, "Loss").get_by_role("status")).to_contain_text("training")
    page.mouse.down()
    page.mouse.move(box["x"] + 0.8 * box["width"], box["y"] + 100, steps=4)
    page.mouse.up()
    show_all = page.get_by_role("region", name="VAE", exact=True).get_by_role("button", name="Show all steps")
    expect(show_all).to_be_visible()
    for title in ("Loss", "Throughput"):  # all charts of the stage have the same steps
        expect(chart(page, title).locator(".grid")).not_to_contain_text("40step")
    show_all.click()
    expect(chart(page, "Loss").locator(".grid")).to_contain_text("40step")

    plot.focus()
    page.keyboard.press("Home")
    expect(chart(page, "Loss").get_by_role("status")).to_have_text("step 1training 1")
    page.keyboard.press("ArrowRight")
    expect(chart(page, "Loss").get_by_role("status")).to_contain_text("step 2")
    page.keyboard.press("+")
    expect(show_all).to_be_visible()
    page.keyboard.press("Escape")
    expect(show_all).to_be_hidden()
    chart(page, "Loss").get_by_text("Table").click()
    expect(chart(page, "Loss").locator("tbody tr").last).to_have_text(re.compile("^40.*0.25$"))


def test_a_training_is_followed_while_it_runs(open_page: Opener, url: str, runs: Path) -> None:
    lock = runs / "second" / "vae" / ".lock.json"
    lock.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "command": ""}))
    file = MetricsFile(runs / "second" / "vae" / "metrics.csv", 40)
    file.write(41, {"train/loss": 0.5})
    page = open_page(url)
    choose(page, "second")
    image = Image.new("RGB", (64, 64), (41, 0, 0))
    image.save(runs / "second" / "vae" / "images" / "reconstructions_0000041.png")
    expect(page.locator("#status")).to_have_text("1 run is training")
    file.write(42, {"train/loss": 100.0})
    expect(page.locator(".run", has_text="second")).to_contain_text("42")
    page.get_by_label("Smoothing").fill("0")
    expect(chart(page, "Loss").locator(".legend")).to_contain_text("training100")
    page.get_by_role("tab", name="Images").click()
    expect(page.locator(".strip", has_text="Reconstructions").locator("output")).to_have_text("step 41")
    image.save(runs / "second" / "vae" / "images" / "reconstructions_0000042.png")
    file.write(43, {"train/loss": 1.0})
    expect(page.locator(".strip", has_text="Reconstructions").locator("output")).to_have_text("step 42")
    lock.unlink()


def test_a_slider_goes_through_the_images(open_page: Opener, url: str) -> None:
    page = open_page(url)
    choose(page, "first")
    page.get_by_role("tab", name="Images").click()
    strip = page.locator(".strip", has_text="Generated images")

    def colour() -> int:
        return int(
            strip.locator("img").evaluate(
                """async (image) => {
                    await image.decode();
                    const context = document.createElement("canvas").getContext("2d");
                    context.drawImage(image, 0, 0);
                    return context.getImageData(0, 0, 1, 1).data[0];
                }"""
            )
        )

    slider = strip.get_by_role("slider")
    for place, step in (("29", 30), ("4", 5)):
        slider.fill(place)
        expect(strip.locator("img")).to_have_attribute("alt", re.compile(f"step {step}$"))
        assert colour() == step
    slider.press("ArrowRight")
    expect(strip.locator("output")).to_have_text("step 6")


def test_the_report_is_shown_and_downloaded(open_page: Opener, url: str) -> None:
    page = open_page(url)
    choose(page, "first")
    page.get_by_role("tab", name="Report").click()
    expect(page.locator(".report")).to_contain_text("Retrieval on the validation set")
    expect(page.locator(".report")).to_contain_text("was killed")
    expect(page.locator(".report polyline").first).to_have_css("fill", "none")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download as HTML").click()
    assert download.value.suggested_filename == "first.html"
    assert "Reconstruction: PSNR" in Path(download.value.path()).read_text()


@pytest.mark.parametrize(("scheme", "views"), [("light", VIEWS), ("dark", ("Curves", "Report"))])
def test_axe_finds_no_serious_fault_in_the_views(
    open_page: Opener, url: str, scheme: str, views: tuple[str, ...]
) -> None:
    page = open_page(url, color_scheme=scheme)
    choose(page, "first", "second")
    for view in views:
        page.get_by_role("tab", name=view).click()
        expect(page.locator("#panel .panel").last).to_be_visible()
        if view == "Curves":  # charts are alike
            page.get_by_label("Charts").fill("loss")
            chart(page, "Loss").get_by_text("Table").click()
        assert serious_faults(page) == [], view


def test_tabs_and_runs_are_reached_with_the_keyboard(open_page: Opener, url: str) -> None:
    page = open_page(url)
    choose(page, "first")
    page.get_by_role("tab", name="Curves").focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="Images")).to_be_focused()
    expect(page.locator(".strip")).not_to_have_count(0)
    page.get_by_label("Compare second").focus()
    page.keyboard.press("Space")
    expect(page.get_by_label("Compare second")).to_be_focused()
    expect(page.get_by_role("heading", name="first · second")).to_be_visible()


def test_the_runs_fit_on_a_phone(open_page: Opener, url: str) -> None:
    page = open_page(url, viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    page.get_by_text("Runs", exact=True).last.tap()
    choose(page, "first", "second")
    for view in VIEWS:
        page.get_by_role("tab", name=view).tap()
        expect(page.locator("#panel .panel").last).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), view
    page.get_by_role("tab", name="Curves").tap()
    chart(page, "Loss").get_by_role("img").tap()
    expect(chart(page, "Loss").get_by_role("status")).to_contain_text("first, training")


def test_a_server_with_keys_asks_for_one(open_page: Opener, runs: Path, tmp_path: Path) -> None:
    with serving(tmp_path, (KEY,), sources={}, runs=runs) as server:
        page = open_page(server.url)
        page.get_by_role("textbox", name="Key").fill(KEY)
        page.get_by_role("button", name="Continue").click()
        choose(page, "first")
        page.get_by_role("tab", name="Images").click()
        expect(page.locator(".strip img").first).to_have_attribute("src", re.compile("^blob:"))
