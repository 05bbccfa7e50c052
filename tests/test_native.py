"""The step in C: what the ring caches promise holds here too, on every kind of vector, with any number of threads; and without a compiler all goes on as before."""
import ctypes
import functools
import itertools
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies as st

import nanochat.native as native_module
import test_inference as ti
from nanochat.engine import Draw, Engine, Scheduler, next_token_odds, pick
from nanochat.gpt import SOFTCAP
from nanochat.inference import CachedGPT
from nanochat.native import MOST_K, SOURCE, NativeCache, NativeGPT, Pace, fits, native, native_state, runner_for
from test_engine import SMALL, random_gpt
from test_inference import CPU, WIDE, Company, cap, close, few, forward, gpt, read, words
from test_switches import CASES

pytestmark = pytest.mark.skipif(native_module.compiler() is None, reason='no C compiler here')
HERE = Path(__file__).parent


def at(x): return ctypes.c_void_p(x.data_ptr())


@functools.cache
def runner(dtype='float32', weights='compute', **shape): return NativeGPT(gpt(dtype, **shape), weights)


@pytest.fixture(autouse=True)
def in_c(fp32, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(ti, 'CachedGPT', NativeGPT)
    monkeypatch.setattr(ti, 'runner', runner)


# --- the same tests as for the ring caches of PyTorch ----------------------------------------------------------------

test_prompts_around_chunks_windows_and_the_last_position = ti.test_prompts_around_chunks_windows_and_the_last_position
test_steps_go_round_every_ring_up_to_the_last_position = ti.test_steps_go_round_every_ring_up_to_the_last_position
test_rows_that_come_go_and_move_equal_the_forward_pass = ti.test_rows_that_come_go_and_move_equal_the_forward_pass
test_reading_in_pieces_equals_reading_at_once = ti.test_reading_in_pieces_equals_reading_at_once
test_several_prompts_of_one_length_are_read_together = ti.test_several_prompts_of_one_length_are_read_together
test_memory_that_was_used_reads_like_new = ti.test_memory_that_was_used_reads_like_new
test_kept_caches_are_continued_from_any_place_they_allow = ti.test_kept_caches_are_continued_from_any_place_they_allow


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('shape', [dict(), WIDE], ids=['small', 'wide'])
def test_bits_do_not_depend_on_the_company(dtype, shape): ti.check_bits(dtype, 'compute', shape, ti.BUSY, 12, 0)


@few(6)
@given(ti.moves(150, 20), st.sampled_from(['float32', 'bfloat16']), st.sampled_from([1, 2, 3, 5, 6, 7, 9, 17]), st.integers(0, 999))
def test_bits_do_not_depend_on_any_company(moves, dtype, slots, seed): ti.check_bits(dtype, 'compute', {}, moves, slots, seed)


# --- the same logits as the forward pass -----------------------------------------------------------------------------

@st.composite
def shapes(draw):
    heads, kv, width = draw(st.sampled_from([(1, 1, 64), (2, 1, 64), (4, 2, 64), (4, 1, 64), (2, 2, 128), (1, 1, 128), (6, 3, 192), (3, 1, 192), (4, 4, 192), (2, 1, 192)]))
    return dict(n_layer=draw(st.integers(1, 5)), n_head=heads, n_kv_head=kv, n_embd=width, vocab_size=draw(st.sampled_from([7, 33, 64, 65, 257, 300])),
                sequence_len=draw(st.sampled_from([40, 64, 100, 130, 520])), window_pattern=draw(st.text('SL', min_size=1, max_size=4)))


@few(25)
@given(shapes(), st.integers(1, 330), st.integers(1, 60), st.integers(0, 99))
def test_logits_equal_the_forward_pass_for_any_shape(shape, n, steps, seed):
    model, rng = random_gpt(seed, **shape), ti.random.Random(seed)
    assert fits(model)
    check_model(NativeGPT(model), model, words(rng, min(n, 10 * shape['sequence_len'] - steps), shape['vocab_size']), steps, rng)


def check_model(run, model, text, steps, rng):
    """Reading a text, then some steps behind it, against the whole text without a cache."""
    vocab, text = model.config.vocab_size, list(text)
    one, z = read(run, text, len(text) + steps)
    assert z.shape == (vocab,)
    close(z, forward(model, text))
    slots = run.slots(2, len(text) + steps)
    slots.admit(one)
    for i in range(steps):
        text.append(rng.randrange(vocab))
        with torch.inference_mode(): z = run.step(torch.tensor(text[-1:]), slots, len(text))[0]
        if i in (0, 1, steps - 1): close(z, forward(model, text))


@pytest.mark.parametrize('on, kv', CASES)
def test_parts_that_are_off(on, kv):
    """Value embeddings, smear, backout and scalars in every combination, with and without grouped keys."""
    model, rng = random_gpt(n_layer=3, n_head=2, n_kv_head=kv, n_embd=64, window_pattern='SL', vocab_size=40, **on), ti.random.Random(1)
    check_model(NativeGPT(model), model, words(rng, 130, 40), 4, rng)


@pytest.mark.parametrize('shape', [dict(qk_scale=0.5), dict(rope_base=10_000), dict(qk_scale=30.0)])  # with scores up to 3600, weights underflow
def test_scales_and_bases(shape):
    model, rng = random_gpt(**shape), ti.random.Random(1)
    run, text = NativeGPT(model), words(rng, 130, 300)
    close(read(run, text, 140)[1], forward(model, text))


def test_bf16_is_within_rounding():
    """Relative error of the logits of an fp32 model, of reading and of stepping; no more than PyTorch's own steps in bf16."""
    exact, half = gpt(n_embd=128), gpt('bfloat16', n_embd=128)
    text, errors = words(ti.random.Random(3), 200, 300), {}
    with torch.inference_mode(): expected = exact(torch.tensor([text]))[0, 149:]
    for kind in (NativeGPT, CachedGPT):
        run = kind(half)
        one, z = read(run, text[:150], 200)
        slots, got = run.slots(1, 200), [cap(z)]
        slots.admit(one)
        with torch.inference_mode(): got += [cap(run.step(torch.tensor([t]), slots, i)[0].clone()) for i, t in enumerate(text[150:], 151)]
        errors[kind] = ((torch.stack(got) - expected).norm() / expected.norm()).item()
    assert errors[NativeGPT] < min(.03, 1.2 * errors[CachedGPT]), errors


def test_rounding_to_bf16_is_pytorchs():
    x = torch.cat([torch.randn(4000), torch.randint(-2**31, 2**31 - 1, (4000,), dtype=torch.int32).view(torch.float32), torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1.00390625, 1.01171875])])
    out = torch.empty(len(x), dtype=torch.bfloat16)
    native().store(1, ctypes.c_void_p(x.data_ptr()), ctypes.c_float(1), len(x), ctypes.c_void_p(out.data_ptr()))
    torch.testing.assert_close(out, x.bfloat16(), atol=0, rtol=0, equal_nan=True)


