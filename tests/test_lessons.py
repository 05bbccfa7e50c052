"""The course's lessons: each runs from top to bottom, hides no error in a widget, and holds what a lesson promises."""
import json, re, threading, time
from pathlib import Path

import pytest
from warm_kernel import warm_kernels

ROOT = Path(__file__).resolve().parents[1]
LESSONS = sorted((ROOT/'lessons').glob('[0-9]*.ipynb'))
MAIN = [p for p in LESSONS if re.match(r'\d\d_', p.name)]
MACHINE_PATH = re.compile(r"(?<![\w.~*])/(?:root|tmp|work|home/\w+|Users/\w+|var/folders)(?=[/'\"\s\\]|$)")
by_name = dict(ids=lambda p: p.stem)


def cells(path): return json.loads(path.read_text(encoding='utf8'))['cells']
def source(cell): return ''.join(cell['source'])
def markdown(path): return '\n\n'.join(source(c) for c in cells(path) if c['cell_type'] == 'markdown')


def test_all_lessons_are_there():
    numbers = [int(p.name[:2]) for p in MAIN]
    assert numbers == list(range(14)), f'lessons present: {numbers}'


@pytest.mark.parametrize('path', LESSONS, **by_name)
def test_promises(path):
    """A title, what it is for, minutes; at least four questions that unfold; the GPU box; three things to try; where to go next."""
    text = markdown(path)
    number = int(path.stem[:2])
    assert re.match(rf'# Lesson {number}b?: \S', source(cells(path)[0])), f'begin with # Lesson {number}: Title'
    opening = text[:1500]
    assert re.search(r'you (can|will be able to)|able to', opening), 'say what the reader will be able to do'
    assert re.search(r'\d+\s*(to \d+ )?minutes', opening), 'say how many minutes it takes'
    assert len(re.findall(r'<details>', text)) >= 4 and text.count('<details>') == text.count('</details>'), 'at least four questions with answers'
    assert re.search(r'on a gpu', text, re.I), 'say what changes on a GPU'
    assert (m := re.search(r'^#+ .*try next.*$', text, re.I | re.M)), 'end with what to try next'
    assert len(re.findall(r'^\s*(?:\d+\.|[-*]) ', text[m.end():], re.M)) >= 3, 'three things to try'


@pytest.mark.parametrize('path', LESSONS, **by_name)
def test_prose(path):
    """Paragraphs that can be read, and no number of the text that a cell should have computed is left behind as a placeholder."""
    for c in cells(path):
        if c['cell_type'] != 'markdown': continue
        assert not re.search(r'\bTODO\b|\bFIXME\b|\bXXX\b(?!X)', source(c)), f'cell {c["id"]} is unfinished'
        for paragraph in re.split(r'\n\s*\n', source(c)):
            if re.match(r'\s*([|<>*#\d-]|```)', paragraph): continue
            assert len(paragraph.split()) <= 130, f'cell {c["id"]} has a paragraph of {len(paragraph.split())} words: {paragraph[:60]!r}'


@pytest.mark.parametrize('path', LESSONS, **by_name)
def test_code_fits_the_page(path):
    """No line of code that must be scrolled sideways in a window half a screen wide."""
    for c in cells(path):
        if c['cell_type'] == 'code': assert max(map(len, source(c).split('\n'))) <= 95, f'cell {c["id"]} has a line of more than 95 characters'


@pytest.mark.parametrize('path', LESSONS, **by_name)
def test_links(path):
    """Every relative link leads to a file of this repository; papers are named by a well-formed arXiv number."""
    for link in re.findall(r'\]\(([^)\s]+)\)', markdown(path)):
        if link.startswith(('http://', 'https://')):
            if 'arxiv.org' in link: assert re.fullmatch(r'https://arxiv\.org/(abs|pdf)/\d{4}\.\d{4,5}(v\d+)?', link), link
            continue
        target = link.split('#')[0]
        if target: assert (path.parent/target).resolve().exists(), f'{link} leads nowhere'


