"""LayerVector: one writer, a mean over steps, and a reset for each run."""

import math

import pytest

from lskip.training.layer_vector import LayerVector


class First:
    pass


class Second:
    pass


@pytest.fixture
def vector():
    return LayerVector("drop_rates", [0.0, 0.0, 1.0])


def test_a_second_writer_is_refused_by_both_names(vector):
    vector.write(First(), [0.1, 0.2, 0.3])
    for attempt in (lambda writer: vector.claim(writer), lambda writer: vector.write(writer, [0.0] * 3)):
        with pytest.raises(ValueError, match="First and Second both write drop_rates"):
            attempt(Second())
    assert vector.values == [0.1, 0.2, 0.3]


def test_two_of_the_same_class_are_two_writers(vector):
    vector.claim(First())
    with pytest.raises(ValueError, match="First and First both write"):
        vector.claim(First())


def test_the_same_writer_may_write_at_each_step(vector):
    writer = First()
    vector.claim(writer)
    vector.write(writer, [0.5] * 3)
    vector.write(writer, [0.25] * 3)
    assert vector.values == [0.25] * 3


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([0.1], "1 values for drop_rates, the model has 3 layers"),
        ([0.1, -0.5, 0.0], "drop_rates must be finite and 0 or more, not -0.5"),
        ([0.1, 0.0, math.nan], "not nan"),
        ([math.inf, 0.0, 0.0], "not inf"),
    ],
)
def test_values_that_make_no_sense_are_refused(vector, values, said):
    with pytest.raises(ValueError, match=f"First: .*{said}"):
        vector.write(First(), values)
    assert vector.values == [0.0, 0.0, 1.0]


def test_the_vector_keeps_its_own_copy(vector):
    values = [0.1, 0.2, 0.3]
    vector.write(First(), values)
    values[0] = 9.0
    assert vector.values == [0.1, 0.2, 0.3]


def test_mean_over_steps_since_it_was_last_taken(vector):
    writer = First()
    for values in ([0.0, 1.0, 2.0], [1.0, 1.0, 0.0], [5.0, 1.0, 1.0]):
        vector.write(writer, values)
        vector.count_step()
    assert vector.take_mean() == [2.0, 1.0, 1.0]
    vector.count_step()
    assert vector.take_mean() == [5.0, 1.0, 1.0]
    assert vector.take_mean() == [0.0, 0.0, 0.0]  # no step since


def test_reset_forgets_the_writer_and_what_it_wrote(vector):
    vector.write(First(), [0.1, 0.2, 0.3])
    vector.count_step()
    vector.reset()
    assert vector.values == [0.0, 0.0, 1.0] and vector.take_mean() == [0.0] * 3
    vector.write(Second(), [0.3, 0.2, 0.1])
