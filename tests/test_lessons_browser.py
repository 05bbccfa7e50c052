"""The lessons in a real JupyterLab in Chromium: run, move a slider by hand, and see the picture change."""
import contextlib, json, os, re, shutil, socket, subprocess, sys, time, urllib.request
from pathlib import Path

import pytest
from warm_kernel import warm_kernels

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = next((p for n in ('chromium', 'chromium-browser', 'google-chrome') if (p := shutil.which(n))), None)
TOKEN, WAIT = 'lessons', 240_000  # milliseconds: two cores may be busy with other tests
SETTINGS = ['--allow-root', '--no-browser', '--ServerApp.port_retries=0', f'--IdentityProvider.token={TOKEN}', '--LabApp.expose_app_in_browser=True',
            '--LabApp.news_url=None', '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate', '--LabApp.extension_manager=readonly']


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def jupyter(folder, env):
    """A JupyterLab over `folder`; its address."""
    port, log = free_port(), open(folder/'jupyter.log', 'w')
    command = [sys.executable, '-m', 'jupyter', 'lab', *SETTINGS, f'--port={port}', '--ip=127.0.0.1', f'--ServerApp.root_dir={folder}']
    server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env, cwd=folder)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f'http://127.0.0.1:{port}/api/status?token={TOKEN}', timeout=5).close()
                break
            assert server.poll() is None, (folder/'jupyter.log').read_text()[-2000:]
            time.sleep(.2)
        yield f'http://127.0.0.1:{port}'
    finally:
        with contextlib.suppress(OSError): urllib.request.urlopen(urllib.request.Request(f'http://127.0.0.1:{port}/api/shutdown?token={TOKEN}', method='POST'), timeout=5).close()
        try: server.wait(15)
        except subprocess.TimeoutExpired: server.kill(); server.wait()
        log.close()


def shortened(path, needed):
    """The lesson's cells up to the one that shows the widget, and only the code: what a slider needs to be there."""
    import nbformat
    nb = nbformat.read(path, as_version=4)
    last = next(i for i, c in enumerate(nb.cells) if c.cell_type == 'code' and re.search(needed, c.source))
    nb.cells = nb.cells[:last + 1]
    for c in nb.cells:
        if c.cell_type == 'code': c.outputs = []
    return nb


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    """JupyterLab with the lessons, and a base directory with the small model."""
    pytest.importorskip('jupyterlab', reason='jupyterlab is not installed: pip install nanochat[course]')
    if not CHROMIUM: pytest.skip('no Chromium on this machine')
    pytest.importorskip('playwright')
    folder, base = tmp_path_factory.mktemp('lab'), Path(os.environ.get('NANOCHAT_LESSON_TEST_BASE') or tmp_path_factory.mktemp('lab-base'))
    env = os.environ | dict(NANOCHAT_BASE_DIR=str(base), NANOCHAT_LESSON_FAST='1', OMP_NUM_THREADS='1', HOME=str(tmp_path_factory.mktemp('home')),
                            JUPYTER_CONFIG_DIR=str(folder/'config'), JUPYTER_PATH=warm_kernels(), JUPYTER_PREFER_ENV_PATH='1', PYTHONPATH=str(ROOT))
    quiet = folder/'settings'/'@jupyterlab'/'apputils-extension'
    quiet.mkdir(parents=True)
    (quiet/'notification.jupyterlab-settings').write_text(json.dumps(dict(fetchNews='false', checkForUpdates=False)))
    with jupyter(folder, env | dict(JUPYTERLAB_SETTINGS_DIR=str(folder/'settings'))) as address: yield folder, address


@pytest.fixture(scope='module')
def browser(lab):
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        yield b
        b.close()


@pytest.fixture(scope='module')
def lab_page(lab, browser):
    """JupyterLab's page: loaded once, for it is large; notebooks are opened and closed in it, as a reader does."""
    page = browser.new_page(viewport=dict(width=1200, height=1100))
    page.goto(f'{lab[1]}/lab?token={TOKEN}&reset', timeout=WAIT)
    page.wait_for_function('() => window.jupyterapp && window.jupyterapp.restored.then(() => true)', timeout=WAIT)
    return page


@pytest.fixture
def page(lab_page):
    """The page without a notebook; those of the test are closed after it, with their kernels."""
    yield lab_page
    lab_page.evaluate(CLOSE)
    assert not lab_page.locator('.jp-NotebookPanel').count()


CLOSE = """async () => { for (const w of [...window.jupyterapp.shell.widgets('main')]) {
  if (w.context && w.context.sessionContext) await w.context.sessionContext.shutdown();
  w.dispose(); } }"""
OPEN = "async path => { await window.jupyterapp.commands.execute('docmanager:open', {path}); }"
IDLE = """name => { const app = window.jupyterapp, w = app && app.shell.currentWidget, c = w && w.context;
  return !!(c && c.path === name && c.isReady && c.sessionContext && c.sessionContext.session && c.sessionContext.session.kernel
            && c.sessionContext.session.kernel.status === 'idle'); }"""
DONE = """() => { const cells = window.jupyterapp.shell.currentWidget.content.widgets.filter(w => w.model.type === 'code' && w.model.sharedModel.source.trim());
  return cells.every(w => w.model.executionCount !== null); }"""
