from __future__ import annotations

from ldm.cli.reference import main

if __name__ == "__main__":
    main()
