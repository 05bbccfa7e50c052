"""Bits per byte against its definition; the n-gram baseline against dictionaries, and as a probability distribution."""
import math
import subprocess
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from nanochat.loss_eval import discount_table, evaluate_bpb, ngram_bpb, ngram_probs
from warm_python import warm_python

V = 40


class Table(torch.nn.Module):
    """A bigram model that remembers how it was called."""
    def __init__(self, seed=0):
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(V, V, generator=torch.Generator().manual_seed(seed)))
        self.calls = []

    def forward(self, x, y, kv_cache=None, loss_reduction='mean'):
        self.calls.append((loss_reduction, torch.is_grad_enabled()))
        return torch.nn.functional.cross_entropy(self.table[x].flatten(0, 1), y.flatten(), ignore_index=-1, reduction=loss_reduction)


@pytest.fixture
def data():
    g = torch.Generator().manual_seed(1)
    x, y = torch.randint(V, (2, 24, 32), generator=g)
    y[torch.rand(y.shape, generator=g) < .2] = -1
    sizes = torch.randint(1, 9, (V,), generator=g)
    sizes[-4:] = 0
    return x, y, sizes


def by_definition(model, x, y, sizes):
    nats = nbytes = 0
    logp = torch.log_softmax(model.table.detach().double(), -1)
    for a, b in zip(x.flatten().tolist(), y.flatten().tolist()):
        if b >= 0 and sizes[b] > 0:
            nats -= logp[a, b].item()
            nbytes += sizes[b].item()
    return nats / nbytes / math.log(2)


@pytest.mark.parametrize('shape', [(24, 32), (1, 768), (768, 1), (8, 96), (3, 32)])
def test_bpb_is_its_definition_in_every_batch_shape(data, shape):
    x, y, sizes = data
    batches = [(a.reshape(-1, shape[1]), b.reshape(-1, shape[1])) for a, b in zip(x.reshape(-1, shape[1]).split(shape[0]), y.reshape(-1, shape[1]).split(shape[0]))]
    model = Table()
    assert evaluate_bpb(model, batches, len(batches), sizes) == pytest.approx(by_definition(model, x, y, sizes), rel=1e-6)
    assert set(model.calls) == {('none', False)}


def test_special_and_ignored_targets_change_nothing(data):
    x, y, sizes = data
    model = Table()
    before = evaluate_bpb(model, [(x, y)], 1, sizes)
    more_x, more_y = torch.cat([x, x[:2]]), torch.cat([y, torch.full_like(y[:1], -1), torch.full_like(y[:1], V - 1)])
    model.table.data[:, V - 1] = -1e4  # a special token that the model finds impossible
    changed = evaluate_bpb(model, [(x, y)], 1, sizes)
    assert evaluate_bpb(model, [(more_x, more_y)], 1, sizes) == pytest.approx(changed, rel=1e-9)
    assert changed <= before


def test_infinite_loss_on_what_does_not_count_is_not_nan(data):
    x, y, sizes = data
    model = Table()
    model.table.data[:, V - 1] = -math.inf
    assert math.isfinite(evaluate_bpb(model, [(x, y)], 1, sizes))


def test_steps_states_and_generators(data):
    x, y, sizes = data
    endless = ((x, y, {'a state': 1}) for _ in iter(int, 1))
    model = Table()
    assert evaluate_bpb(model, endless, 3, sizes) == pytest.approx(by_definition(model, x, y, sizes), rel=1e-6) and len(model.calls) == 3
    next(endless)  # and no batch more was taken than asked for
    assert evaluate_bpb(model, iter([(x, y)]), 100, sizes) == pytest.approx(by_definition(model, x, y, sizes), rel=1e-6)


def test_nothing_to_count_is_inf(data):
    x, y, sizes = data
    assert evaluate_bpb(Table(), [(x, torch.full_like(y, -1))], 1, sizes) == math.inf == evaluate_bpb(Table(), [], 5, sizes)


def test_sums_are_exact_over_many_batches():
    """A fp32 running sum of these two million losses is off by more than the tolerance."""
    class Constant:
        def __call__(self, x, y, loss_reduction): return torch.full((y.numel(),), 0.7)
    y = torch.zeros(100, 100, dtype=torch.int64)
    got = evaluate_bpb(Constant(), [(y, y)] * 200, 200, torch.ones(1, dtype=torch.int64))
    assert got == pytest.approx(float(torch.tensor(.7)) / math.log(2), rel=1e-12)


RANK_PROGRAM = '''
import sys, torch, torch.distributed as dist
from nanochat.loss_eval import evaluate_bpb
rank = int(sys.argv[1])
dist.init_process_group('gloo', init_method=f'file://{sys.argv[2]}', rank=rank, world_size=2)
class Model:
    def __call__(self, x, y, loss_reduction): return y.float() + .5
y = torch.arange(6).view(3, 2)
mine = [(y[:1], y[:1])] if rank == 0 else [(y[1:2], y[1:2]), (y[2:], y[2:])]  # two ranks with unequal shares
print(evaluate_bpb(Model(), mine, 10, torch.tensor([1, 2, 3, 4, 5, 0])))
dist.destroy_process_group()
'''


