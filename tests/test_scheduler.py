"""The scheduler: each request gets what it would get alone, whoever comes, goes, fails or falls asleep; nothing hangs and nothing is left behind."""
import asyncio
import functools
import gc
import itertools
import os
import random
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings, strategies as st

import nanochat.engine as engine_module
from nanochat.common import UserError
from nanochat.engine import Batch, Busy, Decoder, Draw, Engine, Prefixes, Requests, Scheduler, Ticket, wake
from test_engine import SMALL, TOK, DigitTokenizer, Scripted, call, prompts_of, random_gpt

LIMIT, END = 200, TOK.encode_special('<|assistant_end|>')
few = lambda n: settings(max_examples=n, deadline=None, derandomize=True)


@pytest.fixture(autouse=True)
def exact(fp32): torch.manual_seed(0)


@functools.cache
def engine(dtype='float32', weights='compute'):
    """A random model of 40 tokens, whose answers end and call the calculator now and then."""
    with pytest.MonkeyPatch.context() as m:
        m.setenv('NANOCHAT_DTYPE', dtype)
        made = Engine(random_gpt(vocab_size=40, n_layer=2, window_pattern='SL'), SMALL, weights=weights)
        made.runner()
        return made


class Echo(torch.nn.Module):
    """Says the last token it read again: whose tokens are whose is plain to see."""
    config = SimpleNamespace(n_layer=1, n_head=1, n_kv_head=1, n_embd=2, sequence_len=100_000)
    def get_device(self): return torch.device('cpu')
    def forward(self, ids, kv_cache=None):
        kv_cache.advance(ids.shape[1])
        return torch.nn.functional.one_hot(ids, 256).float()


class Watched:
    """What a runner is asked for, in order; `hold` makes it wait for `allow` before each call."""
    all = weakref.WeakSet()
    def __init__(self, engine):
        self.engine, self.log, self.gate, runner = engine, [], None, engine.runner()
        def watch(name, act):
            def watched(ids, cache, *rest):
                if gate := self.gate: gate.acquire()
                self.log.append((name, *ids.shape))
                return act(ids, cache, *rest)
            return watched
        self.all.add(self)
        runner.read, runner.step = watch('read', runner.read), watch('step', runner.step)

    def hold(self): self.gate = threading.Semaphore(0)
    def allow(self, n=1): self.gate.release(n)
    def open(self):
        gate, self.gate = self.gate, None
        if gate: gate.release(10**6)
    def read(self): return sum(n for name, *shape in self.log if name == 'read' for n in shape[1:])
    def steps(self): return sum(name == 'step' for name, *_ in self.log)


