"""Encode prompts, draw completions, read log-probabilities, score: for training, adaptation, evaluation, serving."""
