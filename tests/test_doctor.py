"""What a machine has, what is advised, and plans: on machines that are described here, and on this one with its tools replaced."""
import dataclasses, json, os, subprocess, sys
from pathlib import Path

import pytest
import torch

from nanochat.common import UserError
from nanochat.scaling import PRESETS, estimate_memory, gpt_config, plan_training, rented, run_cost
from nanochat.scripts import doctor as d
from nanochat.scripts.doctor import DoctorConfig, Gpu, Machine, Needs, PlanConfig, lacking, make_plan, plan_run, preset_for, slow, this_machine, what_to_type

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30
CPU = Machine('Linux x86_64', '3.12.0', 'A CPU', ['AVX512-BF16', 'AVX2'], 8, 32 * GIB, 30 * GIB, int(3e11), torch='2.13.0+cpu', build='cpu', network={})
BOX = dataclasses.replace(CPU, gpus=[Gpu('NVIDIA H100 80GB HBM3', 79.6, 9.0)] * 8, sees_gpus=8, cores=96, ram=900 * GIB, ram_free=800 * GIB, build='cuda 13.0', attention=['fa3', 'torch-fa2', 'flex', 'sdpa'])
SPEEDRUN = PlanConfig(script='speedrun', depth='24', target_param_data_ratio=8, device_batch_size=16, gpus=8, hardware='h100', stages='climbmix=170,tasks,bundle,tokenizer=2e9,train,core,sft,chat,report')


def card(name, gib, capability): return dataclasses.replace(BOX, gpus=[Gpu(name, gib, capability)], sees_gpus=1)


# --- the machine ------------------------------------------------------------------------------------------------------

def test_this_machine_is_described():
    m = this_machine()
    assert m.cpu and 0 < m.cores <= os.cpu_count() and 0 < m.ram_free <= m.ram and m.disk_free > 0 and m.torch and set(m.missing) >= {'train', 'serve', 'course', 'dev', 'gpu'}
    assert json.dumps(dataclasses.asdict(m))


def test_attention_is_what_would_be_tried_here():
    from nanochat.flash_attention import runnable
    import torch
    m = this_machine()
    assert m.attention == runnable(torch.device('cuda' if m.sees_gpus else 'mps' if m.mps else 'cpu')) and m.attention[-1] == 'sdpa'
    assert dict(d.rows_of(BOX))['attention'] == 'fa3, or else torch-fa2, or else flex, or else sdpa'
    assert not any('FlashAttention 3' in s for s in slow(BOX)) and not any('FlashAttention 3' in s for s in slow(dataclasses.replace(BOX, attention=['fa4', 'sdpa'])))


def test_a_container_counts_with_what_it_may_use(monkeypatch):
    files = {'/proc/meminfo': 'MemTotal:       32000000 kB\nMemAvailable:   30000000 kB\nHugePages_Total:       0\n', '/sys/fs/cgroup/memory.max': '4000000000\n',
             '/sys/fs/cgroup/memory.current': '1500000000\n', '/sys/fs/cgroup/cpu.max': '150000 100000\n'}
    monkeypatch.setattr(d, '_read', lambda path: files.get(path, ''))
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: range(64), raising=False)
    assert d.memory_bytes() == (4000000000, 2500000000) and d.usable_cores() == 1.5
    files.update({'/sys/fs/cgroup/memory.max': 'max\n', '/sys/fs/cgroup/cpu.max': 'max 100000\n'})
    assert d.memory_bytes() == (32000000 * 1024, 30000000 * 1024) and d.usable_cores() == 64


def test_cpu_abilities(monkeypatch):
    monkeypatch.setattr(d, '_read', lambda path: 'processor : 0\nmodel name\t: Xeon\nflags\t\t: fpu avx2 avx512f avx512_bf16 amx_tile amx_bf16\n')
    assert d.cpu_facts() == ('Xeon', ['AMX', 'AVX512-BF16', 'AVX512', 'AVX2'])


def fake_smi(tmp_path, monkeypatch, text, code=0):
    (tmp_path/'nvidia-smi').write_text(f'#!/bin/sh\ncat <<"X"\n{text}\nX\nexit {code}\n')
    (tmp_path/'nvidia-smi').chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path}{os.pathsep}{os.environ["PATH"]}')


