"""The leaderboard: frozen text, a judge that cannot be talked to, records that repeat, significance."""
import json, math, subprocess, zipfile
from pathlib import Path

import pytest
import torch

import nanochat.leaderboard as lb
from nanochat.common import UserError, read_jsonl
from warm_python import warm_python

ROOT = Path(__file__).resolve().parents[1]
GOOD = '''
import torch
from nanochat.tokenizer import RustBPETokenizer
class Guess(torch.nn.Module):
    """Knows how frequent each token is, plus a little noise from the seed."""
    def __init__(self, tok, documents):
        super().__init__()
        counts = torch.ones(tok.get_vocab_size())
        for d in documents: counts += torch.bincount(torch.tensor(tok.encode(d)), minlength=len(counts))
        self.logits = torch.nn.Parameter((counts / counts.sum()).log() + 1e-3 * torch.randn(len(counts)))
    def forward(self, ids): return self.logits.expand(*ids.shape, -1)
def train(run):
    tok = RustBPETokenizer.train_from_iterator(run.documents[:3], 400)
    run.log(step=1, loss=6.0)
    return Guess(tok, run.documents[:3]), tok
'''


def folder(tmp_path, code, name='001-toy'):
    (tmp_path/name).mkdir()
    (tmp_path/name/'train.py').write_text(code)
    return tmp_path/name


def command(*args): return subprocess.run([warm_python().python, '-m', 'nanochat.leaderboard', *map(str, args)], env=warm_python().environ(), capture_output=True, text=True, cwd=ROOT)


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """A record, run with two seeds from the command line."""
    where = folder(tmp_path_factory.mktemp('records'), GOOD)
    done = command('run', where, '--seeds', 2, '--minutes', .5)
    assert done.returncode == 0, done.stderr
    return where


def test_a_record_is_run_and_kept(finished):
    r = json.loads((finished/'result.json').read_text())
    assert [x['seed'] for x in r['runs']] == [1, 2] and 3 < r['mean'] < 8 and 0 < r['spread'] < .01 and r['snapshot'] == lb.SNAPSHOT and r['environment']['python']
    assert r['runs'][0]['bpb'] != r['runs'][1]['bpb'] and [x['seed'] for x in read_jsonl(finished/'log.jsonl')] == [1, 2]
    assert f"{r['mean']:.4f}" in command('show', finished.parent).stdout


def test_what_was_run_is_not_run_again_unless_the_code_changes(finished, monkeypatch):
    asked = []
    monkeypatch.setattr(lb, 'in_process', lambda folder, seed, minutes, log: asked.append(seed) or dict(seed=seed, bpb=1.0, seconds=1.))
    before = (finished/'result.json').read_text()
    lb.run_record(finished, 2, .5)
    assert asked == [] and (finished/'result.json').read_text() == before
    text = (finished/'train.py').read_text()
    try:
        (finished/'train.py').write_text(text + '\n# changed')
        lb.run_record(finished, 1, .5)
        assert asked == [1]
    finally:
        (finished/'train.py').write_text(text)
        (finished/'result.json').write_text(before)


def test_verify(finished, monkeypatch):
    r = json.loads((finished/'result.json').read_text())
    seen = []
    def again(bpb): monkeypatch.setattr(lb, 'in_process', lambda folder, seed, minutes, log: seen.append(seed) or dict(seed=seed, bpb=bpb, seconds=1.))
    again(r['mean'] + .005)
    assert lb.verify_record(finished) == [r['mean'] + .005] and not set(seen) & {1, 2}, 'with seeds of its own'
    again(r['mean'] + .5)
    with pytest.raises(UserError, match='claimed are'): lb.verify_record(finished)
    text = (finished/'train.py').read_text()
    (finished/'train.py').write_text(text.replace('400', '401'))
    with pytest.raises(UserError, match='not the code that made its result'): lb.verify_record(finished)
    (finished/'train.py').write_text(text)


@pytest.mark.parametrize('code, sentence', [
    ('x = 1', 'no function train'),
    (GOOD.replace('run.log(step=1, loss=6.0)', 'import time; time.sleep(1.1)'), 'allowed are 1'),
    (GOOD.replace('return self.logits.expand(*ids.shape, -1)', 'return 9. * torch.nn.functional.one_hot(torch.roll(ids, -1, 1), len(self.logits)).float()'), 'looks ahead'),
    (GOOD.replace('return Guess(tok, run.documents[:3]), tok', 'm = Guess(tok, run.documents[:3]); m.logits.data.fill_(float("nan")); return m, tok'), 'finite numbers'),
    (GOOD.replace('return Guess(tok, run.documents[:3]), tok', '''
    class Short:
        def __getattr__(self, name): return getattr(tok, name)
        def encode(self, text): return tok.encode(text[:9])
    return Guess(tok, run.documents[:3]), Short()'''), 'does not give back the text')])
