"""Makes the images of the page in docs/images: ``python -m tests.page.screenshots``, with the shipped model."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page

from tests.page.actions import edit_newest, generate
from tests.page.browser import chromium
from tests.serving.servers import serving

FOLDER = Path(__file__).parents[2] / "docs" / "images"

PROMPTS = (
    "red apple",
    "rocket",
    "octopus",
    "woman cook light skin tone",
    "rainbow",
    "fox",
    "cactus",
    "sunrise",
    "strawberry",
    "man astronaut medium-light skin tone",
    "hamburger",
    "mermaid dark skin tone",
    "Santa Claus medium-dark skin tone",
    "guitar",
    "snowman",
    "vulcan salute medium skin tone",
    "unicorn",
    "tropical fish",
)


def shoot(page: Page, name: str) -> None:
    """Write the visible part of a page."""
    page.wait_for_timeout(500)
    with Image.open(io.BytesIO(page.screenshot())) as image:
        image.convert("RGB").save(FOLDER / name, quality=90, subsampling="4:4:4", optimize=True)


def paint(page: Page, places: list[tuple[float, float]]) -> None:
    """Paint a line through places of the image, from 0 to 1."""
    layer = page.locator(".layer")
    layer.scroll_into_view_if_needed()
    box = layer.bounding_box()
    assert box is not None
    for index, (x, y) in enumerate(places):
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
        if index == 0:
            page.mouse.down()
    page.mouse.up()


def screenshots(browser: Browser, url: str) -> None:
    """Generate some images and make all screenshots."""
    page = browser.new_page(viewport={"width": 1280, "height": 800}, color_scheme="light")
    page.goto(url)
    for index, prompt in enumerate(PROMPTS):
        generate(page, prompt, steps=30, seed=20 + index)
    page.get_by_label("Images", exact=True).fill("3")
    generate(page, "butterfly", steps=30, seed=3)
    page.locator("#form").evaluate("form => form.scrollTo(0, 0)")
    shoot(page, "page.jpg")
    page.get_by_label("Images", exact=True).fill("1")
    generate(page, "grinning face", steps=30, seed=1)
    page.close()

    page = browser.new_page(viewport={"width": 1280, "height": 800}, color_scheme="dark")
    page.goto(url)
    edit_newest(page, "Repaint")
    paint(page, [(0.25, 0.36), (0.75, 0.36), (0.75, 0.45), (0.25, 0.45)])
    generate(page, "smiling face with sunglasses", steps=30, seed=4)
    page.locator("#source").evaluate(
        "source => source.parentElement.scrollBy(0, source.getBoundingClientRect().top - 76)"
    )
    shoot(page, "page-dark.jpg")
    page.close()

    phone = {
        "viewport": {"width": 390, "height": 844},
        "device_scale_factor": 1.5,
        "is_mobile": True,
        "has_touch": True,
    }
    page = browser.new_page(**phone, color_scheme="light")
    page.goto(url)
    generate(page, "unicorn", steps=30, seed=21)
    page.locator("#settings > summary").click()
    page.evaluate("scrollTo(0, 0)")
    shoot(page, "page-phone.jpg")
    page.close()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, chromium() as found:
        assert found is not None, "there is no Chromium"
        with serving(Path(folder), sources={"emoji": "emoji"}) as server:
            server.service.models.load("emoji")
            screenshots(found, server.url)
