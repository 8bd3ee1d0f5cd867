"""The small tokenizer: words of the grammar are single tokens, everything else is spelt."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from diffusion_align.tiny.text import MAX_TOKENS, new_tokenizer
from reward_models.small_world import captions


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return new_tokenizer()


def test_every_word_of_a_caption_is_one_token(tokenizer: CLIPTokenizer) -> None:
    for text in captions(200, 0):
        assert len(tokenizer(text).input_ids) == len(text.split()) + 2 <= MAX_TOKENS


@pytest.mark.parametrize("text", ["a cat", "zebra crossing", "élan"])
def test_other_words_are_spelt_without_unknown_tokens(tokenizer: CLIPTokenizer, text: str) -> None:
    ids = tokenizer(text).input_ids[1:-1]
    assert tokenizer.unk_token_id not in ids and tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids).strip().replace(" ", "") == text.replace(" ", "")


def test_it_survives_saving(tokenizer: CLIPTokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    text = captions(1, 3)[0]
    assert again(text).input_ids == tokenizer(text).input_ids
    assert again.model_max_length == MAX_TOKENS
