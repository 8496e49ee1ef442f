"""`t2 serve`: experts behind an OpenAI-compatible API, on transformers' continuous batching (docs/reference/server.md).

| file | idea |
|---|---|
| engine/ | batching.py: one row per request · sampling.py: tokens · handle.py: one request · engine.py: the queue |
| http/ | protocol.py: requests and answers · text.py: tokens to text · limits.py · metrics.py · errors.py |
| registry.py, counters.py, folder.py | served experts: names and versions · loads and evictions · files |
| completions.py, answer.py | a completion request: prompts and expert · its answer |
| auto.py, searches.py | model="auto" · experts made from examples |
| service.py, app.py, admin.py, server.py | the state · routes · routes of experts · the process |
"""
