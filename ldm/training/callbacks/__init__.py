"""Callbacks around the training steps of any stage, one kind in each file."""
