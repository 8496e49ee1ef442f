"""Inside vLLM's worker processes: layers, rows, checks."""
