"""``tiny-clip`` and the head ``tiny-aesthetic``: reward models of the small world.

The tower is open_clip's CLIP class. It learns from renders, spoiled renders and samples of
``tiny-sd`` to tell the true caption from those of other pictures and from captions with one wrong
word (contrastive loss, Radford et al. 2021, with hard negatives), and beside that to feel the
aesthetic crowd's ratings, so that its features hold what all heads need. The shipped head is fitted
afterwards on the frozen features, as the LAION predictors were.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import open_clip
import torch
from open_clip.model import CLIP
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion_align.tiny.fit import fit
from reward_models.small_world import (
    AESTHETIC_CROWD,
    Caption,
    change_one_attribute,
    parse_caption,
    random_caption,
    random_scene,
    render,
    taste,
)
from reward_models.small_world.corrupt import corrupt
from reward_models.small_world.grammar import (
    BACKGROUNDS,
    COLOURS,
    COLUMNS,
    RELATIONS,
    ROWS,
    SHAPES,
    SIZES,
)

TOWER_STEPS = 5200
HEAD_STEPS = 3000
WIDTH = 96
CONFIG: dict[str, object] = {
    "embed_dim": WIDTH,
    "vision_cfg": {
        "image_size": 64,
        "layers": 4,
        "width": 128,
        "head_width": 32,
        "patch_size": 8,
        "mlp_ratio": 3.0,
    },
    "text_cfg": {
        "context_length": 77,
        "vocab_size": 49408,
        "width": 64,
        "heads": 4,
        "layers": 3,
    },
}
_TOKENS = 20  # captions are at most 17 tokens long; the rest of the context is padding
_NEGATIVES = 3
# CLIP's pixel statistics (Radford et al. 2021), those of every scorer over a CLIP tower.
_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]


class Judged:
    """Pictures uint8 [N, 3, 64, 64] with captions and the crowd's noiseless and noisy ratings."""

    def __init__(self, images: np.ndarray, wanted: list[Caption]) -> None:
        self.images = torch.from_numpy(images)
        self.captions = wanted
        tasted = [
            taste(image / 255, caption) for image, caption in zip(images, wanted, strict=True)
        ]
        opinions = np.asarray([AESTHETIC_CROWD.opinion(item) for item in tasted])
        self.opinions = torch.from_numpy(opinions).float()
        self.ratings = torch.from_numpy(AESTHETIC_CROWD.rate(opinions)).float()

    def pixels(self, indices: Tensor) -> Tensor:
        """Normalised float32 [n, 3, 64, 64] as the tower takes them."""
        return (self.images[indices].float() / 255 - _MEAN) / _STD


def judged_renders(texts: list[str], seed: int) -> Judged:
    """One clean render for each caption."""
    rng = np.random.default_rng(np.random.Philox(key=seed))
    wanted = [parse_caption(text) for text in texts]
    images = np.stack([render(random_scene(caption, rng)) for caption in wanted])
    return Judged(np.round(images * 255).astype(np.uint8), wanted)


def judged_pictures(
    count: int, seed: int, split: str, samples: tuple[Tensor, list[str]] | None
) -> Judged:
    """Renders, half of them spoiled, then ``samples`` (pictures in [0, 1] and their captions)."""
    rng = np.random.default_rng(np.random.Philox(key=seed))
    images, wanted = [], []
    for i in range(count):
        caption = random_caption(rng, split)  # type: ignore[arg-type]
        picture = render(random_scene(caption, rng))
        images.append(corrupt(picture, rng) if i % 2 else picture)
        wanted.append(caption)
    if samples is not None:
        images += list(samples[0].numpy())
        wanted += [parse_caption(text) for text in samples[1]]
    return Judged(np.round(np.stack(images) * 255).astype(np.uint8), wanted)


def new_clip() -> CLIP:
    """An untrained tower; rows of the token table that no caption uses are zero."""
    clip = CLIP(**CONFIG)  # type: ignore[arg-type]
    unused = torch.ones(clip.vocab_size, dtype=torch.bool)
    unused[used_tokens()] = False
    with torch.no_grad():
        clip.token_embedding.weight[unused] = 0
    return clip


def used_tokens() -> Tensor:
    """Ids, sorted, of the tokens that captions are made of, with start, end and padding."""
    words = [*SIZES, *COLOURS, *SHAPES, *ROWS, *COLUMNS, *BACKGROUNDS, *RELATIONS]
    text = " ".join(words) + " a at the on background"
    return open_clip.get_tokenizer("ViT-B-32")([text]).unique()


