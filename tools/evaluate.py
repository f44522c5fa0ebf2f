from __future__ import annotations

from ldm.cli.evaluate import main

if __name__ == "__main__":
    main()