def test_what_is_no_record_says_why(tmp_path, code, sentence):
    with pytest.raises(UserError, match=sentence): lb.run_once(folder(tmp_path, code), 1, 1. if 'sleep' in code else 3., lb.frozen_text())
    assert not (tmp_path/'001-toy'/'result.json').exists()


class Ahead(torch.nn.Module):
    """Logits that know the token `by` places later."""
    def __init__(self, by): super().__init__(); self.by = by
    def forward(self, ids): return 10. * torch.nn.functional.one_hot(torch.roll(ids, -self.by, 1), 20).float()


@pytest.mark.parametrize('row', [[0, 5, 6, 7, 9, 3, 4, 9, 2], [0, 5, 6, 7, 9, 3, 4, 9], [0, 5, 5, 5, 5, 5, 5, 5], [0, 1, 2, 3, 0, 0, 0, 0, 0]])
@pytest.mark.parametrize('by', [1, 2, 3])
def test_looking_ahead_is_seen_whatever_the_tokens(row, by):
    with pytest.raises(UserError, match='looks ahead'): lb.check_causal(Ahead(by), row)


def test_the_judge_asks_about_no_more_tokens_than_it_scores():
    seen = []
    class Honest(torch.nn.Module):
        def forward(self, ids): seen.append(ids.shape[1]); return torch.zeros(*ids.shape, 300)
    from nanochat.tokenizer import RustBPETokenizer
    lb.judge(Honest(), RustBPETokenizer.train_from_iterator(['-'], 265), ['ab' * 50], 8)
    assert max(seen) == 8


def test_a_record_may_have_dataclasses_and_files_of_its_own(tmp_path):
    where = folder(tmp_path, 'from __future__ import annotations\nfrom dataclasses import dataclass\nimport beside_the_record\n@dataclass\nclass C:\n    x: int = beside_the_record.x\ndef train(run): return C().x')
    (where/'beside_the_record.py').write_text('x = 7')
    assert lb.load_train(where)(None) == 7


@pytest.fixture
def shelved(tmp_path, monkeypatch):
    """A record that has run for five minutes with three seeds; to run it again takes no time and gives 2.0."""
    where = folder(tmp_path, 'def train(run): ...')
    monkeypatch.setattr(lb, 'in_process', lambda folder, seed, minutes, log: lb.append_jsonl(log, dict(seed=seed)) or dict(seed=seed, bpb=2.0, seconds=6.))
    lb.run_record(where)
    return where


def test_a_try_takes_no_records_place(shelved):
    before = (shelved/'result.json').read_text(), (shelved/'log.jsonl').read_text()
    with pytest.raises(UserError, match='another folder'): lb.run_record(shelved, 1, .1)
    assert before == ((shelved/'result.json').read_text(), (shelved/'log.jsonl').read_text())
    (shelved/'result.json').write_text(json.dumps(lb.with_runs(shelved, json.loads(before[0])['runs'], .1)))
    assert 'a try of 0.1 minutes' in lb.table(shelved.parent)


def test_runs_on_another_text_are_not_kept(shelved):
    result = json.loads((shelved/'result.json').read_text())
    (shelved/'result.json').write_text(json.dumps(result | dict(snapshot='other', runs=[r | dict(bpb=1.0) for r in result['runs']], mean=1.0)))
    assert 'other text' in lb.table(shelved.parent)
    assert [r['bpb'] for r in lb.run_record(shelved)['runs']] == [2.0] * 3 and [x['seed'] for x in read_jsonl(shelved/'log.jsonl')] == [1, 2, 3]


def test_an_interrupted_seed_logs_once(shelved):
    lb.append_jsonl(shelved/'log.jsonl', dict(seed=4, loss=9.))
    lb.run_record(shelved, 4)
    assert read_jsonl(shelved/'log.jsonl') == [dict(seed=n) for n in (1, 2, 3, 4)]


