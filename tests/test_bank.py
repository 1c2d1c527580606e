"""A bank comes back bit for bit, survives an interrupted save, and changes only what it is asked to change."""

from __future__ import annotations

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
import torch
from conftest import save_tiny_backbone
from test_lora import latents_of, random_bank

from fewshot_diti import bank_files
from fewshot_diti.backbone import Backbone
from fewshot_diti.bank import Bank
from fewshot_diti.bank_files import CLASSES, CONFIG, FORMAT, WEIGHTS, read_files
from fewshot_diti.lora import BLOCK_FILTERS, union_layout
from fewshot_diti.scoring import Scorer

FILES = (WEIGHTS, CLASSES, CONFIG)


@pytest.fixture
def bank(backbone: Backbone) -> Bank:
    return random_bank(backbone, 3, 4, 0)


def assert_same(a: Bank, b: Bank) -> None:
    assert a == b
    assert a.backbone_name == b.backbone_name


def errors_of(backbone: Backbone, bank: Bank) -> torch.Tensor:
    return Scorer(backbone, bank).errors(latents_of(backbone, 0), "an image", range(len(bank)), range(2), (10, 500))


@pytest.mark.parametrize("labels", [("a320", "a319", "747-400"), (3, 1, 2), (True, False)])
def test_a_bank_comes_back_bit_for_bit(backbone: Backbone, tmp_path: Path, labels: tuple) -> None:
    bank = random_bank(backbone, len(labels), 4, 0)
    bank = replace(bank, tokens=tuple(replace(t, label=x) for t, x in zip(bank.tokens, labels, strict=True)))
    bank.save_pretrained(tmp_path)
    assert_same(Bank.from_pretrained(tmp_path), bank)
    assert [type(x) for x in Bank.from_pretrained(tmp_path).labels] == [type(x) for x in labels]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted((*FILES, "README.md", "manifest.json"))


def test_a_bank_keeps_the_scale_of_its_adapters_and_what_wrote_it(bank: Bank, tmp_path: Path) -> None:
    halved = replace(bank, layout=replace(bank.layout, alpha=bank.layout.rank / 2))
    halved.save_pretrained(tmp_path)
    assert Bank.from_pretrained(tmp_path).layout.scale == 0.5
    config = json.loads((tmp_path / "config.json").read_bytes())
    assert config["format"] == 2
    assert config["versions"] == {p: metadata.version(p) for p in ("torch", "diffusers", "transformers", "peft")}


def test_banks_are_equal_where_all_that_they_hold_is(bank: Bank) -> None:
    assert bank == replace(bank, rows=bank.rows.clone())
    assert bank != replace(bank, rows=bank.rows + 1)
    assert bank != replace(bank, backbone_hash="another")
    assert bank != replace(bank, layout=replace(bank.layout, alpha=1.5))
    assert bank != bank.rows


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["truncated", "edited", "deleted"])
def test_a_damaged_file_is_named(bank: Bank, tmp_path: Path, name: str, damage: str) -> None:
    bank.save_pretrained(tmp_path)
    content = (tmp_path / name).read_bytes()
    if damage == "truncated":
        (tmp_path / name).write_bytes(content[:-10])
    elif damage == "edited":
        (tmp_path / name).write_bytes(content[:-10] + b"0123456789")
    else:
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=rf"{name}.* is not the file of {len(content)} bytes"):
        Bank.from_pretrained(tmp_path)


