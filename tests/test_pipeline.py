"""`as_pipeline` answers as transformers' image classification does."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from small_classifier import make, shots_of
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor, pipeline

from fewshot_diti import Backbone, DiTiClassifier
from fewshot_diti.pipeline import ImageClassificationPipeline

CLASSES = ["a320", "dc-9", "tu-154"]


@pytest.fixture(scope="module")
def classifier(backbone: Backbone, pictures: dict[str, list[Path]]) -> DiTiClassifier:
    return make(backbone).fit(*shots_of(pictures, CLASSES))


@pytest.fixture
def pipe(classifier: DiTiClassifier) -> ImageClassificationPipeline:
    return classifier.as_pipeline()


def test_answers_have_the_form_of_transformers(
    pipe: ImageClassificationPipeline, classifier: DiTiClassifier, tests: list[Path]
) -> None:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], num_labels=3)
    theirs = pipeline(
        pipe.task,
        model=ResNetForImageClassification(config),
        image_processor=ViTImageProcessor(size={"height": 16, "width": 16}),
    )
    paths = list(map(str, tests[:2]))
    picture = Image.open(paths[0])
    for form in (paths[0], picture, paths, [picture, picture]):
        for options in ({}, {"top_k": 1}, {"top_k": 2}):
            mine, other = pipe(form, **options), theirs(form, **options)
            if not isinstance(form, list):
                mine, other = [mine], [other]
            assert [[set(x) for x in answer] for answer in mine] == [[set(x) for x in answer] for answer in other]
            for answer in mine:
                assert [x["score"] for x in answer] == sorted((x["score"] for x in answer), reverse=True)
    best = pipe(paths)
    assert [answer[0]["label"] for answer in best] == classifier.predict(paths).tolist()
    probabilities = {x["label"]: x["score"] for x in best[0]}
    np.testing.assert_allclose([probabilities[x] for x in classifier.classes_], classifier.predict_proba(paths[0]))
    assert pipe(images=paths) == best


def test_what_comes_one_by_one_is_answered_one_by_one(pipe: ImageClassificationPipeline, tests: list[Path]) -> None:
    read = []

    def images() -> Iterator[str]:
        for path in map(str, tests):
            read.append(path)
            yield path

    answers = pipe(images(), batch_size=2)
    first = next(answers)  # type: ignore[arg-type]
    assert len(read) == 2 and first == pipe(str(tests[0]))
    assert [first, *answers] == pipe(list(map(str, tests)))  # type: ignore[misc]
    stored = datasets.Dataset.from_dict({"photo": list(map(str, tests))}).cast_column("photo", datasets.Image())
    assert list(pipe(stored)) == pipe(list(map(str, tests)))  # type: ignore[arg-type]


def test_urls_are_refused_unless_they_are_allowed(
    classifier: DiTiClassifier, pipe: ImageClassificationPipeline, tests: list[Path]
) -> None:
    handler = partial(SimpleHTTPRequestHandler, directory=str(tests[0].parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{tests[0].name}"
        with pytest.raises(ValueError, match="is an URL; download it first"):
            pipe([str(tests[1]), url])
        allowed = classifier.as_pipeline(allow_urls=True)(url)
        server.shutdown()
    assert allowed == pipe(str(tests[0]))


def test_what_an_url_gives_is_read_as_files_are(classifier: DiTiClassifier, tests: list[Path], tmp_path: Path) -> None:
    Image.open(tests[0]).convert("RGB").save(tmp_path / "page.eps")  # a format that starts an interpreter
    Image.new("1", (13_000, 13_000)).save(tmp_path / "bomb.png")
    (tmp_path / "text.png").write_bytes(b"<html>404</html>")
    pipe = classifier.as_pipeline(allow_urls=True)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        root = f"http://127.0.0.1:{server.server_port}"
        for name, text in (
            ("page.eps", "not an image of a known format"),
            ("bomb.png", "too many for a file"),
            ("text.png", "not an image of a known format"),
            ("nothing.png", "cannot be downloaded"),
        ):
            with pytest.raises(ValueError, match=text) as raised:
                pipe(f"{root}/{name}")
            assert name in str(raised.value)
        server.shutdown()


def test_what_has_a_length_and_rows_is_a_list_of_images(pipe: ImageClassificationPipeline, tests: list[Path]) -> None:
    class Rows:  # as `KeyDataset` of transformers
        def __len__(self) -> int:
            return len(tests)

        def __getitem__(self, row: int) -> str:
            return str(tests[row])

    assert pipe(Rows(), num_workers=2) == pipe([str(path) for path in tests])


def test_arguments_that_it_has_not_are_refused(pipe: ImageClassificationPipeline, tests: list[Path]) -> None:
    for options, text in (
        ({"function_to_apply": "sigmoid"}, "takes no function_to_apply"),
        ({"top_k": 0}, "top_k=0"),
        ({"inputs": None}, "No images"),
    ):
        with pytest.raises(ValueError, match=text):
            pipe(**{"inputs": str(tests[0]), **options})  # type: ignore[arg-type]
