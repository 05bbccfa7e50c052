"""The engine: cached equals uncached, rows do not know of each other, tools are forced and masked, limits hold. All in fp32."""
import json
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from nanochat.common import UserError
from nanochat.engine import (Engine, KVCache, Scheduler, SlotCache, ToolUse, calculator_text, context_limit, inference_copy, last_logits, next_token_odds, pick, read_prompt, sample_next_token, uniforms)
from nanochat.execution import use_calculator
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import RustBPETokenizer, StreamDecoder


def random_gpt(seed=0, **kw):
    """A GPT with every parameter random: zero-initialised projections, smear and lambdas would hide mistakes."""
    torch.manual_seed(seed)
    shape = dict(sequence_len=64, vocab_size=300, n_layer=3, n_head=4, n_kv_head=2, n_embd=64, window_pattern='SSL') | kw
    with torch.device('meta'): model = GPT(GPTConfig(**shape))
    model.to_empty(device='cpu')
    model.init_weights()
    with torch.no_grad():
        for p in model.parameters(): p.copy_(torch.randn(p.shape) * 0.3 + 1 if p.ndim < 2 else torch.randn(p.shape) * 2 * p.shape[-1]**-0.5)
    return model.eval()


class ByteTokenizer:
    """256 bytes and nine special tokens: enough of a tokenizer for the engine."""
    names = [f'<|{n}|>' for n in 'bos user_start user_end assistant_start assistant_end python_start python_end output_start output_end'.split()]
    def encode_special(self, name): return 256 + self.names.index(name)
    def get_bos_token_id(self): return 256
    def encode(self, text): return list(text.encode())
    def decode_single_token_bytes(self, i): return bytes([i]) if i < 256 else self.names[i - 256].encode()
    def decode(self, ids): return b''.join(map(self.decode_single_token_bytes, ids)).decode(errors='replace')


class SmallTokenizer(ByteTokenizer):
    """31 characters and the nine specials in 40 ids: a random model of 40 tokens ends its answers, and calls the calculator, every now and then."""
    alphabet = '0123456789+-*/%(). abcdefghijkl'
    def encode_special(self, name): return 31 + self.names.index(name)
    def get_bos_token_id(self): return 31
    def encode(self, text): return [self.alphabet.index(c) for c in text if c in self.alphabet]
    def decode(self, ids): return ''.join(self.alphabet[i] if i < 31 else self.names[i - 31] for i in ids)


TOK, SMALL = ByteTokenizer(), SmallTokenizer()
BOS, END = TOK.get_bos_token_id(), TOK.encode_special('<|assistant_end|>')


def prompts_of(rng, n, longest=30, vocab=250):
    return [[rng.randrange(vocab) for _ in range(rng.randrange(1, longest))] for _ in range(n)]


class Scripted:
    """Not a module: says the script's next token whatever it reads, or zeros (all tokens alike) without one."""
    def __init__(self, script=None, prompt_len=1, sequence_len=128, vocab=265):
        self.script, self.prompt_len, self.vocab, self.steps = script, prompt_len, vocab, []
        self.config = SimpleNamespace(n_layer=2, n_head=2, n_kv_head=1, n_embd=8, sequence_len=sequence_len)
    def get_device(self): return torch.device('cpu')
    def forward(self, ids, kv_cache=None):
        kv_cache.advance(ids.shape[1])
        self.steps.append(tuple(ids.shape))
        out = torch.zeros(*ids.shape, self.vocab)
        if self.script is not None:
            at = (kv_cache.cache_seqlens.long() - self.prompt_len).clamp(0, len(self.script) - 1)
            out[torch.arange(len(at)), -1, torch.tensor(self.script)[at]] = 100
        return out


@pytest.fixture(autouse=True)
def exact(fp32): torch.manual_seed(0)


@pytest.fixture(scope='module')
def model():
    with pytest.MonkeyPatch.context() as m:
        m.setenv('NANOCHAT_DTYPE', 'float32')
        return random_gpt()


@pytest.fixture(scope='module')
def small():
    """An engine whose answers end early now and then."""
    with pytest.MonkeyPatch.context() as m:
        m.setenv('NANOCHAT_DTYPE', 'float32')
        return Engine(random_gpt(vocab_size=40), SMALL)


