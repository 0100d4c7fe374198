"""What the bodies of requests may hold. Every field is declared here; the OpenAPI document is made from these models.

Types are strict: a bool or a string is no number. Fields of OpenAI's and vLLM's servers that this one does not
implement are declared with the values that change nothing (`neutral`), because clients send them; any other value is
refused. So is a field that no model declares.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema
from pydantic_core import ErrorDetails, PydanticCustomError, core_schema

from .. import reading
from ..errors import nearest, shown
from .errors import RequestError

MOST_STOPS, LONGEST_STOP = 16, 1024
MOST_CHOICES, MOST_TOP = 64, 20
LONGEST_GRAMMAR = 1 << 18
LONGEST_NAME = 256
LARGEST = (1 << 31) - 1

Body = TypeVar("Body", bound="Strict")


class Strict(BaseModel):
    """A JSON object without unknown keys."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


def parse(kind: type[Body], body: bytes) -> Body:
    """The body of a request as a `kind`. Raises RequestError, which names the field."""
    try:
        return kind.model_validate(reading.parse_json(body))
    except ValidationError as error:
        raise _refused(kind, error.errors(include_url=False)[0]) from error
    except ValueError as error:  # also UnicodeDecodeError
        place = reading.refused_place(body)
        raise RequestError(f"{place or 'the body'} must be JSON: {error}", param=place, code="invalid_json") from error


def _refused(kind: type[Strict], error: ErrorDetails) -> RequestError:
    param = ".".join(map(str, error["loc"])) if error["loc"] else None
    if error["type"] == "extra_forbidden":
        known = [field.alias or name for name, field in kind.model_fields.items()] if len(error["loc"]) == 1 else []
        hint = f": {nearest(str(error['loc'][-1]), known)}" if known else ""
        return RequestError(f"unknown field {shown(param)}{hint}", param=param, code="unknown_parameter")
    if param is None:
        return RequestError(f"the body must be a JSON object, not {shown(error['input'])}", code="invalid_json")
    given = "" if error["type"] in ("refused", "missing") else f", not {shown(error['input'])}"
    return RequestError(f"{param}: {error['msg']}{given}", param=param, code="invalid_value")


def _refuse(message: str) -> NoReturn:
    raise PydanticCustomError("refused", "{message}", {"message": message})


@dataclass(frozen=True)
class Checked:
    """A type with its own check, and its JSON schema: in `Annotated[Any, Checked(...)]`."""

    check: Callable[[Any], Any]
    schema: dict[str, Any]

    def __get_pydantic_core_schema__(self, source: object, handler: object) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(self.check)

    def __get_pydantic_json_schema__(self, schema: object, handler: object) -> dict[str, Any]:
        return self.schema


def neutral(*values: object) -> Checked:
    """A field that is not implemented. values: those that change nothing; null is always one."""
    allowed = [None, *values]

    def check(value: object) -> object:
        if not any(_same(value, each) for each in allowed):
            known = " or ".join("null" if each is None else shown(each) for each in allowed)
            _refuse(f"this server supports only {known} here, not {shown(value)}")
        return value

    return Checked(check, {"enum": allowed})


def _same(value: object, other: object) -> bool:
    """Equal, where true is not 1."""
    return isinstance(value, bool) == isinstance(other, bool) and value == other


def _stops(value: object) -> list[str]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        _refuse(f"must be text or a list of texts, not {shown(value)}")
    if len(stops) > MOST_STOPS:
        _refuse(f"at most {MOST_STOPS} stop strings, not {len(stops)}")
    for stop in stops:
        if not 1 <= len(stop.encode()) <= LONGEST_STOP:
            _refuse(f"a stop string has 1 to {LONGEST_STOP} bytes")
    return stops


def _content(value: object) -> str:
    """The text of a message; parts are joined by line breaks, as vLLM does."""
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        _refuse(f"must be text or a list of parts, not {shown(value)}")
    texts = []
    for part in value:
        if not isinstance(part, dict) or set(part) != {"type", "text"} or part["type"] != "text":
            _refuse(f'a part must be {{"type": "text", "text": ...}}, not {shown(part)}')
        if not isinstance(part["text"], str):
            _refuse(f"the text of a part must be text, not {shown(part['text'])}")
        texts.append(part["text"])
    return "\n".join(texts)


