from __future__ import annotations

from ldm.cli.diagnose import main

if __name__ == "__main__":
    main()
