"""The built wheel: everything needed is inside, and configs are found from any folder."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:  # the standard library's own came with 3.11; pip brings the same code
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
DATA_SUFFIXES = {".safetensors", ".json", ".j2", ".yaml", ".txt"}


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built by the project's own backend from a copy of what it declares."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE", "diffusion_align", "reward_models"):
        (source / name).symlink_to(ROOT / name)
    (source / "configs").symlink_to(ROOT / "configs")
    target = tmp_path_factory.mktemp("wheel")
    code = f"from setuptools import build_meta; print(build_meta.build_wheel({str(target)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target / done.stdout.splitlines()[-1]


@pytest.fixture(scope="session")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel unpacked, which is what an installation of a pure wheel is."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def packages() -> Iterator[str]:
    for top in ("diffusion_align", "reward_models"):
        for path in (ROOT / top).rglob("__init__.py"):
            yield ".".join(path.parent.relative_to(ROOT).parts)


def test_every_package_is_declared() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = set(declared["tool"]["setuptools"]["packages"])
    assert listed == set(packages()) | {"diffusion_align.configs"}


def test_every_package_that_is_imported_is_a_dependency() -> None:
    names = {"PIL": "pillow", "yaml": "pyyaml", "open_clip": "open_clip_torch"}
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [word for words in declared["optional-dependencies"].values() for word in words]
    listed = {
        re.split(r"[^\w.-]", words)[0].lower() for words in [*declared["dependencies"], *extras]
    }
    ours = {"diffusion_align", "reward_models", *sys.stdlib_module_names}
    imported = {
        name.partition(".")[0]
        for top in ("diffusion_align", "reward_models")
        for path in (ROOT / top).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom) and not node.level
            else []
        )
    }
    assert {names.get(name, name).lower() for name in imported - ours} <= listed


def test_every_module_and_data_file_is_inside(names: set[str]) -> None:
    wanted = {
        path.relative_to(ROOT).as_posix()
        for top in ("diffusion_align", "reward_models")
        for path in (ROOT / top).rglob("*")
        if (path.suffix == ".py" or path.suffix in DATA_SUFFIXES) and path.is_file()
    }
    assert wanted
    assert wanted <= names, sorted(wanted - names)


def test_configs_template_and_licence_are_inside(names: set[str]) -> None:
    for path in (ROOT / "configs").glob("*.yaml"):
        assert f"diffusion_align/configs/{path.name}" in names
    assert any(name.endswith("report.html.j2") for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert any(name.endswith("entry_points.txt") for name in names)


def test_the_wheel_holds_nothing_else(names: set[str]) -> None:
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {
        "diffusion_align",
        "reward_models",
    }
    assert not [name for name in names if "__pycache__" in name or name.startswith("tests/")]


@pytest.mark.skipif(
    not (ROOT / "diffusion_align/tiny/weights/tiny-sd").is_dir(), reason="weights not trained yet"
)
def test_weights_are_inside_with_their_checksums(names: set[str]) -> None:
    inside = {name for name in names if name.startswith("diffusion_align/tiny/weights/tiny-sd/")}
    assert any(name.endswith(".safetensors") for name in inside)
    assert any("SHA256SUMS" in name for name in inside)


def run(installed: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The installed command line, from another folder; the checkout is nowhere on the path."""
    environment = os.environ | {"PYTHONPATH": str(installed)}
    code = "from diffusion_align.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_configs_are_found_by_name_from_any_folder(installed: Path, tmp_path: Path) -> None:
    done = run(installed, tmp_path, "config", "--show", "ddpo_sd15_aesthetic")
    assert done.returncode == 0, done.stderr
    assert "id: sd15" in done.stdout
    # `train NAME` gets as far as its overrides, which proves that NAME was found.
    done = run(installed, tmp_path, "train", "demo", "train.stps=1")
    assert done.returncode == 2
    assert "train.stps  unknown key" in done.stderr
    assert not list(tmp_path.iterdir())


def test_what_is_imported_is_the_installed_copy(installed: Path, tmp_path: Path) -> None:
    code = "import diffusion_align, reward_models; print(diffusion_align.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(str(installed))
