"""Bad images among good ones: the good ones score as if alone, and each bad one is named, in bounded time."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hostile_images import bad_contents, encoded, flipped, no_files, odd_images, photo, unsized
from small_commands import read_lines

from fewshot_diti import cli
from fewshot_diti.data.images import decode
from fewshot_diti.scoring import Scorer

SLOWEST = 30.0  # seconds for one image, on a machine that does other work too


def score(bank: Path, folder: Path, output: Path, status: int = 0) -> dict[str, dict]:
    """The rows of a file of predictions, by the paths in the folder."""
    assert cli.main(["score", "--bank", str(bank), "--output", str(output), str(folder)]) == status
    return {str(Path(row["path"]).relative_to(folder)): row for row in read_lines(output)}


def test_good_images_score_as_if_alone_and_each_bad_one_has_a_row(
    bank: Path, tmp_path: Path, thorough: bool, record_property: Callable[[str, object], None]
) -> None:
    good, mixed, draw = tmp_path / "good", tmp_path / "mixed", random.Random(0)
    for folder in (good, mixed):
        folder.mkdir()
        for name, write in odd_images().items():
            write(folder / name)
        for i in range(786 if thorough else 10):
            photo(100 + i).save(folder / f"good {i}.png")
    expected = {}
    for i in range(3 if thorough else 1):
        for kind, (suffix, content) in bad_contents(draw).items():
            (mixed / f"bad {i} {kind}{suffix}").write_bytes(content)
            expected[f"bad {i} {kind}{suffix}"] = "bad"
    for i in range(40 if thorough else 5):
        suffix, content = flipped(draw)
        (mixed / f"flipped {i}{suffix}").write_bytes(content)
        expected[f"flipped {i}{suffix}"] = "any"
    for kind, (suffix, content) in unsized(draw).items():
        (mixed / f"{kind}{suffix}").write_bytes(content)
        expected[f"{kind}{suffix}"] = "good"
    no_files(mixed)
    expected |= dict.fromkeys(("pipe.png", "link to pipe.png", "device.png", "circle.png"), "bad")
    alone, found = score(bank, good, tmp_path / "alone.jsonl"), score(bank, mixed, tmp_path / "mixed.jsonl", 1)
    assert "dead link.png" not in found, "what is not there has no row"
    without_path = [{k: v for k, v in rows[name].items() if k != "path"} for rows in (alone, found) for name in alone]
    lost = sum(a != b for a, b in zip(without_path[: len(alone)], without_path[len(alone) :], strict=True))
    for name, kind in expected.items():
        assert name in found, name
        assert kind == "any" or ("error" in found[name]) == (kind == "bad"), found[name]
        assert "error" not in found[name] or name in found[name]["error"], found[name]
    record_property("images", len(found))
    record_property("bad", sum("error" in row for row in found.values()))
    record_property("good ones lost or changed", lost)
    assert lost == 0


def test_the_time_for_one_image_is_bounded(
    tmp_path: Path, thorough: bool, record_property: Callable[[str, object], None]
) -> None:
    draw, seconds = random.Random(1), []
    for _ in range(20 if thorough else 1):
        files = [*bad_contents(draw).values(), *unsized(draw).values(), *(flipped(draw) for _ in range(20))]
        for suffix, content in files:
            (path := tmp_path / f"x{suffix}").write_bytes(content)
            seconds.append(_seconds(path))
    (tmp_path / "others").mkdir()
    seconds += [_seconds(path) for path in no_files(tmp_path / "others")]
    record_property("images", len(seconds))
    record_property("slowest, in seconds", round(max(seconds), 1))
    assert max(seconds) < SLOWEST


def _seconds(path: Path) -> float:
    began = time.monotonic()
    try:
        decode(path)
    except (ValueError, OSError) as error:
        assert str(path) in str(error)
    return time.monotonic() - began


def test_an_image_that_changes_while_it_is_read_is_one_of_both_or_refused(
    tmp_path: Path, thorough: bool, record_property: Callable[[str, object], None]
) -> None:
    path, done = tmp_path / "changing.png", threading.Event()
    contents = [encoded("PNG", 1), encoded("PNG", 2)]
    whole = {decode(content).id for content in contents}

    def change() -> None:
        while not done.is_set():
            for content in contents:
                path.write_bytes(content)

    path.write_bytes(contents[0])
    thread = threading.Thread(target=change)
    thread.start()
    refused = 0
    try:
        for _ in range(5_000 if thorough else 200):
            try:
                assert decode(path).id in whole
            except ValueError as error:
                refused += 1
                assert str(path) in str(error)
    finally:
        done.set()
        thread.join()
    record_property("reads", 5_000 if thorough else 200)
    record_property("refused", refused)
    record_property("mixed pictures", 0)


def test_no_image_is_read_by_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for suffix, content in bad_contents(random.Random(2)).values():
        (path := tmp_path / f"x{suffix}").write_bytes(content)
        with pytest.raises(ValueError, match="x"):
            decode(path)
    assert not (tmp_path / "ran").exists()


def test_an_image_whose_latents_are_not_finite_is_named_and_the_others_are_scored(
    bank: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder := tmp_path / "images").mkdir()
    for i in range(5):
        photo(i).save(folder / f"{i}.png")
    alone = score(bank, folder, tmp_path / "alone.jsonl")
    third, pairs = decode(folder / "2.png").id, Scorer.pair_errors

    def not_finite(self, latents, image_ids, pairs_P2, trials, timesteps):
        """As where one image is too large for a narrow number format, in the U-Net."""
        latents = latents.clone()
        latents[[n for n, image_id in enumerate(image_ids) if image_id == third]] = float("nan")
        return pairs(self, latents, image_ids, pairs_P2, trials, timesteps)

    monkeypatch.setattr(Scorer, "pair_errors", not_finite)
    found = score(bank, folder, tmp_path / "errors.jsonl", 1)
    assert "2.png" in found["2.png"]["error"] and "not a finite number" in found["2.png"]["error"]
    assert {name: row for name, row in found.items() if name != "2.png"} == {
        name: row for name, row in alone.items() if name != "2.png"
    }
