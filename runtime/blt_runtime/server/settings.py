"""How a server runs: what the options of `blt serve` set."""

from __future__ import annotations

from dataclasses import dataclass

from ..arguments import flag, number, whole
from ..errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Settings:
    """name: of the model. streams: requests that run at a time. max_queue: requests that wait before one is refused.
    capacity: bytes of one stream; None is the bundle's. prefix_bytes: memory for beginnings of prompts.
    api_keys: of which a request must bring one; none lets everybody in. isolate_keys: requests with different keys
    share no beginnings of prompts. deadline: seconds for a request, from its arrival to its last byte.
    max_body: bytes of a request's body. cors: origins whose pages may call the server; "*" is every one.
    chat_template: Jinja source; None is the bundle's, or a plain one.

    Example:
        app = create_app(Model.open("bundle", batched=True), Settings(name="demo", streams=4))

    Raises UsageError for a value out of range.
    """

    name: str = "blt"
    streams: int = 16
    max_queue: int = 256
    capacity: int | None = None
    prefix_bytes: int = 0
    api_keys: tuple[str, ...] = ()
    isolate_keys: bool = False
    deadline: float = 600.0
    max_body: int = 4 << 20
    cors: tuple[str, ...] = ()
    chat_template: str | None = None

    def __post_init__(self) -> None:
        if not self.name or len(self.name) > 256 or not self.name.isprintable():
            raise UsageError("the served model name must have 1 to 256 printable characters")
        whole("streams", self.streams, 1)
        whole("max_queue", self.max_queue, 0)
        whole("prefix_bytes", self.prefix_bytes, 0)
        whole("max_body", self.max_body, 1)
        number("deadline", self.deadline, lambda value: value > 0, "a number of seconds above 0")
        flag("isolate_keys", self.isolate_keys)
        if any(not key or not key.isascii() or not key.isprintable() for key in self.api_keys):
            raise UsageError("an API key must have at least one character, all of them printable ASCII")
        if self.isolate_keys and not self.api_keys:
            raise UsageError("isolate_keys needs API keys")
