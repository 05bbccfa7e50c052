"""The depth dial: shapes, laws, schedules, batch advice, presets and the memory estimate."""
import itertools, json, math, re, subprocess, sys

import pytest
import torch

from nanochat import scaling
from nanochat.common import UserError
from nanochat.gpt import GPT
from nanochat.scaling import (PRESETS, apply_schedule, check_batch, estimate_memory, get_preset, gpt_config, lr_multiplier, model_size,
                              muon_momentum, phase_steps, plan_training, weight_decay_multiplier)
from warm_python import warm_python


# --- shapes and counts ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('depth, width, heads', [(1, 128, 1), (2, 128, 1), (3, 256, 2), (4, 256, 2), (12, 768, 6), (13, 896, 7), (20, 1280, 10), (24, 1536, 12), (26, 1664, 13)])
def test_width_follows_depth(depth, width, heads):
    c = gpt_config(depth)
    assert (c.n_layer, c.n_embd, c.n_head, c.n_kv_head, c.vocab_size, c.sequence_len) == (depth, width, heads, heads, 32768, 2048)


@pytest.mark.parametrize('depth', [0, -3])
def test_depth_must_be_positive(depth):
    with pytest.raises(UserError, match='--depth 1'): gpt_config(depth)


def test_heads_that_do_not_share_evenly_are_refused():
    with pytest.raises(UserError, match='n_kv_head'): gpt_config(12, n_kv_head=4)


