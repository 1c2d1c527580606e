"""What a user would try instead: each baseline has the classifier's `fit`, `predict_proba`, `predict`, `classes_`."""

from fewshot_diti.baselines.base import Baseline
from fewshot_diti.baselines.clip import OpenClip, ZeroShotClip
from fewshot_diti.baselines.clip_lora import ClipLora
from fewshot_diti.baselines.probe import LogisticProbe, NearestMean, NearestNeighbour
from fewshot_diti.baselines.tip_adapter import TipAdapter

__all__ = [
    "Baseline",
    "ClipLora",
    "LogisticProbe",
    "NearestMean",
    "NearestNeighbour",
    "OpenClip",
    "TipAdapter",
    "ZeroShotClip",
]
