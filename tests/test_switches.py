"""The configuration's switches, every combination with and without grouped keys: what is off is gone from parameters, keys, groups and counts, and everything still runs."""
import dataclasses
import itertools
import math

import pytest
import torch

from nanochat.checkpoint_manager import build_model, init_run, run_dir, save_checkpoint
from nanochat.common import UserError
from nanochat.engine import Engine, ForwardRunner, KVCache, Scheduler
from nanochat.gpt import GPT, GPTConfig, apply_rotary, rotate_and_norm
from nanochat.inference import CachedGPT
from nanochat.tokenizer import RustBPETokenizer
from test_engine import SMALL, random_gpt
from test_inference import cap

SHAPE = dict(sequence_len=64, vocab_size=40, n_layer=3, n_head=2, n_embd=32, window_pattern='SL')
NAMES = 'value_embeds', 'smear', 'backout', 'layer_scalars'
PARTS = dict(value_embeds={'value_embeds.0.weight', 'value_embeds.2.weight', *(f'transformer.h.{i}.attn.ve_gate.weight' for i in (0, 2))},
             smear={'smear_gate.weight', 'smear_lambda'}, backout={'backout_lambda'}, layer_scalars={'resid_lambdas', 'x0_lambdas'})
CASES = [(dict(zip(NAMES, on)), kv) for on in itertools.product((True, False), repeat=4) for kv in (2, 1)]
every = pytest.mark.parametrize('on, kv', CASES, ids=[''.join(n[0] for n in NAMES if on[n]) + f'-kv{kv}' for on, kv in CASES])
TEXT = torch.randint(0, 40, (2, 150), generator=torch.Generator().manual_seed(1))  # past S's window, and past the training length
NONE = dict.fromkeys(NAMES, False)


@pytest.fixture(autouse=True)
def exact(fp32): torch.manual_seed(0)


@every
def test_a_part_that_is_off_leaves_nothing(on, kv):
    model, full = GPT(GPTConfig(**SHAPE, n_kv_head=kv, **on)), GPT(GPTConfig(**SHAPE, n_kv_head=kv))
    gone = set().union(*(PARTS[n] for n in NAMES if not on[n]))
    assert set(full.state_dict()) - set(model.state_dict()) == gone and set(model.state_dict()) <= set(full.state_dict())
    sizes = {k: v.numel() for k, v in full.state_dict().items()}
    counts, whole = model.num_scaling_params(), full.num_scaling_params()
    assert whole['total'] - counts['total'] == sum(sizes[k] for k in gone)
    assert counts['value_embeds'] == (whole['value_embeds'] if on['value_embeds'] else 0) and sum(counts.values()) == 2 * counts['total']
    assert full.estimate_flops() - model.estimate_flops() == 6 * sum(sizes[k] for k in gone if 'gate' in k)
    groups = model.setup_optimizer().param_groups
    assert all(g['params'] for g in groups) and sum(p.numel() for g in groups for p in g['params']) == counts['total']


@every
def test_training_moves_every_parameter(on, kv):
    model = random_gpt(**SHAPE, n_kv_head=kv, **on).train()
    optimizer, before = model.setup_optimizer(), {n: p.detach().clone() for n, p in model.named_parameters()}
    loss = model(TEXT[:, :60], TEXT[:, 1:61])
    loss.backward()
    optimizer.step()
    assert math.isfinite(loss.item()) and all(p.isfinite().all() and not p.equal(before[n]) for n, p in model.named_parameters())
    fresh = GPT(model.config)
    fresh.to_empty(device='cpu')
    fresh.init_weights()
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert fresh(TEXT[:, :60], TEXT[:, 1:61]).equal(model(TEXT[:, :60], TEXT[:, 1:61]))


@every
@torch.inference_mode()
def test_cached_equals_uncached(on, kv):
    """The plain cache in uneven pieces; then prompts of two lengths admitted to slots that decode together, through ForwardRunner and the ring caches."""
    model = random_gpt(**SHAPE, n_kv_head=kv, **on)
    full = model(TEXT)
    cache = KVCache(2, kv, 150, 16, 3, 'cpu', torch.float32)
    pieces = [model(t, kv_cache=cache) for t in TEXT.split([70, 1, 2, 76, 1], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), full, atol=1e-4, rtol=1e-4)
    for run, final in ((ForwardRunner(model), lambda z: z), (CachedGPT(model), cap)):
        slots = run.slots(2, 150)
        for row, n in enumerate((130, 5)):
            alone = run.scratch(1, n)
            torch.testing.assert_close(final(run.read(TEXT[row:row + 1, :n], alone))[0], full[row, n - 1], atol=1e-3, rtol=1e-4)
            slots.admit(alone)
        for i in range(4):
            z = run.step(TEXT[[0, 1], [130 + i, 5 + i]], slots, 131 + i)
            torch.testing.assert_close(final(z), full[[0, 1], [130 + i, 5 + i]], atol=1e-3, rtol=1e-4)


@every
def test_engine_and_scheduler(on, kv):
    model = random_gpt(**SHAPE, n_kv_head=kv, **on)
    engine, prompts = Engine(model, SMALL), [[31, *range(n)] for n in (1, 9)]
    expected = [ids[0] for ids, _ in engine.generate_many(prompts, 12, temperature=0, keep_end=True)]
    slow = [p + list(model.generate(p, 1, temperature=0)) for p in prompts]
    assert [e[:len(s)] for e, s in zip(expected, slow)] == slow
    with Scheduler(engine, slots=2) as s: got = [[t for column, _ in s.generate(p, max_tokens=12, temperature=0) for t in column] for p in prompts]
    assert [p + g for p, g in zip(prompts, got)] == expected


