"""Adapters to other tools: vLLM and lm-eval."""
