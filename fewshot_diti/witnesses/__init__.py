"""What decides beside the class tokens, by name; several of them and the class tokens make one decision."""

from __future__ import annotations

from fewshot_diti.backbone_files import POCKET
from fewshot_diti.data.images import ImageGeometry
from fewshot_diti.presets import Kind
from fewshot_diti.witnesses.base import FittedWitness, Witness, fit_witnesses, read_groups, score_offsets
from fewshot_diti.witnesses.features import UnetWitness

KINDS = ("features", "network", "linear-network", "clip", "tip-adapter", "linear-clip")


def make_witness(
    name: str, geometry: ImageGeometry, concept: str | None = None, kind: Kind = "stable-diffusion"
) -> Witness:
    """A witness by its name in `ScoringConfig.witnesses`.

    Args:
        name: one of `KINDS`, or KIND:MODEL with a model that `baselines.imagenet.ImageNetwork` (or, for clip,
            tip-adapter and linear-clip, `baselines.clip.OpenClip`) takes: "network:resnet50.a1_in1k", "clip:pocket".
        geometry: of the bank.
        concept: what all classes are, for clip and tip-adapter.
        kind: of the backbone: beside the pocket a CLIP without a model's name is the pocket's, else that of the
            published figures.

    Raises:
        ValueError: an unknown name, or no concept for one that needs it.
        FileNotFoundError: the model is not there.
    """
    try:
        return _make(name, geometry, concept, kind)
    except RuntimeError as error:  # of timm and open_clip, where there is no such model or no network
        raise FileNotFoundError(f"The model of witness {name!r} cannot be loaded: {error}") from error


def _make(name: str, geometry: ImageGeometry, concept: str | None, kind: Kind) -> Witness:
    source, _, model = name.partition(":")
    if source == "features" and not model:
        return UnetWitness()
    # timm and open_clip take seconds to import
    from fewshot_diti.witnesses.clip import TipAdapterWitness, ZeroShotWitness
    from fewshot_diti.witnesses.linear import LinearClip, LinearNetwork
    from fewshot_diti.witnesses.network import TunedNetwork

    if source == "network":
        return TunedNetwork(model, geometry)
    if source == "linear-network":
        return LinearNetwork(model, geometry)
    if source in ("clip", "tip-adapter", "linear-clip") and not model and kind == "pocket":
        model = POCKET
    if source == "linear-clip":
        return LinearClip(model, geometry)
    if source in ("clip", "tip-adapter"):
        if concept is None:
            raise ValueError(f"The witness {name!r} reads prompts that say what all classes are; pass concept.")
        return (ZeroShotWitness if source == "clip" else TipAdapterWitness)(model, concept)
    raise ValueError(f"There is no witness {name!r}; pass some of {', '.join(KINDS)}, or but for the first KIND:MODEL.")


__all__ = ["KINDS", "FittedWitness", "Witness", "fit_witnesses", "make_witness", "read_groups", "score_offsets"]
