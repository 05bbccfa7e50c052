"""Tests of assignment 8, measuring: against sums by hand, prompts written out, and counting all draws."""
import math
from itertools import combinations

import pytest
import torch

TITLE = 'Measuring'
EXERCISES = {1: 'Bits per byte', 2: 'Centred accuracy', 3: 'Few-shot prompts', 4: 'The answer of a model', 5: 'pass@k'}


def near(a, b, tolerance=1e-6):
    if not isinstance(a, (int, float)) or isinstance(a, bool): a = float(a)
    if not abs(a - b) <= tolerance: raise AssertionError(f'{a:.6f} instead of {b:.6f}')
    return True


# 1. Bits per byte
@pytest.mark.points(2, exercise=1)
def test_bits(student):
    "Nats become bits when they are divided by ln 2, about 0.69; multiplied, they shrink."
    losses = torch.tensor([[math.log(2), math.log(4)]])
    assert near(student.bits_per_byte(losses, torch.tensor([[0, 1]]), torch.tensor([1, 1])), 1.5)


@pytest.mark.points(1, exercise=1)
def test_ratio_of_sums(student, rng):
    "One sum of bits over one sum of bytes: the mean of each token's ratio counts long tokens too little, and tokens are not bytes."
    losses, lengths = [rng.uniform(1, 5) for _ in range(6)], [1, 7, 2]
    targets = [0, 1, 2, 1, 0, 0]
    want = sum(losses) / math.log(2) / sum(lengths[t] for t in targets)
    assert near(student.bits_per_byte(torch.tensor([losses]).view(2, 3), torch.tensor([targets]).view(2, 3), torch.tensor(lengths)), want)


@pytest.mark.points(1, exercise=1)
def test_specials_and_masked(student):
    "A special token has no bytes: its loss stays out too. A target of -1 is no index; looked up, it is the last token of the vocabulary."
    losses, targets = torch.tensor([[2.0, 9.0, 0.5, 3.0]]), torch.tensor([[0, 1, -1, 2]])
    assert near(student.bits_per_byte(losses, targets, torch.tensor([3, 0, 4])), 5 / math.log(2) / 7)


@pytest.mark.points(1, exercise=1)
def test_no_bytes(student):
    "Without a single byte there is no bits per byte: say nan, not 0, which would be a perfect model, and do not fail."
    assert math.isnan(student.bits_per_byte(torch.ones(1, 2), torch.tensor([[-1, 0]]), torch.tensor([0, 1])))


# 2. Centred accuracy
@pytest.mark.points(1, exercise=2)
def test_centred(student):
    "Chance becomes 0 and perfection stays 1: subtract chance, then divide by what lies above it."
    assert near(student.centred(0.25, 0.25), 0) and near(student.centred(1.0, 0.25), 1) and near(student.centred(0.7, 0.4), 0.5)


@pytest.mark.points(1, exercise=2)
def test_below_chance(student):
    "Worse than guessing is below 0, and has to stay there: cut off at 0, luck would only count where it is good."
    assert near(student.centred(0.1, 0.5), -0.8)


@pytest.mark.points(1, exercise=2)
def test_core(student):
    "Centre each task first, then take the plain mean: neither all questions in one pot, nor the centre of the mean accuracy."
    tasks = [(5, 10, 0.25), (900, 1000, 0.5), (1, 4, 0.0)]
    assert near(student.core(tasks), (0.25 / 0.75 + 0.8 + 0.25) / 3)


# 3. Few-shot prompts
SHOTS = [dict(question='Red and round?', choices=['a shoe', 'an apple'], gold=1), dict(question='Wet? ', choices=['rain', 'sand'], gold=0)]
ITEM = dict(question='What barks?', choices=['a cat', 'a dog ', 'tea'], gold=1)


@pytest.mark.points(1, exercise=3)
def test_one_prompt_per_choice(student):
    "One prompt for each choice, in their order; the right answer of the item itself is not given away."
    assert student.few_shot(ITEM, []) == [f'Question: What barks?\nAnswer: {c}' for c in ('a cat', 'a dog', 'tea')]


@pytest.mark.points(1, exercise=3)
def test_examples(student):
    "Examples are solved, with the choice at `gold`, stand in their order, and are separated by an empty line."
    assert student.few_shot(dict(question='X?', choices=['y'], gold=0), [SHOTS[0], SHOTS[0]])[0] == 'Question: Red and round?\nAnswer: an apple\n\n' * 2 + 'Question: X?\nAnswer: y'


