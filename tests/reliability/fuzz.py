"""Fuzzing of what reads files from elsewhere, with atheris: manifests, path lists, banks, LoRAs, images.

Run by hand, one reader for so many seconds (`pip install atheris` first):

    PYTHONPATH=.:tests python tests/reliability/fuzz.py manifest 600

Readers: manifest, split, shots, bank, image. Whatever is no ValueError and no OSError is a find: atheris prints the
traceback and the input, which it keeps in crash-HASH. Started again it goes on from what it has kept in the folder
fuzz-READER.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import atheris
import torch

with atheris.instrument_imports(include=["fewshot_diti.data", "fewshot_diti.bank", "fewshot_diti.bank_files"]):
    from fewshot_diti.calibration import Calibration
    from fewshot_diti.classifier_files import read_classifier
    from fewshot_diti.data import Shots, import_path_list
    from fewshot_diti.data.images import decode
    from fewshot_diti.data.tables import listed_files, read_manifest
    from fewshot_diti.presets import complete

from hostile_files import signed
from hostile_images import ENCODED, encoded
from safetensors.torch import save

FOLDER = Path(tempfile.mkdtemp())
TOKENS = [{"label": "a", "prompt": "a", "num_shots": 1, "unet_scale": 0.6, "text_encoder_scale": 0.7}]
CONFIG = {
    "backbone_name": "x",
    "backbone_hash": "a",
    "geometry": {"size": [16, 16], "resize": "crop", "banner_rows": 0},
    "rank": 1,
    "alpha": 1,
    "targets": [{"network": "unet", "name": "x", "in_features": 1, "out_features": 1}],
}
FITTED = complete("pocket", 1)
CALIBRATION = Calibration(
    timesteps=(1,) * FITTED.scoring.trials,
    weights=(1.0,) * FITTED.scoring.trials,
    witness_weights=(1.0,) * len(FITTED.scoring.witnesses),
    temperature=1.0,
)
SETTINGS = {
    "concept": "part",
    "prompts": {"template": "{}", "generic": "x"},
    "given_training": None,
    "given_scoring": None,
    "settings": FITTED.to_dict(),
    "calibration": asdict(CALIBRATION),
    "complete": True,
}
SEEDS: dict[str, list[bytes]] = {
    "manifest": [b"cpath,label\nx.png,a\n", b'j[{"path": "x.png", "label": 1}]', b'l{"path": "x.png", "label": "a"}\n'],
    "split": [b"tx.png a\n", b'j{"train": [["x.png", 0, "a"]]}', b"d\x80\x02]q\x00."],
    "shots": [b'{"k": 1, "seed": 0, "image_ids": {"a": ["0"]}}'],
    "bank": [b"\0".join(json.dumps(x).encode() for x in (TOKENS, CONFIG, SETTINGS))],
    "image": [encoded(format) for format in ENCODED],
}


def manifest(content: bytes) -> None:
    suffix = {b"c": ".csv", b"j": ".json", b"l": ".jsonl"}.get(content[:1], ".csv")
    (path := FOLDER / f"x{suffix}").write_bytes(content[1:])
    listed_files(path, FOLDER, read_manifest(path))


def split(content: bytes) -> None:
    suffix = {b"t": ".txt", b"j": ".json", b"d": ".data"}.get(content[:1], ".txt")
    (path := FOLDER / f"x{suffix}").write_bytes(content[1:])
    import_path_list(path, FOLDER)


def shots(content: bytes) -> None:
    (path := FOLDER / "shots.json").write_bytes(content)
    Shots.load(path)


def bank(content: bytes) -> None:
    """Three files of a bank, with a manifest that fits them."""
    names = "bank.json", "config.json", "classifier.json"
    files = dict.fromkeys(names, b"") | dict(zip(names, content.split(b"\0", 2), strict=False))
    files["class_tokens.safetensors"] = save({"rows": torch.ones(1, 2)})
    files["manifest.json"] = json.dumps({"files": dict.fromkeys(files)}).encode()
    for name, written in signed(files).items():
        (FOLDER / name).write_bytes(written)
    try:
        read_classifier(FOLDER)
    except (ValueError, OSError) as error:
        assert str(FOLDER) in str(error), error


def image(content: bytes) -> None:
    decode(content)


READERS: dict[str, Callable[[bytes], None]] = {x.__name__: x for x in (manifest, split, shots, bank, image)}


def main() -> None:
    name, seconds = sys.argv[1], int(sys.argv[2])
    corpus = Path(f"fuzz-{name}")
    corpus.mkdir(exist_ok=True)
    for number, content in enumerate(SEEDS[name]):
        (corpus / f"seed-{number}").write_bytes(content)

    def once(content: bytes) -> None:
        with suppress(ValueError, OSError):
            READERS[name](content)

    options = [f"-max_total_time={seconds}", "-timeout=30", "-rss_limit_mb=6000", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], str(corpus), *options], once)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
