from __future__ import annotations

from ldm.cli.ablate import main

if __name__ == "__main__":
    main()
