"""Banks go to a hub and come back from it, and offline from the cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from fake_hub import FakeHub, fake_hub
from huggingface_hub.errors import HfHubHTTPError
from small_classifier import SCORING, make, shots_of

from fewshot_diti import Backbone, Bank, DiTiClassifier, cli

CLASSES = ["a320", "dc-9"]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    with fake_hub() as hub:
        template = huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(
            huggingface_hub.constants.ENDPOINT, hub.url
        )
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        yield hub


@pytest.fixture
def classifier(backbone: Backbone, pictures: dict[str, list[Path]]) -> DiTiClassifier:
    scoring = replace(SCORING, witnesses=("features",), witness_weights=(1.0,))
    return make(backbone, scoring=scoring).fit(*shots_of(pictures, CLASSES))


def test_a_classifier_goes_to_the_hub_and_comes_back(
    hub: FakeHub, classifier: DiTiClassifier, backbone: Backbone, tests: list[Path], tmp_path: Path
) -> None:
    done = classifier.push_to_hub("me/parts", token="hf_good")
    assert done.oid == hub.commit_id("me/parts", "main")
    classifier.save_pretrained(tmp_path / "local")
    local = {path.name: path.read_bytes() for path in (tmp_path / "local").iterdir()}
    assert {n: c for n, c in hub.files("me/parts").items() if n != ".gitattributes"} == local
    again = DiTiClassifier.from_pretrained("me/parts", backbone)
    assert torch.equal(again.scores(tests), classifier.scores(tests))
    first = done.oid
    classifier.remove_classes(CLASSES[:1])
    classifier.bank_.push_to_hub("me/parts", token="hf_good")  # type: ignore[union-attr]
    assert "classifier.json" not in hub.files("me/parts")  # what belongs to the bank that is replaced goes
    assert Bank.from_pretrained("me/parts").labels == ("dc-9",)
    assert Bank.from_pretrained("me/parts", revision=first).labels == tuple(CLASSES)


def test_offline_takes_what_was_downloaded(
    hub: FakeHub, classifier: DiTiClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = classifier.bank_
    assert bank is not None
    bank.push_to_hub("me/parts", token="hf_good")
    with pytest.raises(FileNotFoundError, match="There is no folder me/parts, and no repository"):
        Bank.from_pretrained("me/parts", local_files_only=True)
    assert Bank.from_pretrained("me/parts") == bank
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    assert Bank.from_pretrained("me/parts") == bank and len(hub.requests) == asked


def test_commands_that_read_a_bank_find_it_on_the_hub(
    hub: FakeHub, classifier: DiTiClassifier, backbone_folder: Path, tests: list[Path], tmp_path: Path
) -> None:
    classifier.push_to_hub("me/parts", token="hf_good")
    assert cli.main(["info", "me/parts"]) == 0
    assert cli.main(["export", "me/parts", "--output_dir", str(tmp_path / "lora")]) == 0
    score = ["score", "--bank", "me/parts", "--backbone", str(backbone_folder), "--output", str(tmp_path / "p.csv")]
    assert cli.main([*score, str(tests[0])]) == 0
    assert cli.main(["info", "./me/parts"]) == 2  # a path, not a repository
    assert len((tmp_path / "p.csv").read_text().splitlines()) == 2


def test_what_the_hub_has_not_is_said(hub: FakeHub, classifier: DiTiClassifier, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no repository of that name that can be had"):
        Bank.from_pretrained("me/nothing")
    bank = classifier.bank_
    assert bank is not None
    bank.push_to_hub("me/parts", token="hf_good")
    with pytest.raises(FileNotFoundError, match=r"no repository of that name \(v2\)"):
        Bank.from_pretrained("me/parts", revision="v2")
    with pytest.raises(HfHubHTTPError):
        bank.push_to_hub("me/other", token="hf_bad")
    with pytest.raises(FileNotFoundError, match=r"^There is no folder user/repo\.git, and no repo[^\n]*$"):
        Bank.from_pretrained("user/repo.git")
    asked = len(hub.requests)
    for path in (str(tmp_path / "gone"), "../me/parts", "me/parts/more", "gone"):
        with pytest.raises(FileNotFoundError, match="There is no folder"):
            Bank.from_pretrained(path)
    assert len(hub.requests) == asked