def until(condition, seconds=120):
    """Wait for something that another thread does; never for ever."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'nothing happened'
        time.sleep(0.0005)


def finished(*tickets):
    until(lambda: all(t.done() for t in tickets))
    return [t.tokens for t in tickets]


def alone(engine, prompt, max_tokens=None, limit=LIMIT, seed=42, **kw):
    """(token, mask) pairs of an answer nobody else was near."""
    (ids,), (masks,) = engine.generate_many([prompt], seed=[seed], keep_end=True, max_tokens=min(max_tokens or limit, limit - len(prompt)), **kw)[0]
    return list(zip(ids, masks))[len(prompt):]


@pytest.fixture
def make():
    """Schedulers that are closed in the end, and a test that fails if one does not."""
    made = []
    def make(engine, **kw):
        made.append(Scheduler(engine, **({'limit': LIMIT} | kw)))
        return made[-1]
    yield make
    for w in Watched.all: w.open()
    for s in made:
        closing = threading.Thread(target=s.close, kwargs=dict(drain=False), daemon=True)
        closing.start()
        closing.join(120)
        assert not closing.is_alive(), 'close hangs'


# --- the same tokens, whatever else is running -----------------------------------------------------------------------

DRAWS = [dict(temperature=0.0), dict(temperature=1.0), dict(temperature=0.7, top_k=10), dict(top_p=0.8), dict(temperature=1.5, top_k=5, top_p=0.9)]
requests = st.lists(st.fixed_dictionaries(dict(
    n=st.one_of(st.integers(1, 30), st.integers(1, LIMIT - 1)), max_tokens=st.one_of(st.integers(1, 40), st.none()), draw=st.sampled_from(DRAWS), seed=st.integers(0, 99),
    before=st.sampled_from([0, 0, 1, 3, 8]), cancel=st.sampled_from([None, None, None, 0, 1, 5]))), min_size=2, max_size=9)


def play(scheduler, asked, texts):
    """Submit each request when some running one is `before` tokens further; cancel it after `cancel` tokens."""
    def leave(ticket, n):
        until(lambda: len(ticket.tokens) >= n or ticket.done())
        ticket.cancel()
    tickets, leavers = [], []
    for r, text in zip(asked, texts):
        if tickets:
            last, have = tickets[-1], len(tickets[-1].tokens)
            until(lambda: last.done() or len(last.tokens) >= have + r['before'])
        tickets.append(scheduler.submit(text, max_tokens=r['max_tokens'], seed=r['seed'], **r['draw']))
        if r['cancel'] is None: continue
        leavers.append(threading.Thread(target=leave, args=(tickets[-1], r['cancel'])))
        leavers[-1].start()
    finished(*tickets)
    for t in leavers: t.join()
    return tickets


def check_play(engine, asked, slots, chunk, kept, seed):
    rng = random.Random(seed)
    shared, texts = [rng.randrange(31) for _ in range(LIMIT)], [[rng.randrange(31) for _ in range(r['n'])] for r in asked]
    if kept: texts = [shared[:k] + t[k:] for t in texts for k in [rng.choice([0, len(t) // 2, len(t) - 1, len(t)])]]
    with Scheduler(engine, slots=slots, chunk=chunk, kept=kept, limit=LIMIT) as s: tickets = play(s, asked, texts)
    for r, text, ticket in zip(asked, texts, tickets):
        expected = alone(engine, text, r['max_tokens'], seed=r['seed'], **r['draw'])
        if ticket.finish_reason == 'cancelled': assert r['cancel'] is not None and ticket.tokens == expected[:len(ticket.tokens)]
        else:
            assert ticket.tokens == expected and ticket.error is None
            assert ticket.finish_reason == ('stop' if expected[-1][0] in (SMALL.encode_special('<|assistant_end|>'), SMALL.get_bos_token_id()) else 'length')
    counts, got = s.stats(), sum(len(t.tokens) for t in tickets)
    assert counts['submitted'] == len(asked) == counts['finished'] + counts['cancelled'] and counts['failed'] == counts['refused'] == counts['active'] == counts['waiting'] == 0
    assert counts['cancelled'] == sum(t.finish_reason == 'cancelled' for t in tickets) and counts['generated_tokens'] == got
    assert counts['prompt_tokens'] == sum(t.prompt_tokens for t in tickets if t.started) and counts['reused_tokens'] == sum(t.reused for t in tickets)
    assert -(-got // slots) <= counts['steps'] <= got or not got
    for t in tickets:
        times = [x for x in (t.submitted, t.started, t.first_token, t.finished) if x is not None]
        assert times == sorted(times) and (t.first_token is None) == (not t.tokens)


@few(20)
@given(requests, st.integers(1, 5), st.sampled_from([7, 32, 128]), st.sampled_from([0, 3]), st.integers(0, 999))
def test_every_request_gets_what_it_gets_alone(asked, slots, chunk, kept, seed):
    """Requests with settings of their own, coming and leaving at odd moments; the counts add up. In fp32 also where a conversation is continued."""
    check_play(engine(), asked, slots, chunk, kept, seed)


@few(15)
@given(requests, st.integers(1, 5), st.sampled_from([128, 256]), st.integers(0, 999), st.sampled_from(['compute', 'int8']))
def test_every_request_gets_what_it_gets_alone_in_bf16(asked, slots, chunk, seed, weights):
    """And with int8 weights. Chunks as the engine reads them: pieces of another size round differently."""
    check_play(engine('bfloat16', weights), asked, slots, chunk, 0, seed)


def test_different_settings_in_one_batch(make):
    tickets, s = [], make(engine(), slots=5)
    for i, draw in enumerate(DRAWS * 2): tickets.append(s.submit([1, 2, 3], max_tokens=20, seed=i, **draw))
    for i, (draw, tokens) in enumerate(zip(DRAWS * 2, finished(*tickets))): assert tokens == alone(engine(), [1, 2, 3], 20, seed=i, **draw)
    assert tickets[0].tokens == tickets[5].tokens and len({tuple(t.tokens) for t in tickets}) > 4


@few(15)
@given(st.lists(st.tuples(st.integers(1, 255), st.integers(1, 60)), min_size=1, max_size=40), st.integers(1, 8), st.integers(1, 8))
def test_threads_that_submit_at_once_get_their_own_tokens(clients, threads, slots):
    """Each says its own number: a token in another's answer would show."""
    answers, start = [None] * len(clients), threading.Barrier(threads)
    def submit(mine):
        start.wait()
        for i in mine: answers[i] = [t for t, _ in s.submit([clients[i][0]], max_tokens=clients[i][1], temperature=0)] if i % 2 else s.submit([clients[i][0]], max_tokens=clients[i][1], temperature=0)
    with Scheduler(Engine(Echo().eval(), TOK), slots=slots, limit=LIMIT) as s:
        workers = [threading.Thread(target=submit, args=(range(k, len(clients), threads),)) for k in range(threads)]
        for w in workers: w.start()
        for w in workers: w.join(60)
    ids = [a.id for a in answers if isinstance(a, Ticket)]
    assert len(set(ids)) == len(ids)
    for (token, n), a in zip(clients, answers): assert ([t for t, _ in a.tokens] if isinstance(a, Ticket) else a) == [token] * n


# --- a step ahead ----------------------------------------------------------------------------------------------------

def decode(engine, ahead, prompts, budgets, draw, slots):
    """All (token, mask) pairs of each prompt, and the runner's work, with or without a step ahead."""
    out = [[] for _ in prompts]
    for step in Decoder(engine.runner(), engine.tokenizer, Requests(prompts, budgets, list(range(len(prompts))), 1, draw), slots, ahead=ahead).steps():
        for row, mask in step: out[row.request].append((row.token, mask))
    return out


SCRIPT = [*TOK.encode('a'), *call('12*7'), *TOK.encode('....!'), *call('1/0'), *TOK.encode('b'), *call('3'), *call('44'), *TOK.encode('cd'), END, *TOK.encode('never')]


@pytest.mark.parametrize('slots', [1, 3, 16])
def test_ahead_equals_behind_for_every_budget_of_a_script(slots):
    """Forced tokens, refused expressions, ends, and budgets that end anywhere, also among forced tokens; rows at different places of the script."""
    scripted, budgets = Engine(Scripted(SCRIPT, prompt_len=12), TOK), list(range(1, 45))
    prompts = [[1] * (1 + i % 12) for i in range(len(budgets))]
    behind, ahead = (decode(scripted, a, prompts, budgets, Draw(0.0), slots) for a in (False, True))
    assert ahead == behind
    assert {m for row in behind for _, m in row} == {0, 1} and any(row[-1][0] == END for row in behind) and [len(behind[i]) for i in range(9)] == list(range(1, 10))