def test_what_was_never_written_is_never_read(monkeypatch):
    """Fresh memory full of NaN changes nothing, to the bit."""
    play = lambda: [z for _, _, logits in Company(NativeGPT(gpt()), 5, 400, 0).play([('admit', 3), ('admit', 150, 2), ('step', 30), ('release', [0]), ('admit', 70), ('step', 100)]).all for z in logits]
    usual = play()
    monkeypatch.setattr(NativeCache, 'fresh', staticmethod(lambda *a, **kw: torch.full(a, torch.nan, **kw)))
    assert all(torch.equal(a, b) for a, b in zip(usual, play()))


# --- attention and products, every path ------------------------------------------------------------------------------

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('D', [16, 32, 48, 64, 80, 96, 128, 192, 256, 320, 512])
def test_attention_by_widths_of_heads_and_lengths_of_windows(dtype, D):
    """All ways to add values, windows around a block of 64 keys, rings that begin anywhere; scores that rise, so that what was summed shrinks."""
    R = 150
    q, k, v, y = torch.randn(D), torch.randn(R, D).to(dtype), torch.randn(R, D).to(dtype), torch.full((D,), float('nan'))
    for first, last in ((0, 0), (0, 15), (3, 66), (200, 264), (149, 150), (140, 269), (1000, 1149)):
        places = torch.arange(first, last + 1) % R
        for rising in (False, True):
            keys = k.clone()
            if rising: keys[places] = (k[places].float() + torch.linspace(0, 3, len(places))[:, None] * q).to(dtype)
            native().attend(int(dtype == torch.bfloat16), *map(at, (q, keys, v)), D, R, ctypes.c_int64(first), ctypes.c_int64(last), ctypes.c_float(0.3), at(y))
            asked = q.to(dtype) if dtype == torch.bfloat16 and native().pairs() and D % 32 == 0 else q
            expected = (.3 * keys[places].double() @ asked.double()).softmax(0) @ v[places].double()
            assert (y - expected).norm() < 2e-5 * max(1, expected.norm()), (first, last, rising)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('N, K', [(64, 16), (192, 64), (640, 96)])
