"""Request bodies as OpenAI's API has them, and the settings that they stand for."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from halfbyte.sampling import MAX_LOGPROBS, REPETITION_PENALTIES, Sampling

Number = Annotated[float, Field(allow_inf_nan=False)]
LEAST_PENALTY, MOST_PENALTY = REPETITION_PENALTIES
# Tokens of a reply where neither the request nor the server says so.
DEFAULT_MAX_TOKENS = 1024
MOST_CHOICES = 8


class Fields(BaseModel):
    """A field that is null is as good as none, as OpenAI has it."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if value is not None}


class StreamOptions(Fields):
    include_usage: bool = False


class JsonSchema(BaseModel):
    """name, description and strict change nothing: a reply always follows its schema."""

    model_config = ConfigDict(extra="ignore")

    # The field's own name is taken by pydantic.
    given: Annotated[dict[str, Any], Field(alias="schema")]


class ResponseFormat(BaseModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def schema_of_reply(self) -> dict[str, Any] | None:
        """Raises ValueError where there is to be one and is none."""
        if self.type == "json_schema":
            if self.json_schema is None:
                raise ValueError("response_format.json_schema: expected a schema, got none")
            return self.json_schema.given
        return {"type": "object"} if self.type == "json_object" else None


class Body(Fields):
    """What chat and plain completions have in common; unknown fields are ignored, as OpenAI does.

    top_k, min_p, repetition_penalty, min_tokens and stop_token_ids are named as in vLLM.
    """

    model_config = ConfigDict(strict=True, extra="ignore")

    model: str
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[Number, Field(ge=0, le=100)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1 << 31)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Number, Field(ge=LEAST_PENALTY, le=MOST_PENALTY)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[Number, Field(ge=-100, le=100)]] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[Annotated[int, Field(ge=0)]] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    response_format: ResponseFormat | None = None

    def check(self) -> None:
        """Raise ValueError naming what is asked for in vain."""
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: expected stream to be true beside it")

    @property
    def alternatives(self) -> int | None:
        """Alternatives to report with each token's log-probability; None: no log-probabilities."""
        return None

    @property
    def most_tokens(self) -> int:
        return self.max_tokens or DEFAULT_MAX_TOKENS

    def sampling(self, choice: int = 0) -> Sampling:
        """The settings of one choice. Raises ValueError naming what is out of range."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stop) > 16:
            raise ValueError(f"stop: expected at most 16 strings, got {len(stop)}")
        given: dict[str, Any] = {
            # OpenAI's default is to draw, halfbyte's own is greedy.
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": self.top_p,
            "top_k": None if self.top_k is None else max(self.top_k, 0),
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            # A negative seed is one too; each choice has its own.
            "seed": None if self.seed is None else self.seed % (1 << 64) + choice,
            "logit_bias": None if self.logit_bias is None else _ids(self.logit_bias),
            "stop_ids": self.stop_token_ids,
            "min_new_tokens": self.min_tokens,
            "max_new_tokens": self.most_tokens,
            "logprobs": self.alternatives,
            "json_schema": self.response_format and self.response_format.schema_of_reply(),
        }
        given = {name: value for name, value in given.items() if value is not None}
        return Sampling(stop=[s for s in stop if s], **given)


def _refuse(**asked: Any) -> None:
    """Raise ValueError naming the first field that asks for something."""
    for name, value in asked.items():
        if value:
            raise ValueError(f"{name}: not supported")


def _ids(bias: dict[str, float]) -> dict[int, float]:
    try:
        return {int(token): value for token, value in bias.items()}
    except ValueError:
        raise ValueError("logit_bias: expected token ids as names") from None


class Part(BaseModel):
    type: str
    text: str | None = None


class Message(BaseModel):
    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None
    tool_calls: list[Any] | None = None
    function_call: Any = None

    def plain(self) -> dict[str, str]:
        """Role and text. Raises ValueError for parts that are no text, and where there is none."""
        content, told = self.content, self.role in ("tool", "function")
        if told or self.tool_calls or self.function_call:
            raise ValueError("messages: calls of tools and their results are not supported")
        if content is None and self.role != "assistant":
            raise ValueError(f"messages: expected content in one of role {self.role!r}, got none")
        if isinstance(content, list):
            if other := next((p.type for p in content if p.type != "text" or p.text is None), None):
                raise ValueError(f"messages: expected parts of type 'text', got {other!r}")
            content = "".join(part.text or "" for part in content)
        # OpenAI's newer name, which templates do not know.
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": content or ""}


class ChatBody(Body):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    function_call: Any = None
    modalities: list[str] | None = None
    audio: Any = None
    web_search_options: Any = None

    def check(self) -> None:
        super().check()
        _refuse(
            tools=self.tools,
            functions=self.functions,
            tool_choice=self.tool_choice not in (None, "none", "auto"),
            function_call=self.function_call not in (None, "none", "auto"),
            modalities=set(self.modalities or ()) - {"text"},
            audio=self.audio,
            web_search_options=self.web_search_options is not None,
        )
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: expected logprobs to be true beside it")

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def most_tokens(self) -> int:
        return self.max_completion_tokens or super().most_tokens

    def conversation(self) -> list[dict[str, str]]:
        return [message.plain() for message in self.messages]


class CompletionBody(Body):
    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool = False
    suffix: str | None = None
    best_of: int | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @property
    def alternatives(self) -> int | None:
        return self.logprobs

    def check(self) -> None:
        super().check()
        _refuse(echo=self.echo, suffix=self.suffix, best_of=self.best_of not in (None, self.n))

    def prompts(self) -> list[str | list[int]]:
        if self.prompt == []:
            raise ValueError("prompt: expected at least one")
        many = isinstance(self.prompt, list) and not all(isinstance(p, int) for p in self.prompt)
        prompts: list[Any] = list(self.prompt) if many else [self.prompt]
        if len(prompts) * self.n > 32:
            raise ValueError(f"prompt: expected at most {32 // self.n} prompts, got {len(prompts)}")
        return prompts


class LoadAdapterBody(Fields):
    lora_name: Annotated[str, Field(min_length=1, max_length=200)]
    lora_path: str
    load_inplace: bool = False


class UnloadAdapterBody(Fields):
    lora_name: str