@few(10)
@given(st.integers(0, 99), st.integers(1, 9), st.sampled_from([0.0, 1.0, 4.0]))
def test_ahead_equals_behind_for_a_model_that_plays_with_its_tools(seed, slots, temperature):
    digits, rng = playful(), random.Random(seed)
    prompts, budgets = prompts_of(rng, 10, vocab=3), [rng.randrange(1, 60) for _ in range(10)]
    behind, ahead = (decode(digits, a, prompts, budgets, Draw(temperature), slots) for a in (False, True))
    assert ahead == behind


@functools.cache
def playful(): return Engine(random_gpt(vocab_size=7, n_layer=2), DigitTokenizer())


def test_a_scheduler_a_step_ahead_gives_the_same(make, monkeypatch):
    """As on a GPU: with cancellations, budgets, reuse and answers up to the context limit."""
    playful().runner()
    s, rng = make(playful(), slots=3, limit=100), random.Random(0)
    prompts = prompts_of(rng, 20, vocab=3, longest=50) + [[1] * 99, [2] * 98]
    with monkeypatch.context() as m:   # until the batch has been opened
        m.setattr(engine_module, 'Batch', functools.partial(Batch, ahead=True))
        tickets = [s.submit(p, max_tokens=[None, 30, 1, 60][i % 4], temperature=4.0, seed=i) for i, p in enumerate(prompts)]
        for t in tickets[:20:5]: t.cancel()
        finished(*tickets)
    assert s.batch.ahead and any(mask == 0 for t in tickets for _, mask in t.tokens)
    for i, (p, t) in enumerate(zip(prompts, tickets)):
        expected = alone(playful(), p, [None, 30, 1, 60][i % 4], limit=100, temperature=4.0, seed=i)
        assert t.tokens == (expected[:len(t.tokens)] if t.cancelled else expected)
    first = next(t for t in tickets if t.finish_reason == 'length' and t.budget == 30)
    follow = s.submit(text := first.prompt + [t for t, _ in first.tokens] + [0, 1], max_tokens=20, temperature=4.0)
    assert finished(follow) == [alone(playful(), text, 20, limit=100, temperature=4.0)]


# --- conversations are continued -------------------------------------------------------------------------------------

def test_the_next_turn_reads_only_what_is_new(make):
    """Five turns: each prompt is the whole conversation, and what is read of it is what the scheduler has not seen. The same tokens as without."""
    watched, text = Watched(Engine(engine().model, SMALL)), [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
    s = make(watched.engine, slots=2, chunk=16)
    for turn in range(5):
        before, ticket = watched.read(), s.submit(text, max_tokens=15, seed=turn)
        finished(ticket)
        assert ticket.tokens == alone(engine(), text, 15, seed=turn)
        assert watched.read() - before == ticket.prompt_tokens - ticket.reused
        if turn: assert ticket.reused >= turn_end - 1, 'all but the last token of the turn before'
        turn_end = len(text) + len(ticket.tokens)
        text = text + [t for t, _ in ticket.tokens] + [7, 7, turn]
    assert s.stats()['reused_tokens'] > 0


def test_chats_with_the_same_beginning_share_it(make):
    """A system prompt is read once; the second chat cuts back to where the two part."""
    s, shared = make(engine(), slots=1), list(range(30))
    first, second, other = (s.submit(p, max_tokens=5) for p in (shared + [1, 2, 3], shared + [4, 5], [9] * 30))
    finished(first, second, other)
    assert (first.reused, second.reused, other.reused) == (0, 30, 0)
    assert second.tokens == alone(engine(), shared + [4, 5], 5)


def test_an_edited_turn_and_a_retry_start_from_what_is_the_same(make):
    s, text = make(engine(), slots=2), list(range(31)) * 2
    a = s.submit(text, max_tokens=9)
    finished(a)
    retry, edited = s.submit(text, max_tokens=9, seed=1), s.submit(text[:40] + [0] + text[41:], max_tokens=9)
    finished(retry, edited)
    assert retry.reused == len(text) - 1 and edited.reused == 40
    assert retry.tokens == alone(engine(), text, 9, seed=1) and edited.tokens == alone(engine(), edited.prompt, 9)


def test_an_edit_too_far_back_is_read_anew(make):
    """Rings have forgotten the beginning of a long text: cut back a little and it is continued, cut back further and it is not. The same tokens either way."""
    s, rng = make(Engine(engine().model, NoEnds()), slots=1, limit=640), random.Random(0)
    text = [rng.randrange(31) for _ in range(560)]
    finished(s.submit(text, max_tokens=3))
    for cut, reused in ((500, True), (100, False)):
        ticket = s.submit(text[:cut] + [30 - text[cut]] + text[cut + 1:], max_tokens=5)
        assert finished(ticket) == [alone(s.engine, ticket.prompt, 5, limit=640)] and ticket.reused == (cut if reused else 0)


@pytest.mark.parametrize('kept', [0, 1, 3])
def test_only_so_many_conversations_are_kept(make, kept):
    s = make(engine(), slots=4, kept=kept)
    finished(*(s.submit([i] * 20, max_tokens=3) for i in range(12)))
    again = s.submit([11] * 20, max_tokens=3)
    finished(again)
    assert len(s.prefixes._kept) <= kept and (again.reused == 19) == (kept > 0)


class Kept:
    def __init__(self, cut=True): self.cut = cut
    def can_cut(self, n): return self.cut


@few(40)
@given(st.integers(0, 4), st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=14), max_size=12), st.lists(st.integers(0, 1), min_size=1, max_size=16))
def test_the_longest_known_beginning_is_found(capacity, texts, prompt):
    prefixes, kept = Prefixes(capacity), []
    for t in texts:
        prefixes.keep(t, Kept())
        kept = [k for k in kept if k != t[:len(k)]]
        kept = [*kept, t][-capacity:] if capacity else []
    common = lambda t: next((i for i, (a, b) in enumerate(zip(t, prompt[:-1])) if a != b), min(len(t), len(prompt) - 1))
    best = max(map(common, kept), default=0)
    n, cache = prefixes.find(prompt)
    assert n == (best if best >= 8 else 0) and (cache is None) == (n == 0)
    assert Prefixes(3).find(prompt) == (0, None)


