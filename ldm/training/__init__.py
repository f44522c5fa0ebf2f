"""What the three stages share: EMA, optimizers, metrics, pictures, checkpoints and resume."""
