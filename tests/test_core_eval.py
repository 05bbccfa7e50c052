"""CORE: the real bundle's 22 tasks scored in batches and one at a time, interrupted, by two processes, and with everything wrong that can be."""
import functools, http.server, json, math, multiprocessing, os, random, re, shutil, signal, socket, subprocess, sys, threading, time, zipfile
from pathlib import Path

import jinja2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nanochat import core_eval as ce
from nanochat.common import UserError, read_jsonl
from nanochat.dataset import prepare_corpus
from nanochat.gpt import GPT, GPTConfig
from nanochat.scripts import base_eval as be
from nanochat.tokenizer import RustBPETokenizer

needs_fork = pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')


def random_gpt(vocab_size, seed=0, **shape):
    """Every parameter drawn anew, so that no two continuations are nearly alike, as they are after a normal initialisation."""
    config = GPTConfig(**dict(sequence_len=512, vocab_size=vocab_size, n_layer=2, n_head=2, n_kv_head=1, n_embd=32) | shape)
    model = GPT(config)
    model.to_empty(device='cpu')
    model.init_weights()
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters(): p.copy_(torch.randn_like(p) * (.2 if p.dim() < 2 else .5 if len(p) > 512 else p.shape[-1]**-.5))
    return model.eval()


@pytest.fixture(scope='module')
def bundle(shared_data):
    if not (shared_data/'eval_bundle.zip').exists(): pytest.skip('no eval_bundle.zip among the real data')
    return ce.open_bundle(shared_data/'eval_bundle.zip')


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
    text = [Path(m.__file__).read_text(encoding='utf8') for m in (random, json.decoder, socket, functools, re)]
    return RustBPETokenizer.train_from_iterator(text, 600)


@pytest.fixture(scope='module')
def prose(bundle):
    """A tokenizer for the real tasks, and a random model for it."""
    text = (p for label in ('arc_easy', 'squad', 'hellaswag', 'bigbench_language_identification') for x in bundle.items(ce.choose_tasks(bundle, [label])[0])[:150]
            for p in ce.render_prompts(x, [], ce.choose_tasks(bundle, [label])[0].meta)[-1:])
    tokenizer = RustBPETokenizer.train_from_iterator(text, 1500)
    with pytest.MonkeyPatch.context() as m:
        m.setenv('NANOCHAT_DTYPE', 'float32')
        return tokenizer, random_gpt(tokenizer.get_vocab_size(), sequence_len=1024)


class Loop:
    """A corpus with held-out text, without files."""
    name = 'loop'
    def documents(self, split):
        rng = random.Random(0)
        names = ['alpha', 'bravo', 'charlie', 'delta', 'echoes', 'foxtrot', 'golfer', 'hotels']
        for i in range(20):
            lines = [f'    {rng.choice(names)} = {rng.choice(names)} and {rng.choice(names)} {rng.randrange(99)} then {rng.choice(names)} go to {rng.choice(names)}' for _ in range(12)]
            yield f'def make_{names[i % 8]}{i}(x):\n    """The number {i} of what {names[i % 8]} makes for {names[i % 5]}."""\n' + '\n'.join(lines) + '\n'


@pytest.fixture(scope='module')
def mini(): return ce.mini_bundle(Loop(), items=30)


@pytest.fixture
def model(tokenizer, fp32): return random_gpt(tokenizer.get_vocab_size())


# The protocol once more, written down independently: templates, list sampling, all logits, cross-entropy, argmax.
TEMPLATES = dict(
    multiple_choice='{% for e in shots %}{{ e.query }}{{ d }}{{ e.choices[e.gold] }}\n\n{% endfor %}{{ x.query }}{{ d }}{{ c }}',
    schema='{% for e in shots %}{{ e.context_options[e.gold] }}{{ d }}{{ e.continuation }}\n\n{% endfor %}{{ c }}{{ d }}{{ x.continuation }}',
    language_modeling='{% for e in shots %}{{ e.context | trim }}{{ d }}{{ e.continuation }}\n\n{% endfor %}{{ x.context | trim }}{{ d }}{{ c }}')


def protocol_prompts(data, i, meta):
    kind, x = meta['task_type'], data[i]
    others = [j for j in range(len(data)) if j != i]
    shots = [data[j] for j in random.Random(1234 + i).sample(others, meta['num_fewshot'])]
    render = lambda c: jinja2.Template(TEMPLATES[kind], keep_trailing_newline=True).render(shots=shots, x=x, d=meta['continuation_delimiter'], c=c)
    if kind == 'language_modeling': return [render('').strip(), render(x['continuation'])]
    return [render(c) for c in x['choices' if kind == 'multiple_choice' else 'context_options']]


