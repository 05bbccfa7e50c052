"""Attention against a brute-force double loop, windows and caches included; the cost of windows, counted; kernels of GPUs by stand-ins, and their probe."""
import contextlib, functools, importlib, itertools, os, re, shutil, subprocess, sys, warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from nanochat import flash_attention as fa
from nanochat.common import UserError
from nanochat.flash_attention import flash_attn

ROOT = Path(__file__).resolve().parents[1]

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


# --- every backend, kernels of GPUs by stand-ins -----------------------------------------------------------------------
# A stand-in does what FlashAttention's documentation says, in plain fp32, and is strict about what it is told.

CPU = torch.device('cpu')


def documented(q, k, v, causal, left, right, lens=None):
    """FlashAttention in plain arithmetic: keys of row b end at lens[b]; the last query is aligned with the last key; None or a negative limit is none."""
    assert q.dim() == 4 and k.shape == v.shape and q.shape[2] % k.shape[2] == 0 and isinstance(causal, bool), 'layout is (B, T, H, D)'
    Tq, Tk, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    lens = torch.full((len(q),), Tk) if lens is None else lens
    j, i = torch.arange(Tk), torch.arange(Tq)[:, None] + (lens[:, None, None].long() - Tq)
    seen = (j < lens[:, None, None]).expand(-1, Tq, -1)
    if causal: seen = seen & (j <= i)
    if left is not None and left >= 0: seen = seen & (j >= i - left)
    if right is not None and right >= 0: seen = seen & (j <= i + right)
    k, v = (t.float().repeat_interleave(group, 2) for t in (k, v))
    weights = (torch.einsum('bqhd,bkhd->bhqk', q.float(), k) / q.shape[-1]**0.5).masked_fill(~seen[:, None], -torch.inf).softmax(-1).nan_to_num(0)
    return torch.einsum('bhqk,bkhd->bqhd', weights, v).to(q.dtype)


def stand_in(unlimited=-1, returns=lambda y: y, said=None):
    def check(window):
        assert all(n is None if unlimited is None and n is None else isinstance(n, int) and (n >= 0 or n == unlimited) for n in window), window

    def flash_attn_func(q, k, v, *, causal=False, window_size=(unlimited, unlimited)):
        check(window_size)
        if said is not None: said.append((causal, window_size))
        return returns(documented(q, k, v, causal, *window_size))

    def flash_attn_with_kvcache(q, k_cache, v_cache, k=None, v=None, *, cache_seqlens=None, causal=False, window_size=(unlimited, unlimited)):
        check(window_size)
        assert k_cache.dtype == q.dtype and (isinstance(cache_seqlens, int) or cache_seqlens.dtype == torch.int32)
        lens = torch.full((len(q),), cache_seqlens, dtype=torch.int32) if isinstance(cache_seqlens, int) else cache_seqlens.clone()
        for cache, new in ((k_cache, k), (v_cache, v)):
            if new is not None:
                for b, n in enumerate(lens.tolist()): cache[b, n:n + new.shape[1]] = new[b]
        if k is not None: lens += k.shape[1]
        return returns(documented(q, k_cache, v_cache, causal, *window_size, lens=lens))

    return SimpleNamespace(flash_attn_func=flash_attn_func, flash_attn_with_kvcache=flash_attn_with_kvcache)


