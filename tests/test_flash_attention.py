"""Attention against a brute-force double loop, windows and caches included; and the cost of windows, counted."""
import itertools

import pytest
import torch
import torch.nn.functional as F

from nanochat import flash_attention as fa
from nanochat.common import UserError
from nanochat.flash_attention import flash_attn


def brute(q, k, v, causal, window):
    """One query at a time, in float64; the last query is aligned with the last key; a query that sees nothing gives zeros."""
    Tq, Tk, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    out = torch.zeros_like(q, dtype=torch.float64)
    for b, i, h in itertools.product(range(q.shape[0]), range(Tq), range(q.shape[2])):
        pos = i + Tk - Tq
        last = pos if causal else Tk - 1 if window[1] < 0 else pos + window[1]
        first = 0 if window[0] < 0 else pos - window[0]
        see = slice(max(0, first), max(0, last + 1))
        keys, values = k[b, see, h // group].double(), v[b, see, h // group].double()
        if len(keys): out[b, i, h] = (keys @ q[b, i, h].double() / q.shape[-1]**0.5).softmax(0) @ values
    return out


def random(*shapes, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g) for s in shapes]


WINDOWS = [(-1, -1), (0, 0), (3, 0), (7, 5), (-1, 4), (5, -1), (100, 100), (0, 2), (16, 0), (63, 0)]


@pytest.mark.parametrize('causal', [True, False])
@pytest.mark.parametrize('window', WINDOWS)
@pytest.mark.parametrize('Tq, Tk', [(1, 1), (37, 37), (5, 40), (40, 9), (1, 33)])
def test_against_brute_force(causal, window, Tq, Tk):
    q, k, v = random((2, Tq, 4, 8), (2, Tk, 2, 8), (2, Tk, 2, 8))
    y = flash_attn.flash_attn_func(q, k, v, causal=causal, window_size=window)
    torch.testing.assert_close(y.double(), brute(q, k, v, causal, window), atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize('T, window', [(200, 64), (300, 128), (257, 100), (128, 128), (129, 128), (512, 128)])
def test_long_windows_and_gradients(T, window):
    """Rows of several blocks: value and gradients against a dense mask."""
    q, k, v = (t.requires_grad_() for t in random((2, T, 2, 16), (2, T, 1, 16), (2, T, 1, 16)))
    up, = random((2, T, 2, 16), seed=1)
    i = torch.arange(T)
    mask = (i[:, None] >= i) & (i[:, None] - i <= window)
    dense = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2))), attn_mask=mask).transpose(1, 2)
    ours = flash_attn.flash_attn_func(q, k, v, causal=True, window_size=(window, 0))
    torch.testing.assert_close(ours, dense, atol=1e-5, rtol=1e-5)
    for a, b in zip(torch.autograd.grad((ours * up).sum(), (q, k, v)), torch.autograd.grad((dense * up).sum(), (q, k, v))):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_bf16_is_close_to_fp32():
    q, k, v = random((1, 256, 2, 64), (1, 256, 2, 64), (1, 256, 2, 64))
    y = flash_attn.flash_attn_func(*(t.bfloat16() for t in (q, k, v)), causal=True, window_size=(64, 0))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), flash_attn.flash_attn_func(q, k, v, causal=True, window_size=(64, 0)), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize('backend', ['sdpa', 'blocked'])
def test_work_falls_with_the_window(monkeypatch, backend):
    """Query-key pairs that reach a kernel, counted; no mask is T x T."""
    pairs, masks = [], []
    sdpa, product = F.scaled_dot_product_attention, torch.baddbmm

    def counting_sdpa(q, k, v, attn_mask=None, **kw):
        pairs.append(q.shape[-2] * k.shape[-2])
        if attn_mask is not None: masks.append(attn_mask.numel())
        return sdpa(q, k, v, attn_mask=attn_mask, **kw)

    def counting_product(bias, q, k, **kw):
        pairs.append(q.shape[-2] * k.shape[-1])
        masks.append(bias.numel())
        return product(bias, q, k, **kw)

    monkeypatch.setattr(F, 'scaled_dot_product_attention', counting_sdpa)
    monkeypatch.setattr(torch, 'baddbmm', counting_product)
    T, count = 2048, {}
    for window in (128, 512):
        pairs.clear()
        q, k, v = random((1, T, 1, 8), (1, T, 1, 8), (1, T, 1, 8))
        with torch.no_grad(): fa.get_backend(torch.device('cpu'), backend).attention(q, k, v, causal=True, window_size=(window, 0))
        count[window] = sum(pairs)
    assert T * 128 < count[128] <= 0.14 * T * T and T * 512 < count[512] <= 0.5 * T * T
    assert 0 < max(masks) <= 512 * 1024


@pytest.mark.parametrize('backend', ['sdpa', 'blocked'])
def test_no_tensor_grows_with_the_square_of_the_row(backend):
    """Forward and backward of a windowed layer, every tensor that PyTorch makes."""
    from torch.utils._python_dispatch import TorchDispatchMode
    largest = {}

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, torch.Tensor): largest[T] = max(largest.get(T, 0), t.numel())
            return out

    for T in (1024, 2048):
        q, k, v = (t.requires_grad_() for t in random((1, T, 1, 8), (1, T, 1, 8), (1, T, 1, 8)))
        with Largest(): fa.get_backend(torch.device('cpu'), backend).attention(q, k, v, causal=True, window_size=(128, 0)).sum().backward()
    assert largest[2048] <= 2 * largest[1024] and largest[2048] < 2048 * 2048 / 16


