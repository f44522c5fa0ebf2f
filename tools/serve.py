from __future__ import annotations

from ldm.cli.serve import main

if __name__ == "__main__":
    main()
