"""Tokens to text as they come: no half characters, nothing of a stop string."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from memcompile.compiler.commands.text_stream import TextStream, continue_text
from memcompile.models import networks

CHECKPOINT = Path(networks.__file__).parent / "checkpoints" / "bytes-small"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """One token a byte."""
    tokenizers = pytest.importorskip("tokenizers")
    return tokenizers.Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))


def test_a_character_comes_whole_with_its_last_byte(tokenizer: Any) -> None:
    stream = TextStream(continue_text(tokenizer, tokenizer.encode("so: ").ids))
    pieces = [stream.feed(byte) for byte in "aé漢😀".encode()]
    assert pieces == ["a", "", "é", "", "", "漢", "", "", "", "😀"]
    assert stream.rest() == ""


def test_half_a_character_at_the_end_is_left_out(tokenizer: Any) -> None:
    stream = TextStream(continue_text(tokenizer, tokenizer.encode("é").ids))
    pieces = [stream.feed(byte) for byte in "ab漢".encode()[:-1]]
    assert "".join(pieces) + stream.rest() == "ab"


def test_any_bytes_give_the_text_of_all_of_them(tokenizer: Any) -> None:
    dice = random.Random(0)
    for _ in range(100):
        words = [dice.choice(["é", "漢", "abc", "😀"]).encode() for _ in range(6)]
        words += [bytes([dice.randrange(256)]) for _ in range(6)]
        dice.shuffle(words)
        tokens = [*b"".join([*words, b"."])]
        stream = TextStream(continue_text(tokenizer, tokenizer.encode("x").ids))
        assert "".join(map(stream.feed, tokens)) + stream.rest() == tokenizer.decode(tokens)


def test_a_first_word_keeps_its_space() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = {"▁so": 0, "▁it": 1, "s": 2, "</s>": 3}
    spaced = tokenizers.Tokenizer(tokenizers.models.BPE(words, []))
    spaced.decoder = tokenizers.decoders.Metaspace()
    spaced.add_special_tokens(["</s>"])
    step = continue_text(spaced, [0])
    assert [step(token) for token in (1, 2, 3)] == [" it", "s", None]


@pytest.mark.parametrize(
    ("pieces", "stop", "shown", "stopped"),
    [
        (["ab", "cd"], ["bc"], ["a", ""], True),
        (["ab", "xd"], ["bc"], ["a", "bxd"], False),
        (["ab", "b", "c"], ["bbc"], ["a", "", ""], True),
        (["abcde"], ["de", "bc"], ["a"], True),
        (["a\n", "\n", "b"], ["\n\n"], ["a", ""], True),
        (["aaa", "b"], ["aab"], ["a", ""], True),
        (["ab"], [], ["ab"], False),
    ],
)
def test_nothing_of_a_stop_string_is_shown(
    pieces: list[str], stop: list[str], shown: list[str], stopped: bool
) -> None:
    stream = TextStream(lambda token: pieces[token], stop)
    found = []
    for token in range(len(pieces)):
        found.append(stream.feed(token))
        if stream.stopped:
            break
    assert (found, stream.stopped) == (shown, stopped)


def test_what_was_held_back_comes_where_no_stop_did() -> None:
    stream = TextStream(lambda token: "so\n", ["\n\n"])
    assert (stream.feed(0), stream.rest(), stream.rest()) == ("so", "\n", "")
