"""Reading with ring caches: the same logits as the forward pass, the same bits in any company, and nothing left of a slot's former tenant."""
import functools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st

import nanochat.inference as inference
from nanochat.common import UserError
from nanochat.gpt import SOFTCAP
from nanochat.inference import CHUNK, CachedGPT, Dense, Int8, Packed, Reach, RingCache, attend, linear_forms, reach, ring_size, works
from nanochat.native import runner_for
from test_engine import random_gpt

CPU = torch.device('cpu')
few = lambda n: settings(max_examples=n, deadline=None, derandomize=True)
exact_products = pytest.mark.skipif(not works(Packed, torch.bfloat16), reason='this PyTorch has no packed bf16 products, whose bits are promised')


@pytest.fixture(autouse=True)
def exact(fp32): torch.manual_seed(0)


@functools.cache
def gpt(dtype='float32', **shape):
    with pytest.MonkeyPatch.context() as m:
        m.setenv('NANOCHAT_DTYPE', dtype)
        return random_gpt(**shape)


@functools.cache
def runner(dtype='float32', weights='compute', **shape): return CachedGPT(gpt(dtype, **shape), weights)


def cap(z): return SOFTCAP * torch.tanh(z.float() / SOFTCAP)


def words(rng, n, vocab): return [rng.randrange(vocab) for _ in range(n)]


@torch.inference_mode()
def forward(model, text): return model(torch.tensor([text]))[0, -1]


def close(got, expected):
    """Logits of a ring cache against those of the forward pass."""
    torch.testing.assert_close(cap(got), expected, atol=1e-3, rtol=1e-4)


@torch.inference_mode()
def read(run, text, length, cache=None):
    """(cache, logits) after reading a text behind what `cache` holds."""
    cache = cache or run.scratch(1, length)
    return cache, run.read(torch.tensor([text]), cache)[0]


class Company:
    """Slots, the texts in them, and every row of logits they gave: texts come, go and move, as a server's do."""
    def __init__(self, run, slots, length, seed):
        self.run, self.length, self.size, self.rng = run, length, slots, random.Random(seed)
        self.cache, self.rows, self.all = run.slots(slots, length), [], []   # rows: [prompt length, text, logits so far]

    def admit(self, n, copies=1):
        if len(self.rows) + copies > self.size: return
        text = words(self.rng, n, self.run.config.vocab_size)
        cache, z = read(self.run, text, self.length)
        self.cache.admit(cache, copies)
        new = [[n, list(text), [z]] for _ in range(copies)]
        self.rows += new
        self.all += new

    @torch.inference_mode()
    def step(self, times):
        for _ in range(times):
            full = [i for i, (_, text, _) in enumerate(self.rows) if len(text) == self.length]
            if full: self.release(full)
            if not self.rows: return
            ids = words(self.rng, len(self.rows), self.run.config.vocab_size)
            for row, t in zip(self.rows, ids): row[1].append(t)
            z = self.run.step(torch.tensor(ids), self.cache, max(len(text) for _, text, _ in self.rows))
            for row, logits in zip(self.rows, z): row[2].append(logits.clone())

    def release(self, which):
        which = sorted({i % len(self.rows) for i in which}) if self.rows else []
        order = self.cache.release(which)
        assert sorted(order) == [i for i in range(len(self.rows)) if i not in which]
        self.rows = [self.rows[i] for i in order]
        assert self.cache.rows == len(self.rows) and self.cache.lengths[:len(self.rows)].tolist() == [len(text) for _, text, _ in self.rows]

    def play(self, moves):
        for name, *args in moves: getattr(self, name)(*args)
        return self


def moves(longest, steps):
    admit = st.tuples(st.just('admit'), st.integers(1, longest), st.sampled_from([1, 1, 1, 2, 3]))
    step = st.tuples(st.just('step'), st.integers(1, steps))
    release = st.tuples(st.just('release'), st.lists(st.integers(0, 9), min_size=1, max_size=3))
    return st.lists(st.one_of(admit, admit, step, step, release), min_size=3, max_size=12).map(lambda m: [('admit', 1, 1), *m, ('step', 2)])