@pytest.mark.parametrize("manifest", ["", "{", "[]", f'{{"format": {FORMAT}}}', "\x00"])
def test_a_damaged_manifest_is_named(bank: Bank, tmp_path: Path, manifest: str) -> None:
    bank.save_pretrained(tmp_path)
    (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(ValueError, match=r"manifest\.json is no bank's manifest"):
        Bank.from_pretrained(tmp_path)


def test_a_folder_without_a_manifest_holds_no_bank(bank: Bank, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*nowhere; check the path"):
        Bank.from_pretrained(tmp_path / "nowhere")
    for name, what in (("bank.zip", "is an archive, not a folder"), ("a.json", "pass the folder of a bank")):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(FileNotFoundError, match=what):
            Bank.from_pretrained(tmp_path / name)
    bank.save_pretrained(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no manifest\.json"):
        Bank.from_pretrained(tmp_path)


def test_a_bank_of_a_later_format_asks_for_an_upgrade(bank: Bank, tmp_path: Path) -> None:
    bank.save_pretrained(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"format": FORMAT + 1}))
    with pytest.raises(ValueError, match=rf"bank format {FORMAT + 1}; .* reads {FORMAT}"):
        Bank.from_pretrained(tmp_path)


class Killed(BaseException):
    """The process ends here."""


def test_a_save_killed_at_any_write_leaves_the_old_bank_or_the_new(
    bank: Bank, backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = random_bank(backbone, 5, 2, 1)
    steps = 0
    budget: int

    def count() -> None:
        nonlocal steps
        steps += 1
        if steps > budget:
            raise Killed

    write, rename = bank_files.write_atomically, Path.replace

    def counted_write(path: Path, content: bytes) -> None:
        count()
        write(path, content)

    def counted_rename(self: Path, target: Path) -> Path:
        count()
        return rename(self, target)

    outcomes = []
    for budget in range(20):
        folder = tmp_path / str(budget)
        bank.save_pretrained(folder, extra={"classifier.json": b"old"})
        steps = 0
        with monkeypatch.context() as patch:
            patch.setattr(bank_files, "write_atomically", counted_write)
            patch.setattr(Path, "replace", counted_rename)
            try:
                new.save_pretrained(folder, extra={"classifier.json": b"new"})
                finished = True
            except Killed:
                finished = False
        found = Bank.from_pretrained(folder)
        is_new = len(found) == 5
        assert_same(found, new if is_new else bank)
        assert read_files(folder, ["classifier.json"])["classifier.json"] == (b"new" if is_new else b"old")
        outcomes.append(is_new)
        # the next save clears up
        bank.save_pretrained(folder)
        assert_same(Bank.from_pretrained(folder), bank)
        assert not [p.name for p in folder.iterdir() if p.name.startswith(".")]
        if finished:
            break
    assert finished
    assert outcomes == sorted(outcomes), "old up to one write, new from then on"
    assert outcomes.count(False) == 6, "five files, then the manifest"


def test_saves_into_one_folder_wait_for_each_other(bank: Bank, backbone: Backbone, tmp_path: Path) -> None:
    banks = [bank, random_bank(backbone, 5, 2, 1)]
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda i: banks[i % 2].save_pretrained(tmp_path), range(20)))
    assert Bank.from_pretrained(tmp_path) in banks
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_save_in_the_middle_of_another_leaves_one_whole_bank(
    bank: Bank, backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, write, done = random_bank(backbone, 5, 2, 1), bank_files.write_atomically, []

    def between(path: Path, content: bytes) -> None:
        if path.name == "manifest.json" and not done:
            done.append(path)
            other.save_pretrained(tmp_path)
        write(path, content)

    monkeypatch.setattr(bank_files, "write_atomically", between)
    bank.save_pretrained(tmp_path)
    assert Bank.from_pretrained(tmp_path) == bank


def test_a_name_that_was_damaged_in_the_manifest_is_no_file_that_was_never_there(bank: Bank, tmp_path: Path) -> None:
    bank.save_pretrained(tmp_path, extra={"classifier.json": b"{}"})
    manifest = tmp_path / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b"classifier.json", b"claszifier.json"))
    with pytest.raises(ValueError, match="is no bank's manifest; it was changed"):
        read_files(tmp_path, ["classifier.json"])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bank.json", b"[" * 100_000),
        ("bank.json", b"null"),
        ("bank.json", b'[{"label": null, "prompt": "x", "num_shots": 1}]'),
        ("bank.json", b'[{"label": "x", "prompt": null, "num_shots": 1}]'),
        ("bank.json", b'[{"label": "x", "prompt": "x", "num_shots": NaN}]'),
        ("bank.json", b'[{"label": "x", "prompt": "x", "num_shots": 1, "unet_scale": NaN}]'),
        ("config.json", b"\xff\xfe"),
        ("config.json", b"[]"),
        ("config.json", b'{"backbone_hash": "../x"}'),
        ("class_tokens.safetensors", (2**62).to_bytes(8, "little")),
    ],
)
def test_files_that_no_version_writes_are_refused_by_name(
    bank: Bank, tmp_path: Path, name: str, content: bytes
) -> None:
    bank.save_pretrained(tmp_path)
    names = ("class_tokens.safetensors", "bank.json", "config.json")
    files = read_files(tmp_path, names) | {name: content}
    bank_files.write_files(tmp_path, files, {})  # whose manifest agrees
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        Bank.from_pretrained(tmp_path)


