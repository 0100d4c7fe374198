"""One cached side under one patch rule: a model's streams, watched, in all the ways a caller may use them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from blt.evaluate.cache_check.jobs import Job
from blt.evaluate.cache_check.judge import Judge, Line, compare_runs
from blt.evaluate.cache_check.scripts import Run, Settled, play_alone, play_together
from blt.evaluate.cache_check.text import Random
from blt.evaluate.cache_check.truth import Row
from blt.evaluate.cache_check.watch import Taken, watched
from blt_runtime import Model, Stream
from blt_runtime.ids import Ids
from blt_runtime.patching import PatchRule

LineOf = Callable[[str], Line]
"""The line of the report for one way of computing."""


class Side:
    """A model whose streams follow `rule` (None: the one it came with, which must be the checkpoint's).

    The streams in company live as long as the side and are used again.
    """

    def __init__(self, model: Model, rule: PatchRule | None, line: LineOf) -> None:
        self._model, self._watcher = watched(model)
        if rule is not None:
            self._model.spec = replace(model.spec, patch_rule=rule)
        self._line = line
        self._scorer = self._model.stream(bos=False)
        self._streams: list[Stream] = []

    def in_chunks(self, job: Job, lengths_P: Ids | None = None) -> None:
        """A whole row at once; with patch lengths the row must be cut likewise."""
        score = self._scorer.score_ids(job.row.ids_N, lengths_P)
        at_N = np.arange(len(job.row))
        entropies = [] if np.isnan(job.row.entropies_N).any() else [(at_N, score.entropies)]
        judge = Judge(job.row, self._line("in chunks" if lengths_P is None else "in chunks, given patches"), job.where)
        judge.stretch(Settled(Taken(entropies, [(at_N, score.logits)]), score.patch_lengths))
        judge.complete()

    def scripts(self, group: list[Job], random: Random) -> None:
        """Each row's script alone on a new stream, then all of them in turns on streams used before."""
        alone = [play_alone(self._model, self._watcher, job.row, job.bos, job.script) for job in group]
        if not self._streams:
            self._streams = [self._model.stream(bos=job.bos) for job in group]
        pairs = zip(self._streams, group, strict=True)
        together = [Run(stream, self._watcher, job.row, job.script) for stream, job in pairs]
        play_together(together, random)
        for job, one, other in zip(group, alone, together, strict=True):
            Judge(job.row, self._line("cut anywhere, alone"), job.where).run(one)
            Judge(job.row, self._line("cut anywhere, together"), job.where).run(other)
            compare_runs(one, other, self._line("alone against together"), job.where)

    def greedy(self, prompts: list[Ids], wanted: list[list[int]], row: Callable[[Ids], Row], random: Random) -> None:
        """Greedy text behind each prompt, alone and then with all streams writing in turns, id by id."""
        alone = [Writer(self._model.stream(bos=False), prompt, len(wanted[0])) for prompt in prompts]
        for writer in alone:
            while not writer.done:
                self._advance(writer)
        together = [Writer(self._model.stream(bos=False), prompt, len(wanted[0])) for prompt in prompts]
        waiting = list(together)
        while waiting:
            writer = waiting[int(random.integers(0, len(waiting)))]
            self._advance(writer)
            if writer.done:
                waiting.remove(writer)
        for how, writers in (("greedy text, alone", alone), ("greedy text, together", together)):
            for number, (writer, want) in enumerate(zip(writers, wanted, strict=True)):
                self._judge_text(writer, want, row, self._line(how), f"prompt {number}")

    def _advance(self, writer: Writer) -> None:
        with self._watcher.into(writer.taken):
            writer.advance()

    @staticmethod
    def _judge_text(writer: Writer, want: list[int], row: Callable[[Ids], Row], line: Line, where: str) -> None:
        judge = Judge(row(writer.stream.ids), line, where)
        judge.stretch(Settled(writer.taken, writer.stream.patch_lengths))
        judge.complete()
        judge.greedy(len(writer.prompt), want, writer.stream.patch_lengths)


class Writer:
    """A stream that takes in a prompt and writes `n` ids behind it, one at each call of `advance`."""

    def __init__(self, stream: Stream, prompt: Ids, n: int) -> None:
        self.stream, self.prompt, self.taken = stream, prompt, Taken()
        self._left = n

    @property
    def done(self) -> bool:
        return self._left == 0

    def advance(self) -> None:
        if self.stream.position == 0:
            return self.stream.append_ids(self.prompt)
        self._left -= len(list(self.stream.generate_ids(1, temperature=0, stop_at_eos=False)))
        return None
