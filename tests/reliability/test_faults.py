"""Every write of every command fails once: what was good stays good, and the command started again ends as if nothing
had been."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import small_commands
import torch
from faults import KINDS, FailingFiles, contents, hidden
from small_commands import save_classes, save_image, train_command

from fewshot_diti import Backbone, Bank, DiTiClassifier, cli
from fewshot_diti.app import classes
from fewshot_diti.app.banks import ServedBank
from fewshot_diti.bank_files import bank_fingerprint
from fewshot_diti.evaluation.recipe import main as recipe_main
from fewshot_diti.evaluation.run import FewShotRun
from fewshot_diti.files import LOCK, write_atomically

Capture = pytest.CaptureFixture[str]
FEW = 3  # faults of each case in CI


@dataclass(frozen=True, kw_only=True)
class Case:
    """A command, and where it writes.

    Attributes:
        run: the command on a folder; its exit status.
        prepare: what is in the folder before.
        again: exit statuses of the command started again; 2 where it says that the work is done already.
    """

    run: Callable[[Path], int]
    prepare: Callable[[Path], None] = lambda folder: None
    again: tuple[int, ...] = (0,)


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
    fast: None, bank: Path, shots: Path, backbone_folder: Path, tmp_path_factory: pytest.TempPathFactory
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

    score = ["score", str(images), "--bank", str(bank), "--backbone", sd, "--output"]
    evaluate = ["eval", "--dataset", f"folder:{split}", "--backbone", sd, "--dtype", "float32", "--concept", "part"]
    evaluate += ["--methods", "diti", "nn-latents", "--shots", "1", "--seeds", "1", "--trials", "3", "--clip", "none"]
    return {
        "train": Case(run=command(*train)),
        "train over a bank": Case(run=command(*train), prepare=copy_of(older)),
        "add": Case(run=command("add", "OUT/bank", str(more), "--backbone", sd), prepare=copy_of(bank), again=(0, 2)),
        "add on the page": Case(run=add_on_the_page, prepare=copy_of(bank)),
        "score to JSON": Case(run=command(*score, "OUT/p.jsonl")),
        "score to CSV": Case(run=command(*score, "OUT/p.csv")),
        "score to Parquet": Case(run=command(*score, "OUT/p.parquet")),
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
        "eval": Case(run=command(*evaluate, "--output_dir", "OUT/e")),
        "a recipe": Case(run=recipe),
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
    "explain",
    "export for diffusers",
    "export for kohya",
    "export for peft",
    "import",
    "represent train",
    "represent features",
    "eval",
    "a recipe",
)


@pytest.mark.parametrize("kind", ["open", "write", "fsync", "replace", "mkdir", "chmod"])
def test_a_fault_of_every_kind_reaches_what_is_written(kind: str, tmp_path: Path) -> None:
    faults = FailingFiles(tmp_path, kind, 1)
    with faults(), pytest.raises(OSError, match=r"No space left on device: .*record"):
        write_atomically(tmp_path / "new" / "record", b"whole")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", CASES)
def test_a_command_whose_write_fails_loses_nothing_and_ends_well_when_started_again(
    name: str, made: dict[str, Case], tmp_path: Path, thorough: bool, capsys: Capture, record_property: Any
) -> None:
    case, folder = made[name], tmp_path / "work"

    def run(kind: str = "open", number: int = 0) -> tuple[int, str]:
        """Exit status, and what was printed."""
        faults = FailingFiles(folder, kind, number)
        with faults():
            status = case.run(folder)
        out, err = capsys.readouterr()
        return status, out + err

    def prepare() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        case.prepare(folder)

    prepare()
    old, points = rows_of(folder / "bank"), []
    counted = [FailingFiles(folder, kind, 0) for kind in KINDS]
    with ExitStack() as all_kinds:
        for faults in counted:
            all_kinds.enter_context(faults())
        status = case.run(folder)
    assert status == 0, capsys.readouterr()
    points += [(faults.kind, number) for faults in counted for number in range(1, faults.count + 1)]
    whole, new = contents(folder), rows_of(folder / "bank")
    assert not hidden(folder)
    assert len(points) > 3, "nothing is written"
    if not thorough:
        points = random.Random(name).sample(points, min(FEW, len(points)))
    left = []
    for kind, number in points:
        prepare()
        status, said = run(kind, number)
        errors = [line for line in said.splitlines() if "rror" in line]
        where = f"{kind} {number}: exit {status}: {said[-400:]}"
        assert status in (0, 2) and "Traceback" not in said, where
        assert status == 0 or errors, where
        saved = rows_of(folder / "bank")
        assert same(saved, old) or same(saved, new), f"{where}: neither the bank that was there nor the new one"
        whole_already = bool(status) and new is not None and same(saved, new)
        if status:  # else the fault was none, such as a folder that need not be made
            status, said = run()
        assert status in case.again, f"after {where}: {said[-400:]}"
        if whole_already:  # the fault came after the commit: some files keep their hidden names until the next save
            assert same(rows_of(folder / "bank"), new), f"after {where}"
            continue
        assert status == 0, f"after {where}: {said[-400:]}"
        after = {k: v for k, v in contents(folder).items() if not any(x.startswith(".") for x in Path(k).parts)}
        assert after.keys() == whole.keys(), f"after {where}"
        assert [k for k in whole if after[k] != whole[k]] == [], f"after {where}"
        # a lock file that could not be removed is held by nobody, and the next run removes it
        left += [(kind, number, x) for x in hidden(folder) if Path(x).name != LOCK]
    assert not left
    record_property("faults injected", len(points))
    record_property("lost", 0)
    record_property("left over", len(left))
