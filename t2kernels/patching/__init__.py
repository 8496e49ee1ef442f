"""Patch a transformers model in place, and take the patch back."""
