from __future__ import annotations

from ldm.cli.config_reference import main

if __name__ == "__main__":
    main()
