"""``tiny-clip``: the tower that every reward model of the small world stands on.

The tower is open_clip's CLIP class. It learns from renders, spoiled and wrong ones, and samples of
``tiny-sd`` to tell the true caption from those of other pictures and from captions with one wrong
word (contrastive loss, Radford et al. 2021, with hard negatives), and beside that how many claims
of a caption hold, how neat a picture is and how deep its colours are, so that its features hold
what all heads need. The rewards on it are trained afterwards, on crowds (`rewards`).
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
from reward_models.small_world import JudgedPairs, change_one_attribute, parse_caption
from reward_models.small_world.grammar import (
    BACKGROUNDS,
    COLOURS,
    COLUMNS,
    RELATIONS,
    ROWS,
    SHAPES,
    SIZES,
)

TOWER_STEPS = 8000
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


def pixels(images: np.ndarray, indices: Tensor) -> Tensor:
    """Normalised float32 [n, 3, 64, 64], as the tower takes them, of uint8 [N, 3, 64, 64]."""
    return (torch.from_numpy(images)[indices].float() / 255 - _MEAN) / _STD


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


def train_clip(
    work: Path, judged: JudgedPairs, *, start: CLIP | None = None, seed: int = 3, batch: int = 96
) -> CLIP:
    """Train the tower on both pictures of all pairs; resumable from ``work``.

    No crowd's answers are looked at, only what is true of the pictures.

    Args:
        start: the tower to go on from; None begins with an untrained one.
    """
    torch.manual_seed(seed)
    clip = start or new_clip()
    # Only for training: the features must hold how neat a picture is and how deep its colours.
    clip.add_module("parts", nn.Sequential(nn.Linear(WIDTH, 128), nn.ReLU(), nn.Linear(128, 2)))
    clip.register_parameter("claims", nn.Parameter(torch.tensor([4.0, -1.0])))
    images = np.concatenate([judged.first, judged.second])
    captions = [*judged.captions, *judged.captions]
    tasted = [*judged.tasted_first, *judged.tasted_second]
    claims = torch.tensor([item.claims for item in tasted])
    parts = torch.tensor([[item.neatness, item.palette] for item in tasted])
    centre, spread = parts.mean(dim=0), parts.std(dim=0)
    tokenize = open_clip.get_tokenizer("ViT-B-32")
    rng = np.random.default_rng(np.random.Philox(key=seed))
    parsed = [parse_caption(text) for text in judged.captions]
    true = tokenize(judged.captions)[:, :_TOKENS].repeat(2, 1)
    changed = [
        tokenize([str(change_one_attribute(caption, rng)) for caption in parsed])[:, :_TOKENS]
        for _ in range(2 * _NEGATIVES)
    ]
    wrong = torch.stack(changed, dim=1).repeat(2, 1, 1)

    def step(generator: torch.Generator) -> Tensor:
        indices = torch.randint(len(captions), (batch,), generator=generator)
        chosen = torch.randperm(2 * _NEGATIVES, generator=generator)[:_NEGATIVES]
        image = clip.encode_image(pixels(images, indices), normalize=True)
        texts = torch.cat([true[indices], wrong[indices][:, chosen].flatten(0, 1)])
        text = encode_short(clip, texts)
        scale = clip.logit_scale.exp().clamp(max=100)
        own, others = text[:batch], text[batch:].unflatten(0, (batch, _NEGATIVES))
        cosine = image @ own.T
        hard = scale * torch.einsum("bd,bnd->bn", image, others)
        # A picture that breaks its caption is no example of it, only of how much of it holds.
        holds = (claims[indices] == 1).nonzero().flatten()
        logits = scale * cosine
        contrast = F.cross_entropy(torch.cat([logits, hard], 1)[holds], holds)
        contrast = (contrast + F.cross_entropy(logits.T[holds], holds)) / 2
        factor, offset = clip.claims
        held = F.mse_loss(factor * cosine.diagonal() + offset, claims[indices])
        felt = F.mse_loss(clip.parts(image), (parts[indices] - centre) / spread)
        return contrast + 10 * held + felt

    fit(
        clip,
        step,
        steps=TOWER_STEPS,
        learning_rate=1e-3,
        checkpoint=work / "clip.pt",
        seed=seed,
        ema_decay=0.998,
    )
    del clip.parts, clip.claims
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
def features(clip: CLIP, images: np.ndarray) -> Tensor:
    """L2-normalised image features float32 [N, 96] of uint8 [N, 3, 64, 64]."""
    parts = torch.arange(len(images)).split(256)
    return torch.cat([clip.encode_image(pixels(images, p), normalize=True) for p in parts])
