"""Algorithms behind `linalg.svd`."""