def test_two_ranks_give_the_number_of_one(tmp_path):
    run = lambda r: subprocess.Popen([warm_python().python, '-c', RANK_PROGRAM, str(r), str(tmp_path/'meet')], stdout=subprocess.PIPE, text=True, env=warm_python().environ())
    ranks = [run(r) for r in range(2)]
    outputs = [p.communicate(timeout=120)[0] for p in ranks]
    want = sum(i + .5 for i in range(5)) / 15 / math.log(2)
    assert [float(o) for o in outputs] == pytest.approx([want, want], rel=1e-7)


# --- the n-gram baseline ---

def dictionaries(train, order, V):
    """Interpolated Kneser-Ney from dictionaries, straight from its definition: p(history, w)."""
    grams = lambda n: [tuple(train[i:i + n]) for i in range(len(train) - n + 1)]
    counts = {order: Counter(grams(order))}
    for n in range(1, order):
        left = {(train[i - 1] if i else None, g) for i, g in enumerate(grams(n))}
        first = grams(n)[0]
        counts[n] = Counter(g for l, g in left if l is not None)
        counts[n][first] += 1
    D = {n: discount_table(np.array([*counts[n].values()])) for n in counts}

    def p(history, w):
        out = 1 / V
        for n in range(1, order + 1):
            if n - 1 > len(history): break
            context = tuple(history[len(history) - n + 1:])
            after = {g[-1]: c for g, c in counts[n].items() if g[:-1] == context}
            if not after: break
            taken = sum(D[n][min(c, 3)] for c in after.values())
            c = after.get(w, 0)
            out = (c - D[n][min(c, 3)] + taken * out) / sum(after.values())
        return out
    return p


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.lists(st.integers(0, 4), min_size=5, max_size=60), st.lists(st.integers(0, 5), max_size=30))
def test_probabilities_equal_the_definition(order, train, ids):
    p = dictionaries(train, order, 6)
    assert ngram_probs(train, ids, 6, order) == pytest.approx([p(ids[:t], w) for t, w in enumerate(ids)], rel=1e-10)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.sampled_from([8, 300, 4000]))
def test_probabilities_sum_to_one(seed, order, size):
    rng = np.random.default_rng(seed)
    train = np.minimum(rng.geometric(.15, size), 29)  # few frequent tokens, many rare ones, ids 0 and 30.. never
    contexts = np.stack([train[i:i + 4] if rng.random() < .6 else rng.integers(0, 32, 4) for i in rng.integers(0, size - 4, 6)])
    asked = np.concatenate([np.append(c, w) for c in contexts for w in range(32)])
    p = ngram_probs(train, asked, 32, order).reshape(6, 32, 5)[:, :, -1]
    assert p.min() > 0 and p.sum(1) == pytest.approx(np.ones(6), abs=1e-10)


def test_discounts_stay_in_bounds():
    rng = np.random.default_rng(0)
    for a in (1.2, 1.5, 2, 3, 5):
        D = discount_table(rng.zipf(a, 5000))
        assert D[0] == 0 and all(0 <= d <= i for i, d in enumerate(D))
    assert discount_table(np.array([7, 7, 7]))[3] <= 3


def test_longer_context_helps_and_copies_are_learnt():
    rng = np.random.default_rng(0)
    follow = rng.integers(0, 50, (50, 50, 2))  # the next token depends on the last two
    text = [0, 1]
    for _ in range(60_000): text.append(int(follow[text[-2], text[-1], rng.integers(2)]))
    one = torch.ones(50, dtype=torch.int64)
    bits = [ngram_bpb(text[:50_000], text[50_000:], one, order=n) for n in (1, 2, 3, 5)]
    assert bits[0] > bits[1] > bits[2] and bits[2] < 1.35  # truth: one bit
    assert bits[3] < bits[2] + .1


def test_units_and_inputs():
    rng = np.random.default_rng(1)
    train, val = rng.integers(0, 8, 500), rng.integers(0, 9, 100)
    sizes = np.array([1, 2, 3, 4, 5, 6, 7, 8, 0])
    p = ngram_probs(train, val, 9)
    want = -np.log2(p[val < 8]).sum() / sizes[val].sum()
    for make in (np.asarray, torch.as_tensor, list, lambda a: iter(a.tolist())):
        assert ngram_bpb(make(train), make(val), torch.as_tensor(sizes)) == pytest.approx(want, rel=1e-12)
    assert ngram_bpb(train, [8, 8], sizes) == math.inf
    with pytest.raises(ValueError, match='0..8'): ngram_bpb(train, [9], sizes)
    with pytest.raises(ValueError, match='too few'): ngram_bpb([1, 2], [1], sizes)


def test_nothing_learnt_is_the_size_of_the_alphabet():
    rng = np.random.default_rng(2)
    got = ngram_bpb(rng.integers(0, 256, 200_000), rng.integers(0, 256, 20_000), np.ones(256, int), order=5)
    assert 8 < got < 8.3


def test_work_grows_with_sorting_not_with_the_square():
    """Counted, not timed: sorts per order, each over at most the training text."""
    import nanochat.loss_eval as L
    seen, original = [], np.argsort
    class Counting:
        def __getattr__(self, name): return getattr(np, name)
        def argsort(self, a): seen.append(len(a)); return original(a)
    rng = np.random.default_rng(3)
    train, saved = rng.integers(0, 100, 20_000), L.np
    L.np = Counting()
    try: L.ngram_probs(train, train[:1000], 100, 5)
    finally: L.np = saved
    assert len(seen) == 5 and max(seen) <= len(train)
