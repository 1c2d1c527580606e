"""Studies of learned representations in `eval/`, at tiny size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eval import attributes, counterfactuals, csnr, denoising, molrg
from fewshot_diti import Backbone
from fewshot_diti.data import ImageSet, load_bundled
from fewshot_diti.data.images import ImageGeometry
from fewshot_diti.encoding import Encoder
from fewshot_diti.representation import DitiConfig, PdaeConfig, Representation
from fewshot_diti.representation.subsets import even_sizes, sizes_of_stages
from recipes.pocket.representation import PocketImages, run
from recipes.representation_diti import DitiTraining, method
from tests.test_representation import latents_of, shaken


def representation_of(backbone: Backbone, method: PdaeConfig | DitiConfig, *, random: bool = True) -> Representation:
    """Untrained; G is zero unless `random`."""
    torch.manual_seed(0)
    network = method.build(backbone)
    geometry = ImageGeometry(size=backbone.image_size)
    history = {"Training": "none"}
    return Representation(
        backbone, method, shaken(network) if random else network, prompt="a photo", geometry=geometry, history=history
    )


DITI = DitiConfig(sizes=even_sizes(64))


def test_errors_are_those_of_the_backbone_and_of_features_without_a_stage(backbone: Backbone) -> None:
    representation = representation_of(backbone, DITI)
    x_0, noise = latents_of(3), latents_of(3, 1)
    found = denoising.errors(representation, x_0, x_0, noise, [10, 700])
    text = representation.text_1LW.expand(3, -1, -1)
    for place, t in enumerate((10, 700)):
        times = torch.full((3,), t)
        with torch.no_grad():
            expected = backbone.errors(x_0, noise, times, text)
        np.testing.assert_allclose(found["backbone"][:, place], expected, rtol=1e-4)
    assert len(found) == 2 + 5
    # at t = 10 the U-Net sees the first dimension alone, so that it does not miss those of the last stage
    last = "without t 708 to 999"
    assert np.array_equal(found["features"][:, 0], found[last][:, 0])
    assert not np.allclose(found["features"][:, 1], found["without t 419 to 707"][:, 1])


def test_before_training_nothing_is_saved(backbone: Backbone) -> None:
    found = denoising.errors(
        representation_of(backbone, PdaeConfig(dims=8), random=False),
        latents_of(3),
        latents_of(3),
        latents_of(3, 1),
        [9],
    )
    assert set(found) == {"backbone", "features"} and not denoising.saved(found).any()


def test_held_out_images_are_read_alone_and_are_the_same(renders: Path) -> None:
    images = PocketImages(data=renders, held_out=renders / "held_out.json")
    assert images.load_held_out((16, 32)).fingerprint == images.load((16, 32))[1].fingerprint


def test_the_study_of_curves_keeps_its_file_and_draws_the_picture(
    backbone: Backbone,
    renders: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    representation_of(backbone, DITI).save_pretrained(tmp_path / "representation-diti" / "representation")
    config = denoising.Config(
        representations=(tmp_path / "representation-diti" / "representation",),
        data=renders,
        held_out=renders / "held_out.json",
        latents=tmp_path,
        output_dir=tmp_path / "out",
        images=3,
        timesteps=4,
    )
    denoising.main(config)
    (record,) = (tmp_path / "out").glob("*.json")
    held = json.loads(record.read_text())
    assert list(held["errors"]) == ["B1"] and held["timesteps"] == [15, 140, 390, 765]
    assert "diti" in capsys.readouterr().out
    held["errors"]["B1"]["features"] = [x / 1000 for x in held["errors"]["B1"]["backbone"]]
    record.write_text(json.dumps(held))
    denoising.main(config)
    assert "99.9" in capsys.readouterr().out  # the file was read, not made again
    assert Image.open(tmp_path / "out" / "curves.png").size[0] > 1000


def test_an_exchange_moves_the_picture_and_all_dimensions_of_b_are_b(backbone: Backbone) -> None:
    representation = representation_of(backbone, DITI)
    config = counterfactuals.Config(representations=(), steps=3)
    made = counterfactuals.counterfactuals(representation, latents_of(2), latents_of(2, 1), config)
    assert len(made) == 2 + 5
    assert (
        counterfactuals.counterfactuals(representation, latents_of(2, 1), latents_of(2), config)["made from a"]
        == (made["made from b"])
    )
    assert made["made from a"] != made["made from b"]
    assert counterfactuals.plot(made, "title").startswith(b"\x89PNG")


def test_stages_have_the_published_dimensions_with_and_without_subsets(backbone: Backbone) -> None:
    sizes = sizes_of_stages(1000, (32, 99, 419, 708, 1000))
    for learned in (PdaeConfig(dims=512), DitiConfig(sizes=sizes)):
        bands = counterfactuals.stage_bands(representation_of(backbone, learned))
        assert [(b.start, b.stop) for b in bands.values()] == [(0, 10), (10, 35), (35, 362), (362, 462), (462, 512)]
        assert list(bands)[:2] == ["t 0 to 31", "t 32 to 98"]


def test_a_recipe_trains_on_the_images_and_keeps_their_latents(
    backbone_folder: Path,
    renders: Path,
    tmp_path: Path,
) -> None:
    config = DitiTraining(
        data=renders,
        held_out=renders / "held_out.json",
        latents=tmp_path,
        output_dir=tmp_path / "run",
        backbone=str(backbone_folder),
        steps=2,
        batch_size=2,
        dims=64,
        stages="even",
        mixed_precision="no",
    )
    representation = run(config, method)
    assert representation.method == DITI
    assert representation.history["Images"].startswith("8, ")
    before = (tmp_path / "latents-train.safetensors").stat().st_mtime_ns
    again = run(config, method)
    assert (tmp_path / "latents-train.safetensors").stat().st_mtime_ns == before
    one, other = (x.network.encoder.layers[0].weight for x in (representation, again))
    assert torch.equal(one, other)


def test_the_study_of_timesteps_reads_each_image_with_and_without_noise(
    backbone: Backbone, pictures: dict[str, list[Path]], tmp_path: Path
) -> None:
    config = csnr.Config(dataset="", timesteps=(0.1, 0.3, 0.6), rank=2)
    paths = dict(zip(("747-8", "A319", "ATR-72", "E-170"), (x[:2] for x in pictures.values()), strict=False))
    images = ImageSet(
        images=[path for two in paths.values() for path in two],
        labels=np.repeat(np.arange(len(paths)), 2),
        class_names=tuple(paths),
        names=tuple(str(path) for two in paths.values() for path in two),
    )
    encoder = Encoder(backbone, ImageGeometry(size=backbone.image_size), "a photo")
    reader = csnr.Reader(encoder, [images] * 3, config)
    clean, noisy = reader.read(0.3, False), reader.read(0.3, True)
    assert set(clean) == {"mid", "restoration", *(f"{half} {i}" for half in ("up", "down") for i in range(4))}
    assert all(not np.allclose(clean[name], noisy[name]) for name in clean)
    t = torch.full((len(reader.latents_Nchw),), 300)
    noised = backbone.add_noise(reader.latents_Nchw, reader.noise_Nchw, t)
    text = backbone.encode_text(backbone.tokenize(["a photo"])).expand(len(t), -1, -1)
    with torch.no_grad():
        noise = backbone.unet(noised, t, text).sample
    signal = backbone.alphas_cumprod[300].sqrt()
    expected = (noised - (1 - backbone.alphas_cumprod[300]).sqrt() * noise) / signal
    np.testing.assert_allclose(noisy["restoration"], expected.flatten(1), rtol=1e-3, atol=1e-4)

    found = csnr.measure(reader)
    assert len(found["csnr"]["variant"]["noisy"]) == 3 and found["counts"]["variant"] == [6] * len(paths)
    name, block, place = csnr.best(found, "variant")
    values = [val for cells in found["accuracy"]["variant"].values() for row in cells.values() for val, _ in row]
    assert found["accuracy"]["variant"][name][block][place][0] == max(values)
    assert csnr.draw(found).startswith(b"\x89PNG") and csnr.table(found).row_count == 15


def test_networks_of_the_mixture_come_near_the_best_denoiser_and_few_images_are_copied(tmp_path: Path) -> None:
    config = molrg.Config(
        dims=2, levels=3, steps=100, few=(4,), images=500, output=tmp_path / "a.png", log=tmp_path / "a.json"
    )
    molrg.main(config)
    found = json.loads(config.log.read_text())
    assert np.mean(found["excess"]["one network for all levels"]) < np.mean(found["excess"]["one network, 4 images"])
    assert found["excess"]["best denoiser"] == [0, 0, 0]
    assert found["copies"]["one network, 4 images"] > 0.1
    assert config.output.read_bytes().startswith(b"\x89PNG")


def test_a_sample_is_a_copy_where_one_image_is_much_nearer_than_the_others() -> None:
    images = np.array([[0.0, 0.0], [1.0, 0.0], [5.0, 5.0]])
    assert molrg.copied(np.array([[0.1, 0.0], [0.5, 0.0], [5.0, 5.0], [0.3, 0.0]]), images) == 0.5


def test_the_study_of_attributes_finds_what_features_hold(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    variants = ["737-300", "737-800", "747-8", "A319", "A330-200", "A340-300", "ATR-72", "CRJ-700"] * 6
    makers = ["Boeing"] * 3 + ["Airbus"] * 3 + ["ATR", "Bombardier"]
    pictures = [Image.fromarray(rng.integers(0, 255, (16, 32, 3), dtype=np.uint8)) for _ in variants]
    for place, picture in enumerate(pictures):
        picture.paste(((30, 30, 200), (150, 200, 255))[place // 8 % 2], (0, 0, 32, 2))
    images = attributes.Labelled(pictures, variants, makers * 6)
    parts = {part: images for part in (attributes.SIBLINGS, *attributes.SPLITS)}
    bundled = attributes.Labelled.of(load_bundled("test"), ImageGeometry(size=(16, 32)))
    assert bundled.pictures[0].size == (32, 16) and len(bundled.truth["winglets"]) == 240

    def holds_the_wings(_: object) -> np.ndarray:
        return np.stack([images.truth["high wing"], rng.normal(size=len(variants))], 1)

    config = attributes.Config(dataset="", shots=(3,), draws=2)
    found = attributes.measure(parts, holds_the_wings, {"first": slice(0, 1), "last": slice(1, 2)}, config)
    precision = found["precision"]["train"]
    assert precision["high wing"] == 1 > precision["winglets"]
    low, high = precision["nuanced interval"]
    assert low <= precision["nuanced"] <= high
    assert set(found["few labels"]) > {"fair, all, winglets, 3", "fair, all, light sky, 3", "biased, all, winglets, 3"}
    assert len(found["few labels"]) == 2 * (4 + 3) and set(found["regression"]) == {"log length", "sky L*", "sky b*"}
    assert [table.row_count for table in attributes.tables({"row": found}, config)] == [2, 14, 3]
