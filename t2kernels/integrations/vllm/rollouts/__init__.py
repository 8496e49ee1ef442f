"""Rollouts of a trainer drawn by vLLM: policies as rows in memory, an engine on this machine, running servers."""
