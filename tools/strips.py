from __future__ import annotations

from ldm.cli.strips import main

if __name__ == "__main__":
    main()