def test_tries_are_compared_with_nothing(shelved):
    """A try between two records is no step of the ladder: the second is compared with the first."""
    for n, (bpb, minutes) in enumerate([(1.5, .5), (1.8, 5.)], 2):
        at = folder(shelved.parent, '', f'00{n}-x')
        (at/'result.json').write_text(json.dumps(lb.with_runs(at, [dict(seed=s, bpb=bpb + s / 1000, seconds=9.) for s in (1, 2, 3)], minutes)))
    lines = lb.table(shelved.parent).splitlines()
    assert 'p =' not in lines[2] and 'p =' in lines[3] and 'not significant' not in lines[3]


def test_the_judge_counts_every_byte_once():
    """Whatever the row length and batch: nats of all tokens over the bytes of the text itself."""
    from nanochat.tokenizer import RustBPETokenizer
    docs = [d[:3000] for d in lb.frozen_text().val[:4]] + ['ä' * 50 + '🙂']
    tok = RustBPETokenizer.train_from_iterator(docs, 300)
    torch.manual_seed(0)
    logits = torch.randn(300)
    class Fixed(torch.nn.Module):
        def forward(self, ids): return logits.expand(*ids.shape, -1)
    nats = -sum(logits.log_softmax(0)[i].item() for d in docs for i in tok.encode(d))
    expected = nats / math.log(2) / sum(len(d.encode()) for d in docs)
    for T, batch in ((7, 3), (64, 16), (5000, 1)): assert abs(lb.judge(Fixed(), tok, docs, T, batch) - expected) < 1e-4


def test_text_is_frozen(tmp_path, base_directory, monkeypatch):
    """Another release is refused with the command that helps; a wheel in its place does; one changed byte does not."""
    files = lb.installed_files()
    if files is None: pytest.skip(f'{lb.PACKAGE} {lb.VERSION} is not the installed release')
    assert lb.root_hash(files) == lb.SNAPSHOT
    monkeypatch.setattr(lb, 'installed_files', lambda: None)
    fresh = lb.frozen_text.__wrapped__
    with pytest.raises(UserError, match=f'pip download {lb.PACKAGE}=={lb.VERSION}'): fresh()
    (base_directory/'leaderboard').mkdir()
    wheel = base_directory/'leaderboard'/f'{lb.PACKAGE}-{lb.VERSION}-py3-none-any.whl'
    with zipfile.ZipFile(wheel, 'w') as z:
        for n, data in files.items(): z.writestr(n, data)
    assert fresh() == lb.frozen_text()
    with zipfile.ZipFile(wheel, 'w') as z:
        for n, data in files.items(): z.writestr(n, data + b'#' * (n == min(files)))
    with pytest.raises(UserError, match='not here unchanged'): fresh()


def test_significance():
    """Against tables of Student's distribution, and by drawing: of records that are no better, about one in a hundred passes."""
    for t, df, p in ((1.812461, 10, .05), (2.763769, 10, .01), (6.964557, 2, .01), (31.82052, 1, .01), (0, 5, .5)): assert abs(lb.student_tail(t, df) - p) < 1e-5
    g = torch.Generator().manual_seed(0)
    draws = torch.randn(400, 6, generator=g).tolist()
    passed = sum(lb.better(d[:3], d[3:]) < .01 for d in draws)
    assert passed <= 12
    assert lb.better([1.2], [1.5, 1.5]) == 1.0 and lb.better([1.3, 1.31], [1.5, 1.51]) < .01 < lb.better([1.49, 1.5], [1.5, 1.51])


def test_the_shipped_records_have_a_train_and_a_story():
    records = sorted((ROOT/'lessons'/'leaderboard'/'records').iterdir())
    assert len(records) >= 3
    for r in records:
        assert callable(lb.load_train(r)) and len((r/'train.py').read_text().splitlines()) < 100
        result = lb.stored(r)
        assert not result or (result['code'] == lb.code_hash(r) and result['minutes'] == lb.MINUTES and result['snapshot'] == lb.SNAPSHOT)


@pytest.mark.parametrize('args, sentence', [(['walk'], 'use run, verify or show'), (['run', 'nowhere'], 'no folder nowhere'), (['run', 'lessons', '--minutes', 9], '5 minutes'), (['show', 'lessons', 'extra'], 'extra')])
def test_command_line(args, sentence):
    done = command(*args)
    assert done.returncode == 2 and sentence in done.stderr and 'Traceback' not in done.stderr
