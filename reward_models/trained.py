"""The file of a reward that was trained here: what it changed of its tower, its head, its card.

One safetensors file. Tensors `tower.<open_clip key>` take the place of the tower's own (only those
that training changed are there), `head.<key>` are the head's. The header's metadata has one entry,
"reward", the card as JSON.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from reward_models.aesthetic import AestheticReward, head_from_tensors
from reward_models.attributes import OVERALL, AttributesReward, attributes_head
from reward_models.backbones import (
    CHANGED,
    ReadOnce,
    changed_tower,
    load_tower,
    torch_device,
    tower_config,
)
from reward_models.base import Reward, RewardError, RewardInfo
from reward_models.clip_score import CosineReward
from reward_models.clip_tower import Cleaning, ClipTower, Framing
from reward_models.cross_attention import cross_model_from
from reward_models.mps import CONDITION, MPSReward
from reward_models.plan import HeadKind, Layers
from reward_models.table import FilePath, LoadOptions
from reward_models.towers import TOWERS
from reward_models.weights import read_tensors

FORMAT = 1
HEAD = "head."
_KEY = "reward"
# Numbers of each of three tensors of a tower by which it is known again, however its file is
# written. Earlier files have those of the first tensor alone.
_FINGERPRINT = 8
_FIRST_OF_A_BLOCK = re.compile(r"visual\.transformer\.resblocks\.\d+\.attn\.in_proj_weight")


@dataclass(frozen=True)
class Card:
    """What a trained reward is, without its tensors. All values are plain JSON.

    Attributes:
        tower, tower_values: a name of `towers.TOWERS`, and a few of its numbers.
        cleaning: how a cosine head's prompts become words, see `ClipTower.tokenize`.
        scaled: the score of a cosine head is multiplied by the tower's exp(logit_scale).
        layers: of a regression head, see `RewardPlan`.
        trained_on: names of the data; validation: agreement with data held out, by name.
    """

    name: str
    head: HeadKind
    tower: str
    tower_values: tuple[float, ...]
    attributes: tuple[str, ...] = (OVERALL,)
    framing: Framing = "crop"
    antialias: bool = True
    cleaning: Cleaning = "ftfy"
    scaled: bool = False
    layers: Layers = "linear"
    condition: str = CONDITION
    threshold: float = 0.3
    range: str = ""
    licence: str = ""
    source: str = ""
    trained_on: tuple[str, ...] = ()
    validation: Mapping[str, float] = field(default_factory=dict)

    @property
    def info(self) -> RewardInfo:
        return RewardInfo(
            name=self.name,
            modality="image",
            differentiable=True,
            range=self.range or "not recorded",
            licence=self.licence,
            source=self.source,
            needs_prompt=self.head != "regression",
        )


def fingerprint(base: ClipTower) -> tuple[float, ...]:
    """A few numbers of a tower, the same whichever layout its file has."""
    state = base.model.state_dict()
    blocks = [key for key in state if _FIRST_OF_A_BLOCK.fullmatch(key)]
    keys = ("text_projection", "visual.proj", blocks[len(blocks) // 2])
    parts = [state[key].detach().flatten()[:_FINGERPRINT].float() for key in keys]
    return tuple(torch.cat(parts).tolist())


def build_reward(
    card: Card, tower: ClipTower, head: Mapping[str, Tensor], path: Path
) -> AestheticReward | AttributesReward | CosineReward | MPSReward:
    """The scorer of a card, by the same classes as the published ones.

    Args:
        tower: with everything that training changed of it.
        head: the head's tensors, without the prefix.
        path: named in errors.

    Raises:
        RewardError: tensors that do not make this head.
    """
    if card.head == "cosine":
        if head:
            raise RewardError(
                f"a cosine has no head of its own, but this file has {sorted(head)[0]}",
                where=str(path),
            )
        scale = tower.logit_scale if card.scaled else 1.0
        return CosineReward(
            card.info,
            tower,
            scale=scale,
            framing=card.framing,
            antialias=card.antialias,
            cleaning=card.cleaning,
        )
    if card.head == "cross":
        cross = cross_model_from(head, path).to(tower.device)
        return MPSReward(
            card.info, tower, cross, condition=card.condition, threshold=card.threshold
        )
    if len(card.attributes) == 1:
        return AestheticReward(card.info, tower, head_from_tensors(head, path).to(tower.device))
    layers = attributes_head(head, relu=card.layers == "relu", path=path)
    return AttributesReward(card.info, tower, layers.to(tower.device), card.attributes)


def write_trained(path: Path, card: Card, tensors: Mapping[str, Tensor], dtype: str) -> None:
    """Write a file of this form; an earlier one is replaced as a whole.

    Args:
        tensors: keys `tower.*` and `head.*`.
        dtype: of floating tensors, e.g. "float16"; the logit scale keeps float32, for in half it
            would be off by 0.1 %.
    """
    from safetensors.torch import save_file

    kind = getattr(torch, dtype)
    stored = {
        key: value.detach()
        .cpu()
        .to(kind if value.is_floating_point() and not key.endswith("logit_scale") else value.dtype)
        for key, value in _sparse(tensors).items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    text = json.dumps({"format": FORMAT, **asdict(card)}, sort_keys=True)
    contiguous = {key: value.contiguous().clone() for key, value in stored.items()}
    save_file(contiguous, temporary, metadata={_KEY: text})
    temporary.chmod(0o644)  # safetensors lets nobody else read what it writes
    os.replace(temporary, path)


def read_card(path: Path) -> Card:
    """The card of a file.

    Raises:
        RewardError: the file has none, or one of another format, or a damaged one.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
    except (SafetensorError, OSError, ValueError) as error:
        raise RewardError(
            f"cannot be read as safetensors: {error}",
            where=str(path),
            fix="it may be cut off or damaged: copy it again",
        ) from error
    if text is None:
        raise RewardError(
            "says nothing of a reward in its header: it is no reward that was trained here",
            where=str(path),
            fix="weights of a published scorer are given with its name: load(NAME, weights=FILE)",
        )
    try:
        return _card_of(json.loads(text))
    except (ValueError, TypeError, KeyError) as error:
        raise RewardError(f"its card is damaged: {error}", where=str(path)) from error
    except RewardError as error:
        raise RewardError(error.what, where=str(path), fix=error.fix) from None


