"""The optimizer: agreement with saved numbers, with torch and with SVD-based naive versions; exact state; layout for sharding."""
import io, zlib

import pytest
import torch

import nanochat.optim as optim
from nanochat.optim import MuonAdamW, StackLayout, adamw_rows, adamw_state, adamw_step, muon_step, polar_express, stack_padded


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- the public project's numbers -------------------------------------------------------------------------------------

RATES = dict(unembedding_lr=0.008, embedding_lr=0.3, matrix_lr=0.02, weight_decay=0.1, scalar_lr=0.5)


def groups_by_table(params, width, *, unembedding_lr, embedding_lr, matrix_lr, weight_decay, scalar_lr):
    """The group table of the public project, from state-dict keys alone, independent of `GPT.setup_optimizer`."""
    scale = (width / 768) ** -0.5
    pick = lambda *starts: [p for n, p in params.items() if n.startswith(starts)]
    adamw = lambda ps, lr, betas, wd: dict(kind='adamw', params=ps, lr=lr, betas=betas, eps=1e-10, weight_decay=wd)
    groups = [adamw(pick('lm_head'), unembedding_lr * scale, (0.8, 0.96), 0.01),
              adamw(pick('transformer.wte'), embedding_lr * scale, (0.8, 0.995), 0.001),
              adamw(pick('value_embeds'), embedding_lr * scale * 0.5, (0.8, 0.995), 0.01),
              adamw(pick('resid_lambdas'), scalar_lr * 0.01, (0.8, 0.95), 0.05),
              adamw(pick('x0_lambdas'), scalar_lr, (0.96, 0.95), 0.0),
              adamw(pick('smear', 'backout'), 0.2, (0.8, 0.95), 0.0)]
    matrices = pick('transformer.h.')
    for shape in sorted({p.shape for p in matrices}):
        groups.append(dict(kind='muon', params=[p for p in matrices if p.shape == shape], lr=matrix_lr, momentum=0.95,
                           ns_steps=5, beta2=0.9, weight_decay=weight_decay))
    return groups


