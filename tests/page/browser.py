"""The browser of the tests of the page: Debian's Chromium, or that of Playwright. As a script: tells whether there is one."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def chromium() -> Iterator[Browser | None]:
    """Start Chromium without a window; None if there is none."""
    with sync_playwright() as playwright:
        installed = playwright.chromium.executable_path
        path = next(filter(None, map(shutil.which, NAMES)), installed if Path(installed).exists() else None)
        if path is None:
            yield None
            return
        as_root = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=path, args=as_root)
        yield browser
        browser.close()


if __name__ == "__main__":
    with chromium() as found:
        sys.exit(found is None)