# --- leaving ---------------------------------------------------------------------------------------------------------

def test_cancel_frees_the_slot_within_one_token(make):
    """A running request: at most the step that was under way goes on, then the next request has the slot."""
    watched = Watched(Engine(Echo().eval(), TOK))
    watched.hold()
    s = make(watched.engine, slots=1)
    first, second = s.submit([1], temperature=0), s.submit([2], max_tokens=3, temperature=0)
    watched.allow(4)
    until(lambda: len(first.tokens) == 4)
    first.cancel()
    have = len(first.tokens)
    watched.allow(2)
    until(lambda: first.done() and second.started)
    assert first.finish_reason == 'cancelled' and len(first.tokens) <= have + 1
    watched.open()
    assert finished(second) == [[(2, 1)] * 3]


def test_cancel_while_waiting_and_while_being_read(make):
    """No work is done for them any more, others go on."""
    watched = Watched(Engine(engine().model, SMALL))
    watched.hold()
    s = make(watched.engine, slots=2, chunk=10, kept=0)
    running = s.submit([1, 2], max_tokens=30, temperature=0)
    watched.allow(3)
    until(lambda: len(running.tokens) >= 2)
    reading = s.submit([5] * 150, max_tokens=5)
    watched.allow(6)
    until(lambda: reading.started is not None and watched.read() >= 22)
    waiting = s.submit([6] * 20, max_tokens=5)
    for t in (reading, waiting): t.cancel()
    watched.open()
    finished(running, reading, waiting)
    assert [t.finish_reason for t in (reading, waiting)] == ['cancelled'] * 2 and not reading.tokens and not waiting.started
    assert watched.read() < 2 + 150 and running.tokens == alone(engine(), [1, 2], 30, temperature=0)


def test_cancel_while_being_read_with_nobody_else(make):
    """A long prompt that nobody waits for any more is not read to its end."""
    watched = Watched(Engine(engine().model, SMALL))
    watched.hold()
    s = make(watched.engine, slots=1, chunk=10)
    ticket = s.submit([5] * 180)
    watched.allow(3)
    until(lambda: watched.read() >= 30)
    ticket.cancel()
    watched.open()
    finished(ticket)
    assert watched.read() <= 50 and not ticket.tokens


def test_cancel_wakes_readers(make):
    """In a thread and in an event loop, of a running and of a waiting request."""
    s, got = make(Engine(Echo().eval(), TOK), slots=1, limit=90_000), {}
    running, waiting = s.submit([1], temperature=0), s.submit([2], temperature=0)
    def in_loop(t):
        async def read(): return [x async for x in t]
        got[t.id, 'loop'] = asyncio.run(read())
    def in_thread(t): got[t.id, 'thread'] = list(t)
    readers = [threading.Thread(target=f, args=(t,), daemon=True) for t in (running, waiting) for f in (in_loop, in_thread)]
    for r in readers: r.start()
    until(lambda: len(running.tokens) > 20)
    for t in (waiting, running): t.cancel()
    for r in readers: r.join(60)
    assert not any(r.is_alive() for r in readers) and len(got) == 4
    assert got[waiting.id, 'loop'] == got[waiting.id, 'thread'] == [] and got[running.id, 'loop'] == got[running.id, 'thread'] == running.tokens
    running.cancel()   # again, after the end: nothing
    assert running.finish_reason == 'cancelled' and s.stats()['cancelled'] == 2


def test_closing_a_generator_cancels(make):
    """Early, before the first token, and by forgetting it; a finished one is left alone."""
    s = make(Engine(Echo().eval(), TOK), slots=1, limit=90_000)
    first, before = s.generate([1], temperature=0), s.generate([2], temperature=0)
    for _ in range(3): assert next(first) == ([1], [1])
    before.close()
    first.close()
    third = s.generate([3], temperature=0)
    next(third)
    del third
    assert list(s.generate([4], max_tokens=2, temperature=0)) == [([4], [1])] * 2
    until(lambda: s.stats()['cancelled'] == 3)
    assert s.stats()['finished'] == 1
    with pytest.raises(UserError, match='one answer per request'): s.generate([1], num_samples=2)


def test_generate_gives_what_the_engine_gives(make):
    s, kw = make(engine(), slots=2), dict(max_tokens=30, temperature=0.9, top_k=20, seed=5, top_p=0.95)
    assert list(s.generate([1, 2, 3], **kw)) == list(engine().generate([1, 2, 3], **kw))
    assert list(s.generate([1, 2, 3], 1, 8, 0.5, 3, 7)) == list(engine().generate([1, 2, 3], 1, 8, 0.5, 3, 7))


