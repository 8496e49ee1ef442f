"""Generation: the queue of requests, continuous batching with experts, and sampling."""
