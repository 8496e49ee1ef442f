"""The engine's side, in vLLM's worker processes: layers, rows of experts, checks."""
