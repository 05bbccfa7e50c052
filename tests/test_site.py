"""The site: every link leads somewhere, nothing comes from outside, notebooks are pages with figures and formulas, and it is searched in a real browser under a sub-path."""
import functools, importlib.util, json, shutil, subprocess, sys, threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = next((p for n in ('chromium', 'chromium-browser', 'google-chrome') if (p := shutil.which(n))), None)
spec = importlib.util.spec_from_file_location('site_builder', ROOT/'dev'/'site.py')
builder = importlib.util.module_from_spec(spec)
sys.modules['site_builder'] = builder
spec.loader.exec_module(builder)


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    """The whole site, built as runs/site.sh does."""
    pytest.importorskip('mkdocstrings', reason='mkdocs-material and mkdocstrings are not installed')
    out = tmp_path_factory.mktemp('web')/'under'/'a'/'path'
    done = subprocess.run([sys.executable, str(ROOT/'dev'/'site.py'), str(out)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and 'no broken link' in done.stdout, done.stdout + done.stderr
    return out


@pytest.mark.slow
def test_pages(site):
    """A page for each notebook and module; the formulas are MathML, the pictures files, the exported code under its module's name."""
    for p in builder.notebooks(): assert (site/p.with_suffix('.html')).stat().st_size > 5000, p
    for m in builder.modules(): assert (site/'api'/f'{m}.html').exists(), m
    optim = (site/'nbs'/'05_optim.html').read_text()
    assert '<math' in optim and 'nanochat/optim.py' in optim and '#| export' not in optim and 'loading="lazy"' in optim
    assert 'Newton-Schulz' in (site/'search'/'search_index.json').read_text()  # its links were checked when it was built


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason='no Chromium on this machine')
def test_in_a_browser_under_a_sub_path(site):
    playwright = pytest.importorskip('playwright.sync_api')
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    server = ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=site.parents[2]))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    home = f'http://127.0.0.1:{server.server_port}/under/a/path'
    try:
        with playwright.sync_playwright() as p:
            browser = p.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
            page, asked, errors = browser.new_page(viewport=dict(width=1200, height=900)), [], []
            page.on('request', lambda r: asked.append(r.url))
            page.on('pageerror', lambda e: errors.append(str(e)))
            page.goto(f'{home}/lessons/00_start_here.html')
            page.get_by_role('link', name='Next:').click()
            page.wait_for_url('**/01*.html')
            page.goto(f'{home}/nbs/05_optim.html')
            assert page.locator('math').first.bounding_box()['width'] > 5
            assert page.evaluate("[...document.images].every(i => i.loading == 'lazy' || i.naturalWidth > 0)")
            page.fill('input.md-search__input', 'Polar Express')
            page.wait_for_selector('.md-search-result__item', timeout=60_000)
            assert not errors and all(u.startswith((home, 'data:', 'blob:')) for u in asked), (errors, [u for u in asked if not u.startswith(home)])
            browser.close()
    finally: server.shutdown()


def test_the_checker_finds_what_is_broken(tmp_path):
    (tmp_path/'a').mkdir()
    (tmp_path/'index.html').write_text('<a href="a/x.html#here">1</a><a href="gone.html">2</a><a href="a/x.html#nowhere">3</a><a href="/abs.html">4</a><script src="https://cdn.example/x.js"></script>')
    (tmp_path/'a'/'x.html').write_text('<h1 id="here"></h1><a href="../index.html">back</a><img src="none.png"><a href="https://example.org">out</a>')
    said = builder.broken_links(tmp_path)
    assert [s for s in said if 'gone.html' in s] and [s for s in said if '#nowhere' in s] and [s for s in said if 'sub-path' in s] and [s for s in said if 'none.png' in s] and [s for s in said if 'cdn.example' in s]
    assert not [s for s in said if 'example.org' in s or '#here' in s or '../index.html' in s]
    done = subprocess.run([sys.executable, str(ROOT/'dev'/'site.py'), '--check', str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode and done.stderr.splitlines() == said and 'no broken link' not in done.stdout


def test_notebook_to_page(tmp_path):
    """Formulas outside code only; widgets by their pictures; details rendered; hidden cells gone; terminal colours gone."""
    cell = lambda kind, source, **more: dict(cell_type=kind, source=source, id='x', metadata={}, **more)
    png = 'iVBORw0KGgo='
    outputs = [dict(output_type='display_data', data={'application/vnd.jupyter.widget-view+json': {}, 'image/png': png, 'text/plain': 'a slider'}),
               dict(output_type='stream', name='stdout', text='\x1b[31mred\x1b[0m\n10%\r100%\n')]
    nb = dict(cells=[cell('markdown', '# T\n\n$x_1^2$ costs $5 and `$HOME` is $10.\n\n<details><summary>Answer</summary>\n\n*yes*\n</details>'), cell('code', '#| default_exp toy\n', outputs=[]),
                     cell('code', '#| hide\nimport secret', outputs=[]), cell('code', '#| export\ndef f(): return "$y$"', outputs=outputs)], metadata={}, nbformat=4, nbformat_minor=5)
    (tmp_path/'t.ipynb').write_text(json.dumps(nb))
    builder.notebook_page(tmp_path/'t.ipynb', tmp_path/'out')
    text = (tmp_path/'out'/'t.md').read_text()
    assert text.count('<math') == 1 and '`$HOME`' in text and '$5 and' in text and 'return "$y$"' in text and 'title="nanochat/toy.py"' in text
    assert 'secret' not in text and 'default_exp' not in text and '<details markdown="1">' in text and 'red\n100%' in text and '\x1b' not in text
    assert '![a slider](t_0.png)' in text and (tmp_path/'out'/'t_0.png').read_bytes().startswith(b'\x89PNG')


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path/'thesis.txt').write_text('years of work')
    done = subprocess.run([sys.executable, str(ROOT/'dev'/'site.py'), str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode and 'name another folder' in done.stderr and (tmp_path/'thesis.txt').read_text() == 'years of work'
