from __future__ import annotations

from ldm.cli.bench import main

if __name__ == "__main__":
    main()