def test_gpus_are_those_of_the_driver_that_are_visible(tmp_path, monkeypatch):
    fake_smi(tmp_path, monkeypatch, 'NVIDIA H100 80GB HBM3, 81559, 9.0\nTesla T4, 15360, 7.5')
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    assert d.find_gpus() == [Gpu('NVIDIA H100 80GB HBM3', 79.6, 9.0), Gpu('Tesla T4', 15.0, 7.5)]
    for value, names in (('1', ['Tesla T4']), ('', []), ('-1', []), ('GPU-8a7', ['NVIDIA H100 80GB HBM3'])):
        monkeypatch.setenv('CUDA_VISIBLE_DEVICES', value)
        assert [g.name for g in d.find_gpus()] == names, value
    fake_smi(tmp_path, monkeypatch, 'NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver', 9)
    assert d.find_gpus() == []


def test_values_of_variables_are_not_shown(monkeypatch, capsys):
    monkeypatch.setenv('HF_TOKEN', 'hf_secret'), monkeypatch.setenv('HF_ENDPOINT', 'https://mirror.example')
    for cfg in (DoctorConfig(), DoctorConfig(json=True)): d.doctor(cfg)
    out = capsys.readouterr().out
    assert 'hf_secret' not in out and 'mirror.example' not in out and 'HF_TOKEN set' in out and '"HF_ENDPOINT": true' in out


# --- advice -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('machine, preset', [
    (BOX, 'h100x8'), (card('NVIDIA H100 80GB HBM3', 79.6, 9.0), 'h100-80g'), (card('NVIDIA A100-SXM4-80GB', 79.3, 8.0), 'a100-80g'), (card('NVIDIA A100-SXM4-40GB', 39.4, 8.0), 'rtx-24g'),
    (card('NVIDIA GeForce RTX 4090', 24.0, 8.9), 'rtx-24g'), (card('NVIDIA GeForce RTX 3060', 12.0, 8.6), 'rtx-12g'), (card('Tesla T4', 15.0, 7.5), 't4-16g'), (CPU, 'laptop'),
    (dataclasses.replace(CPU, cores=2), 'tiny-cpu'), (dataclasses.replace(CPU, ram=6 * GIB), 'tiny-cpu'), (dataclasses.replace(BOX, sees_gpus=0), 'laptop'), (dataclasses.replace(CPU, torch=''), None)])
def test_the_preset_that_fits(machine, preset):
    assert preset_for(machine) == preset and (preset is None or preset in PRESETS)


@pytest.mark.parametrize('capability, attention, said', [(9.0, ['sdpa'], True), (10.0, ['torch-fa2', 'sdpa'], True), (10.0, ['fa4', 'sdpa'], False), (12.0, ['torch-fa2', 'sdpa'], False), (8.0, ['sdpa'], False)])
def test_a_kernel_is_advised_only_where_it_runs(capability, attention, said):
    """FlashAttention 3 is for Hopper, 4 for Hopper and the Blackwell of data centres, neither for that of the desktop."""
    found = [s for s in slow(dataclasses.replace(card('A card', 80.0, capability), attention=attention)) if 'FlashAttention' in s]
    assert bool(found) == said and all('flash-attn-4' in s and 'on Hopper pip install kernels' in s for s in found)


def test_every_reason_can_be_given_and_none_is_given_without_cause():
    assert slow(BOX) == [] and slow(CPU) == []
    assert any('does not see it' in s for s in slow(dataclasses.replace(BOX, sees_gpus=0, build='cpu'))) and any('FlashAttention 3' in s and 'NANOCHAT_ATTENTION=fa3' in s for s in slow(dataclasses.replace(BOX, attention=['torch-fa2', 'sdpa'])))
    assert any('no bf16' in s for s in slow(card('Tesla T4', 15.0, 7.5))) and any('no bf16 arithmetic' in s for s in slow(dataclasses.replace(CPU, abilities=['AVX2'])))
    assert any('no C compiler' in s for s in slow(dataclasses.replace(CPU, compiler=None))) and not any('no C compiler' in s for s in slow(dataclasses.replace(BOX, compiler=None)))
    assert any('10 GB of disk' in s for s in slow(dataclasses.replace(CPU, disk_free=int(5e9)))) and any('HF_HUB_OFFLINE' in s for s in slow(dataclasses.replace(CPU, network={'HF_HUB_OFFLINE': True})))


