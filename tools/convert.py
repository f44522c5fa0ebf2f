"""Models from one format to another; `ldm-convert` once installed."""

from __future__ import annotations

from ldm.cli.convert import main

if __name__ == "__main__":
    main()