def test_products_of_any_number_of_rows(dtype, N, K):
    """Whole tiles and the rest of one, by one thread's share of the panels; a row has the same bits in any number of them."""
    panels, x = native_module.Panels(torch.randn(N, K).to(dtype)), torch.randn(50, K).to(dtype)
    given_x = x if dtype == torch.bfloat16 and native().pairs() else x.float()
    expected, first = x.double() @ native_weight(panels, N, K).double().T, None
    for M in (1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 16, 18, 19, 24, 25, 37, 50):
        y = torch.full((M, N), float('nan'))
        for part in range(3): native().product(0, ctypes.byref(panels.c), at(given_x), M, at(y), N, part, 3)
        assert torch.allclose(y.double(), expected[:M], atol=1e-4)
        first = y if first is None else first
        assert torch.equal(y[:1], first)


def native_weight(panels, N, K):
    """(N, K) from panels."""
    w = panels.weight
    return (w.permute(0, 2, 1, 3) if w.ndim == 4 else w.transpose(1, 2)).reshape(-1, K)[:N]


# --- any vectors, any threads ----------------------------------------------------------------------------------------

@pytest.mark.skipif(native_module.platform.machine() not in ('x86_64', 'AMD64'), reason='names of x86 processors')
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('target, flag', [('x86-64', 'sse2'), ('x86-64-v3', 'avx2'), ('x86-64-v4', 'avx512f')])
def test_vectors_of_other_processors(tmp_path, monkeypatch, target, flag, dtype):
    """Compiled for vectors of 4, 8 and 16 numbers without bf16 products, as on older machines."""
    if flag not in native_module.processor(): pytest.skip(f'this processor has no {flag}')
    path = tmp_path/'step.so'
    subprocess.run(['cc', '-std=gnu11', '-O2', f'-march={target}', '-shared', '-fPIC', '-x', 'c', '-', '-o', path, '-lm', '-pthread'], input=SOURCE, text=True, check=True)
    lib = ctypes.CDLL(str(path))
    lib.work_size.restype = ctypes.c_size_t
    assert lib.pairs() == 0 and lib.panel() == 4 * {'sse2': 4, 'avx2': 8, 'avx512f': 16}[flag]
    for name in ('native',): monkeypatch.setattr(native_module, name, lambda: lib)
    model, rng = gpt(dtype, **WIDE), ti.random.Random(1)
    run = NativeGPT(model)
    company = Company(run, 9, 300, 0).play(ti.SHORT)
    for n, text, logits in company.all:
        expected = forward(gpt(**WIDE), text[:n])
        assert (cap(logits[0]) - expected).norm() / expected.norm() < (1e-4 if dtype == 'float32' else .03)
        alone = read(run, text[:n], 300)
        assert torch.equal(alone[1], logits[0])


@pytest.mark.parametrize('threads', [[2], [5], [5, 2, 3, 2, 1, 4]], ids=str)
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_bits_do_not_depend_on_the_threads(monkeypatch, dtype, threads):
    play = lambda: [z for _, _, logits in Company(NativeGPT(gpt(dtype, **WIDE)), 12, 400, 0).play(ti.BUSY).all for z in logits]
    alone, turns = play(), itertools.cycle(threads)
    monkeypatch.setattr(Pace, 'threads', lambda self, tokens: next(turns))
    assert all(torch.equal(a, b) for a, b in zip(alone, play()))


