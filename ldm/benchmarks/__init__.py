"""Benchmarks against other libraries: the same work on ours and on theirs, in turn, within one run."""
