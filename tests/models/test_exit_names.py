"""Parsing of exit layers as a user writes them."""

import pytest

from lskip.models.exit_names import exit_layers_of, exit_names


@pytest.mark.parametrize(
    ("written", "layers"), [("last", [30]), ("16,8", [8, 16]), (" 8 , last,30", [8, 30]), ("1", [1])]
)
def test_numbers_and_last(written, layers):
    assert exit_layers_of(exit_names(written), 30) == layers


@pytest.mark.parametrize("written", ["", "8,", "-1", "8.5", "middle", "0x8"])
def test_what_is_neither_is_refused(written):
    with pytest.raises(ValueError, match=r"exits: '.*' is not a layer's number or last"):
        exit_names(written)


@pytest.mark.parametrize("written", ["0", "31", "8,99"])
def test_layers_that_the_model_does_not_have_are_refused(written):
    with pytest.raises(ValueError, match=r"exits: (0|31|99) is not .* 1 to 30"):
        exit_layers_of(exit_names(written), 30)
