"""Comparison of training recipes at equal time, over several seeds."""
