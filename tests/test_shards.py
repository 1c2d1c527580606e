"""`score --shard` and `score --merge`: jobs that know nothing of each other, and the file that they make together."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from small_commands import save_image

from fewshot_diti import cli
from fewshot_diti.commands import score as score_module
from fewshot_diti.data.unlabelled import list_images, list_shard
from fewshot_diti.shards import Listing, Shard

pytestmark = pytest.mark.usefixtures("quick_train")
Run = Callable[..., int]
OF = 3


@pytest.fixture(scope="module")
def tests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine pictures, a copy of one, a file that is none, and a link to nothing."""
    folder = tmp_path_factory.mktemp("to-score")
    for i in range(9):
        save_image(folder / f"room {i % 2}" / f"{i}.png", 2000 + i)
    shutil.copy(folder / "room 0" / "0.png", folder / "copy.png")
    (folder / "broken.jpg").write_text("no picture")
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    return folder


@pytest.fixture
def run(bank: Path, tests: Path, tmp_path: Path) -> Run:
    """Scores a shard of the images into the folder `shards`."""

    def run(number: int, *more: str, images: Path = tests, of: int = OF) -> int:
        command = ["score", "--bank", str(bank), str(images), "--output", str(tmp_path / "shards")]
        return cli.main([*command, "--shard", f"{number}/{of}", *more])

    return run


