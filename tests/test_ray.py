"""`score --engine ray`: on a local Ray of two workers with --thorough, else one worker without Ray."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from small_commands import save_image

from fewshot_diti import cli
from fewshot_diti.commands.score_config import ScoreConfig
from fewshot_diti.commands.score_ray import ShardWorker, absolute, score_shards
from fewshot_diti.shards import Shard

pytestmark = [pytest.mark.usefixtures("quick_train"), pytest.mark.filterwarnings("ignore::FutureWarning")]
OF = 6


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest) -> Iterator[Any]:
    if not request.config.getoption("--thorough"):
        pytest.skip(
            "with --thorough alone, as each new worker takes a quarter of a minute; a worker by itself runs here"
        )
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
        patch.setenv("RAY_worker_niceness", "0")  # by default workers wait for whatever else runs here
        ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
        yield ray
        ray.shutdown()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    for i in range(24):
        save_image(folder / f"{i}.png", 3000 + i)
    (folder / "broken.png").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def whole(bank: Path, images: Path, quick_train: None, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Rows that one job writes, by path."""
    file = tmp_path_factory.mktemp("whole") / "rows.parquet"
    assert cli.main(["score", str(images), "--bank", str(bank), "--output", str(file), "--quiet"]) == 1
    return rows(file)


def rows(file: Path) -> dict[str, Any]:
    table = pq.read_table(file).to_pylist()
    assert len({row["path"] for row in table}) == len(table)
    return {
        row["path"]: {k: pytest.approx(v, abs=1e-5) if isinstance(v, float) else v for k, v in row.items()}
        for row in table
    }


def command(bank: Path, images: Path, output: Path) -> list[str]:
    return ["score", str(images), "--bank", str(bank), "--output", str(output), "--engine", "ray", "--shards", str(OF)]


def test_workers_give_the_rows_of_one_job_and_a_job_that_is_done_starts_none(
    bank: Path, images: Path, whole: Any, tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert cli.main(command(bank, images, tmp_path)) == 1  # one image is broken
    assert rows(tmp_path / "predictions.parquet") == whole
    assert "24 images scored" in capsys.readouterr().out
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json"] * OF + [".parquet"] * (OF + 1)
    monkeypatch.setattr(cluster, "remote", None)
    assert cli.main(command(bank, images, tmp_path)) == 1


def test_a_killed_worker_is_started_again_and_no_row_is_lost_or_doubled(
    bank: Path, images: Path, whole: Any, tmp_path: Path, cluster: Any
) -> None:
    config = ScoreConfig(images=(str(images),), bank=str(bank), output=tmp_path, engine="ray", shards=OF)
    job = threading.Thread(target=lambda: score_shards(config))
    job.start()
    killed = 0
    while killed < 2 and job.is_alive():
        for process in psutil.process_iter(["cmdline"]):
            at_work = "ShardWorker.score" in " ".join(process.info["cmdline"] or ())
            if at_work and killed < 2:
                os.kill(process.pid, signal.SIGKILL)
                killed += 1
                break
        time.sleep(0.02)
    job.join()
    assert killed == 2
    assert cli.main(["score", "--merge", str(tmp_path)]) == 1
    assert rows(tmp_path / "predictions.parquet") == whole


def test_what_a_driver_that_died_has_left_is_kept(
    bank: Path, images: Path, whole: Any, tmp_path: Path, cluster: Any
) -> None:
    one = Shard(2, OF)
    output = str(tmp_path)
    assert cli.main(["score", str(images), "--bank", str(bank), "--output", output, "--shard", str(one)]) in (0, 1)
    before = one.record(tmp_path).stat().st_mtime_ns
    assert cli.main(command(bank, images, tmp_path)) == 1
    assert one.record(tmp_path).stat().st_mtime_ns == before
    assert rows(tmp_path / "predictions.parquet") == whole


def test_an_error_of_the_user_on_a_worker_is_one_line(
    bank: Path, images: Path, tmp_path: Path, cluster: Any, capsys: Any
) -> None:
    assert cli.main([*command(bank, images, tmp_path / "out"), "--backbone", str(tmp_path / "nowhere")]) == 2
    said = capsys.readouterr().err
    assert "error: " in said and "nowhere" in said and "Traceback" not in said


def test_a_worker_scores_the_shards_that_are_not_there_yet(
    bank: Path, images: Path, whole: Any, tmp_path: Path
) -> None:
    config = ScoreConfig(images=(str(images),), bank=str(bank), output=tmp_path, engine="ray", shards=OF)
    worker = ShardWorker(config)
    for number in range(1, OF + 1):
        worker.score(Shard(number, OF))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    worker.score(Shard(1, OF))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    assert cli.main(["score", "--merge", str(tmp_path)]) == 1
    assert rows(tmp_path / "predictions.parquet") == whole


def test_workers_get_absolute_paths(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(images.parent)
    (tmp_path / "t.csv").touch()
    config = ScoreConfig(images=(images.name,), bank=images.name, engine="ray")
    found = absolute(config)
    assert (found.images, found.bank) == ((str(images),), str(images))
    assert found.output == images.parent / "predictions" and found.backbone is None
    assert absolute(replace(config, bank="user/repo", images=("hub:x",))).images == ("hub:x",)
    assert absolute(replace(config, images=(f"manifest:t.csv@{images.name}",))).images == (
        f"manifest:{images.parent / 't.csv'}@{images}",
    )


def test_images_that_are_not_there_and_a_missing_ray_are_one_line(
    bank: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert cli.main(command(bank, images, tmp_path / "other")) == 2
    assert "pip install 'fewshot-diti[ray]'" in capsys.readouterr().err
