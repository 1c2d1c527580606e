"""Captions like those on the web: the prominent attributes first, the fine-grained class rarely."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Regex as TokenizerRegex
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPTokenizer

from fewshot_diti.prompts import with_article
from recipes.pocket.renders import Renders

GENERIC_CAPTION = "a photo of an aircraft"

P_GENERIC, P_VARIANT = 0.2, 0.15
_P_AIRLINE, _P_SKY, _P_KIND, _P_MANUFACTURER = 0.7, 0.35, 0.5, 0.4
_FALSE_COLOURS = " in false colours"
_TEMPLATES = ("a photo of {}", "a picture of {}", "{}", "{} in flight", "a side view of {}")
_START, _END = "<|startoftext|>", "<|endoftext|>"


def sky_name(pixels_CHW: Tensor) -> str:
    """The sky behind an aircraft, named from the mean colour of the uppermost eighth of a uint8 image."""
    red, _, blue = (float(v) for v in pixels_CHW[:, : pixels_CHW.shape[1] // 8].float().mean((1, 2)))
    if red > blue:
        return "an evening sky"
    if blue - red < 30:
        return "a grey sky"
    return "a dark blue sky" if red + blue < 260 else "a light blue sky"


def write_caption(
    rng: random.Random,
    *,
    airline: str,
    sky: str,
    manufacturer: str,
    variant: str,
    kinds: Sequence[str] = (),
    false_colours: bool = False,
    p_generic: float = P_GENERIC,
    p_variant: float = P_VARIANT,
) -> str:
    """One caption of one image: with probability `p_generic` it names nothing, else with `p_variant` the variant.

    Some say a kind of aircraft instead of 'aircraft', which many variants share ('a four-engine jet'). Of an image in
    false colours a caption states that, and neither airline nor sky: only the shape is left to be named.
    """
    suffix = _FALSE_COLOURS if false_colours else ""
    if rng.random() < p_generic:
        return GENERIC_CAPTION + suffix
    noun = rng.choice(kinds) if kinds and rng.random() < _P_KIND else ""
    words = [airline] if airline and not false_colours and rng.random() < _P_AIRLINE else []
    names_variant = rng.random() < p_variant
    if rng.random() < _P_MANUFACTURER:
        words.append(manufacturer)
    if names_variant:
        prefix = manufacturer + " "
        words.append(variant.removeprefix(prefix) if manufacturer in words else variant)
    if not names_variant:
        words.append(noun or "aircraft")
    elif noun or rng.random() < 0.5:
        words.append(f", a {noun or 'type of aircraft'}")
    named = " ".join(words).replace(" ,", ",")
    caption = rng.choice(_TEMPLATES).format(with_article(named))
    return f"{caption} in {sky}" if not false_colours and rng.random() < _P_SKY else caption + suffix


class Captioner:
    """Writes captions of renders, a fresh one each time.

    Args:
        kinds: JSON object that names kinds of aircraft for a variant; None: captions name none.
        p_generic, p_variant: as of `write_caption`.
    """

    def __init__(
        self, renders: Renders, kinds: Path | None, *, p_generic: float = P_GENERIC, p_variant: float = P_VARIANT
    ) -> None:
        self._renders, self._p_generic, self._p_variant = renders, p_generic, p_variant
        self._kinds = json.loads(kinds.read_text()) if kinds else {}
        self._skies = [sky_name(p) for p in renders.pixels_NCHW]

    def __call__(self, row: int, rng: random.Random, *, false_colours: bool) -> str:
        """A caption of the image at `row`."""
        r = self._renders
        return write_caption(
            rng,
            airline=r.airlines[row],
            sky=self._skies[row],
            manufacturer=r.manufacturers[row],
            variant=r.variants[row],
            kinds=self._kinds.get(r.variants[row], ()),
            false_colours=false_colours,
            p_generic=self._p_generic,
            p_variant=self._p_variant,
        )

    def names_shape(self, row: int, caption: str) -> bool:
        """Whether a caption of the image at `row` says its variant, manufacturer or kind."""
        manufacturer, variant = self._renders.manufacturers[row], self._renders.variants[row]
        words = manufacturer, variant.removeprefix(manufacturer + " "), *self._kinds.get(variant, ())
        return any(word in caption for word in words)


def train_tokenizer(captions: Iterable[str], vocab_size: int, max_length: int) -> CLIPTokenizer:
    """A CLIP tokenizer with its own byte-level BPE; every text has a tokenization, end-of-text has the largest id."""
    bpe = Tokenizer(models.BPE(unk_token=None, continuing_subword_prefix="", end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                TokenizerRegex(r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""), "removed", invert=True
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(alphabet) - 2, initial_alphabet=alphabet, end_of_word_suffix="</w>"
    )
    bpe.train_from_iterator(captions, trainer)
    learned = json.loads(bpe.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in learned["merges"]]
    tokens = [*alphabet, *(a + "</w>" for a in alphabet)]
    tokens += [t for t in ("".join(m) for m in merges) if t not in set(tokens)]
    vocab = {token: i for i, token in enumerate([*dict.fromkeys(tokens), _START, _END])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)
