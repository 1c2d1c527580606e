"""Pages below docs/: their code runs as printed, on tiny settings; what is not run says why, and its options exist."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pages
import pytest
from pages import ROOT, Block

from fewshot_diti import DiTiClassifier, cli
from fewshot_diti.data.sources import load_bundled

DOCS = ROOT / "docs"
PAGES = sorted(p for p in (*DOCS.glob("*.md"), *DOCS.glob("experiments/*.md"), ROOT / "CONTRIBUTING.md"))
BLOCKS = [block for page in PAGES for block in pages.blocks(page)]
CLASSES = ("737-300", "A320", "ATR-72")


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        pages.train_in_seconds(patch)
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages speak of: my-images, new-classes, more-classes, new.jpg, and my-bank."""
    folder = tmp_path_factory.mktemp("pages")
    images = load_bundled("train")
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(images.label_names):
        rows.setdefault(name, []).append(row)
    for parent, names in (("my-images", CLASSES), ("new-classes", ("E-170",)), ("more-classes", ("CRJ-700",))):
        for name in names:
            (folder / parent / name).mkdir(parents=True)
            for row in rows[name][:2]:
                shutil.copy(images.names[row], folder / parent / name)
    shutil.copy(images.names[rows["A320"][5]], folder / "new.jpg")
    shots = [images.names[row] for name in CLASSES for row in rows[name][:2]]
    classifier = DiTiClassifier("pocket", concept="aircraft")
    classifier.fit(shots, [name for name in CLASSES for _ in range(2)]).save_pretrained(folder / "my-bank")
    return folder


@pytest.mark.parametrize("page", [p for p in PAGES if any(not b.reason for b in pages.blocks(p))], ids=lambda p: p.stem)
def test_code_of_a_page_runs_as_printed(
    page: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {"classifier": DiTiClassifier.from_pretrained("my-bank")}
    for block in (b for b in BLOCKS if b.page == page and not b.reason):
        if block.language == "python":
            exec(compile(block.code, str(block), "exec"), scope)
            continue
        for words in pages.commands(block.code):
            assert words[0] == "fewshot-diti", f"{block} runs {words[0]}; mark it with <!-- not run: reason -->"
            status = cli.main(words[1:])
            assert status == 0 or (words[1] == "check" and status == 1), f"{block}: {shlex.join(words)}"


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.reason and b.language != "python"], ids=str)
def test_commands_that_are_not_run_name_options_that_exist(block: Block) -> None:
    for words in pages.commands(block.code):
        unknown = pages.unknown_options(words)
        assert not unknown, f"{block}: no options {unknown} of {shlex.join(words)}"
    pytest.skip(f"its options exist; not run: {block.reason}")


def test_python_that_is_not_run_can_be_compiled() -> None:
    for block in BLOCKS:
        if block.language == "python":
            compile(block.code, str(block), "exec")


def texts_of_the_source() -> list[str]:
    """All texts of the package, what is filled in as an ellipsis."""
    texts = []
    for path in (ROOT / "fewshot_diti").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            if all(isinstance(p, ast.FormattedValue | ast.Constant) for p in parts):
                texts.append("".join(str(p.value) if isinstance(p, ast.Constant) else "…" for p in parts))
    return texts


def test_messages_of_the_troubleshooting_page_are_those_of_the_code() -> None:
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    texts = texts_of_the_source()
    for message in re.findall(r"^```text\n(.*?)\n```$", page, re.MULTILINE | re.DOTALL):
        parts = [part.strip() for part in message.removeprefix("error: ").split("…")]
        pattern = ".*".join(re.escape(part) for part in parts if part)
        assert any(re.search(pattern, text, re.DOTALL) for text in texts), message


def test_every_command_has_its_section() -> None:
    page = (DOCS / "commands.md").read_text(encoding="utf-8")
    source = Path(cli.__file__).read_text(encoding="utf-8")
    known = re.findall(r'subcommand\("(\w+)"', source[source.index("\nCommand = ") :])
    assert re.findall(r"^## (\w+)$", page, re.MULTILINE) == known
    helped = re.findall(r"^```\{command-help\} (\w+)", page, re.MULTILINE)
    assert list(dict.fromkeys(helped)) == known


@pytest.mark.skipif(os.name == "nt", reason="paths of the pages have slashes")
def test_links_between_pages_lead_to_files() -> None:
    for page in (*PAGES, ROOT / "README.md"):
        for target in re.findall(r"\]\((?!https?://|#)([^)#\s]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links {target}"
