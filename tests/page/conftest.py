from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page

from ldm import Pipeline
from tests.page.browser import chromium
from tests.serving.servers import Running, serving

Opener = Callable[..., Page]


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        if found is None:
            pytest.skip("there is no Chromium; install it with apt-get install chromium or playwright install chromium")
        yield found


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server of the shipped model, with a folder of LoRAs."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "loras").mkdir()
    (folder / "loras" / "style.safetensors").touch()
    with serving(folder, sources={"emoji": "emoji"}, lora_folder=folder / "loras") as running:
        running.service.models.load("emoji")
        yield running


@pytest.fixture(scope="session")
def pipe() -> Pipeline:
    return Pipeline.from_pretrained("emoji", device="cpu")


@pytest.fixture
def open_page(browser: Browser, server: Running) -> Iterator[Opener]:
    """Opens the page in a new profile; at the end of the test, no script may have failed nor anything been blocked."""
    contexts, problems = [], []

    def opened(url: str = server.url, **options: object) -> Page:
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on(
            "console",
            lambda message: (
                problems.append(message.text) if message.type == "error" and "status of 4" not in message.text else None
            ),
        )
        page.goto(url)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not problems


@pytest.fixture
def page(open_page: Opener) -> Page:
    return open_page()


@pytest.fixture
def phone(open_page: Opener) -> Page:
    return open_page(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)


@pytest.fixture
def apple(pipe: Pipeline, tmp_path: Path) -> Path:
    """An image of the shipped model, with its settings."""
    return pipe("red apple", seed=3, num_inference_steps=6, sampler="heun", guidance_scale=4.0, progress=False).save(
        tmp_path / "apple.png"
    )[0]