def test_map_of_the_lessons():
    """The folder's README leads to every lesson."""
    text = (ROOT/'lessons'/'README.md').read_text(encoding='utf8')
    assert {p.name for p in LESSONS} <= set(re.findall(r'\]\(([^)]+)\)', text))
    for link in re.findall(r'\]\(([^)#]+)\)', text): assert (ROOT/'lessons'/link).exists(), link


@pytest.mark.parametrize('path', LESSONS, **by_name)
def test_stored_outputs(path):
    """Outputs are there, small, free of errors, of widgets that need a kernel, and of this machine's paths."""
    nb = json.loads(path.read_text(encoding='utf8'))
    assert (nb['nbformat'], nb['nbformat_minor']) == (4, 5) and 'widgets' not in nb['metadata']
    code = [c for c in nb['cells'] if c['cell_type'] == 'code']
    assert any(c['outputs'] for c in code), 'run it and commit the outputs'
    assert path.stat().st_size < 700_000, f'{path.stat().st_size / 1e3:.0f} kB in all'
    for c in code:
        assert '#| export' not in source(c) and not re.search(r'^\s*[%!]', source(c), re.M)
        for o in c['outputs']:
            assert o['output_type'] != 'error' and len(json.dumps(o)) < 110_000, f'cell {c["id"]}: {len(json.dumps(o)) / 1e3:.0f} kB'
            assert 'application/vnd.jupyter.widget-view+json' not in o.get('data', {}), f'cell {c["id"]} stores a widget; use dev/nb.py run'
            assert o.get('name') != 'stderr' or 'Error' not in ''.join(o['text']), ''.join(o['text'])
        found = MACHINE_PATH.search(json.dumps(c['outputs'], ensure_ascii=False) + source(c))
        assert not found, f'cell {c["id"]} names {found[0]}'


@pytest.mark.parametrize('path', MAIN, **by_name)
def test_a_picture_in_every_lesson(path):
    """A lesson without a figure is a text."""
    shown = [k for c in cells(path) if c['cell_type'] == 'code' for o in c['outputs'] for k in o.get('data', {})]
    assert sum(k in ('image/png', 'image/svg+xml', 'text/html') for k in shown) >= 2


# Running. One base directory for all lessons of a worker: the corpus is prepared and the small model trained once.

@pytest.fixture
def kernels(monkeypatch):
    """Kernels come from a process that has imported everything."""
    for name in ('ipykernel', 'ipywidgets', 'nbclient', 'nbformat'): pytest.importorskip(name)
    monkeypatch.setenv('JUPYTER_PATH', warm_kernels())
    monkeypatch.delenv('JPY_SESSION_NAME', raising=False)


def test_warm_kernels_are_kernels(kernels):
    """They report errors, can be interrupted and go on, say how they ended, and do not outlive their shim."""
    from jupyter_client import KernelManager
    manager = KernelManager(kernel_name='python3')
    manager.start_kernel()
    client = manager.client()
    client.start_channels()
    client.wait_for_ready(60)
    reply = lambda code: client.execute_interactive(code, timeout=60, output_hook=heard.append)['content']
    heard = []
    assert reply('import os, sys, time; loaded = "nanochat.viz" in sys.modules; 1 / 0')['ename'] == 'ZeroDivisionError'
    threading.Timer(.5, manager.interrupt_kernel).start()
    assert reply('time.sleep(60)')['ename'] == 'KeyboardInterrupt'
    assert reply('print(loaded, os.getpid())')['status'] == 'ok'
    loaded, pid = next(m['content']['text'] for m in heard if m['msg_type'] == 'stream').split()
    assert loaded == 'True'
    client.execute('os._exit(7)')
    shim, deadline = manager.provisioner.process, time.time() + 60
    while manager.is_alive() and time.time() < deadline: time.sleep(.02)
    assert shim.returncode == 7 and not Path(f'/proc/{pid}').exists()
    client.stop_channels()
    manager.shutdown_kernel(now=True)


