"""Inside vLLM's API server: names, uploads, `t2 serve --engine vllm`."""
