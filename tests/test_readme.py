"""The README's Python runs as printed, and its shell blocks name commands, files and flags that exist."""

from __future__ import annotations

import re
import shlex
import shutil
import tomllib
from pathlib import Path

import pages
import pytest

from fewshot_diti.data.sources import load_bundled

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_python_blocks_run_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = load_bundled("train")
    for name in ("737-300", "ATR-72"):
        folder = tmp_path / "my-images" / name
        folder.mkdir(parents=True)
        rows = [i for i in range(len(data)) if data.class_names[data.labels[i]] == name][:2]
        for row in rows:
            shutil.copy(data.names[row], folder)
    other = next(i for i in range(len(data)) if data.class_names[data.labels[i]] == "747-8")
    shutil.copy(data.names[other], tmp_path / "new.jpg")
    monkeypatch.chdir(tmp_path)
    pages.train_in_seconds(monkeypatch)
    scope: dict[str, object] = {"new_shots": [tmp_path / "new.jpg"]}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), scope)
    assert sorted(scope["classifier"].classes_) == ["737-300", "A321", "ATR-72"]  # type: ignore[attr-defined]
    assert (tmp_path / "my-bank" / "manifest.json").is_file()


def test_the_first_two_shell_blocks_make_their_own_environment() -> None:
    for block in blocks("sh")[:2]:
        assert block.startswith("python3 -m venv .venv && .venv/bin/pip install ")
        assert len(block.strip().splitlines()) == 1


def test_shell_blocks_name_flags_and_recipes_that_exist() -> None:
    for words in pages.commands("".join(blocks("sh")[2:])):
        if words[0] == "pip":
            assert words[-1].removeprefix(".[").removesuffix("]") in EXTRAS
        else:
            unknown = pages.unknown_options(words)
            assert not unknown, f"{unknown} of {shlex.join(words)} are not among the options"
