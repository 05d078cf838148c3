"""Exits as models of lm-eval-harness: scores of all exits from one forward pass, answers from lskip's engine."""

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from hashlib import blake2b

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from lskip.evaluation.layers.divergence import require_numbers
from lskip.inference import TextGenerator
from lskip.models.decoder import Decoder
from lskip.models.exit_adapter import ExitAdapter
from lskip.models.exit_heads import TrainedExits
from lskip.models.readout import read_positions, score_logits

Pair = tuple[list[int], list[int]]  # tokens of a context and of its continuation, neither of them empty
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class ExitScorer:
    """Log-likelihoods of continuations at several exits from one forward pass, cached for all exits.

    lm-eval evaluates one model after the other on the same requests: the first exit computes the scores of all.

    Attributes:
        decoder: the model.
        exits: exit layers, 1-based, ascending.
        batch_size: texts in one pass; the longest come first, and the shorter ones are padded on the right.
    """

    def __init__(
        self,
        decoder: Decoder,
        exits: Sequence[int],
        batch_size: int = 8,
        trained: TrainedExits | None = None,
        adapter: ExitAdapter | None = None,
    ):
        """Score by the exits' own maps (`trained`), or one of them through an exit adapter; None: there is none."""
        self.decoder, self.exits, self.batch_size = decoder, list(exits), batch_size
        self._trained, self._adapter = trained, adapter
        self._scores: dict[bytes, list[tuple[float, bool]]] = {}  # hash of a pair -> a score for each exit

    def score(self, pairs: Sequence[Pair], exit_layer: int) -> list[tuple[float, bool]]:
        """Return for each pair (log-likelihood of the continuation, whether greedy decoding gives it).

        A pair that is longer than the model's context loses its first tokens.

        Raises:
            ValueError: a continuation is longer than the context, or an exit's logits are NaN.
        """
        keys = [_key(pair) for pair in pairs]
        self._run({key: pair for key, pair in zip(keys, pairs, strict=True) if key not in self._scores})
        place = self.exits.index(exit_layer)
        return [self._scores[key][place] for key in keys]

    @torch.inference_mode()
    def _run(self, pairs: dict[bytes, Pair]) -> None:
        asked = self._by_input(pairs)
        texts = sorted(asked, key=len, reverse=True)
        title = f"exits {', '.join(map(str, self.exits))}"
        with tqdm(total=len(texts), desc=title, unit="text", disable=not texts) as bar:
            for start in range(0, len(texts), self.batch_size):
                batch = texts[start : start + self.batch_size]
                self._run_batch([(text, asked[text]) for text in batch])
                bar.update(len(batch))

    def _by_input(self, pairs: dict[bytes, Pair]) -> dict[tuple[int, ...], list[tuple[bytes, list[int]]]]:
        """Return {input: its (key, continuation) pairs}: continuations of one token share their input."""
        asked, length = defaultdict(list), self.decoder.context_length
        for key, (context, continuation) in pairs.items():
            if len(continuation) > length:
                raise ValueError(f"tasks: an answer has {len(continuation)} tokens, the model's context holds {length}")
            # The last token is only a target.
            asked[tuple((context + continuation)[-(length + 1) : -1])].append((key, continuation))
        return asked

    def _run_batch(self, texts: list[tuple[tuple[int, ...], list[tuple[bytes, list[int]]]]]) -> None:
        width = len(texts[0][0])
        input_ids = torch.zeros(len(texts), width, dtype=torch.long)
        keys, counts, positions, targets = [], [], [], []
        for row, (text, continuations) in enumerate(texts):
            input_ids[row, : len(text)] = torch.tensor(text)
            end = row * width + len(text)
            for key, continuation in continuations:
                keys.append(key)
                counts.append(len(continuation))
                positions += range(end - len(continuation), end)
                targets += continuation
        device = self.decoder.device
        places, wanted = (torch.tensor(numbers, device=device) for numbers in (positions, targets))
        losses, predictions = read_positions(
            self.decoder, input_ids.to(device), places, wanted, self.exits, score_logits, self._trained, self._adapter
        )
        require_numbers(losses, self.exits)
        losses, hits = losses.cpu(), (predictions == wanted).cpu()
        parts = zip(losses.split(counts, 1), hits.split(counts, 1), strict=True)
        for key, (loss, hit) in zip(keys, parts, strict=True):
            self._scores[key] = list(zip((-loss.sum(1)).tolist(), hit.all(1).tolist(), strict=True))


