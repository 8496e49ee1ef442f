"""Which request runs next, and the next token of each."""