@torch.no_grad()
def protocol_prediction(model, tokenizer, data, i, meta):
    kind = meta['task_type']
    rows = [tokenizer.encode(p, prepend=tokenizer.get_bos_token_id()) for p in protocol_prompts(data, i, meta)]
    agree = lambda rows: next((n for n, column in enumerate(zip(*rows)) if len(set(column)) > 1), min(map(len, rows)))
    if kind == 'language_modeling':
        (context, whole), n = rows, agree(rows)
        assert n == len(context), 'the tokens of the context must begin those of the whole'
        logits = model(torch.tensor([whole]))[0]
        return int(logits[n - 1:-1].argmax(-1).tolist() == whole[n:])
    spans = [(agree(rows), len(r)) for r in rows] if kind == 'multiple_choice' else [(len(r) - agree([r[::-1] for r in rows]), len(r)) for r in rows]
    losses = [F.cross_entropy(model(torch.tensor([r]))[0, :-1], torch.tensor(r[1:]), reduction='none')[a - 1:b - 1].mean().item() for r, (a, b) in zip(rows, spans)]
    return losses.index(min(losses))


def test_all_22_real_tasks_three_ways(bundle, prose, fp32):
    """Batched, alone, and by the protocol written down above: the same prediction for every item."""
    tokenizer, model = prose
    assert len(bundle.tasks) == 22 and len({t.kind for t in bundle.tasks}) == 3
    reader, right = ce.Reader(model, 'cpu', tokenizer.get_vocab_size()), []
    for t in bundle.tasks:
        data = bundle.items(t)
        picks = random.Random(t.label).sample(range(len(data)), 8 if not t.num_fewshot else 2)
        batched = ce.predict(reader, tokenizer, data, t.meta, picks)
        for i, got in zip(picks, batched):
            texts = ce.render_prompts(data[i], ce.examples_for(data, i, t.num_fewshot), t.meta)
            assert texts == protocol_prompts(data, i, t.meta), t.label
            assert got == protocol_prediction(model, tokenizer, data, i, t.meta), f'{t.label} {i}'
            right.append(got == ce.gold_of(data[i], t.kind))
            assert ce.evaluate_example(i, model, tokenizer, data, 'cpu', t.meta) == right[-1]
    assert 0 < sum(right) < len(right) and reader.counts.alone <= 2


def test_batches_read_far_fewer_tokens(bundle, prose, fp32):
    """A cost that no clock disturbs: shared prefixes leave about one choice's worth of tokens of each item."""
    tokenizer, model = prose
    for label, most in (('arc_easy', .35), ('bigbench_language_identification', .35), ('hellaswag_zeroshot', .8), ('boolq', .6)):
        [t] = ce.choose_tasks(bundle, [label])
        data, reader = bundle.items(t), ce.Reader(model, 'cpu', tokenizer.get_vocab_size(), budget=16384)
        ce.predict(reader, tokenizer, data, t.meta, range(6))
        alone = sum(len(r.ids) for rows in ce.item_rows(range(6), tokenizer, data, t.meta, None) for r in rows)
        assert reader.counts.tokens < most * alone, label


def test_examples_are_drawn_from_all_others():
    data = [dict(n=i) for i in range(13)]
    for i in range(13):
        for n in (0, 5, 12): assert ce.examples_for(data, i, n) == random.Random(1234 + i).sample([x for x in data if x['n'] != i], n)


def test_items_are_shuffled_before_the_cut(tmp_path):
    b = ce.open_bundle(small_bundle(tmp_path))
    lines = [json.loads(line) for line in (tmp_path/DATA).read_text().splitlines()]
    random.Random(1337).shuffle(lines)
    assert b.items(b.tasks[0]) == lines == b.items(b.tasks[0])


def test_centred_scores_reproduce_the_published_ones(bundle):
    """GPT-2's accuracies in the bundle, centred by our baselines, give its published centred scores and CORE."""
    published = ce.references(bundle)
    assert list(published) == ['gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl'] and published['gpt2-xl']['CORE'][1] == .256525
    for scores in published.values():
        ours = {t.label: t.centered(scores[t.label][0]) for t in bundle.tasks}
        assert all(abs(ours[k] - scores[k][1]) < 2e-6 for k in ours)
        assert abs(sum(ours.values()) / 22 - scores['CORE'][1]) < 2e-6


def test_a_folder_is_as_good_as_a_zip(bundle, shared_data, tmp_path):
    with zipfile.ZipFile(shared_data/'eval_bundle.zip') as z: z.extractall(tmp_path)
    folder = ce.open_bundle(tmp_path/'eval_bundle')
    assert folder.tasks == bundle.tasks and folder.fingerprint() == bundle.fingerprint() == ce.open_bundle(tmp_path).fingerprint()
    assert folder.items(folder.tasks[5]) == bundle.items(bundle.tasks[5])


