"""Tests of assignment 9, the capstone: arithmetic by hand, all deals counted, and a race that the grading process runs itself."""
import functools, hashlib, json
from itertools import permutations

import pytest

from nanochat.grade import BASELINE, check_race, race

TITLE = 'The capstone'
EXERCISES = {1: 'A plan that fits', 2: 'A schedule by the clock', 3: 'Luck or not', 4: 'An improvement', 5: 'A record'}


def near(a, b, tolerance=1e-9):
    if not abs(float(a) - b) <= tolerance: raise AssertionError(f'{float(a):.6f} instead of {b:.6f}')
    return True


# 1. A plan that fits
@pytest.mark.points(2, exercise=1)
def test_plan(student):
    "Minutes are sixty seconds each, and what is not training is taken off before the steps are counted."
    assert student.plan(5, 60, 10_000, 16_384, 1_000_000)['steps'] == 146 and student.plan(1, 0, 100, 1000, 10)['steps'] == 6


@pytest.mark.points(1, exercise=1)
def test_whole_steps(student):
    "Steps are whole and rounded down; tokens are those of whole steps, and these are divided by the parameters."
    got = student.plan(2, 20, 999, 1000, 500)
    assert type(got['steps']) is int and got['steps'] == 99 and got['tokens'] == 99_000 and near(got['tokens_per_parameter'], 198)


@pytest.mark.points(1, exercise=1)
def test_no_time(student):
    "With more overhead than time nothing fits: 0 steps, not fewer."
    assert student.plan(1, 90, 1000, 10, 5) == dict(steps=0, tokens=0, tokens_per_parameter=0)


# 2. A schedule by the clock
@pytest.mark.points(1, exercise=2)
def test_rises(student):
    "The rise is straight, from 0 at the beginning to 1 at `warmup`, and then the rate is 1 until the fall begins."
    for share, want in ((0, 0), (0.05, 0.5), (0.1, 1), (0.3, 1), (0.5, 1)): assert near(student.rate(share, 0.1, 0.5, 0.2), want)


@pytest.mark.points(1, exercise=2)
def test_falls(student):
    "The fall begins when `warmdown` of the time is left, and ends at `final`, in a straight line between 1 and final."
    for share, want in ((0.6, 0.84), (0.75, 0.6), (1.0, 0.2)): assert near(student.rate(share, 0.1, 0.5, 0.2), want)


@pytest.mark.points(1, exercise=2)
def test_after_the_end(student):
    "The clock may run over: after the end the rate stays where it ended. A negative rate would climb back up."
    assert near(student.rate(1.1, 0.1, 0.5, 0.2), 0.2) and near(student.rate(1.5, 0.1, 0.5), 0) and near(student.rate(0.9, 0.1, 0.2), 0.5)


@pytest.mark.points(1, exercise=2)
def test_without_warmup(student):
    "warmup 0 and warmdown 0 mean that there is no rise and no fall; dividing by them fails."
    assert near(student.rate(0.0, 0, 0.5), 1) and near(student.rate(0.99, 0, 0), 1)


# 3. Luck or not
def dealt(before, after):
    """The reference: every order of the values, far more than needed, the last ones being 'after'."""
    orders = [order[len(before):] for order in permutations(before + after)]
    return sum(sum(o) <= sum(after) + 1e-9 for o in orders) / len(orders)


@pytest.mark.points(2, exercise=3)
def test_p_value(student, rng):
    "Count all ways to choose who is 'after', yours among them; the p-value is a share of these, and never 0."
    assert near(student.p_value([3.0, 3.1, 3.2], [2.7, 2.8, 2.9]), 1 / 20)
    for _ in range(3):
        before, after = ([rng.uniform(2, 3) for _ in range(3)] for _ in range(2))
        assert near(student.p_value(before, after), dealt(before, after))


@pytest.mark.points(1, exercise=3)
def test_one_side(student):
    "Lower is better, and only that side counts: a change that makes things worse has a p-value near 1."
    assert near(student.p_value([1.0, 1.1, 1.2], [2.0, 2.1, 2.2]), 1)


@pytest.mark.points(1, exercise=3)
def test_ties(student):
    "As low as yours counts too, not only lower; and equal values are different runs. A small tolerance keeps rounding out of it."
    assert near(student.p_value([1.0, 2.0], [1.0, 2.0]), 5 / 6) and near(student.p_value([0.3, 0.1], [0.2, 0.2]), dealt([0.3, 0.1], [0.2, 0.2]))


