"""Prompts as ImageReward's BERT reads them: bert-base-uncased's WordPiece and two words of BLIP's.

BLIP adds [DEC] and [ENC] behind the 30,522 words of the published vocabulary, and puts [ENC] first
where text looks at a picture. ImageReward adds them too, but was trained with [CLS] first.

Source: Devlin et al. 2019, "BERT" (arXiv 1810.04805), google-bert/bert-base-uncased;
zai-org/ImageReward (35 tokens, cut and padded).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from reward_models.base import RewardError

PROMPT_TOKENS = 35
ADDED_WORDS = ("[DEC]", "[ENC]")

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass(frozen=True)
class PromptTokens:
    """Prompts as BERT reads them: [CLS], words, [SEP], padding.

    Args:
        ids: int64 [B, 35].
        mask: int64 [B, 35], 0 at the padding.
        truncated: how many of the prompts were longer and were cut ([SEP] is kept).
    """

    ids: Tensor
    mask: Tensor
    truncated: int


class PromptTokenizer:
    """bert-base-uncased's WordPiece with BLIP's two words behind it.

    Prompts are lower-cased, freed of accents, and cut or padded to 35 tokens.

    Args:
        words: the lines of vocab.txt; a word's place is its id.
    """

    def __init__(self, words: Sequence[str]) -> None:
        from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

        ids = {word: index for index, word in enumerate(words)}
        tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
        tokenizer.add_special_tokens([*_SPECIAL, *ADDED_WORDS])
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            special_tokens=[(word, ids[word]) for word in ("[CLS]", "[SEP]")],
        )
        tokenizer.enable_truncation(PROMPT_TOKENS)
        tokenizer.enable_padding(length=PROMPT_TOKENS, pad_id=ids["[PAD]"], pad_token="[PAD]")
        self._tokenizer = tokenizer

    @property
    def vocabulary(self) -> int:
        """How many ids there are, BLIP's two included: 30,524 of the published vocabulary."""
        return int(self._tokenizer.get_vocab_size())

    def __call__(self, prompts: Sequence[str]) -> PromptTokens:
        """Tokenise B prompts; those that repeat are read once."""
        places = {prompt: index for index, prompt in enumerate(dict.fromkeys(prompts))}
        # One by one: `encode_batch` starts threads, and then warns whenever a loader forks.
        read = [self._tokenizer.encode(prompt) for prompt in places]
        rows = [read[places[prompt]] for prompt in prompts]
        return PromptTokens(
            ids=torch.tensor([row.ids for row in rows]),
            mask=torch.tensor([row.attention_mask for row in rows]),
            truncated=sum(bool(row.overflowing) for row in rows),
        )


def read_vocabulary(path: Path) -> PromptTokenizer:
    """The tokenizer of a vocab.txt: one word per line.

    Raises:
        RewardError: the file is no WordPiece vocabulary.
    """
    fix = "vocab.txt of google-bert/bert-base-uncased is wanted"
    try:
        # Only "\n" ends a word: `splitlines` would also cut at characters of other scripts.
        words = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RewardError(f"cannot be read: {error}", where=str(path), fix=fix) from error
    absent = [word for word in _SPECIAL if word not in words]
    if absent:
        raise RewardError(
            f"is no BERT vocabulary: it lacks {', '.join(absent)}", where=str(path), fix=fix
        )
    if len(set(words)) < len(words):
        twice = Counter(words).most_common(1)[0][0]
        raise RewardError(f"lists the word {twice!r} twice", where=str(path), fix=fix)
    return PromptTokenizer(words)
