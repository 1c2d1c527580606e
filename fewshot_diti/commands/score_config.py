"""What `fewshot-diti score` is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from fewshot_diti.backbone import CompileMode, DtypeName
from fewshot_diti.commands.loading import check_counts
from fewshot_diti.evaluation.scored import ScoreOptions, ShardJob
from fewshot_diti.prediction_files import SUFFIXES, check_suffix
from fewshot_diti.shards import Shard

PARQUET = ".parquet"
MERGED = f"predictions{PARQUET}"  # in the folder of shards


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Classifies images with a bank: a table of the best classes of the first 100, and a file of predictions.

    Under `accelerate launch` or `torchrun` the images spread over the processes; the results stay the same.

    Attributes:
        images: image files, folders that are searched for images at any depth, patterns such as "*.jpg",
            manifest:FILE[@DIR] (a table with the column path), or hub:ID (a data set).
        bank: folder that `fewshot-diti train` wrote, or user/repo on the hub.
        output: file of predictions, by default predictions.jsonl; a folder with shard or engine ray. FILE.jsonl has one
            JSON line per image: path, image_id, label, probabilities of the best classes, margin (second smallest score
            minus smallest), whether one class was left before the trials ran out, evaluations, and the scores of all
            classes (null off the shortlist); or path and error. FILE.csv and FILE.parquet have one row per image,
            without the scores. What is not there gets no row. Only an earlier output of score is replaced. Beside it,
            in FILE.parts, each process keeps what it has scored, so that the same command goes on where it was cut
            short.
        shard: scores the shard i/n of the images, such as 3/16, into a file of its own in the folder output, by
            default predictions. Images belong to shards by their names, so that jobs on any machines need not know
            each other. A shard that is there is skipped. The images are one folder, manifest:FILE or hub:ID.
        engine: ray scores in shards on the workers of a Ray cluster, or of this machine, into the folder output, by
            default predictions, and merges them. Needs the extra `ray`.
        shards: how many shards ray makes, by default 64; the same number where a job is started again.
        merge: folder of shards: joins them into the file output, by default predictions.parquet in that folder, and
            checks that each image stands once. Takes no images and no bank.
        top_k: how many of the best classes are named, with their probabilities.
        reject: share of images like the shots that may be taken for something unknown, such as 0.01; what is less like
            every shot than that is marked as rejected. By default nothing is. Needs the witness features.
        split: of hub:ID.
        image_column: of hub:ID, by default image.
        backbone: folder or hub id of the bank's backbone, where it has moved since.
        dtype: of U-Net and text encoder; auto is bfloat16 where the hardware has it, else float32.
        batch_size: evaluations in one forward; lower it where memory runs out. By default as at training.
        compile: mode in which torch compiles the U-Net for full batches, such as default, or reduce-overhead for CUDA
            graphs; takes a minute or more before the first image, and a C++ compiler.
        dry_run: scores some of the images, writes nothing, and prints what all would take.
        quiet: prints nothing but errors and warnings.

    Raises:
        ValueError: no image is named, or a value is out of its range.
    """

    images: Annotated[Positional[tuple[str, ...]], arg(metavar="IMAGE_OR_DIR...")]
    bank: str | None = None
    output: Path | None = None
    shard: str | None = None
    engine: Literal["here", "ray"] = "here"
    shards: int | None = None
    merge: Path | None = None
    top_k: int = 3
    reject: float | None = None
    split: str | None = None
    image_column: str | None = None
    backbone: str | None = None
    dtype: DtypeName = "auto"
    batch_size: int | None = None
    compile: CompileMode | None = None
    dry_run: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        check_counts(self, "batch_size", "top_k", "shards")
        if self.engine == "ray" and (self.shard or self.merge or self.dry_run):
            raise ValueError("engine='ray' makes and merges its shards; leave shard, merge and dry_run out.")
        if self.engine != "ray" and self.shards is not None:
            raise ValueError(f"shards={self.shards} is of engine='ray'; one shard of so many is shard=1/{self.shards}.")
        if self.merge is not None:
            if self.images or self.bank or self.shard or self.dry_run:
                raise ValueError("merge joins shards that were scored; pass it with output alone, or not at all.")
            if self.merged.suffix != PARQUET:
                raise ValueError(f"output={self.output}; shards are merged into a file that ends in {PARQUET}.")
            return
        if not self.images:
            raise ValueError("No images; name image files or folders.")
        if self.bank is None:
            raise ValueError("No bank; pass the folder that train wrote.")
        if self.reject is not None and not 0 < self.reject < 1:
            raise ValueError(f"reject={self.reject}; pass a share between 0 and 1, such as 0.01.")
        if self.asked_shard is None and self.engine == "here":
            check_suffix(self.file)
        elif self.folder.suffix in SUFFIXES:
            raise ValueError(f"output={self.output}; shards lie in a folder, pass one without {self.folder.suffix}.")

    @property
    def needed_bank(self) -> str:
        """The bank, without which nothing is scored."""
        assert self.bank is not None, "refused before"
        return self.bank

    @property
    def options(self) -> ScoreOptions:
        """What is asked of each image."""
        return ScoreOptions(top_k=self.top_k, reject=self.reject)

    @property
    def asked_shard(self) -> Shard | None:
        """The shard that is to be scored; None for all images."""
        return None if self.shard is None else Shard.parse(self.shard)

    @property
    def file(self) -> Path:
        """The file of predictions."""
        if self.asked_shard is not None:
            return self.asked_shard.file(self.folder)
        return self.output or Path("predictions.jsonl")

    @property
    def folder(self) -> Path:
        """That of the shards."""
        return self.output or Path("predictions")

    @property
    def merged(self) -> Path:
        """The file that the shards are merged into."""
        return self.output or (self.merge or Path()) / MERGED

    def job(self, bank: Path) -> ShardJob:
        """What all shards share; `bank` is the folder that the bank lies in."""
        return ShardJob(
            named=self.images,
            split=self.split,
            image_column=self.image_column,
            bank=bank,
            dtype=self.dtype,
            options=self.options,
            folder=self.folder,
        )
