"""Experts: one as a file, many as rows of a patched model's tables."""