def test_two_at_once_on_one_runner(monkeypatch):
    """A scheduler's thread and the main thread step with the same weights at the same time."""
    monkeypatch.setattr(Pace, 'threads', lambda self, tokens: 2)
    engine, prompts = Engine(gpt(), SMALL, 'compute'), [[i, 7, 9] for i in range(6)]
    expected, got = engine.generate_many(prompts, 60, 0.9, 20), {}
    def work(name): got[name] = engine.generate_many(prompts, 60, 0.9, 20)
    workers = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for w in workers: w.start()
    for w in workers: w.join(60)
    assert [got[i] for i in range(3)] == [expected] * 3


def test_a_forked_process_hires_threads_of_its_own():
    """A child inherits the team's memory and none of its threads: it must not wait for them."""
    code = '''
import os, signal, torch, test_native as t
t.Pace.threads = lambda self, tokens: 3
run = t.NativeGPT(t.gpt())
first = t.read(run, [1, 2, 3] * 50, 200)[1]
pid = os.fork()
if not pid: signal.alarm(20), os._exit(0 if t.torch.equal(t.read(run, [1, 2, 3] * 50, 200)[1], first) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), t.torch.equal(t.read(run, [1, 2, 3] * 50, 200)[1], first))
'''
    env = {**os.environ, 'NANOCHAT_DTYPE': 'float32', 'PYTHONPATH': os.pathsep.join([str(HERE), str(HERE.parent)])}
    done = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ['0', 'True'], done.stderr[-2000:]


def test_pace_tries_both_and_comes_back():
    pace, threads = Pace(8.0, retry=10), []
    with pytest.MonkeyPatch.context() as m:
        m.setattr(torch, 'get_num_threads', lambda: 4)
        for i in range(300):
            threads.append(pace.threads(1))
            slow = 100 <= i < 200  # something else has the other cores
            pace.took(1, threads[-1], (20.0 if slow else 1.0) if threads[-1] == 4 else 3.0)
        assert threads[:2] == [4, 1] and threads[2:100].count(1) <= 10 and threads[103:200].count(4) <= 10 and threads[220:].count(1) <= 9
        assert Pace(0.2).threads(1) == 1, 'a small model is not worth waiting for others'
        m.setattr(torch, 'get_num_threads', lambda: 1)
        assert pace.threads(1) == 1


# --- drawing ---------------------------------------------------------------------------------------------------------

SETTINGS = [(t, k, p) for t, k, p in itertools.product((0.0, 0.3, 1.0, 2.0), (None, 0, 1, 2, 40, 256, 1000), (None, 0.1, 0.9, 1.0)) if NativeGPT.knows(t, k, p)]


@pytest.mark.parametrize('vocab', [5, 16, 300, 1003, 1024, 4100])
def test_draws_equal_those_of_the_engine(vocab):
    """Given the same number in [0, 1), the same token, but where that number lies on the border of two."""
    run, g, differ, n = runner(), torch.Generator().manual_seed(0), 0, 64
    for temperature, k, p in SETTINGS:
        logits, u = torch.randn(n, vocab, generator=g) * 6, torch.rand(n, generator=g)
        expected = pick(logits, u, temperature, k, p, SOFTCAP)[:, 0]
        got = run.draw(logits.clone(), u, temperature, k, p)
        for i in (got != expected).nonzero().flatten().tolist():
            differ += 1
            odds, ids = next_token_odds(logits[i:i + 1], temperature, k, p, SOFTCAP)
            cdf = (odds.double().cumsum(-1) / odds.double().sum())[0]
            place = lambda token: token if ids is None else (ids[0] == token).nonzero().item()
            low, high = sorted((place(got[i].item()), place(expected[i].item())))
            assert (cdf[low:high] - u[i]).abs().max() < 1e-5, (temperature, k, p, i)
    assert differ <= .003 * n * len(SETTINGS)


