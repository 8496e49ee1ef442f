"""Experts behind an OpenAI-compatible API, on transformers' continuous batching: `t2 serve` (docs/reference/server.md).

batching.py: an expert for each request of a batch · sampling.py: the next token of each · engine.py: who runs, who waits, who has a row ·
experts.py: names, versions and files · routing.py: model="auto" · few_shot.py: experts from examples ·
protocol.py, text.py, app.py, admin.py, limits.py, metrics.py: the API · server.py: the process
"""
