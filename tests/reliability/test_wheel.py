"""What the wheel and the source distribution hold, and what importing the package loads."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parents[2]
EXTRAS = ("gradio", "ray", "tensorboard", "trackio", "wandb", "xformers", "sphinx", "IPython")


@pytest.fixture(scope="module")
def tracked() -> set[str]:
    """Files that git tracks, or would."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("no checkout of git")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout
    return {name for name in listed.decode().split("\0") if (ROOT / name).is_file()}


def held(builder: Any) -> set[str]:
    """Paths, in the checkout, of what a distribution holds."""
    return {str(Path(file.path).relative_to(ROOT)) for file in builder(str(ROOT)).recurse_included_files()}


def test_the_wheel_holds_the_package_as_git_has_it_and_nothing_else(tracked: set[str], record_property: Any) -> None:
    found = held(WheelBuilder)
    expected = {name for name in tracked if name.startswith("fewshot_diti/")}
    assert found - expected == set(), "in the wheel and not in git"
    assert expected - found == set(), "in git and not in the wheel"
    suffixes = {Path(name).suffix for name in found}
    assert suffixes <= {
        ".py",
        ".json",
        ".csv",
        ".txt",
        ".md",
        ".jpg",
        ".png",
        ".safetensors",
        ".css",
        ".js",
        ".typed",
        "",
    }
    record_property("files in the wheel", len(found))
    record_property("MB before compression", round(sum((ROOT / name).stat().st_size for name in found) / 1e6))


def test_the_source_distribution_holds_what_git_has(tracked: set[str], record_property: Any) -> None:
    found = held(SdistBuilder)
    assert found - tracked == set(), "in the source distribution and not in git"
    assert tracked - found <= {".gitattributes"}, "in git and not in the source distribution"
    record_property("files in the source distribution", len(found))


def test_licences_of_code_and_images_are_in_the_wheel() -> None:
    metadata = WheelBuilder(str(ROOT)).metadata.core
    assert {"LICENSE", "fewshot_diti/assets/aircraft/COPYING"} == set(metadata.license_files)
    assert metadata.license_expression == "Apache-2.0 AND GPL-2.0-or-later"


def test_importing_the_package_and_its_commands_loads_no_extra() -> None:
    code = "import sys, fewshot_diti, fewshot_diti.cli; print(*sorted(x for x in sys.modules if '.' not in x))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "fewshot_diti" in loaded.split() and not set(EXTRAS) & set(loaded.split())