@pytest.mark.parametrize('depth', [1, 4, 12, 20])
def test_counts_equal_a_formula(depth):
    config = gpt_config(depth, vocab_size=1000)
    C, V, heads, gated = config.n_embd, 1024, config.n_head, -(-depth // 2)  # vocabulary padded to 64; every second layer has a value embedding
    size = model_size(config)
    assert size.scaling == depth * 12 * C * C + gated * 12 * heads + V * C
    assert size.total == size.scaling + V * C * (1 + gated) + 2 * depth + 24 + 2
    short = sum(1 for i in range(depth - 1) if 'SSSL'[i % 4] == 'S')
    assert size.flops_per_token == 6 * (size.scaling + 24) + 12 * C * (512 * short + 2048 * (depth - short))


def test_counts_of_the_saved_reference(shared_data):
    reference = json.loads((shared_data/'reference'/'reference.json').read_text())
    config = gpt_config(4, 512, 256, head_dim=16, aspect_ratio=16, n_kv_head=2)
    assert model_size(config).flops_per_token == reference['flops_per_token']
    assert model_size(config).total == reference['scaling_params']['total']


def test_counting_takes_no_memory():
    assert all(p.is_meta for p in GPT(gpt_config(26)).parameters())


# --- the laws ---------------------------------------------------------------------------------------------------------

def test_depth_12_is_the_reference_point():
    plan = plan_training(gpt_config(12), device_batch_size=32, world_size=8)
    assert (plan.total_batch_size, plan.lr_scale, plan.weight_decay, plan.grad_accum_steps) == (2**19, 1.0, 0.28, 1)
    assert plan.num_iterations == 12 * model_size(gpt_config(12)).scaling // 2**19
    assert plan.optimizer_args() == dict(unembedding_lr=0.008, embedding_lr=0.3, matrix_lr=0.02, scalar_lr=0.5, weight_decay=0.28)


@pytest.mark.parametrize('depth, batch', [(8, 2**18), (16, 2**19), (20, 2**20), (24, 2**20), (26, 2**20)])
def test_laws_by_hand(depth, batch):
    plan = plan_training(gpt_config(depth), device_batch_size=8)
    N, N12 = (model_size(gpt_config(d)).scaling for d in (depth, 12))
    assert plan.total_batch_size == batch == 2 ** round(math.log2(2**19 * (N / N12) ** 0.383))
    assert plan.lr_scale == pytest.approx(math.sqrt(batch / 2**19))
    assert plan.weight_decay == pytest.approx(0.28 * math.sqrt(batch / 2**19) * N12 / N)
    assert plan.num_iterations == 12 * N // batch and abs(plan.ratio - 12) < 0.01


def test_length_explicit_before_flops_before_ratio():
    make = lambda **kw: plan_training(gpt_config(12), device_batch_size=32, **kw)
    assert make(num_iterations=7, target_flops=1e18).num_iterations == 7
    per_step = model_size(gpt_config(12)).flops_per_token * 2**19
    assert make(target_flops=1e18, target_param_data_ratio=5).num_iterations == round(1e18 / per_step)
    assert make(target_param_data_ratio=6).num_iterations == pytest.approx(make().num_iterations / 2, abs=1)
    assert make(num_iterations=7).weight_decay == make().weight_decay  # stopping early does not change the recipe
    assert make(target_flops=1.0).num_iterations == 1


@pytest.mark.parametrize('wrong', [dict(num_iterations=0), dict(num_iterations=-1), dict(target_flops=0), dict(target_flops=float('nan')),
                                   dict(target_param_data_ratio=0), dict(recipe='mine'), dict(device_batch_size=0), dict(total_batch_size=1000)])
def test_impossible_plans_are_refused(wrong):
    with pytest.raises(UserError): plan_training(gpt_config(2, 512, 128), **(dict(device_batch_size=4) | wrong))


def test_a_derived_batch_always_divides():
    for rows, world in itertools.product((1, 3, 7, 16, 100), (1, 3, 8)):
        for depth in (2, 7):
            plan = plan_training(gpt_config(depth, 512, 128), device_batch_size=rows, world_size=world, num_iterations=10)
            assert plan.total_batch_size == plan.grad_accum_steps * rows * 128 * world


def test_tiny_models_have_their_own_recipe_and_every_constant_is_a_parameter():
    config = gpt_config(4, 4096, 512)
    plan = plan_training(config, device_batch_size=8, num_iterations=200)
    assert plan.recipe == 'tiny' and plan.total_batch_size == scaling.TINY['total_batch_size']
    assert plan.warmup_steps == math.ceil(scaling.TINY['warmup_fraction'] * 200)
    assert plan_training(gpt_config(7, 4096, 512), device_batch_size=8).recipe == 'reference'
    assert plan_training(config, device_batch_size=8, recipe='reference').recipe == 'reference'
    own = dict(lr_scale=0.3, weight_decay=0.7, warmdown_ratio=0.2, final_lr_frac=0.5, warmup_steps=3)
    changed = plan_training(config, device_batch_size=8, num_iterations=200, **own)
    assert all(getattr(changed, k) == v for k, v in own.items())
    assert plan_training(config, device_batch_size=8, num_iterations=200, warmup_fraction=0.5).warmup_steps == 100
    assert plan_training(config, device_batch_size=8, total_batch_size=65536).grad_accum_steps == 16


# --- schedules --------------------------------------------------------------------------------------------------------

def test_schedules_of_a_long_run():
    n = 5000
    start = n - 3250
    for step, value in ((0, 1 / 40), (19, 0.5), (39, 1.0), (40, 1.0), (start, 1.0), (start + 1625, 0.525), (n, 0.05)):
        assert lr_multiplier(step, n) == pytest.approx(value), step
    for step, value in ((0, 0.85), (200, 0.91), (400, 0.97), (start, 0.97), (start + 1625, 0.935), (n, 0.90)):
        assert muon_momentum(step, n) == pytest.approx(value), step
    for step, value in ((0, 1.0), (n // 2, 0.5), (n, 0.0)):
        assert weight_decay_multiplier(step, n) == pytest.approx(value), step


@pytest.mark.parametrize('n', [1, 2, 3, 5, 10, 39, 40, 41, 100, 399, 400, 1000, 1143, 2000])
@pytest.mark.parametrize('fall', [0.0, 0.3, 0.65, 1.0])
def test_schedules_of_any_length_are_sane(n, fall):
    rates = [lr_multiplier(t, n, warmdown_ratio=fall) for t in range(n + 2)]
    momenta = [muon_momentum(t, n, warmdown_ratio=fall) for t in range(n + 2)]
    decays = [weight_decay_multiplier(t, n) for t in range(n + 2)]
    assert all(0 < r <= 1 for r in rates) and all(0.85 <= m <= 0.97 for m in momenta) and all(0 <= d <= 1 for d in decays)
    warmup, down = phase_steps(n, warmdown_ratio=fall)
    assert warmup <= max(1, math.ceil(n / 5)) and warmup + down <= n
    top = rates.index(max(rates))
    assert rates[:top + 1] == sorted(rates[:top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)
    peak = momenta.index(max(momenta))
    assert momenta[:peak + 1] == sorted(momenta[:peak + 1]) and momenta[peak:] == sorted(momenta[peak:], reverse=True)
    if n >= 100: assert max(abs(a - b) for a, b in zip(rates, rates[1:])) <= 0.11 and max(rates) == 1.0


def test_apply_schedule_writes_what_the_plan_says():
    plan = plan_training(gpt_config(2, 512, 128), device_batch_size=4, num_iterations=100, weight_decay=0.2)
    optimizer = GPT(gpt_config(2, 512, 128)).setup_optimizer(**plan.optimizer_args())
    fixed = [g['weight_decay'] for g in optimizer.param_groups if g['kind'] == 'adamw']
    for step in (0, 3, 50, 100):
        now = apply_schedule(optimizer, plan, step)
        for g in optimizer.param_groups:
            assert g['lr'] == g['initial_lr'] * now['lr']
            if g['kind'] == 'muon': assert (g['momentum'], g['weight_decay']) == (now['momentum'], now['weight_decay'])
        assert [g['weight_decay'] for g in optimizer.param_groups if g['kind'] == 'adamw'] == fixed
    assert now['lr'] == pytest.approx(plan.final_lr_frac) and now['weight_decay'] == pytest.approx(0)


# --- batches that divide ----------------------------------------------------------------------------------------------

def test_the_sentence_of_the_design():
    with pytest.raises(UserError) as e: check_batch(65536, 24, 512)
    assert str(e.value) == 'device_batch_size 24 x seq_len 512 does not divide total_batch_size 65536; use --device-batch-size 16 or 32'


def test_every_suggestion_works():
    refused = 0
    for total, rows, length, world in itertools.product((1, 1000, 4096, 65536, 2**19, 3 * 2**15), (1, 3, 24, 31, 48, 500), (100, 512, 2048), (1, 3, 8)):
        try:
            assert check_batch(total, rows, length, world) * rows * length * world == total
            continue
        except UserError as e: message = str(e)
        refused += 1
        flag, values = re.search(r'use --(device-batch-size|total-batch-size) (.+)$', message).groups()
        for value in map(int, values.split(' or ')):
            assert check_batch(*((total, value) if flag.startswith('device') else (value, rows)), length, world) >= 1, message
    assert refused > 100


@pytest.mark.parametrize('args', [(0, 1, 1, 1), (1024, 0, 512, 1), (1024, -2, 512, 1), (1024, 2, 0, 1)])
def test_nonsense_batches_are_sentences(args):
    with pytest.raises(UserError, match='at least 1'): check_batch(*args)


# --- hardware, hours and money -------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name, key', [('NVIDIA H100 80GB HBM3', 'h100'), ('NVIDIA H100 PCIe', 'h100pcie'), ('NVIDIA H200', 'h200'), ('NVIDIA A100-SXM4-80GB', 'a100'), ('Tesla T4', 't4'),
                                       ('NVIDIA GeForce RTX 4090', 'rtx4090'), ('NVIDIA GeForce RTX 4090 D', None), ('NVIDIA GeForce RTX 4070 Ti SUPER', None), ('Quadro P1000', None), ('', None),
                                       ('NVIDIA H100 80GB HBM3 MIG 1g.10gb', None), ('NVIDIA A100-SXM4-40GB MIG 3g.20gb', None)])
def test_a_gpu_by_its_full_name(name, key):
    assert scaling.gpu_key(name) == key


def test_hours_and_dollars():
    eight, plan = scaling.rented('h100', 8, price=20), plan_training(gpt_config(12), device_batch_size=16)
    assert eight.hours(plan.flops) == pytest.approx(plan.flops / (989e12 * 8 * 0.5) / 3600) == pytest.approx(scaling.estimate_hours(plan, 'h100', 8))
    assert eight.dollars(3) == 60 and scaling.rented('h100', 2).dollars(1) == 2 * scaling.GPUS['h100'][1]
    unknown = scaling.Hardware('a new card', 1, None, 80 * 2**30, 2.0)
    assert unknown.hours(1e18) is None and unknown.dollars(unknown.hours(1e18)) is None
    assert set(scaling.GPUS) == set(scaling.PEAK_FLOPS)
    for args in (('h1000',), ('h100', 0)):
        with pytest.raises(UserError): scaling.rented(*args)


def test_processes_share_the_optimizer_s_state_and_nothing_else():
    alone, eight = (estimate_memory(gpt_config(12), 8, world_size=w) for w in (1, 8))
    assert eight['optimizer'] == alone['optimizer'] // 8 and {k for k in alone if alone[k] != eight[k]} == {'optimizer', 'total'}
    config = gpt_config(24)
    plan = plan_training(config, device_batch_size=16, world_size=8)
    assert scaling.run_cost(config, plan, scaling.rented('h100', 8), 16).memory < scaling.run_cost(config, plan, scaling.rented('h100'), 16).memory
    assert scaling.fitting_rows(config, 60 * 2**30, world_size=8) >= scaling.fitting_rows(config, 60 * 2**30)


def test_the_cost_of_a_run():
    config = gpt_config(20)
    plan = plan_training(config, device_batch_size=16)
    cost = scaling.run_cost(config, plan, scaling.rented('h100'), 16)
    assert cost.fits and cost.memory == estimate_memory(config, 16)['total'] and cost.hours == scaling.estimate_hours(plan) and cost.dollars == cost.hours * scaling.GPUS['h100'][1]
    assert scaling.run_cost(config, plan, scaling.rented('h100'), 16, fp8=True).hours == pytest.approx(cost.hours / scaling.FP8_SPEEDUP)
    assert not scaling.run_cost(config, plan, scaling.rented('rtx3060'), 16).fits


@pytest.mark.parametrize('gib', [12, 24, 80])
def test_rows_that_fit_do_and_twice_as_many_do_not(gib):
    for depth in (8, 12, 20):
        rows, need = scaling.fitting_rows(gpt_config(depth), gib * 2**30), lambda n: estimate_memory(gpt_config(depth), n)['total'] / 2**30
        assert (not rows or need(rows) <= .9 * gib) and (rows == 128 or need(max(1, 2 * rows)) > .9 * gib)


def test_parts_of_the_model_can_be_left_out():
    assert model_size(gpt_config(4, value_embeds=False)).total < model_size(gpt_config(4)).total and gpt_config(4, qk_scale=1.0).qk_scale == 1.0


# --- presets and memory -----------------------------------------------------------------------------------------------

def test_presets_plan_and_fit():
    assert set(PRESETS) == {'tiny-cpu', 'laptop', 't4-16g', 'rtx-12g', 'rtx-24g', 'a100-80g', 'h100-80g', 'h100x8'}
    for name, preset in PRESETS.items():
        plan = preset.plan()
        assert plan.num_iterations > 10 and (preset.ratio is None) != (preset.minutes is None), name
        dtype = torch.float32 if name == 't4-16g' else torch.bfloat16
        assert estimate_memory(preset.config, preset.device_batch_size, dtype)['total'] < 0.9 * preset.memory_gib * 2**30, name
        if preset.gpus == 0: assert preset.window_pattern == 'L'
    assert get_preset('h100x8').plan(num_iterations=5).num_iterations == 5


def test_unknown_preset_lists_the_known_ones():
    with pytest.raises(UserError) as e: get_preset('h200')
    assert all(name in str(e.value) for name in PRESETS)


def test_memory_grows_as_it_should():
    small, large = (estimate_memory(gpt_config(12), rows) for rows in (4, 8))
    assert large['activations'] == 2 * small['activations'] and large['parameters'] == small['parameters']
    assert estimate_memory(gpt_config(12), 4, training=False)['total'] < small['total'] / 4


PROBE = '''
import torch
from nanochat.common import peak_memory_bytes as peak
from nanochat.gpt import GPT
from nanochat.scaling import gpt_config
def train(config, rows, steps):
    model = GPT(config); model.to_empty(device='cpu'); model.init_weights()
    optimizer = model.setup_optimizer()
    for _ in range(steps):
        x = torch.randint(config.vocab_size, (rows, config.sequence_len))
        model(x, x).backward(); optimizer.step(); optimizer.zero_grad()
train(gpt_config(1, 512, 128), 1, 1)
before = peak()
train(gpt_config(4, 4096, 512, window_pattern='L'), 2, 2)
print(peak() - before)
'''


@pytest.mark.skipif(sys.platform != 'linux', reason='measured on Linux only')
def test_estimate_is_within_a_factor_of_two_of_a_real_step():
    env = warm_python().environ(NANOCHAT_DTYPE='float32')
    out = subprocess.run([warm_python().python, '-c', PROBE], env=env, capture_output=True, text=True, check=True).stdout
    estimate = estimate_memory(gpt_config(4, 4096, 512, window_pattern='L'), 2, torch.float32)['total']
    assert 0.5 < estimate / int(out) < 2, f'estimated {estimate / 2**20:.0f} MiB, measured {int(out) / 2**20:.0f} MiB'
