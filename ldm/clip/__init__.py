"""Stage 2: pictures and captions into one space, and the text tower that a denoiser listens to."""
