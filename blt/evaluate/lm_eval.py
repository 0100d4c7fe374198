"""Any model of this project as a model of EleutherAI's lm-evaluation-harness (extra `lm-eval`).

Importing this module registers the name `blt` there:

    import blt.evaluate.lm_eval
    lm_eval.simple_evaluate(model="blt", model_args="path=runs/blt", tasks=["lambada_openai"])

`blt lm-eval MODEL --tasks ...` does the same and runs the harness's own command line. The scorers are those of
`blt eval`: likelihoods of bytes, or of the text's own tokenisation for a token model. Generation needs a BLT.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from blt.evaluate.scoring import Scored, Scorer, StreamScorer
from blt_runtime.errors import UsageError

if TYPE_CHECKING:
    from blt.checkpoint.models import Checkpoint
    from blt_runtime import Model

BYTES_PER_TOKEN = 4  # tasks limit answers in tokens (`max_gen_toks`)
MAX_GEN_TOKS = 256  # where a task has no limit, as elsewhere in the harness


@register_model("blt")
class ByteModel(LM):  # type: ignore[misc, unused-ignore]
    """A checkpoint or bundle at `path`, or a name on the hub. Texts are scored one by one; the batch size is ignored.

    `entropy_model`: for formats that store it separately. `threads`: per call. `seed`: for tasks that sample. `device`:
    of a checkpoint. `provider`, `trust_engines`, `engine_cache`: of a bundle or of engines, as in `Model.open`. Raises
    UsageError for options that do not fit the model, and what `Model.open` raises.
    """

    tokenizer_name = "bytes"

    def __init__(
        self,
        path: str,
        entropy_model: str | None = None,
        device: str | None = None,
        threads: int | None = None,
        seed: int = 0,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        provider: str = "cpu",
        trust_engines: bool | str = False,
        engine_cache: str | None = None,
    ) -> None:
        super().__init__()
        self.opened = Opened(
            str(path),
            entropy_model,
            device=device or "cpu",
            threads=None if threads is None else int(threads),
            provider=str(provider),
            trust_engines=str(trust_engines).lower() == "true",
            engine_cache=None if engine_cache is None else str(engine_cache),
        )
        self.seed = int(seed)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(natural logarithm of p(continuation | context), whether greedy decoding gives the continuation)."""
        found = []
        for context, continuation in self._arguments(requests, disable_tqdm):
            part = score(self.opened.scorer, _bytes(continuation), _bytes(context))
            found.append((-part.bits * math.log(2), part.greedy))
            self.cache_hook.add_partial("loglikelihood", (context, continuation), found[-1])
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Natural logarithm of p(text) after BOS. A long text is read in windows; each byte is predicted once."""
        found = []
        for (text,) in self._arguments(requests, disable_tqdm):
            found.append(-score(self.opened.scorer, _bytes(text)).bits * math.log(2))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), found[-1])
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Text after each context, up to a stop string, EOS or `max_gen_toks` tokens of BYTES_PER_TOKEN bytes.

        Greedy unless the task sets `do_sample` and a temperature. Invalid UTF-8 becomes U+FFFD.
        """
        found = []
        for context, options in self._arguments(requests, disable_tqdm):
            found.append(generate(self.opened.model, _bytes(context), options, seed=self.seed).decode(errors="replace"))
            self.cache_hook.add_partial("generate_until", (context, options), found[-1])
        return found

    def _arguments(self, requests: Sequence[Any], quiet: bool) -> Iterator[Any]:
        arguments = [request.args for request in requests]
        if quiet:
            return iter(arguments)
        from tqdm import tqdm

        return iter(tqdm(arguments))


def _bytes(text: str) -> bytes:
    return text.encode(errors="replace")  # a lone surrogate, which JSON can hold, has no bytes


def score(scorer: Scorer, text: bytes, prompt: bytes = b"") -> Scored:
    """Scores `text` after as much of the end of `prompt` as fits into the model.

    Text that does not fit is cut into windows. Each byte is predicted once, and the last window starts earlier, so
    that it is full.
    """
    whole, room = prompt + text, scorer.capacity or len(prompt + text)
    if not text:
        return Scored(0.0, 0, True)
    bits, units, greedy = 0.0, 0, True
    for start in range(len(prompt), len(whole), room):
        stop = min(start + room, len(whole))
        part = scorer.measure(whole[start:stop], whole[max(0, stop - room) : start])
        bits, units, greedy = bits + part.bits, units + part.units, greedy and part.greedy
    return Scored(bits, units, greedy)


def generate(model: Model, context: bytes, options: Mapping[str, Any], *, seed: int) -> bytes:
    """The text that the model generates after `context`. A full stream continues with the newest half of its text.

    options: those of the harness (`until`, `max_gen_toks`, ...).
    """
    until = options.get("until") or []
    most = BYTES_PER_TOKEN * int(options.get("max_gen_toks") or MAX_GEN_TOKS)
    stream = model.stream(overflow="slide")
    stream.append(context)
    sampled = bool(options.get("do_sample")) and float(options.get("temperature") or 0) > 0
    how = {name: options[name] for name in ("temperature", "top_k", "top_p", "min_p") if name in options}
    chosen = how | {"seed": seed} if sampled else {"temperature": 0.0}
    return b"".join(stream.generate(most, stop=[until] if isinstance(until, str) else list(until), **chosen))


class Opened:
    """An opened model with its scorer and its generating form, each made at its first use."""

    def __init__(
        self,
        path: str,
        entropy_model: str | None,
        *,
        device: str,
        threads: int | None,
        provider: str = "cpu",
        trust_engines: bool = False,
        engine_cache: str | None = None,
    ) -> None:
        self.path, self.device, self.threads = Path(path), device, threads
        self.checkpoint: Checkpoint | None = None
        self._model: Model | None = None
        self._scorer: Scorer | None = None
        if (self.path / "manifest.json").exists():
            if device != "cpu" or entropy_model is not None:
                raise UsageError(f"{path} is a bundle: give provider instead of device, and no entropy_model")
            from blt_runtime import Model

            self._model = Model.open(
                self.path, threads=threads, provider=provider, trust_engines=trust_engines, engine_cache=engine_cache
            )
        else:
            if provider != "cpu" or trust_engines or engine_cache is not None:
                raise UsageError(f"{path} is a checkpoint: provider, trust_engines and engine_cache are for bundles")
            from blt.evaluate.rows import load_on

            self.checkpoint = load_on(self.device, path, entropy_model=entropy_model)

    @property
    def model(self) -> Model:
        """The model for generation. Raises UsageError for a model that is no BLT."""
        if self._model is None:
            assert self.checkpoint is not None
            if self.checkpoint.blt is None:
                raise UsageError(
                    f"{self.path} is no BLT: it scores text and cannot generate; leave out tasks that generate"
                )
            from blt.generate.torch_backend import open_model

            self._model = open_model(self.checkpoint, device=self.device, threads=self.threads)
        return self._model

    @property
    def scorer(self) -> Scorer:
        """The scorer for likelihoods: whole rows on PyTorch, a stream for a bundle."""
        if self._scorer is None:
            if self.checkpoint is None:
                self._scorer = StreamScorer(self.model.stream(bos=False), self.model.spec.capacity_bytes)
            else:
                self._scorer = self._rows(self.checkpoint)
        return self._scorer

    def _rows(self, checkpoint: Checkpoint) -> Scorer:
        import torch

        from blt.evaluate.rows import scorer_of

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        return scorer_of(checkpoint, device=self.device)
