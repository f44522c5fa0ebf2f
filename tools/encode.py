from __future__ import annotations

from ldm.cli.encode import main

if __name__ == "__main__":
    main()
