"""The model's behaviour at small sizes: construction, causality, caching at awkward positions, the chunked loss, costs."""
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from nanochat import gpt
from nanochat.common import UserError
from nanochat.gpt import GPT, GPTConfig


def build(seed=0, noise=0.05, **kw):
    """A small model in which every part matters: initial zeros are replaced by noise."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**dict(sequence_len=512, vocab_size=203, n_layer=4, n_head=4, n_kv_head=2, n_embd=64), **kw}))
    model.to_empty(device='cpu')
    model.init_weights()
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn(p.shape).to(p.dtype), alpha=noise)
        model.smear_lambda.fill_(0.7)
    return model


class Cache(SimpleNamespace):
    """The least a key-value cache must offer."""
    def __init__(self, config, B, length):
        shape = (config.n_layer, B, length, config.n_kv_head, config.n_embd // config.n_head)
        super().__init__(k=torch.zeros(shape), v=torch.zeros(shape), cache_seqlens=torch.zeros(B, dtype=torch.int32), prev_embedding=None, n_layers=config.n_layer)

    def get_layer_cache(self, i): return self.k[i], self.v[i]
    def advance(self, n): self.cache_seqlens += n


def test_construction_is_free_and_state_dict_keys_are_the_public_ones():
    model = GPT(GPTConfig(n_layer=4, vocab_size=1000))
    assert all(p.is_meta for p in model.parameters()) and model.transformer.wte.weight.shape[0] == 1024
    keys = {k.replace('transformer.h.1.', '') for k in model.state_dict() if not k.startswith(('transformer.h.0', 'transformer.h.2', 'transformer.h.3'))}
    assert keys == {'transformer.wte.weight', 'lm_head.weight', 'value_embeds.1.weight', 'value_embeds.3.weight', 'resid_lambdas', 'x0_lambdas', 'smear_gate.weight',
                    'smear_lambda', 'backout_lambda', *(f'attn.{n}.weight' for n in ('c_q', 'c_k', 'c_v', 'c_proj', 've_gate')), 'mlp.c_fc.weight', 'mlp.c_proj.weight'}


def test_initialisation(fp32):
    model = build(noise=0, n_embd=128)
    std, C = lambda p: p.std().item(), 128
    blk = model.transformer.h[1]
    assert std(model.transformer.wte.weight) == pytest.approx(0.8, rel=.05) and std(model.lm_head.weight) == pytest.approx(0.001, rel=.05)
    assert std(blk.attn.c_q.weight) == pytest.approx(C**-.5, rel=.05) and std(blk.mlp.c_fc.weight) == pytest.approx(.4 * C**-.5, rel=.05)
    assert blk.attn.c_proj.weight.abs().max() == blk.mlp.c_proj.weight.abs().max() == 0
    assert 0 <= blk.attn.ve_gate.weight.min() and blk.attn.ve_gate.weight.max() <= .02
    torch.testing.assert_close(model.resid_lambdas.detach(), torch.tensor([1.15, 1.15 - .1 / 3, 1.15 - .2 / 3, 1.05]))
    torch.testing.assert_close(model.x0_lambdas.detach()[[0, -1]], torch.tensor([.2, .05]))
    x, y = torch.randint(0, 203, (2, 2, 40))
    assert model(x, y).item() == pytest.approx(math.log(203), abs=.01)


@pytest.mark.parametrize('name, expected', [('float32', torch.float32), ('bfloat16', torch.bfloat16), ('float16', torch.float32)])
def test_embedding_dtype(monkeypatch, name, expected):
    monkeypatch.setenv('NANOCHAT_DTYPE', name)
    model = build()
    assert {e.weight.dtype for e in (model.transformer.wte, *model.value_embeds.values())} == {expected}
    assert model.lm_head.weight.dtype == torch.float32
    assert model(torch.tensor([[1, 2]])).dtype == torch.float32


def test_windows():
    sizes = lambda **kw: [w for w, _ in gpt.window_sizes(GPTConfig(**kw))]
    assert sizes(n_layer=5) == [512, 512, 512, 2048, 2048]
    assert sizes(n_layer=3, sequence_len=512, window_pattern='S') == [128, 128, 512]
    assert sizes(n_layer=2, sequence_len=520, window_pattern='sl') == [256, 520]


@torch.no_grad()
def test_a_window_w_shows_a_position_itself_and_w_before(fp32):
    model = build(n_layer=2, window_pattern='S', sequence_len=512)
    model.smear_lambda.fill_(0)
    model.window_sizes = [(10, 0), (0, 0)]
    x = torch.randint(0, 203, (1, 60))
    change = lambda t: (model(x.index_fill(1, torch.tensor([t]), 7)) - model(x)).abs().amax(-1)[0]
    assert (change(20)[20:31] > 1e-6).all() and (change(20)[31:] == 0).all() and (change(20)[:20] == 0).all()


@torch.no_grad()
def test_the_future_and_other_rows_do_not_matter(fp32):
    model, x = build(), torch.randint(0, 203, (3, 200))
    y = x.clone()
    y[0, 100:], y[1] = 5, 6
    a, b = model(x), model(y)
    torch.testing.assert_close(a[0, :100], b[0, :100], atol=1e-6, rtol=0)
    torch.testing.assert_close(a[2], b[2], atol=1e-6, rtol=0)
    assert (a[0, 100:] - b[0, 100:]).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize('pieces', [[1] * 6, [5, 1, 3], [127, 2, 1, 1], [128, 1, 1], [129, 130, 1, 1], [510, 1, 1, 1, 1]])
def test_cached_equals_uncached(fp32, pieces):
    """In pieces of any length, across the window's edge (128) and the training length (512), with GQA and smear."""
    model, n = build(), sum(pieces)
    x = torch.randint(0, 203, (2, n))
    cache, out = Cache(model.config, 2, n), []
    for piece in x.split(pieces, 1): out.append(model(piece, kv_cache=cache))
    torch.testing.assert_close(torch.cat(out, 1), model(x), atol=2e-5, rtol=1e-4)
    assert cache.cache_seqlens.tolist() == [n, n]


