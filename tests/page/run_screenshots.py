"""Makes the images of the page of training runs in docs/images: ``python -m tests.page.run_screenshots FOLDER``.

The runs in FOLDER are trained first, if they are not there: two short trainings of configs/emoji_64.yaml, in about ten minutes.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Browser

from ldm.training.experiment import load_config
from ldm.training.stages import train_stage
from tests.page.browser import chromium
from tests.page.screenshots import shoot
from tests.serving.servers import serving

CONFIG = Path(__file__).parents[2] / "configs" / "emoji_64.yaml"

OFTEN = {"log_every": 5, "validate_every": 100, "images_every": 50}
"""Settings of both stages, so that short trainings have curves."""

RATES = {"emoji_64": 2e-3, "emoji_64_lr5e-4": 5e-4}
"""Learning rate of the VAE of each run."""


def train(folder: Path, name: str) -> None:
    """Train, or resume, VAE and denoiser of a run."""
    fields = {f"{stage}.train.{field}": value for stage in ("vae", "denoiser") for field, value in OFTEN.items()}
    fields |= {"vae.train.max_steps": 500, "vae.train.learning_rate": RATES[name]}
    fields |= {"denoiser.train.max_steps": 400, "denoiser.train.batch_size": 8}
    fields |= {
        "name": name,
        "run_dir": folder / name,
        "clip.checkpoint": "emoji",
        "clip.train": "null",
        "decoder": "null",
    }
    experiment = load_config(CONFIG, [f"{field}={value}" for field, value in fields.items()])
    for stage in ("vae", "denoiser"):
        train_stage(experiment, stage)


def screenshots(browser: Browser, url: str) -> None:
    """Make all screenshots."""
    both = "&".join(f"run={name}" for name in RATES)
    page = browser.new_page(viewport={"width": 1280, "height": 860}, color_scheme="light")
    page.goto(f"{url}/page/runs.html#{both}&view=curves")
    page.locator(".plot").nth(1).hover()
    shoot(page, "runs.png")
    page.close()
    page = browser.new_page(viewport={"width": 1280, "height": 860}, color_scheme="dark")
    page.goto(f"{url}/page/runs.html#{both}&view=images")
    page.get_by_role("slider").first.fill("4")
    page.mouse.move(0, 0)
    shoot(page, "runs-images.jpg")
    page.close()


if __name__ == "__main__":
    runs = Path(sys.argv[1])
    for name in RATES:
        train(runs, name)
    with tempfile.TemporaryDirectory() as served, chromium() as found:
        assert found is not None, "there is no Chromium"
        with serving(Path(served), sources={}, runs=runs) as server:
            screenshots(found, server.url)
