"""Benchmarks: one script a question; each prints hardware, versions and ratios measured in one run."""