@pytest.mark.points(1, exercise=3)
def test_no_stray_spaces(student):
    "White space at the end of a question or a choice is cut off: a tokenizer turns it into tokens of its own."
    prompts = student.few_shot(ITEM, SHOTS)
    assert prompts[1] == 'Question: Red and round?\nAnswer: an apple\n\nQuestion: Wet?\nAnswer: rain\n\nQuestion: What barks?\nAnswer: a dog'


@pytest.mark.points(1, exercise=3)
def test_common_prefix(student):
    "Up to the first place where any two rows differ; ids that happen to be equal further on do not count."
    assert student.common_prefix([[1, 2, 3, 4], [1, 2, 5, 4], [1, 2, 3, 9]]) == 2 and student.common_prefix([[1, 2], [3, 2]]) == 0


@pytest.mark.points(1, exercise=3)
def test_prefix_leaves_one(student):
    "One row may be the beginning of another. At least one id of each must be left to judge by."
    assert student.common_prefix([[1, 2, 3], [1, 2, 3, 4]]) == 2 and student.common_prefix([[7, 7], [7, 7]]) == 1


# 4. The answer of a model
class Model:
    """log p of ids from a table by position and id; counts its calls."""
    def __init__(self, odds): self.odds, self.calls = odds, 0

    def __call__(self, ids):
        self.calls += 1
        return [self.odds(t, i) for t, i in enumerate(ids)][1:]


@pytest.mark.points(2, exercise=4)
def test_answer(student, rng):
    "The entry at index j is about id j + 1: the first id behind a prefix of s ids is judged by entry s - 1."
    table = {i: -rng.uniform(0, 9) for i in range(100)}
    rows = [[1, 2, a, b] for a, b in rng.sample([(a, b) for a in range(10, 20) for b in range(30, 40)], 6)]
    score = lambda row: (table[row[2]] + table[row[3]]) / 2
    assert student.answer(Model(lambda t, i: table[i]), rows) == max(range(6), key=lambda n: score(rows[n]))
    for sharp in (2, 3): assert student.answer(Model(lambda t, i: -9.0 * (t == sharp and i == 5)), [[1, 1, 5, 8], [1, 1, 8, 5], [1, 1, 9, 9]]) == (1 if sharp == 2 else 0)


@pytest.mark.points(1, exercise=4)
def test_mean_not_sum(student):
    "A sum punishes length: the longer choice, each of its ids more likely, has to win."
    assert student.answer(Model(lambda t, i: -2.0 if i == 3 else -1.0), [[1, 1, 3], [1, 1, 4, 4, 4]]) == 1


@pytest.mark.points(1, exercise=4)
def test_prefix_does_not_count(student):
    "Only ids behind the common prefix count: mixed into the mean, the odds of a long question hide the difference between choices."
    odds = lambda t, i: 0.0 if t < 8 else (-3.0 if i == 5 else -2.5)
    rows = [[1] * 8 + [5], [1] * 8 + [6, 6, 6]]
    assert student.answer(Model(odds), rows) == 1


@pytest.mark.points(1, exercise=4)
def test_answer_calls(student):
    "One call for each choice. Of equal choices the first wins."
    model = Model(lambda t, i: -1.0)
    assert student.answer(model, [[1, 2], [1, 3], [1, 4]]) == 0 and model.calls == 3, f'{model.calls} calls for 3 choices'


# 5. pass@k
@pytest.mark.points(2, exercise=5)
def test_pass_at_k(student):
    "Without replacement: an answer cannot be drawn twice, so 1 - (1 - c/n)^k is too low."
    for n, c in ((5, 2), (6, 1), (4, 3)):
        for k in range(1, n + 1):
            draws = list(combinations([1] * c + [0] * (n - c), k))
            assert near(student.pass_at_k(n, c, k), sum(map(any, draws)) / len(draws))


@pytest.mark.points(1, exercise=5)
def test_pass_at_k_edges(student):
    "None right gives 0; with fewer than k wrong ones a right one is always among them. More than n cannot be drawn: ValueError."
    assert near(student.pass_at_k(8, 0, 3), 0) and near(student.pass_at_k(8, 6, 3), 1) and near(student.pass_at_k(8, 8, 8), 1)
    try: student.pass_at_k(3, 1, 4)
    except Exception as e: assert getattr(e, 'kind', '') == 'ValueError', f'{e}'
    else: raise AssertionError('4 of 3 were drawn')


@pytest.mark.points(1, exercise=5)
def test_pass_at_k_large(student):
    "Large binomials do not fit into a float: divide exact integers, or multiply the ratios one by one."
    want = 1 - math.prod((9990 - i) / (10000 - i) for i in range(3000))
    assert near(student.pass_at_k(10000, 10, 3000), want, 1e-9)
