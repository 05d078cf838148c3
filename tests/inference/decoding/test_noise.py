"""Random numbers of sampling: Gumbel, the same for the same key, independent for different keys."""

import numpy as np
import pytest
import torch

from lskip.inference.decoding.noise import Purpose, gumbel_noise, random_source
from lskip.utils.devices import to_device

KEY = (3, 11, 200_000)  # seed, position, size


def test_noise_is_gumbel_and_a_function_of_its_key():
    noise = gumbel_noise(*KEY).double()
    assert abs(noise.mean() - 0.5772) < 0.01  # Euler's constant
    assert abs(noise.var() - torch.pi**2 / 6) < 0.03
    torch.manual_seed(1)
    np.random.seed(1)
    assert torch.equal(gumbel_noise(*KEY).double(), noise)


@pytest.mark.parametrize(
    "other",
    [(4, 11), (3, 12), (3, 11, Purpose.DRAFT), (3, 11, Purpose.ACCEPTANCE), (3, 11, Purpose.OWN, 1), (3 + 2**64, 11)],
)
def test_other_keys_give_independent_noise(other):
    seed, position, *rest = other
    both = torch.stack([gumbel_noise(*KEY), gumbel_noise(seed, position, KEY[2], *rest)]).double()
    assert abs(torch.corrcoef(both)[0, 1]) < 0.02
    values = set(random_source(3, 11).random(1000)) & set(random_source(*other).random(1000))
    assert not values  # neither the same stream nor a shifted one


def test_the_noise_of_texts_that_exist_stays_what_it_was():
    """A seed's text must not change with the version: the first values of lskip 0.1 (seed 3, position 11)."""
    source = np.random.Generator(np.random.Philox(key=3, counter=[0, 0, 0, 11]))
    assert torch.equal(gumbel_noise(3, 11, 5), torch.from_numpy(-np.log(source.standard_exponential(5))).float())


def test_to_device_keeps_values():
    values = torch.arange(4.0)
    assert torch.equal(to_device(values, torch.device("cpu")), values)
