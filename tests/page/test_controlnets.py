from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Page, expect

from ldm import Pipeline
from ldm.control_images import ControlImage
from tests.page.actions import content, finished, generate, newest
from tests.page.conftest import Opener
from tests.serving.servers import Running, serving
from tests.tiny import SIZE, tiny_controlnet, tiny_model

pytestmark = pytest.mark.page


@pytest.fixture(scope="module")
def controlled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server of the tiny model, with two ControlNets."""
    folder = tmp_path_factory.mktemp("controlnets")
    sources = {name: tiny_controlnet(folder / name, seed) for seed, name in enumerate(("edges", "depth"))}
    with serving(folder, controlnets=sources) as running:
        running.service.models.load("tiny")
        for name, source in sources.items():
            running.pipe.load_controlnet(source, name)
        yield running


@pytest.fixture
def hint(tmp_path: Path) -> Path:
    file = tmp_path / "hint.png"
    Image.effect_noise((SIZE, SIZE), 90).convert("RGB").save(file)
    return file


def add(page: Page, name: str, file: Path) -> None:
    """Give a ControlNet its image."""
    panel = page.locator("#controlnets")
    if not panel.evaluate("details => details.open"):
        panel.locator("summary").click()
    panel.get_by_role("combobox", name="ControlNet").select_option(name)
    panel.locator("input[type=file]").set_input_files(file)
    expect(panel.get_by_role("img", name=f"Image of {name}")).to_be_visible()


def test_images_are_controlled_and_made_again(open_page: Opener, controlled: Running, hint: Path) -> None:
    page = open_page(controlled.url)
    add(page, "edges", hint)
    add(page, "depth", hint)
    page.get_by_label("Scale of edges", exact=True).fill("0.5")
    image = content(controlled, generate(page, "a red apple", steps=2, seed=3))
    controls = [ControlImage("edges", hint, 0.5), ControlImage("depth", hint)]
    settings = {"num_inference_steps": 2, "seed": 3, "progress": False}
    expected = controlled.pipe("a red apple", controlnets=controls, **settings)[0]
    assert image.tobytes() == expected.tobytes()
    assert [each["name"] for each in newest(controlled)["request"]["controlnets"]] == ["edges", "depth"]

    page.get_by_role("button", name="Remove depth").click()
    one = content(controlled, generate(page, steps=2, seed=3))
    assert one.tobytes() != image.tobytes()
    page.locator("#gallery .tile").nth(1).click()
    page.get_by_role("button", name="Use these settings").click()
    expect(page.get_by_role("img", name="Image of depth")).to_be_visible()
    expect(page.get_by_label("Scale of edges", exact=True)).to_have_value("0.5")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#status")).to_have_text("Generating …")
    assert content(controlled, finished(page)).tobytes() == image.tobytes()


def test_a_hint_is_cut_to_the_proportions_of_the_image(open_page: Opener, controlled: Running, tmp_path: Path) -> None:
    file = tmp_path / "wide.png"
    Image.effect_noise((3 * SIZE, SIZE), 90).convert("RGB").save(file)
    page = open_page(controlled.url)
    add(page, "edges", file)
    generate(page, "a red apple", steps=1)
    kept = controlled.service.gallery.file(newest(controlled)["request"]["controlnets"][0]["image"])
    assert kept is not None
    with Image.open(kept) as image:
        assert image.size == (SIZE, SIZE)


def test_axe_finds_no_serious_fault_in_the_panel(open_page: Opener, controlled: Running, hint: Path) -> None:
    page = open_page(controlled.url)
    add(page, "edges", hint)
    page.wait_for_timeout(200)
    violations = Axe().run(page).response["violations"]
    assert [each["id"] for each in violations if each["impact"] in ("serious", "critical")] == []


def test_a_model_is_offered_the_controlnets_that_fit_it(open_page: Opener, tmp_path: Path, hint: Path) -> None:
    """All of them while it is not loaded, since the server does not know yet which fit."""
    network = {"kind": "unet", "levels": [{"width": 8, "blocks": 1, "depth": 1}], "heads": 2, "groups": 4}
    narrow = tiny_model(denoiser=network | {"context_width": 16})
    sources = {"edges": tiny_controlnet(tmp_path / "edges"), "depth": tiny_controlnet(tmp_path / "depth", model=narrow)}
    models = {
        name: Pipeline(model).save_pretrained(tmp_path / f"{name}.safetensors")
        for name, model in {
            "one": tiny_model(),
            "narrow": narrow,
            "classes": tiny_model("class"),
            "late": narrow,
        }.items()
    }
    with serving(tmp_path, sources=models, controlnets=sources) as server:
        for name in ("one", "narrow", "classes"):
            server.service.models.load(name)
        page = open_page(server.url)
        panel, model = page.locator("#controlnets"), page.locator("select[name=model]")
        for name, names in {"narrow": ["depth"], "late": ["edges", "depth"], "one": ["edges"]}.items():
            model.select_option(name)
            expect(panel.locator("option")).to_have_text(names)
        add(page, "edges", hint)
        model.select_option("late")
        expect(page.get_by_role("img", name="Image of edges")).to_be_visible()
        model.select_option("classes")
        expect(panel).to_be_hidden()
        model.select_option("one")
        expect(panel).to_be_visible()
        expect(page.get_by_role("img", name="Image of edges")).to_have_count(0)


def test_without_controlnets_there_is_no_panel(page: Page) -> None:
    expect(page.locator("#controlnets")).to_be_hidden()