@st.composite
def shapes(draw):
    heads, kv = draw(st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 2), (4, 1), (3, 1), (6, 3), (3, 3)]))
    head_dim = draw(st.sampled_from([d for d in (4, 8, 16, 32) if d * heads >= 24]))
    return dict(n_layer=draw(st.integers(1, 5)), n_head=heads, n_kv_head=kv, n_embd=heads * head_dim, vocab_size=draw(st.sampled_from([7, 33, 64, 65, 97, 257, 300, 511])),
                sequence_len=draw(st.sampled_from([40, 64, 100, 130, 520, 700])), window_pattern=draw(st.text('SL', min_size=1, max_size=4)))


# --- the same logits as the forward pass -----------------------------------------------------------------------------

@few(25)
@given(shapes(), st.integers(1, 330), st.integers(0, 60), st.integers(0, 99))
def test_logits_equal_the_forward_pass_for_any_shape(shape, n, steps, seed):
    """Depths, grouped heads, windows and vocabularies of any kind; prompts shorter and longer than a chunk and a window."""
    model, rng = random_gpt(seed, **shape), random.Random(seed)
    run, text = CachedGPT(model), words(rng, min(n, 10 * shape['sequence_len'] - steps), shape['vocab_size'])
    one, z = read(run, text, len(text) + steps)
    assert z.shape == (shape['vocab_size'],)
    close(z, forward(model, text))
    slots = run.slots(2, len(text) + steps)
    slots.admit(one)
    for i in range(steps):
        text.append(rng.randrange(shape['vocab_size']))
        with torch.inference_mode(): z = run.step(torch.tensor(text[-1:]), slots, len(text))[0]
        if i in (0, 1, steps - 1): close(z, forward(model, text))


@pytest.mark.parametrize('n', [1, 2, 63, 64, 65, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 255, 256, 257, 3 * CHUNK + 1, 639, 640])
def test_prompts_around_chunks_windows_and_the_last_position(n):
    model, text = gpt(), words(random.Random(n), n, 300)   # reaches 640 positions, windows 64 and 128
    for length in (n, 640): close(read(runner(), text, length)[1], forward(model, text))


def test_steps_go_round_every_ring_up_to_the_last_position():
    """Rings of 192 and 128 places, 640 positions: three times round the longest, and to the end of the rotary table."""
    model, company = gpt(), Company(runner(), 3, 640, 0).play([('admit', 1), ('admit', 300), ('admit', 130), ('step', 639)])
    assert company.cache.rings == [192, 192, 128] and [len(text) for _, text, _ in company.all] == [640] * 3
    for n, text, logits in company.all:
        for at in (*range(n, 640, 45), 640): close(logits[at - n], forward(model, text[:at]))


@few(15)
@given(moves(200, 40), st.sampled_from([dict(), dict(sequence_len=520, n_layer=4, window_pattern='SSSL', n_kv_head=1), dict(n_layer=1, n_kv_head=4)]), st.integers(1, 5), st.integers(0, 999))
def test_rows_that_come_go_and_move_equal_the_forward_pass(moves, shape, slots, seed):
    """Every row of every moment, against the text alone: nothing is left of a slot's former tenant, nothing lost in a move."""
    company = Company(runner(**shape), slots, 400, seed).play(moves)
    for n, text, logits in company.all:
        for at in {n, min(n + 1, len(text)), len(text)}: close(logits[at - n], forward(gpt(**shape), text[:at]))


@few(15)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=6), st.integers(0, 99))
def test_reading_in_pieces_equals_reading_at_once(pieces, seed):
    text, cache = words(random.Random(seed), sum(pieces[:3]), 300), None
    for i, n in enumerate(pieces[:3]): cache, z = read(runner(), text[sum(pieces[:i]):sum(pieces[:i + 1])], 640, cache)
    whole, expected = read(runner(), text, 640)
    torch.testing.assert_close(z, expected, atol=1e-3, rtol=1e-4)
    close(z, forward(gpt(), text))
    assert cache.known == whole.known == [len(text)] and torch.equal(cache.last, whole.last)


