"""The builder of tiny-clip: its shortcut and its sparse storage change nothing."""

from __future__ import annotations

import open_clip
import torch

from diffusion_align.tiny.build import sparse_tokens
from diffusion_align.tiny.clip import encode_short, new_clip, used_tokens
from reward_models.small_world import captions


def test_short_encoding_equals_the_full_context() -> None:
    torch.manual_seed(0)
    clip = new_clip().eval()
    tokens = open_clip.get_tokenizer("ViT-B-32")(captions(20, 0))
    with torch.no_grad():
        whole = clip.encode_text(tokens, normalize=True)
        short = encode_short(clip, tokens[:, :20])
    assert torch.allclose(short, whole, atol=1e-6)


def test_every_caption_is_made_of_the_stored_tokens() -> None:
    tokens = open_clip.get_tokenizer("ViT-B-32")(captions(500, 1))
    assert set(tokens.unique().tolist()) <= set(used_tokens().tolist())


def test_sparse_storage_holds_every_row_that_is_not_zero() -> None:
    torch.manual_seed(0)
    clip = new_clip()
    stored = sparse_tokens(clip)
    table = torch.zeros_like(clip.token_embedding.weight)
    table[stored["token_embedding.rows"].long()] = stored["token_embedding.values"].float()
    assert torch.equal(table, clip.token_embedding.weight.half().float())
    assert "token_embedding.weight" not in stored
