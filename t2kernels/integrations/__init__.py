"""Adapters to other tools: vLLM, lm-eval."""