@pytest.mark.parametrize('vocab', [300, 1024, 1300])
@pytest.mark.parametrize('kinds', ['alike', 'some alike', 'apart', 'one far above', 'rising', 'falling', 'banned'])
def test_the_list_is_that_of_a_stable_sort(vocab, kinds):
    """Every k, the k best and of equals the earliest: all of them are drawn, and nothing else."""
    run, g = runner(), torch.Generator().manual_seed(vocab)
    x = {'alike': torch.zeros(vocab), 'some alike': torch.randint(0, 4, (vocab,), generator=g).float(), 'apart': torch.randn(vocab, generator=g),
         'one far above': torch.cat([torch.randn(vocab - 1, generator=g), torch.tensor([9.0])]), 'rising': torch.linspace(-3, 3, vocab),
         'falling': torch.linspace(3, -3, vocab), 'banned': torch.where(torch.rand(vocab, generator=g) < .05, torch.randn(vocab, generator=g), -torch.inf)}[kinds]
    for k in (2, 50, 128, 129, 256):
        n, best = 1000, x.argsort(descending=True, stable=True)[:k]
        drawn = run.draw(x.repeat(n, 1), (torch.arange(n) + .5) / n, 2.0, k, None)
        odds = torch.softmax(SOFTCAP * torch.tanh(x[best] / SOFTCAP) / 2.0, 0)
        assert set(drawn.tolist()) <= set(best[odds > 0].tolist()) and set(best[odds > 2 / n].tolist()) <= set(drawn.tolist()), k
        assert drawn.tolist() == sorted(drawn.tolist(), key=best.tolist().index), 'in the order of the list'


def test_draws_follow_the_odds():
    run, n = runner(), 200_000
    logits, u = torch.tensor([[2.0, -1.0, 0.5, 3.0, -40.0]]), (torch.arange(n) + .5) / n
    odds = torch.softmax(SOFTCAP * torch.tanh(logits[0] / SOFTCAP) / 0.7, 0)
    found = torch.bincount(run.draw(logits.repeat(n, 1), u, 0.7, 0, None), minlength=5) / n
    torch.testing.assert_close(found, odds, atol=1e-4, rtol=1e-3)


def test_edges_of_drawing():
    run, zero, one = runner(), torch.tensor([0.0]), torch.tensor([1 - 2**-24])
    row = lambda *values: torch.tensor([values])
    assert run.draw(row(1.0, 3.0, 3.0, 2.0), None, 0.0, 0, None).item() == 1, 'of equals the first'
    assert run.draw(row(1.0, 3.0, 3.0, 2.0), zero, 1.0, 3, None).item() == 1, 'in a list, too'
    assert run.draw(row(7.0), zero, 1.0, 50, None).item() == 0
    assert run.draw(row(-9.0, -9.0, -9.0), one, 1.0, 0, None).item() == 2 and run.draw(row(-9.0, -9.0, -9.0), zero, 1.0, 0, None).item() == 0
    assert run.draw(row(0.0, 900.0, 0.0, -900.0), one, 1e-9, 0, None).item() == 1, 'a temperature near 0 is the best token'
    assert run.draw(row(5.0, -torch.inf, 4.0, -torch.inf), one, 1.0, 0, None).item() == 2, 'a token without odds is never drawn'
    assert all(run.draw(row(*range(300)).float(), one, 1.0, k, None).item() == 300 - k for k in (1, 2, MOST_K))
    wide = torch.full((2, 64), 99.0)
    wide[:, :10] = torch.arange(10.)
    assert run.draw(wide[:, :10], None, 0.0, 0, None).tolist() == [9, 9], 'what lies behind the vocabulary does not count'


def test_settings_that_c_does_not_know_go_to_pytorch():
    engine, plain = (Engine(gpt(), SMALL, 'compute', in_c=c) for c in (True, False))
    assert type(engine.runner()) is NativeGPT and type(plain.runner()) is CachedGPT
    for kw in (dict(top_k=280), dict(top_p=0.5), dict(top_k=20, top_p=0.5), dict(), dict(top_k=5), dict(temperature=0.0)):
        assert engine.generate_batch([1, 2, 3], 3, max_tokens=30, seed=5, **kw) == plain.generate_batch([1, 2, 3], 3, max_tokens=30, seed=5, **kw), kw


def test_rows_that_draw_differently_in_one_batch():
    engine, kinds = Engine(gpt(), SMALL, 'compute'), [Draw(0.0), Draw(1.0), Draw(0.7, 40), Draw(1.2, None, 0.8), Draw(0.7, 40), Draw(1.0, 290)]
    ask = lambda s, i: s.submit([i, 5, 9], max_tokens=40, temperature=kinds[i].temperature, top_k=kinds[i].top_k, top_p=kinds[i].top_p, seed=i)
    with Scheduler(engine, slots=6) as s: together = [list(t) for t in [ask(s, i) for i in range(6)]]
    for i in range(6):
        with Scheduler(engine, slots=1) as s: assert list(ask(s, i)) == together[i]


