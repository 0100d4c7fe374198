"""A small prepared text, and tiny runs on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from blt.data import prepare
from blt.train.config import BLTRun, EntropyRun, load_config


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty documents of words, in train and valid."""
    folder = tmp_path_factory.mktemp("text")
    random = np.random.default_rng(0)
    words = ["byte", "latent", "transformer", "patches", "scale", "better", "than", "tokens", "ähnlich", "\n"]
    documents = [" ".join(random.choice(words, n)).encode() for n in random.integers(5, 90, 60)]
    (folder / "words.txt").write_bytes(b"\0".join(documents))
    prepare([folder / "words.txt"], folder / "data", split=(80, 20, 0))
    return folder / "data"


@pytest.fixture(scope="session")
def groups_of_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three groups with bytes, prompts and documents of several lengths; the validation text ends within a document."""
    folder = tmp_path_factory.mktemp("groups")
    texts = {"digits": "0123456789", "letters": "abc def ", "signs": "+- */ "}
    random = np.random.default_rng(0)
    for split, count in (("train", 40), ("valid", 7)):
        for name, text in texts.items():
            (folder / "in" / split).mkdir(parents=True, exist_ok=True)
            documents = ["".join(random.choice(list(text), n)) for n in random.integers(1, 150, count)]
            (folder / "in" / split / f"{name}.txt").write_bytes("\0".join(documents).encode())
    prepare([folder / "in"], folder / "data")
    return folder / "data"


@pytest.fixture
def entropy_config(repo: Path) -> EntropyRun:
    config = load_config(repo / "configs" / "tiny-entropy.yaml")
    assert isinstance(config, EntropyRun)
    return config


@pytest.fixture
def blt_config(repo: Path) -> BLTRun:
    config = load_config(repo / "configs" / "tiny.yaml")
    assert isinstance(config, BLTRun)
    return config


@pytest.fixture(scope="session")
def entropy_run(tmp_path_factory: pytest.TempPathFactory, data: Path, repo: Path) -> Path:
    """A finished tiny entropy run."""
    from blt.train import train

    out = tmp_path_factory.mktemp("runs") / "entropy"
    train(load_config(repo / "configs" / "tiny-entropy.yaml"), out, data=data)
    return out


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
