"""`t2 serve`: experts behind an OpenAI-compatible API, on transformers' continuous batching (docs/reference/server.md).

| file | idea |
|---|---|
| engine/ | batching.py: one row per request · engine.py: the queue · steps.py, sampling.py, adjusting.py: tokens |
| | grammar.py: structured texts · scoring.py: log p of prompts · handle.py: one request |
| http/ | protocol.py, refusals.py: requests · choices.py, vocabulary.py, text.py, tools.py: answers |
| | access.py: the log · limits.py · metrics.py · errors.py |
| experts/ | registry.py: names and versions · counters.py: loads and evictions · folder.py: files |
| completions.py, prompts.py, answer.py | a completion request: its expert · its prompts · its answer |
| auto.py, searches.py | model="auto" · experts made from examples |
| service.py, app.py, admin.py, tokenizing.py, server.py | the state · routes · of experts · of tokens · the process |
"""
