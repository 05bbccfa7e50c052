"""Widgets about text: what they compute is asked of an independent reference, what they draw is redrawn by every control."""
import random, re, urllib.error, urllib.request

import pytest

from nanochat import viz_data as vd
from nanochat.common import UserError
from nanochat.tasks.arithmetic import Arithmetic
from nanochat.tokenizer import RustBPETokenizer


@pytest.fixture(autouse=True)
def strict(monkeypatch): monkeypatch.setenv('NANOCHAT_STRICT_WIDGETS', '1')


@pytest.fixture(scope='module')
def toy(): return RustBPETokenizer.train_from_iterator(['the cat sat on the mat', 'the hat that the cat had', 'Größe über alles, naïve café 1234'] * 5, 330)


TEXTS = ['the cat that sat', 'Größe €', '\n\n \t', '12345', '', '<b>bold</b>', '日本語']


def test_all_merges_are_the_tokenizer_itself(toy):
    for text in TEXTS: assert vd.tokens_after(text, toy, vd.merges_in(toy)) == [toy.decode_single_token_bytes(i) for i in toy.encode(text)]


def test_no_merges_are_bytes_and_nothing_is_lost(toy):
    for text in TEXTS:
        assert vd.tokens_after(text, toy, 0) == [bytes([b]) for b in text.encode()]
        for n in range(0, vd.merges_in(toy), 7): assert b''.join(vd.tokens_after(text, toy, n)) == text.encode()


def test_more_merges_never_make_more_tokens(toy):
    for text in TEXTS:
        counts = [len(vd.tokens_after(text, toy, n)) for n in range(vd.merges_in(toy) + 1)]
        assert counts == sorted(counts, reverse=True)


def test_stops_cover_everything():
    for most in (0, 1, 5, 100, 32000):
        stops = vd.merge_stops(most)
        assert stops[0] == 0 and stops[-1] == most and stops == sorted(set(stops)) and len(stops) <= 42


@pytest.mark.parametrize('token, shown', [(b' a', '·a'), (b'\n', '↵'), ('é'.encode(), 'é'), ('é'.encode()[:1], '⟨c3⟩'), (b'\x00', '⟨00⟩'), (b'\t', '→')])
def test_visible(token, shown): assert vd.visible(token) == shown


def test_merges_slider(toy):
    e = vd.merges_slider('the cat', toy)
    seen = set()
    for n in vd.merge_stops(vd.merges_in(toy)):
        e.set(merges=n)
        tokens = vd.tokens_after('the cat', toy, n)
        assert f'<b>{len(tokens)}</b> tokens' in e.shown.data and f'<b>{7 / len(tokens):.2f}</b>' in e.shown.data
        seen.add(e.shown.data)
    assert len(seen) > 5
    for text in TEXTS: assert e.set(text=text).error is None
    assert '<b>bold' not in vd.merges_html('<b>bold</b>', toy, 0)


def test_packing_counts(monkeypatch):
    rng = random.Random(0)
    for mode in ('crop', 'pad'):
        for _ in range(30):
            lengths = [rng.randint(1, 200) for _ in range(rng.randint(1, 60))]
            capacity, buffer = rng.randint(1, 100), rng.randint(1, 40)
            p = vd.pack(lengths, capacity, buffer, mode)
            placed = sum(n for row in p.rows for _, n in row)
            assert sorted(d for row in p.rows for d, _ in row) == list(range(len(lengths)))
            assert placed + p.lost == sum(lengths) and placed + p.empty == capacity * len(p.rows)
            assert 0 <= p.waste < 1
            if mode == 'pad': assert p.lost == sum(max(0, n - capacity) for n in lengths)


def test_a_larger_buffer_wastes_less():
    rng = random.Random(1)
    lengths = [max(2, round(rng.lognormvariate(3.6, .8))) for _ in range(2000)]
    waste = [vd.pack(lengths, 128, n).waste for n in (1, 16, 256)]
    assert waste[0] > 2 * waste[1] > 2 * waste[2] > 0 or waste[0] > waste[1] > waste[2]