class ExitModel(HFLM):
    """lm-eval's Hugging Face model (its tokens, windows and truncation), read at one exit.

    Args:
        exit_layer: one of the scorer's exits.
        scorer: shared by the models of all exits.
        generator: returns the TextGenerator for generative tasks, also shared.
        tokenizer: of the model.
        weights: of its blocks; "auto": as they are.

    Attributes:
        exit_name: the exit layer, and the weights where they are not as they are.
    """

    def __init__(
        self,
        exit_layer: int,
        scorer: ExitScorer,
        generator: Callable[[], TextGenerator],
        tokenizer: PreTrainedTokenizerBase,
        weights: str = "auto",
    ):
        decoder = scorer.decoder
        super().__init__(
            pretrained=decoder.model,
            tokenizer=tokenizer,
            backend="causal",
            max_length=decoder.context_length,
            batch_size=scorer.batch_size,
        )
        self.exit_layer, self._scorer, self._generator = exit_layer, scorer, generator
        self.exit_name = str(exit_layer) if weights == "auto" else f"{exit_layer} {weights}"

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, override_bs: int | None = None):
        pairs = [(context, continuation) for _, context, continuation in requests]
        return self._scorer.score(pairs, self.exit_layer)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each whole text, in windows of the context's length."""
        windows = [self._windows(request.args[0]) for request in requests]
        scores = iter(self._scorer.score([window for text in windows for window in text], self.exit_layer))
        return [sum(next(scores)[0] for _ in text) for text in windows]

    def _windows(self, text: str) -> list[Pair]:
        tokens = self.tok_encode(text)
        windows = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
        return list(map(make_disjoint_window, windows))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the exit's continuations, each up to its first stop string."""
        alike = defaultdict(list)
        for index, request in enumerate(requests):
            alike[json.dumps(request.args[1], sort_keys=True)].append(index)
        answers = {}
        with tqdm(total=len(requests), desc=f"exit {self.exit_layer}", unit="answer", disable=disable_tqdm) as bar:
            for asked, indices in alike.items():
                contexts = [requests[index].args[0] for index in indices]
                for index, answer in self._answers(contexts, indices, json.loads(asked)):
                    answers[index] = answer
                    bar.update()
        return [answers[index] for index in range(len(requests))]

    def _answers(self, contexts: list[str], indices: list[int], asked: dict):
        """Yield (index, answer) as answers are finished."""
        asked = normalize_gen_kwargs(asked, self.max_gen_toks)
        end_of_text = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        stops = [text for text in handle_stop_sequences(asked.pop("until"), end_of_text) if text]
        room = asked.pop("max_gen_toks")
        if room >= self.max_length:
            raise ValueError(f"tasks: answers of up to {room} tokens are asked for, the context is {self.max_length}")
        prompts = [self._prompt(context, self.max_length - room) for context in contexts]
        settings = {"max_new_tokens": room, "stop_strings": tuple(stops), "exit_layer": self.exit_layer, "seed": 0}
        settings |= _sampling(asked)
        generations = self._generator().generate_batch(prompts, self.batch_size, indices, **settings)
        for index, generation in generations:
            yield index, postprocess_generated_text(generation.text, stops, None)

    def _prompt(self, context: str, longest: int) -> list[int]:
        return self.tok_encode(context, left_truncate_len=longest) or [self.prefix_token_id]


def _key(pair: Pair) -> bytes:
    # A hash, since the pairs of a whole task are kept.
    context, continuation = pair
    return blake2b(np.array([len(context), *context, *continuation]).tobytes(), digest_size=16).digest()


def _sampling(asked: dict) -> dict:
    """Return the settings for lm-eval's normalized generation_kwargs; ValueError for unsupported ones."""
    unknown = sorted(asked.keys() - {*_SAMPLING, "do_sample", "num_beams"})
    if unknown or asked.get("num_beams", 1) != 1:
        name = unknown[0] if unknown else "num_beams"
        raise ValueError(f"generation_kwargs: {name} = {asked[name]!r} is not supported; use {', '.join(_SAMPLING)}")
    settings = {name: asked[name] for name in _SAMPLING if asked.get(name) is not None}
    return {**settings, "temperature": float(asked.get("temperature", 1.0)) if asked["do_sample"] else 0.0}
