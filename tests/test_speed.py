"""The speed benchmark at tiny size: every section leaves its figures, and a second run does nothing."""

from __future__ import annotations

import json
import mmap
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from small_grid import PRESET, SCORING
from test_lora import random_bank

from eval.speed import __main__ as script
from eval.speed import timing
from eval.speed.measurement import SpeedConfig
from fewshot_diti.backbone import Backbone
from fewshot_diti.elimination import exhaustive
from fewshot_diti.presets import PRESETS
from fewshot_diti.racing import racing
from fewshot_diti.reports import wilson_interval
from fewshot_diti.timesteps import weighted_mean


def test_every_section_leaves_its_figures_and_is_run_once(
    backbone_folder: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    scoring = asdict(replace(SCORING, trials=8, density="importance"))
    quick = replace(PRESET, scoring=scoring, prediction={"schedule": "racing", "batch_size": 24})
    monkeypatch.setitem(PRESETS, "pocket", quick)
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # which needs no C++ compiler
    config = SpeedConfig(
        backbone=str(backbone_folder),
        dataset=f"folder:{data}",
        concept="part",
        num_shots=2,
        pipeline_images=3,
        published_images=1,
        training_steps=2,
        training_classes=1,
        growth=(3, 8),
        growth_images=1,
        growth_strengths=(0.5,),
        compile="default",
        output_dir=tmp_path / "speed",
    )
    script.main(config)
    found = json.loads((tmp_path / "speed" / "speed.json").read_text())
    assert set(found["ratios"]) == {
        *("evaluations", "images_per_second", "stacked_overhead_12", "stacked_overhead_100", "training_time_per_class")
    }
    assert all(value > 0 for value in found["ratios"].values())
    everything = found["elimination"]["all"]
    assert everything["images"] == 6 and everything["evaluations"] <= everything["evaluations_exhaustive"] == 24
    assert found["growth"]["0.5"]["8"]["evaluations_exhaustive"] == 64
    assert set(found["training"]["validation_loss"]) == {"joint", "published", "without class tokens"}
    assert found["compiled"]["ratio"] > 0 and found["compiled"]["same_label"] == 1
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    parts = found["breakdown"]["milliseconds"]
    assert parts["u-net"] > 0 and set(parts) == {"decode", "vae", "features", "u-net", "lora", "the rest"}
    assert (tmp_path / "speed" / "speed.png").is_file()
    capsys.readouterr()
    script.main(config)
    assert "(" not in capsys.readouterr().out.split("ratios")[0]
    with pytest.raises(SystemExit, match="holds a run with"):
        script.main(replace(config, num_shots=1))


def test_memory_is_measured_above_what_is_in_use() -> None:
    size = 64 * 2**20

    def fresh_pages() -> int:  # from the system, whatever Python's allocator has to spare
        with mmap.mmap(-1, size) as pages:
            return pages.write(b"x" * size)

    written, memory = timing.memory_beyond(fresh_pages)
    assert written == size
    if torch.cuda.is_available() or Path("/proc/self/clear_refs").exists():
        assert 0.9 * size < memory < 3 * size
    else:
        assert np.isnan(memory)


def test_a_schedule_is_measured_against_every_trial() -> None:
    g = torch.Generator().manual_seed(0)
    labels = np.arange(40) % 5
    errors = torch.rand(40, 5, 32, generator=g)
    errors[torch.arange(40), labels] -= 0.1
    weights = torch.ones(32)
    same = timing.against_exhaustive(errors, labels, weights, exhaustive(32))
    assert same["agreement"] == 1 and same["points_lost"] == 0 and same["evaluations"] == 160
    best = weighted_mean(errors, weights).argmin(1).numpy()
    assert same["accuracy"] == same["accuracy_exhaustive"] == pytest.approx(100 * (best == labels).mean())
    raced = timing.against_exhaustive(errors, labels, weights, racing(32, confidence=0.9))
    assert raced["evaluations"] < 160 and 0 < raced["clear_images"] < 40
    assert raced["points_lost"] == pytest.approx(raced["accuracy_exhaustive"] - raced["accuracy"])
    low, high = raced["agreement_on_clear_interval"]
    assert low <= raced["agreement_on_clear"] <= high


def test_the_interval_of_a_difference_keeps_its_width_where_no_image_differs() -> None:
    right = np.arange(240) % 5 > 0
    low, high = timing.paired_interval(right, right)
    assert low == -high and high == pytest.approx(wilson_interval(0, 240)[1])
    lost = right.copy()
    lost[1:120:5] = False  # 24 of 240, right before
    low, high = timing.paired_interval(right, lost)
    assert 0.05 < low < 0.1 < high < 0.16
    assert timing.paired_interval(lost, right) == pytest.approx((-high, -low))


def test_synthetic_class_tokens_keep_the_real_ones_and_differ_from_each_other(backbone: Backbone) -> None:
    bank = random_bank(backbone, 3, 2, 0)
    many = timing.perturbed_bank(bank, 7, strength=0.3)
    assert len(set(many.labels)) == 7
    assert torch.equal(many.rows[:3], bank.rows)
    assert len({tuple(row[:50].tolist()) for row in many.rows}) == 7
    assert (many.rows[3] - bank.rows[0]).norm() < bank.rows[0].norm()


def test_interleaved_functions_take_turns() -> None:
    calls: list[str] = []
    found = timing.interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert calls == ["a", "b"] * 3 and [len(v) for v in found.values()] == [2, 2]
