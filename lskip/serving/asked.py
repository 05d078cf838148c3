"""What a client asks for: the fields of OpenAI's requests, checked by name, and those of lskip beside them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lskip.serving.lanes import CRITERIA, EarlyExit

# Fields that change nothing here, whatever they say.
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
# Fields that are not supported, and the values with which they change nothing.
NEUTRAL: dict[str, tuple] = {
    **dict.fromkeys(("n", "best_of"), (1,)),
    **dict.fromkeys(("presence_penalty", "frequency_penalty"), (0,)),
    **{"echo": (False,), "top_logprobs": (0,), "tools": ([],), "functions": ([],), "logit_bias": ({},)},
    **{"modalities": (["text"],), "tool_choice": ("none", "auto"), "suffix": ("",)},
}
MOST_STOPS = 4  # as OpenAI's


class RequestRefusedError(Exception):
    """A request that gets an error in OpenAI's form."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    include_usage: bool = False


class Schema(BaseModel):
    """A JSON schema, with what OpenAI's clients say beside it."""

    model_config = ConfigDict(extra="ignore", strict=True)

    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class ResponseFormat(BaseModel):
    """What form the answer has."""

    model_config = ConfigDict(extra="ignore", strict=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema: goes with type json_schema, and has to")
        return self

    @property
    def schema_of_answer(self) -> dict[str, Any] | None:
        """The schema that the answer follows; None: it is a text."""
        if self.json_schema is not None:
            return self.json_schema.schema_
        return {"type": "object"} if self.type == "json_object" else None


class Criterion(BaseModel):
    """A criterion by which each token exits."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: Literal[tuple(CRITERIA)]
    threshold: float


class Asked(BaseModel):
    """Fields of both kinds of request. Those of the last paragraph are lskip's own.

    Attributes:
        regex: the whole answer matches it.
        show_rounds: chunks of a streamed answer say of each token how it came, in a field `lskip`.
        exit_layer, num_speculations, draft: bounds on how to draft for this text, which stays the same: the deepest
            exit that may draft, the most tokens of a draft, "none" for no draft at all.
        fixed_exit, exit_criterion: where the text leaves the model for good, so that it is another text: behind so
            many blocks, or token by token where the criterion is sure enough.
    """

    model_config = ConfigDict(extra="allow", strict=True)

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    logprobs: bool | None = None
    response_format: ResponseFormat | None = None

    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    regex: str | None = None
    show_rounds: bool = False
    exit_layer: Annotated[int, Field(ge=1)] | None = None
    num_speculations: Annotated[int, Field(ge=0)] | None = None
    draft: Literal["none"] | None = None
    fixed_exit: Annotated[int, Field(ge=1)] | None = None
    exit_criterion: Criterion | None = None

    def settings(self) -> dict[str, Any]:
        """Return the GenerationSettings that are asked for; what is not is left to the model."""
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "regex")
        named = {name: getattr(self, name) for name in names}
        if self.response_format is not None:
            named["json_schema"] = self.response_format.schema_of_answer
        found = {name: value for name, value in named.items() if value is not None}
        if self.stops:
            found["stop_strings"] = tuple(self.stops)
        if self.seed is not None:
            found["seed"] = self.seed % 2**64  # OpenAI's may be negative
        if self.most_tokens is not None:
            found["max_new_tokens"] = self.most_tokens
        if self.wants_logprobs:
            found["logprobs"] = True
        return found if self.early_exit is None else {**found, **self.early_exit.settings()}

    @property
    def wants_logprobs(self) -> bool:
        """Whether the log probabilities of the answer's tokens are asked for: by true, or by a number, 0 too."""
        return self.logprobs is not None and self.logprobs is not False

    @property
    def early_exit(self) -> EarlyExit | None:
        """Where the text leaves the model for good; None: nothing is said of it."""
        if self.exit_criterion is not None:
            return EarlyExit(self.fixed_exit, self.exit_criterion.name, self.exit_criterion.threshold)
        return None if self.fixed_exit is None else EarlyExit(self.fixed_exit)

    @property
    def client_names(self) -> dict[str, str]:
        """Fields of GenerationSettings, and the prompt -> the names by which the client knows them."""
        grammars = dict.fromkeys(("json_schema", "json_schema, regex"), "response_format")
        exits = {"exit_layer": "fixed_exit", "threshold": "exit_criterion.threshold"}
        return {"max_new_tokens": "max_tokens", "stop_strings": "stop", **grammars, **exits}

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens

    @model_validator(mode="after")
    def _check(self) -> Asked:
        """Raise RequestRefusedError for fields, or values, that are not supported."""
        for name, value in (self.model_extra or {}).items():
            if value is not None and name not in IGNORED and not changes_nothing(name, value):
                sentence = f"{name}: is not supported by this server"
                raise RequestRefusedError(400, sentence, name, "unsupported_parameter")
        if len(self.stops) > MOST_STOPS or "" in self.stops:
            raise RequestRefusedError(400, f"stop: give 1 to {MOST_STOPS} texts, none of them empty", "stop")
        for name in ("exit_layer", "num_speculations", "draft"):
            if self.early_exit is not None and getattr(self, name) is not None:
                sentence = f"{name}: bounds drafts; with fixed_exit or exit_criterion there are none"
                raise RequestRefusedError(400, sentence, name)
        return self

    @property
    def most_drafted(self) -> int | None:
        """The most tokens that a round may draft for it; None: as many as the server's settings say."""
        return 0 if self.draft == "none" else self.num_speculations


class Completion(Asked):
    """A request of /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | bool | None = None  # so many alternatives to each token; 0: its own alone

    @model_validator(mode="after")
    def _check_logprobs(self) -> Completion:
        if self.logprobs not in (None, 0):  # True is 1
            sentence = f"logprobs: {self.logprobs!r}; this server gives 0, the chosen tokens' own without alternatives"
            raise RequestRefusedError(400, sentence, "logprobs")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a text or token ids."""
        several = isinstance(self.prompt, list) and not all(isinstance(part, int) for part in self.prompt)
        return self.prompt if several else [self.prompt]


class TextPart(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A message of a conversation, its content text."""

    model_config = ConfigDict(extra="ignore", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def as_template_takes_it(self) -> dict[str, str]:
        role = "system" if self.role == "developer" else self.role
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": role, "content": text}


def for_template(messages: list[Message]) -> list[dict[str, str]]:
    """Return messages as the chat template takes them."""
    return [message.as_template_takes_it() for message in messages]


class Chat(Asked):
    """A request of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = None

    @property
    def prompts(self) -> list[list[dict[str, str]]]:
        """The one prompt: its messages."""
        return [for_template(self.messages)]

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def client_names(self) -> dict[str, str]:
        limit = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        return {**super().client_names, "max_new_tokens": limit, "prompt": "messages"}


class Settling(BaseModel):
    """A request of /lskip/settling: an answer's tokens, as `show_rounds` gave them, behind the messages."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)]
    tokens: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


Read = TypeVar("Read", Asked, Settling)


def changes_nothing(name: str, value: Any) -> bool:
    """Return whether a field that is not supported says what happens without it."""
    return any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in NEUTRAL.get(name, ()))


def read_asked(kind: type[Read], body: bytes) -> Read:
    """Return a request; RequestRefusedError, by the name of the field, for one that is not understood."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        name = ".".join(map(str, first["loc"])) or "body"
        raise RequestRefusedError(400, f"{name}: {first['msg'].lower()}", name) from error
