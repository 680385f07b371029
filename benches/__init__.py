"""Benchmarks: every number is a ratio in one process, beside the floor that the machine showed in the same run."""
