"""Benchmarks of several ranks on this machine, over Gloo; the soak program."""