@pytest.mark.parametrize('machine, first', [(BOX, 'bash runs/speedrun.sh --dry-run'), (CPU, 'bash runs/quickstart.sh'), (dataclasses.replace(CPU, torch='', missing=dict(train=['torch'])), 'python3 -m venv'),
                                            (dataclasses.replace(BOX, sees_gpus=0), 'pip install --force-reinstall torch'), (card('Tesla T4', 15.0, 7.5), 'bash runs/speedrun.sh --gpus 1 --dry-run')])
def test_the_command_to_type(machine, first):
    typed = what_to_type(machine)
    assert typed[0].startswith(first)
    for command in typed:
        for word in command.split():
            if word.startswith('runs/'): assert (ROOT/word).exists()
            if word.startswith('nanochat.'): assert (ROOT/(word.replace('.', '/') + '.py')).exists()


def test_without_packages_it_still_works(tmp_path):
    """This interpreter with nothing but its own library."""
    bare = lambda *args: subprocess.run([sys.executable, '-S', '-m', 'nanochat.scripts.doctor', *args], cwd=ROOT, capture_output=True, text=True, env=os.environ | dict(PYTHONPATH=str(ROOT)))
    done = bare()
    assert done.returncode == 0 and 'PyTorch    not installed' in done.stdout and 'without torch' in done.stdout and "pip install -e '.[serve]'" in done.stdout, done.stderr
    assert json.loads(bare('--json').stdout)['preset'] is None
    for args, hint in ((['plan', '--depth', '12'], "pip install -e '.[train]'"), (['--need-extra', 'train'], "pip install -e '.[train]'"), (['--need-gpus', '99'], 'wants 99 GPUs')):
        done = bare(*args)
        assert done.returncode == 2 and hint in done.stderr and 'Traceback' not in done.stderr, done.stderr


# --- needs ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('machine, needs, hint', [
    (CPU, Needs(gpus=8), 'wants 8 GPUs and this machine has none; rent them, or type: bash runs/speedrun.sh --toy'), (card('NVIDIA H100', 79.6, 9.0), Needs(gpus=8), 'type: bash runs/speedrun.sh --gpus 1, or'),
    (dataclasses.replace(BOX, sees_gpus=0, torch='2.13.0+cpu', build='cpu'), Needs(gpus=8), 'install the build for CUDA'), (BOX, Needs(gpus=8, gpu_gib=140), 'smaller --device-batch-size'),
    (CPU, Needs(disk=1e12), 'needs 1 TB of disk and 300 GB are free; free some space, or set NANOCHAT_BASE_DIR'), (CPU, Needs(ram=64 * GIB), 'needs 64.0 GiB of memory and 30.0 are free'),
    (dataclasses.replace(CPU, missing=dict(train=['tyro', 'rustbpe'])), Needs(extra='train'), "tyro, rustbpe are not installed; type: pip install -e '.[train]'"),
    (dataclasses.replace(CPU, network={'HF_HUB_OFFLINE': True}), Needs(downloads=True), 'unset HF_HUB_OFFLINE')])
def test_each_need_has_its_sentence(machine, needs, hint):
    said = lacking(machine, needs, 'speedrun')
    assert len(said) == 1 and hint in said[0] and lacking(machine, Needs()) == []


def test_all_that_lacks_is_said_at_once(monkeypatch, capsys):
    assert len(lacking(dataclasses.replace(CPU, missing=dict(train=['torch'])), Needs(8, 0, 1e12, 64 * GIB, 'train'))) == 4
    monkeypatch.setattr(d, 'this_machine', lambda: CPU)
    with pytest.raises(UserError, match='GPUs.*; .*disk'): d.doctor(DoctorConfig(need_gpus=2, need_disk_gb=1e6))
    with pytest.raises(UserError, match="no extra 'trian'; use one of"): d.doctor(DoctorConfig(need_extra='trian'))
    d.doctor(DoctorConfig(need_disk_gb=1, need_ram_gib=1, need_extra='train'))
    assert 'everything needed is here' in capsys.readouterr().out


# --- plans ------------------------------------------------------------------------------------------------------------

