"""The OpenAI protocol: requests, responses, limits, metrics."""