def test_a_download_mends_what_is_opened(tmp_path, monkeypatch):
    """Where a folder has lost a file, the advice is to download again: what comes is a zip, and it must be the one that is opened."""
    monkeypatch.setenv('NANOCHAT_BASE_DIR', str(tmp_path))
    whole = small_bundle(tmp_path/'eval_bundle')
    shutil.make_archive(str(tmp_path/'eval_bundle'), 'zip', tmp_path, 'eval_bundle')
    next(whole.rglob('one.jsonl')).unlink()
    bundle = ce.open_bundle()
    assert bundle.items(bundle.tasks[0])


@pytest.mark.parametrize('shape', [dict(), dict(n_layer=1), dict(n_layer=5, window_pattern='SL', sequence_len=256, n_kv_head=2, n_embd=48)], ids=str)
def test_small_tasks_in_batches_and_alone(mini, tokenizer, fp32, shape):
    model = random_gpt(tokenizer.get_vocab_size(), 1, **shape)
    for t in mini.tasks:
        data = mini.items(t)
        alone = [ce.predict_one(i, model, tokenizer, data, 'cpu', t.meta) for i in range(len(data))]
        for budget, step in ((1, 3), (300, 1), (5000, 1)):   # 1: every row by itself, the slowest
            reader = ce.Reader(model, 'cpu', tokenizer.get_vocab_size(), budget)
            assert ce.predict(reader, tokenizer, data, t.meta, range(0, len(data), step)) == alone[::step]


@torch.no_grad()
def exact_scores(model, row):
    """Mean loss and least lead of a row, from all logits in float64."""
    ids = torch.from_numpy(row.ids.astype(np.int64))
    logits, targets = model(ids[None])[0, row.start - 1:row.end - 1].double(), ids[row.start:row.end]
    own = logits[range(len(targets)), targets]
    logits[range(len(targets)), targets] = -torch.inf
    total = torch.logaddexp(logits.logsumexp(1), own)
    return (total - own).mean().item(), (own - logits.max(1).values).min().item()


def test_scores_agree_to_the_last_digits(mini, tokenizer, model):
    """Not only the choice: losses and leads of cached, packed, pruned reading are those of the plain forward pass."""
    reader, worst = ce.Reader(model, 'cpu', tokenizer.get_vocab_size()), 0.
    for t in mini.tasks:
        items = ce.item_rows(range(20), tokenizer, mini.items(t), t.meta, None)
        for fast, rows in zip(ce.score_items(reader, items), items):
            exact, plain = [exact_scores(model, r) for r in rows], ce.score_plainly(model, rows, 'cpu')
            worst = max(worst, np.abs(np.array(fast) - exact).max(), *(abs(a - b) for (a, _), (b, _) in zip(plain, exact)))
            assert [lead > 0 for _, lead in plain] == [lead > 0 for _, lead in exact]
    assert worst < ce.TIE / 5


def test_a_model_that_finds_all_alike_is_scored_alone(mini, tokenizer, fp32):
    """Exact ties: batching may break them either way, so each such item is scored once more by itself."""
    model = random_gpt(tokenizer.get_vocab_size())
    torch.nn.init.zeros_(model.lm_head.weight)
    reader, [t] = ce.Reader(model, 'cpu', tokenizer.get_vocab_size()), ce.choose_tasks(mini, ['next_line'])
    data = mini.items(t)
    assert ce.predict(reader, tokenizer, data, t.meta, range(10)) == [ce.predict_one(i, model, tokenizer, data, 'cpu', t.meta) for i in range(10)] and reader.counts.alone == 10


class Bigrams(torch.nn.Module):
    """Any model: forward(ids) gives logits, nothing else is known of it."""
    def __init__(self, vocab_size):
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(vocab_size, vocab_size, generator=torch.Generator().manual_seed(0)))
    def forward(self, ids): return self.table[ids]


def test_any_model_with_logits_will_do(mini, tokenizer, monkeypatch):
    model = Bigrams(tokenizer.get_vocab_size())
    for t in mini.tasks:
        data = mini.items(t)
        alone = [ce.evaluate_example(i, model, tokenizer, data, 'cpu', t.meta) for i in range(len(data))]
        assert ce.evaluate_task(model, tokenizer, data, 'cpu', t.meta) == sum(alone) / len(data)
    model.max_seq_len = 24
    for t in mini.tasks: assert 0 <= ce.evaluate_task(model, tokenizer, mini.items(t), 'cpu', t.meta) <= 1


