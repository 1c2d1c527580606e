"""Nothing that is read can run code: no pickle, no shell, no code from a model's folder."""

from __future__ import annotations

import ast
import json
import resource
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hostile_files import DEEP, HEADER_BOMBS, pickle_bombs

import fewshot_diti
from fewshot_diti import Backbone, Bank
from fewshot_diti.baselines.clip import OpenClip
from fewshot_diti.baselines.imagenet import ImageNetwork
from fewshot_diti.checkpoints import Checkpoint
from fewshot_diti.data import Shots, import_path_list, load_images
from fewshot_diti.files import shipped
from fewshot_diti.kept_tensors import keep_tensors, kept_tensors
from fewshot_diti.lora_readers import import_lora
from fewshot_diti.prompts import Prompts

ROOT = Path(fewshot_diti.__file__).parents[1]
FORBIDDEN_NAMES = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_CALLS = {  # module, function
    *(("torch", "load"), ("np", "load"), ("numpy", "load"), ("joblib", "load"), ("yaml", "load"), ("marshal", "loads")),
    *((module, name) for module in ("pickle", "cPickle", "dill", "cloudpickle") for name in ("load", "loads")),
    *(("os", name) for name in ("system", "popen", "execv", "execvp", "spawnl", "spawnv")),
}
FORBIDDEN_ARGUMENTS = ("shell", "trust_remote_code", "allow_pickle")
# of an installed package, whose code runs anyway; torch then makes tensors and nothing else of the file
WEIGHTS_OF_A_PACKAGE = "torch.load(weights, weights_only=True)"
PICKLES = {"pickle": {"UnpicklingError"}}  # what may be imported: the error that torch raises for a pickle


def test_the_source_unpickles_nothing_and_runs_no_text(record_property: Callable[[str, object], None]) -> None:
    files = [p for folder in ("fewshot_diti", "recipes", "eval") for p in sorted((ROOT / folder).rglob("*.py"))]
    found = [f"{path}:{line}: {what}" for path in files for line, what in _forbidden(path.read_text(encoding="utf-8"))]
    record_property("modules searched", len(files))
    record_property("found", len(found))
    assert len(files) > 100 and not found, found


def test_the_search_finds_what_it_looks_for() -> None:
    lines = (
        "torch.load(x)",
        "pickle.loads(x)",
        "import pickle",
        "from pickle import loads",
        "os.system(x)",
        "run(x, shell=True)",
        "eval(x)",
        "exec(x)",
        "load(x, trust_remote_code=True)",
        "torch.load(x, weights_only=False)",
    )
    assert all(list(_forbidden(line)) for line in lines)
    assert not list(_forbidden("model.eval()\nload(x, use_safetensors=True)\nfrom pickle import UnpicklingError"))


def _forbidden(source: str) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for name in node.names:
                if name.name in ("pickle", "dill", "marshal", "shelve"):
                    yield node.lineno, f"import {name.name}"
        elif isinstance(node, ast.ImportFrom) and node.module in ("pickle", "dill", "marshal", "shelve"):
            names = {x.name for x in node.names} - PICKLES.get(node.module, set())
            yield from [(node.lineno, f"from {node.module} import {name}") for name in sorted(names)]
        elif isinstance(node, ast.Call):
            function = node.func
            if isinstance(function, ast.Name) and function.id in FORBIDDEN_NAMES:
                yield node.lineno, function.id
            named = isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name)
            plain = ast.unparse(node) == WEIGHTS_OF_A_PACKAGE
            if named and (function.value.id, function.attr) in FORBIDDEN_CALLS and not plain:
                yield node.lineno, f"{function.value.id}.{function.attr}"
            for keyword in node.keywords:
                value = keyword.value
                if keyword.arg in FORBIDDEN_ARGUMENTS and not (
                    isinstance(value, ast.Constant) and value.value is False
                ):
                    yield node.lineno, f"{keyword.arg}="


