"""The server's side, in vLLM's API process: names of experts, uploads, `t2 serve --engine vllm`."""
