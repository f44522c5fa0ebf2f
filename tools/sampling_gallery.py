from __future__ import annotations

from ldm.cli.sampling_gallery import main

if __name__ == "__main__":
    main()