@torch.no_grad()
@pytest.mark.parametrize('lengths', [(3, 40), (127, 129), (200, 1)])
def test_rows_of_different_lengths_decode_together(fp32, lengths):
    model = build()
    x = torch.randint(0, 203, (2, 260))
    joint = Cache(model.config, 2, 260)
    joint.prev_embedding = torch.empty(2, 1, 64)
    for b, n in enumerate(lengths):
        one = Cache(model.config, 1, 260)
        model(x[b:b + 1, :n], kv_cache=one)
        joint.k[:, b], joint.v[:, b], joint.prev_embedding[b], joint.cache_seqlens[b] = one.k[:, 0], one.v[:, 0], one.prev_embedding[0], n
    full = model(x)
    for step in range(4):
        new = torch.stack([x[b, n + step] for b, n in enumerate(lengths)])[:, None]
        logits = model(new, kv_cache=joint)
        for b, n in enumerate(lengths): torch.testing.assert_close(logits[b, 0], full[b, n + step], atol=2e-5, rtol=1e-4)


def grads(loss, *tensors): return [loss.detach(), *torch.autograd.grad(loss, tensors)]


@pytest.mark.parametrize('reduction', ['mean', 'sum', 'none'])
@pytest.mark.parametrize('rows', [1, 7, 64, 1000])
@pytest.mark.parametrize('ignored', [0, 10, 45, 89])
def test_chunked_loss(reduction, rows, ignored):
    torch.manual_seed(0)
    x, w = torch.randn(90, 16, requires_grad=True), torch.randn(64, 16, requires_grad=True)
    targets = torch.randint(0, 50, (90,))
    targets[torch.randperm(90)[:ignored]] = -1
    up = torch.randn(90) if reduction == 'none' else torch.tensor(0.3)
    plain = grads((gpt.plain_loss(x, w, targets, 50, reduction) * up).sum(), x, w)
    ours = grads((gpt.softcapped_loss(x, w, targets, 50, reduction, rows=rows) * up).sum(), x, w)
    for a, b in zip(plain, ours): torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_chunked_loss_in_bf16():
    torch.manual_seed(0)
    x, w = torch.randn(300, 64).bfloat16().requires_grad_(), torch.randn(512, 64).mul(.3).requires_grad_()
    targets = torch.randint(-1, 500, (300,))
    exact = grads(gpt.plain_loss(x.float(), w, targets, 500), x, w)
    ours = grads(gpt.softcapped_loss(x, w, targets, 500), x, w)
    assert abs(exact[0] - ours[0]) < 3e-3
    for a, b in zip(exact[1:], ours[1:]): assert (a.float() - b.float()).norm() < 0.01 * a.float().norm()


def test_extreme_logits_and_all_ignored():
    x, w = torch.full((4, 8), 50.0, requires_grad=True), torch.eye(64, 8).mul(50).requires_grad_()
    loss = gpt.softcapped_loss(x, w, torch.tensor([0, 9, 40, -1]), 50)
    assert torch.isfinite(loss) and all(torch.isfinite(g).all() for g in torch.autograd.grad(loss, (x, w)))
    loss = gpt.softcapped_loss(x, w, torch.full((4,), -1), 50)
    assert loss == 0 and all((g == 0).all() for g in torch.autograd.grad(loss, (x, w)))


