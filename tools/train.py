from __future__ import annotations

from ldm.cli.train import main

if __name__ == "__main__":
    main()
