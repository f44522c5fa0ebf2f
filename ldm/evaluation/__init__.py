"""Evaluation of models: metrics with confidence intervals, and the receipts that say how each number was made."""
