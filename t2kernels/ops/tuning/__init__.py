"""Tile sizes, where they are kept, and how they are found."""