def test_a_perfect_model_scores_one(mini, tokenizer):
    """A model that has seen each item scores 1 everywhere; so gold, spans and shift by one are right."""
    t = next(t for t in mini.tasks if t.kind == 'language_modeling')
    data, V = mini.items(t)[:8], tokenizer.get_vocab_size()
    texts = [tokenizer.encode(ce.render_prompts(x, [], t.meta)[1], prepend=tokenizer.get_bos_token_id()) for x in data]
    class Oracle(torch.nn.Module):
        def forward(self, ids):
            out = torch.zeros(*ids.shape, V)
            for row, one in zip(out, ids.tolist()):
                text = next(x for x in texts if one[:5] and one[:len(x) - 1] == x[:-1] or one[:len(x)] == x)
                for p in range(min(len(one), len(text) - 1)): row[p, text[p + 1]] = 9.
            return out
    assert ce.evaluate_task(Oracle(), tokenizer, data, 'cpu', t.meta) == 1


def test_the_oldest_tokens_are_cut(bundle, prose, fp32):
    tokenizer, model = prose
    row = ce.Row(np.arange(100, dtype=np.int32), 90, 100)
    cut = ce.crop(row, 30)
    assert cut.ids.tolist() == list(range(70, 100)) and (cut.start, cut.end) == (20, 30) and ce.crop(row, 100) is row and ce.crop(row, None) is row
    assert ce.crop(row, 5).start == 1, 'an answer that does not fit keeps one token of context'
    for label in ('arc_easy', 'winograd', 'squad', 'hellaswag_zeroshot'):
        [t] = ce.choose_tasks(bundle, [label])
        data, reader = bundle.items(t), ce.Reader(model, 'cpu', tokenizer.get_vocab_size(), limit=50)
        assert max(len(r.ids) for rows in ce.item_rows(range(4), tokenizer, data, t.meta, 50) for r in rows) <= 50
        assert ce.predict(reader, tokenizer, data, t.meta, range(4)) == [ce.predict_one(i, model, tokenizer, data, 'cpu', t.meta, 50) for i in range(4)]


def test_prompts_beyond_the_rotary_tables_are_cut(bundle, tokenizer, fp32):
    model = random_gpt(tokenizer.get_vocab_size(), sequence_len=32)
    [t] = ce.choose_tasks(bundle, ['squad'])
    assert ce.context_limit(model) == 320 and ce.Reader(model, 'cpu', 600).limit == 320 and ce.Reader(model, 'cpu', 600, limit=99).limit == 99
    assert 0 <= ce.evaluate_task(model, tokenizer, bundle.items(t)[:11], 'cpu', t.meta) <= 1


def test_rows_when_one_choice_begins_another():
    a, b = np.array([1, 2, 3], np.int32), np.array([1, 2, 3, 4], np.int32)
    assert [(r.start, r.end) for r in ce.rows_of([a, b], 'multiple_choice')] == [(2, 3), (2, 4)]
    assert [(r.start, r.end) for r in ce.rows_of([a, np.array([9, 1, 2, 3], np.int32)], 'schema')] == [(1, 3), (2, 4)]
    [row] = ce.rows_of([a, b], 'language_modeling')
    assert (row.start, row.end) == (3, 4)
    [row] = ce.rows_of([np.array([1, 2, 7], np.int32), b], 'language_modeling')
    assert row.start == 2, 'where a seam was merged, the common tokens are the context'


def test_memory_does_not_grow_with_the_task(mini, tokenizer, model, monkeypatch):
    """Only a chunk of items is tokenized at a time."""
    seen, rows = [], ce.item_rows
    monkeypatch.setattr(ce, 'CHUNK', 7)
    monkeypatch.setattr(ce, 'item_rows', lambda indices, *a: seen.append(len(indices)) or rows(indices, *a))
    t = mini.tasks[0]
    ce.evaluate_task(model, tokenizer, mini.items(t), 'cpu', t.meta)
    assert max(seen) == 7 and sum(n for n in seen if n > 1) >= len(mini.items(t)) - 1


# ---- interruption, ranks

def in_child(fn, *args):
    """Run in a forked process; its exit code."""
    child = multiprocessing.get_context('fork').Process(target=fn, args=args)
    child.start()
    return child


def plain(result): return {k: result[k] for k in ('core_metric', 'results', 'centered_results', 'items', 'predictions', 'complete')}


def slow_run(model, tokenizer, mini, folder):
    read = ce.Reader.read
    ce.CHUNK = 5
    ce.Reader.read = lambda *a, **k: time.sleep(.01) or read(*a, **k)
    ce.evaluate_core(model, tokenizer, mini, 'cpu', folder=folder)


