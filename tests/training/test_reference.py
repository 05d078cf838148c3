"""The frozen reference model: its last layer against transformers' own."""

import torch

from lskip.training.teachers import Reference


def test_its_logits_are_the_original_ones_however_the_model_changes(tiny_model):
    model = tiny_model().train()
    ids = torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    reference = Reference(model)
    positions = torch.tensor([0, 3, 9, 17])
    with torch.no_grad():
        expected = model(ids).logits.flatten(0, 1)[positions]
        for parameter in model.parameters():
            parameter.add_(1)
    teacher = reference({"input_ids": ids}, positions)
    torch.testing.assert_close(teacher.states @ teacher.head_weight.T, expected, rtol=1e-5, atol=1e-5)
    assert not any(part is not None and part.requires_grad for part in teacher)