def test_several_prompts_of_one_length_are_read_together():
    texts = [words(random.Random(i), 170, 300) for i in range(4)]
    cache = runner().scratch(4, 200)
    with torch.inference_mode(): z = runner().read(torch.tensor(texts), cache)
    for text, row in zip(texts, z): close(row, forward(gpt(), text))
    slots = runner().slots(8, 200)
    slots.admit(cache, copies=2)
    with torch.inference_mode(): z = runner().step(torch.arange(8), slots, 171)
    for i, row in enumerate(z): close(row, forward(gpt(), texts[i // 2] + [i]))


# --- the same bits in any company ------------------------------------------------------------------------------------

FORMS = [('float32', 'compute'), ('bfloat16', 'compute'), ('bfloat16', 'int8')]
WIDE = dict(n_head=6, n_kv_head=2, n_embd=192, vocab_size=333, sequence_len=128)


def check_bits(dtype, weights, shape, moves, slots, seed):
    """Each text of a busy cache again, alone in a cache of its own: every logit the same to the last bit."""
    run = runner(dtype, weights, **shape)
    for n, text, logits in Company(run, slots, 400, seed).play(moves).all:
        alone = run.slots(1, 400)
        one, z = read(run, text[:n], 400)
        alone.admit(one)
        assert torch.equal(z, logits[0])
        for at in range(n + 1, len(text) + 1):
            with torch.inference_mode(): z = run.step(torch.tensor([text[at - 1]]), alone, at)[0]
            assert torch.equal(z, logits[at - n]), f'position {at} of a text with a prompt of {n} tokens: off by {(z - logits[at - n]).abs().max():.1e}'


BUSY = [('admit', 5, 1), ('admit', 150, 2), ('step', 9), *[('admit', n, 1) for n in (1, 64, 65, 129, 31, 300)], ('step', 3), ('release', [0, 3]), ('step', 5), ('admit', 70, 3), ('step', 33),
        ('release', [1, 2, 5]), ('step', 9), ('release', [0, 1, 2, 3]), ('step', 3)]
SHORT = [('admit', 5, 1), ('admit', 150, 1), ('step', 2), ('admit', 63, 2), ('admit', 9, 1), ('step', 3), ('release', [0, 3]), ('step', 3)]


@exact_products
@pytest.mark.parametrize('dtype, weights', FORMS, ids=['-'.join(f) for f in FORMS])
@pytest.mark.parametrize('shape', [dict(), WIDE], ids=['small', 'wide'])
def test_bits_do_not_depend_on_the_company(dtype, weights, shape): check_bits(dtype, weights, shape, BUSY, 12, 0)


@exact_products
@few(8)
@given(moves(150, 20), st.sampled_from(FORMS), st.sampled_from([1, 2, 3, 5, 9, 17]), st.integers(0, 999))
def test_bits_do_not_depend_on_any_company(moves, form, slots, seed): check_bits(*form, {}, moves, slots, seed)


@exact_products
def test_bits_do_not_depend_on_the_company_with_two_threads():
    """Products are split among threads by their shape: the promise holds there as well."""
    code = "import test_inference as t\nfor form in t.FORMS: t.check_bits(*form, t.WIDE, t.SHORT, 12, 0)\nprint(t.torch.get_num_threads())"
    here = Path(__file__).parent
    env = {**os.environ, 'OMP_NUM_THREADS': '2', 'OMP_WAIT_POLICY': 'PASSIVE', 'PYTHONPATH': os.pathsep.join([str(here), str(here.parent)])}
    done = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ['2']


# --- where a step writes and what it sees ----------------------------------------------------------------------------

@few(60)
@given(st.sampled_from([1, 64, 100, 128, 256]), st.lists(st.integers(0, 999), min_size=1, max_size=5), st.integers(1, 3), st.integers(1, 3))
def test_step_reach_equals_reach(window, known, heads, groups):
    memory = RingCache([window], 5, 1000, heads, 2, CPU, torch.float32, 0)
    memory.known[:len(known)] = known
    memory.lengths[:len(known)] = torch.tensor(known)
    R, B, longest = memory.rings[0], len(known), max(known) + 1
    fast, slow = memory.step_reach(window, R, B, longest), reach(memory, window, R, memory.lengths[:B, None], longest, groups)
    assert torch.equal(fast.at, slow.at) and torch.equal(fast.bias.expand_as(slow.bias), slow.bias)
    assert (slow.bias == 0).sum(-1).unique().tolist() == sorted({min(p, window) + 1 for p in known}), 'a query sees itself and its window'


@few(25)
@given(st.lists(st.integers(0, 500), min_size=1, max_size=4), st.sampled_from([1, 2, 64, 65]), st.integers(1, 3), st.integers(1, 3), st.sampled_from([64, 256]), st.integers(0, 99))
def test_attention_of_a_gpu_equals_that_of_a_cpu(before, T, heads, groups, window, seed):
    """The fused kernel behind a mask and the two products with a bias, on the same places."""
    memory, g = RingCache([window], 4, 1000, heads, 8, CPU, torch.float32, 0), torch.Generator().manual_seed(seed)
    pos = torch.tensor(before)[:, None] + torch.arange(T)
    where = reach(memory, window, memory.rings[0], pos, max(before) + T, groups)
    B, L = len(before), where.seen.shape[-1]
    q, k, v = torch.randn(B * T, heads * groups, 8, generator=g), *torch.randn(2, B * heads, L, 8, generator=g)
    mask = torch.where(where.seen, 0.0, -torch.inf)[:, None]
    masked = attend(q, k, v, Reach(where.at, None, where.seen, mask), 1.5, T)
    torch.testing.assert_close(attend(q, k, v, where, 1.5, T), masked, atol=1e-5, rtol=1e-4)


def test_rings_are_as_long_as_needed_and_no_longer():
    for window in (1, 64, 127, 128, 1000):
        for length in (1, 64, 65, 700, 5000):
            for chunk in (1, CHUNK):
                assert ring_size(window, length, chunk) % 64 == 0 and min(length, window + chunk) <= ring_size(window, length, chunk) < min(length, window + chunk) + 64


@few(25)
@given(st.integers(1, 500), st.integers(1, 500), st.integers(0, 99))
def test_memory_that_was_used_reads_like_new(first, second, seed):
    """To the bit: nothing is seen of the prompt that was read into the same memory before."""
    run, rng = CachedGPT(gpt()), random.Random(seed)
    one, other = words(rng, first, 300), words(rng, second, 300)
    fresh = read(run, other, 640)[1]
    used, _ = read(run, one, 640)
    run.spare(used)
    again, z = read(run, other, 640)
    assert again is used and again.known == [second] and torch.equal(z, fresh)
    assert run.scratch(1, 640) is not used and run.scratch(2, 640).known == [0, 0], 'one at a time, and of the right size'
    run.spare(run.scratch(2, 640))
    assert not run.spares, 'what many prompts needed is let go'


# --- kept caches -----------------------------------------------------------------------------------------------------

@few(25)
@given(st.integers(1, 300), st.integers(0, 120), st.integers(0, 420), st.integers(1, 150), st.integers(0, 99))
def test_kept_caches_are_continued_from_any_place_they_allow(n, steps, cut, more, seed):
    """From its end, and cut back: the same as reading everything, while the slot it came from goes on and the kept cache stays as it was."""
    company = Company(runner(), 2, 640, seed).play([('admit', 3), ('admit', n), ('step', steps)])
    text = list(company.rows[1][1])
    kept, rng = company.cache.kept(1), random.Random(seed)
    company.play([('step', 20), ('release', [0]), ('admit', 50)])
    assert kept.can_cut(len(text)) and not kept.can_cut(len(text) + 1)
    for at in (len(text), min(cut, len(text))):
        if not kept.can_cut(at) or not at: continue
        for _ in range(2):
            cache, new = runner().scratch(1, 640), words(rng, more, 300)
            cache.start_from(kept, text[:at])
            assert cache.known == [at]
            close(read(runner(), new, 640, cache)[1], forward(gpt(), text[:at] + new))


def test_a_kept_cache_can_be_cut_while_its_rings_hold_the_windows():
    """Windows 64 and 128 in rings of 192 and 256 places: all of a short text, the end of a long one."""
    for n in (5, 128, 192):
        cache, _ = read(runner(), words(random.Random(0), n, 300), 640)
        assert all(cache.can_cut(m) for m in range(1, n + 1)) and not cache.can_cut(n + 1)
    cache, _ = read(runner(), words(random.Random(0), 500, 300), 640)
    allowed = [m for m in range(501) if cache.can_cut(m)]
    room = min(R - w for w, R in zip(cache.windows, cache.rings))
    assert allowed == list(range(allowed[0], 501)) and CHUNK <= len(allowed) <= room, 'a chunk at least can be taken back'
    text = words(random.Random(0), 500, 300)
    again = runner().scratch(1, 640)
    again.start_from(cache, text[:allowed[0]])
    close(read(runner(), [7] * 140, 640, again)[1], forward(gpt(), text[:allowed[0]] + [7] * 140))


# --- forms of weight -------------------------------------------------------------------------------------------------

def test_unknown_weights_are_refused_in_a_sentence():
    with pytest.raises(UserError, match="weights 'int4' are unknown; use 'compute'.*'int8'"): linear_forms(CPU, torch.float32, 'int4')
    with pytest.raises(UserError, match='unknown'): CachedGPT(gpt(), weights='fp8')


def test_without_the_private_operators_plain_products_do_it(monkeypatch):
    """Another build of PyTorch may lack them: found out by trying, and everything still works, also when int8 was asked for."""
    class Missing:
        def __init__(self, weight): raise AttributeError('no such operator')
    class Wrong(Dense):
        def plus(self, x, y): return y
    for form in (Missing, Wrong): assert not works(form, torch.float32)
    assert works(Dense, torch.float32) and works(Dense, torch.bfloat16)
    monkeypatch.setattr(inference, 'works', lambda form, dtype: False)
    assert linear_forms(CPU, torch.bfloat16, 'int8') == (Dense, Dense)
    run, text = CachedGPT(gpt(), 'int8'), words(random.Random(1), 200, 300)
    assert type(run.head) is Dense
    close(read(run, text, 300)[1], forward(gpt(), text))


def test_int8_only_where_it_helps():
    if works(Int8, torch.bfloat16): assert linear_forms(CPU, torch.bfloat16, 'int8')[1] is Int8
    assert linear_forms(CPU, torch.float32, 'int8')[1] is not Int8
    assert Int8 not in linear_forms(CPU, torch.bfloat16, 'compute')


def error(got, expected): return ((got - expected).norm() / (expected - expected.mean(-1, keepdim=True)).norm()).item()


@torch.inference_mode()
def step_logits(run, texts, at):
    """Capped logits (texts, positions from `at` on, V), the tokens from `at` on taken as steps."""
    slots, out, n = run.slots(len(texts), len(texts[0])), [], len(texts[0])
    for t in texts: slots.admit(read(run, t[:at], n)[0])
    for i in range(at, n): out.append(cap(run.step(torch.tensor([t[i] for t in texts]), slots, i + 1)))
    return torch.stack(out, 1)


@pytest.mark.parametrize('dtype, weights, bound', [('float32', 'compute', 1e-5), ('bfloat16', 'compute', 0.03), ('bfloat16', 'int8', 0.05)])
def test_error_of_each_form_is_bounded(dtype, weights, bound):
    """Relative to fp32, on a random model, which is harsher than a trained one; the same weights in every form."""
    texts = [words(random.Random(i), 60, 300) for i in range(4)]
    with torch.inference_mode(): truth = gpt()(torch.tensor(texts))[:, 20:]
    assert error(step_logits(runner(dtype, weights), texts, 20), truth) < bound


# --- no numbers without meaning --------------------------------------------------------------------------------------

@pytest.mark.parametrize('dtype, weights', FORMS, ids=['-'.join(f) for f in FORMS])
def test_rows_of_zeros_give_no_nan(monkeypatch, dtype, weights):
    """A token whose embedding is zero, a model of zeros, and one as it is at the start of training."""
    monkeypatch.setenv('NANOCHAT_DTYPE', dtype)
    silent = random_gpt()
    zeros, fresh = random_gpt(), random_gpt()
    fresh.init_weights()
    with torch.no_grad():
        silent.transformer.wte.weight[5] = 0
        for p in zeros.parameters(): p.zero_()
    for model in (silent, zeros, fresh):
        run = CachedGPT(model, weights)
        slots = run.slots(2, 64)
        for text in ([5], [5, 5, 1, 5]):
            cache, z = read(run, text, 64)
            assert z.isfinite().all() and (model is not zeros or z.eq(0).all())
            slots.admit(cache)
        with torch.inference_mode():
            for i in range(3): assert run.step(torch.tensor([5, i]), slots, 5 + i).isfinite().all()


# --- the public project's own numbers --------------------------------------------------------------------------------

@torch.inference_mode()
def greedy(run, prompt, n):
    cache, z = read(run, prompt, len(prompt) + n)
    out, slots = [z.argmax().item()], run.slots(1, len(prompt) + n)
    slots.admit(cache)
    while len(out) < n: out.append(run.step(torch.tensor(out[-1:]), slots, len(prompt) + len(out))[0].argmax().item())
    return out


def test_public_checkpoint_decodes_as_there(shared_data):
    """The reference model's 60 greedy tokens and its logits, as the public project computed them."""
    from nanochat.checkpoint_manager import build_model
    folder = shared_data/'reference'
    model, _, _ = build_model(folder/'base_checkpoints'/'d4', None, CPU)
    run, numbers = CachedGPT(model), json.loads((folder/'reference.json').read_text())
    prompt = numbers['prompt']
    assert len(numbers['greedy']) == len(prompt) + 60 and greedy(run, prompt, 60) == numbers['greedy'][len(prompt):]


@exact_products
def test_int8_mostly_agrees_on_a_trained_model(shared_data, monkeypatch):
    """The best token of int8 steps is the bf16 one nineteen times of twenty."""
    from nanochat.checkpoint_manager import build_model
    monkeypatch.setenv('NANOCHAT_DTYPE', 'bfloat16')
    model, _, _ = build_model(shared_data/'reference'/'base_checkpoints'/'d4', None, CPU)
    texts = torch.load(shared_data/'reference'/'reference.pt', weights_only=True)['x'][:2, :120].tolist()
    bf16, int8 = (step_logits(CachedGPT(model, weights), texts, 20) for weights in ('compute', 'int8'))
    assert (bf16.argmax(-1) == int8.argmax(-1)).float().mean() > 0.9 and error(int8, bf16) < 0.1
    assert not torch.equal(bf16, int8)


# --- accelerators ----------------------------------------------------------------------------------------------------

@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_graphs_equal_eager_steps_on_a_gpu(monkeypatch, dtype):
    """Recorded steps against the same steps run one by one, with rows that come, go and move; each run twice, so that recordings are used again."""
    monkeypatch.setenv('NANOCHAT_DTYPE', dtype)
    model = random_gpt().to('cuda')
    torch.set_default_device('cuda')   # of the ids that `Company` makes
    try:
        graphed, eager = runner_for(model), CachedGPT(model)
        assert type(graphed) is not CachedGPT
        for _ in range(2):
            a, b = (Company(run, 8, 400, 0).play(BUSY) for run in (graphed, eager))
            a.cache.idle = True   # its memory may be handed out again
            for (_, ta, la), (_, tb, lb) in zip(a.all, b.all):
                assert ta == tb
                torch.testing.assert_close(torch.stack(la), torch.stack(lb), atol=1e-3 if dtype == 'float32' else 0.2, rtol=1e-2)
    finally: torch.set_default_device(None)


@pytest.mark.skipif(not torch.backends.mps.is_available(), reason='needs an Apple GPU (MPS)')
def test_an_apple_gpu_gives_the_forward_pass(monkeypatch):
    model = gpt()
    run = CachedGPT(random_gpt().to('mps'))
    text = words(random.Random(0), 200, 300)
    with torch.inference_mode(): z = run.read(torch.tensor([text], device='mps'), run.scratch(1, 300))[0]
    close(z.cpu(), forward(model, text))
