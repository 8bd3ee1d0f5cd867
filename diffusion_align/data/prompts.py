"""Prompt lists: built in, from a `.txt` or `.jsonl` file, from a function, or given directly.

A `.txt` file holds one prompt per line, taken literally (`#` starts no comment); blank lines are
skipped. A `.jsonl` file holds one object per line with `prompt`, optionally `negative_prompt`;
every other key becomes metadata. Files are UTF-8, with or without a byte order mark.

Every problem of a file is reported at once, with its line. Nothing is repaired silently: two equal
prompts would share one reward statistic in training and count as two independent observations in
a comparison, so they are refused rather than dropped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from diffusion_align.data.prompt_functions import names_function, rows_of_function, rows_of_name
from diffusion_align.errors import UserError, did_you_mean

SHOWN_PROBLEMS = 12
MAX_BUILT_IN = 20_000

# The 45 common animals of the DDPO paper (Black et al. 2023, arXiv:2305.13301).
_ANIMALS = """
cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear raccoon fox wolf
lizard beetle ant butterfly fish shark whale dolphin squirrel mouse rat snake turtle frog chicken
duck goose bee pig turkey fly llama camel bat gorilla hedgehog kangaroo
"""
ANIMALS: tuple[str, ...] = tuple(_ANIMALS.split())

# name -> what it holds, for `--help` and error messages
BUILT_IN: Mapping[str, str] = {
    "animals": "the 45 common animals of the DDPO paper",
    "small-world": "256 training captions of the small world (small-world:N for another number)",
    "small-world:heldout": "128 captions never trained on (small-world:heldout:N for more)",
}

_SMALL_WORLD_COUNTS = {"train": 256, "heldout": 128}


@dataclass(frozen=True)
class Prompt:
    """One prompt: what to draw, what to avoid, and whatever its file says besides."""

    text: str
    negative: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return self.text


PromptRow = str | Prompt | Mapping[str, Any]
PromptSource = str | Path | Iterable[PromptRow] | Callable[[], Iterable[PromptRow]]


def load_prompts(source: PromptSource) -> list[Prompt]:
    """The prompts of a built-in list, a `.txt` or `.jsonl` file, a function, or a list.

    Args:
        source: `animals`, `small-world`, `small-world:heldout` (both with `:N` for N captions), a
            path, `my_module:my_function`, the function, or the prompts themselves: strings,
            `Prompt`s, or mappings with the keys of a `.jsonl` file. See `prompt_functions`.

    Raises:
        UserError: unknown name or missing file, not UTF-8 (byte offset and line), empty, malformed
            rows (all of them), or duplicate prompts (naming their lines).

    >>> [str(prompt) for prompt in load_prompts("animals")][:2]
    ['cat', 'dog']
    """
    if isinstance(source, str) and (built_in := _built_in(source)) is not None:
        return built_in
    if isinstance(source, str) and names_function(source):
        return _checked(*_from_list(rows_of_name(source)), where=source, unit="item")
    if callable(source):
        where = getattr(source, "__qualname__", type(source).__name__)
        rows_of = rows_of_function(source)
        return _checked(*_from_list(rows_of), where=f"prompt function {where}", unit="item")
    if isinstance(source, str | Path):
        path = _existing(source)
        text = decode_text(path.read_bytes(), str(path))
        rows = _from_jsonl if path.suffix.lower() == ".jsonl" else _from_txt
        prompts, problems = rows(text)
        return _checked(prompts, problems, where=str(path), unit="line")
    prompts, problems = _from_list(source)
    return _checked(prompts, problems, where="the list of prompts", unit="item")


def _built_in(name: str) -> list[Prompt] | None:
    """The prompts of a built-in list, or None where `name` is not one."""
    if name == "animals":
        return [Prompt(animal) for animal in ANIMALS]
    head, *rest = name.split(":")
    if head != "small-world":
        return None
    split: Literal["train", "heldout"] = "heldout" if rest[:1] == ["heldout"] else "train"
    rest = rest[1:] if split == "heldout" else rest
    if rest and not (len(rest) == 1 and rest[0].isdecimal()):
        raise UserError(
            f"unknown prompt list {name!r}",
            fix="write small-world, small-world:heldout, small-world:N or small-world:heldout:N",
        )
    count = int(rest[0]) if rest else _SMALL_WORLD_COUNTS[split]
    if not 1 <= count <= MAX_BUILT_IN:
        raise UserError(f"{name!r} asks for {count} captions", fix=f"give 1 to {MAX_BUILT_IN}")
    # Imported here: the small world brings scipy, which a config check does not need.
    from reward_models.small_world import captions

    return [Prompt(caption) for caption in captions(count, seed=0, split=split)]


def _existing(source: str | Path) -> Path:
    """The file `source` names; raises with the nearest name where there is none."""
    path = Path(source).expanduser()
    if path.is_dir():
        raise UserError("this is a folder, not a prompt file", where=str(path))
    if not path.exists():
        raise _missing(path, str(source))
    if path.suffix.lower() not in (".txt", ".jsonl"):
        raise UserError(
            f"prompt files end in .txt or .jsonl, not in {path.suffix or 'nothing'!r}",
            where=str(path),
            fix="one prompt per line (.txt), or one JSON object with a prompt per line (.jsonl)",
        )
    return path


def _missing(path: Path, asked: str) -> UserError:
    folder = path.parent
    nearby = [str(p) for p in folder.glob("*") if p.suffix.lower() in (".txt", ".jsonl")]
    near = did_you_mean(str(path), nearby) or did_you_mean(asked, BUILT_IN)
    known = "built-in lists: " + ", ".join(BUILT_IN) + "; a function: my_module:my_function"
    if not near and " " in asked.strip() and not path.suffix:
        near_line = f'to give a prompt directly, write a list: ["{asked}"]'
    else:
        near_line = f"did you mean {near} ?" if near else "check the path"
    return UserError("no such prompt file or list", where=asked, fix=f"{near_line}\n{known}")


def decode_text(data: bytes, where: str) -> str:
    """UTF-8 text without its byte order mark and with plain line ends."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(
            "this file is UTF-16, not UTF-8 (byte 0, line 1)",
            where=where,
            fix="save it as UTF-8 in your editor",
        )
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"byte {error.start} (0x{data[error.start]:02x}) is not UTF-8",
            where=f"{where}:{line}",
            fix="save the file as UTF-8 (it may be Windows-1252 or Latin-1 now)",
        ) from None
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


