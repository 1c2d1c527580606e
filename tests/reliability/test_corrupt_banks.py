"""Banks that were damaged or forged: one error that names the folder or the file, never other labels in silence."""

from __future__ import annotations

import json
import math
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hostile_files import (
    DEEP,
    DROP,
    HEADER_BOMBS,
    NOT_JSON,
    VALUES,
    Files,
    damaged,
    edited,
    files_of,
    leaves,
    pickle_bombs,
    signed,
    write,
)
from safetensors.torch import load, save

from fewshot_diti import Backbone, DiTiClassifier

Record = Callable[[str, object], None]


class Offers:
    """Offers folders to a reader, and counts what comes of them."""

    def __init__(self, folder: Path, read: Callable[[Path], object], right: object) -> None:
        self.folder, self.read, self.right = folder, read, right
        self.tally: Counter[str] = Counter()
        self.wrong: list[str] = []
        folder.mkdir(exist_ok=True)

    def __call__(self, what: str, files: Files, *, may_differ: bool = False) -> None:
        write(self.folder, files)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = "the same" if self.read(self.folder) == self.right else "OTHER"
        except (ValueError, OSError) as error:
            named = any(x in str(error) for x in (str(self.folder), "Class token ", "The witness ", "backbone "))
            found = "refused" if named else f"NAMES NOTHING: {error}"
        except Exception as error:
            found = f"TRACEBACK {type(error).__name__}: {error}"
        self.tally[found.split(" ")[0].rstrip(":")] += 1
        if found not in ("refused", "the same") and not (may_differ and found == "OTHER"):
            self.wrong.append(f"{what}: {found[:300]}")

    def done(self, record_property: Record) -> None:
        record_property("files offered", self.tally.total())
        record_property("refused", self.tally["refused"])
        record_property("wrong labels", self.tally["OTHER"] if self.wrong else 0)
        assert not self.wrong, f"{len(self.wrong)} wrong:\n" + "\n".join(self.wrong)


@pytest.fixture(scope="module")
def read(backbone: Backbone, shots: Path) -> Callable[[Path], object]:
    """Labels and scores of two images by the bank in a folder."""
    images = [shots / "bolt" / "0.png", shots / "nut" / "1.png"]

    def predictions(folder: Path) -> object:
        classifier = DiTiClassifier.from_pretrained(folder, backbone)
        return [(str(d.position), classifier.classes_.tolist(), d.scores.tolist()) for d in classifier.decide(images)]

    return predictions


@pytest.fixture
def offer(read: Callable[[Path], object], bank: Path, tmp_path: Path) -> Offers:
    return Offers(tmp_path / "offered", read, read(bank))


def test_a_damaged_bank_is_refused_by_name(offer: Offers, bank: Path, thorough: bool, record_property: Record) -> None:
    for what, files in damaged(files_of(bank), 20_000 if thorough else 150):
        offer(what, files)
    offer.done(record_property)


def test_no_bit_of_a_manifest_can_be_flipped_in_silence(
    offer: Offers, bank: Path, thorough: bool, record_property: Record
) -> None:
    files = files_of(bank)
    content = files["manifest.json"]
    for at in range(0, len(content), 1 if thorough else 23):
        for bit in range(8) if thorough else (0, 5):
            flipped = content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]
            offer(f"manifest bit {at}.{bit} {content[max(0, at - 9) : at + 9]!r}", files | {"manifest.json": flipped})
    offer.done(record_property)


