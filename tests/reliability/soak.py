"""A long run: train, add, more shots, remove and score in random order on one folder, with kills at random moments.

    python tests/reliability/soak.py --minutes 120

Every command runs in a process of its own on the tiny Stable Diffusion of the tests. Half of them get SIGKILL, and
one of ten SIGTERM, at a random moment. After each, what must hold is checked: the bank loads; it is the bank that was
there or the one that the command makes; class tokens that the command did not name are the same to the bit; a command
gives what it gave before on the same bank, killed or not; where it came to its end it has left nothing behind. Prints
its counts; ends with 1 where something was lost.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from conftest import save_tiny_backbone
from small_commands import PRESET, save_image

from fewshot_diti import Bank, DiTiClassifier, cli
from fewshot_diti.presets import PRESETS

CLASSES = ("bolt", "gear", "nut", "screw", "washer")
KILLED, TERMINATED = 0.5, 0.6  # shares of the commands, the second with the first
SECONDS = 4.0  # that a kill comes within, where a command has not yet shown how long it takes


@dataclass
class Soak:
    """One folder with a bank, and what was done to it."""

    folder: Path
    seed: int
    counts: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    _known: dict[tuple[str, ...], str] = field(default_factory=dict)
    _seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._draw = random.Random(self.seed)
        self.bank, self.output = self.folder / "bank", self.folder / "predictions.jsonl"
        self.backbone = save_tiny_backbone(self.folder / "tiny-sd")
        for c, name in enumerate(CLASSES):
            for i in range(3):
                save_image(self.folder / "images" / name / f"{i}.png", 100 * c + i)
            save_image(self.folder / "new" / f"{name}.png", 100 * c + 50)

    def run(self, minutes: float) -> None:
        """Commands until the time is over, the last one to its end."""
        end = time.monotonic() + 60 * minutes
        while time.monotonic() < end:
            self.step()

    def step(self) -> None:
        """One random command, perhaps killed, and all checks."""
        before = self._classes()
        missing = [name for name in CLASSES if before and name not in before]
        jobs = {"train": 1.0, "score": 3.0 if before else 0, "add": 3.0 if missing else 0, "more": 2.0 if before else 0}
        jobs["remove"] = 2.0 if before and len(before) > 2 else 0
        kind = self._draw.choices(list(jobs), list(jobs.values()))[0]
        if kind == "train":
            names = sorted(self._draw.sample(CLASSES, self._draw.choice((2, 3))))
        elif kind == "score":
            names = []
        else:
            names = [self._draw.choice(missing if kind == "add" else list(before))]
        rows = self._rows(before)
        state = self._state()
        finished = self._run(kind, names)
        self._check(kind, names, before, rows, state, finished)

    def _job(self, kind: str, names: list[str]) -> Callable[[], int]:
        data = self.folder / "data"
        shutil.rmtree(data, ignore_errors=True)
        for name in names:
            shutil.copytree(self.folder / "images" / name, data / name)
        on = ["--backbone", str(self.backbone), "--quiet"]
        if kind == "train":
            words = ["train", str(data), "--output_dir", str(self.bank), "--concept", "part", "--folds", "0"]
        elif kind == "score":
            words = ["score", str(self.folder / "new"), "--bank", str(self.bank), "--output", str(self.output)]
        else:
            words = ["add", str(self.bank), str(data), *(["--more_shots"] if kind == "more" else [])]
        if kind == "remove":
            return lambda: self._remove(names)
        return lambda: cli.main([*words, *on])

    def _remove(self, names: list[str]) -> int:
        classifier = DiTiClassifier.from_pretrained(self.bank, backbone=str(self.backbone))
        classifier.remove_classes(names).save_pretrained(self.bank)
        return 0

    def _run(self, kind: str, names: list[str]) -> bool:
        """Whether the command came to its end."""
        job, chance = self._job(kind, names), self._draw.random()
        began = time.monotonic()
        child = os.fork()
        if not child:
            _end_with(job, self.folder / "output.txt")
        self.counts["commands"] += 1
        sent = signal.SIGKILL if chance < KILLED else signal.SIGTERM
        if chance < TERMINATED:
            moment = began + self._draw.uniform(0, self._seconds.get(kind, SECONDS))
            while time.monotonic() < moment:
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    break
                time.sleep(0.002)
            else:
                os.kill(child, sent)
                status = os.waitpid(child, 0)[1]
        else:
            status = os.waitpid(child, 0)[1]
        code = os.waitstatus_to_exitcode(status)
        if code == 0:
            self._seconds[kind] = time.monotonic() - began
        elif code == -sent:
            self.counts["kills"] += 1
        elif code == 128 + sent:
            self.counts["terminations"] += 1
        else:
            self.lost.append(f"{kind} {names} ended with {code}: {(self.folder / 'output.txt').read_text()[-2000:]}")
        return code == 0

    def _check(
        self, kind: str, names: list[str], before: tuple[str, ...], rows: dict[str, bytes], state: str, finished: bool
    ) -> None:
        try:
            after = self._classes()
            new_rows = self._rows(after)
        except Exception as error:  # anything that keeps a bank from being read is what this looks for
            self.lost.append(f"after {kind} {names} the bank is not to be read: {error}")
            shutil.rmtree(self.bank)
            return
        made = {
            "train": tuple(names),
            "add": tuple(sorted({*before, *names})),  # a bank's classes are sorted
            "more": before,
            "remove": tuple(x for x in before if x not in names),
            "score": before,
        }[kind]
        now = self._state()
        if now == state:
            self.counts["old bank seen"] += 1
            if finished and made != before:
                self.lost.append(f"{kind} {names} came to its end and changed nothing")
        elif after != made:
            self.lost.append(f"{kind} {names} of {before} left {after}")
        elif kind != "score":
            self._same((kind, *names, "" if kind == "train" else state), now)
        if kind != "train":
            for name in set(before) & set(after) - set(names if now != state else ()):
                self.counts["class tokens compared"] += 1
                if new_rows[name] != rows[name]:
                    self.lost.append(f"{kind} {names} changed the class token of {name}")
        if finished and kind == "score":
            lines = [json.loads(line) for line in self.output.read_text().splitlines()]
            self._same((kind, state), json.dumps(sorted((x["path"], x["label"], str(x["scores"])) for x in lines)))
            if len(lines) != len(CLASSES):
                self.lost.append(f"score wrote {len(lines)} of {len(CLASSES)} lines")
        if finished:
            there = {
                "images",
                "new",
                "tiny-sd",
                "bank",
                "data",
                "output.txt",
                self.output.name,
                "predictions.jsonl.parts",
            }
            left = {path.name for path in self.folder.iterdir()} - there
            left |= (
                {path.name for path in self.bank.iterdir() if path.name.startswith(".")} if kind != "score" else set()
            )
            if left:
                self.lost.append(f"{kind} {names} left {sorted(left)}")

    def _same(self, what: tuple[str, ...], result: str) -> None:
        """Whether the same command on the same bank gave the same before."""
        digest = hashlib.sha256(result.encode()).hexdigest()
        if what in self._known:
            self.counts["results compared"] += 1
        if self._known.setdefault(what, digest) != digest:
            self.lost.append(f"{what} gave another result than before")

    def _classes(self) -> tuple[str, ...]:
        return Bank.from_pretrained(self.bank).labels if (self.bank / "manifest.json").exists() else ()  # type: ignore[return-value]

    def _rows(self, classes: tuple[str, ...]) -> dict[str, bytes]:
        if not classes:
            return {}
        rows = Bank.from_pretrained(self.bank).rows
        return {name: row.numpy().tobytes() for name, row in zip(classes, rows, strict=True)}

    def _state(self) -> str:
        """A hash of what the bank holds."""
        file = self.bank / "manifest.json"
        return hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else ""


def _end_with(job: Callable[[], int], output: Path) -> None:
    """Runs the job in the process that was forked for it, and ends that with the job's exit status."""
    code = 99
    try:
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        code = job()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    PRESETS["pocket"] = PRESET
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        (Path(folder) / "soak").mkdir()
        soak = Soak(Path(folder) / "soak", arguments.seed)
        soak.run(arguments.minutes)
    counts = ", ".join(f"{name}: {count}" for name, count in sorted(soak.counts.items()))
    print(f"minutes: {(time.monotonic() - began) / 60:.1f}, {counts}, lost: {len(soak.lost)}")
    print("\n".join(soak.lost))
    return 1 if soak.lost else 0


if __name__ == "__main__":
    sys.exit(main())
