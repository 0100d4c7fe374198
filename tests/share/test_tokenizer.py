"""tokenizer.json gives the ids of `blt_runtime.ids.encode`, in tokenizers and in transformers."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from blt.share.tokenizer import SPECIAL, byte_characters, generation_config, tokenizer, tokenizer_config
from blt_runtime.ids import BOS, EOS, OFFSET, VOCAB, encode

tokenizers = pytest.importorskip("tokenizers", reason="the bpe extra is not installed")
TEXTS = ("", " a  b .\n  don't\u00a0x\u2028 \r\n\t\0", "e\u0301 \ufb01 \u6771\u4eac \U0001f680", "x" * 1000)


@pytest.fixture(scope="module")
def loaded() -> Any:
    return tokenizers.Tokenizer.from_str(json.dumps(tokenizer()))


def random_texts() -> list[str]:
    generator = random.Random(0)
    ranges = ((0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x110000))
    return ["".join(chr(generator.randrange(*generator.choice(ranges))) for _ in range(40)) for _ in range(100)]


def test_texts_get_the_ids_of_their_bytes_and_come_back(loaded: Any) -> None:
    for text in (*TEXTS, *random_texts()):
        assert loaded.encode(text).ids == encode(text).tolist()
        assert loaded.encode(text, add_special_tokens=False).ids == encode(text, bos=False).tolist()
        assert loaded.decode(loaded.encode(text).ids) == text


def test_every_byte_value_and_special_token_has_its_id(loaded: Any) -> None:
    assert loaded.get_vocab_size() == VOCAB
    for byte, character in enumerate(byte_characters()):
        assert loaded.token_to_id(character) == byte + OFFSET
        assert loaded.id_to_token(byte + OFFSET) == character
    assert {id: loaded.id_to_token(id) for id in range(OFFSET)} == SPECIAL
    assert len(set(byte_characters())) == 256


def test_bytes_in_a_text_cover_all_that_utf_8_has(loaded: Any) -> None:
    """Every byte value that valid UTF-8 contains goes through encode and decode; the other 13 never occur in it."""
    text = "".join(
        map(chr, (*range(0x80), *range(0x80, 0x800), *range(0x800, 0xD800, 64), *range(0xE000, 0x110000, 4096)))
    )
    assert set(range(256)) - set(text.encode()) == {0xC0, 0xC1, *range(0xF5, 0x100)}
    assert loaded.decode(loaded.encode(text).ids) == text


def test_a_special_token_in_a_text_is_text_where_the_library_is_told_so(loaded: Any) -> None:
    own = tokenizers.Tokenizer.from_str(loaded.to_str())
    own.encode_special_tokens = True
    assert own.encode("a<|eos|>").ids == encode("a<|eos|>").tolist()


def test_transformers_loads_the_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="compared with transformers: pip install transformers")
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer()))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(640)))
    (tmp_path / "generation_config.json").write_text(json.dumps(generation_config()))
    for kind in (transformers.PreTrainedTokenizerFast, transformers.AutoTokenizer):
        loaded = kind.from_pretrained(tmp_path)
        for text in (*TEXTS, "a<|eos|><|bos|>b"):
            assert loaded(text).input_ids == encode(text).tolist()
            assert loaded.decode(loaded(text).input_ids, skip_special_tokens=True) == text
        assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (BOS, EOS, 0)
        assert loaded.model_max_length == 640
    generation = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert (generation.bos_token_id, generation.eos_token_id) == (BOS, EOS)
