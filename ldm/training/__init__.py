"""Training of the three stages: tasks, EMA, optimizers, metrics, images, checkpoints and resume."""
