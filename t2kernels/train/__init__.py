"""Training of experts: `SVFTrainer`, a transformers Trainer whose only weights are z, by reinforcement learning; and
`experts`, for any other trainer."""

from .config import SVFConfig
from .others.context import TrainedExperts, experts
from .reinforce import ReinforceTrainer
from .trainer import SVFTrainer

__all__ = ["ReinforceTrainer", "SVFConfig", "SVFTrainer", "TrainedExperts", "experts"]
