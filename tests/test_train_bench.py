"""The benchmark: its plain implementation is an independent check of the model; its command line works at tiny sizes."""
import json
import subprocess
import sys

import pytest
import torch

from nanochat.common import UserError
from nanochat.scripts import train_bench as tb
from warm_python import warm_python

TINY = ['--depth', '4', '--vocab-size', '300', '--sequence-len', '128', '--device-batch-size', '4', '--steps', '1']  # a first step of tenths of a second, which rounding does not make 0


@pytest.mark.parametrize('pattern, T', [('SSSL', 200), ('L', 130), ('S', 300)])
def test_plain_and_fast_agree_in_value_and_gradient(fp32, pattern, T):
    model = tb.build(3, 300, 512, pattern, 'cpu')
    with torch.no_grad(): model.smear_lambda.fill_(.5)
    x, y = torch.randint(0, 300, (2, 2, T))
    y[0, :9] = -1
    names, params = zip(*model.named_parameters())
    plain, ours = (f(x, y) for f in (lambda *b: tb.plain_loss(model, *b), model))
    torch.testing.assert_close(plain, ours, atol=1e-5, rtol=1e-5)
    for name, a, b in zip(names, torch.autograd.grad(plain, params), torch.autograd.grad(ours, params)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3, msg=lambda m: f'{name}: {m}')


def test_bf16_gradients_are_close(monkeypatch):
    monkeypatch.setenv('NANOCHAT_DTYPE', 'bfloat16')
    model = tb.build(2, 300, 256, 'SL', 'cpu')
    x, y = torch.randint(0, 300, (2, 4, 200))
    params = [p for n, p in model.named_parameters() if p.dim() == 2 and 'gate' not in n]
    for a, b in zip(*(torch.autograd.grad(f(x, y), params) for f in (lambda *t: tb.plain_loss(model, *t), model))):
        assert (a.float() - b.float()).norm() < 0.03 * a.float().norm()


def test_the_linear_scan_is_the_same_packing():
    from nanochat.dataloader import best_fit_pack
    lengths = torch.randint(1, 258, (900,), generator=torch.Generator().manual_seed(0)).tolist()
    ours = list(best_fit_pack(lengths, 257, buffer_size=100, fetch_size=1))
    scan = tb.linear_scan_pack(lengths, 257, buffer_size=100)
    fill = lambda rows: [sorted(n for _, n in row) for row in rows]
    assert len(scan) > 100 and fill(ours)[:len(scan)] == fill(scan)


def test_command_line(tmp_path):
    out = subprocess.run([warm_python().python, '-m', 'nanochat.scripts.train_bench', *TINY, '--no-packing'], capture_output=True, text=True, cwd=tmp_path,
                         env=warm_python().environ(NANOCHAT_BASE_DIR=str(tmp_path)))
    assert out.returncode == 0, out.stderr
    result = json.loads(out.stdout.splitlines()[-1])
    assert set(result['tokens_per_s']) == {'ours', 'plain fp32'} and result['ratio'] > 0 and result['packing'] is None
    assert {(r['backend'], r['window']) for r in result['attention']} == {('blocked', 128), ('sdpa', 128)} and all(r['tokens_per_s'] > 0 and r['ratio'] > 0 for r in result['attention'])
    assert sum(line.startswith(('blocked ', 'sdpa ')) for line in out.stdout.splitlines()) == 2
    assert all(0 < s < 120 for s in result['first_step_s'].values()) and all(b > 5e7 for b in result['peak_bytes'].values())


def test_bad_sizes_are_a_sentence():
    with pytest.raises(UserError, match='at least 1'): tb.train_bench(tb.TrainBenchConfig(depth=0))


def test_a_backend_left_out_is_a_row_with_its_reason(monkeypatch):
    from nanochat import flash_attention as fa
    def broken(q, k, v, causal, window_size): raise RuntimeError('no kernel image')
    monkeypatch.setattr(fa, 'BACKENDS', [fa.Backend('broken', broken, fa.sdpa_with_kvcache, lambda device: True, half=True), *fa.BACKENDS])
    monkeypatch.setattr(fa, '_CHOSEN', {})
    monkeypatch.setattr(fa, '_VERDICTS', {})
    monkeypatch.setenv('NANOCHAT_DTYPE', 'bfloat16')
    with pytest.warns(UserWarning, match="'broken' is left out"): rows = tb.attention_speeds(tb.TrainBenchConfig(depth=1, sequence_len=64, device_batch_size=1, steps=1, window_pattern='L'), torch.device('cpu'))
    assert [r['backend'] for r in rows] == ['blocked', 'sdpa', 'broken'] and 'no kernel image' in rows[2]['left_out'] and 'no kernel image' in tb.attention_lines(rows)[-1]


@pytest.mark.parametrize('name, by_default, compiled', [('ours', False, False), ('ours', True, True), ('compiled', False, True)])
def test_ours_is_the_program_that_base_train_runs(fp32, monkeypatch, name, by_default, compiled):
    """Compiled where base_train compiles without being asked."""
    asked = []
    monkeypatch.setattr(tb, 'compiles', lambda setting, device: by_default)
    monkeypatch.setattr(tb, 'as_run', lambda model, optimizer, compiled=False: asked.append(compiled) or model)
    step = tb.bench_program(name, tb.TrainBenchConfig(depth=1, vocab_size=300, sequence_len=64, device_batch_size=2), torch.device('cpu'))
    assert asked == [compiled] and step() > 0


def test_a_program_that_dies_in_a_step_is_a_sentence(monkeypatch):
    """As for want of memory: between two steps, or in one."""
    for code in ('print(1.0)', 'input(); print(1.0, flush=True); input()'):
        p = subprocess.Popen([sys.executable, '-c', code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert tb.timed_step('ours', p) == 1.0
        with pytest.raises(UserError, match="'ours' of the benchmark died in a step"):
            for _ in range(3): tb.timed_step('ours', p)
        p.wait(10)