@pytest.mark.parametrize('causal, window', [(True, (-1, -1)), (True, (100, 0)), (False, (70, 30)), (False, (-1, -1))])
@pytest.mark.parametrize('keep', [0, 2**24])
def test_blocked_gradients(monkeypatch, causal, window, keep):
    """The hand-written backward pass with weights kept and computed again, against autograd through the dense form."""
    monkeypatch.setattr(fa, 'KEEP_SCORES', keep)
    T = 300
    q, k, v = (t.requires_grad_() for t in random((2, T, 4, 16), (2, T, 2, 16), (2, T, 2, 16)))
    up, = random((2, T, 4, 16), seed=1)
    mask = fa.window_mask(torch.arange(T), torch.arange(T), *fa.window_limits(causal, window))
    scores = torch.einsum('bqhd,bkhd->bhqk', q, k.repeat_interleave(2, 2)) / 4
    dense = torch.einsum('bhqk,bkhd->bqhd', scores.masked_fill(~mask, -torch.inf).softmax(-1), v.repeat_interleave(2, 2))
    ours = fa.blocked_attention(q, k, v, causal=causal, window_size=window)
    torch.testing.assert_close(ours, dense, atol=1e-5, rtol=1e-5)
    for a, b in zip(torch.autograd.grad((ours * up).sum(), (q, k, v)), torch.autograd.grad((dense * up).sum(), (q, k, v))):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize('name', ['sdpa', 'blocked'])
def test_a_backend_can_be_named(monkeypatch, name):
    monkeypatch.setenv('NANOCHAT_ATTENTION', name)
    assert fa.get_backend(torch.device('cpu')).name == name
    q, k, v = random((1, 150, 2, 8), (1, 150, 2, 8), (1, 150, 2, 8))
    torch.testing.assert_close(flash_attn.flash_attn_func(q, k, v, causal=True, window_size=(20, 0)).double(), brute(q, k, v, True, (20, 0)), atol=3e-6, rtol=1e-5)


def test_rows_do_not_influence_each_other():
    q, k, v = random((2, 30, 2, 8), (2, 30, 2, 8), (2, 30, 2, 8))
    y = flash_attn.flash_attn_func(q, k, v, causal=True, window_size=(4, 0))
    k[1], v[1] = 9, -9
    assert torch.equal(y[0], flash_attn.flash_attn_func(q, k, v, causal=True, window_size=(4, 0))[0])


@pytest.mark.parametrize('window', [(-1, -1), (5, 0), (0, 0), (20, 0)])
@pytest.mark.parametrize('starts', [[0, 0], [7, 7], [0, 9], [13, 2]])
@pytest.mark.parametrize('T', [1, 6])
def test_cache_per_row(window, starts, T):
    """Rows at their own positions, GQA, pieces of any length, garbage beyond the end: the same as uncached."""
    q, k, v = random((2, 40, 4, 8), (2, 40, 2, 8), (2, 40, 2, 8))
    kc, vc = torch.full((2, 24, 2, 8), 1e4), torch.full((2, 24, 2, 8), 1e4)
    for b, n in enumerate(starts): kc[b, :n], vc[b, :n] = k[b, :n], v[b, :n]
    lens = torch.tensor(starts, dtype=torch.int32)
    new = [torch.stack([t[b, n:n + T] for b, n in enumerate(starts)]) for t in (q, k, v)]
    y = flash_attn.flash_attn_with_kvcache(new[0], kc, vc, k=new[1], v=new[2], cache_seqlens=lens, causal=True, window_size=window)
    for b, n in enumerate(starts):
        expected = brute(q[b:b + 1, :n + T], k[b:b + 1, :n + T], v[b:b + 1, :n + T], True, window)[0, n:]
        torch.testing.assert_close(y[b].double(), expected, atol=3e-6, rtol=1e-5)
        assert torch.equal(kc[b, n:n + T], k[b, n:n + T]) and (kc[b, n + T:] == 1e4).all()
    assert lens.tolist() == starts, 'the cache owner advances, not attention'


def test_cache_without_causality_sees_what_was_written_and_no_more():
    q, k, v = random((2, 3, 2, 8), (2, 12, 2, 8), (2, 12, 2, 8))
    kc, vc = torch.full((2, 12, 2, 8), 1e4), torch.full((2, 12, 2, 8), 1e4)
    for b, n in enumerate((2, 6)): kc[b, :n], vc[b, :n] = k[b, :n], v[b, :n]
    lens = torch.tensor([2, 6], dtype=torch.int32)
    take = lambda t: torch.stack([t[b, n:n + 3] for b, n in enumerate((2, 6))])
    y = flash_attn.flash_attn_with_kvcache(q, kc, vc, k=take(k), v=take(v), cache_seqlens=lens)
    for b, n in enumerate((2, 6)):
        torch.testing.assert_close(y[b:b + 1].double(), brute(q[b:b + 1], k[b:b + 1, :n + 3], v[b:b + 1, :n + 3], False, (-1, -1)), atol=3e-6, rtol=1e-5)


def test_the_last_slot_fits_and_one_more_does_not():
    q, = random((1, 1, 2, 8))
    kc, vc = torch.zeros(1, 4, 2, 8), torch.zeros(1, 4, 2, 8)
    flash_attn.flash_attn_with_kvcache(q, kc, vc, k=q, v=q, cache_seqlens=torch.tensor([3]), causal=True)
    with pytest.raises(ValueError, match='do not fit'):
        flash_attn.flash_attn_with_kvcache(q, kc, vc, k=q, v=q, cache_seqlens=torch.tensor([4]), causal=True)


def test_unknown_backend_is_a_sentence(monkeypatch):
    monkeypatch.setenv('NANOCHAT_ATTENTION', 'fa9')
    with pytest.raises(UserError, match="'fa9' cannot run on cpu; use one of: .*sdpa"): fa.get_backend(torch.device('cpu'))
