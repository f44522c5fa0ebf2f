"""Stage 2: images and captions into one embedding space, and the text encoder of the denoiser."""

from __future__ import annotations

from ldm.clip import model_formats as model_formats
