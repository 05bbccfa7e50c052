"""Figures of the model: what they show is computed here a second time, by other means; their controls are moved and none may fail."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nanochat.common import UserError
from nanochat.core_eval import mini_bundle, predict_one, score_plainly, item_rows
from nanochat.dataset import Corpus, prepare_corpus
from nanochat.gpt import GPT, GPTConfig, apply_rotary, norm
from nanochat.scaling import PEAK_FLOPS, gpt_config, model_size
from nanochat.tokenizer import RustBPETokenizer
from nanochat import viz_model as V

TEXT = 'def area(radius):\n    return 3.14 * radius * radius\n\nprint(area(2))\n'


@pytest.fixture(scope='module')
def tokenizer(): return RustBPETokenizer.train_from_iterator([TEXT * 20, 'the quick brown fox; éàü \t tabs'], 300)


def tiny(tokenizer, seed=0, **changes):
    """A random model whose attention is not uniform: its embeddings differ by token."""
    torch.manual_seed(seed)
    config = GPTConfig(**dict(sequence_len=128, vocab_size=tokenizer.get_vocab_size(), n_layer=3, n_head=4, n_kv_head=2, n_embd=64, window_pattern='SL') | changes)
    model = GPT(config)
    model.to_empty(device='cpu')
    model.init_weights()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2 and not p.any(): p.normal_(std=.1)  # c_proj starts at zero, which would hide most faults
    return model.float().eval()


@pytest.fixture
def model(tokenizer, fp32): return tiny(tokenizer)


def test_labels(tokenizer):
    ids = tokenizer.encode('é a\n\tb', prepend=tokenizer.get_bos_token_id())
    labels = V.token_texts(tokenizer, ids)
    assert labels[0] == '<|bos|>' and len(labels) == len(ids)
    raw = b''.join(tokenizer.decode_single_token_bytes(i) for i in ids[1:])
    assert raw == 'é a\n\tb'.encode() and all(l and not l.isspace() for l in labels)


def queries_and_keys(model, ids):
    """q and k per layer, as `(T, H, D)`, by running the blocks one at a time and the textbook's formulas on what enters each."""
    entering = []
    hooks = [b.attn.register_forward_pre_hook(lambda m, args: entering.append(args[0])) for b in model.transformer.h]
    model(torch.tensor([ids]))
    for h in hooks: h.remove()
    found = []
    for b, x in zip(model.transformer.h, entering):
        D, T = b.attn.head_dim, len(ids)
        freq = torch.tensor([100_000 ** (-2 * i / D) for i in range(D // 2)])
        angle = torch.arange(T)[:, None] * freq
        turned = []
        for layer in (b.attn.c_q, b.attn.c_k):
            y = (x[0] @ layer.weight.T).view(T, -1, D)
            z = torch.complex(y[..., :D // 2], y[..., D // 2:]) * torch.polar(torch.ones_like(angle), -angle)[:, None]
            z = torch.cat([z.real, z.imag], dim=-1)
            turned.append(1.2 * z / z.square().mean(-1, keepdim=True).sqrt())
        found.append(turned)
    return found


@pytest.mark.parametrize('length', [2, 40, 100])
def test_attention_inputs_are_the_models_own(model, length):
    """Queries and keys agree with rotary as multiplication by complex numbers, the norm written out, and the factor 1.2."""
    ids = torch.randint(0, 250, (length,), generator=torch.Generator().manual_seed(3)).tolist()
    seen = V.attention_inputs(model, ids)
    assert [a.window for a in seen] == model.window_sizes
    with torch.no_grad():
        for a, (q, k) in zip(seen, queries_and_keys(model, ids), strict=True):
            torch.testing.assert_close(a.q, q, atol=2e-4, rtol=1e-3)
            torch.testing.assert_close(a.k, k, atol=2e-4, rtol=1e-3)


def brute_map(a, left):
    """Attention weights by three nested loops."""
    T, H, D = a.q.shape
    group, out = H // a.k.shape[1], torch.zeros(H, T, T)
    for h in range(H):
        for t in range(T):
            keys = [s for s in range(T) if s <= t and (left < 0 or t - s <= left)]
            scores = [math.exp(float(a.q[t, h] @ a.k[s, h // group]) / math.sqrt(D)) for s in keys]
            for s, e in zip(keys, scores): out[h, t, s] = e / sum(scores)
    return out


@pytest.mark.parametrize('kv', [1, 2, 4])
@pytest.mark.parametrize('window', [None, 0, 3])
def test_attention_map(tokenizer, fp32, kv, window):
    """Rows sum to one, nothing is read outside the window, heads read their own group's keys, and the result is the layer's."""
    model = tiny(tokenizer, n_kv_head=kv)
    ids = tokenizer.encode(TEXT)[:24]
    for a in V.attention_inputs(model, ids):
        weights = V.attention_map(a, window)
        left = a.window[0] if window is None else window
        torch.testing.assert_close(weights, brute_map(a, left), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:2]))
        if window is None:
            mixed = torch.einsum('hqk,khd->qhd', weights, a.v.repeat_interleave(4 // kv, dim=1))
            torch.testing.assert_close(mixed, a.out, atol=1e-4, rtol=1e-3)


def test_models_window_is_respected(model):
    """A row longer than the short window: zero beyond it in the short layers, not in the long one; a slider cannot widen a window."""
    ids = torch.randint(0, 250, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    model.window_sizes = [(40, 0), (128, 0), (128, 0)]
    a, b, _ = V.attention_inputs(model, ids)
    assert V.attention_map(a)[:, 150, :110].sum() == 0 and V.attention_map(a)[:, 150, 110] .min() > 0
    assert V.attention_map(b)[:, 150, :22].sum() == 0 and V.attention_map(b)[:, 150, 22].min() > 0
    torch.testing.assert_close(V.attention_map(a, 100), V.attention_map(a))


def test_watching_leaves_no_trace(model):
    """The spy is gone afterwards, also after an error, and the model computes the same before and after."""
    from nanochat.flash_attention import flash_attn
    real, ids = flash_attn.flash_attn_func, [1, 2, 3]
    before = model(torch.tensor([ids]))
    V.attention_inputs(model, ids)
    assert flash_attn.flash_attn_func is real and torch.equal(before, model(torch.tensor([ids])))
    with pytest.raises(Exception): V.attention_inputs(model, [10**6])
    assert flash_attn.flash_attn_func is real


def moved(explorer, **values):
    """Move each control through its values; nothing may fail, and the picture must change at least once."""
    pictures = {explorer.shown.data}
    for name, options in values.items():
        for v in options:
            explorer.set(**{name: v})
            assert explorer.error is None, (name, v, explorer.error)
            pictures.add(explorer.shown.data)
    assert len(pictures) > 1
    return explorer


def test_attention_explorer(model, tokenizer):
    e = moved(V.attention_explorer(model, tokenizer, TEXT), layer=[0, 2], head=[3, 1], position=[0, 5], window=[0, 4])
    assert e.shown.mime == 'image/png' and len(e.shown.data) < 100_000
    with pytest.raises(UserError, match='at least one token'): V.attention_explorer(model, tokenizer, '')
    assert V.attention_explorer(model, tokenizer, TEXT * 9).controls['position'].max == V.LABELS - 1


@pytest.mark.parametrize('depth, ratio', [(2, 12), (8, 12), (12, 20), (24, 12)])
def test_depth_row(depth, ratio):
    """Parameters by counting shapes by hand, FLOPs by the published formula, time and money by arithmetic."""
    row = V.depth_row(depth, ratio=ratio, gpu='a100', gpus=4, efficiency=.4, dollars_per_gpu_hour=2.5)
    C, V_ = -(-depth * 64 // 128) * 128, 32768
    ve_layers = (depth + 1) // 2
    assert (row.width, row.heads) == (C, C // 128)
    assert row.parameters == dict(transformer_matrices=depth * 12 * C * C + ve_layers * 12 * (C // 128), lm_head=V_ * C, wte=V_ * C, value_embeds=ve_layers * V_ * C, scalars=2 * depth + 24 + 2)
    assert sum(row.parameters.values()) == model_size(gpt_config(depth)).total
    n = row.parameters['transformer_matrices'] + row.parameters['lm_head']
    windows = [512 if i % 4 < 3 and i < depth - 1 else 2048 for i in range(depth)]
    assert row.flops_per_token == 6 * (n + 24) + sum(12 * C * w for w in windows)
    assert abs(row.tokens - ratio * n) <= row.batch and row.flops == row.flops_per_token * row.tokens
    assert math.isclose(row.hours * 3600 * 4 * .4 * PEAK_FLOPS['a100'], row.flops) and math.isclose(row.dollars, row.hours * 4 * 2.5)


def test_depth_explorer():
    e = moved(V.depth_explorer(12), depth=[2, 32, 20], tokens_per_parameter=[20.], gpu=['t4'], gpus=[1], efficiency=[.3], dollars_per_gpu_hour=[1.])
    row = V.depth_row(20, ratio=20., gpu='t4', gpus=1, efficiency=.3, dollars_per_gpu_hour=1.)
    assert V.human_hours(row.hours) in e.shown.data and f'{row.dollars:,.0f}' in e.shown.data
    e.set(efficiency=.1)
    assert V.human_hours(3 * row.hours) in e.shown.data
    assert [V.human_hours(h) for h in (.01, 3.04, 100)] == ['0.6 min', '3.04 h', '4.17 days']


@pytest.mark.parametrize('shape', [(16, 16), (12, 40), (40, 12)])
@pytest.mark.parametrize('method', [*V.CLASSICS, 'Polar Express'])
def test_singular_steps(method, shape):
    """Matrix iteration against the polynomial of each singular value, in float64 numpy."""
    x = V.skewed_matrix(*shape, decades=2, seed=1)
    found = V.singular_steps(x, method, 6)
    s = np.linalg.svd(x.numpy().astype(np.float64), compute_uv=False)
    s = s / np.sqrt((s**2).sum()) / (1.01 if method == 'Polar Express' else 1)
    for k in range(7):
        np.testing.assert_allclose(found[k], np.sort(np.abs(s))[::-1], atol=3e-3)
        if method == 'Polar Express' and k >= 5: continue
        a, b, c = V.POLAR_EXPRESS[k] if method == 'Polar Express' else V.CLASSICS[method]
        s = a * s + b * s**3 + c * s**5
    torch.testing.assert_close(V.scalar_steps(found[0], method, 6).abs().sort(dim=1, descending=True).values, found, atol=3e-3, rtol=0)


def test_classics_stay_at_one():
    """1 is a fixed point of the cubic and the quintic, with slope 0; the tuned one of 2024 gives that up."""
    one = torch.ones(1, dtype=torch.float64, requires_grad=True)
    for name, (a, b, c) in V.CLASSICS.items():
        y = a * one + b * one**3 + c * one**5
        slope = torch.autograd.grad(y.sum(), one)[0].item()
        assert (math.isclose(y.item(), 1) and abs(slope) < 1e-12) == (name != 'Muon of 2024')


def test_muon_stages_end_where_the_optimizer_does():
    """The last stage is the step that `MuonAdamW` takes."""
    from nanochat.optim import MuonAdamW
    p, rng = torch.nn.Parameter(torch.zeros(24, 8)), torch.Generator().manual_seed(0)
    grads = [torch.randn(24, 8, generator=rng) for _ in range(3)]
    optimizer = MuonAdamW([dict(kind='muon', params=[p], lr=.1, momentum=.9, beta2=.8)])
    for g in grads:
        before, p.grad = p.detach().clone(), g
        optimizer.step()
    update = (before - p.detach()) / (.1 * 3**.5)  # rows / cols = 3
    last = V.muon_stages(grads, momentum=.9, beta2=.8)['variance reduced']
    cos = F.cosine_similarity(update.flatten(), last.flatten(), dim=0)
    assert cos > .999 and math.isclose(update.norm(), last.norm(), rel_tol=.02)  # the optimizer's products may be in bf16


def test_singular_stepper():
    e = moved(V.singular_stepper(V.skewed_matrix(12, 20)), step=[0, 1, 5, 12])
    assert len(e.shown.data) < 100_000


# Evaluation

@pytest.fixture(scope='module')
def bundle(tmp_path_factory):
    texts = [f'def f{i}(value):\n    """Return the value plus {i} and nothing more."""\n    result_value = value + {i}\n    return result_value\n\n' * 3 for i in range(60)]
    folder = tmp_path_factory.mktemp('text')
    for i, t in enumerate(texts): (folder/f'{i}.txt').write_text(t)
    patch = pytest.MonkeyPatch()
    patch.setenv('NANOCHAT_BASE_DIR', str(tmp_path_factory.mktemp('base')))
    found = mini_bundle(prepare_corpus(folder, val_fraction=.5), items=6, least=4)
    found.tasks and found.items(found.tasks[0])
    patch.undo()
    return found


def test_dissection_agrees_with_the_evaluation(model, tokenizer, bundle):
    """Same prediction as `core_eval`, same mean losses, for every kind of task; token losses by one softmax at a time."""
    kinds = set()
    for task in bundle.tasks:
        data = bundle.items(task)
        kinds.add(task.kind)
        for i in range(min(3, len(data))):
            d = V.dissect(model, tokenizer, bundle, task, i)
            assert d.prediction == predict_one(i, model, tokenizer, data, 'cpu', task.meta)
            [rows] = item_rows([i], tokenizer, data, task.meta, None)
            plain = score_plainly(model, rows, 'cpu')
            np.testing.assert_allclose([c.mean for c in d.choices], [m for m, _ in plain], atol=1e-4)
            assert all(math.isnan(c.losses[0]) and len(c.losses) == len(c.tokens) == len(c.best) for c in d.choices)
            assert d.gold == (1 if task.kind == 'language_modeling' else data[i]['gold'])
            V.dissection_html(d)
    assert kinds == {'multiple_choice', 'schema', 'language_modeling'}


def test_token_losses(model):
    """The loss of token t is minus the logarithm of the softmax at t - 1, computed one position at a time on the text cut there."""
    ids = [5, 80, 81]
    for other in (120, 7):  # now and then what the model itself would write
        with torch.no_grad(): ids += [int(model(torch.tensor([ids]))[0, -1].argmax()), other]
    ids = torch.tensor(ids)
    losses, best = V.token_losses(model, ids)
    for t in range(1, len(ids)):
        with torch.no_grad(): z = model(ids[None, :t])[0, -1].double()
        assert math.isclose(losses[t], -(z[ids[t]] - z.exp().sum().log()).item(), abs_tol=1e-3)
        assert bool(best[t]) == (int(z.argmax()) == ids[t])
    assert not best[0] and best[3] and best[5]


def test_dissection_html(bundle):
    """Text is escaped, the winner and the right choice are marked, the shared beginning appears once."""
    c = lambda loss, end: V.Choice(['<bos>', '·x', '·<b>', '·y'], [math.nan, 1., loss, loss], [False, True, True, False], 2, end)
    d = V.Dissection('t&t', 'multiple_choice', [c(2., 4), c(1., 4)], 2, 1, 0)
    page = V.dissection_html(d)
    assert 't&amp;t' in page and '<b>·y' not in page and '·&lt;b&gt;' in page and 'wrong' in page
    assert page.count('chosen') == 1 and page.count('right') == 1 and page.count('·x') == 1
    assert page.index('right') < page.index('chosen')
    assert c(2., 4).mean == 2 and c(2., 3).mean == 2


def test_core_dissector(model, tokenizer, bundle):
    moved(V.core_dissector(model, tokenizer, bundle, items=6), task=[t.label for t in bundle.tasks], item=[0, 3, 5])


# One step

def test_step_costs():
    """Forward and backward from FLOPs, bytes by the ring, Muon's products by hand for one shape."""
    a = V.StepAssumptions(efficiency=.4, link='PCIe 5 x16', link_efficiency=.5, device_batch_size=8)
    config, c = gpt_config(12), V.step_costs(12, 4, a)
    seconds = model_size(config).flops_per_token * 8 * 2048 / (.4 * 989e12)
    assert math.isclose(c.forward + c.backward, seconds) and math.isclose(c.backward, 2 * c.forward)
    n = GPT(config).num_scaling_params()
    nbytes = 4 * (n['transformer_matrices'] + n['lm_head'] + n['scalars']) + 2 * (n['wte'] + n['value_embeds'])
    assert math.isclose(c.reduce, nbytes * 3 / 4 / (63e9 * .5)) and c.gather == c.reduce
    assert c.batch == c.micro_steps * 4 * 8 * 2048
    C = 768
    square, wide = 2 * C**3 * 3, 2 * (4 * C * C * C) * 2 + 2 * C**3
    gates = 6 * (2 * 6 * 6 * 12 * 2 + 2 * 6**3)  # ve_gate: 6 heads x 12 channels in every second layer
    assert V.muon_flops(config) == 5 * (12 * (4 * square + 2 * wide) + gates)
    assert V.step_costs(12, 1).reduce == 0


@pytest.mark.parametrize('overlap', [False, True])
@pytest.mark.parametrize('c', [V.StepCosts(3, 1., 2., .5, .3, .5, 1., 1), V.StepCosts(1, 1., 2., 50., .3, 50., 1., 1), V.StepCosts(2, 1., 2., 0., .3, 0., 1., 1)], ids=['fast wire', 'slow wire', 'one rank'])
def test_step_spans(c, overlap):
    """Each stream does one thing at a time, in an order that could happen, and nothing is lost."""
    spans = V.step_spans(c, overlap, groups=5)
    for stream in ('compute', 'network'):
        mine = sorted((s for s in spans if s.stream == stream), key=lambda s: s.start)
        assert all(b.start >= a.end - 1e-9 for a, b in zip(mine, mine[1:]))
    length = lambda name: sum(s.end - s.start for s in spans if s.name == name)
    for name, seconds in (('forward', c.micro_steps * c.forward), ('backward', c.micro_steps * c.backward), ('reduce-scatter', c.reduce), ('optimizer', c.optimizer), ('all-gather', c.gather)):
        assert math.isclose(length(name), seconds, abs_tol=1e-9)
    of = lambda name: sorted((s for s in spans if s.name == name), key=lambda s: s.start)
    for r, o in zip(of('reduce-scatter'), of('optimizer')): assert o.start >= r.end - 1e-9
    for o, g in zip(of('optimizer'), of('all-gather')): assert g.start >= o.end - 1e-9
    assert min([s.start for s in of('optimizer')]) >= of('backward')[-1].end - 1e-9
    end, serial = max(s.end for s in spans), c.micro_steps * (c.forward + c.backward) + c.reduce + c.optimizer + c.gather
    assert math.isclose(end, serial) if not overlap else end <= serial + 1e-9
    assert end >= max(serial - c.reduce - c.gather, c.reduce + c.gather) - 1e-9


def test_step_timeline():
    e = moved(V.step_timeline(12, 2), depth=[8, 24], link=list(V.LINKS), rows_per_GPU=[4], efficiency=[.2], overlap=[False], ranks=[1, 8])  # eight lanes take long to draw
    assert len(e.shown.data) < 100_000


def test_measured_step_is_the_unsharded_one(fp32):
    """Two processes that shard gradients and optimizer leave, both, the model that one process computes from both batches."""
    toy = V.ToyStep(depth=1, vocab_size=128, sequence_len=32, rows=2)
    spans, params = V.measured_step(toy)
    assert {s.rank for s in spans} == {0, 1} and {s.name for s in spans} == set(V.STEP_COLORS)
    assert all(s.end > s.start >= 0 for s in spans)
    assert all(torch.equal(a, b) for a, b in zip(*params))
    start = list(toy.model().parameters())
    whole = V.unsharded_step(toy)
    assert max((a - b).abs().max().item() for a, b in zip(start, whole)) > 5e-4, 'the step moves something'
    for a, b in zip(whole, params[0]): torch.testing.assert_close(a.detach(), b, atol=2e-5, rtol=0)


@pytest.mark.parametrize('world', [1, 2, 3])
def test_flat(world):
    parts = [torch.randn(3, 5), torch.randn(7), torch.randn(2, 2).bfloat16()]
    x = V.flatten_all(parts, world)
    assert len(x) % world == 0 and len(x) - 26 < world and not x[26:].any()
    again = [torch.zeros_like(p) for p in parts]
    V.unflatten_into(x, again)
    assert all(torch.equal(a, b) for a, b in zip(parts, again))


def test_tables_put_numbers_right_and_words_left():
    """Long words wrap; a column is one of numbers only if every cell begins like one, marks around it left aside."""
    from nanochat.viz_model import column_style
    style = lambda *cells: column_style(cells)
    assert 'text-align:right' in style('1.2M', '<b>-3</b>', 'off', '3,779 tokens/s') and 'text-align:left' in style('12', 'twelve') and 'text-align:left' in style('nano')
    assert 'white-space:normal' in style('word ' * 12) and 'white-space:nowrap' in style('word')