def test_the_loss_never_holds_all_logits():
    """Counted at the allocator: the largest tensor made is a chunk, far below N x V."""
    from torch.utils._python_dispatch import TorchDispatchMode
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, torch.Tensor): largest = max(largest, t.numel())
            return out

    x, w = torch.randn(2048, 16, requires_grad=True), torch.randn(4096, 16, requires_grad=True)
    with Largest(): gpt.softcapped_loss(x, w, torch.randint(0, 4096, (2048,)), 4096).backward()
    assert 0 < largest <= 2048 * 4096 / 2


def test_gradients_against_finite_differences(fp32):
    """Each kind of parameter, in float64, along a random direction."""
    model = build(n_layer=2, sequence_len=512).double()
    x, y = torch.randint(0, 203, (2, 2, 20))
    logits = lambda: 15 * torch.tanh(model.trunk(x) @ model.lm_head.weight[:203].T / 15)
    loss = lambda: F.cross_entropy(logits().flatten(0, 1), y.flatten())
    names = ['transformer.wte.weight', 'transformer.h.1.attn.c_q.weight', 'transformer.h.1.attn.ve_gate.weight', 'transformer.h.0.mlp.c_fc.weight', 'value_embeds.1.weight',
             'resid_lambdas', 'x0_lambdas', 'smear_gate.weight', 'smear_lambda', 'backout_lambda']
    params = [model.get_parameter(n) for n in names]
    for name, p, g in zip(names, params, torch.autograd.grad(loss(), params)):
        direction, values = torch.randn_like(p), []
        with torch.no_grad():
            for eps in (1e-5, -2e-5):
                p.add_(direction, alpha=eps)
                values.append(loss().item())
        assert (g * direction).sum().item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-3, abs=1e-6), name


def test_bf16_training_follows_fp32(monkeypatch):
    x, y = torch.randint(0, 203, (2, 2, 64))
    losses = {}
    for name in ('float32', 'bfloat16'):
        monkeypatch.setenv('NANOCHAT_DTYPE', name)
        model = build(noise=0)
        opt, losses[name] = torch.optim.SGD(model.parameters(), lr=0.5), []
        for _ in range(8):
            loss = model(x, y)
            loss.backward(); opt.step(); opt.zero_grad()
            losses[name].append(loss.item())
    assert losses['float32'][-1] < losses['float32'][0] - .2
    assert max(abs(a - b) for a, b in zip(*losses.values())) < .03


def test_flops_by_hand():
    model = GPT(GPTConfig(sequence_len=512, vocab_size=4096, n_layer=4, n_head=2, n_kv_head=2, n_embd=256))
    linear = 4 * 12 * 256**2 + 2 * 2 * 12 + 24 + 4096 * 256
    assert model.estimate_flops() == 6 * linear + 12 * 256 * (3 * 128 + 512)


def test_generate_is_seeded_and_respects_top_k(fp32):
    model = build()
    draw = lambda **kw: list(model.generate([1, 2, 3], 12, **kw))
    assert draw(seed=1) == draw(seed=1) != draw(seed=2)
    assert draw(temperature=0) == draw(top_k=1, seed=5) == draw(temperature=1e-5, seed=3)
    assert all(isinstance(t, int) and t < 203 for t in draw(temperature=50.0))


@pytest.mark.parametrize('kw, words', [(dict(n_layer=0), 'at least 1'), (dict(n_embd=100), 'n_embd = n_head x head_dim'), (dict(n_kv_head=4), 'multiple of n_kv_head'),
                                       (dict(window_pattern='SXL'), 'only contain S and L'), (dict(n_embd=6 * 3), 'odd')])
def test_impossible_shapes(kw, words):
    with pytest.raises(UserError, match=words): GPT(GPTConfig(**kw))


def test_too_long_a_row_is_a_sentence(fp32):
    model = build(sequence_len=16)
    with pytest.raises(ValueError, match='161 tokens are too many'): model(torch.zeros(1, 161, dtype=torch.long))


@pytest.mark.parametrize('depth', [1, 2, 3])
def test_backout_learns_only_where_it_does_something(depth, fp32):
    """With one or two layers it scales what the norm scales back: AdamW walked it past 1 on rounding noise (loss 2.2 -> 15.3 -> 2.3)."""
    config = GPTConfig(sequence_len=32, vocab_size=64, n_layer=depth, n_head=2, n_kv_head=2, n_embd=32)
    torch.manual_seed(0)
    with torch.device('meta'): model = GPT(config)
    model.to_empty(device='cpu')
    model.init_weights()
    optimizer, ids = model.setup_optimizer(), torch.randint(64, (4, 33))
    for _ in range(8):
        model(ids[:, :-1], ids[:, 1:]).backward()
        optimizer.step()
        model.zero_grad(set_to_none=True)
    moved = (model.backout_lambda - 0.2).abs().item()
    assert moved > 0.01 if depth > 2 else moved == 0
