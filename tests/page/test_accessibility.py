from __future__ import annotations

from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from tests.page.actions import content, edit_newest, finished, generate, newest
from tests.page.conftest import Opener
from tests.serving.servers import Running

pytestmark = pytest.mark.page


def serious_faults(page: Page) -> list[Any]:
    """Faults that axe-core rates serious or critical, with the elements."""
    page.wait_for_timeout(200)  # colours change in a transition
    violations = Axe().run(page).response["violations"]
    return [
        (each["id"], [node["html"] for node in each["nodes"]])
        for each in violations
        if each["impact"] in ("serious", "critical")
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_fault(open_page: Opener, scheme: str) -> None:
    page = open_page(color_scheme=scheme)
    page.get_by_text("More settings").click()
    page.locator("#loras > summary").click()
    generate(page, "red apple")
    assert serious_faults(page) == []
    page.locator("#gallery .tile").first.click()
    assert serious_faults(page) == []
    page.get_by_role("button", name="Close").click()
    edit_newest(page, "Repaint")
    page.get_by_role("button", name="Compare", exact=True).click()
    assert serious_faults(page) == []


def test_colours_are_those_of_the_browsers_scheme(open_page: Opener) -> None:
    def brightness(scheme: str) -> int:
        page = open_page(color_scheme=scheme)
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(int(part) for part in colour.strip("rgb()").split(","))

    assert brightness("light") > 600
    assert brightness("dark") < 150


def test_nothing_is_wider_than_a_phone(phone: Page) -> None:
    def fits() -> bool:
        return bool(phone.evaluate("document.documentElement.scrollWidth <= innerWidth"))

    assert fits()
    generate(phone, "red apple")
    assert fits()
    phone.locator("#gallery .tile").first.tap()
    assert fits()
    phone.get_by_role("button", name="Close").tap()
    edit_newest(phone, "Repaint")
    layer = phone.locator(".layer")
    layer.scroll_into_view_if_needed()
    layer.tap()
    assert layer.evaluate(
        "canvas => canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data.some((value) => value > 0)"
    )
    phone.get_by_role("button", name="Compare", exact=True).tap()
    assert fits()


def test_all_is_done_with_the_keyboard(page: Page, server: Running) -> None:
    def focus(selector: str) -> None:
        """Press Tab until the focus is on an element."""
        for _ in range(60):
            if page.evaluate("selector => document.activeElement.matches(selector)", selector):
                return
            page.keyboard.press("Tab")
        raise AssertionError(f"{selector} is not reached")

    focus("textarea[name=prompt]")
    page.keyboard.type("red apple")
    page.keyboard.press("Control+Enter")
    before = content(server, finished(page)).tobytes()
    focus("#results .tile")
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_contain_text("red apple")
    focus("dialog .stack button:nth-of-type(3)")
    page.keyboard.press("Enter")
    focus("input[name=task]")
    page.keyboard.press("ArrowRight")
    focus(".layer")
    page.keyboard.press("Space")
    for _ in range(4):
        page.keyboard.press("Shift+ArrowLeft")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#status")).to_have_text("Generating …")
    assert content(server, finished(page)).tobytes() != before
    assert "mask" in newest(server)["request"]
