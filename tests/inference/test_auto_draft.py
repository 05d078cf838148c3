"""draft "auto": what is loaded for it, what may draft, and that the text stays the model's own."""

import pytest
import torch

from lskip.inference import ConfidenceDraft, CostAwareDraft, Margin, TextGenerator
from lskip.inference.layers.quantized import stored_in_4_bits
from lskip.inference.options import LoadingOptions
from tests.conftest import make_model

PROMPT = [7, 42, 99, 3, 250, 18, 77]

pytestmark = pytest.mark.usefixtures("quick_costs")


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "seed": 3}, {"exit_layer": 2}])
@pytest.mark.parametrize("draft_weights", [None, "auto"])
def test_the_text_is_the_models_own(settings, draft_weights):
    model = make_model(eos_token_id=None)
    plain = {name: value for name, value in settings.items() if name != "exit_layer"}
    expected = TextGenerator(model).generate(PROMPT, max_new_tokens=50, **plain).token_ids
    generator = TextGenerator(model, draft_weights=draft_weights)
    for _ in range(2):
        assert generator.generate(PROMPT, max_new_tokens=50, draft="auto", **settings).token_ids == expected
    used = {str(name) for name in generator.auto_policy.summary()} - {"plain", "probes"}
    if "exit_layer" in settings:
        assert used <= {"layers 2", "weights 2", "ngram"}


def test_the_policy_goes_on_learning_unless_one_is_named():
    generator, own = TextGenerator(make_model(eos_token_id=None)), CostAwareDraft()
    generator.generate(PROMPT, max_new_tokens=20, draft="auto", draft_policy=own)
    assert generator.settings(draft="auto").draft_policy is generator.settings(draft="auto").draft_policy is not own
    assert own.learnt() and not generator.auto_policy.learnt()


@pytest.mark.parametrize(("in_4_bits", "expected"), [(True, "int4"), (False, "int8")])
def test_the_copy_is_in_4_bits_where_the_weights_were_stored_so(in_4_bits, expected):
    model = make_model(hidden_size=64, intermediate_size=128)
    if in_4_bits:
        for layer in model.model.layers:
            for module in layer.modules():
                if isinstance(module, torch.nn.Linear):
                    module.weight.data = (module.weight.data * 100).round().clamp(-8, 7) / 100
    generator = TextGenerator(model, draft_weights="auto")
    assert generator.draft_weights == expected
    assert generator.settings(draft="auto").num_speculations == {"int4": 16, "int8": 12}[expected]
    assert generator.settings(draft="auto", num_speculations=3).num_speculations == 3


def test_no_copy_where_its_kernels_do_not_work():
    generator = TextGenerator(make_model("olmo2"), draft_weights="auto")
    assert generator.draft_weights is None and generator.draft_runner is None
    assert len(generator.generate(PROMPT, max_new_tokens=9, min_new_tokens=9, draft="auto").token_ids) == 9


@pytest.mark.parametrize(("levels", "expected"), [(16, True), (17, False)])
def test_weights_of_sixteen_values_in_each_group_were_stored_in_4_bits(levels, expected):
    rows = torch.arange(levels).repeat(3)[:32].float().repeat(5, 2)
    scales = torch.rand(5, 1)
    assert stored_in_4_bits(rows * scales) is expected


def test_only_auto_loads_a_copy_that_nobody_named():
    assert LoadingOptions().for_draft("auto").draft_weights == "auto"
    assert LoadingOptions(draft_weights="int8").for_draft("auto").draft_weights == "int8"
    assert LoadingOptions().for_draft(None).draft_weights is None


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"exit_criterion": Margin(0.5)}, "draft: 'auto' does not go with an exit_criterion"),
        ({"draft_policy": ConfidenceDraft()}, "draft: 'auto' needs a policy that chooses among drafts"),
    ],
)
def test_what_does_not_go_with_auto(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        TextGenerator(make_model()).settings(draft="auto", **settings)
