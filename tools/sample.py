from __future__ import annotations

from ldm.cli.sample import main

if __name__ == "__main__":
    main()