@contextlib.contextmanager
def aten_on_cpu():
    """PyTorch's own operation with a CPU implementation: its schema, its dispatcher and its autograd are the real ones."""
    def forward(q, k, v, cum_q, cum_k, max_q, max_k, dropout, is_causal, debug, *, scale=None, window_size_left=None, window_size_right=None, **rest):
        assert cum_q is None and cum_k is None and dropout == 0 and not debug and scale is None and (max_q, max_k) == (q.shape[1], k.shape[1])
        assert all(t.stride(-1) == 1 for t in (q, k, v))
        empty = torch.empty(0)
        return documented(q, k, v, is_causal, window_size_left, window_size_right), q.new_zeros(len(q), q.shape[2], q.shape[1], dtype=torch.float32), empty, empty.clone(), empty.clone()

    def backward(grad, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, dropout, is_causal, seed, unused, *, scale=None, window_size_left=None, window_size_right=None):
        def gradients():
            inputs = [t.detach().requires_grad_() for t in (q, k, v)]
            return torch.autograd.grad(documented(*inputs, is_causal, window_size_left, window_size_right), inputs, grad)
        with ThreadPoolExecutor(1) as pool: return pool.submit(gradients).result()  # here, below autograd, nothing would be recorded

    with torch.library._scoped_library('aten', 'IMPL') as library:
        library.impl('_flash_attention_forward', forward, 'CPU')
        library.impl('_flash_attention_backward', backward, 'CPU')
        yield


NAMES = ['blocked', 'fa3', 'fa4', 'fa2', 'torch-fa2', 'flex', 'sdpa']


@pytest.fixture
def backend(request, monkeypatch):
    """A backend by name, with stand-ins where this machine has no kernel."""
    monkeypatch.setattr(fa, 'KERNELS', {'fa2': stand_in(), 'fa3': stand_in(returns=lambda y: (y, 'lse')), 'fa4': stand_in(None, lambda y: (y, None))})
    with warnings.catch_warnings(), aten_on_cpu() if request.param == 'torch-fa2' else contextlib.nullcontext():
        warnings.filterwarnings('ignore', message='flex_attention called without torch.compile')
        yield next(b for b in fa.BACKENDS if b.name == request.param)


def test_these_are_all_backends(): assert [b.name for b in fa.BACKENDS] == NAMES


@functools.cache
def case(Tq, Tk, causal, window):
    q, k, v = random((2, Tq, 4, 16), (2, Tk, 2, 16), (2, Tk, 2, 16))
    return q, k, v, brute(q, k, v, causal, window)


@pytest.mark.parametrize('backend', NAMES, indirect=True)
@pytest.mark.parametrize('Tq, Tk', [(37, 37), (1, 33), (5, 40), (40, 9)])
def test_every_backend_against_brute_force(backend, Tq, Tk):
    for causal, window in itertools.product((True, False), WINDOWS):
        q, k, v, expected = case(Tq, Tk, causal, window)
        y = backend.attention(q, k, v, causal=causal, window_size=window)
        torch.testing.assert_close(y.double(), expected, atol=3e-6, rtol=1e-5, msg=lambda m: f'causal={causal} window={window}: {m}')


@pytest.mark.parametrize('backend', [n for n in NAMES if n != 'flex'], indirect=True)
def test_every_backend_passes_gradients(backend):
    """PyTorch's operation included: its real autograd must hand the window to the backward pass. (FlexAttention has no backward pass on CPUs.)"""
    q, k, v = (t.requires_grad_() for t in random((2, 90, 4, 16), (2, 90, 2, 16), (2, 90, 2, 16)))
    up, = random((2, 90, 4, 16), seed=1)
    for window in ((-1, 0), (20, 0), (20, 7)):
        exact, ours = documented(q, k, v, False, *window), backend.attention(q, k, v, window_size=window)
        for a, b in zip(torch.autograd.grad((ours * up).sum(), (q, k, v)), torch.autograd.grad((exact * up).sum(), (q, k, v))):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize('backend', NAMES, indirect=True)
