"""Reproduce the paper's tables and comparisons."""
