"""Benchmarks: what is timed, against what, and tables that say on which machine and from which commit."""
