"""The bytes as a tokenizer that `tokenizers` and `transformers` load: id = byte + 4, ids 0 to 3 are special.

It is a BPE vocabulary without merges, over GPT-2's characters for the 256 bytes. `encode` puts BOS in front, as
`blt_runtime.ids.encode` does; `add_special_tokens=False` leaves it out. transformers reads a special token that is
written out in a text as bytes (`split_special_tokens`); `tokenizers` alone does so with `encode_special_tokens = True`.
"""

from __future__ import annotations

from typing import Any

from blt_runtime.ids import BOE, BOS, BPE, EOS, OFFSET, VOCAB

SPECIAL = {BOE: "<|boe|>", BOS: "<|bos|>", EOS: "<|eos|>", BPE: "<|bpe|>"}


def byte_characters() -> list[str]:
    """GPT-2's character of each byte [256]: the byte's own where that is printable, else the next one from 256 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    other = iter(range(256, 512))
    return [chr(byte if byte in printable else next(other)) for byte in range(256)]


def tokenizer() -> dict[str, Any]:
    """The content of `tokenizer.json`.

    Example:
        tokens = tokenizers.Tokenizer.from_str(json.dumps(tokenizer()))
        tokens.encode("Hi").ids  # [1, 76, 109]
    """
    vocabulary = {text: id for id, text in SPECIAL.items()}
    vocabulary |= {character: byte + OFFSET for byte, character in enumerate(byte_characters())}
    assert len(vocabulary) == VOCAB
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    begin, text = {"SpecialToken": {"id": SPECIAL[BOS], "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    second = [{"SpecialToken": {"id": SPECIAL[BOS], "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": id, "content": text, **plain} for id, text in SPECIAL.items()],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, text],
            "pair": [begin, text, *second],
            "special_tokens": {SPECIAL[BOS]: {"id": SPECIAL[BOS], "ids": [BOS], "tokens": [SPECIAL[BOS]]}},
        },
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [],
        },
    }


def tokenizer_config(max_bytes: int | None) -> dict[str, Any]:
    """The content of `tokenizer_config.json`. max_bytes: the longest text of the model, if known."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[BOS],
        "eos_token": SPECIAL[EOS],
        "pad_token": SPECIAL[BOE],
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        **({} if max_bytes is None else {"model_max_length": max_bytes}),
    }


def generation_config() -> dict[str, Any]:
    """The content of `generation_config.json`: the special ids that generation of transformers reads."""
    return {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": BOE}
