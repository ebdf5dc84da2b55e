"""Pieces of text: together the whole, never half a character, nothing of a stop text."""

import random
from itertools import pairwise

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from ep_export.serving.answer_text import AnswerText

TEXT = "naïve café 数字は三つ 👩‍🚀 and\n\n  so   on, 3.5 % – «où»? "


def bytes_alone():
    """A token a byte: every character beyond ASCII is several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def words_with_spaces():
    """Words that carry their space in front, which a decoder takes from the first one, as SentencePiece."""
    words = ["▁the", "▁red", "one", "▁", ",", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def pieces_of(text, ids):
    return [*(text.push(token) for token in ids), text.end()]


def test_no_piece_ends_within_a_character():
    tokenizer = bytes_alone()
    text = AnswerText(tokenizer.decode)
    pieces = pieces_of(text, tokenizer.encode(TEXT).ids)
    assert "".join(pieces) == text.text == TEXT
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)


def test_half_a_character_at_the_end_is_told_at_the_end():
    tokenizer = bytes_alone()
    ids = tokenizer.encode("né").ids[:-1]
    text = AnswerText(tokenizer.decode)
    assert pieces_of(text, ids) == ["n", "", "\N{REPLACEMENT CHARACTER}"]


def test_any_bytes_together_are_the_whole_text():
    tokenizer, draw = bytes_alone(), random.Random(0)  # noqa: S311 - no secret
    for _ in range(200):
        ids = [draw.randrange(256) for _ in range(draw.randint(1, 12))]
        assert "".join(pieces_of(AnswerText(tokenizer.decode), ids)) == tokenizer.decode(ids)


def test_words_and_characters_in_bytes_together_are_the_whole_text():
    tokenizer, draw = words_with_spaces(), random.Random(0)  # noqa: S311
    characters = [[f"<0x{byte:02X}>" for byte in character.encode()] for character in "é数👩A\n"]
    for _ in range(200):
        units = draw.choices([["▁the"], ["▁red"], ["one"], ["▁"], [","], *characters], k=draw.randint(1, 12))
        ids = [tokenizer.token_to_id(word) for unit in units for word in unit]
        assert "".join(pieces_of(AnswerText(tokenizer.decode), ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("stops", [("and",), ("zzz", "on, 3"), ("where", "\n\n", "so"), ("数字",), ("n",)])
def test_text_ends_before_the_first_stop_text(stops):
    tokenizer = bytes_alone()
    text = AnswerText(tokenizer.decode, stops)
    pieces = pieces_of(text, tokenizer.encode(TEXT).ids)
    assert "".join(pieces) == text.text == TEXT[: min(TEXT.find(s) for s in stops if s in TEXT)]
    assert text.stopped


def test_what_only_begins_like_a_stop_text_is_given_late_and_whole():
    tokenizer = bytes_alone()
    text = AnswerText(tokenizer.decode, ("abcd", "ccc"))
    pieces = pieces_of(text, tokenizer.encode("xabcaabccd").ids)
    assert pieces == ["x", "", "", "", "abc", "a", "", "", "ab", "ccd", ""]
    assert not text.stopped


def test_without_stop_texts_nothing_is_held_back():
    tokenizer = bytes_alone()
    text = AnswerText(tokenizer.decode)
    given = [len(text.text) for token in tokenizer.encode("plain words").ids if text.push(token) or True]
    assert all(after == before + 1 for before, after in pairwise(given))
