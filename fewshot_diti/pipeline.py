"""A classifier that answers as `transformers.pipeline("image-classification")` does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from http.client import HTTPException
from string import punctuation
from typing import TYPE_CHECKING, Any
from urllib.parse import quote
from urllib.request import urlopen

from PIL import Image

from fewshot_diti.data.arguments import as_list, batched, one_by_one
from fewshot_diti.data.hub import StoredImages
from fewshot_diti.data.image_files import MAX_FILE_BYTES, read_picture

if TYPE_CHECKING:
    from fewshot_diti.prediction import PredictionMixin

Answer = list[dict[str, Any]]


class ImageClassificationPipeline:
    """Images to lists of {"label", "score"}, the most probable class first; scores are probabilities.

    Args:
        classifier: fitted; what is changed of it later counts.
        allow_urls: whether texts that begin with http:// or https:// are downloaded; they are refused otherwise, since
            a list of images from elsewhere could make this machine ask others for anything.

    Attributes:
        task: "image-classification".
    """

    task = "image-classification"

    def __init__(self, classifier: PredictionMixin, *, allow_urls: bool = False) -> None:
        self.classifier, self.allow_urls = classifier, allow_urls

    def __call__(
        self,
        inputs: Any = None,
        *,
        images: Any = None,
        top_k: int | None = 5,
        batch_size: int = 16,
        timeout: float | None = None,
        num_workers: int | None = None,
        **unknown: Any,
    ) -> Answer | list[Answer] | Iterator[Answer]:
        """One answer for one image, a list of them for a list, an iterator of them for a generator or a data set.

        Args:
            inputs: what `predict` takes: paths, PIL images, arrays, encoded bytes, a `datasets.Dataset` with an image
                column; URLs where they are allowed. `images` is another name for it, as in transformers.
            top_k: classes that are named, at most; None: all.
            batch_size: images that are read together where they come from an iterator.
            timeout: of a download, in seconds.
            num_workers: has no effect; code written for transformers passes it.

        Raises:
            ValueError: an image cannot be read, an URL is not allowed, or an argument that this pipeline does not have,
                such as function_to_apply.
        """
        if unknown:
            raise ValueError(
                f"This pipeline takes no {', '.join(unknown)}; it takes images, top_k, batch_size and timeout, and its "
                "scores are probabilities already."
            )
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k={top_k}; pass a whole number of at least 1, or None for all classes.")
        given = images if inputs is None else inputs
        if given is None:
            raise ValueError("No images were passed.")
        one, many = as_list(given)
        if isinstance(many, Iterator | StoredImages):
            return self._stream(many, top_k, batch_size, timeout)
        answers = self._answers([many[row] for row in range(len(many))], top_k, timeout)
        return answers[0] if one else answers

    def _stream(
        self, images: Iterable[Any], top_k: int | None, batch_size: int, timeout: float | None
    ) -> Iterator[Answer]:
        for some in batched(one_by_one(images), max(1, batch_size)):
            yield from self._answers(some, top_k, timeout)

    def _answers(self, images: list[Any], top_k: int | None, timeout: float | None) -> list[Answer]:
        labels, probabilities_NC = self.classifier.labelled_probabilities([self._fetched(x, timeout) for x in images])
        answers = []
        for probabilities in probabilities_NC.tolist():
            order = sorted(range(len(labels)), key=lambda c: -probabilities[c])[:top_k]
            answers.append([{"label": labels[c], "score": probabilities[c]} for c in order])
        return answers

    def _fetched(self, image: Any, timeout: float | None) -> Any:
        """The image, downloaded where it is an URL."""
        if not (isinstance(image, str) and image.lower().startswith(("http://", "https://"))):
            return image
        if not self.allow_urls:
            raise ValueError(f"{image} is an URL; download it first, or make the pipeline with allow_urls=True.")
        return _download(image, timeout)


def _download(url: str, timeout: float | None) -> Image.Image:
    """The picture at an URL, read as files are: transformers' own `load_image` takes formats that start an interpreter,
    and pictures of any size."""
    try:
        with urlopen(quote(url, safe=punctuation), timeout=timeout) as answer:  # spaces and letters beyond ASCII
            content = answer.read(MAX_FILE_BYTES + 1)
    except (OSError, HTTPException, ValueError) as error:
        raise ValueError(f"{url} cannot be downloaded ({error}); check the address, or leave it out.") from error
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"{url} has more than the {MAX_FILE_BYTES} bytes that an image file may have.")
    return read_picture(content, url)
