"""LoRAs, checkpoints, representations and results that were damaged: refused by name, or made again; no traceback."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from hostile_files import DEEP, DROP, NOT_JSON, VALUES, damaged, edited, files_of, leaves, pickle_bombs, signed, write
from safetensors.torch import load, save
from small_grid import QUIET
from test_corrupt_banks import Offers, Record

from fewshot_diti import Backbone, Bank
from fewshot_diti.checkpoints import Checkpoint
from fewshot_diti.commands.evaluate import EvalConfig, evaluate
from fewshot_diti.data.images import ImageGeometry
from fewshot_diti.evaluation.grid import Grid
from fewshot_diti.lora_readers import import_lora
from fewshot_diti.prior_images import prior_latents
from fewshot_diti.prompts import Prompts
from fewshot_diti.representation.latents import kept_latents
from fewshot_diti.representation.methods import PdaeConfig
from fewshot_diti.representation.model import Representation


def test_a_damaged_lora_is_refused_or_read_as_plain_numbers(
    bank: Path, backbone: Backbone, tmp_path: Path, thorough: bool, record_property: Record
) -> None:
    """A LoRA file has no hash: other numbers in it are another LoRA. All else is one error that names the file."""
    exported = Bank.from_pretrained(bank).export("gear", tmp_path / "lora", "diffusers")
    files = {exported.name: exported.read_bytes()} if exported.is_file() else files_of(exported)
    files = {name: content for name, content in files.items() if name.endswith(".safetensors")}
    prompts = Prompts(template="a {}", generic="a part")

    def read(folder: Path) -> object:
        found = import_lora(backbone, {"gear": folder / "pytorch_lora_weights.safetensors"}, prompts)
        assert found.rows.isfinite().all()
        return found.rows.tolist()

    write(tmp_path / "whole", files)
    offer = Offers(tmp_path / "offered", read, read(tmp_path / "whole"))
    for what, changed in damaged(files | {"other": DEEP}, 3000 if thorough else 40):
        offer(what, changed, may_differ=True)
    (name,) = files
    tensors = load(files[name])
    first = min(tensors)
    for value in (torch.nan, torch.inf):
        offer(f"{first} {value}", {name: save(tensors | {first: tensors[first] * value})})
    for what, tensor in (
        ("int", tensors[first].long()),
        ("1-D", tensors[first].flatten()),
        ("empty", tensors[first][:0]),
    ):
        offer(f"{first} {what}", {name: save(tensors | {first: tensor.contiguous()})})
    for what, content in pickle_bombs(tmp_path / "ran").items():
        offer(what, {name: content})
    assert not (tmp_path / "ran").exists()
    record_property("of them other numbers", str(offer.tally["OTHER"]))
    offer.done(record_property)


def test_a_damaged_checkpoint_is_named_and_not_used(tmp_path: Path, thorough: bool, record_property: Record) -> None:
    checkpoint, state = Checkpoint(tmp_path / "checkpoints", "x"), {"rows": torch.arange(24.0).view(4, 6)}
    checkpoint.save(7, state)
    files, used, refused = files_of(tmp_path / "checkpoints"), 0, 0
    (name,) = files
    for _, changed in damaged(files | {"other": b"x"}, 5000 if thorough else 200):
        write(tmp_path / "checkpoints", changed)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = checkpoint.load()
        if changed.get(name) == files[name]:
            assert found is not None
        else:
            used += found is not None
            refused += any("is damaged and is not used" in str(x.message) for x in said)
    record_property("damaged", str(refused))
    record_property("used", str(used))
    assert used == 0 and refused


def test_a_damaged_representation_is_refused(
    backbone: Backbone, tmp_path: Path, thorough: bool, record_property: Record
) -> None:
    method = PdaeConfig(dims=8)
    Representation(
        backbone,
        method,
        method.build(backbone),
        prompt="a part",
        geometry=ImageGeometry(size=backbone.image_size),
        history={},
    ).save_pretrained(tmp_path / "saved")
    files = files_of(tmp_path / "saved")

    def read(folder: Path) -> object:
        found = Representation.from_pretrained(folder, backbone)
        weights = {name: value.sum().item() for name, value in found.network.state_dict().items()}
        return found.method, found.geometry, found.prompt, found.history, weights

    offer = Offers(tmp_path / "offered", read, read(tmp_path / "saved"))
    for what, changed in damaged(files, 2000 if thorough else 25):
        offer(what, changed)
    tree = json.loads(files["config.json"])
    for number, path in enumerate(leaves(tree)):
        for value in VALUES if thorough else VALUES[number % 5 :: 5]:
            what = f"config.json {path} = {'dropped' if value is DROP else value!r}"
            offer(what, signed(files | {"config.json": edited(tree, path, value)}), may_differ=True)
    for content in NOT_JSON:
        offer(f"config.json {content[:9]!r}", signed(files | {"config.json": content}))
    name = next(x for x in files if x.endswith(".safetensors"))
    tensors = load(files[name])
    first = min(tensors)
    for what, tensor in (
        ("NaN", tensors[first] * torch.nan),
        ("int8", tensors[first].to(torch.int8)),
        ("1-D", torch.ones(3)),
    ):
        offer(f"{first} {what}", signed(files | {name: save(tensors | {first: tensor})}))
    offer.done(record_property)


def test_damaged_caches_are_made_again(
    backbone: Backbone, tmp_path: Path, thorough: bool, record_property: Record
) -> None:
    """A prior image and the latents of a representation: what is used is what an undamaged cache holds."""
    whole = prior_latents(backbone, "a part", 1, backbone.image_size, cache=tmp_path / "prior")
    file = next((tmp_path / "prior").rglob("*.safetensors"))
    latents, wrong, tried = tmp_path / "latents" / "x.safetensors", 0, 0
    encoded = {"mean": torch.randn(3, 4, 2, 2), "std": torch.rand(3, 4, 2, 2)}
    first = kept_latents(latents, {"from": "here"}, lambda: encoded)
    contents = {file: file.read_bytes(), latents: latents.read_bytes()}
    for path, count in ((file, 60 if thorough else 4), (latents, 5000 if thorough else 100)):
        for _, changed in damaged({path.name: contents[path], "other": b"x"}, count):
            path.unlink(missing_ok=True)
            if path.name in changed:
                path.write_bytes(changed[path.name])
            tried += 1
            if path == file:
                found = prior_latents(backbone, "a part", 1, backbone.image_size, cache=tmp_path / "prior")
                wrong += not torch.equal(found, whole)
            else:
                again = kept_latents(latents, {"from": "here"}, lambda: encoded)
                wrong += again.fingerprint != first.fingerprint
    record_property("damaged", str(tried))
    record_property("believed", str(wrong))
    assert wrong == 0


def test_a_damaged_result_of_a_table_is_as_good_as_none(
    config: EvalConfig, small_settings: None, tmp_path: Path, thorough: bool, record_property: Record
) -> None:
    few = replace(config, methods=("zeroshot-clip",), shots=(1,))
    assert evaluate(few, QUIET) == 0
    grid = Grid(few)
    (run,) = grid.runs()
    whole, content, believed, none = grid.record(run), run.path.read_bytes(), 0, 0
    assert whole is not None
    deep = [("deep", {"x": DEEP}), *(("no record", {"x": x}) for x in NOT_JSON)]
    for _, changed in [*damaged({"x": content, "y": b"{}"}, 20_000 if thorough else 1000), *deep]:
        run.path.unlink(missing_ok=True)
        if "x" in changed:
            run.path.write_bytes(changed["x"])
        found = grid.record(run)
        none += found is None
        believed += found is not None and found != whole and set(found) <= set(whole)
    record_property("damaged, run again", none)
    record_property("believed", believed)
    assert believed == 0 and none
