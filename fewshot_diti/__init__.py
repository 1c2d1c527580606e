"""Few-shot fine-grained classification by a Stable Diffusion's time-steps."""

from fewshot_diti.backbone import Backbone
from fewshot_diti.bank import Bank
from fewshot_diti.classifier import DiTiClassifier
from fewshot_diti.learning import TrainingError
from fewshot_diti.recommended import ScoringConfig
from fewshot_diti.training import TrainingConfig

__all__ = ["Backbone", "Bank", "DiTiClassifier", "ScoringConfig", "TrainingConfig", "TrainingError"]
