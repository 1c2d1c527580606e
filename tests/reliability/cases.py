"""The commands that write, each on a folder of its own, and what must hold when one was cut short."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import small_commands
import torch
from faults import contents, hidden
from small_commands import save_classes, save_image, train_command
from small_pretraining import vae_config

from fewshot_diti import Backbone, Bank, DiTiClassifier, cli
from fewshot_diti.app import classes
from fewshot_diti.app.banks import ServedBank
from fewshot_diti.bank_files import bank_fingerprint
from fewshot_diti.evaluation.recipe import main as recipe_main
from fewshot_diti.evaluation.run import FewShotRun
from fewshot_diti.files import LOCK
from recipes.pocket.vae import train_vae


@dataclass(frozen=True, kw_only=True)
class Case:
    """A command, and where it writes.

    Attributes:
        run: the command on a folder; its exit status.
        prepare: what is in the folder before.
        again: exit statuses of the command started again; 2 where it says that the work is done already.
        failed: exit statuses where a write fails; 1 where a table says which of its runs failed.
        repeats: whether the command does all its work once more where it is done.
    """

    run: Callable[[Path], int]
    prepare: Callable[[Path], None] = lambda folder: None
    again: tuple[int, ...] = (0,)
    failed: tuple[int, ...] = (2,)
    repeats: bool = True


@pytest.fixture(scope="module")
def fast(quick_train: None, backbone_folder: Path, backbone: Backbone) -> Iterator[None]:
    """The backbone is read from disk once."""
    load = Backbone.from_pretrained
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Backbone,
            "from_pretrained",
            lambda name, **options: backbone if str(name) == str(backbone_folder) else load(name, **options),
        )
        yield


@pytest.fixture(scope="module")
def made(
    fast: None,
    bank: Path,
    shots: Path,
    backbone_folder: Path,
    renders: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Case]:
    """The cases by name."""
    more = tmp_path_factory.mktemp("more")
    for i in range(2):
        save_image(more / "cam" / f"{i}.png", 900 + i)
    images = save_classes(tmp_path_factory.mktemp("images"), 2, seed=5000)
    split = tmp_path_factory.mktemp("split")
    save_classes(split / "train", 2)
    save_classes(split / "test", 1, seed=7000)
    sd, exported = str(backbone_folder), tmp_path_factory.mktemp("lora")
    assert cli.main(["export", str(bank), "--output_dir", str(exported), "--format", "kohya", "--quiet"]) == 0
    loras = [str(path) for path in sorted(exported.glob("*.safetensors"))]
    older = tmp_path_factory.mktemp("older") / "bank"
    assert cli.main([*train_command(shots, backbone_folder, older, "--folds", "0", "--quiet"), "--seed", "5"]) == 0
    learned = tmp_path_factory.mktemp("learned")

    def command(*arguments: str) -> Callable[[Path], int]:
        return lambda folder: cli.main([x.replace("OUT", str(folder)) for x in arguments])

    def copy_of(source: Path) -> Callable[[Path], None]:
        return lambda folder: void(shutil.copytree(source, folder / "bank"))

    train = [
        x if x != "OUT" else "OUT/bank" for x in train_command(shots, backbone_folder, Path("OUT"), "--folds", "0")
    ]
    represent = ["represent", "train", str(images), "--output_dir", "OUT/r", "--backbone", sd, "--steps", "2"]
    represent += ["--batch_size", "2", "--dtype", "float32", "--concept", "part", "--method", "pdae", "--dims", "8"]
    assert command(*represent)(learned) == 0

    def add_on_the_page(folder: Path) -> int:
        served = folder / "bank"
        classifier = DiTiClassifier.from_pretrained(served, sd)
        if "cam" in classifier.classes_:
            return 0
        listed = [("cam", [str(path) for path in sorted((more / "cam").iterdir())])]
        try:
            classes.add_to_bank(ServedBank(served, classifier, bank_fingerprint(served)), listed, lambda *_: None)
        except (OSError, ValueError) as error:
            print("error:", error)
            return 2
        return 0

    def recipe(folder: Path) -> int:
        def config(num_shots: int) -> FewShotRun:
            training, scoring = replace(small_commands.TRAINING, seed=0), replace(small_commands.SCORING, folds=0)
            return FewShotRun(
                dataset=f"folder:{split}",
                output_dir=folder / "run",
                num_shots=num_shots,
                backbone=sd,
                dtype="float32",
                concept="part",
                training=training,
                scoring=scoring,
                prediction=small_commands.PREDICTION,
            )

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", ["recipe"])
            try:
                recipe_main({"one": config}, 2)
            except SystemExit as error:
                if isinstance(error.code, str):
                    print(error.code)
                    return 2
                return error.code or 0
        return 0

    def pretraining(folder: Path) -> int:
        try:
            train_vae(vae_config(renders, folder / "run"))
        except OSError as error:
            print("error:", error)
            return 2
        return 0

    score = ["score", str(images), "--bank", str(bank), "--backbone", sd, "--output"]
    evaluate = ["eval", "--dataset", f"folder:{split}", "--backbone", sd, "--dtype", "float32", "--concept", "part"]
    evaluate += ["--methods", "diti", "nn-latents", "--shots", "1", "--seeds", "1", "--trials", "3", "--clip", "none"]
    return {
        "train": Case(run=command(*train)),
        "train over a bank": Case(run=command(*train), prepare=copy_of(older)),
        "add": Case(run=command("add", "OUT/bank", str(more), "--backbone", sd), prepare=copy_of(bank), again=(0, 2),
                    repeats=False),
        "add on the page": Case(run=add_on_the_page, prepare=copy_of(bank), repeats=False),
        "score to JSON": Case(run=command(*score, "OUT/p.jsonl")),
        "score to CSV": Case(run=command(*score, "OUT/p.csv")),
        "score to Parquet": Case(run=command(*score, "OUT/p.parquet")),
        "score a shard": Case(run=command(*score, "OUT/shards", "--shard", "1/2")),
        "explain": Case(run=command("explain", str(images / "nut"), "--bank", str(bank), "--output_dir", "OUT/x")),
        "export for diffusers": Case(run=command("export", str(bank), "--output_dir", "OUT/x")),
        "export for kohya": Case(run=command("export", str(bank), "--output_dir", "OUT/x", "--format", "kohya")),
        "export for peft": Case(run=command("export", str(bank), "--output_dir", "OUT/x", "--format", "peft")),
        "import": Case(
            run=command("import", *loras, "--output_dir", "OUT/bank", "--prompt", "a {}", "--backbone", sd),
            again=(0, 2),
        ),
        "represent train": Case(run=command(*represent)),
        "represent features": Case(
            run=command("represent", "features", str(images), "--representation", f"{learned}/r/representation",
                        "--backbone", sd, "--dtype", "float32", "--output", "OUT/f.npz")
        ),
        "eval": Case(run=command(*evaluate, "--output_dir", "OUT/e"), failed=(1, 2), repeats=False),
        "a recipe": Case(run=recipe, repeats=False),
        "pre-training": Case(run=pretraining),
    }  # fmt: skip


def void(_: object) -> None:
    pass


def same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))


def rows_of(bank: Path) -> torch.Tensor | None:
    """Of a saved bank; None where there is none."""
    return Bank.from_pretrained(bank).rows if (bank / "manifest.json").is_file() else None


CASES = (
    "train",
    "train over a bank",
    "add",
    "add on the page",
    "score to JSON",
    "score to CSV",
    "score to Parquet",
    "score a shard",
    "explain",
    "export for diffusers",
    "export for kohya",
    "export for peft",
    "import",
    "represent train",
    "represent features",
    "eval",
    "a recipe",
    "pre-training",
)


@dataclass(frozen=True)
class Whole:
    """A command that was not disturbed.

    Attributes:
        old: rows of the bank that was in the folder before; None where there was none.
        new: rows of the bank that is there now.
        files: what the folder holds now.
    """

    case: Case
    folder: Path
    old: torch.Tensor | None
    new: torch.Tensor | None
    files: dict[str, Any]

    @classmethod
    def of(cls, case: Case, folder: Path, run: Callable[[], int]) -> Whole:
        prepare(case, folder)
        old = rows_of(folder / "bank")
        assert run() == 0
        assert not hidden(folder)
        return cls(case, folder, old, rows_of(folder / "bank"), contents(folder))

    def ends_well(self, again: Callable[[], int] | None, where: str) -> list[str]:
        """Whether the folder holds the old bank or the new one, and what the whole command left there once it was
        started again. Names of the files that are left over.

        Args:
            again: starts the command again; None where it came to its end.
            where: says in a failure what was done to the command.
        """
        saved = rows_of(self.folder / "bank")
        assert same(saved, self.old) or same(saved, self.new), f"{where}: neither the bank that was there nor the new"
        whole_already = again is not None and self.new is not None and same(saved, self.new)
        status = again() if again else 0
        assert status in self.case.again, f"started again after {where}: exit {status}"
        if whole_already:  # cut short behind the commit: some files keep their hidden names until the next save
            assert same(rows_of(self.folder / "bank"), self.new), where
            return []
        assert status == 0, f"started again after {where}: exit {status}"
        after = {k: v for k, v in contents(self.folder).items() if not any(x.startswith(".") for x in Path(k).parts)}
        assert after.keys() == self.files.keys(), where
        assert [k for k in self.files if after[k] != self.files[k]] == [], where
        # a lock file that could not be removed is held by nobody, and the next run removes it
        return [x for x in hidden(self.folder) if Path(x).name != LOCK]


def prepare(case: Case, folder: Path) -> None:
    """The folder as it is before the command."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    case.prepare(folder)