def test_a_plan_is_the_package_s_own_arithmetic():
    p, config = make_plan(SPEEDRUN, BOX), gpt_config(24)
    plan = plan_training(config, device_batch_size=16, world_size=8, target_param_data_ratio=8)
    cost, = p.costs
    assert cost.plan == plan and cost.memory == estimate_memory(config, 16, world_size=8)['total'] and p.lacking == [] and cost == run_cost(config, plan, p.hardware, 16)
    assert cost.hours == pytest.approx(plan.flops / (8 * 989e12 * .5) / 3600) and cost.dollars == pytest.approx(24 * cost.hours)
    seconds = {s.key: s.seconds for s in p.stages}
    assert list(seconds) == 'climbmix tasks bundle tokenizer train core sft chat report'.split() and p.seconds == sum(seconds.values()) and p.dollars == pytest.approx(24 * p.seconds / 3600)
    assert cost.hours < seconds['train'] / 3600 < cost.hours + .1 and p.needs.disk > 17e9 + 12 * cost.size.total
    text = d.plan_text(p)
    for words in (f'{plan.num_iterations:,}', f'{plan.flops:.2e}', '17 GB', '$24 per hour', 'GiB'): assert words in text, words


def test_a_gpu_s_memory_is_not_asked_of_the_machine():
    """Without --gpus the plan is for the GPUs that are here, as with them."""
    one = dataclasses.replace(card('NVIDIA H100 80GB HBM3', 79.6, 9.0), ram_free=50 * GIB)
    assert make_plan(PlanConfig(depth='24', device_batch_size=16), one).lacking == []
    plain, told = (make_plan(dataclasses.replace(SPEEDRUN, gpus=n), BOX).needs for n in (0, 8))
    assert plain == told and told.gpus == 8 and told.ram == (2 * 8 + 8) * GIB
    cpu = lambda n: make_plan(PlanConfig(depth='12', device_batch_size=4, gpus=n, device='cpu'), one).needs
    assert cpu(0).gpus == cpu(2).gpus == 0 and 2 * GIB < cpu(0).ram == cpu(2).ram / 2


def test_a_busy_machine_does_not_look_a_hundred_times_slower(monkeypatch):
    """Two threads that wait for each other between other programs measure nothing; one of them alone does."""
    threads = torch.get_num_threads()
    speeds = {}
    monkeypatch.setattr(d, 'product_speed', lambda a, seconds: speeds[torch.get_num_threads()])
    try:
        torch.set_num_threads(2)
        for together, peak in ((1e10, 4e11), (8e11, 8e11), (5e11, 5e11)):
            speeds |= {2: together, 1: 4e11}
            assert d.cpu_peak.__wrapped__() == peak and torch.get_num_threads() == 2
    finally: torch.set_num_threads(threads)


def test_half_the_gpus_take_twice_as_long_and_two_nodes_half():
    hours = lambda **kw: make_plan(dataclasses.replace(SPEEDRUN, **kw), BOX).costs[0].hours
    assert hours(gpus=4) == pytest.approx(2 * hours(gpus=8), rel=.02) and hours(nodes=2) == pytest.approx(hours(gpus=8) / 2, rel=.02)
    assert make_plan(dataclasses.replace(SPEEDRUN, price=10.0), BOX).dollars == pytest.approx(10 * make_plan(SPEEDRUN, BOX).seconds / 3600)


def test_depths_times_budgets():
    p = make_plan(PlanConfig(depth='10,12', target_flops='1e18,2e18', hardware='h100', gpus=8, stages='climbmix=auto,train'), CPU)
    assert [(c.config.n_layer, round(c.plan.flops / 1e18)) for c in p.costs] == [(10, 1), (12, 1), (10, 2), (12, 2)]
    most = max(c.plan.tokens for c in p.costs)
    assert p.stages[0].nbytes / 100e6 == pytest.approx(most * 4.6 / 250e6, abs=1) and 'rent' in ' '.join(p.remarks)
    assert any('more than once' in r for r in make_plan(PlanConfig(depth='20', hardware='h100', stages='climbmix=8,train'), CPU).remarks)


def test_rows_are_chosen_to_fit_and_too_many_are_refused():
    p = make_plan(PlanConfig(depth='12,26', hardware='h100', gpus=8), CPU)
    assert all(c.fits for c in p.costs) and p.costs[0].rows == 32 > p.costs[1].rows
    refused = make_plan(PlanConfig(depth='24', device_batch_size=64, hardware='h100', gpus=8), BOX)
    assert any('d24 with 64 rows' in s and 'give --device-batch-size 16' in s for s in refused.lacking)
    assert any('smaller --depth' in s for s in make_plan(PlanConfig(depth='60', hardware='rtx3060'), CPU).lacking)