# --- limits ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('slots, max_waiting', [(1, 0), (1, 1), (2, 3)])
def test_busy_begins_exactly_when_slots_and_queue_are_full(make, slots, max_waiting):
    watched = Watched(Engine(Echo().eval(), TOK))
    watched.hold()
    s = make(watched.engine, slots=slots, max_waiting=max_waiting)
    tickets = [s.submit([1], max_tokens=2, temperature=0) for _ in range(slots + max_waiting)]
    for _ in range(2):
        with pytest.raises(Busy, match='try again in') as refused: s.submit([1])
        assert isinstance(refused.value, UserError) and isinstance(refused.value.retry_after, int) and refused.value.retry_after >= 1
    assert s.stats()['refused'] == 2 and s.stats()['submitted'] == len(tickets)
    with pytest.raises(UserError, match='temperature'): s.submit([1], temperature=-1)   # a bad request is told so, not to come again
    tickets[-1].cancel()
    watched.open()
    finished(*tickets)
    assert finished(s.submit([1], max_tokens=2, temperature=0)) == [[(1, 1)] * 2]


@pytest.mark.parametrize('limit', [50, 640])
def test_context_limit(make, limit):
    """One below, at, and one above; the model's own reach is the most there is."""
    s = make(Engine(random_gpt(vocab_size=265, n_layer=1), NoEnds()), slots=2, limit=limit)
    last, two, asked = s.submit([1] * (limit - 1)), s.submit([1] * (limit - 2)), s.submit([1] * (limit - 2), max_tokens=1)
    finished(last, two, asked)
    assert [len(t.tokens) for t in (last, two, asked)] == [1, 2, 1] and {t.finish_reason for t in (last, two, asked)} == {'length'}
    for n in (limit, limit + 1):
        with pytest.raises(UserError, match=f'{n} tokens.*at most {limit}'): s.submit([1] * n)
    assert s.limit == limit and s.stats()['submitted'] == 3
    assert Scheduler(s.engine, limit=10**6).limit == 640 and Scheduler(s.engine).limit == 64


class NoEnds(type(TOK)):
    """Its special tokens lie outside the model's vocabulary: answers end by their budget alone."""
    def encode_special(self, name): return 1000 + self.names.index(name)
    def get_bos_token_id(self): return 1000


@pytest.mark.parametrize('kw', [dict(temperature=-1), dict(temperature=float('nan')), dict(top_k=-1), dict(top_p=0.0), dict(top_p=1.5), dict(max_tokens=0), dict(prompt=[])], ids=str)
def test_bad_settings_are_refused_before_any_work(make, kw):
    s = make(engine(), slots=1)
    with pytest.raises(UserError): s.submit(**{'prompt': [1]} | kw)
    assert s.stats()['submitted'] == 0 and s._thread is None


def test_no_slots_are_refused():
    for kw in (dict(slots=0), dict(slots=1.5), dict(chunk=0), dict(max_waiting=-1), dict(limit=-5), dict(kept=-1), dict(slots=float('nan'))):
        with pytest.raises(UserError, match=f'{next(iter(kw))}=.* will not do'): Scheduler(engine(), **kw)


def test_finish_reasons(make):
    scripted = make(Engine(Scripted([65, 66, END, 67], prompt_len=2), TOK), slots=2, limit=64)
    stop, length, context = scripted.submit([1, 2], temperature=0), scripted.submit([1, 2], max_tokens=2, temperature=0), scripted.submit([1] * 63, temperature=0)
    exact = scripted.submit([1, 2], max_tokens=3, temperature=0)
    finished(stop, length, context, exact)
    assert stop.tokens == exact.tokens == [(65, 1), (66, 1), (END, 1)] and length.tokens == stop.tokens[:2] and len(context.tokens) == 1
    assert [t.finish_reason for t in (stop, length, context, exact)] == ['stop', 'length', 'length', 'stop']


# --- keeping pace ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('chunk', [1, 16, 128])
def test_between_two_steps_at_most_a_chunk_is_read(make, chunk):
    """Long prompts arrive while somebody streams: that stream waits for one chunk per token, no more."""
    watched, rng = Watched(Engine(engine().model, NoEnds())), random.Random(0)
    s = make(watched.engine, slots=3, chunk=chunk, limit=640, kept=0)
    streaming = s.submit([1, 2], max_tokens=400)
    until(lambda: len(streaming.tokens) > 2)
    begun, n = len(watched.log), 100 if chunk == 1 else 300
    long = [s.submit([rng.randrange(31) for _ in range(n)], max_tokens=3, seed=i) for i in range(3)]
    finished(*long)
    log = watched.log[begun:]
    streaming.cancel()
    assert len(streaming.tokens) > 3 * n / chunk, 'the stream went on meanwhile'
    between, reads = 0, 0
    for name, rows, *rest in log:
        if name == 'step': between = 0
        else:
            between, reads = between + rest[0], reads + rest[0]
            assert between <= chunk
    assert reads == 3 * n
    for i, t in enumerate(long): assert t.tokens == alone(watched.engine, t.prompt, 3, limit=640, seed=i)


def test_short_prompts_are_read_together(make):
    """Eight arrive at once while somebody streams: four between two steps, each with the tokens it would have got alone."""
    watched, rng = Watched(Engine(engine().model, NoEnds())), random.Random(0)
    s = make(watched.engine, slots=9, chunk=128, limit=640, kept=0)
    streaming = s.submit([1, 2], max_tokens=400)
    until(lambda: len(streaming.tokens) > 2)
    begun = len(watched.log)
    watched.hold()
    short = [s.submit([rng.randrange(31) for _ in range(10 + i)], max_tokens=4, seed=i) for i in range(8)]
    watched.open()
    finished(*short)
    names = [name for name, *_ in watched.log[begun:]]
    streaming.cancel()
    groups = [len(list(g)) for name, g in itertools.groupby(names) if name == 'read']
    assert groups == [4, 4], groups
    for i, t in enumerate(short): assert t.tokens == alone(watched.engine, t.prompt, 4, limit=640, seed=i)


