from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from ldm import Pipeline
from ldm.diffusion import SPECS
from tests.page.actions import content, drop, edit_newest, finished, generate, newest
from tests.page.conftest import Opener
from tests.serving.servers import Running, serving

pytestmark = pytest.mark.page


def test_a_prompt_gives_a_preview_and_then_the_image_of_the_pipeline(
    page: Page, server: Running, pipe: Pipeline
) -> None:
    page.get_by_label("Prompt", exact=True).fill("red apple")
    page.get_by_label("Negative prompt").fill("car")
    page.get_by_label("Steps", exact=True).fill("40")
    page.get_by_label("Random").uncheck()
    page.get_by_label("Seed").fill("7")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#results img[data-kind=preview][src^=data]")).to_be_visible()
    image = content(server, finished(page))
    expected = pipe("red apple", "car", seed=7, num_inference_steps=40, progress=False)[0]
    assert image.tobytes() == expected.tobytes()


def test_another_seed_gives_another_image(page: Page, server: Running) -> None:
    first = content(server, generate(page, "red apple", seed=1)).tobytes()
    assert content(server, generate(page, seed=2)).tobytes() != first
    assert content(server, generate(page, seed=1)).tobytes() == first
    page.get_by_label("Random").check()
    generate(page)
    assert newest(server)["request"]["seed"] not in (1, 2)
    assert page.get_by_label("Seed").input_value() == str(newest(server)["request"]["seed"])


def test_several_images_have_the_seeds_that_follow(page: Page) -> None:
    page.get_by_label("Images", exact=True).fill("3")
    generate(page, "unicorn", seed=11)
    expect(page.locator("#results figcaption")).to_have_text(["seed 11", "seed 12", "seed 13"])


def test_a_job_is_cancelled(page: Page, server: Running) -> None:
    page.get_by_label("Sampler").select_option("heun")
    page.get_by_label("Prompt", exact=True).fill("red apple")
    page.get_by_label("Steps", exact=True).fill("150")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#results figcaption")).to_contain_text("step")
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("#status")).to_have_text("Cancelled.")
    while server.http.get("/health").json()["running"]:
        time.sleep(0.05)
    expect(page.locator("#results img[data-kind=result]")).to_have_count(0)


def test_after_a_reload_the_gallery_is_there_and_the_running_job_is_shown(page: Page, server: Running) -> None:
    generate(page, "sunrise")
    page.get_by_label("Steps", exact=True).fill("100")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#results figcaption")).to_contain_text("step")
    page.reload()
    expect(page.locator("#gallery .tile").first).to_be_visible()
    expect(page.locator("#results figcaption")).to_contain_text("step")
    assert finished(page).get_attribute("src") == f"/files/{newest(server)['name']}"


def test_an_image_of_the_gallery_is_made_again(page: Page, server: Running) -> None:
    first = content(server, generate(page, "unicorn"))
    generate(page, "sunrise")
    page.locator("#gallery .tile").nth(1).click()
    page.get_by_role("button", name="Make again").click()
    again = content(server, finished(page))
    assert again.tobytes() == first.tobytes()
    assert again.info == first.info


def test_settings_are_read_from_an_image_that_is_dropped(page: Page, server: Running, apple: Path) -> None:
    drop(page, apple)
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("red apple")
    expect(dialog).to_contain_text("heun")
    dialog.get_by_role("button", name="Use these settings").click()
    expect(page.get_by_label("Sampler")).to_have_value("heun")
    expect(page.get_by_label("Guidance", exact=True)).to_have_value("4")
    page.get_by_role("button", name="Generate").click()
    with Image.open(apple) as image:
        assert content(server, finished(page)).tobytes() == image.tobytes()


def test_an_image_without_settings_is_named(page: Page, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    page.locator("#read-file").set_input_files(tmp_path / "plain.png")
    expect(page.locator("#status")).to_contain_text("the image has no settings")


def test_a_mask_is_painted_and_the_rest_of_the_image_stays(page: Page, server: Running) -> None:
    before = np.asarray(content(server, generate(page, "red apple", seed=1)))
    edit_newest(page, "Repaint")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#status")).to_contain_text("Paint the part")
    layer = page.locator(".layer")
    layer.scroll_into_view_if_needed()
    box = layer.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 0.75 * box["width"], box["y"] + 0.2 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.75 * box["width"], box["y"] + 0.8 * box["height"], steps=5)
    page.mouse.up()
    after = np.asarray(content(server, generate(page, "sunrise")))
    assert (after[:, :32] == before[:, :32]).all()
    assert (after[16:48, 46:50] != before[16:48, 46:50]).any()
    page.locator("#gallery .tile").first.click()
    page.get_by_role("button", name="Make again").click()
    assert (np.asarray(content(server, finished(page))) == after).all()


