"""`fewshot-diti add`, `info`, `export` and `import`, on a bank that `train` wrote."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from small_commands import CLASSES, save_classes, save_image
from test_classifier_failures import poison

from fewshot_diti import Bank, DiTiClassifier, cli
from fewshot_diti.bank_files import read_files, write_files

add_module = import_module("fewshot_diti.commands.add")  # whose function has its name
pytestmark = pytest.mark.usefixtures("quick_train")


@pytest.fixture
def copy(bank: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bank, tmp_path / "bank"))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_add_leaves_the_class_tokens_that_are_there_alone(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = Bank.from_pretrained(copy)
    images = [save_image(tmp_path / "new" / "axle" / f"{i}.png", 700 + i) for i in range(2)]
    assert cli.main(["add", str(copy), str(tmp_path / "new")]) == 0
    assert "Learned: axle (2 shots). The other 3 class tokens are as they were." in capsys.readouterr().out
    after = Bank.from_pretrained(copy)
    assert after.labels == ("axle", *CLASSES) and after.select(CLASSES) == before
    classifier = DiTiClassifier.from_pretrained(copy)
    assert classifier.predict_proba(images).shape == (2, 4)
    assert set(classifier.evidence(images)) == {"features", "class tokens"}


def test_add_learns_known_classes_anew_where_it_is_asked_to(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = Bank.from_pretrained(copy)
    for i in range(4):
        save_image(tmp_path / "new" / CLASSES[1] / f"{i}.png", 700 + i)
    unchanged = files(copy)
    assert cli.main(["add", str(copy), str(tmp_path / "new")]) == 2
    assert "are in the bank already; pass --more_shots" in capsys.readouterr().err
    assert files(copy) == unchanged
    command = ["add", str(copy), str(tmp_path / "new"), "--more_shots", "--output_dir", str(tmp_path / "larger")]
    assert cli.main(command) == 0
    assert files(copy) == unchanged
    after = Bank.from_pretrained(tmp_path / "larger")
    others = [CLASSES[0], CLASSES[2]]
    assert after.labels == CLASSES and after.select(others) == before.select(others)
    assert after.tokens[1].num_shots == 4 and not torch.equal(after.rows[1], before.rows[1])


def test_add_refuses_what_it_cannot_use_and_changes_nothing(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unchanged = files(copy)
    save_image(tmp_path / "new" / "axle" / "0.png", 700)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("")
    expected = {
        "There is no folder": ["add", str(copy), str(tmp_path / "nowhere")],
        "so no complete bank": ["add", str(tmp_path / "new"), str(tmp_path / "new")],
        "holds files": ["add", str(copy), str(tmp_path / "new"), "--output_dir", str(tmp_path / "full")],
        "but 'axle' has 1": ["add", str(copy), str(tmp_path / "new"), "--shots", "2"],
    }
    for text, command in expected.items():
        assert cli.main(command) == 2 and text in capsys.readouterr().err
    assert files(copy) == unchanged


def test_info_says_what_a_bank_holds_and_whether_its_backbone_is_here(
    bank: Path,
    backbone_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    capsys.readouterr()
    assert cli.main(["info", str(bank)]) == 0
    out = capsys.readouterr().out
    for text in (*CLASSES, "a photo of a hta bolt", "32 x 16 pixels, crop", "not cross-validated", "MB", "UTC"):
        assert text in out
    assert "witnesses features" in out and f"found as {backbone_folder}" in out
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # where it is not remembered
    assert cli.main(["info", str(bank)]) == 0
    assert "NOT on this machine" in capsys.readouterr().out
    Bank.from_pretrained(bank).save_pretrained(tmp_path / "alone")
    assert cli.main(["info", str(tmp_path / "alone")]) == 0
    assert "class tokens alone" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["diffusers", "kohya", "peft"])
def test_a_bank_is_exported_and_imported_again(
    bank: Path, backbone_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    capsys.readouterr()
    out = tmp_path / "loras"
    chosen = [CLASSES[0], CLASSES[2]]
    command = ["export", str(bank), "--output_dir", str(out), "--format", form]
    assert cli.main([*command, "--classes", *chosen]) == 0
    loaded = dict(line.split(": ") for line in capsys.readouterr().out.splitlines())
    assert list(loaded) == chosen
    assert cli.main([*command, "--classes", "rivet"]) == 2
    assert "Classes ['rivet'] are not in the bank" in capsys.readouterr().err
    prompt = Bank.from_pretrained(bank).tokens[0].prompt.replace(CLASSES[0], "{}")
    named = [f"{label}={path}" for label, path in loaded.items()]
    back = ["import", *named, "--prompt", prompt, "--backbone", str(backbone_folder), "--output_dir"]
    assert cli.main([*back, str(tmp_path / "again")]) == 0
    assert "2 class tokens in" in capsys.readouterr().out
    images = sorted(save_classes(tmp_path / "images", 1).glob("*/*.png"))
    with pytest.warns(UserWarning, match="without a classifier's settings"):
        again = DiTiClassifier.from_pretrained(tmp_path / "again")
    original = DiTiClassifier.from_pretrained(bank)
    original.remove_classes([CLASSES[1]])
    for classifier in (again, original):
        assert tuple(classifier.classes_) == tuple(chosen)
    predictions = [c.errors(images) for c in (again, original)]
    torch.testing.assert_close(*predictions, rtol=0, atol=1e-5)
    assert len(again.predict(images)) == 3
    assert cli.main([*back, str(tmp_path / "again")]) == 2
    assert "is there already; pass another --output_dir" in capsys.readouterr().err


def test_a_class_that_fails_when_it_is_learned_anew_is_not_lost(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, before = save_classes(tmp_path / "more", 3, seed=700), files(copy)
    poison(monkeypatch, lambda label, _: label == CLASSES[1])
    assert cli.main(["add", str(copy), str(data), "--more_shots"]) == 2
    assert f"The loss of {CLASSES[1]!r}" in capsys.readouterr().err and files(copy) == before


def test_a_bank_that_changes_while_a_class_is_added_is_kept(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("axle", "cam"):
        save_image(tmp_path / name / name / "0.png", 700)
    check, started = add_module.check_writable, []

    def meanwhile(folder: Path) -> None:
        if not started:
            started.append(folder)
            assert cli.main(["add", str(copy), str(tmp_path / "cam")]) == 0
        check(folder)

    monkeypatch.setattr(add_module, "check_writable", meanwhile)
    with pytest.warns(UserWarning, match="has changed meanwhile; the larger bank is in"):
        assert cli.main(["add", str(copy), str(tmp_path / "axle")]) == 0
    assert Bank.from_pretrained(copy).labels == (*CLASSES[:1], "cam", *CLASSES[1:])
    assert Bank.from_pretrained(f"{copy}_added").labels == ("axle", *CLASSES)


def test_a_bank_that_changes_while_it_is_loaded_loses_no_class(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("axle", "cam"):
        save_image(tmp_path / name / name / "0.png", 700)
    load, started = add_module.load_classifier, []

    def meanwhile(*arguments: Any) -> DiTiClassifier:
        loaded = load(*arguments)
        if not started:
            started.append(loaded)
            assert cli.main(["add", str(copy), str(tmp_path / "cam")]) == 0
        return loaded

    monkeypatch.setattr(add_module, "load_classifier", meanwhile)
    with pytest.warns(UserWarning, match="has changed meanwhile; the larger bank is in"):
        assert cli.main(["add", str(copy), str(tmp_path / "axle")]) == 0
    assert "cam" in Bank.from_pretrained(copy).labels
    output = tmp_path / "out"
    started.clear()
    monkeypatch.setattr(add_module, "load_classifier", load)
    assert cli.main(["add", str(copy), str(tmp_path / "axle"), "--output_dir", str(output)]) == 0
    assert "axle" in Bank.from_pretrained(output).labels and "axle" not in Bank.from_pretrained(copy).labels


@pytest.mark.parametrize(("name", "label"), [("7", 7), ("-4", -4), ("01", None), ("1_0", None), ("\uff13", None)])
def test_a_folder_is_a_number_where_the_labels_are_numbers(bank: Path, name: str, label: int | None) -> None:
    saved = Bank.from_pretrained(bank)
    numbered = replace(saved, tokens=tuple(replace(token, label=i) for i, token in enumerate(saved.tokens)))
    if label is None:
        with pytest.raises(ValueError, match="is none such"):
            numbered.as_label(name)
    else:
        assert numbered.as_label(name) == label


def test_score_reads_the_files_of_a_bank_once(
    bank: Path, shots: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    whole = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: (read.append(self.name), whole(self))[1])
    command = ["score", "--bank", str(bank), str(shots / CLASSES[0]), "--output", str(tmp_path / "out.jsonl")]
    assert cli.main(command) == 0
    assert read.count("class_tokens.safetensors") == read.count("witness-0.safetensors") == 1


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("settings", "scoring", "witnesses"), [5]),
        (("calibration", "accuracy"), "x"),
        (("models",), 5),
        (("prompts",), []),
    ],
)
def test_settings_that_no_version_writes_are_one_line(
    copy: Path, capsys: pytest.CaptureFixture[str], path: tuple[str, ...], value: object
) -> None:
    names = json.loads((copy / "manifest.json").read_text())["files"]
    contents = read_files(copy, names)
    at = tree = json.loads(contents["classifier.json"])
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    write_files(copy, contents | {"classifier.json": json.dumps(tree).encode()}, {})
    capsys.readouterr()
    assert cli.main(["info", str(copy)]) == 2
    assert str(copy) in (said := capsys.readouterr().err) and said.count("\n") == 1


def test_an_export_that_was_cut_short_before_its_first_file_is_completed(bank: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "bolt" / "unet").mkdir(parents=True)
    command = ["export", str(bank), "--output_dir", str(tmp_path / "out"), "--format", "peft", "--quiet"]
    assert cli.main(command) == 0
    assert (tmp_path / "out" / "bolt" / "unet" / "adapter_config.json").is_file()
