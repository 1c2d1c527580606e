"""The command line: its options, and what it says of settings and paths that are wrong."""

import os
import re
import signal
import sys
from pathlib import Path

import pytest
from conftest import save_tiny_backbone
from processes import end, start
from small_commands import CLASSES, save_image, train_command

from fewshot_diti import DiTiClassifier, cli

pytestmark = pytest.mark.usefixtures("quick_train")


def test_the_commands_have_these_options_and_no_others(capsys: pytest.CaptureFixture[str]) -> None:
    expected = {
        "demo": "--output_dir --shots --test_images --trials --backbone --dtype --seed --quiet",
        "train": "--output_dir --concept --backbone --shots --shots_file --folds --resize --banner_rows --split"
        " --val_split --dtype --witnesses --shortlist --batch_size --report_to --validation_steps --check --seed"
        " --quiet",
        "check": "--unlabelled --wanted --concept --backbone --folds --resize --banner_rows --split --dtype --quiet",
        "add": "--output_dir --more_shots --shots --split --backbone --dtype --batch_size --seed --quiet",
        "score": "--bank --output --shard --engine --shards --merge --top_k --reject --split --image_column --backbone"
        " --dtype --batch_size --compile --dry_run --quiet",
        "explain": "--bank --output_dir --top --split --image_column --backbone --dtype --batch_size --quiet",
        "eval": "--dataset --backbone --dtype --clip --network --siblings --representations --methods --shots"
        " --seeds --shots_file --concept --trials --training_share --max_test_images --shift --group --output_dir"
        " --quick --dry_run --against --quiet",
        "represent": "",
        "represent train": "--output_dir --method --concept --dims --stages --mode --beta --steps --batch_size --lr"
        " --resize --backbone --dtype --seed --quiet",
        "represent features": "--representation --output --backbone --dtype --quiet",
        "export": "--output_dir --format --classes --quiet",
        "import": "--output_dir --prompt --backbone --concept --resize --quiet",
        "info": "--quiet",
        "app": "--bank --results --port --backbone --dtype --quiet",
    }
    for command, options in expected.items():
        with pytest.raises(SystemExit) as exit_:
            cli.main([*command.split(), "--help"])
        assert exit_.value.code == 0
        shown = re.findall(r"^[│ ]+(?:-h, )?(--\w+)", capsys.readouterr().out, re.MULTILINE)
        assert shown == ["--help", *options.split()]


def test_errors_of_the_user_are_one_line_and_status_2(
    bank: Path, shots: Path, backbone_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    save_image(tmp_path / "single" / "bolt" / "0.png", 0)
    other = save_tiny_backbone(tmp_path / "other", seed=1)
    picture = str(shots / "bolt" / "0.png")
    classifier = DiTiClassifier.from_pretrained(bank)
    classifier.remove_classes(CLASSES[1:]).save_pretrained(tmp_path / "one")
    classifier.remove_classes(CLASSES[:1]).save_pretrained(tmp_path / "none")
    capsys.readouterr()
    expected = {
        "holds no class sub-folder with images": train_command(tmp_path / "empty", backbone_folder, tmp_path / "bank"),
        "There is no folder": train_command(tmp_path / "nowhere", backbone_folder, tmp_path / "bank"),
        "holds the classes ['bolt']": train_command(tmp_path / "single", backbone_folder, tmp_path / "bank"),
        "but 'bolt' has 3": train_command(shots, backbone_folder, tmp_path / "bank", "--shots", "9"),
        "has no splits": train_command(shots, backbone_folder, tmp_path / "bank", "--split", "train"),
        "The bank was trained on backbone": ["score", "--bank", str(bank), "--backbone", str(other), picture],
        "so no complete bank": ["score", "--bank", str(tmp_path), picture],
        "holds the classes ['bolt']; scoring takes two or more": ["score", "--bank", str(tmp_path / "one"), picture],
        "holds the classes []; scoring takes two or more": ["score", "--bank", str(tmp_path / "none"), picture],
        "holds no images": ["score", "--bank", str(bank), str(tmp_path / "empty")],
        "no image file or folder": ["score", "--bank", str(bank), str(tmp_path / "no.png")],
    }
    for text, command in expected.items():
        assert cli.main(command) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and text in captured.err
    assert not (tmp_path / "bank").exists()


def test_settings_out_of_range_are_refused_with_what_is_allowed(bank: Path, capsys: pytest.CaptureFixture[str]) -> None:
    part = ["train", "DIR", "--output_dir", "B", "--concept", "part"]
    expected = {
        "shots=0": [*part, "--shots", "0"],
        "folds=1": [*part, "--folds", "1"],
        "concept is empty": [*part[:-1], " "],
        "test_images=241": ["demo", "--test_images", "241"],
        "batch_size=0": [*part, "--batch_size", "0"],
        "No images": ["score", "--bank", str(bank)],
    }
    for text, command in expected.items():
        with pytest.raises(SystemExit) as exit_:
            cli.main(command)
        assert exit_.value.code == 2 and text in capsys.readouterr().err


def test_a_typo_is_answered_with_the_option_that_was_meant(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["train", "DIR", "--ouput_dir", "B", "--concept", "part"])
    assert exit_.value.code == 2 and "--output_dir" in capsys.readouterr().err
    for typed, answer in (
        (["scroe", "--bank", "B", "a.png"], "There is no command 'scroe'; did you mean score?"),
        (["trian"], "did you mean train?"),
        (["x\x1b[31m"], "there are demo, check, train,"),
    ):
        assert cli.main(typed) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and answer in error and error.count("\n") == 1 and "\x1b" not in error


def test_a_signal_to_end_gives_status_143_and_an_interrupt_130(
    shots: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    for number, status, word in ((signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")):
        monkeypatch.setattr(cli, "train", lambda *_, number=number: signal.raise_signal(number))
        assert cli.main(["train", str(shots), "--output_dir", "B", "--concept", "part"]) == status
        assert capsys.readouterr().err == f"{word}\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_output_that_cannot_be_written_ends_without_a_traceback(bank: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ours, nobody_reads = os.pipe()
    os.close(ours)
    full = os.open("/dev/full", os.O_WRONLY)

    def printed(where: int | None, *command: str) -> int:
        if where is None:
            sys.stdout = None  # type: ignore[assignment]  # as where it was closed
            return cli.main(["info", "/nowhere"])
        os.dup2(where, 1)
        sys.stdout = os.fdopen(1, "w")
        return cli.main(command or ["--help"])

    def stopped_reading() -> int:  # rich tells that a write failed, and nothing is left to be written
        cli.info = lambda _, console: console.on_broken_pipe()  # type: ignore[assignment]  # in a process of its own
        return cli.main(["info", str(bank)])

    assert [end(start(lambda x=x: printed(x))) for x in (nobody_reads, full, None)] == [141, 2, 2]
    assert end(start(lambda: printed(nobody_reads, "info", str(bank)))) == 141
    assert end(start(stopped_reading)) == 141
    error = capfd.readouterr().err
    assert "Traceback" not in error and error.splitlines()[0] == "error: [Errno 28] No space left on device"
    os.close(nobody_reads)
    os.close(full)


def test_quiet_commands_print_nothing(
    bank: Path, shots: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert cli.main(["info", str(bank), "--quiet"]) == 0
    command = ["score", "--bank", str(bank), str(shots), "--output", str(tmp_path / "out.jsonl"), "--quiet"]
    assert cli.main(command) == 0
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    assert "TQDM_DISABLE" not in os.environ


def test_other_exceptions_keep_their_traceback(shots: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "train", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["train", str(shots), "--output_dir", "B", "--concept", "part"])
