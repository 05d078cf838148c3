"""Options of `lskip serve`: where to listen, how many texts at a time, what drafts."""

import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from lskip.inference.drafting.policies import DraftPolicy
from lskip.inference.options import DecodingOptions, LoadingOptions
from lskip.inference.settings import AUTO
from lskip.utils.checks import check_whole

DRAFTING = ("draft", "exit_layer", "num_speculations", "draft_policy")  # what says how to draft
HOST = r"\*|[\w.-]+|[0-9a-fA-F.]*(:[0-9a-fA-F.]*){2,}"  # any, a name or IPv4 address, an IPv6 address
MOST_CONTEXT = 4096  # tokens, where none are named: each takes memory in every slot


class Served(NamedTuple):
    """A model to serve.

    Attributes:
        name: that clients give.
        settings: generation settings that say how to draft, or where to exit.
        loading: which model, and how; those that are loaded alike are loaded once.
    """

    name: str
    settings: dict[str, Any]
    loading: LoadingOptions


@dataclass(frozen=True)
class ServingOptions:
    """Options for serving a model.

    Attributes:
        host: address to listen at; 0.0.0.0 is every one of this machine, for which an api_key is wise.
        port: to listen at.
        name: of the model, for clients; null: the last part of --model.
        endpoint: several models, each under a name of its own, as NAME=MODEL, NAME=MODEL:TASK (drafts as lskip tune has
            saved for that task) or NAME=MODEL:exit_layer=8 (a fixed exit, so another text); the other options are
            common to them. null: --model alone.
        allowed_hosts: names by which clients reach this machine, beside localhost and host; * for any. A request for
            another name is refused: a web page may have sent it.
        api_key: that clients must send as a bearer token; null: none.
        max_batch_size: texts that are decoded together.
        max_context: tokens that a prompt and its answer may have together; null: the model's context, 4096 at most.
        max_waiting: requests that may wait for their turn; more are told to come again.
        draft: what drafts, as in generate; every text stays the model's own. null: what exit_layer and
            num_speculations say.
        exit_layer: of drafts of layers or weights.
        num_speculations: tokens drafted, at most, before the whole model verifies them; null: as suits draft auto, else
            0, which drafts nothing.
        draft_policy: decides round by round what drafts, and how many tokens; null: with draft auto CostAwareDraft.
        stop_seconds: after SIGTERM or Ctrl-C, seconds for answers under way to end.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    endpoint: list[str] | None = None
    allowed_hosts: list[str] | None = None
    api_key: str | None = None
    max_batch_size: int = 8
    max_context: int | None = None
    max_waiting: int = 64
    draft: str | None = AUTO
    exit_layer: int | None = None
    num_speculations: int | None = None
    draft_policy: DraftPolicy | None = None
    stop_seconds: int = 30

    def __post_init__(self):
        for name, lowest in (("port", 0), ("max_batch_size", 1), ("max_waiting", 0), ("stop_seconds", 0)):
            check_whole(name, getattr(self, name), lowest)
        if self.port > 65535:
            raise ValueError(f"port: {self.port} is not from 0 to 65535")
        if self.max_context is not None:
            check_whole("max_context", self.max_context, 2)
        if self.api_key == "" or self.name == "":
            raise ValueError(f"{'api_key' if self.api_key == '' else 'name'}: is empty; leave it out, or give one")
        if self.api_key is not None and not re.fullmatch(r"[!-~]([ -~]*[!-~])?", self.api_key):
            raise ValueError(
                "api_key: has characters that no header carries; allowed are ASCII's, no spaces at its ends"
            )
        for name in self.allowed_hosts or ():
            if not re.fullmatch(HOST, name):
                raise ValueError(f"allowed_hosts: {name!r} is no name or address alone, such as my.host, nor *")
        if self.endpoint is not None and (not self.endpoint or self.name is not None):
            wrong = "endpoint: is empty" if not self.endpoint else "name: does not go with endpoint, which names each"
            raise ValueError(f"{wrong}; leave it out")
        if self.exit_layer is not None and not self.num_speculations:
            raise ValueError("exit_layer: is of drafts here; say by num_speculations how many tokens they have at most")

    @property
    def drafting(self) -> DecodingOptions:
        """What they say of drafts."""
        return DecodingOptions(**{name: getattr(self, name) for name in DRAFTING})

    def context(self, of_model: int) -> int:
        """Return the tokens that a text may have, of a model with so many positions.

        Raises:
            ValueError: max_context is more.
        """
        if self.max_context is None:
            return min(of_model, MOST_CONTEXT)
        if self.max_context > of_model:
            raise ValueError(f"max_context: {self.max_context} is more than the model's context of {of_model}")
        return self.max_context
