from __future__ import annotations

from ldm.cli.forecast import main

if __name__ == "__main__":
    main()