Name = Annotated[str, Field(max_length=LONGEST_NAME)]
Tokens = Annotated[int, Field(ge=0, le=LARGEST)]
Top = Annotated[int, Field(ge=0, le=MOST_TOP)]
Grammar = Annotated[str, Field(max_length=LONGEST_GRAMMAR)]
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 259}}
Prompt = Annotated[
    Any,
    WithJsonSchema(
        {
            "description": "Text, ids (byte + 4, as /tokenize gives them), or a list of either.",
            "anyOf": [
                {"type": "string"},
                _IDS,
                {"type": "array", "items": {"anyOf": [{"type": "string"}, _IDS]}, "minItems": 1},
                {"type": "null"},
            ],
        }
    ),
]
_STOP = {"type": "string", "minLength": 1, "maxLength": LONGEST_STOP}
_STOPS = {"type": "array", "items": _STOP, "maxItems": MOST_STOPS}
Stops = Annotated[Any, Checked(_stops, {"anyOf": [_STOP, _STOPS, {"type": "null"}]})]
_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
    "additionalProperties": False,
}
_PARTS = {"type": "array", "items": _PART}
Content = Annotated[Any, Checked(_content, {"anyOf": [{"type": "string"}, _PARTS, {"type": "null"}]})]


class StreamOptions(Strict):
    include_usage: bool | None = None
    continuous_usage_stats: Annotated[Any, neutral(False)] = None


class JsonSchema(Strict):
    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Generation(Strict):
    """Fields that completions and chat completions share. null is as good as no field."""

    model: Name | None = None
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=LARGEST, description="-1 and 0 keep all bytes.")] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 63, description="Choice i draws with seed + i.")] | None = None
    stop: Annotated[Stops, Field(validate_default=True)] = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    regex: Grammar | None = None
    grammar: Annotated[Grammar, Field(description="In llguidance's Lark syntax.")] | None = None
    return_patches: Annotated[bool, Field(description="Adds patch starts and entropies of each byte.")] | None = None

    # Accepted, and without effect.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    request_id: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    add_special_tokens: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    priority: Annotated[Any, neutral(0)] = None
    store: Annotated[Any, neutral(False)] = None
    service_tier: Annotated[Any, neutral("auto", "default")] = None
    # Accepted with the values that change nothing.
    best_of: Annotated[Any, neutral(1)] = None
    presence_penalty: Annotated[Any, neutral(0)] = None
    frequency_penalty: Annotated[Any, neutral(0)] = None
    repetition_penalty: Annotated[Any, neutral(1)] = None
    length_penalty: Annotated[Any, neutral(1)] = None
    logit_bias: Annotated[Any, neutral({})] = None
    min_tokens: Annotated[Any, neutral(0)] = None
    stop_token_ids: Annotated[Any, neutral([])] = None
    include_stop_str_in_output: Annotated[Any, neutral(False)] = None
    use_beam_search: Annotated[Any, neutral(False)] = None
    truncate_prompt_tokens: Annotated[Any, neutral()] = None
    prompt_logprobs: Annotated[Any, neutral()] = None
    logits_processors: Annotated[Any, neutral([])] = None


class CompletionRequest(Generation):
    """The body of POST /v1/completions."""

    prompt: Prompt = None
    prompt_base64: Annotated[
        Any,
        WithJsonSchema(
            {
                "description": "Raw bytes in base64, or a list of them.",
                "anyOf": [
                    {"type": "string"},
                    {"type": "array", "items": {"type": "string"}, "minItems": 1},
                    {"type": "null"},
                ],
            }
        ),
    ] = None
    echo: bool | None = None
    logprobs: Top | None = None
    suffix: Annotated[Any, neutral("")] = None


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Content, Field(validate_default=True)] = None
    name: str | None = None
    refusal: Annotated[Any, neutral()] = None
    audio: Annotated[Any, neutral()] = None
    annotations: Annotated[Any, neutral([])] = None
    function_call: Annotated[Any, neutral()] = None
    tool_calls: Annotated[Any, neutral([])] = None


class ChatRequest(Generation):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    logprobs: bool | None = None
    top_logprobs: Top | None = None
    add_generation_prompt: bool | None = None

    continue_final_message: Annotated[Any, neutral(False)] = None
    echo: Annotated[Any, neutral(False)] = None
    chat_template: Annotated[Any, neutral()] = None
    chat_template_kwargs: Annotated[Any, neutral({})] = None
    documents: Annotated[Any, neutral([])] = None
    modalities: Annotated[Any, neutral(["text"])] = None
    tools: Annotated[Any, neutral([])] = None
    tool_choice: Annotated[Any, neutral("none", "auto")] = None
    functions: Annotated[Any, neutral([])] = None
    function_call: Annotated[Any, neutral("none", "auto")] = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Annotated[Any, neutral()] = None
    verbosity: Annotated[Any, neutral()] = None
    prediction: Annotated[Any, neutral()] = None
    audio: Annotated[Any, neutral()] = None
    web_search_options: Annotated[Any, neutral()] = None


class TokenizeRequest(Strict):
    """The body of POST /tokenize: a prompt, or the messages of a chat."""

    model: Name | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)] | None = None
    add_generation_prompt: bool | None = None
    add_special_tokens: Annotated[bool, Field(description="Puts BOS in front.")] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Strict):
    """The body of POST /detokenize."""

    model: Name | None = None
    tokens: Annotated[Any, WithJsonSchema(_IDS)]