# --- the cache -------------------------------------------------------------------------------------------------------

def test_cache_has_the_public_shape_and_methods():
    cache = KVCache(batch_size=2, num_heads=3, seq_len=64, head_dim=5, num_layers=6, device='cpu', dtype=torch.float32)
    assert cache.k_cache.shape == cache.v_cache.shape == (6, 2, 64, 3, 5) and cache.cache_seqlens.dtype == torch.int32
    assert cache.get_pos() == 0 and cache.prev_embedding is None
    k, v = cache.get_layer_cache(4)
    assert k.shape == (2, 64, 3, 5) and k.data_ptr() == cache.k_cache[4].data_ptr()
    cache.advance(10)
    assert cache.get_pos() == 10 and cache.cache_seqlens.tolist() == [10, 10]
    cache.prev_embedding = torch.ones(2, 1, 4)
    cache.reset()
    assert cache.get_pos() == 0 and cache.prev_embedding is None


def test_prefill_copies_one_row_to_all():
    source, target = KVCache(1, 2, 16, 4, 3, 'cpu', torch.float32), KVCache(4, 2, 32, 4, 3, 'cpu', torch.float32)
    source.k_cache[:, :, :9], source.v_cache[:, :, :9] = torch.randn(3, 1, 9, 2, 4), torch.randn(3, 1, 9, 2, 4)
    source.prev_embedding = torch.randn(1, 1, 8)
    source.advance(9)
    target.prefill(source)
    assert target.cache_seqlens.tolist() == [9] * 4 and target.prev_embedding.shape == (4, 1, 8)
    for b in range(4): assert torch.equal(target.k_cache[:, b, :9], source.k_cache[:, 0, :9]) and torch.equal(target.v_cache[:, b, :9], source.v_cache[:, 0, :9])
    target.k_cache[:, 0] += 1
    assert torch.equal(target.k_cache[:, 1, :9], source.k_cache[:, 0, :9]), 'rows must not share memory'
    with pytest.raises(ValueError): target.prefill(source)
    with pytest.raises(ValueError): KVCache(1, 2, 8, 4, 3, 'cpu', torch.float32).prefill(source)


SHAPES = [dict(), dict(n_kv_head=1), dict(n_kv_head=4, window_pattern='L'), dict(sequence_len=600, window_pattern='SSSL', n_layer=4), dict(n_layer=1, window_pattern='S')]


@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('prefill', [1, 2, 37])
def test_cached_logits_equal_uncached(shape, prefill):
    """Windows, grouped heads, smear, value embeddings, past the training length: the same logits at every position."""
    model = random_gpt(**shape)
    length = 200  # sequence_len 64: windows of 64 and 128 are left behind
    ids = torch.randint(0, 256, (2, length))
    with torch.inference_mode():
        full = model(ids)
        c = model.config
        cache = KVCache(2, c.n_kv_head, length, c.n_embd // c.n_head, c.n_layer, 'cpu', torch.float32)
        parts = [model(ids[:, :prefill], kv_cache=cache)] + [model(ids[:, t:t + 1], kv_cache=cache) for t in range(prefill, length)]
    assert cache.cache_seqlens.tolist() == [length] * 2
    torch.testing.assert_close(torch.cat(parts, 1), full, atol=2e-4, rtol=0)


def test_cached_logits_up_to_the_last_position(model):
    """The last positions of the rotary table, reached by decoding."""
    limit = context_limit(model)
    ids = torch.randint(0, 256, (1, limit))
    with torch.inference_mode():
        full, c = model(ids), model.config
        cache = KVCache(1, c.n_kv_head, limit, c.n_embd // c.n_head, c.n_layer, 'cpu', torch.float32)
        model(ids[:, :limit - 3], kv_cache=cache)
        last = torch.cat([model(ids[:, t:t + 1], kv_cache=cache) for t in range(limit - 3, limit)], 1)
    torch.testing.assert_close(last, full[:, -3:], atol=2e-4, rtol=0)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 100), st.integers(0, 30)), min_size=2, max_size=5), st.integers(0, 2**31))
