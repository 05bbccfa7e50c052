"""Tests of assignment 5, cache and sampling: against PyTorch, plain loops, and a model on this side that counts how it is called."""
import math

import pytest
import torch
import torch.nn.functional as F

TITLE = 'A key-value cache and sampling'
EXERCISES = {1: 'Temperature', 2: 'The best k, the best p', 3: 'Attention with a cache', 4: 'Write'}


def normal(rng, *shape):
    """Normal numbers that depend on the seed of the grading."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(rng.randrange(2**40)))


def close(a, b, tolerance=1e-5):
    """Whether two tensors have one shape and nearly equal values; infinities must be equal."""
    if not isinstance(a, torch.Tensor): raise AssertionError(f'a tensor was expected, not {type(a).__name__}')
    if a.shape != b.shape: raise AssertionError(f'the shape is {tuple(a.shape)}, not {tuple(b.shape)}')
    if not torch.allclose(a.double(), b.double(), rtol=0, atol=tolerance): raise AssertionError(f'{[round(x, 4) for x in a.flatten().tolist()[:8]]} instead of {[round(x, 4) for x in b.flatten().tolist()[:8]]}')
    return True


def nucleus(row, p):
    """The reference for top-p: tokens one by one, best first, until p is reached."""
    kept, total = [0.0] * len(row), 0.0
    for i in sorted(range(len(row)), key=lambda i: -row[i]):
        if total >= p: break
        kept[i], total = row[i], total + row[i]
    return [x / total for x in kept]


# 1. Temperature
@pytest.mark.points(2, exercise=1)
def test_temperature(student, rng):
    "Divide the logits by the temperature, before the softmax: a low one makes the odds sharper. Odds are over the vocabulary, the last dimension."
    x = 2 * normal(rng, 3, 5)
    for t in (0.3, 1.0, 2.5): assert close(student.odds(x, t), (x / t).softmax(-1))


@pytest.mark.points(1, exercise=1)
def test_temperature_zero(student):
    "Temperature 0 means the best token, with probability 1: no division, and no nan."
    assert close(student.odds(torch.tensor([[1.0, 3.0, 2.0], [5.0, -1.0, 4.9]]), 0), torch.tensor([[0.0, 1, 0], [1, 0, 0]]))


@pytest.mark.points(1, exercise=1)
def test_ruled_out_and_large(student):
    "exp(1000) is infinite: subtract the largest logit first, as torch.softmax does. A logit of minus infinity has the odds 0."
    assert close(student.odds(torch.tensor([[1000.0, 999.0, -math.inf]])), torch.tensor([[1 / (1 + math.exp(-1)), 1 / (1 + math.e), 0]]))


# 2. The best k, the best p
@pytest.mark.points(1, exercise=2)
def test_top_k(student, rng):
    "The others get minus infinity, not 0: a logit of 0 still has odds."
    x = normal(rng, 1, 9)
    assert close(student.top_k(x, 3), x.masked_fill(x < x[0].sort(descending=True).values[2], -math.inf))


@pytest.mark.points(1, exercise=2)
def test_top_k_rows(student, rng):
    "Each row has its own k best: the edge is found row by row."
    x = torch.tensor([[1.0, 2, 3], [30, 20, 10]])
    assert close(student.top_k(x, 1), torch.tensor([[-math.inf, -math.inf, 3], [30, -math.inf, -math.inf]]))


@pytest.mark.points(1, exercise=2)
def test_top_k_beyond(student, rng):
    "A k larger than the vocabulary keeps every token; torch.topk refuses it."
    x = normal(rng, 2, 4)
    assert close(student.top_k(x, 50), x)


@pytest.mark.points(2, exercise=2)
def test_top_p(student, rng):
    "The token that crosses the line belongs to the set, so that at least one stays: compare p with what the better tokens have together, without this one."
    assert close(student.top_p(torch.tensor([[0.5, 0.3, 0.2]]), 0.6), torch.tensor([[0.625, 0.375, 0]]))
    assert close(student.top_p(torch.tensor([[0.5, 0.3, 0.2]]), 0.4), torch.tensor([[1.0, 0, 0]]))
    x = (2 * normal(rng, 3, 8)).softmax(-1)
    kept = student.top_p(x, 0.8)
    assert close((kept > 0).sum(-1), torch.tensor([sum(v > 0 for v in nucleus(row, 0.8)) for row in x.tolist()]))


@pytest.mark.points(1, exercise=2)
def test_top_p_places(student, rng):
    "Sorted for the sum, and then back: every token keeps its place, and the odds that are left add up to 1."
    x = torch.tensor([[0.1, 0.2, 0.45, 0.25], [0.7, 0.05, 0.05, 0.2]])
    assert close(student.top_p(x, 0.6), torch.tensor([nucleus(row, 0.6) for row in x.tolist()])) and close(student.top_p(x, 1.0), x)


# 3. Attention with a cache
def full(q, k, v): return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def in_pieces(student, q, k, v, sizes):
    """Results piece by piece, and the last cache."""
    parts, cache, at = [], None, 0
    for n in sizes:
        y, cache = student.cached_attention(*(t[:, :, at:at + n] for t in (q, k, v)), cache)
        parts, at = parts + [y], at + n
    return torch.cat(parts, dim=2), cache


@pytest.mark.points(2, exercise=3)
def test_whole(student, rng):
    "Without a cache this is plain causal attention: scores over the root of D, and no query sees a later key."
    q, k, v = (normal(rng, 2, 3, 5, 4) for _ in range(3))
    assert close(student.cached_attention(q, k, v)[0], full(q, k, v))


@pytest.mark.points(1, exercise=3)
def test_token_by_token(student, rng):
    "A single new token sees everything in the cache and itself; a mask made for T = 1 would show it the first key only."
    q, k, v = (normal(rng, 1, 2, 6, 4) for _ in range(3))
    assert close(in_pieces(student, q, k, v, [1] * 6)[0], full(q, k, v))


@pytest.mark.points(2, exercise=3)
def test_in_pieces(student, rng):
    "Several new tokens after old ones: the causal mask is shifted by the number of old ones, so that new query i sees keys up to n + i."
    q, k, v = (normal(rng, 1, 2, 9, 4) for _ in range(3))
    for sizes in ([4, 5], [2, 1, 3, 3]): assert close(in_pieces(student, q, k, v, sizes)[0], full(q, k, v))


@pytest.mark.points(1, exercise=3)
def test_cache_and_cost(student, rng):
    "The cache holds keys and values of all tokens so far, old ones first; and one new token needs scores for one query, not for the whole text again."
    q, k, v = (normal(rng, 1, 2, 33, 8) for _ in range(3))
    cache = (k[:, :, :32], v[:, :, :32])
    reply = student.request('cached_attention', q[:, :, 32:], k[:, :, 32:], v[:, :, 32:], cache)
    assert close(reply.value[1][0], k) and close(reply.value[1][1], v) and reply.flops <= 2 * 2 * 2 * 33 * 8, f'{reply.flops} operations'


# 4. Write
class Model:
    """Next token: a fixed function of all tokens so far; counts what it reads."""
    def __init__(self): self.read = []

    def __call__(self, tokens, cache):
        self.read.append(list(tokens))
        text = (cache or []) + list(tokens)
        return F.one_hot(torch.tensor(self.next(text)), 50).float(), text

    @staticmethod
    def next(text): return (7 * sum((i + 1) * t for i, t in enumerate(text)) + len(text)) % 50


def best(logits): return int(logits.argmax())


def continued(prompt, n, end):
    """The reference: everything read again for each token."""
    text, answer = list(prompt), []
    for _ in range(n):
        if (token := Model.next(text)) == end: break
        text, answer = text + [token], answer + [token]
    return answer


@pytest.mark.points(2, exercise=4)
def test_write(student, rng):
    "What is picked has to be read before the next is picked, after the cache that the last call returned: the old cache, or none, forgets the text."
    prompt = [rng.randrange(50) for _ in range(4)]
    assert student.write(Model(), prompt, 8, best, -1) == continued(prompt, 8, -1)


@pytest.mark.points(1, exercise=4)
def test_write_stops(student):
    "The end token ends the answer and is not part of it; nothing is read or picked afterwards."
    prompt = [3, 1, 4]
    end = continued(prompt, 5, -1)[3]
    model = Model()
    assert student.write(model, prompt, 9, best, end) == continued(prompt, 9, end) and len(model.read) == len(continued(prompt, 9, end)) + 1


@pytest.mark.points(1, exercise=4)
def test_write_calls(student):
    "n tokens need n calls: one for the prompt, then one for each token but the last, which nobody needs to read."
    model = Model()
    assert student.write(model, [5, 6, 7], 6, best, -1) == continued([5, 6, 7], 6, -1)
    assert len(model.read) == 6, f'{len(model.read)} calls for 6 tokens'
    assert student.write(other := Model(), [5], 0, best, -1) == [] and len(other.read) <= 1


@pytest.mark.points(1, exercise=4)
def test_write_reads_once(student):
    "With a cache every token is read once: the prompt in one call, then one new token at a time."
    model = Model()
    student.write(model, [5, 6, 7], 6, best, -1)
    assert [len(tokens) for tokens in model.read[:6]] == [3, 1, 1, 1, 1, 1], f'tokens read per call: {[len(t) for t in model.read]}'