@pytest.mark.parametrize('T', [1, 6])
def test_every_backend_with_a_cache(backend, T):
    q, k, v = random((3, 40, 4, 8), (3, 40, 2, 8), (3, 40, 2, 8))
    for window, lens in itertools.product([(-1, -1), (5, 0), (20, 0)], ([0, 9, 18], [7, 7, 7])):
        kc, vc = torch.full((3, 24, 2, 8), 1e4), torch.full((3, 24, 2, 8), 1e4)
        for b, n in enumerate(lens): kc[b, :n], vc[b, :n] = k[b, :n], v[b, :n]
        take = lambda t: torch.stack([t[b, n:n + T] for b, n in enumerate(lens)])
        y = backend.with_kvcache(take(q), kc, vc, k=take(k), v=take(v), cache_seqlens=torch.tensor(lens), causal=True, window_size=window)
        for b, n in enumerate(lens):
            torch.testing.assert_close(y[b].double(), brute(q[b:b + 1, :n + T], k[b:b + 1, :n + T], v[b:b + 1, :n + T], True, window)[0, n:], atol=3e-6, rtol=1e-5)
            assert torch.equal(kc[b, n:n + T], k[b, n:n + T]) and torch.equal(vc[b, n:n + T], v[b, n:n + T]) and (kc[b, n + T:] == 1e4).all()


@pytest.mark.parametrize('backend', NAMES, indirect=True)
def test_every_backend_reads_a_full_cache_without_new_keys(backend):
    q, kc, vc = random((2, 3, 4, 8), (2, 20, 2, 8), (2, 20, 2, 8))
    for lens in (None, 12):
        n = lens or 20
        y = backend.with_kvcache(q, kc, vc, cache_seqlens=lens, causal=True, window_size=(6, 0))
        torch.testing.assert_close(y.double(), brute(q, kc[:, :n], vc[:, :n], True, (6, 0)), atol=3e-6, rtol=1e-5)


def test_what_the_kernels_are_told(monkeypatch):
    said = []
    monkeypatch.setattr(fa, 'KERNELS', {'fa2': stand_in(said=said), 'fa4': stand_in(None, said=said)})
    q, k, v = random((1, 30, 2, 8), (1, 30, 1, 8), (1, 30, 1, 8))
    attend = {b.name: b.attention for b in fa.BACKENDS}
    for name in ('fa2', 'fa4'):
        for causal, window in [(True, (-1, -1)), (True, (9, 0)), (True, (29, 0)), (False, (9, -1)), (False, (-1, -1)), (False, (9, 5))]: attend[name](q, k, v, causal=causal, window_size=window)
    assert said[:6] == [(True, (-1, 0)), (True, (9, 0)), (True, (-1, 0)), (False, (9, -1)), (False, (-1, -1)), (False, (9, 5))]
    assert said[6:] == [(causal, tuple(None if n < 0 else n for n in window)) for causal, window in said[:6]], 'version 4 says None'


def test_no_kernel_waits_for_the_host(monkeypatch):
    """Tensors without numbers: whoever looked at one would fail."""
    monkeypatch.setattr(fa, 'KERNELS', {'fa3': SimpleNamespace(flash_attn_with_kvcache=lambda q, *a, **kw: torch.empty_like(q))})
    q, k, kc = (torch.empty(s, device='meta', dtype=torch.bfloat16) for s in ((2, 1, 4, 64), (2, 1, 2, 64), (2, 128, 2, 64)))
    lens = torch.empty(2, dtype=torch.int32, device='meta')
    assert next(b for b in fa.BACKENDS if b.name == 'fa3').with_kvcache(q, kc, kc, k=k, v=k, cache_seqlens=lens, causal=True, window_size=(32, 0)).shape == q.shape


def test_a_cache_that_is_too_small():
    q, k, kc, vc = random((1, 2, 2, 8), (1, 2, 2, 8), (1, 9, 2, 8), (1, 9, 2, 8))
    with pytest.raises(ValueError, match='holds 1 positions; 2 do not fit'): fa.kernel_with_kvcache(q, kc[:, :1], vc[:, :1], k, k, torch.tensor([0]), causal=True)


# --- PyTorch's own operation -------------------------------------------------------------------------------------------

def test_pytorchs_operation_has_the_arguments_that_it_is_given():
    arguments = torch.ops.aten._flash_attention_forward.default._schema.arguments
    assert [a.name for a in arguments if not a.kwarg_only] == ['query', 'key', 'value', 'cum_seq_q', 'cum_seq_k', 'max_q', 'max_k', 'dropout_p', 'is_causal', 'return_debug_mask']
    assert {'window_size_left', 'window_size_right'} <= {a.name for a in arguments if a.kwarg_only}


