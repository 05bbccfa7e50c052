"""Packing, dealing, prefetching and resuming: nothing stalls, nothing is lost or doubled, and every state is exact."""
import json, subprocess, sys, textwrap, threading
from collections import Counter
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from nanochat.common import Ranks, UserError
from nanochat.dataloader import SHIFT, ChatSource, Packer, PackedStream, TextSource, best_fit_pack, chat_data_loader, gather_state, load, pending, prefetched
from nanochat.dataloader import tokenizing_distributed_data_loader_bos_bestfit as text_loader
from nanochat.dataloader import tokenizing_distributed_data_loader_with_state_bos_bestfit as state_loader
from nanochat.dataset import prepare_corpus
from nanochat.tokenizer import RustBPETokenizer

quick = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
BOS = 0


class Letters:
    """A tokenizer with a token per letter, to see what a row holds."""
    def get_bos_token_id(self): return BOS
    def encode(self, texts, prepend=None, num_threads=1): return [([] if prepend is None else [prepend]) + [ord(c) for c in t] for t in texts]
    def render_conversation(self, conversation, max_tokens=2048):
        ids, mask = [BOS], [0]
        for m in conversation['messages']:
            ids += [ord(c) for c in m['content']]
            mask += [int(m['role'] == 'assistant')] * len(m['content'])
        return ids[:max_tokens], mask[:max_tokens]


def chat(question, answer): return {'messages': [{'role': 'user', 'content': question}, {'role': 'assistant', 'content': answer}]}
def doc(i, n): return chr(1000 + i) * n  # document i, recognised by its letter
def ranks(r, w): return Ranks(r, r, w)
def same(a, b): return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and a[2] == b[2]


def text_stream(docs, B=2, T=16, W=1, r=0, state=None, long='crop', **kw):
    return PackedStream(TextSource(docs, Letters(), T, long_documents=long), B, T, ranks=ranks(r, W), state=state, **kw)


def drain(stream, recorder=None, limit=None):
    """All batches of a finite stream; `recorder` counts the pieces that were placed, by (document, start)."""
    inner, out = stream.packer.row, []
    def row(*args):
        picks = inner(*args)
        if recorder is not None: recorder.update((stream.waiting[n].document, stream.waiting[n].start) for n, _ in picks)
        return picks
    stream.packer.row = row
    while (limit is None or len(out) < limit) and (batch := stream.next_batch()) is not None: out.append(batch)
    stream.packer.row = inner
    return out


# packing

def scan(lengths, capacity, mode, buffer_size, fetch):
    """Best fit by looking at everything, written without the packer's ideas."""
    todo, waiting, rows = list(enumerate(lengths)), [], []
    while todo or waiting:
        row, used = [], 0
        while used < capacity:
            while len(waiting) < buffer_size and todo: waiting, todo = waiting + todo[:fetch], todo[fetch:]
            best = None
            for i, n in waiting:
                n = min(n, capacity)
                if n <= capacity - used and (best is None or n > best[1]): best = (i, n)
            if best is None and mode == 'crop':
                for i, n in waiting:
                    if best is None or min(n, capacity) < best[1]: best = (i, min(n, capacity))  # one longer than a row counts as a row here, too
                if best: best = (best[0], capacity - used)
            if best is None: break
            waiting = [w for w in waiting if w[0] != best[0]]
            row.append(best)
            used += best[1]
        rows.append(row)
    return rows


@quick
@given(st.lists(st.integers(1, 40), max_size=80), st.integers(1, 30), st.sampled_from(['crop', 'pad']), st.integers(1, 20), st.integers(1, 9))
def test_packing_equals_a_linear_scan(lengths, capacity, mode, buffer_size, fetch):
    rows = list(best_fit_pack(lengths, capacity, mode, buffer_size, fetch))
    assert rows == scan(lengths, capacity, mode, buffer_size, fetch)
    assert sorted(i for row in rows for i, _ in row) == list(range(len(lengths)))  # each document once
    assert all(sum(n for _, n in row) <= capacity for row in rows)
    if mode == 'crop': assert all(sum(n for _, n in row) == capacity for row in rows[:-1])
    else: assert all(n == min(lengths[i], capacity) for row in rows for i, n in row)  # pad never cuts


def test_packing_equals_a_linear_scan_at_full_size():
    import random
    rng = random.Random(5)
    lengths = [int(rng.lognormvariate(6, 1.2)) + 1 for _ in range(2500)]
    for mode in ('crop', 'pad'): assert list(best_fit_pack(lengths, 2049, mode)) == scan(lengths, 2049, mode, 1000, 128)