def test_rows_at_different_positions_do_not_touch_each_other(rows, seed):
    """Rows of any lengths in one cache, decoded together, some leaving: each has the logits it has alone."""
    model, rng = MODEL, random.Random(seed)
    texts = [[rng.randrange(256) for _ in range(p + n + 1)] for p, n in rows]
    cache = SlotCache(model, len(rows), 8, 200, torch.float32)
    c, alive, at = model.config, list(range(len(rows))), [p for p, _ in rows]
    with torch.inference_mode():
        for (p, _), text in zip(rows, texts):
            one = KVCache(1, c.n_kv_head, p, c.n_embd // c.n_head, c.n_layer, 'cpu', torch.float32)
            read_prompt(model, torch.tensor([text[:p]]), one)
            cache.admit(one)
        while alive:
            cache.reserve(max(at[r] + 1 for r in alive))
            logits = model(torch.tensor([[texts[r][at[r]]] for r in alive]), kv_cache=cache)[:, -1]
            for r, row in zip(alive, logits):
                at[r] += 1
                if at[r] == len(texts[r]): torch.testing.assert_close(row, model(torch.tensor([texts[r]]))[0, -1], atol=2e-4, rtol=0)
            order = cache.release([i for i, r in enumerate(alive) if at[r] == len(texts[r])])
            alive = [alive[i] for i in order]
            assert cache.cache_seqlens.tolist() == [at[r] for r in alive]


@pytest.fixture(autouse=True, scope='module')
def share_model(model):
    global MODEL
    MODEL = model


def test_read_prompt_and_last_logits_equal_the_forward_pass(model):
    prompts = prompts_of(random.Random(0), 12, 50)
    got = last_logits(model, prompts, batch_tokens=100)
    with torch.inference_mode():
        for p, row in zip(prompts, got): torch.testing.assert_close(row, model(torch.tensor([p]))[0, -1], atol=2e-4, rtol=0)


# --- sampling --------------------------------------------------------------------------------------------------------

def test_sampling_follows_the_odds():
    logits = torch.tensor([[1.0, 3.0, -2.0, 0.5, 2.0]])
    for kw, expected in (({}, logits.softmax(-1)), (dict(temperature=0.5), (logits / 0.5).softmax(-1)), (dict(top_k=2), torch.where(logits >= 2, logits, -torch.inf).softmax(-1))):
        drawn = sample_next_token(logits.expand(100_000, -1), torch.Generator().manual_seed(1), **kw)
        assert drawn.shape == (100_000, 1)
        assert (torch.bincount(drawn[:, 0], minlength=5) / 1e5 - expected).abs().max() < 0.01


def test_top_k_off_is_none_or_zero_or_large():
    logits, u = torch.randn(50, 9), torch.rand(50)
    plain = pick(logits, u)
    assert torch.equal(plain, pick(logits, u, top_k=0)) and torch.equal(plain, pick(logits, u, top_p=1.0))
    assert pick(logits, u, top_k=99).shape == (50, 1)
    assert torch.equal(pick(logits, u, top_k=1), logits.argmax(-1, keepdim=True))


def test_top_p_keeps_the_smallest_set_that_holds_p():
    probs = torch.tensor([[0.15, 0.5, 0.05, 0.3]])
    for p, kept in ((0.4, {1}), (0.5, {1}), (0.51, {1, 3}), (0.9, {0, 1, 3}), (1.0, {0, 1, 2, 3}), (1e-6, {1})):
        drawn = sample_next_token(probs.log().expand(5000, -1), torch.Generator().manual_seed(0), top_p=p)
        assert set(drawn[:, 0].tolist()) == kept, p


@given(st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_extreme_uniform_numbers_pick_possible_tokens(seed):
    """The first and last representable number in [0, 1) never pick a token without odds."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, 50, generator=g) * 10
    logits[:, torch.randperm(50, generator=g)[:30]] = -torch.inf
    for u in (0.0, 1 - 2**-24):
        chosen = pick(logits, torch.full((4,), u))
        assert torch.isfinite(logits.gather(1, chosen)).all()


def test_temperature_zero_takes_the_best_and_draws_nothing():
    rng, logits = torch.Generator().manual_seed(3), torch.randn(6, 40)
    state = rng.get_state()
    assert torch.equal(sample_next_token(logits, rng, temperature=0), logits.argmax(-1, keepdim=True))
    assert torch.equal(rng.get_state(), state)
    with pytest.raises(UserError, match='temperature -1 '): sample_next_token(logits, rng, temperature=-1)


def test_streams_of_numbers_are_fixed_and_distinct():
    take = lambda *a: [u for u, _ in zip(uniforms(*a), range(200))]
    assert take(1) == take(1, 0) and len({tuple(take(s, i)) for s in range(5) for i in range(5)}) == 25
    assert all(0 <= u < 1 for u in take(7))


# --- generation ------------------------------------------------------------------------------------------------------

def test_first_tokens_of_samples_differ():
    """Each sample draws its own first token from the prefill's logits; sharing one was a bug of the public project."""
    engine = Engine(Scripted(), TOK)
    first, masks = next(engine.generate([BOS, 1], num_samples=16, max_tokens=1, seed=42))
    assert len(first) == len(masks) == 16 and len(set(first)) > 8


def test_greedy_equals_the_naive_loop(model):
    prompt = [5, 6, 7]
    naive = list(model.generate(prompt, max_tokens=30, temperature=0))
    stop = next((i for i, t in enumerate(naive) if t in (END, BOS)), len(naive))
    (ids,), (mask,) = Engine(model, NoTools()).generate_batch(prompt, max_tokens=30, temperature=0)
    assert ids == prompt + naive[:stop] and mask == [0] * 3 + [1] * stop


class NoTools(ByteTokenizer):
    """Marks for tools lie outside the model's vocabulary, so a random model never uses any."""
    def encode_special(self, name): return 256 + self.names.index(name) + (1000 if 'python' in name else 0)


@pytest.mark.parametrize('kw', [dict(temperature=0), dict(temperature=1.0), dict(temperature=0.7, top_k=10), dict(top_p=0.8)], ids=str)
@pytest.mark.parametrize('batch_size', [1, 5, 64])
def test_many_prompts_equal_one_by_one(small, kw, batch_size):
    """Different lengths, few slots, several samples, rows that end early: the same tokens and masks as alone."""
    engine, prompts = small, prompts_of(random.Random(3), 14, vocab=31)
    many = engine.generate_many(prompts, max_tokens=25, seed=100, num_samples=2, batch_size=batch_size, **kw)
    for i, p in enumerate(prompts): assert many[i] == engine.generate_batch(p, num_samples=2, max_tokens=25, seed=100 + i, **kw)
    assert len({len(ids) - len(p) for p, (samples, _) in zip(prompts, many) for ids in samples}) > 1, 'some row must end early for this test to mean something'


def test_seeds_decide_and_neighbours_do_not(small):
    engine, rng = small, random.Random(5)
    mine, others = [1, 2, 3], prompts_of(rng, 9, vocab=31)
    alone = engine.generate_many([mine], max_tokens=20, seed=[77])[0]
    assert engine.generate_many([*others, mine], max_tokens=20, seed=[*range(9), 77])[-1] == alone
    assert engine.generate_batch(mine, max_tokens=20, seed=77) == alone
    assert engine.generate_batch(mine, num_samples=5, max_tokens=20, seed=77)[0][0] == alone[0][0], 'sample 0 does not depend on how many there are'
    assert engine.generate_batch(mine, max_tokens=20, seed=78) != alone


def test_stream_equals_batch(small):
    engine, ends = small, (SMALL.encode_special('<|assistant_end|>'), SMALL.get_bos_token_id())
    for n in (1, 4):
        results, masks = engine.generate_batch([9, 8], num_samples=n, max_tokens=40, seed=3)
        got, got_masks, done = [[9, 8] for _ in range(n)], [[0, 0] for _ in range(n)], [False] * n
        for column, column_masks in engine.generate([9, 8], num_samples=n, max_tokens=40, seed=3):
            assert len(column) == len(column_masks) == n
            for i, (t, m) in enumerate(zip(column, column_masks)):
                if done[i]: assert m == 0 and t in ends
                elif t in ends: done[i] = True
                else: got[i].append(t), got_masks[i].append(m)
        assert got == results and got_masks == masks


def test_ends_and_keeps_the_end_token_when_asked():
    for end in (END, BOS):
        engine = Engine(Scripted([65, 66, end, 67], prompt_len=2), TOK)
        assert engine.generate_batch([1, 2], temperature=0) == ([[1, 2, 65, 66]], [[0, 0, 1, 1]])
        assert engine.generate_many([[1, 2]], temperature=0, keep_end=True)[0] == ([[1, 2, 65, 66, end]], [[0, 0, 1, 1, 1]])


@pytest.mark.parametrize('n', [1, 2, 7])
def test_max_tokens(n):
    engine = Engine(Scripted([65], prompt_len=1), TOK)
    assert len(list(engine.generate([1], max_tokens=n, temperature=0))) == n
    assert engine.generate_batch([1], max_tokens=n, temperature=0)[0] == [[1] + [65] * n]


def test_finished_rows_leave_the_batch(small, monkeypatch):
    """The work done is the sum of the answers' lengths, not the longest times the rows; counted, not timed."""
    engine, prompts = small, prompts_of(random.Random(3), 20, vocab=31)
    fed = []
    runner = engine.runner()
    step = runner.step
    monkeypatch.setattr(runner, 'step', lambda ids, *rest: fed.append(len(ids)) or step(ids, *rest))
    out = engine.generate_many([p + [0] for p in prompts], max_tokens=40, seed=1, keep_end=True)
    new = [len(ids[0]) - len(p) - 1 for p, (ids, _) in zip(prompts, out)]
    assert sum(fed) == sum(n - 1 for n in new) and sum(fed) < 0.8 * max(new) * len(new)


def test_empty_list_of_prompts(model):
    assert Engine(model, TOK).generate_many([]) == []


def test_closing_a_stream_stops_the_work():
    model = Scripted([65], prompt_len=1)
    stream = Engine(model, TOK).generate([1], temperature=0)
    for _ in range(3): next(stream)
    stream.close()
    assert len(model.steps) <= 4 and not torch.is_inference_mode_enabled()


# --- tools -----------------------------------------------------------------------------------------------------------

def call(text): return [TOK.encode_special('<|python_start|>'), *TOK.encode(text), TOK.encode_special('<|python_end|>')]


def test_tool_output_is_forced_and_masked():
    script = [*TOK.encode('a'), *call('12*7'), *TOK.encode('....'), *TOK.encode('b'), END]
    (ids,), (mask,) = Engine(Scripted(script, prompt_len=1), TOK).generate_batch([1], temperature=0)
    assert TOK.decode(ids[1:]) == 'a<|python_start|>12*7<|python_end|><|output_start|>84<|output_end|>b'
    assert mask == [0] + [1] * 7 + [0] * 4 + [1]


@pytest.mark.parametrize('expression', ['import os', '9**9**9', '', '1/0'])
def test_refused_expressions_force_nothing(expression):
    script = [*call(expression), *TOK.encode('hm'), END]
    (ids,), (mask,) = Engine(Scripted(script, prompt_len=1), TOK).generate_batch([1], temperature=0)
    assert TOK.decode(ids[1:]) == f'<|python_start|>{expression}<|python_end|>hm' and sum(mask) == len(ids) - 1


def test_odd_orders_of_marks_do_no_harm():
    start, end = call('')
    for script in ([end, 65], [start, start, *TOK.encode('1+1'), end, 65], [start, 65], [end, end], [*call('1'), *call('2')]):
        Engine(Scripted([*script, END], prompt_len=1), TOK).generate_batch([1], temperature=0, max_tokens=30)


class DigitTokenizer(SmallTokenizer):
    """Three digits and the four marks of tools: a hot random model of 7 tokens cannot help calling the calculator, and never ends."""
    names = ByteTokenizer.names[5:] + ByteTokenizer.names[:5]
    def encode_special(self, name): return 3 + self.names.index(name)
    def get_bos_token_id(self): return self.encode_special('<|bos|>')
    def encode(self, text): return [int(c) for c in text]
    def decode(self, ids): return ''.join(str(i) if i < 3 else self.names[i - 3] for i in ids)


def test_tools_of_rows_are_independent():
    tok = DigitTokenizer()
    engine, prompts = Engine(random_gpt(vocab_size=7), tok), prompts_of(random.Random(1), 20, vocab=3)
    many = engine.generate_many(prompts, max_tokens=30, seed=9, num_samples=3, batch_size=7, temperature=4.0)
    assert many == [engine.generate_batch(p, num_samples=3, max_tokens=30, seed=9 + i, temperature=4.0) for i, p in enumerate(prompts)]
    calls = [(ids, mask, mask.index(0, mask.index(1))) for samples, masks in many for ids, mask in zip(samples, masks) if 1 in mask and 0 in mask[mask.index(1):]]
    assert len(calls) > 3, 'some rows must have called the calculator for this test to mean something'
    for ids, mask, at in calls:
        text = tok.decode(ids[:at])
        expression = text[text.rindex('<|python_start|>') + 16:text.rindex('<|python_end|>')]
        forced = ['<|output_start|>', *str(int(expression)), '<|output_end|>'][:len(ids) - at]
        assert [tok.decode([i]) for i in ids[at:at + len(forced)]] == forced and mask[at:at + len(forced)] == [0] * len(forced)


# --- limits ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('make', [lambda: random_gpt(sequence_len=8, n_layer=1, window_pattern='L', vocab_size=256), lambda: Scripted([65], prompt_len=10**6, sequence_len=80)], ids=['gpt', 'scripted'])
def test_context_limit(make):
    model = make()
    engine, limit = Engine(model, TOK), context_limit(model)
    assert limit == 80
    for length, room in ((limit - 2, 2), (limit - 1, 1)):
        for max_tokens in (None, room, room + 1, 1000):
            ids, _ = engine.generate_batch([1] * length, max_tokens=max_tokens, temperature=0)
            assert len(ids[0]) == limit
        assert len(list(engine.generate([1] * length))) == room
    for length in (limit, limit + 1):
        with pytest.raises(UserError, match=f'{length} tokens.*at most {limit}'): engine.generate([1] * length)  # before the first token
        with pytest.raises(UserError): engine.generate_many([[1], [1] * length], max_tokens=1)


@pytest.mark.parametrize('kw', [dict(temperature=-1), dict(temperature=math.nan), dict(temperature=math.inf), dict(top_k=-1), dict(top_p=0.0), dict(top_p=-.5), dict(top_p=1.5),
                                dict(top_p=math.nan), dict(max_tokens=-1), dict(max_tokens=0), dict(max_tokens=math.inf), dict(max_tokens=math.nan), dict(top_k=math.inf), dict(num_samples=0)], ids=str)
def test_settings_without_meaning_are_refused(kw):
    """In a sentence that names the setting, before the model has run once."""
    model, (name, value), = Scripted(), *kw.items()
    model.forward = lambda *a, **k: pytest.fail('work began')
    engine = Engine(model, TOK)
    for begin in (engine.generate, engine.generate_batch, lambda tokens, **kw: engine.generate_many([tokens], **kw)):
        with pytest.raises(UserError, match=rf'^{name} {value} '): begin([1], **kw)
    for fine in (dict(temperature=0), dict(top_k=0), dict(top_p=1.0), dict(top_p=None), dict(max_tokens=None)): engine.generate([1], **fine)


@pytest.mark.parametrize('in_c', [True, False])
def test_whole_numbers_of_any_kind(model, in_c):
    """3.0 and numpy's and torch's 3 mean 3, wherever a whole number is asked for."""
    engine = Engine(model, TOK, in_c=in_c)
    expected = engine.generate_batch([5, 7], 2, max_tokens=6, top_k=3)
    for three, two in ((3.0, 2.0), (np.int64(3), np.float32(2)), (torch.tensor(3), torch.tensor(2.))):
        assert engine.generate_batch([5, 7], two, max_tokens=6, top_k=three) == expected
        with Scheduler(engine, slots=two, max_waiting=three, chunk=three, kept=two, limit=60.0) as s:
            assert [([t], [m]) for t, m in s.submit([5, 7], max_tokens=6, top_k=three)] == list(engine.generate([5, 7], max_tokens=6, top_k=3))
    assert sample_next_token(torch.zeros(2, 9), torch.Generator(), top_k=3.0).shape == (2, 1)
    with pytest.raises(UserError, match='num_samples 1.5'): engine.generate_batch([5], 1.5)


@pytest.mark.parametrize('make', [lambda p: np.array(p, dtype=np.uint16), lambda p: np.array(p, dtype=np.int32), lambda p: torch.tensor(p, dtype=torch.int32), tuple,
                                  lambda p: [np.int32(t) for t in p], lambda p: [torch.tensor(t) for t in p]])
@pytest.mark.parametrize('in_c', [True, False])
def test_a_prompt_of_any_kind_of_ints(model, make, in_c):
    """As token files hold them: the answer is that to a list of Python's ints."""
    engine, prompt = Engine(model, TOK, in_c=in_c), [5, 200, 7, 9]
    expected = engine.generate_batch(prompt, max_tokens=6)
    assert engine.generate_batch(make(prompt), max_tokens=6) == expected and list(engine.generate(make(prompt), max_tokens=6)) == list(engine.generate(prompt, max_tokens=6))
    with Scheduler(engine) as s: assert list(s.submit(make(prompt), max_tokens=6)) == list(s.submit(prompt, max_tokens=6))


@pytest.mark.parametrize('prompt', ['Why?', [1.0, 2.0], [1, None], np.array([.5]), 5])
def test_a_prompt_that_is_no_list_of_ids_is_refused(model, prompt):
    with Scheduler(Engine(model, TOK)) as s:
        for begin in (s.engine.generate, s.engine.generate_batch, s.submit):
            with pytest.raises(UserError, match='token ids'): begin(prompt, max_tokens=2)


@pytest.mark.parametrize('in_c', [True, False])
@pytest.mark.parametrize('top_k', [None, 20])
@pytest.mark.parametrize('top_p', [1e-300, 1e-50, 1e-40, 1e-9])
def test_a_tiny_top_p_leaves_the_best(model, in_c, top_k, top_p):
    engine = Engine(model, TOK, in_c=in_c)
    assert engine.generate_batch([1, 2, 3], 2, max_tokens=12, top_p=top_p, top_k=top_k) == engine.generate_batch([1, 2, 3], 2, max_tokens=12, temperature=0)


def test_seeds_for_other_prompts_are_refused(model):
    with pytest.raises(UserError, match='1 seeds for 2 prompts'): Engine(model, TOK).generate_many([[1], [2]], seed=[1])


def test_an_empty_prompt_is_refused():
    with pytest.raises(UserError, match='empty'): Engine(Scripted(), TOK).generate([])


# --- weights ---------------------------------------------------------------------------------------------------------

def test_inference_copy_is_exact_and_leaves_training_alone(monkeypatch):
    monkeypatch.setenv('NANOCHAT_DTYPE', 'bfloat16')
    model = random_gpt(vocab_size=256).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fast, ids = inference_copy(model), torch.randint(0, 256, (2, 20))
    assert fast.lm_head.weight.dtype == torch.bfloat16 and model.lm_head.weight.dtype == torch.float32
    with torch.no_grad(): assert torch.equal(fast(ids), model(ids))
    stream = Engine(model, TOK).generate([1, 2], max_tokens=9)
    next(stream)  # left half-finished
    model(ids, ids).backward()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad.dtype == p.dtype for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize('training', [True, False])
def test_changed_weights_are_noticed(monkeypatch, training):
    monkeypatch.setenv('NANOCHAT_DTYPE', 'bfloat16')
    model = random_gpt(vocab_size=256).train(training)
    engine = Engine(model, TOK)
    first = engine.generate_batch([1, 2], max_tokens=20, temperature=0)
    assert engine.generate_batch([1, 2], max_tokens=20, temperature=0) == first
    with torch.no_grad():
        for p in model.lm_head.parameters(): p.copy_(torch.randn_like(p))
    assert engine.generate_batch([1, 2], max_tokens=20, temperature=0) == Engine(model, TOK).generate_batch([1, 2], max_tokens=20, temperature=0) != first


# --- text ------------------------------------------------------------------------------------------------------------

TEXTS = ['Hello', '😀👩‍👩‍👧‍👦🏳️‍🌈', '你好，世界。漢字', 'مرحبا بالعالم', 'naïve Ελληνικά русский', 'e\u0301\u200d']


@pytest.mark.parametrize('text', TEXTS)
def test_streamed_pieces_equal_the_decoded_whole(text):
    """Bytes arrive one by one, the worst case: no piece holds half a character."""
    engine = Engine(Scripted([*text.encode(), END], prompt_len=1, sequence_len=512), TOK)
    pieces = list(engine.stream([1], temperature=0))
    assert ''.join(pieces) == text and not any('\ufffd' in p for p in pieces)


def test_streamed_pieces_with_the_real_tokenizer():
    tok = RustBPETokenizer.train_from_iterator(['Hello there, ' + t for t in TEXTS] * 3, 300)
    for text in TEXTS:
        ids = tok.encode(text)
        decoder = StreamDecoder(tok)
        assert ''.join([*map(decoder.push, ids), decoder.flush()]) == tok.decode(ids) == text
    cut = tok.encode('好')[:-1] or list('好'.encode()[:2])
    decoder = StreamDecoder(tok)
    assert ''.join([*map(decoder.push, cut), decoder.flush()]) == tok.decode(cut)


# --- the public project's own numbers --------------------------------------------------------------------------------

def test_public_checkpoint_decodes_as_there(shared_data):
    """Prefill, ten cached steps and 60 greedy tokens of the reference model, as the public project computed them."""
    from nanochat.checkpoint_manager import build_model
    folder = shared_data/'reference'
    model, tok, _ = build_model(folder/'base_checkpoints'/'d4', None, torch.device('cpu'))
    ref, c = torch.load(folder/'reference.pt', weights_only=True), model.config
    x, cached = ref['x'][:, :150], ref['cached']
    cache = KVCache(len(x), c.n_kv_head, 160, c.n_embd // c.n_head, c.n_layer, 'cpu', torch.float32)
    with torch.inference_mode(): steps = [read_prompt(model, x[:, :140], cache)] + [model(x[:, t:t + 1], kv_cache=cache)[:, -1] for t in range(140, 150)]
    got = torch.stack(steps, 1)
    torch.testing.assert_close(got.flatten(), cached.float().flatten(), atol=2e-5, rtol=0)
    numbers = json.loads((folder/'reference.json').read_text())
    prompt, new = numbers['prompt'], numbers['greedy'][len(numbers['prompt']):]
    assert len(new) == 60
    ends = (tok.encode_special('<|assistant_end|>'), tok.get_bos_token_id())
    stop = next((i for i, t in enumerate(new) if t in ends), len(new))
    assert Engine(model, tok).generate_batch(prompt, max_tokens=len(new), temperature=0)[0] == [prompt + new[:stop]]


# --- what the calculator writes --------------------------------------------------------------------------------------

@pytest.mark.parametrize('expression, text', [('48/2', '24'), ('2.5*4', '10'), ('0.1+0.2', '0.3'), ('10/4', '2.5'), ('1/3', '0.333333333333'), ('-6/2', '-3'), ('0*-1.5', '0'),
                                              ('7*8', '56'), ('2**70', str(2**70)), ('10**14/1', '100000000000000'), ('3*10**20/1', '3e+20'), ("'strawberry'.count('r')", '3')])
def test_results_are_written_as_people_write_them(expression, text):
    assert calculator_text(use_calculator(expression)) == text
    calls = ToolUse(TOK)
    said = [calls.next(t)[0] for t in [TOK.encode_special('<|python_start|>'), *TOK.encode(expression), TOK.encode_special('<|python_end|>'), *[65] * 60]]
    assert f'<|output_start|>{text}<|output_end|>' in TOK.decode(said)
