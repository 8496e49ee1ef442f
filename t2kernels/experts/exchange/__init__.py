"""Experts in the forms of others: LoRA adapters of PEFT, out and in, and the hub."""