def test_first_come_first_served(make):
    """Also where a short prompt stands behind long ones, and some of those before it leave."""
    s, rng = make(engine(), slots=2, chunk=16), random.Random(0)
    tickets = [s.submit([i] * rng.choice([2, 150]), max_tokens=rng.choice([1, 20])) for i in range(15)]
    for t in tickets[4:9:2]: t.cancel()
    finished(*tickets)
    started = [t.started for t in tickets if t.started]
    assert len(started) >= 12 and started == sorted(started)


def test_stats_while_it_works(make):
    watched = Watched(Engine(Echo().eval(), TOK))
    watched.hold()
    s = make(watched.engine, slots=2, max_waiting=9)
    tickets = [s.submit([i], max_tokens=5, temperature=0) for i in range(1, 6)]
    watched.allow(3)   # read, step, read
    until(lambda: s.stats()['active'] == 2)
    stats = s.stats()
    assert (stats['slots'], stats['waiting'], stats['max_waiting'], stats['submitted'], stats['finished']) == (2, 3, 9, 5, 0) and s.unfinished() == 5
    watched.open()
    finished(*tickets)
    stats = s.stats()
    assert stats['tokens_per_second'] > 0 and stats['uptime'] > 0 and stats['active'] == stats['waiting'] == 0 and stats['generated_tokens'] == 25


def test_readers_who_sleep_hold_nobody_up(make):
    """One never reads, one reads a token and stops, one reads slowly: the rest are long done."""
    s = make(Engine(Echo().eval(), TOK), slots=2, limit=90_000)
    never, once = s.submit([1], max_tokens=500, temperature=0), iter(s.submit([2], max_tokens=500, temperature=0))
    assert next(once) == (2, 1)
    assert finished(*(s.submit([3], max_tokens=50, temperature=0) for _ in range(20))) == [[(3, 1)] * 50] * 20
    assert [t for t, _ in once] == [2] * 499 and [t for t, _ in never] == [1] * 500
    assert list(never) == list(never) == [(1, 1)] * 500, 'an answer can be read again, from its beginning'


# --- event loops -----------------------------------------------------------------------------------------------------

def test_many_readers_in_one_event_loop(make):
    """Sixty at once, two of them on one ticket, without a thread each."""
    s, threads = make(Engine(Echo().eval(), TOK), slots=8, limit=1000), threading.active_count()
    async def client(i):
        ticket = s.submit([i + 1], max_tokens=20 + i, temperature=0)
        async def read(): return [t async for t, _ in ticket]
        return await asyncio.gather(read(), read()) if i < 2 else await read()
    async def main(): return await asyncio.wait_for(asyncio.gather(*map(client, range(60))), 60), threading.active_count()
    answers, during = asyncio.run(main())
    assert answers == [[[i + 1] * (20 + i)] * 2 if i < 2 else [i + 1] * (20 + i) for i in range(60)] and during <= threads + 1


def test_news_that_was_read_already_does_not_end_a_stream():
    """A token is seen before the wake-up for it: the wake-up then finds nothing new, which is no end."""
    async def main():
        ticket, got = Ticket(1, [1], 9, 0, Draw()), []
        async def read():
            async for x in ticket: got.append(x)
        ticket.tokens.append((7, 1))
        task = asyncio.create_task(read())
        for expected in ([(7, 1)], [(7, 1)], [(7, 1), (8, 1)]):
            await asyncio.sleep(0.02)
            assert got == expected and not task.done()
            wake([ticket])
            if len(ticket.tokens) == 1 and expected is not None and len(got) == 1: ticket.tokens.append((8, 1)) if seen else seen.append(1)
        ticket.finish('stop')
        wake([ticket])
        await asyncio.wait_for(task, 10)
        assert got == ticket.tokens
    seen = []
    asyncio.run(main())


def test_a_loop_closed_under_a_reader_harms_nobody(make):
    watched = Watched(Engine(Echo().eval(), TOK))
    watched.hold()
    s, loop = make(watched.engine, slots=2), asyncio.new_event_loop()
    left, other = s.submit([1], max_tokens=50, temperature=0), s.submit([2], max_tokens=50, temperature=0)
    async def read():
        async for _ in left: pass
    task = loop.create_task(read())
    loop.run_until_complete(asyncio.sleep(0.02))
    assert left._waiters, 'the reader waits'
    task._log_destroy_pending = False
    loop.close()
    watched.open()
    assert finished(left, other) == [[(1, 1)] * 50, [(2, 1)] * 50]


def test_a_reader_that_is_cancelled_harms_nobody(make):
    """`asyncio` cancels the task of a client that has gone: its future is dead when the news come."""
    s = make(Engine(Echo().eval(), TOK), slots=2, limit=90_000)
    async def main():
        ticket = s.submit([1], max_tokens=3000, temperature=0)
        async def read(): return [t async for t, _ in ticket]
        gone, stays = asyncio.create_task(read()), asyncio.create_task(read())
        await asyncio.sleep(0.02)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError): await gone
        return await asyncio.wait_for(stays, 60)
    assert asyncio.run(main()) == [1] * 3000


