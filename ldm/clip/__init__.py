"""Stage 2: images and captions into one space, and the text tower that a denoiser listens to."""
