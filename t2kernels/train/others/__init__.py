"""Experts in the hands of other trainers: transformers' Trainer, those of TRL, and loops of one's own."""