Numbered = list[tuple[int, Prompt]]
Problems = list[tuple[int, str]]


def _from_txt(text: str) -> tuple[Numbered, Problems]:
    # Not str.splitlines: it also cuts at form feeds and U+2028, which a prompt may contain.
    lines = ((number, line.strip()) for number, line in enumerate(text.split("\n"), start=1))
    return [(number, Prompt(line)) for number, line in lines if line], []


def _from_jsonl(text: str) -> tuple[Numbered, Problems]:
    prompts: Numbered = []
    problems: Problems = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            problems.append((number, f"not JSON: {error.msg} at column {error.colno}"))
            continue
        except (RecursionError, ValueError) as error:
            problems.append((number, f"not readable as JSON: {error}"))
            continue
        fault = _row_fault(row)
        if fault:
            problems.append((number, fault))
        else:
            prompts.append((number, _row_prompt(row)))
    return prompts, problems


def _row_fault(row: object) -> str | None:
    """What is wrong with one decoded row, or None."""
    if not isinstance(row, dict):
        return f'expected an object such as {{"prompt": "a cat"}}, found {kind_of(row)}'
    if "prompt" not in row:
        near = did_you_mean("prompt", row)
        return "no key 'prompt'" + (f"; did you mean it by {near!r} ?" if near else "")
    if not isinstance(row["prompt"], str):
        return f"'prompt' must be text, found {kind_of(row['prompt'])}"
    if not row["prompt"].strip():
        return "'prompt' is empty"
    if not isinstance(row.get("negative_prompt"), str | None):
        return f"'negative_prompt' must be text, found {kind_of(row['negative_prompt'])}"
    return None


def _row_prompt(row: Mapping[str, Any]) -> Prompt:
    rest = {key: value for key, value in row.items() if key not in ("prompt", "negative_prompt")}
    return Prompt(row["prompt"].strip(), (row.get("negative_prompt") or "").strip(), rest)


def kind_of(value: object) -> str:
    """What a JSON value is, in words for a message: `a list`, `text`, `null`."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    return "null" if value is None else names.get(type(value), "a number")


def _from_list(source: Iterable[Any]) -> tuple[Numbered, Problems]:
    prompts: Numbered = []
    problems: Problems = []
    for number, item in enumerate(source, start=1):
        if isinstance(item, Mapping) and (fault := _row_fault(dict(item))):
            problems.append((number, fault))
            continue
        if not isinstance(item, str | Prompt | Mapping):
            problems.append((number, f"expected text, found {type(item).__name__} {item!r}"))
            continue
        if isinstance(item, Mapping):
            item = _row_prompt(item)
        prompt = item if isinstance(item, Prompt) else Prompt(item.strip())
        if prompt.text.strip():
            prompts.append((number, prompt))
        else:
            problems.append((number, "the prompt is empty"))
    return prompts, problems


def _checked(prompts: Numbered, problems: Problems, *, where: str, unit: str) -> list[Prompt]:
    """The prompts, or one error that names every malformed row and every duplicate."""
    lines_of: dict[str, list[int]] = {}
    problems = list(problems)
    for number, prompt in prompts:
        lines_of.setdefault(prompt.text, []).append(number)
        # JSON can spell half a surrogate pair, which no file, log or tokenizer could take later.
        if any("\ud800" <= character <= "\udfff" for character in prompt.text + prompt.negative):
            problems.append((number, "contains half of a character (a lone surrogate)"))
    repeated = [
        (numbers[1], f"{_repeats(numbers, unit)}: {_short(text)!r}")
        for text, numbers in lines_of.items()
        if len(numbers) > 1
    ]
    faults = sorted(
        [*((number, f"{unit} {number}: {fault}") for number, fault in problems), *repeated]
    )
    if faults:
        shown = [fault for _, fault in faults[:SHOWN_PROBLEMS]]
        if len(faults) > SHOWN_PROBLEMS:
            shown.append(f"... and {len(faults) - SHOWN_PROBLEMS} more")
        kinds = ["malformed rows"] * bool(problems) + ["duplicate prompts"] * bool(repeated)
        raise UserError(f"{' and '.join(kinds)} ({len(faults)})", where=where, fix="\n".join(shown))
    if not prompts:
        raise UserError(
            "there is no prompt in it", where=where, fix="write one prompt per line, or name a list"
        )
    return [prompt for _, prompt in prompts]


def _repeats(numbers: Sequence[int], unit: str) -> str:
    """`line 3 repeats line 1`, `lines 3, 7 repeat line 1`."""
    first, *again = map(str, numbers)
    if len(again) == 1:
        return f"{unit} {again[0]} repeats {unit} {first}"
    return f"{unit}s {', '.join(again)} repeat {unit} {first}"


def _short(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
