"""The ground of the course's figures: sizes, errors that are never swallowed, fallbacks without a kernel, the small model."""
import base64, os, subprocess, sys, threading, time

import pytest
import torch

from nanochat import viz_base as vb
from nanochat.common import UserError

WIDGET = 'application/vnd.jupyter.widget-view+json'


def lines(n=3, wide=6):
    fig, ax = vb.figure(wide, 2)
    ax.plot(range(n), [i ** 2 for i in range(n)], label='squares'); ax.set_title('Squares'); ax.legend()
    return fig


def test_png_is_small_and_transparent():
    from PIL import Image
    import io
    data = vb.png(lines(200))
    image = Image.open(io.BytesIO(data)).convert('RGBA')
    assert len(data) < 60_000 and image.getpixel((2, 2))[3] == 0
    assert image.width == 900


def test_style_leaves_settings_alone():
    import matplotlib
    before = dict(matplotlib.rcParams)
    vb.picture(lines())
    assert dict(matplotlib.rcParams) == before


def test_titles_stand_left_whoever_made_them():
    fig = lines()
    vb.settle(fig); vb.settle(fig)
    assert fig.axes[0].get_title(loc='left') == 'Squares' and fig.axes[0].get_title(loc='center') == ''


def test_no_text_is_black():
    """On a dark page it could not be read."""
    fig = lines()
    ax = fig.axes[0]
    ax.text(0, 0, 'plain'); ax.text(1, 1, 'chosen', color='white'); ax.text(1, 1, 'an array', color=[.2, .4, .6])
    vb.settle(fig)
    assert [t.get_color() for t in ax.texts] == [vb.INK, 'white', [.2, .4, .6]]
    assert [t.get_color() for t in ax.get_legend().get_texts()] == [vb.INK]
    ax.legend(labelcolor=vb.INK)
    assert vb.png(fig)


def test_pyplot_figures_are_closed():
    plt = pytest.importorskip('matplotlib.pyplot')
    plt.switch_backend('agg')
    fig, ax = plt.subplots()
    vb.png(fig)
    assert fig.number not in plt.get_fignums()


@pytest.mark.parametrize('given, kind, value', [
    ((1, 9), 'IntSlider', 5), ((0., 1.), 'FloatSlider', .5), ((1, 100, 10), 'IntSlider', 51), ([1, 2, 4], 'SelectionSlider', 1),
    (['a', 'b'], 'Dropdown', 'a'), (False, 'Checkbox', False), ('text', 'Text', 'text'), (7, 'IntText', 7), (.5, 'FloatText', .5)])
def test_short_forms_of_controls(given, kind, value):
    control = vb.as_control('a_name', given)
    assert (type(control).__name__, control.value, control.description) == (kind, value, 'a name')


def test_unknown_control():
    with pytest.raises(TypeError, match='no control for'): vb.as_control('x', object())


def test_explorer_follows_its_controls():
    calls = []
    e = vb.Explorer(lambda n, name: calls.append((n, name)) or lines(n), n=(2, 8), name='x')
    first = e.shown.data
    e.controls['n'].value = 8
    e.set(name='y')
    assert calls == [(5, 'x'), (8, 'x'), (8, 'y')] and e.drawn == 3 and e.shown.data != first
    assert e.view.children[0].value == e.shown.data
    e.set(name='y')
    assert e.drawn == 3, 'a control that did not change must not redraw'


def test_explorer_carries_a_picture_for_readers_without_a_kernel():
    data, meta = vb.Explorer(lambda n: lines(n), n=(2, 8))._repr_mimebundle_()
    assert WIDGET in data and base64.b64decode(data['image/png']).startswith(b'\x89PNG') and meta['image/png']['width'] > 100
    data, _ = vb.Explorer(lambda t: f'<b>{t}</b>', t='hello')._repr_mimebundle_()
    assert data['text/html'] == '<b>hello</b>' and "t='hello'" in data['text/plain']


def test_errors_are_shown_and_kept(monkeypatch):
    monkeypatch.delenv('NANOCHAT_STRICT_WIDGETS', raising=False)
    e = vb.Explorer(lambda n: f'{1 / n}', n=[1, 0, '<script>'][:2])
    e.set(n=0)
    assert isinstance(e.error, ZeroDivisionError) and 'ZeroDivisionError' in e.shown.data and 'failed' in repr(e)
    e.set(n=1)
    assert e.error is None
    assert '&lt;script&gt;' in vb.error_html(ValueError('<script>'))


