"""What the page's tabs compute, without the page."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from small_page import CLASSES, LONG, STRANGE, pictures_of, save_bank, save_results

from fewshot_diti import Backbone, Bank, DiTiClassifier, cli
from fewshot_diti.app import classes, classify, results, timesteps
from fewshot_diti.app.banks import Banks, ServedBank
from fewshot_diti.app.events import Context
from fewshot_diti.app.guard import own_folder, sentence
from fewshot_diti.app.timesteps import TRIALS, KeptErrors
from fewshot_diti.bank_files import bank_fingerprint
from fewshot_diti.classifier_files import read_classifier
from fewshot_diti.commands.app import demo_bank
from fewshot_diti.commands.demo import DemoConfig
from fewshot_diti.progress import Progress, reported_to

pytestmark = pytest.mark.usefixtures("quick_train")


@pytest.fixture(scope="module")
def whole(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> ServedBank:
    return save_bank(backbone, tmp_path_factory.mktemp("served") / "planes")


@pytest.fixture
def bank(whole: ServedBank, tmp_path: Path) -> ServedBank:
    """One that a test may change."""
    return ServedBank(Path(shutil.copytree(whole.folder, tmp_path / "planes")), whole.classifier, whole.fingerprint)


def ignore(share: float, text: str) -> None:
    assert 0 <= share <= 1 and text


def test_a_picture_is_answered_with_what_the_classifier_gives(whole: ServedBank) -> None:
    (path,) = pictures_of("A320", 1)
    shares: list[float] = []
    answer = classify.classify(whole.classifier, Path(path), lambda share, _: shares.append(share))
    classifier = whole.classifier
    best = float(np.max(classifier.predict_proba(path)))
    assert f"{100 * best:.1f} %" in answer.label and answer.label.count('class="bar"') == len(CLASSES)
    assert classifier.is_unknown(path) == ("None of these" in answer.label)
    assert answer.reasons.count("similarity") == 3 * 2 and answer.reasons.count("data:image/png") == 2
    assert shares == sorted(shares) and len(shares) > 2


def test_a_picture_like_none_of_the_shots_is_none_of_these(
    whole: ServedBank, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = Path(pictures_of("A320", 1)[0])
    for unknown in (True, False):
        monkeypatch.setattr(DiTiClassifier, "is_unknown", lambda *_, unknown=unknown: np.array([unknown]))
        head = classify.classify(whole.classifier, path, ignore).label
        assert ("<h2" in head) and ("None of these" in head) == unknown


def test_names_of_classes_are_escaped_and_cut(whole: ServedBank) -> None:
    answer = classify.classify(whole.classifier, Path(pictures_of("A320", 1)[0]), ignore)
    listed = classes.show_list([(STRANGE, pictures_of("747-8", 1)), (LONG, [])])
    for html in (answer.label + answer.reasons, listed):
        assert "<img src=x" not in html and "&lt;img src=x" in html
        assert f">{LONG[:59]}\u2026<" in html and f'title="{LONG}"' in html


def test_a_class_goes_on_the_list_with_its_pictures() -> None:
    some, more = pictures_of("747-8", 2), pictures_of("747-8", 4)
    listed = classes.put_on_list([], " Jumbo e\u0301 ", some)
    assert listed == [("Jumbo \u00e9", some)]
    assert classes.put_on_list(listed, "Jumbo \u00e9", more) == [("Jumbo \u00e9", more)]
    assert "<td>2</td>" in classes.show_list(listed) and classes.show_list(listed).count("<img") == 2


def test_pictures_that_are_on_the_list_twice_are_named(tmp_path: Path) -> None:
    first, second, third = pictures_of("747-8", 3)
    again = tmp_path / "holiday.jpg"
    Image.open(first).convert("RGB").save(again, quality=90)
    shutil.copy(second, tmp_path / "<b>same.png")
    assert "One picture twice" not in classes.show_list([("Jumbo", [first, second]), ("Other", [third])])
    shown = classes.show_list([("Jumbo", [first, second, str(again)]), ("Other", [str(tmp_path / "<b>same.png")])])
    assert f"holiday.jpg of Jumbo and {Path(first).name} of Jumbo" in shown
    assert f"&lt;b&gt;same.png of Other and {Path(second).name} of Jumbo" in shown


def test_what_cannot_go_on_the_list_is_refused_in_one_sentence(tmp_path: Path) -> None:
    broken = tmp_path / "0123" / "holiday.png"
    broken.parent.mkdir()
    broken.write_text("no picture")
    some = pictures_of("747-8", 1)
    for name, paths, text in (
        (" ", some, "no name yet"),
        ("Jumbo", [], "no pictures of 'Jumbo'"),
        ("a\u202eb", some, "control characters"),
        ("Jumbo", [*some, str(broken)], "holiday.png is not an image of a known format"),
        ("Jumbo", [f"{i}.png" for i in range(65)], "up to 64"),
    ):
        with pytest.raises((ValueError, OSError), match=text) as caught:
            classes.put_on_list([], name, paths)
        assert "\n" not in sentence(caught.value, tmp_path) and str(tmp_path) not in sentence(caught.value, tmp_path)


def test_added_classes_are_saved_and_leave_the_others_alone(bank: ServedBank) -> None:
    before = Bank.from_pretrained(bank.folder)
    old = bank.classifier
    shares: list[float] = []
    listed = classes.put_on_list([], "747-8", pictures_of("747-8", 2))
    told = classes.add_to_bank(bank, listed, lambda share, _: shares.append(share))
    assert "747-8 (2 pictures)" in told and "has 5 classes" in told and str(bank.folder) in told
    assert re.search(r"Of the 2 added pictures, held out in turn, [012] are right", told)
    after = Bank.from_pretrained(bank.folder)
    assert after.labels == tuple(sorted((*CLASSES, "747-8"))) and after.select(before.labels) == before
    assert bank.classifier.classes_.tolist() == list(after.labels) and len(old.classes_) == len(CLASSES)
    assert bank.fingerprint == bank_fingerprint(bank.folder) and shares[-1] == 1
    with pytest.raises(ValueError, match="are in the bank already"):
        classes.add_to_bank(bank, listed, ignore)


def test_nothing_is_lost_where_a_class_cannot_be_added(bank: ServedBank, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {path.name: path.read_bytes() for path in bank.folder.iterdir() if path.is_file()}
    with pytest.raises(ValueError, match="list is empty"):
        classes.add_to_bank(bank, [], ignore)
    with pytest.raises(FileNotFoundError):
        classes.add_to_bank(bank, [("747-8", ["gone.png"])], ignore)
    assert {path.name: path.read_bytes() for path in bank.folder.iterdir() if path.is_file()} == files
    listed = [("747-8", pictures_of("747-8", 2))]
    with monkeypatch.context() as patch:
        patch.setattr(DiTiClassifier, "save_pretrained", lambda *_: (_ for _ in ()).throw(OSError("No space left")))
        with pytest.raises(OSError, match=r"in use until the page ends, but could not be saved .*No space left"):
            classes.add_to_bank(bank, listed, ignore)
    assert "747-8" in bank.classifier.classes_
    assert {path.name: path.read_bytes() for path in bank.folder.iterdir() if path.is_file()} == files
    classes.add_to_bank(bank, [("737-300", pictures_of("737-300", 2))], ignore)
    assert {"747-8", "737-300"} < set(Bank.from_pretrained(bank.folder).labels)


def test_a_bank_that_another_program_changed_is_not_overwritten(bank: ServedBank) -> None:
    DiTiClassifier.from_pretrained(bank.folder, bank.classifier.backbone_).remove_classes([LONG]).save_pretrained(
        bank.folder
    )
    with pytest.raises(ValueError, match="changed by another program"):
        classes.add_to_bank(bank, [("747-8", pictures_of("747-8", 2))], ignore)


def test_what_another_program_saves_while_a_class_is_learned_is_kept(
    bank: ServedBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = DiTiClassifier.add_classes

    def meanwhile(self: DiTiClassifier, *images: Any, **options: Any) -> DiTiClassifier:
        other = DiTiClassifier.from_pretrained(bank.folder, bank.classifier.backbone_)
        other.remove_classes([LONG]).save_pretrained(bank.folder)
        return whole(self, *images, **options)

    monkeypatch.setattr(DiTiClassifier, "add_classes", meanwhile)
    with pytest.raises(ValueError, match="changed by another program"):
        classes.add_to_bank(bank, [("747-8", pictures_of("747-8", 2))], ignore)
    assert LONG not in Bank.from_pretrained(bank.folder).labels


def test_a_new_bank_is_saved_and_has_a_held_out_accuracy_where_it_is_asked_for(
    whole: ServedBank, tmp_path: Path
) -> None:
    banks = Banks(whole)
    listed = [(name, pictures_of(name, 3)) for name in ("747-8", "ATR-72")]
    for name, checked in (("my planes/..", True), ("plain", False)):
        folder = classes.folder_of(tmp_path, name)
        assert folder.parent == tmp_path
        made, told = classes.make_bank(banks, whole, folder, "aircraft", listed, checked, ignore)
        _, saved, _ = read_classifier(folder)
        assert saved is not None and (saved.calibration.accuracy is not None) == checked
        expected = f"{100 * saved.calibration.accuracy:.1f} % of 6" if checked else "not cross-validated"
        assert expected in told and banks[made].classifier.classes_.tolist() == ["747-8", "ATR-72"]
    assert banks.names == ["planes", "my_planes_", "plain"]
    assert banks.add(banks["plain"]) == "plain (2)"
    for arguments, text in (
        ((folder, "aircraft", listed), "there already"),
        ((tmp_path / "other", "aircraft", listed[:1]), "two classes or more"),
        ((tmp_path / "other", " ", listed), "what all classes are"),
    ):
        with pytest.raises(ValueError, match=text):
            classes.make_bank(banks, whole, *arguments, False, ignore)
    with pytest.raises(ValueError, match="no name"):
        classes.folder_of(tmp_path, "  ")
    with pytest.raises(ValueError, match="no bank of that name"):
        banks["another"]


def test_results_are_read_filtered_and_drawn(tmp_path: Path) -> None:
    folder = save_results(tmp_path)
    place = folder / "bundled" / "tiny" / "none"
    (place / "finetune" / "16-1.json").write_text("{")
    (place / "finetune" / "8-1.json").write_text(json.dumps({"status": "failed", "error": "no memory"}))
    read = results.read_results(folder)
    assert list(read) == ["bundled / tiny / none"]
    cells = read["bundled / tiny / none"]
    assert results.methods_of(cells) == ["fewshot-diti", "finetune"] and results.shots_of(cells) == [1, 4]
    lines, pictures = results.show(cells, ["finetune"], [4])
    assert "| finetune | **51.5 \u00b1 0.7** |" in lines and "fewshot-diti" not in lines and "1 shot" not in lines
    assert pictures.count("data:image/png") == 2
    assert "Choose a method" in results.show(cells, [], [4])[1]
    with pytest.raises(ValueError, match="holds no results"):
        results.read_results(place / "finetune" / "nowhere")


def test_a_window_of_timesteps_decides_as_the_class_tokens_do_on_its_trials(bank: ServedBank) -> None:
    errors = KeptErrors()
    assert errors.restore(bank) is None
    kept = errors.compute(bank, ignore)
    assert kept.errors_NCS.shape == (2 * timesteps.PER_CLASS, len(CLASSES), TRIALS)
    low, high = 5, 9
    expected = kept.errors_NCS[:, :, low:high].double().mean(2).argmin(1).numpy()
    np.testing.assert_array_equal(kept.predicted(low, high), expected)
    assert kept.accuracy(low, high) == (expected == kept.truth_N).mean()
    step = kept.num_timesteps // TRIALS
    html = timesteps.show(kept, high * step, low * step)
    right = int((expected == kept.truth_N).sum())
    assert f"{right} of {len(expected)} test images with {low * step} \u2264 t &lt; {high * step}" in html
    assert html.count('class="cell right"') == right and "<img src=x" not in html
    with pytest.raises(ValueError, match="window is empty"):
        timesteps.show(kept, 300, 300)


def test_errors_are_kept_beside_the_bank_until_it_changes(bank: ServedBank, monkeypatch: pytest.MonkeyPatch) -> None:
    first = KeptErrors().compute(bank, ignore)
    file = bank.folder.with_name("planes_cache") / "timesteps.safetensors"
    assert torch.equal(load_file(file)["errors"], first.errors_NCS)
    with monkeypatch.context() as patch:
        patch.setattr(timesteps, "error_tensor", lambda *_: pytest.fail("computed again"))
        errors = KeptErrors()
        again = errors.compute(bank, ignore)
        patch.setattr(timesteps, "test_images", lambda _: pytest.fail("looked for images again"))
        assert errors.restore(bank) is again
    assert torch.equal(again.errors_NCS, first.errors_NCS)
    classes.add_to_bank(bank, [("747-8", pictures_of("747-8", 2))], ignore)
    assert KeptErrors().restore(bank) is None


def test_a_bank_of_other_classes_has_no_test_images(whole: ServedBank) -> None:
    few = DiTiClassifier.from_pretrained(whole.folder, whole.classifier.backbone_).remove_classes(["A319"])
    with pytest.raises(ValueError, match="fewer than two of these classes"):
        timesteps.test_images(few)


def test_progress_is_reported_to_a_listener_of_the_same_context() -> None:
    heard: list[tuple[str, int, int]] = []
    with reported_to(lambda *values: heard.append(values)), Progress(3, "steps", "step") as bar:
        bar.update()
        bar.update(2)
    with Progress(1, "others", "step") as bar:
        bar.update()
    assert heard == [("steps", 1, 3), ("steps", 3, 3)]


def test_the_page_has_a_folder_of_its_own_that_is_gone_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRADIO_TEMP_DIR", raising=False)
    with own_folder() as folder:
        assert os.environ["GRADIO_TEMP_DIR"] == str(folder) and os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
        (folder / "upload.png").write_bytes(b"x")
    assert not folder.exists() and "GRADIO_TEMP_DIR" not in os.environ


def test_the_demo_bank_is_trained_once(
    backbone_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = DemoConfig(shots=2, test_images=24, trials=2, backbone=str(backbone_folder))
    folder = demo_bank(config, Console())
    assert folder.is_relative_to(tmp_path) and len(Bank.from_pretrained(folder)) == 12
    assert "Training the demo's bank" in capsys.readouterr().out
    monkeypatch.setattr(DiTiClassifier, "fit", lambda *_: pytest.fail("trained again"))
    assert demo_bank(config, Console()) == folder and "Training" not in capsys.readouterr().out


def test_without_gradio_the_command_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fewshot_diti.commands.app.find_spec", lambda _: None)
    assert cli.main(["app"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "pip install" in err and "[app]" in err


def test_gradio_is_imported_inside_functions_alone() -> None:
    found = []
    for path in (Path(__file__).parents[1] / "fewshot_diti").rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [x.name for x in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [str(path) for name in names if name.split(".")[0] in ("gradio", "starlette", "fastapi")]
    assert not found


def test_a_request_made_by_hand_names_no_file(bank: ServedBank, tmp_path: Path) -> None:
    context = Context(banks=Banks(bank), chosen=None, uploads=tmp_path / "uploads", made=tmp_path)
    assert context.upload(None) is None
    for file in ("/etc/passwd", {"path": "/etc/passwd"}, {"url": "http://a"}, {"path": 5}, 5, ["a"], "a\0b"):
        with pytest.raises(ValueError, match="was not uploaded"):
            context.upload(file)
