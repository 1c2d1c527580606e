"""What the tiny backbone gave before the code was moved; `python tests/golden.py` writes tests/golden.json anew.

Errors, LoRA rows, timesteps and weights have never changed. Temperature, accuracy and scores of the kinds with features
changed in version 0.3.0: a witness's weight became relative to the class tokens' nats, and a temperature that is fitted
became that of the class tokens alone, before witnesses are added.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import save_tiny_backbone
from PIL import Image
from small_classifier import COLOURS, PREDICTION, SCORING, TRAINING

from fewshot_diti import Backbone, DiTiClassifier, PredictionConfig

FILE = Path(__file__).parent / "golden.json"


def _processor() -> str:
    """Version of torch, and the maker and model of the processor: the kernels that are chosen for it decide the last
    bits."""
    file = Path("/proc/cpuinfo")
    lines = dict(line.split(":", 1) for line in file.read_text().splitlines() if ":" in line) if file.is_file() else {}
    fields = {name.strip(): value.strip() for name, value in lines.items()}
    model = " ".join(fields.get(name, "?") for name in ("vendor_id", "cpu family", "model"))
    return f"torch {torch.__version__.split('+')[0]}, {torch.backends.cpu.get_cpu_capability()}, {model}"


PROCESSOR = _processor()


def picture(label: str, number: int) -> Image.Image:
    """Noise of a class's colour, of various sizes."""
    rng = np.random.default_rng([list(COLOURS).index(label), number])
    pixels = np.clip(np.array(COLOURS[label]) + rng.normal(0, 40, (20 + number, 37, 3)), 0, 255)
    return Image.fromarray(pixels.astype(np.uint8))


def compute(folder: Path) -> dict[str, Any]:
    """Weights, errors, calibration and decisions of classifiers with settings of each kind, by name."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    backbone = Backbone.from_pretrained(save_tiny_backbone(folder), dtype=torch.float32, device="cpu")
    labels = ["a320", "dc-9", "tu-154"]
    shots = [picture(x, i) for x in labels for i in range(3)], [x for x in labels for _ in range(3)]
    tests = [picture(x, i) for x in labels for i in (3, 4)]
    found = {}
    for name, settings in kinds().items():
        classifier = DiTiClassifier(backbone, concept="aircraft", **settings).fit(*shots)
        decisions = classifier.decide(tests)
        calibration, rows = classifier.calibration_, classifier.bank_.rows
        found[name] = {
            "rows": hashlib.sha256(rows.numpy().tobytes()).hexdigest(),
            "rows_norm": rows.double().norm().item(),
            "timesteps": list(calibration.timesteps),
            "weights": list(calibration.weights),
            "temperature": calibration.temperature,
            "accuracy": calibration.accuracy,
            "errors": classifier.errors(tests).flatten().tolist(),
            "scores": [decision.scores.tolist() for decision in decisions],
            "labels": classifier.predict(tests).tolist(),
            "evaluations": [decision.evaluations for decision in decisions],
        }
    torch.set_num_threads(threads)
    return found


def kinds() -> dict[str, dict[str, Any]]:
    """Settings of every kind: a schedule, a weighting, with features, with held-out shots, with prior images."""
    shipped = replace(SCORING, trials=12, timesteps=(0, 900), density="importance", weighting="relative")
    held_out = {"folds": 2, "temperature": "fit"}
    return {
        "exhaustive": {"training": TRAINING, "scoring": SCORING, "prediction": PREDICTION},
        "race with features": {
            "training": TRAINING,
            "scoring": replace(shipped, witnesses=("features",), witness_weights=(0.1,)),
            "prediction": PredictionConfig(schedule="racing", confidence=0.7),
        },
        "held out": {
            "training": TRAINING,
            "scoring": replace(shipped, witnesses=("features",), witness_weights=(0.1,), **held_out),
            "prediction": PredictionConfig(schedule="racing", shortlist=2),
        },
        "window from held-out shots": {
            "training": TRAINING,
            "scoring": replace(SCORING, trials=20, weighting="auto", **held_out),
            "prediction": PREDICTION,
        },
        "published": {
            "training": replace(TRAINING, prior_weight=1.0, prior_images=2, lr_schedule="cosine", blocks="medium"),
            "scoring": replace(SCORING, trials=20, weighting="tif_released"),
            "prediction": PredictionConfig(schedule="published", stages=((5, 2), (20, 1))),
        },
    }


if __name__ == "__main__":
    known = json.loads(FILE.read_text()) if FILE.is_file() else {}
    with tempfile.TemporaryDirectory() as temporary:
        known[PROCESSOR] = compute(Path(temporary) / "tiny-sd")
    FILE.write_text(json.dumps(known, indent=1) + "\n")
    sys.exit(0)
