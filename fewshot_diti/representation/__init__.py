"""Features of images, learned without labels on one frozen Stable Diffusion."""

from fewshot_diti.representation.latents import Latents
from fewshot_diti.representation.methods import DitiConfig, PdaeConfig, SimclrConfig, TcvaeConfig
from fewshot_diti.representation.model import Representation
from fewshot_diti.representation.training import RepresentationTraining, train

__all__ = [
    "DitiConfig",
    "Latents",
    "PdaeConfig",
    "Representation",
    "RepresentationTraining",
    "SimclrConfig",
    "TcvaeConfig",
    "train",
]
