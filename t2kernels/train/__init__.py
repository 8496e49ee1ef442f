"""Experts by reinforcement learning: `SVFTrainer`, a transformers Trainer whose only weights are z."""

from .config import SVFConfig
from .reinforce import ReinforceTrainer
from .trainer import SVFTrainer

__all__ = ["ReinforceTrainer", "SVFConfig", "SVFTrainer"]