@needs_fork
def test_killed_in_the_middle_and_continued(mini, tokenizer, model, tmp_path, monkeypatch):
    child = in_child(slow_run, model, tokenizer, mini, tmp_path)
    deadline, second = time.monotonic() + 60, tmp_path/f'{mini.tasks[1].label}.part.jsonl'
    while not second.exists() and time.monotonic() < deadline: time.sleep(.005)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    first, kept = json.loads((tmp_path/f'{mini.tasks[0].label}.json').read_text()), sum(len(r['predictions']) for r in read_jsonl(second))
    assert 0 < kept < len(mini.items(mini.tasks[1])) and not (tmp_path/f'{mini.tasks[3].label}.json').exists()
    stranger = json.dumps(dict(first=0, predictions=[0] * 5, seconds=1.)).encode() + b'\n'  # from a second process that was started by mistake
    second.write_bytes(second.read_bytes() + stranger + b'{"first": 10, "predictions": [0, 0')  # and a line as a kill inside a write leaves it
    asked, run = [], ce.predict
    monkeypatch.setattr(ce, 'predict', lambda r, tok, data, meta, indices, *a: asked.append((meta['dataset_uri'], len(indices))) or run(r, tok, data, meta, indices, *a))
    again = ce.evaluate_core(model, tokenizer, mini, 'cpu', folder=tmp_path)
    assert sum(n for uri, n in asked if uri == mini.tasks[1].uri) == len(mini.items(mini.tasks[1])) - kept and not any(uri == mini.tasks[0].uri for uri, _ in asked)
    assert plain(again) == plain(ce.evaluate_core(model, tokenizer, mini, 'cpu')) and again['predictions'][first['label']] == first['predictions']
    assert not list(tmp_path.glob('*.part.jsonl')) and not list(tmp_path.glob('.*'))


def one_rank(rank, port, model, tokenizer, mini, folder):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    signal.alarm(60)
    ce.CHUNK = 4
    with ce_distributed():
        result = ce.evaluate_core(model, tokenizer, mini, 'cpu', folder=folder/'core')
        (folder/f'{rank}.json').write_text(json.dumps(plain(result)))
        t = mini.tasks[0]
        assert ce.evaluate_task(model, tokenizer, mini.items(t), 'cpu', t.meta) == result['results'][t.label]


def ce_distributed():
    from nanochat.common import distributed
    return distributed(torch.device('cpu'))


@needs_fork
def test_two_processes_find_what_one_does(mini, tokenizer, model, tmp_path):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    children = [in_child(one_rank, r, port, model, tokenizer, mini, tmp_path) for r in range(2)]
    for c in children: c.join()
    assert [c.exitcode for c in children] == [0, 0]
    alone = json.loads(json.dumps(plain(ce.evaluate_core(model, tokenizer, mini, 'cpu'))))
    assert [json.loads((tmp_path/f'{r}.json').read_text()) for r in range(2)] == [alone, alone]
    assert sorted(p.name for p in (tmp_path/'core').iterdir()) == sorted(f'{t.label}.json' for t in mini.tasks)


# ---- what can be wrong

def small_bundle(folder, **files):
    task = 'icl_tasks:\n- {label: one, dataset_uri: a/one.jsonl, num_fewshot: [2], icl_task_type: multiple_choice}\n'
    good = {'core.yaml': task, 'eval_meta_data.csv': 'Eval Task,Random baseline\none,50\n',
            'eval_data/a/one.jsonl': ''.join(json.dumps(dict(query=f'{i} is', choices=['odd', 'even'], gold=(i + 1) % 2)) + '\n' for i in range(6))}
    for name, text in (good | files).items():
        if text is None: continue
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        (folder/name).write_text(text)
    return folder


DATA = 'eval_data/a/one.jsonl'
@pytest.mark.parametrize('files, sentence', [
    ({'core.yaml': None}, 'has no core.yaml, so it is not the CORE bundle'),
    ({'eval_meta_data.csv': None}, 'has no eval_meta_data.csv'),
    ({DATA: None}, 'lacks the data of 1 of 1 tasks: a/one.jsonl'),
    ({DATA: ''}, 'a/one.jsonl in .* is empty'),
    ({DATA: '{"query": "a", "choices": ["x", "y"], "gold": 0}\n{"query": "b", "cho'}, 'line 2 of a/one.jsonl .* is not JSON, perhaps cut off'),
    ({DATA: '{"query": "a", "gold": 0}\n'}, 'line 1 of .* lacks choices'),
    ({DATA: '{"query": "a", "choices": ["x", "y"], "gold": 2}\n'}, 'names the right choice as 2, of 2'),
    ({DATA: '[]\n'}, 'lacks query'),
    ({'core.yaml': 'icl_tasks: [oh'}, 'core.yaml or eval_meta_data.csv in .* cannot be read'),
    ({'core.yaml': 'icl_tasks:\n- {label: two, dataset_uri: a/one.jsonl, num_fewshot: [0], icl_task_type: schema}\n'}, "KeyError: 'two'"),
    ({'core.yaml': 'icl_tasks:\n- {label: one, dataset_uri: a/one.jsonl, num_fewshot: [0], icl_task_type: poetry}\n'}, r'unknown kind: one \(poetry\)')], ids=lambda x: str(x)[:40])