def test_the_model_card_is_for_people_and_may_be_edited(bank: Bank, tmp_path: Path) -> None:
    bank.save_pretrained(tmp_path)
    card = tmp_path / "README.md"
    card.write_text(card.read_text().replace("tags:", "license: cc-by-4.0\ntags:"))
    mine = card.read_bytes()
    assert_same(Bank.from_pretrained(tmp_path), bank)
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"README\.md was not written here, or was changed since, and stays"):
            bank.save_pretrained(tmp_path)
        assert card.read_bytes() == mine
    card.unlink()
    bank.save_pretrained(tmp_path)
    assert "license" not in card.read_text()
    bank.select(bank.labels[:1]).save_pretrained(tmp_path)  # one that nobody has changed is written anew
    assert "# 1 classes" in card.read_text()


def test_a_save_leaves_pages_alone_that_are_not_its_own(bank: Bank, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("of a project")
    (tmp_path / "held-out.png").write_bytes(b"of a project")
    with pytest.warns(UserWarning, match="stays as it is"):
        bank.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "of a project"
    assert (tmp_path / "held-out.png").read_bytes() == b"of a project"


def test_the_card_of_version_0_4_is_written_anew(bank: Bank, tmp_path: Path) -> None:
    bank.select(bank.labels[:1]).save_pretrained(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_bytes())
    del manifest["pages"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    bank.save_pretrained(tmp_path)
    assert f"# {len(bank)} classes" in (tmp_path / "README.md").read_text()


def test_a_card_is_written_anew_where_a_save_was_cut_short_before_it(
    bank: Bank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank.save_pretrained(tmp_path)
    replace = Path.replace

    def interrupted(path: Path, target: Path) -> Path:
        if target.name == "README.md":
            raise KeyboardInterrupt
        return replace(path, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", interrupted)
        bank.select(bank.labels[:1]).save_pretrained(tmp_path)
    bank.select(bank.labels[:2]).save_pretrained(tmp_path)
    assert "# 2 classes" in (tmp_path / "README.md").read_text()


def test_extra_files_are_covered_by_the_manifest(bank: Bank, tmp_path: Path) -> None:
    bank.save_pretrained(tmp_path, extra={"classifier.json": b"{}"})
    assert_same(Bank.from_pretrained(tmp_path), bank)
    assert read_files(tmp_path, ["classifier.json"]) == {"classifier.json": b"{}"}
    (tmp_path / "classifier.json").write_text("{ }")
    with pytest.raises(ValueError, match=r"classifier\.json.* is not the file of 2 bytes"):
        read_files(tmp_path, ["classifier.json"])
    bank.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"names no classifier\.json; it names bank\.json, class_tokens"):
        read_files(tmp_path, ["classifier.json"])


def test_adding_and_removing_leaves_the_other_classes_bit_for_bit(backbone: Backbone, bank: Bank) -> None:
    other = replace(
        random_bank(backbone, 2, 4, 9),
        tokens=tuple(replace(t, label=f"new {t.label}") for t in random_bank(backbone, 2, 4, 9).tokens),
    )
    both = bank.merge(other)
    assert both.labels == bank.labels + other.labels
    assert torch.equal(both.rows[:3], bank.rows)
    assert torch.equal(both.rows[3:], other.rows)
    assert_same(both.remove(other.labels), bank)
    assert_same(both.select(other.labels), other)
    swapped = bank.select([bank.labels[2], bank.labels[0]])
    assert swapped.tokens == (bank.tokens[2], bank.tokens[0])
    assert torch.equal(swapped.rows, bank.rows[[2, 0]])


@pytest.mark.parametrize(("rank", "blocks"), [(2, "narrow"), (6, "medium"), (4, "narrow"), (6, "all")])
def test_merged_banks_of_other_ranks_and_blocks_give_the_same_errors(
    backbone: Backbone, bank: Bank, rank: int, blocks: str
) -> None:
    other = random_bank(backbone, 2, rank, 5, blocks)
    if rank == 4 or blocks == "all":
        other = replace(other, tokens=tuple(replace(t, label=f"other {t.label}") for t in other.tokens))
    apart = torch.cat([errors_of(backbone, bank), errors_of(backbone, other)])
    for both, expected in ((bank.merge(other), apart), (other.merge(bank), apart.roll(2, 0))):
        assert both.layout == union_layout([bank.layout, other.layout])
        torch.testing.assert_close(errors_of(backbone, both), expected, rtol=0, atol=1e-5)


def test_a_layout_cannot_be_repacked_into_a_smaller_one(backbone: Backbone, bank: Bank) -> None:
    for other in (random_bank(backbone, 1, 3, 0), random_bank(backbone, 1, 4, 0, "narrow")):
        with pytest.raises(ValueError, match="cannot hold one of rank 4"):
            bank.layout.repack(bank.rows, other.layout)
    assert set(BLOCK_FILTERS) == {"narrow", "medium", "all"}


def test_a_bank_refuses_another_backbone(bank: Bank, tmp_path: Path) -> None:
    other = Backbone.from_pretrained(save_tiny_backbone(tmp_path, seed=1), dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match=f"hash {bank.backbone_hash}.*hash {other.hash}"):
        Scorer(other, bank)
    with pytest.raises(ValueError, match="over one backbone"):
        bank.merge(replace(bank, backbone_hash=other.hash))


def test_a_bank_refuses_classes_it_has_not_or_has_already(bank: Bank) -> None:
    with pytest.raises(ValueError, match="stand in both banks"):
        bank.merge(bank)
    with pytest.raises(ValueError, match=r"Classes \['tu-154'\] are not in the bank"):
        bank.select(["tu-154"])
    with pytest.raises(ValueError, match=r"Classes \['tu-154'\] are not in the bank"):
        bank.remove(["tu-154"])
    with pytest.raises(ValueError, match=r"labels='a320' is one text; pass a list of labels, \['a320'\]"):
        bank.remove("a320")
    with pytest.raises(ValueError, match=r"all str, all int or all bool, got \['int', 'str'\]"):
        bank.merge(replace(bank.select(bank.labels[:1]), tokens=(replace(bank.tokens[0], label=1),)))
    with pytest.raises(ValueError, match="holds each class once"):
        replace(bank, tokens=(bank.tokens[0],) * 3)
    with pytest.raises(ValueError, match=r"needs weights \[3, "):
        replace(bank, rows=bank.rows[:2])


def test_a_saved_bank_can_be_copied(bank: Bank, tmp_path: Path) -> None:
    bank.save_pretrained(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert_same(Bank.from_pretrained(tmp_path / "b"), bank)
