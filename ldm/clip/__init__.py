"""Stage 2: images and captions into one embedding space, and the text encoder of the denoiser."""
