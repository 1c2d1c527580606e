"""What decides beside the class tokens, by name; several of them and the class tokens make one decision."""

from __future__ import annotations

from collections.abc import Callable

from fewshot_diti.data.images import ImageGeometry
from fewshot_diti.witnesses.base import FittedWitness, Witness, read_groups, score_offsets
from fewshot_diti.witnesses.features import UnetWitness
from fewshot_diti.witnesses.linear import LinearClip, LinearNetwork
from fewshot_diti.witnesses.network import TunedNetwork

WITNESSES: dict[str, Callable[[str, ImageGeometry], Witness]] = {
    "features": lambda _, __: UnetWitness(),
    "network": TunedNetwork,
    "linear-network": LinearNetwork,
    "linear-clip": LinearClip,
}


def make_witness(name: str, geometry: ImageGeometry) -> Witness:
    """A witness by its name in `ScoringConfig.witnesses`.

    Args:
        name: a key of `WITNESSES`, or KIND:MODEL with a model that `baselines.imagenet.ImageNetwork` (or, for
            linear-clip, `baselines.clip.OpenClip`) takes: "network:resnet50.a1_in1k", "linear-clip:pocket".
        geometry: of the bank.

    Raises:
        ValueError: an unknown name.
        FileNotFoundError: the model is not there.
    """
    kind, _, model = name.partition(":")
    if kind not in WITNESSES:
        raise ValueError(f"There is no witness {name!r}; pass some of {', '.join(WITNESSES)}, or KIND:MODEL.")
    return WITNESSES[kind](model, geometry)


__all__ = ["WITNESSES", "FittedWitness", "Witness", "make_witness", "read_groups", "score_offsets"]
