from __future__ import annotations

from ldm.cli.prepare import main

if __name__ == "__main__":
    main()
