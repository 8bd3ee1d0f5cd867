"""Tokenizer and text encoder of ``tiny-sd``: CLIP's classes with the small world's own words."""

from __future__ import annotations

import json

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from reward_models.small_world.grammar import (
    BACKGROUNDS,
    COLOURS,
    COLUMNS,
    RELATIONS,
    ROWS,
    SHAPES,
    SIZES,
)

# Two objects, their relation and the background take 17 tokens with start and end; prompts in
# other words are spelt in bytes and need more.
MAX_TOKENS = 32
WIDTH = 96
_START, _END = "<|startoftext|>", "<|endoftext|>"


def new_tokenizer() -> CLIPTokenizer:
    """A CLIPTokenizer in which every word of the grammar is one token; other words are bytes."""
    words = [*SIZES, *COLOURS, *SHAPES, *ROWS, *COLUMNS, *BACKGROUNDS, *" ".join(RELATIONS).split()]
    words += ["a", "at", "the", "on", "background"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=4096, min_frequency=1, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(sorted(set(words)), trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    symbols = sorted(alphabet)
    tokens = [*symbols, *(s + "</w>" for s in symbols), *("".join(pair) for pair in merges)]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys([*tokens, _START, _END]))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained two-layer CLIPTextModel for that tokenizer."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
