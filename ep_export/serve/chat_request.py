"""OpenAI's chat completion request: which of it is taken, and what is said of the rest.

A field that would change the answer and cannot be honoured is refused, unless it has the value that changes
nothing. Fields that only the asking side reads are let through.
"""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ep_export.errors import near_matches
from ep_export.policy import Keep
from ep_export.runtime import Sampling
from ep_export.serve.api_error import ApiError

__all__ = ["ChatRequest", "ImagePart", "Message", "TextPart", "parse_request"]

_IDLE: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "audio": (),
    "modalities": (["text"],),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "reasoning_effort": ("none",),
    "prediction": (),
    "web_search_options": (),
    "verbosity": ("medium",),
}
"""Fields of OpenAI's that are not supported -> values that ask for nothing, besides null."""
_UNREAD = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
    }
)
_WORDS = 1 << 20  # characters of a text: beyond every context, and still quick to tokenize


def _words_alone(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


def _alone(value: Any) -> Any:
    if value is None or isinstance(value, str):
        return () if value is None else (value,)
    return tuple(value) if isinstance(value, list) else value


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class TextPart(_Strict):
    """Words."""

    type: Literal["text"]
    text: Annotated[str, Field(max_length=_WORDS)]


class _ImageUrl(_Strict):
    url: str
    detail: Literal["auto", "low", "high"] | None = None  # the model's own resolution is used


class ImagePart(_Strict):
    """A picture, as a data URL or an address."""

    type: Literal["image_url"]
    image_url: _ImageUrl


class Message(_Strict):
    """One message; what other kinds of model add to it must be null."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        list[Annotated[TextPart | ImagePart, Field(discriminator="type")]],
        BeforeValidator(_words_alone),
        Field(min_length=1),
    ]
    name: str | None = None  # no chat template shows it
    refusal: None = None
    audio: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    function_call: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None


class _StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool = False  # nothing is padded


_Names = Annotated[tuple[str, ...], BeforeValidator(_alone), Field(max_length=64)]


class ChatRequest(_Strict):
    """A question to the model. `keep`, `keep_tokens`, `policy` and `prune` are ep-export's own."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1, max_length=256)]
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    stop: _Names = ()
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: int | None = None
    keep: Annotated[float, Field(gt=0, le=1)] | None = None
    keep_tokens: Annotated[int, Field(ge=1)] | None = None
    policy: _Names = ()
    prune: bool = True

    @property
    def amount(self) -> Keep | None:
        """How much to keep; the bundle's when None."""
        if self.keep is None and self.keep_tokens is None:
            return None
        return Keep(ratio=self.keep, tokens=self.keep_tokens)

    @property
    def sampling(self) -> Sampling | None:
        """How to draw tokens: greedy where nothing is said of it, and at temperature 0."""
        if self.temperature == 0 or (self.temperature is None and self.top_p is None):
            return None
        seed = secrets.randbits(63) if self.seed is None else self.seed % (1 << 63)
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=seed,
        )

    def longest(self, most: int) -> int:
        """Tokens of the answer at most."""
        asked = self.max_completion_tokens or self.max_tokens
        return most if asked is None else min(asked, most)


def parse_request(body: bytes) -> ChatRequest:
    """Read a request.

    Raises:
        ApiError: It is no JSON, or asks for what there is not; `param` says where.
    """
    import pydantic_core

    try:
        fields = pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from error
    if not isinstance(fields, dict):
        raise ApiError(400, "the body is not a JSON object", code="invalid_json")
    wanted = {name: value for name, value in fields.items() if not _idle(name, value)}
    try:
        request = ChatRequest.model_validate(wanted)
    except ValidationError as error:
        raise _said(error) from error
    if request.keep is not None and request.keep_tokens is not None:
        raise ApiError(400, "keep and keep_tokens exclude each other", param="keep", code="invalid_value")
    return request


def _idle(name: str, value: Any) -> bool:
    """Whether a field asks for nothing.

    Raises:
        ApiError: It asks for something that is not supported.
    """
    if name in _UNREAD:
        return True
    if name not in _IDLE:
        return False
    if value is None or value in _IDLE[name]:
        return True
    raise ApiError(400, f"{name} is not supported here", param=name, code="unsupported_parameter")


def _said(error: ValidationError) -> ApiError:
    """The first complaint as one sentence."""
    first = error.errors(include_url=False)[0]
    place = [
        step
        for step, before in zip(first["loc"], ("", *first["loc"]), strict=False)
        if not _tag(step, before)
    ]
    param, kind, value = ".".join(map(str, place)), first["type"], first["input"]
    if kind == "extra_forbidden":
        hint = near_matches(param, ChatRequest.model_fields) if len(place) == 1 else "leave it out"
        return ApiError(400, f"unknown parameter {param} ({hint})", param=param, code="unknown_parameter")
    if kind == "missing":
        return ApiError(400, f"{param} is missing", param=param, code="missing_parameter")
    if kind == "union_tag_invalid":
        told = f"{param} is of the type {value.get('type')!r}, expected text or image_url"
        return ApiError(400, told, param=param, code="unsupported_content")
    return ApiError(400, f"{param}: {first['msg']}", param=param, code="invalid_value")


def _tag(step: int | str, before: int | str) -> bool:
    """Whether a step of pydantic's path names a kind of content part instead of a field."""
    return isinstance(before, int) and step in {"text", "image_url"}
