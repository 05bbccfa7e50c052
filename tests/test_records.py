"""The records behind a score: found, filtered, shown; in a notebook without a browser, and where the widgets are missing."""
import importlib.util
import json
import sys

import pytest

from nanochat.common import UserError
from nanochat.scripts import records as R


def rec(i, correct, completion='said', **more):
    return dict(index=i, question=f'question {i}?', prompt='', answer=f'truth {i}', completion=completion, correct=correct, reward=float(correct), **more)


@pytest.fixture
def run(tmp_path):
    rows = {'sums': [rec(0, 1), rec(1, 0, 'The answer is <b>7</b> | `x`'), rec(2, 0, samples=[dict(completion='zebra', correct=1, reward=1.0)])],
            'code': [rec(0, 0, why='AssertionError'), rec(1, 1, '<|python_start|>1<2<|python_end|><|output_start|>1<|output_end|>so 1')]}
    for task, lines in rows.items(): (tmp_path/f'eval_{task}.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in lines))
    return tmp_path


def test_found_and_filtered(run):
    records = R.load_records(run)
    assert [(r['task'], r['index']) for r in records] == [('code', 0), ('code', 1), ('sums', 0), ('sums', 1), ('sums', 2)]
    count = lambda **kw: len(R.select(records, **kw))
    assert (count(), count(task='code'), count(verdict='right'), count(verdict='wrong'), count(verdict='within reach')) == (5, 2, 2, 3, 1)
    assert count(search='zebra') == 1 and count(search='QUESTION 1') == 2 and count(task='code', search='zebra') == 0
    assert len(R.load_records(run/'eval_sums.jsonl')) == 3


def test_what_is_not_there_is_said(run, base_directory):
    with pytest.raises(UserError, match='chat_eval'): R.load_records(run/'nowhere')
    with pytest.raises(UserError, match='chat_sft'): R.load_records('sft')
    (run/'eval_other.jsonl').write_text('{"step": 1}\n')
    with pytest.raises(UserError, match='no records'): R.load_records(run)
    (run/'eval_other.jsonl').write_text('[1, 2]\n')
    with pytest.raises(UserError, match='no records'): R.load_records(run)


def test_losses_and_odds_stand_beside_the_choices():
    ranked, lettered = rec(0, 1, task='names', choices=['sorted', 'min'], losses=[1.25, 2.5]), rec(0, 1, task='letters', letters=['A', 'B'], odds=[.75, .25])
    assert '    sorted: 1.25\n    min: 2.5\n' in R.record_text(ranked) and '    A: 0.75\n    B: 0.25\n' in R.record_text(lettered)
    assert 'with mean loss' in R.record_html(ranked) and 'with odds' in R.record_html(lettered) and 'B <small>0.25</small>' in R.record_html(lettered)
    assert 'with' not in R.record_html(rec(0, 1, task='sums'))


def test_the_public_run_that_was_named(tmp_path, base_directory):
    """In a folder of several, `--model-tag` says whose answers are read, as it says to chat_eval whom to ask."""
    from nanochat.checkpoint_manager import results_dir
    for tag in ('d2', 'd4'):
        (tmp_path/tag).mkdir()
        for name in ('model_000001.pt', 'meta_000001.json'): (tmp_path/tag/name).write_text('{}')
        (results_dir('public', tmp_path/tag)/'eval_names.jsonl').write_text(json.dumps(rec(0, 1, f'I am {tag}')) + '\n')
    said = lambda **kw: [r['completion'] for r in R.show_records(R.RecordsConfig(source='public', path=str(tmp_path), **kw))]
    assert (said(), said(model_tag='d2'), said(model_tag='d4')) == (['I am d4'], ['I am d2'], ['I am d4'])


def test_nothing_a_model_wrote_is_html(run):
    """Neither in the card, nor in the tables, nor in the page; tool calls keep their shading."""
    records = R.load_records(run)
    cards = ''.join(map(R.record_html, records))
    assert '<b>7</b>' not in cards and '&lt;b&gt;7&lt;/b&gt;' in cards and '1&lt;2</span>' in cards and 'AssertionError' in cards and '1 of 1 samples are right' in cards
    assert '<b>7</b>' not in R.table_html(records)
    line = next(l for l in R.table_markdown(records).splitlines() if '7' in l)
    assert line.count(' | ') == 4 and '&lt;b>' in line and '\\|' in line and '\\`x' in line


def test_browsing_without_a_browser(run):
    pytest.importorskip('ipywidgets')
    b = R.explore_records(run)
    assert isinstance(b, R.RecordBrowser) and b.controls['task'].options == ('all', 'code', 'sums')
    b.controls['verdict'].value = 'wrong'
    assert '1 of 3, 0 of them right' in b.shown.value
    b.buttons['previous'].click()
    assert '3 of 3' in b.shown.value and 'question 2?' in b.shown.value
    b.buttons['next'].click()
    assert '1 of 3' in b.shown.value
    b.controls['search'].value = 'nothing like it'
    b.buttons['next'].click()
    assert b.shown.value == '<p>No record fits these filters.</p>'
    b.controls['search'].value, b.controls['verdict'].value = '', 'all'
    bundle = b._repr_mimebundle_()
    assert 'application/vnd.jupyter.widget-view+json' in bundle and bundle['text/html'].count('<tr>') == 6 and bundle['text/markdown'].startswith('| task |')


def test_without_widgets_it_is_a_table(run, monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    pages = R.explore_records(run)
    assert type(pages) is R.Pages and pages._repr_html_().count('<tr>') == 6
    pages.filter(task='sums')
    pages.turn(1)
    assert 'question 1?' in pages.page()


def test_command_line(run, tmp_path, monkeypatch, capsys):
    def ask(*args):
        monkeypatch.setattr(sys, 'argv', ['records', '--source', str(run), *args])
        R.main()
        return capsys.readouterr().out
    said = ask('--verdict', 'within reach')
    assert 'sums 2: within reach' in said and 'right: zebra' in said and '1 of 1 records' in said
    ask('--html', str(tmp_path/'page.html'))
    assert (tmp_path/'page.html').read_text().count('border-radius:6px') == 5
    with pytest.raises(SystemExit) as end: ask('--verdict', 'maybe')
    assert end.value.code == 2 and "no verdict 'maybe'" in capsys.readouterr().err