@pytest.mark.points(1, exercise=3)
def test_unequal_numbers(student):
    "The groups may differ in size: choose as many as 'after' has, of all values together."
    assert near(student.p_value([3.0, 3.1, 3.2, 3.3], [2.9]), 1 / 5) and near(student.p_value([3.0, 2.0], [1.0, 2.5, 2.7, 2.2]), dealt([3.0, 2.0], [1.0, 2.5, 2.7, 2.2]))


# 4. An improvement
@functools.cache
def measured(settings, seeds):
    """Bits of sorted settings on each seed."""
    return [race(dict(settings), seed) for seed in seeds]


def mine(student, rng):
    """The student's bits and the baseline's, on seeds that depend on the grading's."""
    settings = check_settings(student.settings())
    seeds = tuple(1000 * (rng.grading + 1) + i for i in range(3))
    return measured(tuple(sorted(settings.items())), seeds), measured(tuple(sorted(BASELINE.items())), seeds)


def check_settings(settings):
    try: return check_race(settings)
    except Exception as e: raise AssertionError(str(e)) from None


@pytest.mark.points(2, exercise=4)
def test_beats_the_baseline(student, rng):
    "The settings have to be valid, and better than the baseline on every seed. The baseline sees a single letter and learns slowly; with a rate too high nothing is learned at all."
    got, base = mine(student, rng)
    assert all(g < b - 0.05 for g, b in zip(got, base)), f'{[round(g, 3) for g in got]} bits; the baseline has {[round(b, 3) for b in base]}'


@pytest.mark.points(2, exercise=4)
def test_below_one_and_a_half(student, rng):
    "One letter does not say which comes next: look at the context. What does the second letter before tell about this language?"
    got, _ = mine(student, rng)
    assert sum(got) / 3 < 1.5, f'{sum(got) / 3:.3f} bits per letter'


@pytest.mark.points(2, exercise=4)
def test_below_one(student, rng):
    "Momentum of 0.9 makes steps ten times as long in the end: lower the rate with it. And a rate that falls to 0 takes the noise out of the last steps."
    got, _ = mine(student, rng)
    assert sum(got) / 3 < 1.0, f'{sum(got) / 3:.3f} bits per letter'


# 5. A record
class Runs:
    """A training that returns made-up bits and remembers what it was asked."""
    def __init__(self): self.asked = []

    def __call__(self, settings, seed):
        self.asked.append((settings['name'], seed))
        return (3.0 if settings['name'] == 'old' else 2.5) + seed / 1000


OLD, NEW, SEEDS = dict(name='old', rate=0.1), dict(name='new', rate=0.2), [5, 3, 8]


@pytest.mark.points(1, exercise=5)
def test_record_measures(student):
    "Both settings with the same seeds, each pair run once: six runs for three seeds, and no run is repeated until it looks good."
    runs = Runs()
    student.record(runs, OLD, NEW, SEEDS, 'why')
    assert sorted(runs.asked) == sorted([(name, seed) for name in ('old', 'new') for seed in SEEDS]), f'asked for {runs.asked}'


@pytest.mark.points(2, exercise=5)
def test_record_numbers(student):
    "before and after are lists in the order of the seeds; the improvement is a difference of means, above 0 when the bits fall."
    got = student.record(Runs(), OLD, NEW, SEEDS, 'why')
    assert got['before'] == [3.005, 3.003, 3.008] and got['after'] == [2.505, 2.503, 2.508] and near(got['improvement'], 0.5) and near(got['p_value'], 1 / 20)


@pytest.mark.points(1, exercise=5)
def test_record_says_all(student):
    "A record that others can repeat names the story, both settings and the seeds, and can be written as JSON."
    got = json.loads(json.dumps(student.record(Runs(), OLD, NEW, SEEDS, 'why')))
    assert (got['story'], got['baseline'], got['settings'], got['seeds']) == ('why', OLD, NEW, SEEDS)


@pytest.mark.points(1, exercise=5)
def test_record_hash(student):
    "The hash is over settings, seeds and numbers together, as sorted JSON in hex: leave one of them out, and it can be changed unnoticed."
    got = student.record(Runs(), OLD, NEW, SEEDS, 'why')
    proof = json.dumps([OLD, NEW, SEEDS, got['before'], got['after']], sort_keys=True)
    assert len(got['before']) == 3 and got['sha256'] == hashlib.sha256(proof.encode()).hexdigest()