def test_errors_are_raised_when_strict(monkeypatch):
    monkeypatch.setenv('NANOCHAT_STRICT_WIDGETS', '1')
    with pytest.raises(ZeroDivisionError): vb.Explorer(lambda n: f'{1 / n}', n=[0, 1])
    e = vb.Explorer(lambda n: f'{1 / n}', n=[1, 0])
    with pytest.raises(ZeroDivisionError): e.set(n=0)
    assert isinstance(e.error, ZeroDivisionError)


def test_wrong_drawing_is_an_error(monkeypatch):
    monkeypatch.delenv('NANOCHAT_STRICT_WIDGETS', raising=False)
    assert isinstance(vb.Explorer(lambda: 42).error, TypeError)


def test_without_ipywidgets(monkeypatch):
    monkeypatch.setitem(sys.modules, 'ipywidgets', None)
    with pytest.raises(UserError, match='course'): vb.Explorer(lambda: '')


def test_question():
    q = vb.question('How many?', '3')
    assert '<details>' in q._repr_html_() and repr(q) == 'Question. How many? Answer 3'


HOLD = '''
import sys, time
from pathlib import Path
from nanochat.viz_base import alone
with alone(Path(sys.argv[1])):
    print('mine', flush=True)
    time.sleep(60)
'''


def test_lock_is_free_when_its_holder_is_killed(tmp_path):
    child = subprocess.Popen([sys.executable, '-c', HOLD, str(tmp_path/'lock')], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == 'mine\n'
    got = threading.Event()
    def wait():
        with vb.alone(tmp_path/'lock', every=.01): got.set()
    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    assert not got.wait(.3)
    child.kill(); child.wait()
    assert got.wait(30)
    thread.join()


@pytest.fixture
def tiny(monkeypatch, base_directory):
    """A lesson model of a few steps on a few documents."""
    from nanochat.dataset import prepare_corpus
    corpus = prepare_corpus('stdlib', max_bytes=600_000)
    monkeypatch.setattr(vb, 'small_run', lambda: vb.SmallRun(depth=1, vocab_size=400, sequence_len=64, rows=2, base_steps=3, sft_steps=2, tokenizer_chars=200_000))
    return corpus


def test_lesson_run_is_trained_once_and_found_again(tiny, monkeypatch):
    a = vb.lesson_run('sft')
    assert a.made_here and a.step == 2 and a.model.config.n_layer == 1 and not a.model.training
    monkeypatch.setattr(vb, '_train_into', lambda *a, **k: pytest.fail('trained again'))
    b = vb.lesson_run('rl')   # no RL model: the fine-tuned one stands in
    assert all(torch.equal(x, y) for x, y in zip(a.model.parameters(), b.model.parameters()))
    assert (vb.lesson_run('base').folder/'metrics.jsonl').exists()


def test_two_at_once_train_it_once(tiny, monkeypatch):
    count, train = [], vb.train_base
    monkeypatch.setattr(vb, 'train_base', lambda run: (count.append(1), time.sleep(.1), train(run)))
    found = []
    threads = [threading.Thread(target=lambda: found.append(vb.lesson_run('base'))) for _ in range(2)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(found) == 2 and count == [1]


def test_interrupted_training_leaves_nothing(tiny, monkeypatch):
    monkeypatch.setattr(vb, 'fit', lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt): vb.lesson_run('base')
    assert [p.name for p in vb.lessons_dir().iterdir()] == ['base.lock']


def test_quickstart_run_comes_first(tiny):
    from nanochat.checkpoint_manager import run_dir
    from nanochat.common import atomic_dir
    with atomic_dir(run_dir('base', 'd1')) as run: vb.train_base(run)
    found = vb.lesson_run('base')
    assert not found.made_here and found.name == 'base d1' and not vb.lessons_dir().exists()


def test_unknown_stage():
    with pytest.raises(UserError, match='base, sft or rl'): vb.lesson_run('final')


def test_fast_recipe_is_kept_apart(monkeypatch):
    monkeypatch.setenv('NANOCHAT_LESSON_FAST', '1')
    fast, folder = vb.small_run(), vb.lessons_dir()
    monkeypatch.delenv('NANOCHAT_LESSON_FAST')
    assert fast.sft_steps < vb.small_run().sft_steps and folder != vb.lessons_dir()
