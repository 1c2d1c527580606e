"""Few-shot fine-grained classification by a Stable Diffusion's timesteps."""

from fewshot_diti.backbone import Backbone
from fewshot_diti.bank import Bank
from fewshot_diti.classifier import DiTiClassifier
from fewshot_diti.config import PredictionConfig, ScoringConfig, TrainingConfig
from fewshot_diti.training import TrainingError

__all__ = [
    "Backbone",
    "Bank",
    "DiTiClassifier",
    "PredictionConfig",
    "ScoringConfig",
    "TrainingConfig",
    "TrainingError",
]
