"""The inference benchmark: its plain program is the same model; its figures agree with each other; its command line works at tiny sizes. Nothing is timed."""
import json
import math
import subprocess

import pytest
import torch

from nanochat.common import UserError
from nanochat.engine import Draw, Engine
from nanochat.scaling import gpt_config
from nanochat.scripts import infer_bench as ib
from warm_python import warm_python

TINY = dict(depth=2, vocab_size=300, sequence_len=128, device='cpu', batch_sizes=(1, 2), prompt_lengths=(8, 20), prompts_at_once=3, context=16, new_tokens=6, many=6, concurrency=3, http=False, rounds=1)


def flags(**options):
    """The same as words of a command line."""
    return [w for k, v in options.items() for w in (f'--{k.replace("_", "-")}', *(map(str, v) if isinstance(v, tuple) else [str(v)]))]


def command(*words, cwd):
    env = warm_python().environ(NANOCHAT_BASE_DIR=str(cwd), NANOCHAT_DTYPE='float32')
    return subprocess.run([warm_python().python, '-m', 'nanochat.scripts.infer_bench', *words], capture_output=True, text=True, cwd=cwd, env=env)


@pytest.fixture(scope='module')
def tiny():
    """A result of two engines where int8 is possible."""
    with pytest.MonkeyPatch.context() as m:
        m.setenv('NANOCHAT_DTYPE', 'bfloat16')
        return ib.infer_bench(ib.InferBenchConfig(**TINY))


def table_rows(text, title):
    """The lines of one part of the table, split, its column heads left out."""
    part = next(p for p in text.split('\n\n') if p.startswith(title))
    return [line.split() for line in part.splitlines()[2:]]


@pytest.mark.parametrize('temperature', [0, .8])
def test_plain_and_engine_are_one_model(fp32, temperature):
    model = ib.load(ib.InferBenchConfig(**TINY), torch.device('cpu'))
    prompt, = ib.random_prompts(1, 20, 20, 300)
    plain = [c for c in ib.Plain(model).stream(prompt, 2, 40, Draw(temperature, 1 if temperature else None))]  # of one candidate, sampling is greedy
    fast = [c for c in ib.Fast(model, 'compute').stream(prompt, 2, 40, Draw(0))]
    assert plain == fast and len(plain) == 40


def test_plain_samples_differ_and_repeat(fp32):
    model = ib.load(ib.InferBenchConfig(**TINY), torch.device('cpu'))
    run = lambda seed: list(ib.Plain(model).stream([1, 2, 3], 2, 20, Draw(1.), seed))
    a, b = zip(*run(0))
    assert a != b and run(0) == run(0) != run(1)


def test_no_token_ends_an_answer():
    """Every token in turn is said; with a real tokenizer, some of them would end the answer."""
    class Counting(torch.nn.Module):
        config = gpt_config(1, 40, 128)
        w = torch.zeros(1)
        def get_device(self): return self.w.device
        def forward(self, ids, kv_cache=None):
            kv_cache.advance(ids.shape[1])
            return torch.nn.functional.one_hot((ids + 1) % 40, 40).float()
    said = [c[0] for c, _ in Engine(Counting().eval(), ib.Endless()).generate([0], max_tokens=60, temperature=0)]
    assert said == [i % 40 for i in range(1, 61)]