# --- errors ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('where', ['step', 'read', 'scratch'])
def test_an_error_reaches_every_reader_and_later_requests_work(make, where):
    """Out of memory in the middle of things, say. Nobody waits for ever; the thread lives."""
    engine = Engine(Echo().eval(), TOK)
    watched = Watched(engine)
    watched.hold()
    s, runner = make(engine, slots=2, max_waiting=4), engine.runner()
    tickets = [s.submit([i], max_tokens=30, temperature=0) for i in (1, 2, 3)]
    good, broken = getattr(runner, where), iter([True])
    def breaks(*args):
        if (where != 'step' or len(tickets[0].tokens) > 3) and next(broken, False): raise MemoryError('no room')
        return good(*args)
    setattr(runner, where, breaks)
    watched.open()
    def read_in_thread(): return list(tickets[0])
    async def read_in_loop(): return [x async for x in tickets[0]]
    finished(*tickets)
    failed = [t for t in tickets if t.error]
    assert failed and all(t.finish_reason == 'error' and isinstance(t.error, MemoryError) for t in failed) and s.stats()['failed'] == len(failed)
    if where != 'scratch' and tickets[0].error:
        for read in (read_in_thread, lambda: asyncio.run(read_in_loop())):
            with pytest.raises(MemoryError, match='no room'): read()
    for t in tickets: assert t.error or t.tokens == [(t.prompt[0], 1)] * 30
    assert finished(s.submit([9], max_tokens=5, temperature=0)) == [[(9, 1)] * 5] and s.unfinished() == 0


def test_a_prompt_that_cannot_be_read_fails_alone(make):
    """A token the model does not have: refused, or an error of that request and no other's."""
    s = make(Engine(engine().model, NoEnds()), slots=2)
    good = s.submit([1, 2], max_tokens=150)
    until(lambda: good.tokens)
    for bad in ([40], [1, -1], [10**6] * 20):
        try: ticket = s.submit(bad)
        except UserError: continue
        finished(ticket)
        assert ticket.finish_reason == 'error'
    assert finished(good) == [alone(s.engine, [1, 2], 150)] and good.error is None


@pytest.mark.parametrize('setting', [dict(top_k=2.5), dict(max_tokens=2.5), dict(temperature=1e-40)], ids=str)
def test_odd_settings_fail_alone_if_at_all(make, setting):
    """What is not refused at once may not harm others, nor answer with tokens that do not exist, nor for ever."""
    s = make(Engine(engine().model, NoEnds()), slots=2)
    good = s.submit([1, 2], max_tokens=150)
    until(lambda: good.tokens)
    try: odd = s.submit([3], **{'max_tokens': 9} | setting)
    except (UserError, TypeError): odd = None
    assert finished(good) == [alone(s.engine, [1, 2], 150)]
    if odd is None: return
    finished(odd)
    assert len(odd.tokens) <= 9 and all(0 <= t < 40 for t, _ in odd.tokens)
    if 'temperature' in setting: assert odd.tokens == alone(s.engine, [3], 9, temperature=0)


@pytest.mark.parametrize('ahead', [False, True])
def test_a_draw_that_fails_fails_alone(make, monkeypatch, ahead):
    """No memory for the odds of a new row, which is in its slot already: out it goes, and the others go on."""
    s, draw = make(Engine(engine().model, NoEnds()), slots=3), engine_module.draw_tokens
    def fails(logits, rows, *rest):
        if len(rows) == 1 and rows[0].request.seed == 7: raise MemoryError('no room')
        return draw(logits, rows, *rest)
    with monkeypatch.context() as m:
        m.setattr(engine_module, 'Batch', functools.partial(Batch, ahead=ahead))
        m.setattr(engine_module, 'draw_tokens', fails)
        good = s.submit([1, 2], max_tokens=100)
        until(lambda: good.tokens)
        bad, later = s.submit([4, 5], max_tokens=9, seed=7), s.submit([3], max_tokens=9)
        finished(good, bad, later)
    assert isinstance(bad.error, MemoryError) and [good.tokens, later.tokens] == [alone(s.engine, [1, 2], 100), alone(s.engine, [3], 9)]


@pytest.mark.parametrize('what', ['runner', 'slots'])
def test_an_engine_that_cannot_begin_says_so(make, what):
    """No memory for the slots, or weights of an unknown kind: the reader is told, and the thread does not spin."""
    e, tries = Engine(engine().model, SMALL), []
    def fails(*args):
        tries.append(args)
        raise MemoryError('no room')
    if what == 'runner': e.runner = fails
    else: e.runner().slots = fails
    s = make(e, slots=1)
    tickets = [s.submit([1], max_tokens=2) for _ in range(3)]
    until(lambda: all(t.done() for t in tickets))
    assert all(isinstance(t.error, MemoryError) for t in tickets) and len(tries) <= 3 and s.unfinished() == 0


def test_a_request_that_arrives_while_the_queue_is_looked_through_does_no_harm(make, monkeypatch):
    """The thread that looks for cancelled requests may be interrupted at any of them; here it is, by a new one."""
    arriving, arrived = [], []
    class Interrupting(Ticket):
        @property
        def cancelled(self):
            if arriving: arrived.append(s.submit([arriving.pop()], max_tokens=3, temperature=0))
            return self.__dict__.get('gone', False)
        @cancelled.setter
        def cancelled(self, value): self.__dict__['gone'] = value
    monkeypatch.setattr(engine_module, 'Ticket', Interrupting)
    watched = Watched(Engine(Echo().eval(), TOK))
    watched.hold()
    s = make(watched.engine, slots=1)
    tickets = [s.submit([1 + i], max_tokens=9, temperature=0) for i in range(5)]
    watched.allow(3)
    until(lambda: len(tickets[0].tokens) == 3)
    arriving.append(99)
    watched.open()
    assert finished(*tickets) == [[(1 + i, 1)] * 9 for i in range(5)] and finished(*arrived) == [[(99, 1)] * 3]


