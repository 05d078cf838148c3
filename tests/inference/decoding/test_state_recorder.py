"""Recorded states of texts under way, against those of transformers on the finished text."""

import pytest
import torch

from lskip.inference import TextGenerator

PROMPTS = [[7, 42, 99], [5] * 30, [250], [18, 77, 3, 4], [9, 8, 9, 8, 9, 8], [31, 41, 59, 26, 53], [100]]


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("hidden_act", ["silu", "gelu"])  # the fused runner, the model's own modules
@pytest.mark.parametrize(
    "way", [{}, {"exit_layer": 2, "num_speculations": 3}, {"draft": "ngram", "num_speculations": 4}]
)
def test_states_are_those_of_the_whole_text(tiny_model, hidden_act, way, batch_size):
    """Texts join, move slots and end, also in the middle of accepted tokens."""
    model = tiny_model(hidden_act=hidden_act)
    generator = TextGenerator(model)
    generator.eos_ids = tuple(range(0, 300, 12))
    settings = {"max_new_tokens": 30, "temperature": 1.5, "seed": 5, **way}
    kept = dict(generator.generate_batch(PROMPTS, batch_size, states_at=3, **settings))
    assert len({len(one.token_ids) for one in kept.values()}) > 3
    for index, prompt in enumerate(PROMPTS):
        text = [*prompt, *kept[index].token_ids]
        states = kept[index].states
        assert states.dtype == torch.bfloat16 and len(states[0]) == len(states[1]) == len(text)
        with torch.no_grad():
            hidden = model(torch.tensor([text]), output_hidden_states=True).hidden_states
        for ours, expected in zip(states, (hidden[3][0], hidden[-1][0]), strict=True):
            torch.testing.assert_close(ours[:-1].float(), expected[:-1], rtol=0.01, atol=0.01)
            assert not ours[-1].any()
    others = dict(generator.generate_batch(PROMPTS, batch_size, **settings))
    assert all(others[i].token_ids == kept[i].token_ids and others[i].states is None for i in others)


def test_what_keeps_no_states(tiny_model):
    generator = TextGenerator(tiny_model())
    with pytest.raises(ValueError, match="states_at: 5 is not from 1 to 4"):
        generator.generate_batch(PROMPTS, states_at=5)
    with pytest.raises(ValueError, match="states_at: goes neither with an early exit nor with an exit_adapter"):
        generator.generate_batch(PROMPTS, states_at=2, exit_layer=2)
    with pytest.raises(ValueError, match="states_at: 1 lies below layer 2, which drafts"):
        generator.generate_batch(PROMPTS, states_at=1, exit_layer=2, num_speculations=3)
