"""`fewshot-diti score`, run in-process and by two processes on a bank that `train` wrote."""

from __future__ import annotations

import csv
import io
import os
import re
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from small_commands import CLASSES, read_lines, save_image, train_command

from fewshot_diti import Backbone, DiTiClassifier, cli
from fewshot_diti.data import ImageGeometry, image_id
from fewshot_diti.elimination import Decision
from fewshot_diti.encoding import PreparedImage

pytestmark = pytest.mark.usefixtures("quick_train")


@pytest.fixture(scope="module")
def tests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five pictures in six files: one is a copy."""
    folder = tmp_path_factory.mktemp("test-images")
    for i in range(5):
        save_image(folder / f"{i}.png", 1000 + i)
    save_image(folder / "deep" / "copy.png", 1001)
    return folder


def test_train_reports_the_recall_of_a_shortlist_and_score_leaves_the_other_classes_out(
    shots: Path, tests: Path, backbone_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, output = tmp_path / "bank", tmp_path / "out.jsonl"
    assert cli.main(train_command(shots, backbone_folder, folder, "--folds", "2", "--shortlist", "2")) == 0
    recall = DiTiClassifier.from_pretrained(folder).calibration_.shortlist_recall
    assert recall is not None
    assert f"The shortlist of 2 holds the class of {100 * recall:.1f} % of them" in capsys.readouterr().out
    assert cli.main(["score", "--bank", str(folder), str(tests), "--output", str(output)]) == 0
    for record in read_lines(output):
        assert sorted(record["probabilities"].values())[0] == 0 and record["evaluations"] == 2 * 3 + 1
        assert list(record["scores"].values()).count(None) == 1
    assert "Infinity" not in output.read_text()


def test_score_says_what_the_classifier_says(
    bank: Path, tests: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    # the named file comes first and once, although the folder holds it too
    command = ["score", "--bank", str(bank), str(tests / "3.png"), str(tests), "--output", str(tmp_path / "out.jsonl")]
    assert cli.main(command) == 0
    records = read_lines(tmp_path / "out.jsonl")
    names = ["3.png", "0.png", "1.png", "2.png", "4.png", "deep/copy.png"]
    assert [r["path"] for r in records] == [str(tests / name) for name in names]
    paths = [r["path"] for r in records]
    classifier = DiTiClassifier.from_pretrained(bank)
    assert [r["label"] for r in records] == classifier.predict(paths).tolist()
    assert [r["image_id"] for r in records] == [image_id(path) for path in paths]
    for record, scores, probabilities in zip(
        records, classifier.scores(paths).tolist(), classifier.predict_proba(paths).tolist(), strict=True
    ):
        assert record["scores"] == dict(zip(CLASSES, scores, strict=True))
        assert record["margin"] == sorted(scores)[1] - sorted(scores)[0]
        assert record["probabilities"] == dict(zip(CLASSES, probabilities, strict=True))
        assert list(record["probabilities"].values()) == sorted(probabilities, reverse=True)
    assert {**records[2], "path": ""} == {**records[5], "path": ""}
    out = capsys.readouterr().out
    assert records[0]["label"] in out and "margin" in out


def test_score_goes_on_where_it_was_cut_short(
    bank: Path, tests: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["score", "--bank", str(bank), str(tests), "--output", str(tmp_path / "out.jsonl")]
    assert cli.main(command) == 0
    whole = read_lines(tmp_path / "out.jsonl")
    part = tmp_path / "out.jsonl.parts" / "part-00000.jsonl"
    lines = part.read_text().splitlines(keepends=True)
    part.write_text(lines[0] + lines[1] + lines[2][:40])
    (tmp_path / "out.jsonl").unlink()
    decided: list[str] = []
    decide = DiTiClassifier.decide

    def recorded(self: DiTiClassifier, images: Sequence[PreparedImage]) -> list[Decision]:
        decided.extend(image.id for image in images)
        return decide(self, images)

    monkeypatch.setattr(DiTiClassifier, "decide", recorded)
    assert cli.main(command) == 0
    assert len(decided) == len(lines) - 2
    assert read_lines(tmp_path / "out.jsonl") == whole


def test_score_scores_the_rest_when_an_image_is_broken_and_names_it_at_the_end(
    bank: Path, tests: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes((tests / "0.png").read_bytes()[:200])
    command = ["score", "--bank", str(bank), str(broken), str(tests / "1.png"), "--output", str(tmp_path / "o.jsonl")]
    assert cli.main(command) == 1
    first, second = read_lines(tmp_path / "o.jsonl")
    assert first.keys() == {"path", "error"} and first["path"] == str(broken) and str(broken) in first["error"]
    assert second["path"] == str(tests / "1.png") and second["label"] in second["scores"]
    *_, named, last = capsys.readouterr().out.splitlines()
    assert named == f"not scored: {first['error']}"
    assert last.startswith("1 image scored in") and last.endswith("; 1 not scored.") and "images/s" in last
    assert re.search(r"of them \d undecided when the trials ran out, 0 rejected", last)


def test_score_scores_the_rest_where_paths_lead_nowhere(
    bank: Path, tests: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "dead.png").symlink_to(tmp_path / "gone.png")
    os.mkfifo(tmp_path / "pipe.png")
    named = [str(tmp_path / name) for name in ("dead.png", "pipe.png", "never.png")]
    output = tmp_path / "out.jsonl"
    command = ["score", "--bank", str(bank), *named, str(tests / "1.png"), "--output", str(output)]
    assert cli.main(command) == 1
    out = capsys.readouterr().out
    for what in ("dead.png is a link to", "pipe.png is a named pipe", "no image file " + named[2]):
        assert what in out
    records = {record["path"]: record for record in read_lines(output)}
    assert "label" in records[str(tests / "1.png")] and "error" in records[named[1]]
    assert cli.main(["score", "--bank", str(bank), named[2], "--output", str(tmp_path / "none.jsonl")]) == 2
    assert f"There is no image file or folder {named[2]}" in capsys.readouterr().err


def test_names_cannot_write_to_the_terminal(
    bank: Path, tests: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    shutil.copy(tests / "0.png", folder / "a\x1b[31m\npredictions: fake.png")
    (folder / "b\x1b]0;title\nnot scored: nothing.png").write_bytes(b"no picture")
    assert cli.main(["score", "--bank", str(bank), str(folder), "--output", str(tmp_path / "out.jsonl")]) == 1
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert not any(
        line.startswith("predictions: fake") or line == "not scored: nothing.png" for line in out.split("\n")
    )


def test_a_console_without_the_letters_of_a_name_stops_nothing(
    bank: Path, tests: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = tmp_path / "\u98de\u673a.png"
    shutil.copy(tests / "0.png", image)
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="cp1252", write_through=True))
    assert cli.main(["score", "--bank", str(bank), str(image), "--output", str(tmp_path / "out.jsonl")]) == 0
    assert b"??.png" in printed.getvalue() and read_lines(tmp_path / "out.jsonl")[0]["path"] == str(image)


def test_score_replaces_its_own_output_alone_and_counts_what_it_passes_over(
    bank: Path, tests: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    shutil.copy(tests / "0.png", folder)
    (folder / "notes.txt").write_text("")
    (folder / "table.csv").write_text("of the user")
    assert cli.main(["score", "--bank", str(bank), str(folder), "--output", str(folder / "table.csv")]) == 2
    assert (folder / "table.csv").read_text() == "of the user"
    for _ in range(2):
        assert cli.main(["score", "--bank", str(bank), str(folder), "--output", str(tmp_path / "out.jsonl")]) == 0
    assert "2 files are passed over (1 .csv, 1 .txt)" in capsys.readouterr().out


def test_csv_and_parquet_have_a_row_per_image(bank: Path, tests: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken, and more.png"
    broken.write_bytes(b"no picture")
    tables = []
    for suffix in ("jsonl", "csv", "parquet"):
        output = tmp_path / f"out.{suffix}"
        command = ["score", "--bank", str(bank), str(broken), str(tests), "--output", str(output), "--top_k", "2"]
        assert cli.main(command) == 1
        tables.append(output)
    records, rows = read_lines(tables[0]), list(csv.DictReader(tables[1].open(newline="")))
    stored = pq.read_table(tables[2]).to_pylist()
    assert len(records) == len(rows) == len(stored) == 7
    assert rows[0]["path"] == str(broken) and rows[0]["label"] == "" and rows[0]["error"] == records[0]["error"]
    assert stored[0]["label"] is None and stored[0]["error"] == records[0]["error"]
    for record, row, kept in zip(records[1:], rows[1:], stored[1:], strict=True):
        (best, p), (second, q) = record["probabilities"].items()
        assert [kept[name] for name in ("label_1", "probability_1", "label_2", "probability_2")] == [best, p, second, q]
        for name in ("path", "image_id", "label", "margin", "decided", "evaluations"):
            assert kept[name] == record[name] and row[name] == str(record[name])
        assert float(row["probability_2"]) == q and "scores" not in row
    with pytest.raises(SystemExit):
        cli.main(["score", "--bank", str(bank), str(tests), "--output", str(tmp_path / "out.xlsx")])


def test_more_of_the_best_classes_are_named_without_scoring_again(
    bank: Path, tests: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.jsonl"
    command = ["score", "--bank", str(bank), str(tests / "0.png"), "--output", str(output), "--top_k"]
    assert cli.main([*command, "1"]) == 0
    one = read_lines(output)[0]["probabilities"]
    monkeypatch.setattr(DiTiClassifier, "decide", lambda *_: 1 / 0)
    assert cli.main([*command, "3"]) == 0
    assert len(one) == 1 and one.items() <= read_lines(output)[0]["probabilities"].items()


def test_patterns_tables_and_data_sets_are_scored(
    bank: Path, tests: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def scored(*images: str) -> list[dict]:
        output = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        assert cli.main(["score", "--bank", str(bank), *images, "--output", str(output)]) == 0
        return read_lines(output)

    plain = scored(str(tests))[:5]
    assert scored(str(tests / "[0-4].png")) == plain
    (tmp_path / "table.csv").write_text("path\n" + "".join(f"{n}.png\n" for n in range(5)))
    assert scored(f"manifest:{tmp_path / 'table.csv'}@{tests}") == plain
    pictures = {"photo": [str(tests / f"{n}.png") for n in range(5)]}
    stored = datasets.Dataset.from_dict(pictures).cast_column("photo", datasets.Image())
    datasets.DatasetDict({"new": stored}).save_to_disk(tmp_path / "stored")
    found = scored(f"hub:{tmp_path / 'stored'}", "--split", "new", "--image_column", "photo")
    assert [r["path"] for r in found] == [f"{tmp_path / 'stored'} new row {n}" for n in range(5)]
    assert [{**r, "path": ""} for r in found] == [{**r, "path": ""} for r in plain]
    capsys.readouterr()
    for wrong, text in (
        ([str(tests / "*.bmp")], "matches no file"),
        ([str(tests), "--split", "new"], "has neither splits nor columns"),
        ([f"hub:{tmp_path / 'stored'}", str(tests)], "pass a data set by itself"),
        ([f"hub:{tmp_path / 'stored'}", "--split", "old"], "has the splits new"),
        ([f"manifest:{tmp_path / 'table.csv'}"], "There is no image file"),
    ):
        command = ["score", "--bank", str(bank), *wrong, "--output", str(tmp_path / "none.jsonl")]
        assert cli.main(command) == 2 and text in capsys.readouterr().err


def test_score_keeps_no_image_of_a_data_set_in_memory(bank: Path, tmp_path: Path) -> None:
    def peak(count: int) -> int:
        pixels = np.random.default_rng(count).integers(0, 256, (count, 400, 400, 3), np.uint8)
        features = datasets.Features(image=datasets.Image())
        rows = [{"image": {"bytes": as_bmp(x), "path": None}} for x in pixels]  # 480 kB each
        datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / f"{count}")
        del rows, pixels
        tracemalloc.start()
        command = ["score", "--bank", str(bank), f"hub:{tmp_path / str(count)}"]
        assert cli.main([*command, "--output", str(tmp_path / f"{count}.jsonl")]) == 0
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(2)  # what is kept from then on
    assert peak(20) - peak(5) < 1e6  # 15 images of 480 kB


def as_bmp(pixels_HWC: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, "bmp")
    return buffer.getvalue()


def test_two_processes_score_as_one_and_neither_an_image_twice(
    bank: Path, tests: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["score", "--bank", str(bank), str(tests), "--output", str(tmp_path / "one.jsonl")]) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = ["-m", "fewshot_diti", "score", "--bank", str(bank), str(tests), "--output", str(tmp_path / "two.jsonl")]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*launch, *command], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("margin: second") == 1
    one, two = read_lines(tmp_path / "one.jsonl"), read_lines(tmp_path / "two.jsonl")
    parts = [read_lines(tmp_path / "two.jsonl.parts" / f"part-0000{rank}.jsonl") for rank in (0, 1)]
    ids = [[r["image_id"] for r in part] for part in parts]
    assert all(len(part) == len(set(part)) > 0 for part in ids)
    assert {*ids[0], *ids[1]} == {r["image_id"] for r in two}
    for a, b in zip(one, two, strict=True):
        assert (a["path"], a["image_id"]) == (b["path"], b["image_id"])
        assert a["label"] == b["label"]
        assert max(abs(a["scores"][name] - b["scores"][name]) for name in CLASSES) <= 1e-5


def test_score_names_an_image_below_the_banner_and_a_path_that_is_no_utf8(
    shots: Path, tests: Path, backbone_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = train_command(shots, backbone_folder, tmp_path / "bank", "--folds", "0", "--banner_rows", "5")
    assert cli.main(command) == 0
    Image.new("RGB", (32, 4)).save(tmp_path / "low.png")
    odd = tmp_path / os.fsdecode(b"caf\xe9.png")
    save_image(tmp_path / "plain.png", 1000).rename(odd)
    output = tmp_path / "out.jsonl"
    images = [str(tests / "1.png"), str(tmp_path / "low.png"), str(odd)]
    assert cli.main(["score", "--bank", str(tmp_path / "bank"), *images, "--output", str(output)]) == 1
    assert "low.png is 4 pixels high" in capsys.readouterr().out
    records = read_lines(output)
    assert [record["path"] for record in records] == images
    assert ["error" in record for record in records] == [False, True, False]
    (tmp_path / "folder.csv").mkdir()
    command = ["score", "--bank", str(tmp_path / "bank"), images[0], "--output", str(tmp_path / "folder.csv")]
    assert cli.main(command) == 2
    assert "is there already and no output of score" in capsys.readouterr().err


def test_score_takes_the_prediction_that_was_saved_and_another_batch_size(
    bank: Path, tests: Path, tmp_path: Path
) -> None:
    images = sorted(tests.glob("*.png"))
    scores = []
    for number, more in enumerate(((), ("--batch_size", "2"))):
        output = tmp_path / f"{number}.jsonl"
        command = ["score", "--bank", str(bank), *map(str, images), "--output", str(output), *more]
        assert cli.main(command) == 0
        scores.append([list(record["scores"].values()) for record in read_lines(output)])
    np.testing.assert_allclose(scores[1], scores[0], rtol=0, atol=1e-5)


def test_an_incomplete_classifier_scores_with_a_warning(
    bank: Path, tests: Path, backbone_folder: Path, tmp_path: Path
) -> None:
    classifier = DiTiClassifier.from_pretrained(bank)
    classifier.complete_ = False
    classifier.save_pretrained(tmp_path / "bank_incomplete")
    command = ["score", "--bank", str(tmp_path / "bank_incomplete"), str(tests / "0.png")]
    with pytest.warns(UserWarning, match="was saved when its training was interrupted or failed"):
        assert cli.main([*command, "--output", str(tmp_path / "out.jsonl")]) == 0
    assert len(read_lines(tmp_path / "out.jsonl")) == 1


def test_an_image_that_cannot_be_encoded_is_named_and_the_others_are_scored(
    bank: Path, shots: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = save_image(tmp_path / "bad.png", 77)
    whole, pixels = Backbone.encode_images, {}

    def overflowing(self: Backbone, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, std = whole(self, images)
        return (mean * torch.nan if torch.equal(images[0], pixels["bad"]) else mean), std

    pixels["bad"] = ImageGeometry(size=(16, 32)).pixels(bad)
    monkeypatch.setattr(Backbone, "encode_images", overflowing)
    command = ["score", "--bank", str(bank), str(shots), str(bad), "--output", str(tmp_path / "out.jsonl")]
    assert cli.main(command) == 1
    assert f"latents of {bad} that are not finite" in capsys.readouterr().out
    rows = read_lines(tmp_path / "out.jsonl")
    assert sum("label" in row for row in rows) == 9 and rows[-1]["path"] == str(bad) and "error" in rows[-1]


def test_a_dry_run_writes_nothing_and_says_what_all_images_would_take(
    bank: Path, tests: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.jsonl"
    command = ["score", "--bank", str(bank), str(tests), "--output", str(output)]
    capsys.readouterr()
    assert cli.main([*command, "--dry_run"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert not list(tmp_path.iterdir())
    assert cli.main(command) == 0
    records = read_lines(output)
    evaluations = sum(r["evaluations"] for r in records[1:]) / len(records[1:])  # the first warms up
    most = max(r["evaluations"] for r in records)
    said = re.fullmatch(
        r"6 images, 3 classes: (\d+) evaluations \(at most (\d+)\) and (\S+) s per image on one cpu; about (\S+) "
        r"minutes in one process, peak memory \S+ GB, measured on 5 images",
        line,
    )
    assert said is not None, line
    assert int(said[1]) == round(evaluations) and most <= int(said[2])
    assert float(said[4]) * 60 == pytest.approx(6 * float(said[3]), rel=0.02)