def test_unknown_gpus_have_no_hours_and_no_price():
    p = make_plan(PlanConfig(depth='12', stages='train,core,report'), card('A Card Of Tomorrow', 120.0, 12.0))
    assert p.costs[0].hours is None and p.seconds is None and p.dollars is None and 'n/a' in d.plan_text(p) and json.dumps(d.plan_dict(p))


def test_minutes_become_steps_on_a_cpu(monkeypatch):
    monkeypatch.setattr(d, 'cpu_peak', lambda: 1e12)
    cfg = PlanConfig(depth='4', vocab_size=4096, sequence_len=512, window_pattern='L', device_batch_size=8, device='cpu')
    ten, twenty = (make_plan(dataclasses.replace(cfg, minutes=m), CPU).costs[0] for m in (10.0, 20.0))
    assert ten.hours * 60 == pytest.approx(10, rel=.01) and twenty.plan.tokens == pytest.approx(2 * ten.plan.tokens, rel=.01) and ten.dollars is None


@pytest.mark.parametrize('machine, rent, used', [(BOX, 'h100', True), (card('NVIDIA L4', 22.0, 8.9), '', True), (card('NVIDIA A100', 79.0, 8.0), 'h100', False), (CPU, 'h100', True), (CPU, 'rtx4090', True), (CPU, 'a100', False), (CPU, '', False)])
def test_fp8_only_where_it_exists(machine, rent, used):
    verdict, words = d.fp8_verdict(True, machine, rent)
    why = 'used' if used else 'left out: it needs an Ada, Hopper or later GPU'
    assert (verdict, words) == (used, why) and d.fp8_verdict(False, machine) == (False, '')
    cfg = dataclasses.replace(SPEEDRUN, fp8=True, hardware=rent)
    p = make_plan(cfg, machine)
    assert (f"fp8\t{'--fp8' if used else ''}\n") in d.script_lines(cfg, p, machine) and any(f'fp8 is {words}' == r for r in p.remarks)
    if used and machine is BOX: assert p.costs[0].hours == pytest.approx(make_plan(SPEEDRUN, BOX).costs[0].hours / 1.17)


@pytest.mark.parametrize('wrong, hint', [(dict(depth='x'), '--depth takes numbers'), (dict(depth=''), 'names no depth'), (dict(depth='0'), '--depth 1 or more'), (dict(stages='lunch'), "stage 'lunch' is unknown"),
                                         (dict(nodes=0), '--nodes is 1 or more'), (dict(hardware='h1000'), "GPU 'h1000' is unknown; use one of: b200"), (dict(target_flops='much'), '--target-flops takes numbers')])
def test_plans_that_cannot_be(wrong, hint):
    with pytest.raises(UserError, match=hint): make_plan(PlanConfig(**wrong), CPU)


def test_check_raises_before_anything_is_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(d, 'this_machine', lambda: CPU)
    out = tmp_path/'lines'
    with pytest.raises(UserError, match='wants 8 GPUs'): plan_run(dataclasses.replace(SPEEDRUN, check=True, out=str(out)))
    assert not out.exists() and 'missing' not in capsys.readouterr().out
    plan_run(dataclasses.replace(SPEEDRUN, out=str(out)))
    lines = dict(line.split('\t') for line in out.read_text().splitlines())
    assert lines['rows24'] == '16' and lines['price'] == '24.0' and 'GB' in lines['climbmix'] and 'about' in lines['train'] and int(lines['shards']) < 170
    assert 'missing     this run wants 8 GPUs' in capsys.readouterr().out
    plan_run(dataclasses.replace(SPEEDRUN, json=True))
    found = json.loads(capsys.readouterr().out)
    assert found['runs'][0]['depth'] == 24 and len(found['lacking']) >= 1


def test_what_a_rented_machine_costs_is_the_table():
    assert d.hardware_for(PlanConfig(hardware='h100', gpus=8), CPU) == rented('h100', 8) and d.hardware_for(SPEEDRUN, BOX).price == rented('h100', 8).price
