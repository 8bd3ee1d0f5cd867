"""Tokens against hand-worked ones and transformers' BertTokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from reward_models.base import RewardError
from reward_models.wordpiece import PromptTokenizer, PromptTokens, read_vocabulary
from tests.reward_models import small_blip as small


@pytest.fixture(scope="module")
def tokenizer() -> PromptTokenizer:
    return PromptTokenizer(small.WORDS)


def test_tokens_of_a_prompt_worked_by_hand(tokenizer: PromptTokenizer) -> None:
    # Upper case and the accent go; "Runners" has no word of its own and no ending that fits.
    tokens = tokenizer(["A Background DOG, running: Café's  unlikely\t犬犬!"])
    words = "[CLS] a back ##ground dog , run ##ning [UNK] cafe ' s un ##likely 犬 犬 ! [SEP]"
    expected = [small.WORDS.index(word) for word in words.split()]
    assert tokens.ids.tolist() == [expected + [0] * (35 - len(expected))]
    assert tokens.mask.tolist() == [[1] * len(expected) + [0] * (35 - len(expected))]
    assert tokens.truncated == 0
    assert tokens.ids.dtype == tokens.mask.dtype == torch.int64


TRICKY = [
    "",
    "a red circle",
    "A RED Círcle, on the ÉCLAIR...",
    "unlikely dogs' running\u200b backgrounders",
    "tabs\tand\nnewlines\r\nand\u00a0spaces",
    "犬 and 犬犬dog",
    "[ENC] a [MASK] dog [SEP] red [DEC] [enc] [CLS]",
    "x" * 101 + " a",
    "emoji 🐕 dog",
    " ".join(["dog"] * 33),
    " ".join(["dog"] * 34),
    " ".join(["dogs un##likely"] * 40),
]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """transformers' BertTokenizer with the two words added the way BLIP adds them."""
    from transformers import BertTokenizer

    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(small.WORDS) + "\n", encoding="utf-8")
    tokenizer = BertTokenizer.from_pretrained(str(folder))
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_tokens(["[ENC]"], special_tokens=True)
    return tokenizer


@pytest.mark.parametrize("prompt", TRICKY)
def test_tokens_are_those_of_transformers(
    reference: Any, tokenizer: PromptTokenizer, prompt: str
) -> None:
    expected = reference([prompt], padding="max_length", truncation=True, max_length=35)
    tokens = tokenizer([prompt])
    assert tokens.ids.tolist() == expected["input_ids"]
    assert tokens.mask.tolist() == expected["attention_mask"]
    whole = reference([prompt])["input_ids"][0]
    assert tokens.truncated == int(len(whole) > 35)


def test_first_token_stays_cls_and_long_prompts_keep_sep(tokenizer: PromptTokenizer) -> None:
    tokens = tokenizer(TRICKY)
    assert tokens.ids.shape == tokens.mask.shape == (len(TRICKY), 35)
    assert set(tokens.ids[:, 0].tolist()) == {small.WORDS.index("[CLS]")}
    assert tokens.ids[-1, -1] == small.WORDS.index("[SEP]") and tokens.mask[-1].all()
    assert tokens.truncated == 2  # 34 dogs and the last; 33 dogs fit exactly


def test_blips_own_words_come_behind_the_vocabulary(tokenizer: PromptTokenizer) -> None:
    count = len(small.WORDS)
    assert tokenizer.vocabulary == count + 2
    assert tokenizer(["[DEC] [ENC]"]).ids[0, 1:3].tolist() == [count, count + 1]


def test_repeated_prompts_are_read_once_and_counted_each(
    tokenizer: PromptTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = " ".join(["dog"] * 50)
    apart = [tokenizer([prompt]) for prompt in ("a dog", long, "red")]
    read: list[str] = []

    class Counting:
        def encode(self, prompt: str) -> Any:
            read.append(prompt)
            return whole.encode(prompt)

    whole = tokenizer._tokenizer
    monkeypatch.setattr(tokenizer, "_tokenizer", Counting())
    tokens: PromptTokens = tokenizer(["a dog", long, "a dog", long, "red"])
    assert read == ["a dog", long, "red"]
    order = (0, 1, 0, 1, 2)
    assert torch.equal(tokens.ids, torch.cat([apart[index].ids for index in order]))
    assert tokens.truncated == 2


def test_a_vocabulary_is_read_line_by_line(tmp_path: Path) -> None:
    # NEL and the line separator are characters of a word, not ends of a line.
    words = [*small.WORDS, "a\x85b", "c\u2028d", "zebra"]
    for ending in ("\n", "\r\n"):
        path = tmp_path / "vocab.txt"
        path.write_bytes((ending.join(words) + ending).encode())
        loaded = read_vocabulary(path)
        assert loaded.vocabulary == len(words) + 2
        assert loaded(["zebra"]).ids[0, 1] == words.index("zebra")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"lacks \[PAD\], \[UNK\], \[CLS\]"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"[PAD]\n[UNK]\n[SEP]\n[MASK]\na", r"lacks \[CLS\]"),
        (b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nb\na\n", "lists the word 'a' twice"),
    ],
)
def test_other_files_are_no_vocabulary(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "vocab.txt"
    path.write_bytes(content)
    with pytest.raises(RewardError, match=message) as caught:
        read_vocabulary(path)
    assert "vocab.txt" in str(caught.value)