@pytest.fixture(scope="module")
def scored(bank: Path, tests: Path, quick_train: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All shards, and the file that `score` writes by itself."""
    folder = tmp_path_factory.mktemp("scored")
    common = ["score", "--bank", str(bank), str(tests), "--quiet"]
    assert cli.main([*common, "--output", str(folder / "whole.parquet")]) == 1
    found = [cli.main([*common, "--output", str(folder / "shards"), "--shard", f"{n}/{OF}"]) for n in range(1, OF + 1)]
    assert sorted(set(found)) in ([1], [0, 1])
    return folder


@pytest.fixture
def shards(scored: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(scored / "shards", tmp_path / "shards"))


def test_merged_shards_are_what_one_job_writes(scored: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["score", "--merge", str(shards)]) == 1
    whole, merged = pq.read_table(scored / "whole.parquet"), pq.read_table(shards / "predictions.parquet")
    assert whole.schema == merged.schema
    rows, found = (sorted(table.to_pylist(), key=lambda row: row["path"]) for table in (whole, merged))
    assert len(rows) == 11
    for row, other in zip(rows, found, strict=True):
        for name, value in row.items():
            assert other[name] == (pytest.approx(value, abs=1e-5) if isinstance(value, float) else value)
    said = capsys.readouterr().out
    assert "10 images scored" in said and "2 not scored" in said
    assert not list(shards.glob("*.parts"))


def test_a_shard_that_is_there_is_skipped_before_anything_is_loaded(
    shards: Path, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("it is loaded")

    monkeypatch.setattr(score_module, "load_classifier", fail)
    statuses = [run(number) for number in range(1, OF + 1)]
    counts = [json.loads(path.read_text())["counts"] for path in sorted(shards.glob("*.json"))]
    assert statuses == [int(x["failed"] + x["missing"] > 0) for x in counts]
    assert "shard 1/3 is there already" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["flip", "cut", "no file", "no record", "record"])
def test_a_damaged_shard_is_scored_again(damage: str, shards: Path, run: Run) -> None:
    file, record = (Shard(2, OF).file(shards), Shard(2, OF).record(shards))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    {
        "flip": lambda: file.write_bytes(bytes(content)),
        "cut": lambda: file.write_bytes(bytes(content[:-9])),
        "no file": file.unlink,
        "no record": record.unlink,
        "record": lambda: record.write_text('{"shard": "2/3"}'),
    }[damage]()
    if damage != "no record":
        assert cli.main(["score", "--merge", str(shards)]) == 2
    run(2)
    assert cli.main(["score", "--merge", str(shards)]) == 1


def test_shards_of_another_bank_or_other_options_are_refused_by_name(
    shards: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(1, "--top_k", "1") == 2
    said = capsys.readouterr().err
    assert "shard-00001-of-00003.json was made with top_k 3, not 1; pass another folder" in said
    record = Shard(2, OF).record(shards)
    changed = json.loads(record.read_text())
    changed["made_by"]["bank"] = "another"
    record.write_text(json.dumps(changed))
    assert cli.main(["score", "--merge", str(shards)]) == 2
    assert "shard-00002-of-00003.json was made with bank 'another'" in capsys.readouterr().err


def test_shards_of_other_images_or_of_another_number_are_not_taken_for_these(
    shards: Path, tests: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(1, images=tests / "room 0") == 2
    assert f"made with images '{tests}', not '{tests / 'room 0'}'" in capsys.readouterr().err
    assert run(1, of=2) == 2
    assert "holds shards of 3, not of 2" in capsys.readouterr().err


def test_a_merge_replaces_no_file_but_its_own(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "mine.parquet"
    mine.write_bytes(b"something else")
    before = Shard(1, OF).file(shards).read_bytes()
    for output in (mine, Shard(1, OF).file(shards)):
        assert cli.main(["score", "--merge", str(shards), "--output", str(output)]) == 2
        assert "is there already and no merged file" in capsys.readouterr().err
    assert mine.read_bytes() == b"something else" and Shard(1, OF).file(shards).read_bytes() == before
    for _ in range(2):
        assert cli.main(["score", "--merge", str(shards), "--output", str(tmp_path / "all.parquet")]) == 1


def test_shards_without_a_row_are_merged_and_a_table_of_nothing_is_refused(
    bank: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    common = ["--bank", str(bank), "--output", str(tmp_path / "out"), "--shard"]
    assert cli.main(["score", str(tmp_path / "links"), *common, "1/2"]) in (0, 1)
    assert cli.main(["score", str(tmp_path / "links"), *common, "2/2"]) in (0, 1)
    assert cli.main(["score", "--merge", str(tmp_path / "out")]) == 1
    assert "0 images scored" in capsys.readouterr().out
    (tmp_path / "table.csv").write_text("path\na.png\n")
    assert cli.main(["score", f"manifest:{tmp_path / 'table.csv'}", *common, "1/1"]) == 2
    assert "There is no image file" in capsys.readouterr().err


def test_a_dry_run_of_a_shard_measures_it_and_leaves_all_as_it_is(
    shards: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in shards.iterdir()}
    assert run(1, "--dry_run") == 0
    assert "evaluations (at most" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in shards.iterdir()} == before


def test_a_missing_shard_and_a_folder_without_any_are_named(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in shards.glob("shard-0000[13]*"):
        path.unlink()
    assert cli.main(["score", "--merge", str(shards)]) == 2
    assert "lacks 2 of 3 shards; score --shard 1/3, 3/3 first" in capsys.readouterr().err
    assert cli.main(["score", "--merge", str(tmp_path)]) == 2
    assert "holds no shards; score into it with --shard" in capsys.readouterr().err
    assert not (shards / "predictions.parquet").exists()


def test_an_image_that_came_while_jobs_were_at_work_is_found_by_the_merge(
    tests: Path, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    shutil.copytree(tests, images, symlinks=True)
    run(1, images=images, of=2)
    save_image(images / "new.png", 1)
    run(2, images=images, of=2)
    assert cli.main(["score", "--merge", str(tmp_path / "shards")]) == 2
    assert "1/2 was scored when there were 12 images and 2/2 when there were 13" in capsys.readouterr().err
    assert run(1, images=images, of=2) == 2  # not skipped: its folder has grown
    assert "was made when there were 12 images; now there are 13" in capsys.readouterr().err


def test_each_image_belongs_to_one_shard_wherever_it_stands_in_the_list(tests: Path) -> None:
    names = list_images([str(tests)])[0].names
    found = [list_shard([str(tests)], Shard(n, 4)) for n in range(1, 5)]
    assert sorted(name for images, _ in found for name in images.names) == sorted(names)
    assert len({(listing.count, listing.digest) for _, listing in found}) == 1
    one, other = Listing(), Listing()
    for a, b in zip(names, reversed(names), strict=True):
        one.add(a)
        other.add(b)
    assert one == other == found[0][1]
    assert one != list_shard([str(tests / "room 0")], Shard(1, 1))[1]


def test_shards_of_a_table_are_those_of_its_rows(tests: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text("path\n" + "".join(f"{path}\n" for path in ("copy.png", "room 0/0.png", "room 1/1.png")))
    named = [f"manifest:{table}@{tests}"]
    found = [name for n in (1, 2) for name in list_shard(named, Shard(n, 2))[0].names]
    assert sorted(found) == sorted(list_images(named)[0].names)


def test_a_job_remembers_the_files_of_its_own_shard_alone(tmp_path: Path) -> None:
    for i in range(3000):
        (tmp_path / f"{i:05d} with a name that is somewhat longer.png").touch()
    peaks = []
    for find in (lambda: list_images([str(tmp_path)]), lambda: list_shard([str(tmp_path)], Shard(1, 100))):
        tracemalloc.start()
        find()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 0.6 * peaks[0]  # one folder's names are sorted at a time


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--shard", "0/3"), "shard=0/3; pass 1/3 to 3/3"),
        (("--shard", "4/3"), "shard=4/3; pass 1/3 to 3/3"),
        (("--shard", "third"), "such as 3/16"),
        (("--shard", "1/2", "--split", "train"), "has neither splits nor columns"),
        (("--merge", "shards"), "pass it with output alone"),
        (("--shards", "4"), "one shard of so many is shard=1/4"),
        (("--shard", "1/2", "--output", "x.jsonl"), "pass one without .jsonl"),
    ],
)
def test_wrong_shards_are_one_line_and_status_2(
    more: tuple[str, ...], message: str, bank: Path, tests: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = cli.main(["score", str(tests), "--bank", str(bank), *more])
    except SystemExit as error:
        status = error.code
    assert status == 2
    said = "".join(capsys.readouterr()).replace("│", " ")
    assert message in " ".join(said.split())


def test_a_shard_of_single_files_is_refused(bank: Path, tests: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for images in ([str(tests / "copy.png")], [str(tests), str(tests / "copy.png")], [str(tests / "*.png")]):
        assert cli.main(["score", *images, "--bank", str(bank), "--shard", "1/2"]) == 2
        assert "a shard is of one folder, manifest:FILE or hub:ID" in capsys.readouterr().err


def test_no_bank_and_another_ending_are_refused(tests: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["score", str(tests)], ["score", "--merge", str(tests), "--output", "all.csv"]):
        with pytest.raises(SystemExit) as exit_:
            cli.main(command)
        assert exit_.value.code == 2
    assert "No bank" in (said := "".join(capsys.readouterr())) and ".parquet" in said