def test_an_image_is_changed_extended_and_enlarged(page: Page, server: Running, apple: Path) -> None:
    page.locator("#source > summary").click()
    drop(page, apple, "#source .drop")
    expect(page.locator("#source")).to_contain_text("64 × 64 pixels")
    assert content(server, generate(page, "green apple")).size == (64, 64)
    page.locator("#source").get_by_text("Extend", exact=True).click()
    page.get_by_label("Left").fill("16")
    assert content(server, generate(page)).size == (80, 64)
    page.locator("#source").get_by_text("Enlarge", exact=True).click()
    assert content(server, generate(page)).size == (128, 128)
    assert newest(server)["request"]["enlarge"] == 2
    page.get_by_role("button", name="Remove the image").click()
    assert content(server, generate(page)).size == (64, 64)


def test_two_settings_are_compared_with_one_seed(page: Page, server: Running) -> None:
    page.get_by_label("Prompt", exact=True).fill("red apple")
    page.get_by_label("Steps", exact=True).fill("4")
    page.get_by_label("Guidance", exact=True).fill("5")
    page.get_by_role("button", name="Compare", exact=True).click()
    page.get_by_label("Guidance", exact=True).fill("9")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#status")).to_have_text("Done.")
    columns = page.locator("#comparison .side-by-side > section")
    expect(columns.locator("dl")).to_have_text(["Guidance5", "Guidance9"])
    expect(columns.locator("img[data-kind=result]")).to_have_count(2)
    captions = columns.locator("figcaption").all_inner_texts()
    assert captions[0] == captions[1]


def test_controls_are_those_of_the_server(page: Page) -> None:
    expect(page.get_by_label("Sampler")).to_be_visible()  # the page has been built
    offered = page.get_by_label("Sampler").locator("option").evaluate_all("all => all.map((each) => each.value)")
    assert set(offered) == {"", *SPECS}
    page.get_by_text("More settings").click()
    expect(page.get_by_label("Spacing")).to_be_visible()
    expect(page.get_by_label("Token merging")).to_be_visible()


def test_the_scale_of_a_lora_stands_in_the_prompt(page: Page) -> None:
    prompt = page.get_by_label("Prompt", exact=True)
    prompt.fill("red apple")
    page.locator("#loras > summary").click()
    page.get_by_label("style", exact=True).fill("0.8")
    expect(prompt).to_have_value("red apple <lora:style:0.8>")
    prompt.fill("red apple <lora:style:0.5>")
    expect(page.get_by_label("style", exact=True)).to_have_value("0.5")
    page.get_by_label("style", exact=True).fill("0")
    expect(prompt).to_have_value("red apple")


def test_errors_of_the_server_are_shown(page: Page) -> None:
    page.get_by_label("Width").fill("65")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#status")).to_contain_text("the width 65 is not divisible by 8")
    expect(page.get_by_role("button", name="Generate")).to_be_enabled()


def test_older_images_are_shown_page_by_page(page: Page, server: Running) -> None:
    settings = {"prompt": "red apple", "num_inference_steps": 1, "num_images_per_prompt": 8, "previews": False}
    for _ in range(4):
        server.http.post("/v1/jobs", json=settings)
    while (state := server.http.get("/health").json())["running"] + state["waiting"]:
        time.sleep(0.05)
    page.reload()
    tiles = page.locator("#gallery .tile")
    expect(tiles).to_have_count(24)
    page.get_by_role("button", name="Show older images").click()
    expect(tiles.nth(30)).to_be_attached()
    names = tiles.locator("img").evaluate_all("all => all.map((each) => each.src)")
    assert names == sorted(set(names), reverse=True)


def test_the_page_asks_for_the_api_key(open_page: Opener, tmp_path: Path) -> None:
    with serving(tmp_path, keys=("first-key-of-the-server", "second-key-of-the-server")) as server:
        page = open_page(server.url)
        page.get_by_label("Key", exact=True).fill("not the key of this server")
        page.get_by_role("button", name="Continue").click()
        expect(page.get_by_role("alert")).to_contain_text("does not know this key")
        page.get_by_label("Key", exact=True).fill("first-key-of-the-server")
        page.get_by_role("button", name="Continue").click()
        image = generate(page, "a red apple", steps=3)
        expect(image).to_have_js_property("naturalWidth", 16)
        page.reload()
        expect(page.locator("#gallery .tile")).to_have_count(1)
        assert page.evaluate("localStorage.length") == 0
        other = open_page(server.url)
        other.get_by_label("Key", exact=True).fill("second-key-of-the-server")
        other.get_by_role("button", name="Continue").click()
        expect(other.locator("#gallery")).to_contain_text("Images that you generate are kept here")
        expect(other.locator("#gallery .tile")).to_have_count(0)
