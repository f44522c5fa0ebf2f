"""Makes the images of the page in docs/images: ``python -m tests.page.screenshots``, with the shipped model."""

from __future__ import annotations

import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page

from tests.page.actions import edit_newest, generate
from tests.page.browser import chromium
from tests.serving.servers import serving

FOLDER = Path(__file__).parents[2] / "docs" / "images"

PROMPTS = (
    "mermaid dark skin tone",
    "unicorn",
    "woman cook light skin tone",
    "sunrise",
    "man astronaut medium-light skin tone",
    "Santa Claus medium-dark skin tone",
    "vulcan salute medium skin tone",
)


def shoot(page: Page, name: str) -> None:
    """Write the visible part of a page, with few colours, so that the file is small."""
    page.wait_for_timeout(500)
    path = FOLDER / name
    page.screenshot(path=path)
    with Image.open(path) as image:
        image.convert("RGB").quantize(256).save(path, optimize=True)


def screenshots(browser: Browser, url: str) -> None:
    """Generate some images and make all screenshots."""
    page = browser.new_page(viewport={"width": 1280, "height": 860}, color_scheme="light")
    page.goto(url)
    page.get_by_label("Images", exact=True).fill("2")
    for index, prompt in enumerate(PROMPTS):
        generate(page, prompt, steps=30, seed=20 + index)
    page.get_by_label("Images", exact=True).fill("3")
    generate(page, "red apple", steps=30, seed=3)
    shoot(page, "page.png")
    page.locator("#gallery .tile").first.click()
    shoot(page, "page-viewer.png")
    page.close()

    page = browser.new_page(viewport={"width": 1280, "height": 860}, color_scheme="dark")
    page.goto(url)
    edit_newest(page, "Repaint")
    layer = page.locator(".layer")
    layer.scroll_into_view_if_needed()
    box = layer.bounding_box()
    assert box is not None
    page.get_by_label("Brush", exact=True).fill("14")
    for index, (x, y) in enumerate(((0.3, 0.35), (0.5, 0.3), (0.7, 0.35), (0.72, 0.5), (0.3, 0.5), (0.5, 0.45))):
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
        if index == 0:
            page.mouse.down()
    page.mouse.up()
    generate(page, "green apple", steps=30, seed=4)
    page.locator("#source").scroll_into_view_if_needed()
    shoot(page, "page-dark.png")
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
    shoot(page, "page-phone.png")
    page.close()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, chromium() as found:
        assert found is not None, "there is no Chromium"
        with serving(Path(folder), sources={"emoji": "emoji"}) as server:
            with server.service.models.use("emoji"):
                pass
            screenshots(found, server.url)
