"""What a body asks the scheduler for: one form for both interfaces."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

from ..errors import BltError, CapacityError, QueueFull
from ..grammar import Grammar
from ..options import GenerateOptions
from ..requests import Request
from ..scheduler import Scheduler
from .errors import RequestError, refusal
from .grammars import constraints
from .parts import Choice
from .prompts import Prompt, prompts_of
from .schema import ChatRequest, CompletionRequest, Generation

COMPLETION_TOKENS = 16
MOST_CHOICES = 1024
"""Most choices of one request: prompts times n."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """new: bytes to generate; None is as many as fit. n: choices a prompt. logprobs: most likely tokens that are
    listed; None without logprobs. source, limit, matched: the fields of the prompt, of `new` and
    of the grammar, for errors."""

    prompts: list[Prompt]
    new: int | None
    n: int
    options: GenerateOptions
    logprobs: int | None = None
    echo: bool = False
    patches: bool = False
    source: str = "prompt"
    limit: str = "max_tokens"
    matched: str | None = None

    @property
    def scored(self) -> bool:
        """Whether the echoed prompt has logprobs."""
        return self.echo and self.logprobs is not None

    @property
    def tokens(self) -> bool:
        """Whether each byte is reported with what the model knows about it."""
        return self.logprobs is not None or self.patches

    def submit(self, scheduler: Scheduler, capacity: int, group: Hashable) -> list[Choice]:
        """Hands every choice to the scheduler, or none. Raises RequestError, and QueueFull."""
        choices: list[Choice] = []
        try:
            for prompt in self.prompts:
                for i in range(self.n):
                    request = self._request(scheduler, prompt, i, capacity, group)
                    made = Choice(len(choices), prompt, request)
                    made.echo, made.tokens, made.scored = self.echo, self.tokens, self.scored
                    choices.append(made)
        except BaseException as error:
            for choice in choices:
                choice.cancel()
            if isinstance(error, CapacityError):
                long = self.new is None or len(prompt.ids) > capacity
                param = self.source if long else self.limit
                raise RequestError(str(error), param=param, code="context_length_exceeded") from error
            if isinstance(error, BltError) and not isinstance(error, QueueFull):
                raise refusal(error) from error
            raise
        return choices

    def _request(self, scheduler: Scheduler, prompt: Prompt, i: int, capacity: int, group: Hashable) -> Request | None:
        ids = prompt.ids
        new = max(1, capacity - len(ids) + 1) if self.new is None else self.new
        if new == 0 and not self.scored:
            return None
        seed = self.options.seed
        return scheduler.submit_ids(
            ids,
            new,
            tokens=self.tokens,
            logprobs=self.logprobs,
            prompt_logprobs=self.scored,
            prefix_group=group,
            options=self.options if seed is None else replace(self.options, seed=seed + i),
        )


def plan_completion(body: CompletionRequest, grammar: Grammar | None = None) -> Plan:
    """grammar: what the text must match. Raises RequestError."""
    new, echo = _new(body, COMPLETION_TOKENS), bool(body.echo)
    if new == 0 and not echo:
        raise RequestError(f"{_limit(body)}: 0 needs echo", param=_limit(body))
    prompts = prompts_of(body.prompt, body.prompt_base64)
    source = "prompt" if body.prompt_base64 is None else "prompt_base64"
    return _plan(body, prompts, new=new, source=source, echo=echo, logprobs=body.logprobs, grammar=grammar)


def plan_chat(body: ChatRequest, prompt: bytes, stop: Sequence[str | bytes], grammar: Grammar | None = None) -> Plan:
    """prompt: of the rendered messages. stop: strings that end a free answer, beside those of the body. grammar: what
    the answer must match. Raises RequestError."""
    new = _new(body, None)
    if new == 0:
        raise RequestError(f"{_limit(body)} must be at least 1", param=_limit(body))
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    plan = _plan(body, [Prompt.of(prompt)], new=new, source="messages", logprobs=logprobs, grammar=grammar)
    if grammar is not None or not stop:
        return plan
    return replace(plan, options=replace(plan.options, stop=[*body.stop, *stop]))


def _plan(
    body: Generation,
    prompts: list[Prompt],
    *,
    new: int | None,
    source: str,
    logprobs: int | None,
    echo: bool = False,
    grammar: Grammar | None = None,
) -> Plan:
    n = body.n or 1
    if len(prompts) * n > MOST_CHOICES:
        raise RequestError(f"prompts times n must be at most {MOST_CHOICES:,}, not {len(prompts) * n:,}", param="n")
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options needs stream: true", param="stream_options")
    options = GenerateOptions(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=body.top_k if body.top_k and body.top_k > 0 else None,
        top_p=body.top_p,
        min_p=body.min_p,
        seed=body.seed,
        stop=body.stop,
        stop_at_eos=not body.ignore_eos,
        grammar=grammar,
    )
    patches = bool(body.return_patches)
    return Plan(
        prompts=prompts,
        new=new,
        n=n,
        options=options,
        logprobs=logprobs,
        echo=echo,
        patches=patches,
        source=source,
        limit=_limit(body),
        matched=next(iter(constraints(body)), None),
    )


def _new(body: Generation, default: int | None) -> int | None:
    """max_completion_tokens counts before max_tokens, which is its older name."""
    given: int | None = getattr(body, _limit(body))
    return default if given is None else given


def _limit(body: Generation) -> str:
    """The field that limits the answer."""
    return "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