TWO_THREADS = """
import threading, torch, test_scheduler as t
engine = t.Engine(t.random_gpt(vocab_size=40, n_layer=2, n_embd=256), t.NoEnds())
prompts = [[i] * (9 + i) for i in range(3)]
out = {}
def serve(k):
    for _ in range(2):
        with t.Scheduler(engine, slots=2, limit=60, kept=0) as s: out[k] = t.finished(*(s.submit(p, max_tokens=5) for p in prompts))
workers = [threading.Thread(target=serve, args=(k,)) for k in range(2)]
for w in workers: w.start()
for w in workers: w.join()
expected = [t.alone(engine, p, 5, limit=60) for p in prompts]
assert out == {0: expected, 1: expected}
print(torch.get_num_threads())
"""


def test_schedulers_side_by_side_with_two_threads():
    """Two at a time on one engine, made and closed while the other works, each with a team of OpenMP threads behind it."""
    here = Path(__file__).parent
    env = {**os.environ, 'OMP_NUM_THREADS': '2', 'OMP_WAIT_POLICY': 'PASSIVE', 'NANOCHAT_DTYPE': 'bfloat16', 'PYTHONPATH': os.pathsep.join([str(here), str(here.parent)])}
    done = subprocess.run([sys.executable, '-c', TWO_THREADS], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ['2']


# --- the end ---------------------------------------------------------------------------------------------------------

def test_close_finishes_what_there_is():
    s = Scheduler(engine(), slots=2, limit=LIMIT)
    tickets = [s.submit([i] * 5, max_tokens=20, seed=i) for i in range(7)]
    s.close()
    assert [t.tokens for t in tickets] == [alone(engine(), [i] * 5, 20, seed=i) for i in range(7)] and not s._thread.is_alive()
    s.close()
    s.close(drain=False)
    with pytest.raises(UserError, match='closed'): s.submit([1])
    assert s.stats()['finished'] == 7


def test_close_without_draining_cancels():
    s = Scheduler(Engine(Echo().eval(), TOK), slots=2, limit=90_000)
    tickets = [s.submit([i], temperature=0) for i in range(1, 6)]
    until(lambda: tickets[0].tokens)
    s.close(drain=False)
    assert {t.finish_reason for t in tickets} == {'cancelled'} and not s._thread.is_alive() and s.stats()['cancelled'] == 5


def test_close_waits_no_longer_than_its_timeout():
    """What is finished by then is finished; the rest is cancelled."""
    s = Scheduler(Engine(Echo().eval(), TOK), slots=2, limit=90_000)
    runner = s.engine.runner()
    step = runner.step
    runner.step = lambda *a: time.sleep(0.005) or step(*a)
    short, long, waiting = s.submit([1], max_tokens=3, temperature=0), s.submit([2], temperature=0), s.submit([3], temperature=0)
    begun = time.monotonic()
    s.close(timeout=0.5)
    assert 0.5 <= time.monotonic() - begun < 30 and not s._thread.is_alive()
    assert [t.finish_reason for t in (short, long, waiting)] == ['length', 'cancelled', 'cancelled']


def test_a_scheduler_that_was_never_used_closes_at_once():
    with Scheduler(engine(), slots=1) as s: assert s._thread is None
    with pytest.raises(UserError, match='closed'): s.submit([1])


def test_leaving_the_block_by_an_error_cancels():
    with pytest.raises(KeyError):
        with Scheduler(Engine(Echo().eval(), TOK), slots=1, limit=90_000) as s:
            ticket = s.submit([1], temperature=0)
            raise KeyError('x')
    assert ticket.finish_reason == 'cancelled'


def test_close_from_many_threads_while_others_submit():
    """Nobody hangs, and every request that was taken ends."""
    for drain in (True, False):
        s, tickets = Scheduler(Engine(Echo().eval(), TOK), slots=2, limit=LIMIT), []
        def submit():
            try:
                while True: tickets.append(s.submit([1], max_tokens=5, temperature=0))
            except Busy: pass
            except UserError: return
        workers = [threading.Thread(target=submit, daemon=True) for _ in range(3)] + [threading.Thread(target=s.close, args=(drain,), daemon=True) for _ in range(3)]
        for w in workers: w.start()
        for w in workers: w.join(60)
        assert not any(w.is_alive() for w in workers) and all(t.done() for t in tickets) and s.unfinished() == 0


def test_nothing_is_left_behind():
    """No thread after close; no ticket and no cache while the scheduler lives on."""
    threads = set(threading.enumerate())
    s = Scheduler(engine(), slots=3, limit=LIMIT, kept=2)
    caches, kept = [], type(engine().runner().scratch(1, 64)).kept
    def refs():
        tickets = [s.submit([i] * 30, max_tokens=5) for i in range(9)]
        for t in tickets[:3]: t.cancel()
        columns = s.generate([1, 2, 3])
        next(columns)
        finished(*tickets)
        return [weakref.ref(t) for t in tickets] + [weakref.ref(columns.ticket)]
    gone = refs()
    until(lambda: s.unfinished() == 0)
    assert {t.name for t in set(threading.enumerate()) - threads} == {'nanochat-scheduler'}
    until(lambda: gc.collect() is not None and not any(r() for r in gone), 20)
    ring = type(engine().runner().scratch(1, 64))
    alive = lambda: sum(type(o) is ring for o in gc.get_objects())
    before = alive()
    for _ in range(3): finished(*(s.submit([i] * 30, max_tokens=5, seed=i) for i in range(9)))
    gc.collect()
    assert alive() <= before + 1, 'caches do not pile up'
    s.close()
    memory = weakref.ref(s)
    del s
    gc.collect()
    assert memory() is None and set(threading.enumerate()) == threads