@pytest.mark.parametrize("name", ["bank.json", "config.json", "classifier.json"])
def test_a_forged_field_is_refused_or_makes_another_whole_bank(
    offer: Offers, bank: Path, name: str, thorough: bool, record_property: Record
) -> None:
    """With the manifest made anew. A value that a bank could hold makes another bank; of another type it is refused."""
    files = files_of(bank)
    tree = json.loads(files[name])
    # of the many adapted layers two are enough
    places = [p for p in leaves(tree) if len(p) < 2 or p[0] != "targets" or p[1] in (0, 90)]
    for number, path in enumerate(places if thorough else places[:: max(1, len(places) // 12)]):
        at = tree
        for key in path:
            at = at[key]
        for value in VALUES if thorough else [VALUES[number % len(VALUES)], VALUES[(number + 5) % len(VALUES)]]:
            offer(
                f"{name} {path} = {'dropped' if value is DROP else value!r}",
                signed(files | {name: edited(tree, path, value)}),
                may_differ=_same_kind(value, at),
            )
    for content in NOT_JSON:
        offer(f"{name} {content[:9]!r}", signed(files | {name: content}))
    for path in [(), *(p for p in places if isinstance(_at(tree, p), dict))]:
        changed = json.loads(json.dumps(tree))
        if isinstance(inside := _at(changed, path), dict):
            inside["unknown field"] = 1
            offer(f"{name} {path} with an unknown field", signed(files | {name: json.dumps(changed).encode()}))
    offer.done(record_property)


def test_settings_that_lack_a_field_or_leave_the_schedule_are_refused(offer: Offers, bank: Path) -> None:
    files = files_of(bank)
    tree = json.loads(files["classifier.json"])
    scoring, late = ("settings", "scoring"), 10**12
    for path, value in (
        ((*scoring, "timesteps"), DROP),
        ((*scoring, "timesteps"), None),
        ((*scoring, "weighting"), DROP),
        ((*scoring, "witness_weights"), DROP),
        ((*scoring, "timesteps", 1), late),
        (("settings", "training", "timesteps", 1), late),
        (("calibration", "timesteps", 0), 1000),
    ):
        offer(f"{path} {value}", signed(files | {"classifier.json": edited(tree, path, value)}))
    assert offer.tally == {"refused": 7}, offer.wrong


def _at(tree: object, path: tuple) -> object:
    for key in path:
        tree = tree[key]  # type: ignore[index]
    return tree


def _same_kind(value: object, before: object) -> bool:
    """Whether a value may stand where the other does: a finite number for a number, a text for a text."""
    numbers = [type(x) in (int, float) for x in (value, before)]
    if all(numbers):
        return math.isfinite(value)  # type: ignore[arg-type]
    return type(value) is type(before) or value is DROP or value is None


def test_forged_weights_are_refused(offer: Offers, bank: Path, tmp_path: Path, record_property: Record) -> None:
    files, touched = files_of(bank), tmp_path / "ran"
    for name in ("class_tokens.safetensors", "witness-0.safetensors"):
        whole, tensors = files[name], load(files[name])
        first = min(tensors)
        changes = {
            "int64": lambda x: x.long(),
            "int8": lambda x: x.to(torch.int8),
            "bool": lambda x: x.bool(),
            "complex": lambda x: x.to(torch.complex64),
            "1-D": lambda x: x.flatten(),
            "no rows": lambda x: x[:0],
            "no columns": lambda x: x[..., :0],
            "fewer columns": lambda x: x[..., :-1],
            "one row more": lambda x: torch.cat([x, x[:1]]),
            "NaN": lambda x: x * torch.nan,
            "Inf": lambda x: x + torch.inf,
            "a dimension more": lambda x: x[None],
        }
        for what, change in changes.items():
            one = tensors | {first: change(tensors[first]).contiguous()}
            offer(f"{name} {first} {what}", signed(files | {name: save(one)}), may_differ=what == "one row more")
            all_of_them = {key: change(tensor).contiguous() for key, tensor in tensors.items()}
            offer(f"{name} {what}", signed(files | {name: save(all_of_them)}), may_differ=what == "one row more")
        offer(f"{name} without {first}", signed(files | {name: save({k: v for k, v in tensors.items() if k != first})}))
        offer(f"{name} other key", signed(files | {name: save({"x": torch.zeros(3)})}))
        for what, content in {**pickle_bombs(touched), "cut": whole[:-9], "empty": b"", "JSON": b"{}"}.items():
            offer(f"{name} {what}", signed(files | {name: content}))
        for bomb in HEADER_BOMBS:
            offer(f"{name} header {bomb[:8]!r}", signed(files | {name: bomb + whole[8:]}))
    assert not touched.exists()
    offer.done(record_property)


def test_a_forged_manifest_is_refused(offer: Offers, bank: Path, record_property: Record) -> None:
    files = files_of(bank)
    manifest = json.loads(files["manifest.json"])
    for value in VALUES:
        for path in leaves(manifest):
            if path[-1] != "size" and path != ("checksum",):  # a size is there for messages; 0.4 wrote no checksum
                offer(f"manifest {path} = {value!r}", files | {"manifest.json": edited(manifest, path, value)})
    names = {name: {"sha256": "../../../../etc", "size": 1} for name in manifest["files"]}
    for content in (DEEP, *NOT_JSON, json.dumps({"format": 2, "files": names}).encode()):
        offer(f"manifest {content[:9]!r}", files | {"manifest.json": content})
    offer.done(record_property)