# What a lesson trains for a minute in a reader's hands is trained for a moment here; nothing else of its cells is changed.
SHORTER = {
    '05_optimizers': [('STEPS, ROWS, LENGTH = 90, 6, 128', 'STEPS, ROWS, LENGTH = 40, 6, 64')],
    '06_training': [('num_iterations=240', 'num_iterations=40'), ('for step in range(60):', 'for step in range(20):'), ('def trained(steps=120,', 'def trained(steps=12,'), ('trained(60, ', 'trained(8, '), ('look_every=60', 'look_every=10')],
    '08_evaluation': [('if used > 2_000_000: break', 'if used > 500_000: break')],
}


def shorter(nb, name):
    """The notebook with less training; every text that is replaced must be there, once."""
    for old, new in SHORTER.get(name, ()):
        found = [c for c in nb.cells if c.cell_type == 'code' and old in c.source]
        assert len(found) == 1 and found[0].source.count(old) == 1, f'{name}: not there once: {old}'
        found[0].source = found[0].source.replace(old, new)
    return nb


@pytest.fixture(scope='session')
def lesson_base(tmp_path_factory):
    return tmp_path_factory.mktemp('lessons-base')


def swallowed(nb):
    """Errors that a callback wrote into an output widget, where no runner looks."""
    state = nb.metadata.get('widgets', {}).get('application/vnd.jupyter.widget-state+json', {}).get('state', {})
    return [o for w in state.values() for o in w.get('state', {}).get('outputs', ()) or () if o.get('output_type') == 'error']


def explorers_that_failed(nb):
    """Explorers say in their plain text when drawing has failed."""
    texts = [''.join(o.get('data', {}).get('text/plain', '')) for c in nb.cells if c.cell_type == 'code' for o in c.outputs]
    return [t for t in texts if t.startswith('Explorer(') and 'failed:' in t]


@pytest.mark.parametrize('path', LESSONS, **by_name)
def test_runs(path, lesson_base, kernels, monkeypatch):
    """From top to bottom, offline, with the small model of few steps; a widget's error is an error."""
    import nbformat
    from nbclient import NotebookClient
    for k, v in dict(NANOCHAT_BASE_DIR=str(lesson_base), NANOCHAT_LESSON_FAST='1', NANOCHAT_STRICT_WIDGETS='1', OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1').items(): monkeypatch.setenv(k, v)
    nb = shorter(nbformat.read(path, as_version=4), path.stem)
    NotebookClient(nb, timeout=300, kernel_name='python3', resources={'metadata': {'path': str(path.parent)}}).execute()
    assert swallowed(nb) == [] and explorers_that_failed(nb) == []
    outputs = [o for c in nb.cells if c.cell_type == 'code' for o in c.outputs]
    assert all(o.output_type != 'error' for o in outputs)
    noise = [o.text for o in outputs if o.get('name') == 'stderr' and re.search(r'Traceback|Error\b', o.text)]
    assert not noise, noise[0][-1500:]


def test_the_scanner_itself():
    """Both kinds of hidden error are found where they are."""
    import nbformat
    from nbformat.v4 import new_code_cell, new_notebook, new_output
    bad = {'state': {'outputs': [{'output_type': 'error', 'ename': 'ValueError'}]}}
    nb = new_notebook(cells=[new_code_cell('x', outputs=[new_output('execute_result', data={'text/plain': 'Explorer(n=0) failed: ZeroDivisionError()'})])])
    nb.metadata['widgets'] = {'application/vnd.jupyter.widget-state+json': {'state': {'a': bad, 'b': {'state': {'value': 3}}}}}
    assert len(swallowed(nb)) == 1 and len(explorers_that_failed(nb)) == 1
    assert MACHINE_PATH.search('in /home/ann/x') and not MACHINE_PATH.search('https://a.b/home/x')


def test_scanner_finds_what_interact_swallows(kernels):
    """The reason for the scanner: this notebook fails, and the runner reports success."""
    from nbclient import NotebookClient
    from nbformat.v4 import new_code_cell, new_notebook
    nb = new_notebook(cells=[new_code_cell('import ipywidgets\nslider = ipywidgets.IntSlider(1, min=0, max=3)\n@ipywidgets.interact(n=slider)\ndef f(n): return 1 / n\nslider.value = 0')])
    NotebookClient(nb, timeout=120, kernel_name='python3').execute()
    assert len(swallowed(nb)) == 1
