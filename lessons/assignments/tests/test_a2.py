"""Tests of assignment 2, attention and the block: against PyTorch's own functions, complex numbers and a loop over positions."""
import pytest
import torch
import torch.nn.functional as F

TITLE = 'Attention and the block'
EXERCISES = {1: 'RMS norm', 2: 'Rotary positions', 3: 'Causal attention with a window', 4: 'Grouped heads', 5: 'The block'}


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


def turned(x, positions, base=10_000.0):
    """The reference for rotary: each plane a complex number, multiplied by exp(-i angle)."""
    D = x.shape[-1]
    z = torch.complex(x[..., :D // 2].double(), x[..., D // 2:].double())
    angle = positions[:, None].double() * base ** (-torch.arange(0, D, 2).double() / D)
    z = z * torch.polar(torch.ones_like(angle), -angle)[None, :, None]
    return torch.cat([z.real, z.imag], dim=-1).float()


def either_way(got, x, positions, base=10_000.0):
    """Whether `got` is x turned, forwards or backwards: the direction has a test of its own."""
    try: return close(got, turned(x, -positions, base))
    except AssertionError: return close(got, turned(x, positions, base))


def attended(q, k, v, window=-1):
    """The reference for attention: PyTorch's, with an explicit mask; heads of keys repeated by PyTorch."""
    T = q.shape[1]
    seen = torch.tensor([[j <= i and (window < 0 or i - j <= window) for j in range(T)] for i in range(T)])
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True).transpose(1, 2)


# 1. RMS norm
@pytest.mark.points(1, exercise=1)
def test_norm_of_vectors(student, rng):
    "The mean of the squares is taken, not their sum: the result has mean square 1, and length sqrt(C)."
    x = 5 * normal(rng, 3, 8)
    assert close(student.rms_norm(x), F.rms_norm(x, (8,), eps=1e-6))


@pytest.mark.points(1, exercise=1)
def test_norm_keeps_the_mean(student, rng):
    "RMS norm subtracts nothing: that would be layer norm. And each position is normed alone, over the last dimension only."
    x = 3 + normal(rng, 2, 3, 4)
    assert close(student.rms_norm(x), F.rms_norm(x, (4,), eps=1e-6))


@pytest.mark.points(1, exercise=1)
def test_norm_of_zero(student):
    "Is your epsilon inside the square root? Outside of it, or missing, a small vector comes out far too large, or as nan."
    x = torch.tensor([[0.0, 0.0], [1e-3, -1e-3]])
    assert close(student.rms_norm(x), F.rms_norm(x, (2,), eps=1e-6))


# 2. Rotary positions
@pytest.mark.points(2, exercise=2)
def test_rotary(student, rng):
    "Which channels make a plane? Here i goes with i + D/2, not with its neighbour i + 1."
    x, positions = normal(rng, 2, 5, 3, 8), torch.arange(5)
    assert either_way(student.rotary(x, positions), x, positions)


@pytest.mark.points(1, exercise=2)
def test_rotary_direction(student, rng):
    "The first half gains + sin, the second loses: with the signs exchanged everything turns the other way round."
    x = normal(rng, 1, 4, 1, 2)
    assert close(student.rotary(x, torch.arange(4)), turned(x, torch.arange(4)))


@pytest.mark.points(1, exercise=2)
def test_rotary_positions(student, rng):
    "Use the positions you are given; they need not start at 0, as when a model goes on writing."
    x, positions = normal(rng, 1, 3, 2, 6), torch.tensor([7, 8, 20])
    assert either_way(student.rotary(x, positions), x, positions)


@pytest.mark.points(1, exercise=2)
def test_rotary_base(student, rng):
    "Plane i turns by base ** (-2i / D): the exponent runs from 0 to almost 1 over D/2 planes, and base is an argument."
    x, positions = normal(rng, 1, 4, 1, 12), torch.arange(4) * 3
    assert either_way(student.rotary(x, positions, 100.0), x, positions, 100.0)


# 3. Causal attention with a window
@pytest.mark.points(2, exercise=3)
def test_attention(student, rng):
    "Divide by the root of D, the channels of a head; and let softmax run over the keys, the last dimension of the scores."
    q, k, v = (3 * normal(rng, 2, 6, 3, 4) for _ in range(3))
    assert close(student.attention(q, k, v), attended(q, k, v))


@pytest.mark.points(1, exercise=3)
def test_attention_is_causal(student, rng):
    "The future leaks: a change of the last key and value must not change earlier results. Is the mask put on before the softmax, and the right way round?"
    q, k, v = (normal(rng, 1, 5, 1, 4) for _ in range(3))
    before = student.attention(q, k, v)
    k[:, -1], v[:, -1] = 9, 9
    assert close(student.attention(q, k, v)[:, :-1], before[:, :-1])


@pytest.mark.points(2, exercise=3)
def test_window(student, rng):
    "A window of w shows the query itself and w keys before it: w + 1 in all, and fewer only at the beginning."
    q, k, v = (normal(rng, 1, 7, 2, 4) for _ in range(3))
    for window in (0, 1, 3, 100): assert close(student.attention(q, k, v, window), attended(q, k, v, window))


@pytest.mark.points(1, exercise=3)
def test_two_products_per_head(student, rng):
    "All heads and positions go through the same two matrix products: scores, then values. A loop over them makes many small ones."
    q, k, v = (normal(rng, 2, 8, 4, 4) for _ in range(3))
    reply = student.request('attention', q, k, v)
    assert close(reply.value, attended(q, k, v)) and reply.products <= 2, f'{reply.products} matrix products'


# 4. Grouped heads
@pytest.mark.points(2, exercise=4)
def test_neighbours_share(student, rng):
    "Neighbouring query heads share a key head: 0 0 0 1 1 1. `repeat` gives 0 1 0 1 0 1; `repeat_interleave` gives what is needed."
    q, k, v = normal(rng, 1, 5, 6, 4), normal(rng, 1, 5, 2, 4), normal(rng, 1, 5, 2, 4)
    assert close(student.grouped_attention(q, k, v), attended(q, k, v))


@pytest.mark.points(1, exercise=4)
def test_one_head_for_all(student, rng):
    "The number of copies is H / H_kv, whatever they are: one for all, one for each, and all between."
    for heads in (1, 4):
        q, k, v = normal(rng, 2, 3, 4, 2), normal(rng, 2, 3, heads, 2), normal(rng, 2, 3, heads, 2)
        assert close(student.grouped_attention(q, k, v), attended(q, k, v))


@pytest.mark.points(1, exercise=4)
def test_grouped_window(student, rng):
    "The window is lost on the way: pass it on to attention."
    q, k, v = normal(rng, 1, 6, 4, 2), normal(rng, 1, 6, 2, 2), normal(rng, 1, 6, 2, 2)
    assert close(student.grouped_attention(q, k, v, 2), attended(q, k, v, 2))


# 5. The block
def weights(rng, C=12, D=4, H=3, KV=1):
    """Random weights of a block."""
    shapes = dict(q=(H * D, C), k=(KV * D, C), v=(KV * D, C), proj=(C, H * D), fc=(4 * C, C), out=(C, 4 * C))
    return {name: normal(rng, *shape) * shape[1] ** -0.5 for name, shape in shapes.items()}


def blocked(x, w, D, window=-1):
    """The reference for block, from the references above and PyTorch's norm."""
    norm = lambda t: F.rms_norm(t, (t.shape[-1],), eps=1e-6)
    (B, T, C), positions = x.shape, torch.arange(x.shape[1])
    q, k, v = (F.linear(norm(x), w[n]).unflatten(-1, (-1, D)) for n in 'qkv')
    x = x + F.linear(attended(norm(turned(q, positions)), norm(turned(k, positions)), v, window).flatten(2), w['proj'])
    return x + F.linear(F.relu(F.linear(norm(x), w['fc'])) ** 2, w['out'])


@pytest.mark.points(1, exercise=5)
def test_mlp(student, rng):
    "Square after the ReLU: squaring first would make every number positive and leave the ReLU without work."
    x, w = normal(rng, 2, 3, 12), weights(rng)
    assert close(student.mlp(x, w['fc'], w['out']), F.linear(F.relu(F.linear(x, w['fc'])) ** 2, w['out']))


@pytest.mark.points(2, exercise=5)
def test_block(student, rng):
    "Both halves read a normed copy and add to the stream itself: x + f(norm(x)), twice, the second on the result of the first."
    x, w = 4 * normal(rng, 2, 5, 12), {k: v for k, v in weights(rng).items()}
    w['q'], w['k'] = torch.zeros_like(w['q']), torch.zeros_like(w['k'])                 # all keys alike: only norms and sums matter here
    assert close(student.block(x, w, 4), blocked(x, w, 4), 1e-3)


@pytest.mark.points(1, exercise=5)
def test_block_queries_and_keys(student, rng):
    "Queries and keys are turned and then normed, head by head; values are neither turned nor normed."
    x, w = normal(rng, 2, 6, 12), weights(rng)
    assert close(student.block(x, w, 4), blocked(x, w, 4), 1e-3)


@pytest.mark.points(1, exercise=5)
def test_block_window(student, rng):
    "The window of the block is lost on the way to its attention."
    x, w = normal(rng, 1, 6, 12), weights(rng)
    assert close(student.block(x, w, 4, 1), blocked(x, w, 4, 1), 1e-3)