FAILED = """() => window.jupyterapp.shell.currentWidget.content.widgets.filter(w => w.model.type === 'code')
  .flatMap(w => w.model.outputs.toJSON()).filter(o => o.output_type === 'error').map(o => o.ename + ': ' + o.evalue)"""
BOTTOM = """() => { const nb = window.jupyterapp.shell.currentWidget.content; nb.activeCellIndex = nb.widgets.length - 1; return nb.scrollToItem(nb.widgets.length - 1, 'start'); }"""


def shown(page, name):
    """Open a notebook and wait for its kernel."""
    page.evaluate(OPEN, name)
    page.wait_for_function(IDLE, arg=name, timeout=WAIT)


def opened(lab, page, name, nb):
    """A notebook on the page that has been run from top to bottom."""
    import nbformat
    nbformat.write(nb, lab[0]/name)
    shown(page, name)
    page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")
    page.wait_for_function(DONE, timeout=WAIT)
    page.wait_for_function(IDLE, arg=name, timeout=WAIT)
    assert page.evaluate(FAILED) == []
    page.evaluate(BOTTOM)


def picture(page):
    """What stands in the last output that shows a widget's picture: the image's bytes or the HTML."""
    return page.evaluate("""async () => {
      const all = [...document.querySelectorAll('.jp-OutputArea-output .jupyter-widgets')].filter(e => e.matches('img, .widget-html-content, .widget-html'));
      const last = all[all.length - 1];
      if (!last) return null;
      if (last.tagName !== 'IMG') return last.innerHTML;
      const bytes = new Uint8Array(await (await fetch(last.src)).arrayBuffer());
      return bytes.length + ':' + bytes.reduce((a, b) => (a * 31 + b) % 4294967291, 7); }""")


LESSONS = {  # lesson: the cell that shows the widget
    '01_tokens': r'merges_slider\(',
    '03_attention': r'attention_explorer\(',
    '05_optimizers': r'singular_stepper\(',
    '09_inference': r'cache_filler\(',
}


@pytest.mark.slow
@pytest.mark.parametrize('name', LESSONS)
def test_slider_moves_the_picture(name, lab, page):
    """Focus the slider as a hand would, press keys, and the picture must become another one each time."""
    opened(lab, page, f'{name}.ipynb', shortened(ROOT/'lessons'/f'{name}.ipynb', LESSONS[name]))
    handle = page.locator('.jp-OutputArea-output .noUi-handle').last
    handle.wait_for(timeout=WAIT)
    handle.scroll_into_view_if_needed()
    page.wait_for_timeout(500)
    before = picture(page)
    assert before, 'no picture beside the slider'
    seen = [before]
    for key in ('ArrowRight', 'ArrowRight', 'ArrowLeft', 'Home', 'End'):
        value = handle.get_attribute('aria-valuetext')
        handle.press(key)
        page.wait_for_timeout(100)
        moved = handle.get_attribute('aria-valuetext') != value  # at an end it stays where it is
        deadline = time.time() + (20 if moved else .5)
        while (now := picture(page)) == seen[-1] and time.time() < deadline: page.wait_for_timeout(100)
        seen.append(now)
    if folder := os.environ.get('NANOCHAT_SCREENSHOTS'): page.screenshot(path=str(Path(folder)/f'{name}.png'))
    assert len(set(seen)) >= 3, f'{len(set(seen))} different pictures after five keys'
    assert page.evaluate(FAILED) == [] and not page.locator('text=Error displaying widget').count()


@pytest.mark.slow
def test_reader_without_a_kernel_sees_the_picture(lab, page):
    """A lesson that is opened and not run shows its stored figures, and no complaint about widgets."""
    shutil.copy(ROOT/'lessons'/'02_data.ipynb', lab[0]/'stored.ipynb')
    shown(page, 'stored.ipynb')
    page.evaluate("""() => { const nb = window.jupyterapp.shell.currentWidget.content;
        nb.activeCellIndex = nb.widgets.findIndex(w => w.model.sharedModel.source.includes('packing_bars(')); return nb.scrollToItem(nb.activeCellIndex); }""")
    page.locator('.jp-RenderedImage img').first.wait_for(timeout=WAIT)
    assert not page.locator('text=Error displaying widget').count()
    if where := os.environ.get('NANOCHAT_SCREENSHOTS'): page.screenshot(path=str(Path(where)/'stored.png'))


@pytest.mark.slow
def test_chat_inside_the_cell(lab, page):
    """Lesson 0: the Gradio page stands in the cell's output and answers."""
    pytest.importorskip('gradio')
    nb = shortened(ROOT/'lessons'/'00_start_here.ipynb', r'chat_cell\(')
    opened(lab, page, 'chat.ipynb', nb)
    frame = page.frame_locator('.jp-OutputArea-output iframe').last
    box = frame.locator('#box textarea')
    box.wait_for(timeout=WAIT)
    box.fill('What is 2 + 2?')
    box.press('Enter')
    frame.locator('#chat .bot').first.wait_for(timeout=WAIT)
    page.wait_for_timeout(1500)
    if where := os.environ.get('NANOCHAT_SCREENSHOTS'): page.screenshot(path=str(Path(where)/'chat.png'))
    assert 'What is 2 + 2?' in frame.locator('#chat').inner_text()
