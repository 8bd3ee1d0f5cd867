"""A reward that trains: a start, a head, and one module through which everything trained runs.

The tower that scorers share in this process is never changed: training works on copies of exactly
the tensors that train, all others are shared memory. What comes out is a file that
`reward_models.load` takes (`trained`), and the scores of that file are those of `scorer()`, which
builds the same classes from the same tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reward_models import catalogue
from reward_models.aesthetic import AestheticHead, AestheticReward
from reward_models.attributes import OVERALL, AttributesReward
from reward_models.backbones import CHANGED, changed_tower, load_tower, tower_config
from reward_models.base import Reward, RewardError
from reward_models.clip_score import CosineReward
from reward_models.clip_tower import ClipTower
from reward_models.cross_attention import CrossModel
from reward_models.mps import CONDITION, THRESHOLD, MPSReward
from reward_models.networks import (
    CosineNetwork,
    CrossNetwork,
    RegressionNetwork,
    Texts,
    new_cross,
)
from reward_models.plan import HeadKind, RewardPlan
from reward_models.table import FilePath
from reward_models.towers import TOWERS
from reward_models.trained import (
    HEAD,
    Card,
    build_reward,
    fingerprint,
    read_card,
    write_trained,
)
from reward_models.unlocking import IMAGE_PROJECTION, TEXT_PROJECTION, frozen_below, unlocked

Network = CosineNetwork | CrossNetwork | RegressionNetwork


class TrainableReward:
    """What a plan describes, ready to be trained; float32.

    Args:
        plan: or the name of a start alone.
        device: where it trains.
        tower: the user's own copy of the tower's weights.
        seed: of a new head's weights.
        name: of the reward, in reports.

    Attributes:
        attributes: A names, the columns of what `network` gives.
        network: the module that trains; see `networks` for its forward.
        images_are_frozen, texts_are_frozen: whether `network` takes features of that side.

    Raises:
        RewardError: a start that stands on no CLIP tower, weights that cannot be had, more blocks
            than the tower has.
    """

    def __init__(
        self,
        plan: RewardPlan | str,
        *,
        device: str = "cpu",
        tower: FilePath | None = None,
        seed: int = 0,
        name: str = "",
    ) -> None:
        plan = RewardPlan(start=plan) if isinstance(plan, str) else plan
        started, self._base_name, judged = _start(plan.start, device, tower)
        base = load_tower(self._base_name, device=device, given=tower)
        self._started_tower = base if started is None else started.tower
        head_kind = plan.head or _kind_of(started) or "cosine"
        # What the start changed of its tower belongs to the file, whether it trains on or not.
        inherited = _differing(base, self._started_tower)
        own = dict(self._started_tower.model.state_dict())
        trained = unlocked(plan, head_kind, own)
        self._tower = changed_tower(
            self._started_tower,
            tower_config(self._base_name),
            {key: own[key].clone() for key in trained},
            Path(plan.start),
        )
        self._changed = [key for key in own if key in {*inherited, *trained}]
        own_attributes = judged if _kind_of(started) == head_kind else (OVERALL,)
        self.attributes = plan.attributes or own_attributes
        if set(self.attributes) == set(own_attributes):
            self.attributes = own_attributes  # in another order they would not be the start's
        self.images_are_frozen = frozen_below(head_kind, trained, image=True)
        self.texts_are_frozen = frozen_below(head_kind, trained, image=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            keeps = head_kind != "regression" or self.attributes == own_attributes
            sizes = self._tower.width, len(self.attributes)
            self._head, self.has_new_head = _head(
                plan, head_kind, started if keeps else None, sizes
            )
        self._card = _card(plan, started, head_kind, self.attributes, self._base_name, name)
        self._card = replace(self._card, tower_values=fingerprint(base))
        if isinstance(self._head, AestheticHead):
            self._card = replace(self._card, layers=_layers_of(self._head))
        self.network: Network = self._network(head_kind)
        self.network.to(base.device)
        parameters = dict(self._tower.model.named_parameters())
        for key in trained:
            parameters[key].requires_grad_(True)
        if self._head is not None:
            self._head.requires_grad_(True)
        self._trained = {CHANGED + key: parameters[key] for key in trained}
        self._trained |= {HEAD + k: p for k, p in self._parameters_of_head()}
        self._frozen = self._below_projections()

    @property
    def device(self) -> torch.device:
        return self._tower.device

    @property
    def head(self) -> HeadKind:
        return self._card.head

    @property
    def card(self) -> Card:
        """What a file of it says; without figures of a training."""
        return self._card

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that train, by their names in the file."""
        return dict(self._trained)

    def what_trains(self) -> str:
        """`18,433 of 1,102,337 parameters: visual.proj, text_projection, logit_scale`."""
        count = sum(p.numel() for p in self._trained.values())
        whole = sum(p.numel() for p in self.network.parameters())
        groups = dict.fromkeys(
            HEAD[:-1] if key.startswith(HEAD) else _group(key.removeprefix(CHANGED))
            for key in self._trained
        )
        return f"{count:,} of {whole:,} parameters: {', '.join(groups)}"

    def prepare(self, images: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [0, 1] as the tower's pixels [B, 3, S, S]."""
        if self.head != "cosine":
            return self._tower.prepare(images)
        card = self._card
        return self._tower.prepare(images, framing=card.framing, antialias=card.antialias)

    def image_inputs(self, pixels: Tensor) -> Tensor:
        """What `network` takes of prepared pixels: them, or a frozen tower's features."""
        if not self.images_are_frozen:
            return pixels.to(self.device)
        with torch.no_grad():
            if self.head == "cross":
                return self._tower.image_tokens(pixels)
            return self._frozen.image_features(pixels)

    def text_inputs(self, prompts: Sequence[str]) -> Texts:
        """What `network` takes of prompts: them, or what a frozen tower makes of them."""
        if self.head == "regression":
            return None
        if not self.texts_are_frozen:
            return list(prompts)
        with torch.no_grad():
            if isinstance(self.network, CrossNetwork):
                return self.network.read(prompts)
            tokens = self._frozen.tokenize(prompts, cleaning=self._card.cleaning)
            return self._frozen.encode_text(tokens.ids)

    def scores(self, outputs: Tensor) -> Tensor:
        """Outputs of `network` [N, A] on the scale that the reward is published on."""
        divided = self.head == "cosine" and not self._card.scaled
        return outputs / self.network.factor().detach() if divided else outputs

    def start_at(self, means: Tensor) -> None:
        """Let a new regression head begin at these ratings [A], which it need not learn then."""
        if self.head == "regression" and self.has_new_head:
            last = self._head.layers[-1]  # type: ignore[union-attr, index]
            with torch.no_grad():
                last.bias.copy_(means)  # type: ignore[union-attr, operator, arg-type]

    def scorer(self) -> Reward:
        """The reward as it is now, through the classes that its file is loaded with."""
        tensors = self.tensors()
        changed = {k.removeprefix(CHANGED): v for k, v in tensors.items() if k.startswith(CHANGED)}
        head = {k.removeprefix(HEAD): v for k, v in tensors.items() if k.startswith(HEAD)}
        where = Path(self._card.name)
        # A tower of its own, so that it remembers no prompt as it was encoded before.
        config = tower_config(self._base_name)
        tower = changed_tower(self._started_tower, config, changed, where)
        copied = {key: value.clone() for key, value in head.items()}
        return build_reward(self._card, tower, copied, where)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that its file holds, as it is now (shared memory)."""
        state = self._tower.model.state_dict()
        found = {CHANGED + key: state[key].detach() for key in self._changed}
        if self._head is not None:
            found |= {HEAD + key: v.detach() for key, v in self._head.state_dict().items()}
        return found

    def save(
        self,
        path: str | Path,
        *,
        dtype: str = "float32",
        tensors: Mapping[str, Tensor] | None = None,
        card: Card | None = None,
    ) -> Path:
        """Write the reward's file, or into a folder its `reward.safetensors`.

        Args:
            dtype: of the stored numbers; "float16" halves the file, scores move in the third digit.
            tensors: values of trained tensors to write in place of the present ones, by `trained()`
                names.
            card: with the figures of a training (`card` with some replaced).
        """
        file = Path(path).expanduser()
        if file.suffix != ".safetensors":
            file = file / catalogue.TRAINED_FILE
        write_trained(file, card or self._card, {**self.tensors(), **(tensors or {})}, dtype)
        return file

    def _parameters_of_head(self) -> list[tuple[str, nn.Parameter]]:
        return [] if self._head is None else list(self._head.named_parameters())

    def _network(self, head: HeadKind) -> Network:
        if head == "regression":
            assert isinstance(self._head, AestheticHead)
            return RegressionNetwork(self._tower, self._head, frozen_images=self.images_are_frozen)
        if head == "cross":
            assert isinstance(self._head, CrossModel)
            return CrossNetwork(
                self._tower,
                self._head,
                condition=self._card.condition,
                threshold=self._card.threshold,
                frozen_images=self.images_are_frozen,
                frozen_texts=self.texts_are_frozen,
            )
        return CosineNetwork(
            self._tower,
            cleaning=self._card.cleaning,
            frozen_images=self.images_are_frozen,
            frozen_texts=self.texts_are_frozen,
        )

    def _below_projections(self) -> ClipTower:
        """The tower whose features are those that a cosine head's projections are applied to."""
        if self.head != "cosine":
            return self._tower
        tower = changed_tower(self._tower, tower_config(self._base_name), {}, Path())
        model = tower.model
        # Multiplying by one changes nothing, and the tower needs no other way of computing.
        model.visual.proj = _identity(self._tower.model.get_parameter(IMAGE_PROJECTION))
        model.text_projection = _identity(self._tower.model.get_parameter(TEXT_PROJECTION))
        return tower


def _start(name: str, device: str, tower: FilePath | None) -> tuple[Any, str, tuple[str, ...]]:
    """The reward that a start names (None for a bare tower), its tower's name, its attributes."""
    if name in TOWERS and name not in catalogue.ROWS:
        return None, name, (OVERALL,)
    attributes: tuple[str, ...] = (OVERALL,)
    known = f"towers: {', '.join(TOWERS)}"
    if not catalogue.is_file(name):
        row = catalogue.find(name)
        if not row.tower:
            raise RewardError(
                "stands on no CLIP tower of the catalogue, so it cannot be trained on",
                where=f"reward {row.info.name}",
                fix=f"start from a tower: {known}",
            )
        name, tower_name = row.info.name, row.tower
    else:
        card = read_card(catalogue.existing_file(name))
        tower_name, attributes = card.tower, card.attributes
    started = catalogue.load(name, device=device, tower=tower)
    return started, tower_name, attributes


def _kind_of(started: Any) -> HeadKind | None:
    if isinstance(started, CosineReward):
        return "cosine"
    if isinstance(started, MPSReward):
        return "cross"
    return "regression" if isinstance(started, AestheticReward | AttributesReward) else None


def _head(
    plan: RewardPlan, kind: HeadKind, started: Any, sizes: tuple[int, int]
) -> tuple[AestheticHead | CrossModel | None, bool]:
    """The head that trains, and whether it is a new one.

    Args:
        started: whose head is copied where it is of this kind; None for a new one.
        sizes: of an embedding, and of the outputs.
    """
    if kind == "cosine":
        return None, False
    if kind == "cross":
        if isinstance(started, MPSReward):
            _refuse_unread(plan, "cross_layers", "cross_heads", "cross_head_dim", "cross_ff")
            return _copy(started.cross), False
        own = plan.cross_layers, plan.cross_heads, plan.cross_head_dim, plan.cross_ff
        return new_cross(sizes[0], *own), True
    if isinstance(started, AestheticReward | AttributesReward):
        _refuse_unread(plan, "layers", "hidden")
        return _copy(started.head), False
    hidden = () if plan.layers == "linear" else plan.hidden
    widths = (sizes[0], *hidden, sizes[1])
    return AestheticHead(widths, relu=plan.layers == "relu"), True


def _refuse_unread(plan: RewardPlan, *names: str) -> None:
    """A head that goes on training has its own size; another one would be ignored silently."""
    for name in names:
        if getattr(plan, name) != RewardPlan.__dataclass_fields__[name].default:
            raise RewardError(
                f"is given, but {plan.start} brings its own head",
                where=name,
                fix="leave it out, or start from the tower",
            )


def _first(*values: float | None) -> float:
    return next(value for value in values if value is not None)


def _copy(module: Any) -> Any:
    import copy

    return copy.deepcopy(module)


def _card(
    plan: RewardPlan,
    started: Any,
    head: HeadKind,
    attributes: tuple[str, ...],
    tower: str,
    name: str,
) -> Card:
    same = started is not None and _kind_of(started) == head
    cosine = started if same and head == "cosine" else None
    cross = started if same and head == "cross" else None
    licence = started.info.licence if started is not None else f"that of {tower}"
    return Card(
        name=name or f"{head} over {tower}",
        head=head,
        tower=tower,
        tower_values=(),
        attributes=attributes,
        framing=plan.framing or (cosine.framing if cosine else "crop"),
        antialias=cosine.antialias if cosine else True,
        cleaning=cosine.cleaning if cosine else "ftfy",
        scaled=cosine is not None and cosine.scale != 1.0,
        condition=plan.condition or (cross.condition if cross else CONDITION),
        threshold=_first(plan.threshold, cross.threshold if cross else None, THRESHOLD),
        licence=f"{licence}, and that of the data it was trained on",
        source=f"trained by reward_models from {plan.start}",
    )


def _layers_of(head: AestheticHead) -> Any:
    if len(head.layers) == 1:
        return "linear"
    return "relu" if any(isinstance(m, nn.ReLU) for m in head.layers) else "linear-mse"


def _differing(base: ClipTower, other: ClipTower) -> list[str]:
    """The keys of tensors that do not share memory with the base's."""
    if other is base:
        return []
    ours = base.model.state_dict()
    theirs = other.model.state_dict()
    return [key for key in theirs if theirs[key].data_ptr() != ours[key].data_ptr()]


def _identity(projection: Tensor) -> nn.Parameter:
    eye = torch.eye(projection.shape[0], dtype=projection.dtype, device=projection.device)
    return nn.Parameter(eye, requires_grad=False)


def _group(key: str) -> str:
    """`visual.transformer.resblocks.3.attn.in_proj_weight` -> `visual.transformer.resblocks.3`."""
    parts = key.split(".")
    if "resblocks" in parts:
        return ".".join(parts[: parts.index("resblocks") + 2])
    return ".".join(parts[:2]) if parts[0] == "visual" else parts[0]
