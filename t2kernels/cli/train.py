def train() -> None:
    """Stub."""
