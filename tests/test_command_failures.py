"""What every command says of what it cannot use: one line, status 2, and nothing is changed."""

from __future__ import annotations

import shutil
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import save_tiny_backbone
from small_commands import CLASSES, save_classes, save_image, train_command

from fewshot_diti import Bank, cli

pytestmark = pytest.mark.usefixtures("quick_train")

HOSTILE = ("two words", "a/b", "..", "\u00fcber \u98de\u673a", "x" * 300, "[red]", "$(id)", "NUL")


@pytest.fixture(scope="module")
def place(bank: Path, backbone_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of things to go wrong with."""
    root = tmp_path_factory.mktemp("place")
    shutil.copytree(bank, root / "bank")
    shutil.copytree(backbone_folder, root / "sd")
    save_tiny_backbone(root / "other", seed=1)
    save_classes(root / "shots", 2)
    save_image(root / "single" / "bolt" / "0.png", 0)
    save_image(root / "new" / "axle" / "0.png", 1)
    for name in CLASSES[:2]:
        shutil.copytree(root / "shots" / name, root / "broken" / name)
        (root / "broken" / name / "1.png").write_bytes(b"no image")
    save_image(root / "twice" / unicodedata.normalize("NFC", "\u00e9") / "0.png", 0)
    save_image(root / "twice" / unicodedata.normalize("NFD", "\u00e9") / "0.png", 1)
    (root / "empty").mkdir()
    (root / "file.png").write_bytes(b"no image")
    (root / "mine").mkdir()
    (root / "mine" / "notes.txt").write_text("mine")
    (root / "explanations.jsonl").write_text("mine\n")
    (root / "mine.csv").write_text("mine\n")
    shutil.copytree(bank, root / "cut")
    (root / "cut" / "class_tokens.safetensors").write_bytes(b"")
    Bank.from_pretrained(bank).select(CLASSES[:1]).save_pretrained(root / "one")
    return root


def check(place: Path, data: str, *more: str) -> list[str]:
    return ["check", str(place / data), "--backbone", str(place / "sd"), "--concept", "part", *more]


def score(place: Path, bank: str, *images: str) -> list[str]:
    return ["score", "--bank", str(place / bank), "--output", str(place / "out.jsonl"), *images]


def explain(place: Path, bank: str, output: str, image: str = "shots/nut/0.png") -> list[str]:
    return ["explain", "--bank", str(place / bank), "--output_dir", str(place / output), str(place / image)]


def import_(place: Path, output: str, *files: str) -> list[str]:
    return ["import", *files, "--prompt", "a {}", "--backbone", str(place / "sd"), "--output_dir", str(place / output)]


FAILURES: dict[str, Callable[[Path], list[str]]] = {
    "check: There is no folder": lambda p: check(p, "nowhere"),
    "check: holds no class sub-folder": lambda p: check(p, "empty"),
    "check: ['bolt']; two or more": lambda p: check(p, "single"),
    "check: ['\u00e9']; two or more": lambda p: check(p, "twice"),
    "check: 2 of 4 images cannot be used": lambda p: check(p, "broken"),
    "check: nowhere": lambda p: check(p, "shots", "--backbone", str(p / "nowhere")),
    "check: no image file or folder": lambda p: check(p, "shots", "--unlabelled", str(p / "nowhere")),
    "check: concept is empty": lambda p: check(p, "shots", "--concept", " "),
    "train: 2 of 4 images cannot be used": lambda p: train_command(p / "broken", p / "sd", p / "bank"),
    "train: and no whole bank": lambda p: train_command(p / "shots", p / "sd", p / "mine"),
    "train: was changed or cut short": lambda p: train_command(p / "shots", p / "sd", p / "cut"),
    "train: ['\u00e9']; a classifier": lambda p: train_command(p / "twice", p / "sd", p / "bank"),
    "add: There is no folder": lambda p: ["add", str(p / "bank"), str(p / "nowhere")],
    "add: no complete bank": lambda p: ["add", str(p / "mine"), str(p / "new")],
    "add: was changed or cut short": lambda p: ["add", str(p / "cut"), str(p / "new")],
    "add: images cannot be used": lambda p: ["add", str(p / "bank"), str(p / "broken")],
    "add: was trained on backbone": lambda p: ["add", str(p / "bank"), str(p / "new"), "--backbone", str(p / "other")],
    "add: holds files": lambda p: ["add", str(p / "bank"), str(p / "new"), "--output_dir", str(p / "mine")],
    "add: can be written to": lambda p: ["add", str(p / "bank"), str(p / "new"), "--output_dir", str(p / "file.png")],
    "score: no image file or folder": lambda p: score(p, "bank", str(p / "nowhere")),
    "score: There is no folder": lambda p: score(p, "nowhere", str(p / "file.png")),
    "score: was changed or cut short": lambda p: score(p, "cut", str(p / "shots")),
    "score: no output of score": lambda p: score(p, "bank", str(p / "shots"), "--output", str(p / "mine.csv")),
    "score: ends in one of": lambda p: score(p, "bank", str(p / "shots"), "--output", "x.txt"),
    "explain: There is no folder": lambda p: explain(p, "nowhere", "why"),
    "explain: holds the classes ['bolt']": lambda p: explain(p, "one", "why"),
    "explain: no image file or folder": lambda p: explain(p, "bank", "why", "nowhere.png"),
    "explain: can be written to": lambda p: explain(p, "bank", "file.png"),
    "explain: and no output of explain": lambda p: explain(p, "bank", "."),
    "export: no complete bank": lambda p: ["export", str(p / "mine"), "--output_dir", str(p / "loras")],
    "export: was changed or cut short": lambda p: ["export", str(p / "cut"), "--output_dir", str(p / "loras")],
    "export: are not in the bank": lambda p: ["export", str(p / "bank"), "--output_dir", str(p), "--classes", "axle"],
    "export: holds a bank": lambda p: ["export", str(p / "bank"), "--output_dir", str(p / "bank"), "--format", "kohya"],
    "import: There is no LoRA file": lambda p: import_(p, "new-bank", "x=nowhere"),
    "import: no whole safetensors file": lambda p: import_(p, "new-bank", f"x={p / 'file.png'}"),
    "import: holds no LoRA": lambda p: import_(p, "new-bank", f"x={p / 'shots'}"),
    "import: names no class": lambda p: import_(p, "new-bank", f"={p / 'file.png'}"),
    "import: control characters": lambda p: import_(p, "new-bank", f"\x1b[31m={p / 'file.png'}"),
    "import: is there already": lambda p: import_(p, "mine", f"x={p / 'file.png'}"),
    "info: There is no folder": lambda p: ["info", str(p / "nowhere")],
    "info: is a file": lambda p: ["info", str(p / "file.png")],
    "info: was changed or cut short": lambda p: ["info", str(p / "cut")],
    "demo: nowhere": lambda p: ["demo", "--backbone", str(p / "nowhere"), "--output_dir", str(p / "demo")],
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_failure_is_one_line_and_changes_nothing(place: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = FAILURES[case](place)
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    capsys.readouterr()
    try:
        status = cli.main(command)
    except SystemExit as error:  # a value that the options refuse
        status = int(str(error.code))
    said = capsys.readouterr().err
    assert status == 2 and case.partition(": ")[2] in said
    assert "Traceback" not in said and "\x1b" not in said
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before


def test_classes_of_any_name_are_shown_exported_and_imported(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bank = Bank.from_pretrained(place / "bank")
    for part in (HOSTILE[:3], HOSTILE[3:6], (*HOSTILE[6:], "plain")):
        tokens = tuple(replace(token, label=name) for token, name in zip(bank.tokens, part, strict=True))
        shutil.rmtree(tmp_path / "bank", ignore_errors=True)
        replace(bank, tokens=tokens).save_pretrained(tmp_path / "bank")
        assert cli.main(["info", str(tmp_path / "bank")]) == 0
        for form in ("diffusers", "kohya", "peft"):
            out = tmp_path / f"{form}-{part[0][:3].replace('/', '')}"
            capsys.readouterr()
            command = ["export", str(tmp_path / "bank"), "--output_dir", str(out), "--format", form]
            assert cli.main(command) == 0
            loaded = dict(line.rsplit(": ", 1) for line in capsys.readouterr().out.splitlines())
            assert list(loaded) == list(part)
            assert all(Path(path).resolve().is_relative_to(out.resolve()) for path in loaded.values())
            made = {path: path.stat().st_size for path in out.rglob("*") if path.is_file()}
            next(iter(made)).unlink()  # as where it was killed
            assert cli.main(command) == 0
            assert {path: path.stat().st_size for path in out.rglob("*") if path.is_file()} == made
        again = import_(place, str(tmp_path / f"again-{part[0][:3].replace('/', '')}"))
        long = [name for name in part if len(name) > 100]  # more than the text encoder reads
        if long:
            assert cli.main([again[0], *(f"{name}={path}" for name, path in loaded.items()), *again[1:]]) == 2
            assert "tokens" in capsys.readouterr().err and not Path(again[-1]).exists()
        named = [f"{name}={path}" for name, path in loaded.items() if name not in long]
        assert cli.main([again[0], *named, *again[1:]]) == 0
        assert Bank.from_pretrained(again[-1]).labels == tuple(name for name in part if name not in long)
