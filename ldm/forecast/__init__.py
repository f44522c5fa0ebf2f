"""Forecast of a training from a ladder of small ones."""