def four_steps(params, optimizer, reference):
    for s in range(4):
        for n, p in params.items():
            p.grad = 0.01 * gaussian(*p.shape, seed=zlib.crc32(n.encode()) + s)
        optimizer.step()
        for n, norm in reference['opt_norms'][s].items():
            assert params[n].norm().item() == pytest.approx(float(norm), rel=5e-6, abs=1e-6), f'{n} after step {s + 1}'
    torch.testing.assert_close(params['transformer.h.2.mlp.c_fc.weight'].data, reference['opt_c_fc'], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(params['lm_head.weight'].data[:64], reference['opt_lm_head'], atol=1e-5, rtol=1e-5)


@pytest.fixture
def reference(shared_data, fp32):
    folder = shared_data/'reference'
    weights = torch.load(folder/'base_checkpoints'/'d4'/'model_000010.pt', weights_only=True)
    return torch.load(folder/'reference.pt', weights_only=True), weights


def test_four_steps_equal_the_public_project(reference):
    numbers, weights = reference
    params = {n: torch.nn.Parameter(w) for n, w in weights.items()}
    four_steps(params, MuonAdamW(groups_by_table(params, 64, **RATES)), numbers)


def test_setup_optimizer_gives_the_same_four_steps(reference):
    from nanochat.gpt import GPT, GPTConfig
    numbers, weights = reference
    model = GPT(GPTConfig(sequence_len=256, vocab_size=512, n_layer=4, n_head=4, n_kv_head=2, n_embd=64, window_pattern='SSSL'))
    model.to_empty(device='cpu')
    model.init_weights()
    model.load_state_dict(weights)
    params = dict(model.named_parameters())
    assert set(params) == set(numbers['opt_norms'][0])
    four_steps(params, model.setup_optimizer(**RATES), numbers)


# --- AdamW ------------------------------------------------------------------------------------------------------------

HYPER = dict(lr=0.01, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.1)


@pytest.mark.parametrize('shape', [(1,), (24,), (64, 32), ()])
def test_adamw_equals_torch(shape):
    p = torch.nn.Parameter(gaussian(*shape))
    mine, state = p.detach().clone(), adamw_state(p)
    other = torch.optim.AdamW([p], **HYPER, foreach=False, fused=False)
    for t in range(30):
        p.grad = gaussian(*shape, seed=t + 1)
        other.step()
        adamw_step([mine], [p.grad], [state], **HYPER)
    torch.testing.assert_close(mine, p.data, atol=1e-6, rtol=1e-5)


def test_adamw_computes_in_fp32_and_rounds_the_stored_result():
    p, full = gaussian(50, 20).bfloat16(), gaussian(50, 20).bfloat16().float()
    state, full_state = adamw_state(p), adamw_state(full)
    for t in range(10):
        g = gaussian(50, 20, seed=t + 1).bfloat16()
        full.copy_(p)  # the stored weight is the rounded one
        adamw_step([full], [g], [full_state], **HYPER)
        adamw_step([p], [g], [state], **HYPER)
        assert torch.equal(p, full.bfloat16()), t
    assert state['exp_avg'].dtype == state['exp_avg_sq'].dtype == torch.float32
    assert torch.equal(state['exp_avg_sq'], full_state['exp_avg_sq'])


def test_adamw_handles_parameters_and_gradients_with_odd_strides():
    p, g = gaussian(6, 10), gaussian(10, 6, seed=1)
    a, b = p.clone(), p.t().contiguous().t()
    assert not b.is_contiguous()
    adamw_step([a], [g.t().contiguous()], [adamw_state(a)], **HYPER)
    adamw_step([b], [g.t()], [adamw_state(b)], **HYPER)
    torch.testing.assert_close(a, b, atol=0, rtol=0)


# --- Muon -------------------------------------------------------------------------------------------------------------

SETTINGS = dict(lr=0.02, momentum=0.95, beta2=0.9, weight_decay=0.1)


def svd_factor(x):
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    return u @ vh


@pytest.mark.parametrize('shape', [(32, 64), (64, 32), (48, 48), (2, 12)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_polar_express_is_near_the_svd_factor(shape, dtype):
    x = gaussian(3, *shape)
    y = polar_express(x, dtype=dtype).float()
    values = torch.linalg.svdvals(y)
    assert values.min() > 0.3 and values.max() < 1.3
    assert torch.nn.functional.cosine_similarity(y.flatten(1), svd_factor(x).flatten(1)).min() > 0.98


def naive_muon(p, g, m, v, lr, momentum, beta2, weight_decay):
    """One matrix, written from the papers with explicit loops where they help, and its own Polar Express."""
    m = m + (1 - momentum) * (g - m)
    g = g + momentum * (m - g)
    norms = torch.stack([row.norm() for row in g])
    x = torch.stack([row * norms.mean() / n for row, n in zip(g, norms)])
    x = x / (1.01 * x.norm() + 1e-6)
    wide = x.shape[0] <= x.shape[1]
    for a, b, c in optim.POLAR_EXPRESS:
        x = a * x + (b * (x @ x.T) + c * (x @ x.T) @ (x @ x.T)) @ x if wide else a * x + x @ (b * (x.T @ x) + c * (x.T @ x) @ (x.T @ x))
    x = x * min(x.shape) ** 0.5 / x.norm()
    along = 1 if p.shape[0] >= p.shape[1] else 0
    v = beta2 * v + (1 - beta2) * (x**2).mean(along)
    y = x / v.sqrt().unsqueeze(along)
    y = y * x.norm() / y.norm()
    rate = lr * max(1, p.shape[0] / p.shape[1]) ** 0.5
    decay = torch.where(y * p >= 0, rate * weight_decay * p, torch.zeros_like(p))
    return p - rate * y - decay, m, v


@pytest.mark.parametrize('shape', [(32, 64), (64, 32), (16, 16)])
def test_muon_equals_a_naive_version_matrix_by_matrix(shape):
    n = 3
    stack, buffer = gaussian(n, *shape), torch.zeros(n, *shape)
    second = torch.zeros(n, shape[0], 1) if shape[0] >= shape[1] else torch.zeros(n, 1, shape[1])
    singles = [(p.clone(), torch.zeros(shape), torch.zeros(max(shape))) for p in stack]
    for t in range(4):
        g = gaussian(n, *shape, seed=t + 1)
        muon_step(stack, g, buffer, second, **SETTINGS)
        singles = [naive_muon(p, g[i], m, v, **SETTINGS) for i, (p, m, v) in enumerate(singles)]
    for fast, (slow, m, _), b in zip(stack, singles, buffer):
        torch.testing.assert_close(fast, slow, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(b, m, atol=1e-6, rtol=1e-5)


def test_update_length_is_the_learning_rate_alone():
    for scale in (1e-6, 1.0, 1e6):
        p, g = torch.zeros(1, 32, 64), scale * gaussian(1, 32, 64)
        muon_step(p, g, torch.zeros_like(p), torch.zeros(1, 1, 64), lr=0.1, momentum=0.0, beta2=0.0, weight_decay=0.0)
        assert p.norm().item() == pytest.approx(0.1 * 32**0.5, rel=1e-2)


def test_cautious_decay_only_shrinks_where_the_step_does():
    p, update = gaussian(8, 8), gaussian(8, 8, seed=1)
    decayed, plain = p.clone(), p.clone()
    optim.cautious_step(decayed, update, 0.1, 0.5)
    optim.cautious_step(plain, update, 0.1, 0.0)
    agree = update * p > 0
    assert torch.equal(decayed[~agree], plain[~agree]) and (decayed[agree] != plain[agree]).all()
    assert ((decayed - plain)[agree].sign() == -p[agree].sign()).all()


# --- the class --------------------------------------------------------------------------------------------------------

def small():
    ps = [torch.nn.Parameter(gaussian(16, 8, seed=i)) for i in range(3)] + [torch.nn.Parameter(gaussian(8, 16, seed=5))]
    ps += [torch.nn.Parameter(gaussian(32, 8, seed=6).bfloat16()), torch.nn.Parameter(gaussian(7, seed=7))]
    muon = dict(kind='muon', lr=0.02, momentum=0.95, ns_steps=5, beta2=0.9, weight_decay=0.1)
    adamw = dict(kind='adamw', lr=0.3, betas=(0.8, 0.995), eps=1e-10, weight_decay=0.001)
    return ps, MuonAdamW([dict(muon, params=ps[:3]), dict(muon, params=ps[3:4]), dict(adamw, params=ps[4:])])


def run(ps, opt, numbers):
    for t in numbers:
        for i, p in enumerate(ps): p.grad = gaussian(*p.shape, seed=100 * t + i).to(p.dtype)
        for group in opt.param_groups:
            group['lr'] *= 0.9
            if group['kind'] == 'muon': group['momentum'] -= 0.01
        opt.step()


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('cut', [0, 1, 3])
def test_saved_and_loaded_continues_bit_for_bit(cut, dtype, monkeypatch):
    monkeypatch.setenv('NANOCHAT_DTYPE', dtype)
    straight, opt = small()
    run(straight, opt, range(6))
    first, a = small()
    run(first, a, range(cut))
    file = io.BytesIO()
    torch.save(a.state_dict(), file)
    file.seek(0)
    second, b = small()
    for p, q in zip(second, first): p.data.copy_(q.data)
    b.load_state_dict(torch.load(file, weights_only=True))
    run(first, a, range(cut, cut + 1))  # the old optimizer goes its own way: nothing may be shared
    run(second, b, range(cut, 6))
    for p, q in zip(straight, second): assert torch.equal(p, q)
    for s, t in zip(opt.state.values(), b.state.values()):
        for k in s: assert s[k].dtype == t[k].dtype == torch.float32 and torch.equal(s[k], t[k]), k


def test_bf16_parameters_keep_fp32_state_after_loading():
    ps, opt = small()
    run(ps, opt, range(2))
    fine = opt.state[ps[4]]['exp_avg'].clone()
    assert not torch.equal(fine, fine.bfloat16().float())  # or the test could not fail
    opt.load_state_dict(opt.state_dict())
    assert torch.equal(opt.state[ps[4]]['exp_avg'], fine)


def test_settings_are_read_at_every_step():
    ps, opt = small()
    before = [p.detach().clone() for p in ps]
    for group in opt.param_groups: group['lr'] = 0.0
    run(ps, opt, range(2))
    assert all(torch.equal(p, q) for p, q in zip(ps, before))
    for group in opt.param_groups: group['lr'] = 0.1
    run(ps, opt, range(2, 3))
    assert not any(torch.equal(p, q) for p, q in zip(ps, before))


def test_missing_gradients():
    ps, opt = small()
    before = [p.detach().clone() for p in ps]
    opt.step()
    assert all(torch.equal(p, q) for p, q in zip(ps, before)) and not opt.state
    ps[0].grad = gaussian(16, 8)
    opt.step()
    assert not torch.equal(ps[0], before[0]) and torch.equal(ps[3], before[3]) and torch.equal(ps[4], before[4])
    torch.testing.assert_close(ps[1].data, before[1] * (1 - 0.02 * 2**0.5 * 0.1))  # a zero gradient in Muon: decay alone


def test_closure_loss_is_returned():
    p = torch.nn.Parameter(torch.ones(4, 4))
    opt = MuonAdamW([dict(kind='muon', params=[p])])

    def closure():
        opt.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert opt.step(closure).item() == 16.0 and p.square().sum() < 16


@pytest.mark.parametrize('group, word', [
    (dict(kind='sgd', params=[torch.zeros(2, 2)]), 'kind'), (dict(params=[torch.zeros(2, 2)]), 'kind'),
    (dict(kind='muon', params=[torch.zeros(2, 2), torch.zeros(3, 2)]), 'one shape'),
    (dict(kind='muon', params=[torch.zeros(4)]), 'matrices'), (dict(kind='muon', params=[]), 'matrices'),
    (dict(kind='muon', params=[torch.zeros(2, 2)], ns_steps=9), 'ns_steps'),
    (dict(kind='muon', params=[torch.zeros(2, 2)], betas=(0.9, 0.9)), 'betas')])
def test_wrong_groups_are_named(group, word):
    with pytest.raises(ValueError, match=word): MuonAdamW([group])


# --- the layout that sharding will use --------------------------------------------------------------------------------

@pytest.mark.parametrize('count', [1, 5, 8, 24])
@pytest.mark.parametrize('world', [1, 2, 8])
def test_every_matrix_has_exactly_one_owner(count, world):
    layout = StackLayout(count, world)
    owners = [i for rank in range(world) for i in layout.owned(rank)]
    assert owners == list(range(layout.padded)) and layout.padded % world == 0 and 0 <= layout.padded - count < world


def test_chunks_updated_apart_equal_the_whole_stack():
    matrices, grads = ([gaussian(16, 8, seed=s + i) for i in range(5)] for s in (0, 50))
    whole, layout = torch.stack(matrices), StackLayout(5, 2)
    muon_step(whole, torch.stack(grads), torch.zeros(5, 16, 8), torch.zeros(5, 16, 1), **SETTINGS)
    p, g = stack_padded(matrices, layout), stack_padded(grads, layout)
    for rank in range(2):
        own = slice(layout.owned(rank).start, layout.owned(rank).stop)
        part = p[own].clone()
        muon_step(part, g[own], torch.zeros(3, 16, 8), torch.zeros(3, 16, 1), **SETTINGS)
        p[own] = part
    torch.testing.assert_close(p[:5], whole, atol=1e-6, rtol=1e-6)
    assert p[5:].eq(0).all()


def test_adamw_rows_cover_a_large_parameter_once():
    slices = [adamw_rows((512, 64), r, 8) for r in range(8)]
    assert sum((list(range(512))[s] for s in slices), []) == list(range(512))
    assert adamw_rows((24,), 0, 8) is None and adamw_rows((513, 64), 0, 8) is None and adamw_rows((512, 64)) is None


def test_compiled_graph_is_whole_and_survives_new_rates():
    """On a GPU the step is compiled with its changing numbers as tensors: one graph, no break, no second compilation."""
    from torch._dynamo.testing import CompileCounter
    counter = CompileCounter()
    compiled = torch.compile(muon_step, backend=counter, fullgraph=True, dynamic=False)
    a, b = gaussian(2, 16, 8), gaussian(2, 16, 8)
    buffers = [(torch.zeros(2, 16, 8), torch.zeros(2, 16, 1)) for _ in range(2)]
    for t in range(4):
        settings = dict(SETTINGS, lr=0.02 / (t + 1), momentum=0.9 + 0.01 * t)
        muon_step(a, gaussian(2, 16, 8, seed=t), *buffers[0], **settings)
        compiled(b, gaussian(2, 16, 8, seed=t), *buffers[1], **{k: torch.tensor(v) for k, v in settings.items()})
    assert counter.frame_count == 1
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
