"""One cached form under one patch rule: a model's streams, recorded, in all the ways that callers may use them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from blt.evaluate.cache_check.cases import Case
from blt.evaluate.cache_check.comparison import Comparison, compare_playbacks
from blt.evaluate.cache_check.recorder import Recording, with_recorder
from blt.evaluate.cache_check.report import Line
from blt.evaluate.cache_check.scripts import Playback, Segment, play_alone, play_interleaved
from blt.evaluate.cache_check.text import Random
from blt.evaluate.cache_check.uncached import Row
from blt_runtime import Model, Stream
from blt_runtime.ids import Ids
from blt_runtime.patching import PatchRule

LineOf = Callable[[str], Line]
"""The line of the report for one way of computing."""


class Candidate:
    """A model whose streams follow `rule` (None: its own, which must be the checkpoint's).

    The interleaved streams are reused for as long as the candidate exists.
    """

    def __init__(self, model: Model, rule: PatchRule | None, line: LineOf) -> None:
        self._model, self._recorder = with_recorder(model)
        if rule is not None:
            self._model.spec = replace(model.spec, patch_rule=rule)
        self._line = line
        self._scorer = self._model.stream(bos=False)
        self._streams: list[Stream] = []

    def prefill(self, case: Case, lengths_P: Ids | None = None) -> None:
        """A whole row in one call; with patch lengths, the case's row must be cut likewise."""
        score = self._scorer.score_ids(case.row.ids_N, lengths_P)
        at_N = np.arange(len(case.row))
        entropies = [] if np.isnan(case.row.entropies_N).any() else [(at_N, score.entropies)]
        line = self._line("prefill" if lengths_P is None else "prefill, given patches")
        comparison = Comparison(case.row, line, case.where)
        comparison.segment(Segment(Recording(entropies, [(at_N, score.logits)]), score.patch_lengths))
        comparison.complete()

    def scripts(self, group: list[Case], random: Random) -> None:
        """Each row's script alone on a new stream, then all of them interleaved on used streams."""
        alone = [
            play_alone(self._model, self._recorder, row=case.row, bos=case.bos, script=case.script) for case in group
        ]
        if not self._streams:
            self._streams = [self._model.stream(bos=case.bos) for case in group]
        pairs = zip(self._streams, group, strict=True)
        interleaved = [Playback(stream, self._recorder, case.row, case.script) for stream, case in pairs]
        play_interleaved(interleaved, random)
        for case, one, other in zip(group, alone, interleaved, strict=True):
            Comparison(case.row, self._line("random calls, alone"), case.where).playback(one)
            Comparison(case.row, self._line("random calls, interleaved"), case.where).playback(other)
            compare_playbacks(one, other, self._line("alone against interleaved"), case.where)

    def greedy(self, prompts: list[Ids], expected: list[list[int]], row: Callable[[Ids], Row], random: Random) -> None:
        """Greedy text after each prompt, alone and then with all streams interleaved, id by id."""
        alone = [Writer(self._model.stream(bos=False), prompt, len(expected[0])) for prompt in prompts]
        for writer in alone:
            while not writer.done:
                self._advance(writer)
        interleaved = [Writer(self._model.stream(bos=False), prompt, len(expected[0])) for prompt in prompts]
        waiting = list(interleaved)
        while waiting:
            writer = waiting[int(random.integers(0, len(waiting)))]
            self._advance(writer)
            if writer.done:
                waiting.remove(writer)
        for how, writers in (("greedy, alone", alone), ("greedy, interleaved", interleaved)):
            for number, (writer, want) in enumerate(zip(writers, expected, strict=True)):
                comparison = Comparison(row(writer.stream.ids), self._line(how), f"prompt {number}")
                self._compare_text(writer, want, comparison)

    def _advance(self, writer: Writer) -> None:
        with self._recorder.into(writer.recording):
            writer.advance()

    @staticmethod
    def _compare_text(writer: Writer, want: list[int], comparison: Comparison) -> None:
        comparison.segment(Segment(writer.recording, writer.stream.patch_lengths))
        comparison.complete()
        comparison.greedy(len(writer.prompt), want, writer.stream.patch_lengths)


class Writer:
    """A stream that reads a prompt and then generates `n` ids, one at each call of `advance`."""

    def __init__(self, stream: Stream, prompt: Ids, n: int) -> None:
        self.stream, self.prompt, self.recording = stream, prompt, Recording()
        self._left = n

    @property
    def done(self) -> bool:
        return self._left == 0

    def advance(self) -> None:
        if self.stream.position == 0:
            return self.stream.append_ids(self.prompt)
        self._left -= len(list(self.stream.generate_ids(1, temperature=0, stop_at_eos=False)))
        return None
