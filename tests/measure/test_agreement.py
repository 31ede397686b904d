"""When two results count as the same numbers."""

import pytest
import torch

from dyncore.measure.agreement import disagreement, errors


def test_error_is_relative_to_the_larger_of_value_and_rms():
    reference = torch.tensor([3.0, 4.0, 0.0, 0.0])  # rms 2.5
    largest, rms = errors(reference + torch.tensor([0.0, 0.0, 0.25, 0.0]), reference)
    assert largest == pytest.approx(0.1)
    assert rms == pytest.approx(0.125 / 2.5)


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 5e-5), (torch.bfloat16, 2.5e-2)])
def test_one_element_beyond_the_tolerance_is_found(dtype, allowed):
    reference = torch.ones(10_000, dtype=torch.float64)
    value = reference.clone()
    value[77] += 0.8 * allowed
    assert disagreement(value.to(dtype), reference) is None
    value[77] += 0.8 * allowed
    assert "largest error" in disagreement(value.to(dtype), reference)


def test_tensors_larger_than_a_piece_are_compared_to_their_end(monkeypatch):
    reference = torch.tensor([3.0, 4.0, 0.0, 0.0, 0.0])
    value = reference + torch.tensor([0.0, 0.0, 0.0, 0.0, 0.25])
    whole = errors(value, reference)
    monkeypatch.setattr("dyncore.measure.agreement._PIECE", 2)
    assert errors(value, reference) == pytest.approx(whole)
    assert whole[0] == pytest.approx(0.25 / 5**0.5)


def test_many_small_errors_are_found_by_their_rms():
    reference = torch.ones(1000, dtype=torch.float64)
    assert disagreement((reference * (1 + 2e-5)).float(), reference) is not None
    assert disagreement((reference * (1 + 1e-5)).float(), reference) is None


def test_a_lone_nan_is_an_error_and_an_expected_one_is_not():
    reference = torch.tensor([1.0, float("nan"), float("inf")])
    assert disagreement(reference.clone(), reference) is None
    assert disagreement(torch.tensor([float("nan"), float("nan"), float("inf")]), reference) is not None


def test_a_lone_infinity_is_an_error_on_either_side():
    reference, other = torch.tensor([1.0, 2.0, float("inf")]), torch.tensor([1.0, 2.0, 3.0])
    assert errors(other, reference)[0] > 1e30
    assert disagreement(other, reference) is not None
    assert disagreement(reference, other) is not None


def test_gradients_in_sixteen_bits_are_bounded_by_rms_alone():
    reference = torch.ones(10_000, dtype=torch.float64)
    value = reference.clone()
    value[3] = 1.5
    assert disagreement(value.bfloat16(), reference, gradient=True) is None
    assert disagreement((reference * 1.02).bfloat16(), reference, gradient=True) is not None


def test_shapes_that_differ_disagree():
    assert disagreement(torch.ones(2), torch.ones(3)) == "shape [2], expected [3]"
    assert disagreement(torch.ones(0), torch.ones(0)) is None