def test_a_choice_costs_a_binary_search():
    class Counting(int):
        looks = 0
        def __lt__(self, other): Counting.looks += 1; return int(self) < other
        def __gt__(self, other): Counting.looks += 1; return int(self) > other
    p = Packer(4096)
    p.add([1 + i % 700 for i in range(1000)])
    p.keys = [Counting(k) for k in p.keys]
    picks = sum(len(p.row(lambda: None, 0)) for _ in range(20))
    assert 0 < Counting.looks <= picks * 22  # two searches of at most 11 looks; a scan takes a thousand


def test_packer_refuses_nonsense():
    with pytest.raises(ValueError): Packer(0)
    with pytest.raises(ValueError): Packer(5, 'wrap')
    with pytest.raises(ValueError, match='its BOS'): Packer(5).add([3, 0])


# rows

@quick
@given(st.lists(st.integers(0, 60), min_size=1, max_size=40), st.integers(1, 3), st.integers(1, 25), st.integers(1, 5), st.sampled_from(['crop', 'split']))
def test_text_rows_for_any_lengths(lengths, B, T, W, long):
    docs = [doc(i, n) for i, n in enumerate(lengths)]
    for r in range(W):
        for (x, y), state in drain(text_stream(docs, B, T, W, r, long=long, buffer_size=10, fetch_size=3), limit=6):
            assert x.shape == y.shape == (B, T) and x.dtype == y.dtype == torch.int64
            assert (x[:, 0] == BOS).all() and (y >= 0).all() and torch.equal(x[:, 1:], y[:, :-1])
            for row in torch.cat([x, y[:, -1:]], 1).tolist():  # every stretch between BOS is the same letter
                for part in ''.join(map(chr, row)).split(chr(BOS)): assert len(set(part)) <= 1 and len(part) <= 60
            assert 0 <= state['progress'] < 1


@quick
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 30)), min_size=1, max_size=30), st.integers(1, 3), st.integers(2, 25),
       st.integers(1, 4), st.sampled_from(['assistant', 'all']), st.integers(1, 8))
def test_chat_every_conversation_once_and_every_batch_has_a_target(sizes, B, T, W, loss_on, buffer_size):
    task = [chat('u' * q, chr(1000 + i) * a) for i, (q, a) in enumerate(sizes)]
    seen = Counter()
    for r in range(W):
        kw = dict(ranks=ranks(r, W), epochs=2, loss_on=loss_on, buffer_size=buffer_size, prefetch=0)
        try: batches = list(chat_data_loader(Letters(), task, B, T, **kw))
        except UserError as e:
            assert 'anything to learn' in str(e) and all(1 + q >= T + 1 for q, _ in sizes)
            return
        for x, y, _ in batches:
            assert (y >= 0).any() and (x[:, 0] == BOS).all()
            assert ((y[:, :-1] == x[:, 1:]) | (y[:, :-1] == -1)).all()
            seen.update(t for t in y.flatten().tolist() if t >= 1000)
    expected = Counter({1000 + i: 2 * min(a, max(T - q, 0)) for i, (q, a) in enumerate(sizes)})
    assert seen == +expected  # all the assistant's tokens that fit into a row, in two epochs exactly twice


def test_masks_of_real_conversations():
    tok = RustBPETokenizer.train_from_iterator(['a small text to train on ' * 50], 300)
    task = [chat(f'what is {i}?', f'it is {i}.') for i in range(20)]
    x, y, _ = next(chat_data_loader(tok, task, 1, 200, shuffle=False, buffer_size=20, prefetch=0))
    ids = x[0].tolist()
    assert y[0, -1] == -1  # this row ends in padding, so the inputs hold all of it
    conversations = [[tok.get_bos_token_id()] + part for part in split_at(ids, tok.get_bos_token_id()) if part]
    rendered = {tuple(tok.render_conversation(c)[0]): tok.render_conversation(c)[1] for c in task}
    at = 0
    for c in conversations:
        mask = rendered[tuple(c)]  # whole conversations only
        for i, m in enumerate(mask):
            if at + i: assert y[0, at + i - 1].item() == (c[i] if m else -1)
        at += len(c)
    assert len(conversations) >= 3 and (y[0, at - 1:] == -1).all()
    y_all = next(chat_data_loader(tok, task, 1, 200, shuffle=False, buffer_size=20, prefetch=0, loss_on='all'))[1][0]
    assert y_all[:at - 1].tolist() == ids[1:at] and (y_all[at - 1:] == -1).all()