def test_a_damaged_bundle_is_a_sentence(tmp_path, tokenizer, files, sentence):
    with pytest.raises(UserError, match=sentence):
        b = ce.open_bundle(small_bundle(tmp_path/'b', **files))
        ce.evaluate_core(None, tokenizer, b, 'cpu')  # before the model is touched


def test_a_damaged_zip_is_a_sentence(tmp_path):
    small_bundle(tmp_path/'eval_bundle')
    good = Path(shutil.make_archive(str(tmp_path/'good'), 'zip', tmp_path, 'eval_bundle'))
    assert len(ce.open_bundle(good).items(ce.open_bundle(good).tasks[0])) == 6
    raw = good.read_bytes()
    (tmp_path/'half.zip').write_bytes(raw[:len(raw) // 2])
    with pytest.raises(UserError, match='is not a zip, or only its beginning'): ce.open_bundle(tmp_path/'half.zip')
    with zipfile.ZipFile(good) as z: info = z.getinfo('eval_bundle/eval_data/a/one.jsonl')
    at = info.header_offset + 30 + len(info.filename) + 5
    (tmp_path/'bad.zip').write_bytes(raw[:at] + bytes([raw[at] ^ 255]) + raw[at + 1:])
    with pytest.raises(UserError, match='one.jsonl in .* is damaged'): (b := ce.open_bundle(tmp_path/'bad.zip')).items(b.tasks[0])
    with zipfile.ZipFile(tmp_path/'other.zip', 'w') as z: z.writestr('holiday/photo.txt', 'sea')
    with pytest.raises(UserError, match='no core.yaml and no eval_meta_data.csv, so it is not the CORE bundle .*photo'): ce.open_bundle(tmp_path/'other.zip')
    with pytest.raises(UserError, match='no CORE bundle at .*eval_bundle.zip; run: python -m nanochat.core_eval'): ce.open_bundle()
    with pytest.raises(UserError, match='no CORE bundle at .*nowhere'): ce.open_bundle(tmp_path/'nowhere')


def test_too_few_items_and_unknown_tasks(tmp_path, tokenizer, model, bundle):
    b = ce.open_bundle(small_bundle(tmp_path/'b'))
    with pytest.raises(UserError, match='one shows 2 other items before each question and has only 2 with --max-per-task 2; give --max-per-task 3 or more'):
        ce.evaluate_core(model, tokenizer, b, 'cpu', max_per_task=2)
    assert ce.evaluate_core(model, tokenizer, b, 'cpu', max_per_task=3)['items'] == {'one': 3}
    with pytest.raises(UserError, match='2 with --core-max-per-task 2; give --core-max-per-task 3 or more'): ce.task_costs(b, b.tasks, 2, '--core-max-per-task')
    with pytest.raises(UserError, match='max_per_task 0 leaves nothing'): ce.evaluate_core(model, tokenizer, b, 'cpu', max_per_task=0)
    with pytest.raises(UserError, match="no task arc_esay; it has: hellaswag_zeroshot, jeopardy"): ce.choose_tasks(bundle, ['arc_esay', 'copa'])
    with pytest.raises(UserError, match='has only 10'): ce.evaluate_core(model, tokenizer, bundle, 'cpu', max_per_task=10)
    with pytest.raises(UserError, match='the task shows 5 other'): ce.evaluate_task(model, tokenizer, [{}] * 5, 'cpu', dict(task_type='schema', num_fewshot=5))


@pytest.fixture
def server(tmp_path):
    """A web server in this process; `answers` maps a path to (claimed length, body) or a status."""
    answers = {}
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            found = answers.get(self.path, 404)
            if isinstance(found, int): return self.send_error(found)
            self.send_response(200)
            self.send_header('Content-Length', str(found[0]))
            self.end_headers()
            self.wfile.write(found[1])
        def log_message(self, *args): pass
    httpd = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{httpd.server_port}', answers
    httpd.shutdown()


def test_a_download_is_whole_or_absent(server, tmp_path, base_directory, capsys):
    url, answers = server
    small_bundle(tmp_path/'eval_bundle')
    raw = Path(shutil.make_archive(str(tmp_path/'good'), 'zip', tmp_path, 'eval_bundle')).read_bytes()
    answers |= {'/cut': (len(raw), raw[:-40]), '/page': (6, b'<html>'), '/good': (len(raw), raw)}
    for path, sentence in (('/cut', 'broke off|cannot download'), ('/page', 'not a zip'), ('/gone', 'cannot download .*Not Found')):
        with pytest.raises(UserError, match=sentence): ce.fetch_bundle(ce.BundleConfig(url + path))
        assert not any(base_directory.iterdir()), 'nothing may be left behind'
    assert len(ce.open_bundle(ce.fetch_bundle(ce.BundleConfig(url + '/good'))).tasks) == 1
    ce.fetch_bundle(ce.BundleConfig(url + '/gone'))  # already there
    with pytest.raises(UserError, match='cannot download'): ce.fetch_bundle(ce.BundleConfig(url + '/gone', force=True))
    assert ce.open_bundle().tasks, 'the old one stays'


# ---- core-mini

def test_mini_questions_are_fair():
    a, b = ce.mini_bundle(Loop()), ce.mini_bundle(Loop())
    assert a.fingerprint() == b.fingerprint() and [t.label for t in a.tasks] == list(ce.MINI)
    texts = list(Loop().documents('val'))
    joined = '\n'.join(texts)
    for t in a.tasks:
        data = a.items(t)
        assert 12 <= len(data) <= 200 and len({json.dumps(x, sort_keys=True) for x in data}) == len(data)
        for x in data:
            context, continuation = ce.parts(x, t.kind)[x.get('gold', 0)]
            assert (context + t.delimiter + continuation).strip() in joined or t.label == 'docstring', 'the right answer is what the text says'
            for n, (c, k) in enumerate(ce.parts(x, t.kind)): assert n == x.get('gold', 0) or (c, k) != (context, continuation)
    golds = [x['gold'] for x in a.items(ce.choose_tasks(a, ['next_line'])[0])]
    assert max(golds.count(g) for g in range(4)) < .5 * len(golds), 'the right choice must not have a place of its own'


def test_the_offline_bundle_is_the_same_in_every_process():
    """Python orders sets of strings by a number drawn at its start: nothing may depend on it, or no result could be continued or compared."""
    code = 'import test_core_eval as t; print(t.ce.mini_bundle(t.Loop(), items=30).fingerprint())'
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    runs = [subprocess.run([sys.executable, '-c', code], env={**os.environ, 'PYTHONPATH': path, 'PYTHONHASHSEED': seed}, capture_output=True, text=True) for seed in '12']
    assert runs[0].returncode == 0, runs[0].stderr[-2000:]
    assert len({r.stdout for r in runs}) == 1


def test_mini_of_too_little_text_says_so():
    class Empty(Loop):
        def documents(self, split): return iter(['a b c'])
    with pytest.raises(UserError, match='too short to make questions'): ce.mini_bundle(Empty())


def test_table_and_figure(bundle, mini, tokenizer, model, tmp_path):
    result = ce.evaluate_core(model, tokenizer, bundle, 'cpu', tasks=['copa', 'winograd'], max_per_task=12)
    ce.save_tables(result, bundle, tmp_path, 'tiny')
    lines = (tmp_path/'core.csv').read_text().splitlines()
    assert lines[0] == 'Task,Items,Accuracy,Centered,gpt2,gpt2-medium,gpt2-large,gpt2-xl' and lines[1].startswith('copa,12,') and lines[1].endswith('0.200000,0.320000,0.340000,0.340000')
    assert lines[-1].startswith('mean,24,,'), 'two tasks are not CORE'
    svg = (tmp_path/'core.svg').read_text()
    assert '<svg' in svg and len(svg) < 100_000
    assert ce.core_csv(ce.evaluate_core(model, tokenizer, mini, 'cpu', max_per_task=5), mini).splitlines()[-1].startswith('CORE,20,,')


# ---- the script

@pytest.fixture
def home(base_directory, tmp_path, tokenizer, fp32):
    """A base directory with a corpus and a checkpoint of a random model."""
    from nanochat.checkpoint_manager import init_run, run_dir, save_checkpoint
    (tmp_path/'text').mkdir()
    for i, t in enumerate(Loop().documents('val')): (tmp_path/'text'/f'{i}.txt').write_text(t * 3)
    prepare_corpus(tmp_path/'text', val_fraction=.8)
    model = random_gpt(tokenizer.get_vocab_size(), sequence_len=128)
    run = run_dir('base', 'd2')
    init_run(run, {}, tokenizer)
    save_checkpoint(run, 7, model)
    return str(tmp_path/'text')


SMALL = dict(eval_tokens=256, device_batch_size=2, ngram_tokens=0, device='cpu')


def test_base_eval_adds_core_mini(home, base_directory, capsys):
    result = be.base_eval(be.BaseEvalConfig(corpus=home, **SMALL))
    assert result['core'] == 'mini' and set(result['core_accuracy']) <= set(ce.MINI) and 'CORE-mini' in capsys.readouterr().out
    folder = base_directory/'core_eval'/result['core_folder']
    assert {'core.csv', 'core.svg'} < {p.name for p in folder.iterdir()}
    assert be.base_eval(be.BaseEvalConfig(corpus=home, **SMALL))['skipped']
    table = (folder/'next_line.json').read_text()
    (folder/'next_line.json').write_text(table.replace('"accuracy"', '"accuracy "'))  # a sign that it was made again
    forced = be.base_eval(be.BaseEvalConfig(corpus=home, force=True, **SMALL))
    assert forced['core_accuracy'] == result['core_accuracy'] and json.loads((folder/'next_line.json').read_text())['accuracy'] == result['core_accuracy']['next_line']
    assert 'core_metric' not in be.base_eval(be.BaseEvalConfig(corpus=home, core='none', **SMALL))


def test_base_eval_on_the_real_bundle(home, bundle, base_directory, capsys):
    cfg = be.BaseEvalConfig(corpus=home, bundle=bundle.where, core_tasks='copa, winogrande', max_per_task=8, **SMALL)
    result = be.base_eval(cfg)
    assert result['core'] == 'full' and set(result['core_accuracy']) == {'copa', 'winogrande'} and 'of 2 tasks' in capsys.readouterr().out
    bench = be.base_eval(be.BaseEvalConfig(corpus=home, bundle=bundle.where, core_tasks='copa', core_bench=4, **SMALL))['bench']
    assert [r['task'] for r in bench] == ['copa', 'all'] and bench[0]['differ'] == 0 and 'faster' in capsys.readouterr().out


@pytest.mark.parametrize('flags, sentence', [
    (dict(core='maxi'), "core 'maxi' is unknown; use mini, full or none"), (dict(core='full'), 'no CORE bundle at'), (dict(core='mini', bundle='x'), '--bundle goes with --core full'),
    (dict(core_bench=-1), 'core_bench is a number'), (dict(hf='x', core='none'), 'leave --core none out'), (dict(core_tasks='chess'), 'has no task chess; it has: next_line'),
    (dict(max_per_task=3), 'docstring shows 3 other items .* with --max-per-task 3; give --max-per-task 4 or more')])
def test_flags_that_cannot_be_meant(home, flags, sentence):
    with pytest.raises(UserError, match=sentence): be.base_eval(be.BaseEvalConfig(corpus=home, **SMALL | flags))


def test_without_transformers_the_way_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, 'transformers', None)
    with pytest.raises(UserError, match='pip install transformers'): be.load_hf('gpt2', torch.device('cpu'))


def test_a_huggingface_model(home, bundle, tokenizer, tmp_path, base_directory, capsys):
    """GPT-2's class with random weights and few positions, from disk: the same predictions as one at a time, by its own forward pass."""
    transformers = pytest.importorskip('transformers', reason='transformers is not installed')
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=tokenizer.get_vocab_size(), n_positions=160, n_embd=32, n_layer=2, n_head=2, initializer_range=.4,
                                     bos_token_id=tokenizer.get_bos_token_id(), eos_token_id=tokenizer.get_bos_token_id())
    there = transformers.GPT2LMHeadModel(config)
    there.save_pretrained(tmp_path/'hf')
    for name, text in (('tokenizer.json', tokenizer.hf.to_str()), ('tokenizer_config.json', json.dumps(dict(tokenizer_class='PreTrainedTokenizerFast', bos_token='<|bos|>')))): (tmp_path/'hf'/name).write_text(text)
    result = be.base_eval(be.BaseEvalConfig(hf=str(tmp_path/'hf'), bundle=bundle.where, core_tasks='copa,winograd,bigbench_operators', max_per_task=14, device='cpu'))
    model, tok = be.load_hf(str(tmp_path/'hf'), torch.device('cpu'))
    assert ce.context_limit(model) == 160 and tok(['def f(x):'], prepend=3) == [[3, *tokenizer.encode('def f(x):')]]
    for t in ce.choose_tasks(bundle, list(result['core_accuracy'])):
        data = bundle.items(t)[:14]
        assert result['core_accuracy'][t.label] == np.mean([ce.evaluate_example(i, model, tok, data, 'cpu', t.meta) for i in range(14)])
    assert not (base_directory/'report').exists() and 'of 3 tasks' in capsys.readouterr().out
    with pytest.raises(UserError, match="cannot load the HuggingFace model"): be.load_hf(str(tmp_path/'text'), torch.device('cpu'))