def train_clip(work: Path, judged: Judged, *, seed: int = 3, batch: int = 64) -> CLIP:
    """Train the tower; resumable from ``work``."""
    torch.manual_seed(seed)
    clip = new_clip()
    # Only for training: makes the features hold what raters see. Each head is fitted later.
    clip.add_module("rater", nn.Sequential(nn.Linear(WIDTH, 128), nn.ReLU(), nn.Linear(128, 1)))
    tokenize = open_clip.get_tokenizer("ViT-B-32")
    true = tokenize([str(caption) for caption in judged.captions])[:, :_TOKENS]
    rng = np.random.default_rng(np.random.Philox(key=seed))
    wrong = torch.stack(
        [
            tokenize([str(change_one_attribute(c, rng)) for c in judged.captions])[:, :_TOKENS]
            for _ in range(2 * _NEGATIVES)
        ],
        dim=1,
    )
    centre, spread = judged.ratings.mean(), judged.ratings.std()

    def step(generator: torch.Generator) -> Tensor:
        indices = torch.randint(len(judged.captions), (batch,), generator=generator)
        chosen = torch.randperm(2 * _NEGATIVES, generator=generator)[:_NEGATIVES]
        image = clip.encode_image(judged.pixels(indices), normalize=True)
        texts = torch.cat([true[indices], wrong[indices][:, chosen].flatten(0, 1)])
        text = encode_short(clip, texts)
        scale = clip.logit_scale.exp().clamp(max=100)
        own, others = text[:batch], text[batch:].unflatten(0, (batch, _NEGATIVES))
        logits = scale * image @ own.T
        hard = scale * torch.einsum("bd,bnd->bn", image, others)
        labels = torch.arange(batch)
        contrast = F.cross_entropy(torch.cat([logits, hard], 1), labels)
        contrast = (contrast + F.cross_entropy(logits.T, labels)) / 2
        felt = clip.rater(image).squeeze(1)
        rating = (judged.ratings[indices] - centre) / spread
        return contrast + F.mse_loss(felt, rating)

    fit(
        clip,
        step,
        steps=TOWER_STEPS,
        learning_rate=1e-3,
        checkpoint=work / "clip.pt",
        seed=seed,
        ema_decay=0.998,
    )
    del clip.rater
    return clip


def encode_short(clip: CLIP, tokens: Tensor) -> Tensor:
    """L2-normalised text features [n, WIDTH] of tokens [n, L] cut off behind the end token.

    The same as ``clip.encode_text`` of the full context, since attention looks back only and the
    feature is read at the end token; L = 20 in place of 77 makes training several times faster.
    """
    length = tokens.shape[1]
    x = clip.token_embedding(tokens) + clip.positional_embedding[:length]
    x = clip.ln_final(clip.transformer(x, attn_mask=clip.attn_mask[:length, :length]))
    ends = x[torch.arange(len(tokens)), tokens.argmax(1)]
    return F.normalize(ends @ clip.text_projection, dim=-1)


@torch.no_grad()
def features(clip: CLIP, judged: Judged) -> Tensor:
    """L2-normalised image features float32 [N, 96]."""
    parts = torch.arange(len(judged.captions)).split(256)
    return torch.cat([clip.encode_image(judged.pixels(p), normalize=True) for p in parts])


class Head(nn.Module):
    """The layout of LAION's ReLU head (``ava+logos-l14-reluMSE``), with narrower layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Linear(width, 128), nn.ReLU(), nn.Dropout(0.1)),
            *(nn.Linear(128, 64), nn.ReLU(), nn.Dropout(0.1)),
            *(nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.1)),
            *(nn.Linear(32, 16), nn.ReLU()),
            nn.Linear(16, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Ratings [n] of features [n, width]."""
        return self.layers(x).squeeze(1)


def train_aesthetic(work: Path, clip: CLIP, judged: Judged, *, seed: int = 4) -> Head:
    """Fit the head to the crowd's noisy ratings on frozen features."""
    torch.manual_seed(seed)
    head, x = Head(WIDTH), features(clip, judged)
    # Starting at the mean rating spares the head from learning it.
    nn.init.constant_(head.layers[-1].bias, float(judged.ratings.mean()))  # type: ignore[arg-type]

    def step(generator: torch.Generator) -> Tensor:
        indices = torch.randint(len(x), (512,), generator=generator)
        return F.mse_loss(head(x[indices]), judged.ratings[indices])

    fit(
        head,
        step,
        steps=HEAD_STEPS,
        learning_rate=1e-3,
        checkpoint=work / "aesthetic.pt",
        seed=seed,
        ema_decay=0.998,
    )
    return head
