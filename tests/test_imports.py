"""Who imports whom, read from the source, and that everything can be imported at all."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("diffusion_align", "reward_models")

# Our reading of the table in DESIGN section 2. A room may import itself, what is listed here, and
# nothing else of ours; an entry admits everything below it. Every import counts: at the top, inside
# a function, for types only. `errors`, `ranges` and the redactor are leaves without imports of
# weight: any room but `diffusion` may use them.
LEAVES = (
    "diffusion_align.errors",
    "diffusion_align.ranges",
    "diffusion_align.tf32",
    "diffusion_align.secrecy.redaction",
)
ALLOWED: dict[str, tuple[str, ...]] = {
    # torch only: pure tensor mathematics
    "diffusion_align.diffusion": (),
    "reward_models": (),
    # media; the small world's captions, which are the built-in prompt list of that name; how a
    # user's own code is imported
    "diffusion_align.data": (
        "reward_models.media",
        "reward_models.small_world",
        "reward_models.user_code",
        "reward_models.base",
        # tables that name pictures and their captions
        "reward_models.inputs",
        "reward_models.table_files",
    ),
    "diffusion_align.policy": ("diffusion_align.diffusion",),
    "diffusion_align.sampling": ("diffusion_align.diffusion", "diffusion_align.policy"),
    "diffusion_align.evaluation": (
        "diffusion_align.data",
        "diffusion_align.policy",
        "diffusion_align.sampling",
        "reward_models",
    ),
    # all of the above but evaluation
    "diffusion_align.algorithms": (
        "diffusion_align.data",
        "diffusion_align.diffusion",
        "diffusion_align.policy",
        "diffusion_align.sampling",
        "reward_models",
    ),
    "diffusion_align.llm": (
        "diffusion_align.algorithms.losses",
        "diffusion_align.algorithms.advantages",
        "diffusion_align.data",
        "reward_models",
    ),
    # the embedded models are built here; the rewards among them by the trainer that users have
    "diffusion_align.tiny": (
        "reward_models",
        "diffusion_align.policy",
        "diffusion_align.algorithms.reward_options",
        "diffusion_align.algorithms.reward_training",
        "diffusion_align.data.judgements",
        "diffusion_align.training",
    ),
    # the algorithm contract, never a method
    "diffusion_align.training": (
        "diffusion_align.algorithms.base",
        "diffusion_align.evaluation",
        # which of the files beside the weights are made from them
        "diffusion_align.publish.contents",
        "diffusion_align.publish.signature",
        "diffusion_align.reporting",
    ),
    "diffusion_align.reporting": (),
    # the ground floor: errors speak through the redactor
    "diffusion_align.secrecy": (),
    "diffusion_align.publish": ("diffusion_align.policy",),
    # names and options of the rooms, all of them without torch
    "diffusion_align.config": (
        "diffusion_align.algorithms.catalogue",
        "diffusion_align.data.prompt_functions",
        "diffusion_align.data.prompts",
        "diffusion_align.policy.catalogue",
        # what a reward is called, and whether it has a gradient: data of its table
        "reward_models.catalogue",
        "diffusion_align.algorithms.options",
        "diffusion_align.algorithms.reward_options",
        "diffusion_align.algorithms.supervised_options",
        "diffusion_align.data.judgement_options",
        "diffusion_align.evaluation.options",
        "diffusion_align.policy.options",
        "diffusion_align.sampling.options",
        "diffusion_align.training.guard_options",
        "diffusion_align.training.options",
    ),
    "diffusion_align.errors": (),
    "diffusion_align.ranges": (),
    "diffusion_align.tf32": (),
    # the top: these see everything
    "diffusion_align.assemble": PACKAGES,
    "diffusion_align.commands": PACKAGES,
    "diffusion_align.cli": PACKAGES,
    "diffusion_align.__main__": PACKAGES,
    "diffusion_align": PACKAGES,
}
LEAFLESS = ("diffusion_align.diffusion", "diffusion_align.secrecy", "reward_models")


def sources() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = [module_of(path) for path in sources()]


def room_of(module: str) -> str:
    if module.startswith("reward_models"):
        return "reward_models"
    return ".".join(module.split(".")[:2])


def imported(source: str, module: str, *, is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import of ours in a source text, relative ones resolved."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: len(module.split(".")) + is_package - node.level]
            base = ".".join([*(above if node.level else []), *filter(None, [node.module])])
            # `from package import module` names a module too
            names = [
                f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base
                for alias in node.names
            ]
        else:
            continue
        for name in names:
            if name.partition(".")[0] in PACKAGES:
                yield node.lineno, name


def within(name: str, allowed: tuple[str, ...]) -> bool:
    return any(name == entry or name.startswith(f"{entry}.") for entry in allowed)


def violations(source: str, module: str, *, is_package: bool = False) -> list[str]:
    room = room_of(module)
    allowed = (room, *ALLOWED[room])
    if room not in LEAFLESS:
        allowed = (*allowed, *LEAVES)
    return [
        f"{module}:{line} imports {name}"
        for line, name in imported(source, module, is_package=is_package)
        if not within(name, allowed)
    ]


@pytest.mark.parametrize("path", sources(), ids=module_of)
def test_a_module_imports_only_what_its_room_may(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not violations(text, module_of(path), is_package=path.name == "__init__.py")


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("diffusion_align.diffusion.schedules", "from diffusion_align.errors import UserError"),
        ("diffusion_align.policy.policy", "from diffusion_align.sampling import rollout"),
        ("diffusion_align.training.loop", "from diffusion_align.algorithms.ddpo import DDPO"),
        ("diffusion_align.algorithms.ddpo", "import diffusion_align.evaluation.compare"),
        (
            "diffusion_align.data.prompts",
            "def f():\n    from reward_models.scoring import find_images",
        ),
        ("diffusion_align.policy.policy", "from ..training import loop"),
        ("reward_models.hps", "from diffusion_align.errors import UserError"),
        ("diffusion_align.config.load", "import diffusion_align.assemble"),
        ("diffusion_align.errors", "from diffusion_align.reporting.console import Console"),
        ("diffusion_align.secrecy.redaction", "from diffusion_align.errors import UserError"),
    ],
)
def test_the_reader_of_imports_sees_a_forbidden_one(module: str, line: str) -> None:
    assert violations(line, module)


def test_every_room_is_in_the_table() -> None:
    assert {room_of(module) for module in MODULES} <= set(ALLOWED)


@pytest.mark.parametrize("module", MODULES)
def test_every_module_imports(module: str) -> None:
    assert importlib.import_module(module).__doc__, f"{module} has no docstring"


LIGHT = [
    "diffusion_align",
    "diffusion_align.cli",
    "diffusion_align.config",
    "diffusion_align.errors",
    *(module for module in MODULES if room_of(module) == "diffusion_align.assemble"),
    *sorted(module for module in MODULES if module.rpartition(".")[2] in ("options", "catalogue")),
]


def test_what_the_command_line_needs_imports_no_torch() -> None:
    """One process for all of them: what any imports would show in `sys.modules`."""
    heavy = ("torch", "diffusers", "transformers", "numpy", "scipy", "PIL")
    code = (
        f"import importlib, sys\nfor name in {LIGHT!r}: importlib.import_module(name)\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