def test_command_line(tmp_path):
    out = command(*flags(depth=1, vocab_size=300, sequence_len=64, device='cpu', plot='speed.svg'), '--quick', '--prompt-lengths', '8', '--context', '16', cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    r = json.loads(out.stdout.splitlines()[-1])
    assert r['stage'] == 'infer_bench' and r['dtype'] == 'float32' and r['programs'] in (['plain', 'compute', 'pytorch'], ['plain', 'compute']), 'int8 needs bf16: it should have been left out'
    assert r['many']['same_answers'] == r['many']['prompts'] == 8 and r['serving']['same_answers'] == r['serving']['requests'] == 4
    assert [row['rows'] for row in r['decode']] == [1, 4, 1, 4] and {row['sampling'] for row in r['decode']} == {'temperature 0.8, top-k 50', 'greedy'}
    assert out.stdout.startswith(ib.table(r)), 'the table should show what the JSON line says'
    assert 'infer_bench' in out.stderr and 'rows' in out.stderr, 'progress belongs on stderr'
    picture = (tmp_path/'speed.svg').read_text(encoding='utf8')
    assert picture.lstrip().startswith('<?xml') and 'tokens/s' in picture and len(picture) < 100_000


def test_fields(tiny):
    """What README and report may rely on."""
    assert set(tiny) == {'stage', 'device', 'threads', 'dtype', 'source', 'depth', 'width', 'vocab_size', 'sequence_len', 'pattern', 'parameters', 'steps', 'context', 'new_tokens', 'rounds',
                         'programs', 'sampling', 'memory', 'bandwidth', 'prefill', 'decode', 'many', 'serving', 'http'}
    for row in tiny['prefill']: assert set(row) == {'prompts', 'length', 'ttft_ms', 'tokens_per_s', 'ratio'}
    for row in tiny['decode']: assert set(row) == {'rows', 'sampling', 'context', 'ms_per_token', 'tokens_per_s', 'ratio', 'step_bytes', 'bytes_per_s', 'cache_bytes'}
    assert set(tiny['many']) == {'weights', 'prompts', 'new_tokens', 'same_answers', 'tokens_per_s', 'ratio'}
    assert set(tiny['serving']) == {'weights', 'requests', 'new_tokens', 'same_answers', 'ttft_ms', 'ms_per_token', 'tokens_per_s', 'ratio'}
    assert [(row['prompts'], row['length']) for row in tiny['prefill']] == [(1, 8), (1, 20), (3, 8), (3, 20)]
    assert json.loads(json.dumps(tiny)) == tiny


def test_figures_agree_with_each_other(tiny):
    near = lambda a, b: math.isclose(a, b, rel_tol=.02, abs_tol=.02)
    for row in tiny['prefill']:
        for n in tiny['programs']: assert near(row['tokens_per_s'][n], row['prompts'] * row['length'] / row['ttft_ms'][n] * 1e3)
    for row in tiny['decode']:
        for n in tiny['programs']:
            assert near(row['tokens_per_s'][n], row['rows'] / row['ms_per_token'][n] * 1e3)
            assert near(row['bytes_per_s'][n], row['step_bytes'][n] / row['ms_per_token'][n] * 1e3)
    for row in tiny['prefill'] + tiny['decode']:
        for n in tiny['programs']: assert near(row['ratio'][n], row['tokens_per_s'][n] / row['tokens_per_s']['plain'])
    for part in (tiny['many'], tiny['serving']):
        for n, ratio in part['ratio'].items(): assert near(ratio, part['tokens_per_s']['together'] / part['tokens_per_s'][n])
    for t in tiny['serving']['ttft_ms'].values(): assert 0 < t['median'] <= t['p95']


def test_table_says_what_the_json_says(tiny):
    text = ib.table(tiny)
    read = lambda lines, *keys: {tuple(line[:len(keys)]): line[len(keys):] for line in lines}
    prefill = read(table_rows(text, 'prefill'), 'prompts', 'length', 'program')
    for row in tiny['prefill']:
        for n in tiny['programs']:
            speed, ratio, ttft = prefill[str(row['prompts']), str(row['length']), n]
            assert speed.replace(',', '') == f"{row['tokens_per_s'][n]:.0f}" and ratio == f"{row['ratio'][n]:.2f}" and ttft == f"{row['ttft_ms'][n]:.2f}"
    for sampling in (tiny['sampling'], 'greedy'):
        decode = read(table_rows(text, f"decode: {tiny['new_tokens']} tokens behind {tiny['context']}, {sampling}"), 'rows', 'program')
        for row in (row for row in tiny['decode'] if row['sampling'] == sampling):
            for n in tiny['programs']:
                share = f"{row['bytes_per_s'][n] / tiny['bandwidth']['bytes_per_s']:.0%}"
                assert decode[str(row['rows']), n][1:5] == [f"{row['ratio'][n]:.2f}", f"{row['ms_per_token'][n]:.3f}", f"{row['bytes_per_s'][n] / 1e9:.1f}", share]
    for part in ('many', 'serving'):
        for ratio in tiny[part]['ratio'].values(): assert f'(together is {ratio:.2f} x this)' in text


def test_units_are_sane(tiny):
    """Bytes and not bits, seconds and not milliseconds: within factors that no machine leaves."""
    bus = tiny['bandwidth']['bytes_per_s']
    assert 1e8 < bus < 1e13 and bus == max(tiny['bandwidth']['copy'], tiny['bandwidth']['triad'])
    for row in tiny['decode']:
        for n in tiny['programs']: assert 0 < row['bytes_per_s'][n] < 100 * bus and 1e-3 < row['ms_per_token'][n] < 6e4
    m = tiny['memory']
    assert 5e7 < m['peak_bytes'] < 1e12 and all(m['step_weight_bytes'][n] <= m['held_bytes'][n] < m['peak_bytes'] for n in tiny['programs'])


def test_bytes_by_hand(monkeypatch):
    monkeypatch.setenv('NANOCHAT_DTYPE', 'bfloat16')
    model = ib.load(ib.InferBenchConfig(**TINY), torch.device('cpu'))
    c = model.config
    C, V, gates = c.n_embd, model.lm_head.weight.shape[0], sum(b.attn.ve_gate.weight.numel() for b in model.transformer.h if b.attn.ve_gate is not None)
    numbers = c.n_layer * 12 * C * C + gates + V * C  # 4 C^2 of attention and 8 C^2 of the MLP per layer
    assert ib.weight_bytes(model, 'plain') == 4 * numbers and ib.weight_bytes(model, 'compute') == 2 * numbers
    scales = c.n_layer * (3 * C + C + 4 * C + C) + sum(b.attn.ve_gate.weight.shape[0] for b in model.transformer.h if b.attn.ve_gate is not None)
    assert ib.weight_bytes(model, 'int8') == numbers + V * C + 2 * scales  # a byte each, the head two, two per scale
    seen = [min(100, w + 1) for w, _ in model.window_sizes]
    assert ib.kv_bytes(model, 3, 100, 2) == 3 * sum(seen) * 2 * C * 2


def test_the_engine_holds_what_is_counted(monkeypatch):
    monkeypatch.setenv('NANOCHAT_DTYPE', 'bfloat16')
    model = ib.load(ib.InferBenchConfig(**TINY), torch.device('cpu'))
    for name in ['compute', 'int8'] if ib.int8_works(model) else ['compute']:
        runner = ib.Fast(model, name).held()
        assert abs(ib.weight_bytes(model, name) / ib.held_bytes([runner.step_layers, runner.head]) - 1) < .05, name
    assert ib.held_bytes(ib.empty_cache(model, 2, 10).k_cache) == ib.cache_bytes(ib.empty_cache(model, 2, 10)) / 2


@pytest.mark.parametrize('name, gb', [('NVIDIA H100 80GB HBM3', 3350), ('NVIDIA H100 PCIe', 2000), ('NVIDIA H100 NVL', 3900), ('NVIDIA H200', 4800), ('NVIDIA B200', 8000),
                                      ('NVIDIA A100-SXM4-80GB', 2039), ('NVIDIA A100-SXM4-40GB', 1555), ('NVIDIA A100 80GB PCIe', 1935), ('NVIDIA L40S', 864), ('NVIDIA L4', 300),
                                      ('NVIDIA A10G', 600), ('NVIDIA A10', 600), ('Tesla T4', 320), ('NVIDIA GeForce RTX 4090', 1008), ('NVIDIA GeForce RTX 3090', 936),
                                      ('NVIDIA GeForce RTX 3090 Ti', None), ('NVIDIA GeForce RTX 4090 Laptop GPU', None), ('NVIDIA A100-SXM4-40GB MIG 1g.5gb', None), ('Radeon Pro', None)])
def test_known_gpus(name, gb):
    assert ib.known_bandwidth(name) == (gb and gb * 1e9)


def test_unknown_bandwidth_is_not_available(tiny):
    """A device without a figure still gets its table and its plot."""
    r = tiny | {'bandwidth': dict(bytes_per_s=None, source='unknown')}
    assert 'bandwidth n/a' in ib.table(r) and ib.figure(r).axes
    rows = table_rows(ib.table(r), 'decode')
    assert rows and all(line[6] == 'n/a' for line in rows)


def test_plots(tiny, tmp_path):
    for suffix, start in (('svg', b'<?xml'), ('png', b'\x89PNG'), ('pdf', b'%PDF')):
        ib.save_figure(tiny, str(tmp_path/f'p.{suffix}'))
        assert (tmp_path/f'p.{suffix}').read_bytes().startswith(start)


def test_parts_can_be_left_out(fp32):
    r = ib.infer_bench(ib.InferBenchConfig(**TINY | dict(many=0, concurrency=0, prompts_at_once=0, plain=False, weights=('compute',), batch_sizes=(2,), prompt_lengths=(8,))))
    assert r['many'] is r['serving'] is r['http'] is None and r['programs'] == ['compute'] and len(r['prefill']) == 1
    assert all(row['ratio'] == {'compute': 1.0} for row in r['decode'])
    assert 'many prompts' not in ib.table(r) and 'serving' not in ib.table(r)


@pytest.fixture(scope='module')
def over_http():
    """A result with real servers."""
    with pytest.MonkeyPatch.context() as m:
        m.setenv('NANOCHAT_DTYPE', 'float32')
        return ib.infer_bench(ib.InferBenchConfig(**TINY | dict(http=True, many=0, weights=('compute',), batch_sizes=(1,), prompt_lengths=(8,), prompts_at_once=0)))


def test_over_http(over_http):
    """The servers answer as the scheduler does, alone and together; the table says so."""
    pytest.importorskip('fastapi')
    r = over_http['http']
    assert set(r) == set(over_http['serving']) and list(r['tokens_per_s']) == ['together', 'one by one', 'plain']
    assert r['same_answers'] == r['requests'] == 3 and all(0 < t['median'] <= t['p95'] for t in r['ttft_ms'].values())
    part = next(p for p in ib.table(over_http).split('\n\n') if p.startswith('serving over HTTP'))
    assert part.count('(together is') == 2 and json.loads(json.dumps(over_http)) == over_http


def test_a_server_answers_what_its_engine_says(fp32):
    """Read back from the stream: the very tokens of the plain program."""
    pytest.importorskip('fastapi')
    cfg = ib.InferBenchConfig(**TINY)
    engine = ib.bench_engine(cfg, 'plain')
    with ib.server_process(cfg, 'plain', 2) as port: answers = ib.serve_http(port, ['hello', 'again'], 9, Draw(.8, 50), True).answers
    assert answers == [engine.generate_batch(list(q.encode()), max_tokens=9, temperature=.8, top_k=50, seed=i)[0][0][5:] for i, q in enumerate(('hello', 'again'))]


def test_a_server_that_cannot_start_or_answer(fp32, capfd):
    with pytest.raises(UserError, match='did not start'):
        with ib.server_process(ib.InferBenchConfig(**TINY | dict(vocab_size=-1)), 'compute', 1): pytest.fail('it did')
    capfd.readouterr()
    with pytest.raises(UserError, match='(?s)answered: .*"message"'): ib.tokens_in(b'HTTP/1.1 400 Bad Request\r\n\r\n{"error": {"message": "no"}}')


def test_without_what_a_server_needs(fp32, monkeypatch):
    monkeypatch.setattr(ib, 'can_serve', lambda: False)
    r = ib.infer_bench(ib.InferBenchConfig(**TINY | dict(http=True, many=0, plain=False, weights=('compute',), batch_sizes=(1,), prompt_lengths=(8,), prompts_at_once=0)))
    assert r['http'] is None and r['serving']


def test_turns_alternate():
    order = []
    out = ib.alternate({n: lambda n=n: order.append(n) or len(order) for n in 'abc'}, 3)
    assert ''.join(order) == 'abc' + 'abc' + 'cba' + 'abc' and out['a'] == [4, 9, 10], 'the first turn must not count'


@pytest.mark.parametrize('change, words', [
    (dict(depth=0), 'depth 0 is too small'), (dict(rounds=0), 'rounds 0'), (dict(batch_sizes=(1, 0)), 'batch_sizes 1 0'), (dict(batch_sizes=()), 'batch_sizes'), (dict(batch_sizes=(4, 4)), 'different'),
    (dict(prompt_lengths=(-1,)), 'prompt_lengths'), (dict(many=-1), 'many -1 is negative'), (dict(concurrency=-2), 'use 0 to leave'), (dict(new_tokens=3), 'use 4 or more'),
    (dict(temperature=-1.), 'temperature -1.0'), (dict(temperature=float('nan')), 'temperature nan'), (dict(temperature=0.), 'greedy'), (dict(top_k=-1), 'top_k -1'),
    (dict(source='gpt'), "source 'gpt'"), (dict(source='public'), 'give both'), (dict(path='x'), '--path is the directory'), (dict(source='sft', path='x'), 'or neither'), (dict(weights=('int4',)), "'int4'"), (dict(weights=('compute', 'compute')), 'one thing twice'), (dict(weights=(), plain=False), 'nothing to measure'),
    (dict(weights=()), 'need the engine'), (dict(plot='x.txt'), 'x.txt'), (dict(plot='no/such/folder/x.svg'), 'does not exist'), (dict(context=125), 'do not fit into rows of 128'),
    (dict(prompt_lengths=(8, 123)), '123 tokens read'), (dict(window_pattern='Q'), 'Q')])
def test_bad_input_is_a_sentence_before_any_work(change, words, monkeypatch):
    monkeypatch.setattr(ib, 'load', lambda *a: pytest.fail('work has begun'))
    with pytest.raises(UserError) as e: ib.infer_bench(ib.InferBenchConfig(**TINY | change))
    assert words in str(e.value)


def test_int8_alone_where_it_cannot_be(fp32):
    with pytest.raises(UserError, match='int8 weights need bf16'): ib.infer_bench(ib.InferBenchConfig(**TINY | dict(weights=('int8',))))



def test_command_line_prints_one_sentence(tmp_path):
    out = command('--context', '0', cwd=tmp_path)
    assert out.returncode == 2 and out.stdout == '' and out.stderr == 'error: context 0 is too small; use 1 or more\n'
