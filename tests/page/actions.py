"""Actions of a user on the page."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Locator, Page, expect

from tests.serving.servers import Running

expect.set_options(timeout=30_000)  # images are computed on a busy CPU


def generate(page: Page, prompt: str | None = None, steps: int = 6, seed: int | None = None) -> Locator:
    """Generate an image and return it, when it is there."""
    if prompt is not None:
        page.get_by_label("Prompt", exact=True).fill(prompt)
    settings = page.locator("#settings")
    if not settings.evaluate("details => details.open"):
        settings.locator("summary").first.click()
    page.get_by_label("Steps", exact=True).fill(str(steps))
    if seed is not None:
        page.get_by_label("Random").uncheck()
        page.get_by_label("Seed").fill(str(seed))
    page.get_by_role("button", name="Generate").click()
    return finished(page)


def finished(page: Page) -> Locator:
    expect(page.locator("#status")).to_have_text("Done.")
    return page.locator("#results img[data-kind=result]").first


def content(server: Running, image: Locator) -> Image.Image:
    """The file of an image on the page."""
    path = str(image.get_attribute("src"))
    return Image.open(io.BytesIO(server.http.get(path).raise_for_status().content))


def newest(server: Running) -> dict[str, Any]:
    """The newest image of the gallery."""
    images = server.http.get("/v1/gallery?limit=1").json()["images"]
    return images[0]


def drop(page: Page, file: Path, target: str = "body") -> None:
    """Drop a file on an element, once the page has been built."""
    expect(page.get_by_label("Sampler")).to_be_visible()
    transfer = page.evaluate_handle(
        """([name, content]) => {
            const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], name, { type: "image/png" }));
            return transfer;
        }""",
        [file.name, base64.b64encode(file.read_bytes()).decode()],
    )
    page.dispatch_event(target, "drop", {"dataTransfer": transfer})


def edit_newest(page: Page, task: str) -> None:
    """Take the newest image of the gallery as the start of a task."""
    page.locator("#gallery .tile").first.click()
    page.get_by_role("button", name="Edit").click()
    page.locator("#source").get_by_text(task, exact=True).click()