# --- with a compiler, without one ------------------------------------------------------------------------------------

def test_what_c_can_run(monkeypatch):
    assert fits(gpt()) and fits(gpt('bfloat16')) and type(runner_for(gpt())) is NativeGPT and native_state().startswith('C, ')
    for shape in (dict(n_embd=96), dict(n_head=8, n_kv_head=8)): assert not fits(random_gpt(**shape)), 'panels not full, heads of 8 numbers'
    assert type(runner_for(random_gpt(n_embd=96))) is CachedGPT and type(runner_for(gpt(), in_c=False)) is CachedGPT
    monkeypatch.setenv('NANOCHAT_NATIVE', '0')
    assert type(runner_for(gpt())) is CachedGPT and 'no C compiler' in native_state()


@pytest.mark.parametrize('broken', ['none', 'fails', 'hangs up', 'writes nonsense', 'folder'])
def test_a_machine_that_cannot_compile(broken, tmp_path, monkeypatch):
    """The engine answers as ever, says why when asked, and leaves nothing half done."""
    expected = Engine(gpt(), SMALL, 'compute', in_c=False).generate_batch([1, 2, 3], max_tokens=20, temperature=0)
    folder, cc = tmp_path/'native', tmp_path/'cc'
    script = {'fails': 'echo "cannot" >&2; exit 1', 'hangs up': 'kill -9 $$', 'writes nonsense': 'for last; do :; done; while [ "$1" != -o ]; do shift; done; echo nonsense > "$2"'}
    if broken in script:
        cc.write_text(f'#!/bin/sh\ncat > /dev/null\n{script[broken]}\n')
        cc.chmod(0o755)
        monkeypatch.setenv('CC', str(cc))
    if broken == 'none': monkeypatch.setenv('PATH', str(tmp_path))
    if broken == 'folder': folder.write_text('a file is in the way')
    monkeypatch.setenv('NANOCHAT_NATIVE', str(folder))
    native_module._loaded.cache_clear()
    engine = Engine(gpt(), SMALL, 'compute')
    assert type(engine.runner()) is CachedGPT and native() is None
    assert engine.generate_batch([1, 2, 3], max_tokens=20, temperature=0) == expected
    assert {'none': 'no C compiler', 'fails': 'cannot', 'hangs up': 'cannot compile', 'writes nonsense': 'step-', 'folder': 'native'}[broken] in native_state()
    if broken in ('fails', 'hangs up'): assert not list(folder.iterdir())


def test_importing_compiles_nothing(tmp_path):
    code = 'import nanochat.native, nanochat.engine, sys; print(len(sys.modules) > 0)'
    done = subprocess.run([sys.executable, '-c', code], env={**os.environ, 'NANOCHAT_NATIVE': str(tmp_path/'n'), 'PYTHONPATH': str(HERE.parent)}, capture_output=True, text=True)
    assert done.returncode == 0 and not (tmp_path/'n').exists()


def test_compiled_code_is_kept_by_the_user_not_with_checkpoints(tmp_path, monkeypatch):
    """A base directory may come from somebody else; what lies in it must never be run."""
    monkeypatch.delenv('NANOCHAT_NATIVE')
    monkeypatch.setenv('NANOCHAT_BASE_DIR', str(tmp_path/'base'))
    monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
    monkeypatch.setenv('HOME', str(tmp_path/'me'))
    assert native_module.folder() == tmp_path/'me'/'.cache'/'nanochat-native'
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))
    assert native() is not None and [p.parent for p in tmp_path.rglob('step-*.so')] == [tmp_path/'cache'/'nanochat-native']


def test_two_processes_compile_at_once(tmp_path):
    """Both end with a library that works; the folder holds one, and nothing unfinished."""
    code = 'import torch, nanochat.native as n; assert n.native().panel() > 0'
    env = {**os.environ, 'NANOCHAT_NATIVE': str(tmp_path/'n'), 'PYTHONPATH': str(HERE.parent)}
    both = [subprocess.Popen([sys.executable, '-c', code], env=env) for _ in range(2)]
    assert [p.wait(120) for p in both] == [0, 0] and len(list((tmp_path/'n').iterdir())) == 1
