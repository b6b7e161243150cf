"""Triton kernels; each stands beside the slow definition that a test compares it with."""
