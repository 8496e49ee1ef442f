"""Layers in which each token picks a row."""