def test_pytorchs_autograd_hands_on_the_window():
    from torch.utils._python_dispatch import TorchDispatchMode
    heard = {}

    class Listen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if '_flash_attention' in str(func): heard[func.__name__.split('.')[0]] = kwargs
            return func(*args, **(kwargs or {}))

    q, k, v = (torch.empty(1, 64, h, 32, device='meta', dtype=torch.bfloat16, requires_grad=True) for h in (4, 2, 2))
    with Listen(): fa.torch_fa2_attention(q, k, v, causal=True, window_size=(17, 0)).sum().backward()
    assert heard == dict.fromkeys(['_flash_attention_forward', '_flash_attention_backward'], dict(window_size_left=17, window_size_right=0)) and k.grad.shape == k.shape


# --- FlexAttention -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('Tq, Tk, left, right', [(300, 300, 100, 0), (512, 512, 128, 0), (256, 640, 100, 30), (300, 300, -1, 0)])
def test_flex_visits_the_tiles_of_the_window_and_no_others(Tq, Tk, left, right):
    dense = fa.flex_mask(Tq, Tk, left, right, CPU).to_dense()[0, 0].bool()
    seen = F.pad(fa.window_mask(torch.arange(Tq) + Tk - Tq, torch.arange(Tk), left, right), (0, -Tk % 128, 0, -Tq % 128))
    assert torch.equal(dense, seen.view(len(dense), 128, -1, 128).permute(0, 2, 1, 3).flatten(2).any(-1))
    assert fa.flex_mask(Tq, Tk, left, right, CPU) is fa.flex_mask(Tq, Tk, left, right, CPU)


def test_a_longer_text_needs_no_other_kernel_of_flex():
    """What the mask function closes over is compiled into the kernel."""
    constants = lambda T: [c.cell_contents for c in fa.flex_mask(T, T, 100, 0, CPU).mask_mod.__closure__]
    assert constants(200) == constants(5000)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('g++'), reason='needs a C++ compiler: FlexAttention is compiled')
