"""What the three stages share: EMA, optimizers, metrics, images, checkpoints and resume."""