@pytest.mark.parametrize('bad', [dict(lengths=[]), dict(lengths=[3, 0]), dict(capacity=0), dict(buffer_size=0), dict(mode='stretch')])
def test_packing_refuses(bad):
    with pytest.raises(UserError): vd.pack(**dict(lengths=[3], capacity=4, buffer_size=1) | bad)


def test_packing_bars(toy):
    e = vd.packing_bars(['the cat sat ' * n for n in range(1, 40)], toy, capacity=64, buffer_size=1)
    seen = {e.shown.data}
    for change in (dict(buffer_size=32), dict(row=128), dict(mode='pad')):
        assert e.set(**change).error is None and len(e.shown.data) < 60_000
        assert e.shown.data not in seen, f'{change} changed nothing'
        seen.add(e.shown.data)
    with pytest.raises(UserError, match='tokenizer'): vd.packing_bars(['a text'])


def test_mask_is_the_tokenizers(toy):
    for i in range(5):
        talk = Arithmetic(5)[i]
        ids, mask = toy.render_conversation(talk)
        tokens = vd.masked_tokens(talk, toy)
        assert [(t.id, int(t.learned)) for t in tokens] == list(zip(ids, mask))
        assert [t.text for t in tokens if t.special][:2] == ['<|bos|>', '<|user_start|>']
        everything = vd.masked_tokens(talk, toy, 'all')
        assert not everything[0].learned and all(t.learned for t in everything[1:])
    with pytest.raises(UserError, match='loss_on'): vd.masked_tokens(talk, toy, 'user')


def test_a_typed_special_token_is_text(toy):
    tokens = vd.masked_tokens({'messages': [{'role': 'user', 'content': '<|bos|>'}, {'role': 'assistant', 'content': 'no'}]}, toy)
    assert sum(t.text == '<|bos|>' and t.special for t in tokens) == 1


def test_conversation_mask(toy):
    e = vd.conversation_mask([Arithmetic(3)[i] for i in range(3)], toy)
    share = lambda: int(re.search(r'(\d+) of (\d+) tokens', e.shown.data)[1])
    before = share()
    e.set(loss_on='all')
    assert share() > before
    e.set(conversation=2, token_ids=True)
    assert e.error is None


def test_spoken_parts():
    parts = [dict(type='python', text=' 6*7'), dict(type='python_output', text='42'), dict(type='text', text='So 42.')]
    assert vd.spoken(parts) == [('calculator: 6*7 = 42', True), ('So 42.', False)] and vd.spoken([]) == []
    assert '<script>' not in vd.conversation_html([('<script>', [dict(type='text', text='<script>')])], '<script>')


def test_chat_cell_answers_and_closes(toy, tmp_path):
    pytest.importorskip('gradio')
    import torch
    from nanochat.checkpoint_manager import empty_model
    from nanochat.scaling import gpt_config
    run = vd.LessonRun(empty_model(gpt_config(1, toy.get_vocab_size(), 128), torch.device('cpu')).eval(), toy, 'untrained', 0, True, None, tmp_path)
    cell = vd.chat_cell(run, ['What is 1 + 1?'])
    try:
        assert urllib.request.urlopen(cell.url, timeout=30).status == 200
        assert 'What is 1 + 1?' in cell._repr_html_(), 'without a live notebook the conversation stands in'
    finally: cell.close()
    cell.close()
    with pytest.raises((urllib.error.URLError, ConnectionError)): urllib.request.urlopen(cell.url, timeout=5)


def test_viz_gathers_all_names():
    import importlib
    from nanochat import viz, viz_base
    for module in (viz_base, vd): assert set(module.__all__) <= set(viz.__all__)
    for name in viz.__all__: assert hasattr(viz, name)
