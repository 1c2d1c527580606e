"""`score --engine ray` on a local Ray of two workers."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from small_commands import save_image

from fewshot_diti import cli
from fewshot_diti.commands.score_config import ScoreConfig
from fewshot_diti.commands.score_ray import score_shards
from fewshot_diti.shards import Shard

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.usefixtures("quick_train"), pytest.mark.filterwarnings("ignore::FutureWarning")]
OF = 6


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
        patch.setenv("RAY_worker_niceness", "0")  # by default workers wait for whatever else runs here
        ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
        yield
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
    bank: Path, images: Path, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert cli.main(command(bank, images, tmp_path)) == 1  # one image is broken
    assert rows(tmp_path / "predictions.parquet") == whole
    assert "24 images scored" in capsys.readouterr().out
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json"] * OF + [".parquet"] * (OF + 1)
    monkeypatch.setattr(ray, "remote", None)
    assert cli.main(command(bank, images, tmp_path)) == 1


def test_a_killed_worker_is_started_again_and_no_row_is_lost_or_doubled(
    bank: Path, images: Path, whole: Any, tmp_path: Path, thorough: bool
) -> None:
    if not thorough:
        pytest.skip("with --thorough alone: each new worker takes a quarter of a minute")
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
    bank: Path, images: Path, whole: Any, tmp_path: Path, thorough: bool
) -> None:
    if not thorough:
        pytest.skip("with --thorough alone: each new worker takes a quarter of a minute")
    one = Shard(2, OF)
    output = str(tmp_path)
    assert cli.main(["score", str(images), "--bank", str(bank), "--output", output, "--shard", str(one)]) in (0, 1)
    before = one.record(tmp_path).stat().st_mtime_ns
    assert cli.main(command(bank, images, tmp_path)) == 1
    assert one.record(tmp_path).stat().st_mtime_ns == before
    assert rows(tmp_path / "predictions.parquet") == whole


def test_an_error_of_the_user_is_one_line(
    bank: Path, images: Path, tmp_path: Path, thorough: bool, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    if thorough:
        (tmp_path / "empty").mkdir()
        assert cli.main(command(bank, tmp_path / "empty", tmp_path / "out")) == 2
        said = capsys.readouterr().err
        assert "error: " in said and "holds no images" in said and "Traceback" not in said
        assert cli.main([*command(bank, images, tmp_path / "out"), "--backbone", str(tmp_path / "nowhere")]) == 2
        said = capsys.readouterr().err
        assert "error: " in said and "nowhere" in said and "Traceback" not in said
    monkeypatch.setitem(sys.modules, "ray", None)
    assert cli.main(command(bank, images, tmp_path / "other")) == 2
    assert "pip install 'fewshot-diti[ray]'" in capsys.readouterr().err
