"""The inequalities of docs/explanation/transfer-bound.md, in float64, against numpy."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, strategies as st

from mmtard_bench.attacks.base import margin
from mmtard_bench.evaluation.certificates import (
    Answers,
    divergence,
    exact_in_kl,
    least_divergence,
    log_mixture,
    pinsker,
    smooth_pinsker,
    total_variation,
)

ROUNDING = 1e-9
LABEL = torch.tensor([0])


def logs(*p):
    return torch.tensor([p], dtype=torch.float64).log()


@st.composite
def answers(draw):
    """Log-probabilities of teachers and student, of which many are close to each other."""
    classes = draw(st.integers(2, 6))
    scale, apart = draw(st.sampled_from([0.1, 1, 5, 20])), draw(st.sampled_from([0, 0.1, 1, 10]))
    numbers = st.lists(st.floats(-1, 1), min_size=classes, max_size=classes)
    teacher, offset = (torch.tensor([draw(numbers)], dtype=torch.float64) for _ in range(2))
    teacher = scale * teacher
    return Answers(teacher.log_softmax(1), (teacher + apart * offset).log_softmax(1), LABEL)


@given(answers())
def test_no_certificate_is_above_the_students_margin(given):
    own = margin(given.log_q.exp(), LABEL)
    # The square root turns rounding of a divergence near zero, 1e-16, into 1e-8.
    assert pinsker(given) <= total_variation(given) + 1e-7
    assert total_variation(given) <= own + ROUNDING
    if exact_in_kl(given) > ROUNDING:
        assert own > 0


@given(answers())
def test_what_pinsker_certifies_the_exact_one_certifies(given):
    gain = margin(given.log_p.exp(), LABEL).clamp_min(0)
    top = given.log_p.exp().topk(2).values.sum()
    assert least_divergence(given.log_p, LABEL) >= gain**2 / (2 * top) - ROUNDING
    if pinsker(given) > ROUNDING:
        assert exact_in_kl(given) > 0


@given(answers())
def test_the_exact_certificate_is_sharp(given):
    """At the projection of p the student is undecided, and its divergence is the threshold."""
    p = given.log_p.exp()[0].numpy()
    rival = 1 + p[1:].argmax()
    assume(p[0] > p[rival] > 1e-9)
    q = p.copy()
    q[[0, rival]] = (p[0] + p[rival]) / 2
    least = float(least_divergence(given.log_p, LABEL))
    assert least == pytest.approx(float((p * np.log(p / q)).sum()), rel=1e-6, abs=ROUNDING)
    a, b = p[0], p[rival]
    closed = a * np.log(2 * a / (a + b)) + b * np.log(2 * b / (a + b))
    assert least == pytest.approx(closed, rel=1e-6, abs=1e-15)
    assert q[0] == q[1:].max()


def test_the_least_divergence_at_its_ends():
    assert float(least_divergence(logs(1.0, 1e-300), LABEL)) == pytest.approx(np.log(2))
    for wrong in (logs(0.5, 0.5), logs(0.2, 0.8), logs(1e-300, 1.0)):
        assert float(least_divergence(wrong, LABEL)) == 0
    # Where the margin is tiny, the closed form would be rounded to zero.
    near = torch.tensor([[1e-6, 0.0]], dtype=torch.float64).log_softmax(1)
    assert float(least_divergence(near, LABEL)) == pytest.approx(1e-12 / 8, rel=1e-3)


def test_total_variation_and_the_exact_certificate_do_not_contain_each_other():
    # The student forgets a class of almost no weight: its divergence is large, its margin stays.
    far = Answers(logs(0.8, 0.19, 0.01), logs(0.8, 0.2 - 1e-60, 1e-60), LABEL)
    assert total_variation(far) > 0 > exact_in_kl(far)
    # The student moves a little weight between many unlikely classes, all of which |p - q| counts.
    less, more = 0.0225, 0.0275
    p, q = [0.15, 0.05, *[less, more] * 16], [0.15, 0.05, *[more, less] * 16]
    moved = Answers(logs(*p), logs(*q), LABEL)
    assert exact_in_kl(moved) > 0 > total_variation(moved)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_mixture_is_one_of_probabilities(temperature):
    generator = torch.Generator().manual_seed(0)
    robust, clean = torch.randn(2, 5, 3, dtype=torch.float64, generator=generator)
    p_r, p_c = ((logits / temperature).softmax(1) for logits in (robust, clean))
    both = log_mixture([(0.3, robust), (0.7, clean)], temperature=temperature)
    torch.testing.assert_close(both.exp(), 0.3 * p_r + 0.7 * p_c)
    alone = log_mixture([(1.0, robust)], temperature=temperature)
    assert torch.equal(alone, (robust / temperature).log_softmax(1))


def test_equal_answers_have_no_divergence_and_a_finite_slope():
    log_p = logs(0.6, 0.3, 0.1)
    log_q = log_p.clone().requires_grad_()
    same = Answers(log_p, log_q, LABEL)
    assert divergence(log_p, log_q).item() == 0
    assert pinsker(same).item() == pytest.approx(0.3)
    assert smooth_pinsker(same).item() == pytest.approx(0.3, abs=2e-6)
    (slope,) = torch.autograd.grad(smooth_pinsker(same).sum(), log_q)
    assert torch.isfinite(slope).all()