def split_at(ids, mark):
    parts = [[]]
    for i in ids:
        if i == mark: parts.append([])
        else: parts[-1].append(i)
    return parts


def test_conversation_longer_than_the_row_is_cut_and_does_not_clog():
    task = [chat('q', 'A' * 500)] * 5 + [chat('q', 'B' * 3)] * 5
    batches = list(chat_data_loader(Letters(), task, 1, 20, epochs=1, buffer_size=2, shuffle=False, prefetch=0))
    tokens = Counter(t for _, y, _ in batches for t in y.flatten().tolist())
    assert tokens[ord('A')] == 5 * 19 and tokens[ord('B')] == 15 and len(batches) <= 8


def test_nothing_to_learn_is_an_error_not_a_hang():
    with pytest.raises(UserError, match='anything to learn'): next(chat_data_loader(Letters(), [chat('u' * 100, 'answer')] * 10, 2, 16))
    some = [chat('u' * 100, 'answer')] * 50 + [chat('u', 'answer')]
    assert all((y >= 0).any() for _, y, _ in islice(chat_data_loader(Letters(), some, 2, 16), 20))


def test_split_documents_lose_nothing():
    docs = ['abcdefghij', 'kl', '', 'mnopqrstu']
    pieces = TextSource(docs, Letters(), 4, long_documents='split').pieces(range(4))
    assert all(p.ids[0] == BOS and len(p.ids) <= 5 for p in pieces)
    for i, d in enumerate(docs): assert ''.join(chr(t) for p in pieces if p.document == i for t in p.ids[1:]) == d


def test_very_long_documents_are_cropped_like_short_ones():
    text = 'word ' * 40_000
    tok = RustBPETokenizer.train_from_iterator([text], 300)
    for t in (text, ' ' * 100_000, 'x' * 50_000):
        (piece,) = TextSource([t], tok, 32).pieces([0])
        assert piece.ids.tolist() == tok.encode(t, prepend=tok.get_bos_token_id())[:33]


# dealing to ranks

@pytest.mark.parametrize('n', [1, 3, 4, 50])
def test_one_file_with_one_row_group_on_four_ranks(tmp_path, n):
    pq.write_table(pa.table({'text': [doc(i, 30) + '\n' + doc(i, 30) for i in range(n)]}), tmp_path/'one.parquet', row_group_size=1000)
    corpus = prepare_corpus(tmp_path/'one.parquet')
    for r in range(4):
        for split in ('train', 'val'):
            x, y = next(text_loader(Letters(), 2, 16, split, corpus=corpus, ranks=ranks(r, 4)))
            assert x.shape == (2, 16) and (y >= 0).all()


@pytest.mark.parametrize('W', [1, 2, 3, 5])
def test_ranks_share_an_epoch_exactly(W):
    docs, placed = [doc(i, 5 + 7 * i % 40) for i in range(101)], Counter()
    for r in range(W): drain(text_stream(docs, W=W, r=r, epochs=3, buffer_size=9, fetch_size=4), placed)
    assert placed == {(i, 0): 1 for i in range(303)}


@quick
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 60), st.lists(st.integers(0, 5), min_size=4, max_size=4), st.sampled_from(['crop', 'split']), st.booleans())
def test_another_number_of_ranks_continues_with_every_remaining_document_once(W, V, n, steps, long, again):
    docs, placed = [doc(i, 1 + 13 * i % 50) for i in range(n)], Counter()
    kw = dict(long=long, epochs=3, buffer_size=8, fetch_size=3)
    streams = [text_stream(docs, W=W, r=r, **kw) for r in range(W)]
    for s, k in zip(streams, steps): drain(s, placed, limit=k)  # ranks need not even be at the same step
    saved = dict(ranks=json.loads(json.dumps([s.state() for s in streams])))
    streams = [text_stream(docs, W=V, r=r, state=saved, **kw) for r in range(V)]
    if again:  # and once more, back again
        for s in streams: drain(s, placed, limit=1)
        saved = [s.state() for s in streams]
        streams = [text_stream(docs, W=W, r=r, state=saved, **kw) for r in range(W)]
    for s in streams: drain(s, placed)
    everything = {(p.document, p.start): 1 for p in TextSource(docs, Letters(), 16, long_documents=long).pieces(range(3 * n))}
    assert placed == everything


