"""Tests of assignment 7, policy gradient: against loops over single numbers, and PyTorch's gradients."""
import math

import pytest
import torch

TITLE = 'Policy gradient'
EXERCISES = {1: 'Advantages', 2: 'The odds of what was said', 3: 'The loss', 4: 'Check a gradient'}


def normal(rng, *shape):
    """Normal numbers that depend on the seed of the grading."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(rng.randrange(2**40)))


def close(a, b, tolerance=1e-4):
    """Whether two tensors have one shape and nearly equal values."""
    if not isinstance(a, torch.Tensor): raise AssertionError(f'a tensor was expected, not {type(a).__name__}')
    if a.shape != b.shape: raise AssertionError(f'the shape is {tuple(a.shape)}, not {tuple(b.shape)}')
    worst = (a.double() - b.double()).abs().max().item()
    if not worst <= tolerance: raise AssertionError(f'values are off by up to {worst:.3g}')
    return True


def answers(rng, B=3, T=5, V=6):
    """Logits, ids, mask and advantages of a batch; answers of different lengths."""
    ids = torch.tensor([[rng.randrange(V) for _ in range(T)] for _ in range(B)])
    mask = torch.tensor([[0] * (T - n) + [1] * n for n in (1, 3, 2)])
    return 2 * normal(rng, B, T, V), ids, mask, normal(rng, B)


def reference(logits, ids, mask, advantage):
    """The loss, token by token."""
    total = n = 0
    for b in range(len(ids)):
        for t in range(1, ids.shape[1]):
            if not mask[b, t]: continue
            total = total - advantage[b] * (logits[b, t - 1] - logits[b, t - 1].logsumexp(-1))[ids[b, t]]
            n += 1
    return total / max(n, 1)


# 1. Advantages
@pytest.mark.points(1, exercise=1)
def test_per_question(student):
    "The mean is that of the question's own answers, row by row: a batch-wide mean praises every answer to an easy question."
    r = torch.tensor([[1.0, 1.0, 0.0, 1.0], [0.0, 0.0, 1.0, 0.0]])
    assert close(student.advantages(r), torch.tensor([[0.25, 0.25, -0.75, 0.25], [-0.25, -0.25, 0.75, -0.25]]))


@pytest.mark.points(1, exercise=1)
def test_no_deviation(student):
    "Nothing is divided by the standard deviation here: with equal rewards that would be 0 / 0."
    r = torch.tensor([[3.0, 3.0, 3.0], [0.0, 5.0, 1.0]])
    assert close(student.advantages(r), torch.tensor([[0.0, 0, 0], [-2, 3, -1]]))


@pytest.mark.points(2, exercise=1)
def test_leave_one_out(student, rng):
    "The mean of the others leaves the answer's own reward out of the sum and out of the count: n - 1."
    r = normal(rng, 2, 5)
    want = torch.tensor([[row[i] - sum(row[:i] + row[i + 1:]) / 4 for i in range(5)] for row in r.tolist()])
    assert close(student.leave_one_out(r), want)


# 2. The odds of what was said
@pytest.mark.points(2, exercise=2)
def test_log_probs(student, rng):
    "Logits at position t are about id t + 1: leave out the last logits and the first id, not the other way round."
    logits, ids, *_ = answers(rng)
    want = torch.stack([torch.stack([logits[b, t - 1].log_softmax(-1)[ids[b, t]] for t in range(1, 5)]) for b in range(3)])
    assert close(student.log_probs(logits, ids), want)


@pytest.mark.points(1, exercise=2)
def test_log_probs_are_logs(student):
    "The logarithm of a probability, natural: at most 0, and log 0.5 for one of two equal odds. The logits themselves are not normalised."
    assert close(student.log_probs(torch.full((1, 3, 2), 5.0), torch.tensor([[0, 1, 0]])), torch.full((1, 2), math.log(0.5)))


@pytest.mark.points(1, exercise=2)
def test_log_probs_of_unlikely(student):
    "log(softmax) gives minus infinity for an unlikely token; log_softmax gives the number."
    logits = torch.tensor([[[0.0, 300.0], [0.0, 0.0]]])
    assert close(student.log_probs(logits, torch.tensor([[1, 0]])), torch.tensor([[-300.0]]))


# 3. The loss
@pytest.mark.points(2, exercise=3)
def test_loss(student, rng):
    "A good answer should become more likely when the loss falls: the sign is minus. Each answer is weighted with its own advantage."
    logits, ids, mask, advantage = answers(rng)
    mask = torch.ones_like(mask)
    assert close(student.policy_loss(logits, ids, mask, advantage), reference(logits, ids, mask, advantage))


@pytest.mark.points(1, exercise=3)
def test_loss_mask(student, rng):
    "The mask of id t goes with the log p of id t, so drop its first column, not its last; ids with mask 0 have no part in the loss."
    logits, ids, mask, advantage = answers(rng, B=1)
    mask = torch.tensor([[0, 0, 1, 1, 0]])
    assert close(student.policy_loss(logits, ids, mask, advantage), reference(logits, ids, mask, advantage))


@pytest.mark.points(1, exercise=3)
def test_loss_divides_by_tokens(student, rng):
    "Divide by the chosen ids of the whole batch: a mean answer by answer makes the tokens of long answers count less."
    logits, ids, mask, advantage = answers(rng)
    assert close(student.policy_loss(logits, ids, mask, advantage), reference(logits, ids, mask, advantage))


@pytest.mark.points(1, exercise=3)
def test_loss_gradient(student, rng):
    "The gradient goes to the logits and not into the advantage, which is a measured number: detach it."
    logits, ids, mask, advantage = answers(rng)
    mine = logits.clone().requires_grad_()
    reference(mine, ids, mask, advantage).backward()
    got = student.request('policy_loss', logits, ids, mask, advantage, grad=[0, 3]).grads
    assert close(got[0], mine.grad) and (got[1] is None or float(got[1].abs().max()) == 0)


@pytest.mark.points(1, exercise=3)
def test_loss_of_nothing(student, rng):
    "With no id chosen there is nothing to learn: the loss is 0, not nan."
    logits, ids, mask, advantage = answers(rng)
    assert close(student.policy_loss(logits, ids, torch.zeros_like(mask), advantage), torch.zeros(()))


# 4. Check a gradient
class Cubic:
    """sum(c x^3), with its calls counted."""
    def __init__(self, c): self.c, self.calls = c, 0

    def __call__(self, x):
        self.calls += 1
        return float((self.c * x ** 3).sum())


@pytest.mark.points(2, exercise=4)
def test_numeric_gradient(student, rng):
    "Divide by 2h, the distance between the two points; and move one element at a time, each back in its place before the next."
    x, c = normal(rng, 2, 3).double(), normal(rng, 2, 3).double()
    assert close(student.numeric_gradient(Cubic(c), x), 3 * c * x ** 2, 1e-4)


@pytest.mark.points(1, exercise=4)
def test_central(student):
    "One step to each side: with a step to one side only, the error falls with h and not with h squared."
    f = Cubic(torch.ones(1, dtype=torch.float64))
    assert close(student.numeric_gradient(f, torch.ones(1, dtype=torch.float64), 0.1), torch.tensor([3.01]), 1e-6)


@pytest.mark.points(1, exercise=4)
def test_two_calls(student, rng):
    "Two calls of f for each element suffice, and x itself is as it was before."
    f, x = Cubic(torch.ones(4).double()), normal(rng, 4).double()
    reply = student.request('numeric_gradient', f, x, after=True)
    assert close(reply.value, 3 * x ** 2, 1e-4) and f.calls == 8 and close(reply.after[1], x, 0), f'{f.calls} calls for 4 elements'
