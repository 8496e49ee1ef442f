"""Generate, score and read log-probabilities: what training, adaptation and evaluation share."""