def test_two_ranks_to_three_in_chat():
    task = [chat('q' * (i % 5), chr(1000 + i) * (1 + i % 7)) for i in range(90)]
    load_chat = lambda r, W, **kw: chat_data_loader(Letters(), task, 2, 20, ranks=ranks(r, W), epochs=1, buffer_size=10, **kw)
    seen, states = Counter(), []
    for r in range(2):
        for x, y, state in islice(load_chat(r, 2), 4): seen.update(t for t in y.flatten().tolist() if t >= 0)
        states.append(state)
    for r in range(3):
        for x, y, _ in load_chat(r, 3, resume_state_dict=dict(ranks=states)): seen.update(t for t in y.flatten().tolist() if t >= 0)
    assert seen == Counter({1000 + i: 1 + i % 7 for i in range(90)})


# exact state

@pytest.mark.parametrize('prefetch', [0, 3])
@pytest.mark.parametrize('long', ['crop', 'split'])
@pytest.mark.parametrize('rank, world', [(0, 1), (1, 2)])
def test_resume_after_every_step_gives_the_next_batch(prefetch, long, rank, world):
    docs = [doc(i, 1 + 29 * i % 90) for i in range(60)]
    make = lambda **kw: state_loader(Letters(), 2, 24, 'train', corpus=docs, ranks=ranks(rank, world), buffer_size=15, tokenizer_batch_size=4, long_documents=long, prefetch=prefetch, **kw)
    batches = list(islice(make(), 90))
    assert batches[-1][2]['epoch'] >= 1
    for k in range(0, 84, 6):
        resumed = make(resume_state_dict=json.loads(json.dumps(batches[k][2])))
        for expected, got in zip(batches[k + 1:k + 5], resumed): assert same(expected, got)
        resumed.close()


