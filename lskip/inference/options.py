"""Options of the commands that decode: which model to load, and how to continue a prompt."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from lskip.inference import GenerationSettings, TextGenerator, load_generator
from lskip.inference.drafting.policies import DraftPolicy
from lskip.inference.exit_criteria import ExitCriterion
from lskip.inference.settings import AUTO
from lskip.utils.console import warn
from lskip.utils.devices import DType
from lskip.utils.untrusted import parse_json, read_text
from lskip.utils.user_paths import user_path

DraftWeights = Literal["int8", "int4"]  # quantized.DRAFT_WEIGHTS, in words that the parser reads


@dataclass(frozen=True)
class LoadingOptions:
    """Options for loading a model.

    Attributes:
        model: a run folder, a checkpoint, an exported or downloaded folder, a hub name, a .gguf file, smollm2.
        dtype: of the weights in memory.
        weights: their layout while decoding; auto takes what suits them and this machine. halved: in 16 bits,
            computed in float32, where that changes no number, as for bfloat16 checkpoints. int8: rounded to 8 bits,
            faster on x86 CPUs, with another text than the model's own.
        draft_weights: a copy of the model in int8 or int4 that may draft; auto: what suits model and machine. null:
            none, and with draft auto what suits.
        device: cpu, cuda …; auto takes a GPU where there is one.
        bit_exact: a text is the same to the bit alone, in any batch, with and without drafts, in bfloat16 too;
            costs some speed. null: in bfloat16 on a CPU that has bfloat16 products.
        costs_file: JSON file that keeps what a pass costs on this machine, which CostAwareDraft goes by, and what
            that has learnt; made where there is none. auto: one in ~/.cache/lskip/costs for this model, as it is
            loaded here. null: measured each time, which takes seconds.
        exit_adapter: folder of an exit adapter that was trained for this model, or smollm2, the one that comes with
            lskip; with num_speculations it drafts. null: none.
        draft_tokens: JSON file, a list of token ids or of texts: drafts of layers and weights choose among these
            tokens alone, and cost less where the vocabulary is large; the text is the same. all: among all. null:
            the tokens of the run's training answers where fit kept them beside the checkpoint, else all.
    """

    model: str = "smollm2"
    dtype: DType = "float32"
    weights: Literal["auto", "plain", "packed", "halved", "int8"] = "auto"
    draft_weights: Literal["auto", "int8", "int4"] | None = None
    device: str = "auto"
    bit_exact: bool | None = None
    costs_file: str | None = "auto"
    exit_adapter: str | None = None
    draft_tokens: str | None = None

    def for_draft(self, draft: str | None) -> "LoadingOptions":
        """Return the options with rounded weights that suit, where the draft is auto and none are named."""
        if draft != AUTO or self.draft_weights is not None:
            return self
        return replace(self, draft_weights="auto")

    @property
    def rounds(self) -> bool:
        """Whether the weights that decide the text are rounded: it is another one then than the model's own."""
        return self.weights == "int8"

    def load(self, batch_size: int = 1) -> TextGenerator:
        """Return load_generator's TextGenerator for batches of `batch_size` texts; say so where weights are rounded."""
        generator = load_generator(**vars(self), batch_size=batch_size)
        if self.rounds:
            warn(f"weights: {self.weights} rounds the model: its text is another one than the model's own")
        return generator


@dataclass(frozen=True)
class DecodingOptions:
    """Options for continuing a prompt.

    Attributes:
        max_new_tokens: tokens to generate at most; null takes the model's default.
        exit_layer: blocks that run before a token is predicted, 1 to the model's layers; null runs all. With an
            exit_adapter made for that layer a text that nothing drafts leaves through it.
        exit_criterion: lets each token exit at the first layer that is sure enough (Entropy, Margin, Saturation,
            LearnedExit); nothing is verified, so the text is another one; null: none.
        num_speculations: tokens drafted, at most, before the whole model verifies them; 0 does not draft. null: what
            the task is tuned to, else 0.
        draft: what drafts: layers (the first exit_layer blocks), weights (the draft_weights), ngram (what followed
            the same tokens earlier in the text), adapter (the exit_adapter), or a Drafter of your own by its import
            path; auto: whatever pays of all these, round by round, with the model's own text. null: the exit_adapter,
            else the draft_weights, else the layers.
        draft_policy: decides round by round what drafts, and how many tokens; null: num_speculations every time.
        acceptance: which drafted tokens are kept when sampling; shared_noise gives the same text as without drafts,
            rejection keeps more of them.
        temperature: 0 takes the most probable token; null takes the model's default.
        top_k: sample among so many most probable tokens; null takes the model's default.
        top_p: sample among the most probable that together reach this probability; null takes the model's default.
        min_p: sample among those with at least this share of the highest probability; null takes the model's default.
        repetition_penalty: above 1 makes tokens that were there before less likely; null takes the model's default.
        stop_strings: a list of texts, each of which ends the answer where it appears; null takes the model's default.
        json_schema: JSON file with a schema that the answer, which is JSON then, follows; null: any text.
        regex: regular expression that the whole answer matches; null: any text.
        seed: of sampling; null: another one each time.
        chat: whether a plain prompt goes through the chat template; null: when the model has one, and
            was not trained on pairs without it.
    """

    max_new_tokens: int | None = None
    exit_layer: int | None = None
    exit_criterion: ExitCriterion | None = None
    num_speculations: int | None = None
    draft: str | None = None
    draft_policy: DraftPolicy | None = None
    acceptance: Literal["shared_noise", "rejection"] = "shared_noise"
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_strings: list[str] | None = None
    json_schema: str | None = None
    regex: str | None = None
    seed: int | None = 0
    chat: bool | None = None

    def settings(self) -> dict:
        """Return generation settings; what is null is left to the model.

        Raises:
            ValueError: a value that no model allows, before any model is loaded.
        """
        settings = {name: value for name, value in vars(self).items() if value is not None}
        if self.json_schema is not None:
            settings["json_schema"] = self.schema
        GenerationSettings(**settings)
        for name in ("draft", "draft_policy"):
            if name in settings and not self.num_speculations and not self._is_auto:
                raise ValueError(
                    f"num_speculations: 0 drafts nothing, but {name} is given; say how many tokens at most"
                )
        return settings

    @property
    def schema(self) -> dict[str, Any] | None:
        """What the file json_schema says; None: there is none.

        Raises:
            ValueError: it cannot be read, or is not a JSON object.
        """
        if self.json_schema is None:
            return None
        path = user_path(self.json_schema, "json_schema")
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise ValueError(f"json_schema: '{path}' is not a file")
        try:
            schema = parse_json(read_text(path, "json_schema"), f"json_schema: '{path}'")
        except OSError as error:
            raise ValueError(f"json_schema: '{path}' cannot be read ({error.strerror})") from error
        if not isinstance(schema, dict):
            raise ValueError(f"json_schema: '{path}' holds no JSON object, which a schema is")
        return schema

    @property
    def _is_auto(self) -> bool:
        return self.draft == AUTO and self.num_speculations is None