def test_what_is_no_data_is_refused_wherever_a_file_is_read(
    backbone: Backbone, backbone_folder: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Pickles, archives of torch.save, deep JSON, and safetensors whose header says that it is huge."""
    touched, offers, wrong = tmp_path / "code ran", 0, []
    contents = pickle_bombs(touched) | {"deep JSON": DEEP, "text": b"hello", "empty": b""}
    contents |= {f"header of {int.from_bytes(x[:8], 'little')} bytes": x for x in HEADER_BOMBS}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for what, content in contents.items():
        for where, read in _readers(backbone, backbone_folder, tmp_path / "offered", content).items():
            offers += 1
            try:
                if read() is not None:
                    wrong.append(f"{where}, {what}: taken")
            except (ValueError, OSError) as error:
                if "\n" in str(error).strip() or not str(error):
                    wrong.append(f"{where}, {what}: {str(error)[:200]!r} is not one line")
            except Exception as error:
                wrong.append(f"{where}, {what}: {type(error).__name__} {str(error)[:200]}")
            if touched.exists():
                wrong.append(f"{where}, {what}: CODE RAN")
                touched.rmdir()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    record_property("offers", offers)
    record_property("code ran", sum("CODE RAN" in x for x in wrong))
    record_property("memory grown, in MB", grown)
    assert not wrong, "\n".join(wrong)
    assert grown < 2000


def _readers(backbone: Backbone, folder: Path, place: Path, content: bytes) -> dict[str, Callable[[], object]]:
    """Everything that reads a file, with the content in place of that file; what gives None takes it for no file."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    readers: dict[str, Callable[[], object]] = {}

    def file(name: str) -> Path:
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    def backbone_with(part: str, name: str, drop: bool) -> Path:
        copied = place / f"{part} {name}"
        shutil.copytree(folder, copied)
        for weights in (copied / part).glob("*.safetensors") if drop else ():
            weights.unlink()
        (copied / part / name).write_bytes(content)
        return copied

    places = [
        ("unet", "diffusion_pytorch_model.bin", True),
        ("unet", "diffusion_pytorch_model.safetensors", True),
        ("text_encoder", "pytorch_model.bin", True),
        ("vae", "config.json", False),
        ("tokenizer", "tokenizer.json", False),
        ("scheduler", "scheduler_config.json", False),
    ]
    for part, name, drop in places:
        copied = backbone_with(part, name, drop)
        readers[f"backbone {part}/{name}"] = lambda copied=copied: Backbone.from_pretrained(copied, device="cpu")
    for suffix in (".pkl", ".txt", ".data", ".json"):
        path = file(f"split{suffix}")
        readers[f"split{suffix}"] = lambda path=path: import_path_list(path, place)
    for suffix in (".csv", ".json", ".jsonl"):
        path = file(f"manifest{suffix}")
        readers[f"manifest{suffix}"] = lambda path=path: load_images(f"manifest:{path}")
    shots, bank, lora = file("shots.json"), file("bank/manifest.json").parent, file("lora.safetensors")
    peft = file("peft/adapter_model.safetensors").parent
    (peft / "adapter_config.json").write_bytes(content)
    readers["shots"] = lambda: Shots.load(shots)
    readers["bank"] = lambda: Bank.from_pretrained(bank)
    for path in (lora, peft):
        readers[f"LoRA {path.name}"] = lambda path=path: import_lora(
            backbone, {"a": path}, Prompts(template="a photo of a {}", generic="a photo")
        )
    checkpoint = Checkpoint(place / "checkpoints", "x")
    checkpoint.save(1, {"x": torch.zeros(2)})
    next((place / "checkpoints").glob("*.safetensors")).write_bytes(content)

    def load_checkpoint() -> object:
        with pytest.warns(UserWarning, match="is damaged and is not used"):
            return checkpoint.load()

    readers["checkpoint"] = load_checkpoint
    kept = file("kept.safetensors")
    readers["kept tensors"] = lambda: kept_tensors(kept, {})
    network, clip = place / "network", place / "clip"
    shutil.copytree(shipped("pocket-siblings"), network)
    (network / "model.safetensors").write_bytes(content)
    readers["network"] = lambda: ImageNetwork(f"local-dir:{network}")
    shutil.copytree(shipped("pocket-clip"), clip, ignore=shutil.ignore_patterns("*.safetensors"))
    (clip / "open_clip_pytorch_model.bin").write_bytes(content)
    readers["CLIP .bin"] = lambda: OpenClip(f"local-dir:{clip}")
    safe = place / "safe clip"
    shutil.copytree(shipped("pocket-clip"), safe)
    next(safe.glob("*.safetensors")).write_bytes(content)
    readers["CLIP .safetensors"] = lambda: OpenClip(f"local-dir:{safe}")
    return readers


def test_an_archive_that_unpacks_to_a_gigabyte_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.data", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(2**28))
    with pytest.raises(ValueError, match="unpacks to more than"):
        import_path_list(tmp_path / "x.data", tmp_path)


def test_code_in_the_folder_of_a_backbone_is_not_run(backbone_folder: Path, tmp_path: Path) -> None:
    touched, folder = tmp_path / "ran", tmp_path / "backbone"
    shutil.copytree(backbone_folder, folder)
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "evil.Evil", "CLIPTextModel": "evil.Evil"}
    (folder / "text_encoder" / "config.json").write_text(json.dumps(config))
    for place in (folder, folder / "text_encoder", folder / "unet"):
        (place / "evil.py").write_text(f"import os\nos.mkdir({str(touched)!r})\nclass Evil: pass\n")
    Backbone.from_pretrained(folder, device="cpu")
    assert not touched.exists()


def test_tensors_that_are_kept_are_given_back_to_the_bit_and_not_where_they_are_damaged(
    tmp_path: Path, thorough: bool, record_property: Callable[[str, object], None]
) -> None:
    path, tensors = tmp_path / "kept.safetensors", {"a": torch.randn(5, 7), "b": torch.arange(9)}
    keep_tensors(path, tensors, {"from": "here"})
    content, step = path.read_bytes(), 1 if thorough else 11
    found = kept_tensors(path, {"from": "here"})
    assert found is not None and all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert kept_tensors(path, {"from": "there"}) is None and kept_tensors(tmp_path / "none", {}) is None
    believed = 0
    for at in range(0, len(content), step):
        for bit in range(8):
            path.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
            found = kept_tensors(path, {"from": "here"})
            believed += found is not None and not all(torch.equal(found[n], x) for n, x in tensors.items())
        path.write_bytes(content[:at])
        believed += kept_tensors(path, {"from": "here"}) is not None
    record_property("bits flipped and cuts", len(range(0, len(content), step)) * 9)
    record_property("believed", believed)
    assert believed == 0