def load_trained(path: Path, options: LoadOptions) -> Reward:
    """Build the reward of a file; one that is unchanged is read once per process.

    Raises:
        RewardError: another format, a tower that cannot be had or is not the one it was trained
            on, tensors that do not fit.
    """
    device = str(torch_device(options.device))
    given = None if options.tower is None else Path(options.tower).expanduser().resolve()

    def read(file: Path) -> Reward:
        card = read_card(file)
        changed, head = split(read_tensors(file), file)
        base = base_tower(card, file, device=device, dtype=options.dtype, given=given)
        config = tower_config(card.tower)
        tower = changed_tower(base, config, changed, file) if changed else base
        return build_reward(card, tower, head, file)

    return REWARDS_READ.get(lambda: path, (device, options.dtype, given), read)


REWARDS_READ: ReadOnce[Reward] = ReadOnce()


def base_tower(
    card: Card, path: Path, *, device: str, dtype: str = "float32", given: FilePath | None = None
) -> ClipTower:
    """The tower that a card names, as it is without the file's changes.

    Raises:
        RewardError: an unknown tower, or another than the file was trained on.
    """
    if card.tower not in TOWERS:
        raise RewardError(
            f"stands on the tower {card.tower!r}, which this version does not know",
            where=str(path),
            fix=f"known: {', '.join(TOWERS)}",
        )
    base = load_tower(card.tower, device=device, dtype=dtype, given=given)
    told = fingerprint(base)
    known = len(card.tower_values) in (_FINGERPRINT, len(told))
    wanted, found = torch.tensor(card.tower_values), torch.tensor(told[: len(card.tower_values)])
    # Half precision rounds them.
    tolerance = 1e-6 if dtype in ("float32", "float64") else 1e-2
    if not known or not torch.allclose(wanted, found, tolerance, 1e-6):
        raise RewardError(
            f"was trained on another {card.tower} than the one that is installed here",
            where=str(path),
            fix="give the tower's file that it was trained on: load(..., tower=FILE)",
        )
    return base


def split(tensors: Mapping[str, Tensor], path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A file's tensors of tower and head, without their prefixes.

    Raises:
        RewardError: a tensor of neither.
    """
    foreign = [key for key in tensors if not key.startswith((CHANGED, HEAD))]
    if foreign:
        raise RewardError(
            f"holds a tensor {foreign[0]!r} that is neither of the tower nor of the head",
            where=str(path),
        )
    return (
        {k.removeprefix(CHANGED): v for k, v in tensors.items() if k.startswith(CHANGED)},
        {k.removeprefix(HEAD): v for k, v in tensors.items() if k.startswith(HEAD)},
    )


def _sparse(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Store a token table that is mostly zeros by its other rows (`expand_token_table`)."""
    key = f"{CHANGED}token_embedding"
    table = tensors.get(f"{key}.weight")
    if table is None:
        return dict(tensors)
    rows = table.ne(0).any(dim=1).nonzero().flatten()
    if 2 * len(rows) > len(table):
        return dict(tensors)
    kept = {name: value for name, value in tensors.items() if name != f"{key}.weight"}
    return {**kept, f"{key}.rows": rows.int(), f"{key}.values": table[rows]}


def _card_of(content: Any) -> Card:
    if not isinstance(content, dict):
        raise ValueError("it is no object")
    if content.get("format") != FORMAT:
        raise RewardError(
            f"is of format {content.get('format')!r}; this version reads {FORMAT}",
            fix="use the version of reward_models that wrote it",
        )
    known = {option.name: option for option in fields(Card)}
    given = {key: value for key, value in content.items() if key in known}
    for name in ("attributes", "trained_on", "tower_values"):
        if name in given:
            given[name] = tuple(given[name])
    card = Card(**given)
    texts = (card.name, card.tower, card.range, card.licence, card.source, card.condition)
    if card.head not in get_args(HeadKind) or card.framing not in get_args(Framing):
        raise ValueError(f"head {card.head!r}, framing {card.framing!r}")
    if card.cleaning not in get_args(Cleaning):
        raise ValueError(f"cleaning {card.cleaning!r}")
    if card.layers not in get_args(Layers) or not all(isinstance(t, str) for t in texts):
        raise ValueError("values of another kind than the card's")
    numbers = (*card.tower_values, card.threshold, *card.validation.values())
    if not all(isinstance(n, int | float) for n in numbers):
        raise ValueError("texts where numbers belong")
    if not card.attributes or not all(isinstance(name, str) for name in card.attributes):
        raise ValueError("it names no attributes")
    return card