def test_resume_chat():
    task = [chat('q' * (i % 9), 'a' * (1 + i % 7)) for i in range(50)]
    make = lambda **kw: chat_data_loader(Letters(), task, 2, 30, seed=3, epochs=4, buffer_size=10, **kw)
    batches = list(make())
    for k in (0, 3, len(batches) // 2, len(batches) - 2):
        rest = list(make(resume_state_dict=json.loads(json.dumps(batches[k][2]))))
        assert len(rest) == len(batches) - k - 1 and all(map(same, rest, batches[k + 1:]))
    assert list(make(resume_state_dict=batches[-1][2])) == [] and batches[-1][2]['epoch'] == 4


def test_resume_with_another_row_length_still_gives_every_conversation():
    task = [chat('q' * 5, chr(1000 + i) * 4) for i in range(60)]
    make = lambda T, **kw: chat_data_loader(Letters(), task, 2, T, epochs=1, buffer_size=10, **kw)
    first = list(islice(make(40), 3))
    seen = Counter(t for _, y, _ in (*first, *make(25, resume_state_dict=first[-1][2])) for t in y.flatten().tolist() if t >= 0)
    assert seen == Counter({1000 + i: 4 for i in range(60)})
    assert not any(True for _ in make(3, resume_state_dict=first[-1][2]))  # nothing of these fits: an end, not an error
    with pytest.raises(UserError, match='belongs to other data'): make(40, loss_on='all', resume_state_dict=first[-1][2])


def test_prepared_corpus_and_real_tokenizer(tmp_path):
    corpus = prepare_corpus('stdlib', max_bytes=600_000)
    tok = RustBPETokenizer.train_from_iterator(islice(corpus.documents('train'), 20), 400)
    make = lambda split='train', **kw: state_loader(tok, 4, 128, split, corpus=corpus, **kw)
    batches = list(islice(make(), 12))
    assert same(batches[8], next(make(resume_state_dict=batches[7][2], prefetch=0)))
    assert all((b[0][:, 0] == tok.get_bos_token_id()).all() for b in batches)
    assert len(json.dumps(batches[-1][2])) < 20_000
    first, again = (next(make('val')) for _ in range(2))
    assert same(first, again)
    with pytest.raises(UserError, match='belongs to other data'): make('val', resume_state_dict=batches[0][2])


def test_state_of_other_ranks_is_refused():
    state = text_stream(['abc'] * 10, W=2, r=0).state()
    for r, W in ((1, 2), (0, 1)):
        with pytest.raises(UserError, match='of 1 of 2 ranks.*gather_state'): text_stream(['abc'] * 10, W=W, r=r, state=state)
    assert pending([state])[0] == []


def test_seeds_and_epochs_shuffle_differently_and_repeatably():
    order = lambda seed, epoch: [ChatSource(range(50), Letters(), 8, seed).index(epoch * 50 + i) for i in range(50)]
    assert order(0, 0) == order(0, 0) and sorted(order(0, 1)) == list(range(50))
    assert len({tuple(order(s, e)) for s in range(3) for e in range(3)}) == 9


@pytest.mark.parametrize('long, n', [('crop', 10), ('split', 10), ('split', 55)])
def test_progress_runs_through_the_epochs(long, n):
    states = [s for _, s in drain(text_stream([doc(i, n) for i in range(40)], T=10, B=1, epochs=2, buffer_size=4, fetch_size=2, long=long))]
    done = [s['epoch'] + s['progress'] for s in states]
    assert done == sorted(done) and done[0] < 0.1 and done[-1] == 2
    assert max(b - a for a, b in zip(done, done[1:])) < 0.2  # and does not jump


# the thread

def threads(): return [t for t in threading.enumerate() if t.name == 'nanochat-prefetch']


def test_prefetch_gives_the_same_batches_and_ends_with_the_loader():
    docs = [doc(i, 20) for i in range(50)]
    plain, ahead = (state_loader(Letters(), 2, 16, 'train', corpus=docs, prefetch=p) for p in (0, 2))
    assert all(same(next(plain), next(ahead)) for _ in range(20)) and len(threads()) == 1
    ahead.close()
    assert not threads()
    loader = text_loader(Letters(), 2, 16, 'train', corpus=docs)
    next(loader)
    del loader
    assert not threads()


def test_prefetch_runs_only_so_far_ahead():
    made = []
    items = prefetched((made.append(i) or i for i in range(10**6)), 3)
    assert next(items) == 0
    while len(made) < 5: pass  # one used, three ready, one in hand
    threading.Event().wait(0.2)
    assert len(made) <= 5
    items.close()


def test_errors_in_the_thread_arrive_where_the_batch_was_expected():
    class Breaks(list):
        def __getitem__(self, i):
            if i > 30: raise OSError('the disk went away')
            return super().__getitem__(i)
    loader = state_loader(Letters(), 1, 8, 'train', corpus=Breaks(['ab'] * 100), buffer_size=5, tokenizer_batch_size=2)
    with pytest.raises(OSError, match='the disk went away'): list(islice(loader, 1000))
    assert not threads()


# bad input

def test_bad_settings():
    for kw, sentence in ((dict(B=0), 'a batch of 0 rows'), (dict(T=0), 'x 0 tokens'), (dict(long_documents='wrap'), "'wrap' is unknown"), (dict(corpus=[]), 'no documents')):
        with pytest.raises(UserError, match=sentence): state_loader(Letters(), **(dict(B=1, T=8, split='train', corpus=['abc']) | kw))
    with pytest.raises(UserError, match='run: python -m nanochat.dataset stdlib'): text_loader(Letters(), 1, 8, 'train')
    with pytest.raises(UserError, match="loss_on 'none'"): chat_data_loader(Letters(), [chat('a', 'b')], 1, 8, loss_on='none')
    with pytest.raises(UserError, match='no documents'): chat_data_loader(Letters(), [], 1, 8)


def test_gather_state_between_processes(tmp_path):
    script = tmp_path/'gather.py'
    script.write_text(textwrap.dedent('''
        import sys, torch.distributed as dist
        from nanochat.common import Ranks
        from nanochat.dataloader import gather_state
        rank, store = int(sys.argv[1]), sys.argv[2]
        dist.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=2)
        state = dict(rank=rank, world_size=2, epoch=0, progress=0.5, next=rank)
        both = gather_state(state)
        assert [s['next'] for s in both['ranks']] == [0, 1] and both['progress'] == 0.5
        dist.destroy_process_group()
    '''))
    runs = [subprocess.Popen([sys.executable, str(script), str(r), str(tmp_path/'store')], stderr=subprocess.PIPE) for r in range(2)]
    assert [r.wait(60) for r in runs] == [0, 0], runs[0].stderr.read()
    alone = dict(rank=0, world_size=1)
    assert gather_state(alone) is alone


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU here')
def test_pinned_copies_to_a_gpu():
    docs = [doc(i, 5 + i % 40) for i in range(200)]
    make = lambda device: state_loader(Letters(), 4, 64, 'train', corpus=docs, device=device)
    for cpu, gpu in zip(islice(make('cpu'), 50), make('cuda')):
        assert gpu[0].is_cuda and torch.equal(cpu[0], gpu[0].cpu()) and torch.equal(cpu[1], gpu[1].cpu())