@pytest.mark.parametrize('on, kv', [({**NONE, n: True}, 1) for n in NAMES] + [(NONE, 1), (NONE, 2)])
@pytest.mark.parametrize('weights, bound', [('compute', .03), ('int8', .05)])
@torch.inference_mode()
def test_bf16_and_int8(monkeypatch, on, kv, weights, bound):
    """Within rounding of the fp32 model: relative error of the logits of reading and of stepping."""
    shape = SHAPE | dict(n_embd=64, vocab_size=64, n_kv_head=kv) | on
    exact = random_gpt(**shape)(TEXT[:1, :64])[0]
    monkeypatch.setenv('NANOCHAT_DTYPE', 'bfloat16')
    run = CachedGPT(random_gpt(**shape), weights)
    cache, alone = run.slots(1, 64), run.scratch(1, 60)
    got = [cap(run.read(TEXT[:1, :60], alone))[0]]
    cache.admit(alone)
    got += [cap(run.step(TEXT[0, i:i + 1], cache, i + 1))[0] for i in range(60, 64)]
    assert ((torch.stack(got) - exact[59:]).norm() / exact[59:].norm()) < bound


@pytest.fixture(scope='module')
def tokenizer(): return RustBPETokenizer.train_from_iterator(['the quick brown fox jumps over the lazy dog'] * 20, 300)


@pytest.mark.parametrize('on', [NONE, {**NONE, 'smear': True}, {'smear': False, 'qk_scale': 1.0}])
def test_checkpoints_keep_the_switches(on, tokenizer):
    model = random_gpt(**(SHAPE | dict(vocab_size=320)), **on)
    run = init_run(run_dir('base', 'd3'), {}, tokenizer)
    save_checkpoint(run, 5, model, model.setup_optimizer(), meta=dict(model_config=dataclasses.asdict(model.config)))
    again, _, meta = build_model(run, 5, torch.device('cpu'))
    assert again.config == model.config and all(meta['model_config'][k] == v for k, v in on.items())
    assert again(TEXT).equal(model(TEXT))


def test_a_meta_without_the_fields_is_all_on(tokenizer):
    model = random_gpt(**(SHAPE | dict(vocab_size=320)))
    run = init_run(run_dir('base', 'd3'), {}, tokenizer)
    old = {k: v for k, v in dataclasses.asdict(model.config).items() if k not in (*NAMES, 'qk_scale')}
    save_checkpoint(run, 5, model, meta=dict(model_config=old))
    again = build_model(run, 5, torch.device('cpu'))[0]
    assert all(getattr(again.config, n) for n in NAMES) and again.config.qk_scale == 1.2 and again(TEXT).equal(model(TEXT))


@pytest.mark.parametrize('scale', [1.0, 0.5])
def test_qk_scale(scale):
    """Queries and keys each carry the factor, in the forward pass, its gradient, and both caches."""
    shape = SHAPE | dict(n_kv_head=1, layer_scalars=False)
    model, usual = random_gpt(**shape, qk_scale=scale), random_gpt(**shape)
    assert (model(TEXT) - usual(TEXT)).abs().max() > .01
    x, up = torch.randn(2, 2, 9, 2, 16)
    results = []
    for f in (lambda t: rotate_and_norm(t, model.cos[:, :9, :, :8], model.sin[:, :9, :, :8], scale), lambda t: torch.nn.functional.rms_norm(apply_rotary(t, model.cos[:, :9, :, :8], model.sin[:, :9, :, :8]), (16,)) * scale):
        t = x.clone().requires_grad_()
        y = f(t)
        results.append((y.detach(), torch.autograd.grad(y, t, up)[0]))
    torch.testing.assert_close(*results)
    with torch.inference_mode():
        run, cache = CachedGPT(model), KVCache(1, 1, 30, 16, 3, 'cpu', torch.float32)
        torch.testing.assert_close(cap(run.read(TEXT[:1, :30], run.scratch(1, 30))), model(TEXT[:1, :30])[:, -1], atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(model(TEXT[:1, :30], kv_cache=cache), model(TEXT[:1, :30]), atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_rope_base():
    """The rotary tables of forward pass and caches, before and after initialisation, turn by base^(-i / half)."""
    shape = SHAPE | dict(n_kv_head=1)
    model = random_gpt(**shape, rope_base=10_000)
    angle = 7 * 10_000**-(torch.arange(8) / 8)
    torch.testing.assert_close(model.cos[0, 7, 0], angle.cos())
    torch.testing.assert_close(random_gpt(**shape).sin[0, 7, 0], (7 * 100_000**-(torch.arange(8) / 8)).sin())
    run = CachedGPT(model)
    torch.testing.assert_close(cap(run.read(TEXT[:1, :30], run.scratch(1, 30))), model(TEXT[:1, :30])[:, -1], atol=1e-3, rtol=1e-4)
    assert (model(TEXT) - random_gpt(**shape)(TEXT)).abs().max() > .01


@pytest.mark.parametrize('wrong, message', [(dict(n_embd=20), 'smear reads 24'), (dict(n_embd=8, smear=False), 'value embeddings reads 12'), (dict(qk_scale=0), 'qk_scale 0'), (dict(rope_base=1), 'rope_base 1')])
def test_shapes_are_checked_for_the_parts_there_are(wrong, message):
    with pytest.raises(UserError, match=message): GPTConfig(**{**SHAPE, 'n_kv_head': 2, **wrong}).check()
    GPTConfig(**{**SHAPE, 'n_kv_head': 2, 'n_embd': 8, **NONE}).check()