def test_flex_compiled():
    q, k, v = random((1, 300, 4, 32), (1, 300, 2, 32), (1, 300, 2, 32))
    left, right = 70, 0
    with torch.no_grad():
        y = fa._flex(True)(*(t.transpose(1, 2) for t in (q, k, v)), block_mask=fa.flex_mask(300, 300, left, right, CPU), enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(y, fa.sdpa_attention(q, k, v, True, (left, right)), atol=1e-5, rtol=1e-5)


# --- what is there -----------------------------------------------------------------------------------------------------

def test_looking_for_a_package_does_not_import_it(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path/'flash_attn'/'cute').mkdir(parents=True)
    (tmp_path/'flash_attn'/'cute'/'interface.py').write_text('1/0')
    assert not fa.has_package('flash_attn') and fa.has_package('flash_attn', 'cute/interface.py'), 'version 4 alone'
    (tmp_path/'flash_attn'/'__init__.py').write_text('1/0')
    importlib.invalidate_caches()
    assert fa.has_package('flash_attn') and fa.has_package('flash_attn', 'cute/interface.py')
    assert not fa.has_package('no_such_package') and not fa.has_package('no_such_package', 'cute') and 'flash_attn' not in sys.modules


def test_importing_has_no_effect(tmp_path):
    for name in ('flash_attn', 'flash_attn_interface', 'kernels', 'cutlass'): (tmp_path/f'{name}.py').write_text('1/0')
    code = 'import sys, nanochat.flash_attention as fa, torch; fa.runnable(torch.device("cpu")); print([n for n in ("flash_attn", "kernels", "torch.nn.attention.flex_attention", "huggingface_hub") if n in sys.modules], torch.cuda.is_initialized())'
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': f'{tmp_path}{os.pathsep}{ROOT}'}, check=True)
    assert out.stdout.strip() == '[] False' and out.stderr == ''


@pytest.mark.parametrize('capability, names', [((9, 0), 'fa3 fa4 fa2 torch-fa2 flex sdpa'), ((10, 0), 'fa4 fa2 torch-fa2 flex sdpa'), ((12, 0), 'fa2 torch-fa2 flex sdpa'),
                                               ((8, 0), 'fa2 torch-fa2 flex sdpa'), ((7, 5), 'sdpa')])
def test_which_gpu_takes_which_kernel(monkeypatch, capability, names):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
    monkeypatch.setattr(torch.backends.cuda, 'is_flash_attention_available', lambda: True)
    monkeypatch.setattr(fa, 'has_package', lambda name, part='': True)
    monkeypatch.setattr(torch.version, 'hip', None)
    assert fa.runnable(torch.device('cuda', 0)) == names.split()
    monkeypatch.setattr(fa, 'has_package', lambda name, part='': False)
    assert fa.runnable(torch.device('cuda', 0)) == [n for n in names.split() if n in ('torch-fa2', 'sdpa')]
    monkeypatch.setattr(torch.version, 'hip', '6.0')
    assert fa.runnable(torch.device('cuda', 0)) == ['sdpa'], 'capabilities of AMD mean something else'


def test_a_hub_build_counts_when_it_is_there_or_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv('KERNELS_CACHE', str(tmp_path))
    monkeypatch.delenv('NANOCHAT_ATTENTION', raising=False)
    monkeypatch.setattr(fa, 'has_package', lambda name, part='': name == 'kernels')
    assert not fa.hub_build_is_here() and not fa._has_fa3()
    monkeypatch.setenv('NANOCHAT_ATTENTION', 'fa3')
    assert fa._has_fa3()
    monkeypatch.delenv('NANOCHAT_ATTENTION')
    (tmp_path/'kernels--kernels-community--flash-attn3'/'snapshots'/'0').mkdir(parents=True)
    assert fa.hub_build_is_here() and fa._has_fa3()


def test_nothing_is_downloaded_unasked(monkeypatch):
    constants, seen = pytest.importorskip('huggingface_hub.constants'), []
    def get_kernel(repo, version):
        seen.append((repo, version, constants.HF_HUB_OFFLINE))
        if len(seen) > 2: raise OSError('not here')
        return stand_in()
    monkeypatch.setitem(sys.modules, 'kernels', SimpleNamespace(get_kernel=get_kernel))
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(fa, 'KERNELS', {})
    monkeypatch.delenv('NANOCHAT_ATTENTION', raising=False)
    assert fa.load_kernels('fa3') is fa.load_kernels('fa3')
    fa.KERNELS.clear()
    monkeypatch.setenv('NANOCHAT_ATTENTION', 'fa3')
    fa.load_kernels('fa3')
    assert seen == [('kernels-community/flash-attn3', 1, True), ('kernels-community/flash-attn3', 1, False)]
    monkeypatch.delenv('NANOCHAT_ATTENTION')
    fa.KERNELS.clear()
    with pytest.raises(OSError): fa.load_kernels('fa3')
    assert constants.HF_HUB_OFFLINE is False and fa.KERNELS == {}


def test_packages_are_imported_under_their_names(monkeypatch):
    modules = {name: stand_in() for name in ('flash_attn', 'flash_attn.cute', 'flash_attn_interface')}
    for name, module in modules.items(): monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(fa, 'KERNELS', {})
    monkeypatch.setattr(fa, 'has_package', lambda name, part='': name == 'flash_attn_interface')
    assert [fa.load_kernels(n) for n in ('fa2', 'fa3', 'fa4')] == [modules[n] for n in ('flash_attn', 'flash_attn_interface', 'flash_attn.cute')]


# --- the probe ---------------------------------------------------------------------------------------------------------

class ForgetsTheWindow(torch.autograd.Function):
    """Right values, and gradients as if there were no window."""
    @staticmethod
    def forward(ctx, q, k, v, window):
        ctx.save_for_backward(q, k, v)
        return fa.sdpa_attention(q, k, v, True, window)

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            q, k, v = (t.detach().requires_grad_() for t in ctx.saved_tensors)
            return *torch.autograd.grad(fa.sdpa_attention(q, k, v, True), (q, k, v), grad), None


def top_left(q, k, v, causal, window_size): return fa.sdpa_attention(q, k[:, :q.shape[1]], v[:, :q.shape[1]], causal, window_size)


def other_heads(q, k, v, causal, window_size):
    return fa.sdpa_attention(q, *(t.repeat(1, 1, q.shape[2] // t.shape[2], 1) for t in (k, v)), causal, window_size)


def raising(q, k, v, causal, window_size): raise RuntimeError('CUDA error: no kernel image is available\nand more')


BROKEN = {
    'one key short': (lambda q, k, v, causal, window_size: fa.sdpa_attention(q, k, v, causal, (window_size[0] - (window_size[0] > 0), 0)), r'its output differs .*window \(33, 0\)'),
    'no window': (lambda q, k, v, causal, window_size: fa.sdpa_attention(q, k, v, causal), r'its output differs'),
    'no window in the gradients': (lambda q, k, v, causal, window_size: ForgetsTheWindow.apply(q, k, v, window_size), r'its gradient of q differs'),
    'aligned at the beginning': (top_left, r'its output differs .*40 queries, 200 keys'),
    'other heads': (other_heads, r'its output differs'),
    'nan': (lambda *a, **kw: fa.sdpa_attention(*a, **kw) * torch.nan, r'its output differs .*nan'),
    'no gradient': (lambda *a, **kw: fa.sdpa_attention(*(t.detach() for t in a), **kw), r'it raises RuntimeError: .*does not require grad'),
    'raises': (raising, r'it raises RuntimeError: CUDA error: no kernel image is available$')}


@pytest.fixture
def clean(monkeypatch):
    """No verdicts and no choices, and none left behind."""
    for name in ('_VERDICTS', '_CHOSEN'): monkeypatch.setattr(fa, name, {})
    monkeypatch.delenv('NANOCHAT_ATTENTION', raising=False)

    def use(attention, with_kvcache=fa.sdpa_with_kvcache, name='new', **kw):
        monkeypatch.setattr(fa, 'BACKENDS', [fa.Backend(name, attention, with_kvcache, lambda device: True, half=True, **kw), *BACKENDS])
    return use


BACKENDS = fa.BACKENDS


@pytest.mark.parametrize('how', BROKEN)
def test_a_wrong_kernel_is_left_out_once_and_says_why(clean, how):
    attention, why = BROKEN[how]
    clean(attention)
    with pytest.warns(UserWarning) as said:
        for dtype in (torch.bfloat16,) * 3: assert fa.get_backend(CPU, None, dtype, 64).name == 'blocked'
    assert len(said) == 1 and re.search(r"^attention backend 'new' is left out on cpu: " + why, str(said[0].message))
    with pytest.raises(UserError, match="attention backend 'new' cannot be used on cpu: " + why.rstrip('$')): fa.get_backend(CPU, 'new', torch.bfloat16, 64)


def test_a_right_kernel_is_taken_and_tried_once(clean, monkeypatch, recwarn):
    calls = []
    def right(*a, **kw):
        calls.append(a[0].dtype)
        return fa.blocked_attention(*a, **kw)
    clean(right)
    for _ in range(3): assert fa.get_backend(CPU, None, torch.bfloat16, 64).name == 'new'
    assert len(calls) == len(fa.PROBES) and not recwarn.list
    q, k, v = (t.bfloat16() for t in random((1, 9, 2, 64), (1, 9, 2, 64), (1, 9, 2, 64)))
    flash_attn.flash_attn_func(q, k, v, causal=True)
    assert len(calls) == len(fa.PROBES) + 1, 'the choice is known'
    monkeypatch.setenv('NANOCHAT_ATTENTION', 'new')
    assert fa.get_backend(CPU, None, torch.bfloat16, 64).name == 'new' and len(calls) == len(fa.PROBES) + 1, 'so is the verdict'
    fa.get_backend(CPU, None, torch.float16, 128)
    assert len(calls) == 2 * len(fa.PROBES) + 1, 'another dtype and head size are another proof'


@pytest.mark.parametrize('dtype, head_dim', [(torch.float32, 64), (torch.float64, 64), (torch.bfloat16, 20), (torch.bfloat16, 264)])
def test_what_a_kernel_does_not_take_goes_elsewhere(clean, dtype, head_dim, recwarn):
    clean(raising)
    assert fa.get_backend(CPU, None, dtype, head_dim).name == 'blocked' and fa.get_backend(CPU, 'new', dtype, head_dim).name == 'sdpa' and not recwarn.list


def test_only_the_cache_is_wrong(clean):
    def forgets(q, k_cache, v_cache, **kw): return fa.sdpa_with_kvcache(q, k_cache.clone(), v_cache.clone(), **kw)
    clean(fa.blocked_attention, forgets)
    with pytest.warns(UserWarning, match="'new' is left out for caches on cpu: its cache of keys differs"): b = fa.get_backend(CPU, None, torch.bfloat16, 64)
    assert b.name == 'new' and b.attention is fa.blocked_attention and b.with_kvcache.func is fa.sdpa_with_kvcache
    assert fa.probe_cache(b.with_kvcache, CPU, torch.bfloat16, 64) == ''


def test_the_probe_runs_in_inference_mode_and_leaves_the_generator_alone(clean):
    clean(fa.blocked_attention)
    state = torch.get_rng_state()
    with torch.inference_mode(): assert fa.get_backend(CPU, None, torch.bfloat16, 64).name == 'new'
    assert torch.equal(state, torch.get_rng_state())


def test_rounding_is_far_below_the_tolerance(monkeypatch):
    monkeypatch.setattr(fa, 'TOLERANCE', 0.01)
    for dtype, D in itertools.product((torch.bfloat16, torch.float16), (32, 64, 128)): assert fa.probe_attention(fa.sdpa_attention, CPU, dtype, D) == fa.probe_cache(fa.sdpa_with_kvcache, CPU, dtype, D) == ''


# --- under the compiler and in recordings ------------------------------------------------------------------------------

def test_no_probe_while_tracing_or_recording(clean, monkeypatch):
    clean(raising)
    with monkeypatch.context() as m:
        m.setattr(torch.compiler, 'is_compiling', lambda: True)
        assert fa.get_backend(CPU, None, torch.bfloat16, 64).name == 'blocked'
    cuda = torch.device('cuda', 0)
    with monkeypatch.context() as m:
        m.setattr(torch.cuda, 'is_current_stream_capturing', lambda: True)
        assert fa.get_backend(cuda, None, torch.bfloat16, 64).name == 'sdpa'
    assert fa._VERDICTS == fa._CHOSEN == {}
    right = fa._CHOSEN[cuda, '', torch.bfloat16, 64] = BACKENDS[4]
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: 1 / 0)
    assert fa.get_backend(cuda, None, torch.bfloat16, 64) is right, 'known already'


def breaks(q, k, v, causal, window_size):
    torch._dynamo.graph_break()
    return fa.blocked_attention(q, k, v, causal, window_size)


@pytest.mark.parametrize('attention, in_graph, kept', [(fa.sdpa_attention, True, True), (functools.partial(breaks), True, False), (functools.partial(fa.kernel_attention, name='fa2'), False, False)])
def test_the_choice_is_settled_before_compiling(clean, monkeypatch, attention, in_graph, kept):
    """A kernel that the compiler follows stays in the graph; another is called between two; neither is tried out while tracing."""
    monkeypatch.setenv('NANOCHAT_DTYPE', 'bfloat16')
    from nanochat.gpt import GPT
    from nanochat.scaling import gpt_config
    monkeypatch.setattr(fa, 'KERNELS', {'fa2': stand_in()})
    clean(attention, in_graph=in_graph)
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = GPT(gpt_config(1, 64, 64, head_dim=32))
    model.to_empty(device='cpu')
    model.init_weights()
    with torch.no_grad(): model.transformer.h[0].attn.c_proj.weight.normal_(std=.1)
    b = fa.settle_backend(model)
    assert b.name == 'new' and b.in_graph == kept and (b.attention is attention) == kept
    monkeypatch.setattr(fa, 'verdict', lambda *a: 1 / 0)
    x = torch.randint(0, 64, (1, 40))
    if not kept and in_graph: torch.testing.assert_close(torch.compile(model, backend='aot_eager', dynamic=False)(x), model(x), atol=.02, rtol=.02)
    chosen = lambda q: flash_attn.flash_attn_func(q * 2, q, q, causal=True, window_size=(16, 0)) + 1
    q = random((1, 40, 2, 32))[0].bfloat16()
    assert torch._dynamo.explain(chosen)(q).graph_count == (1 if kept else 2)


def test_a_training_job_settles_before_it_compiles(monkeypatch):
    from nanochat import train
    order = []
    monkeypatch.setattr(train, 'settle_backend', lambda model: order.append('settled'))
    monkeypatch.setattr(train, 'resume', lambda *a: None)
    monkeypatch.setattr(train, 'print0', lambda *a: None)
    def compiled(model, **kw):
        order.append('compiled')
        raise KeyboardInterrupt
    monkeypatch.setattr(torch, 'compile', compiled)
    job = SimpleNamespace(begin=False, optimizer=None, run=Path('run'), model=None, plan=SimpleNamespace(num_iterations=1, total_batch_size=1))
    with pytest.raises(KeyboardInterrupt): train.run_job(job, 'a job', compiled=True)
    assert order == ['settled', 'compiled']


# --- on a GPU ----------------------------------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs an NVIDIA GPU: none of the kernels for GPUs can run here')


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize('name', NAMES[1:])
@pytest.mark.parametrize('head_dim', [64, 128])
def test_kernels_on_this_gpu(name, head_dim):
    device = torch.device('cuda', torch.cuda.current_device())
    if name not in fa.runnable(device): pytest.skip(f'{name} needs {next(b.needs for b in fa.BACKENDS if b.name == name)}')
    b = fa.get_backend(device, name, torch.bfloat16, head_dim)
    for T, window in ((1000, (256, 0)), (2048, (-1, 0)), (130, (128, 0))):
        q, k, v = (t.to(device, torch.bfloat16) for t in random((2, T, 4, head_dim), (2, T, 2, head_dim), (2, T, 2, head_dim)))
        ours, exact = (fa._with_gradients(f, t, torch.ones((), device=device), window) for f, t in ((b.attention, [q, k, v]), (fa.sdpa_attention, [q.float(), k.float(), v.float()])))
        assert fa.first_difference(['y', 'dq', 'dk', 'dv'], ours, exact) == ''
    assert fa.probe_cache(b.with_kvcache, device, torch.bfloat16, head_dim) == ''


@pytest.mark.gpu
@needs_gpu
def test_a_model_compiled_on_this_gpu():
    from nanochat.gpt import GPT
    from nanochat.scaling import gpt_config
    model = GPT(gpt_config(2, 256, 1024, head_dim=64))
    model.to_empty(device='cuda')
    model.init_weights()
    name = fa.settle_backend(model).name
    x = torch.randint(0, 256, (2, 1024), device='cuda')
    a, b = torch.compile(model, dynamic=False)(x, x), model(x, x)
    assert abs(a.item() - b.item()) < 0.02, name
