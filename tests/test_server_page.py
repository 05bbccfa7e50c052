"""The command as people use it: page and API on one port, in a real browser, and an end that an open page does not hold up."""
import shutil, signal, time

import pytest

pytest.importorskip('gradio', reason='gradio is not installed')

from server_process import PARTS, QUESTION, SAID, Process, ask, check_error, get, known_by_heart, post, save


@pytest.fixture(scope='module')
def web(tmp_path_factory):
    (tok, model), base = known_by_heart(), tmp_path_factory.mktemp('served')
    save(base, model, tok)
    with Process(base, page=True) as p: yield p


@pytest.fixture
def page(web):
    sync_api = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
    chromium = next((p for p in map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome')) if p), None)
    if not chromium: pytest.skip('no Chromium on this machine')
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=['--no-sandbox'])
        yield browser.new_page()
        browser.close()


def test_page_and_api_share_a_port(web):
    assert f'the chat is at {web.url}' in web.hello
    status, text, headers = web.get('/')
    assert status == 200 and headers['content-type'].startswith('text/html') and 'sft · d1 · step 7' in str(web.get('/config')[1])
    assert web.post('/v1/chat/completions', ask())[1]['choices'][0]['message']['content'] == SAID
    for path, expected in (('/nothing', 404), ('/v1/nothing', 404), ('/v1/chat/completions', 405), ('/gradio_api/nothing', 404), ('/gradio_api/upload', 404), ('/gradio_api/file=/etc/passwd', 404)): check_error(*web.get(path)[:2], None if 'passwd' in path else expected)
    check_error(*post(web.url + '/gradio_api/queue/join', b'[' * 10_000)[:2])
    check_error(*post(web.url + '/gradio_api/queue/join', b' ' * (2**20 + 1))[:2], 413)
    check_error(*get(web.url + '/', Host='evil.example')[:2], 421)
    for path in ('run/anything', 'call/answer', 'api/x'): check_error(*post(f'{web.url}/gradio_api/{path}', {'data': []})[:2], 404)
    error = check_error(*post(web.url + '/gradio_api/cancel', {'data': []})[:2], 422)
    assert error['message'].startswith('body.session_hash: Field required; ') and '{' not in error['message']
    assert 'Traceback' not in web.errors(), web.errors()


def test_in_a_browser_until_the_end(web, page):
    """A question typed into the page is answered by the same workers that serve the API; nothing is asked of the outside; SIGTERM ends the process although the page is open."""
    requests, errors = [], []
    page.on('request', lambda r: requests.append(r.url))
    page.on('pageerror', lambda e: errors.append(str(e)))
    page.goto(web.url)
    page.wait_for_selector('#box .submit-button')
    page.fill('#box textarea', QUESTION)
    before = web.worker()['submitted']
    page.press('#box textarea', 'Enter')
    page.locator('[data-testid="bot"]', has_text=PARTS[-1]['text'].strip()).last.wait_for()
    assert web.worker()['submitted'] == before + 1 and not errors and {r.split('/')[2] for r in requests if r.startswith('http')} == {web.url.split('/')[2]}
    start = time.monotonic()
    web.signal(signal.SIGTERM)
    assert web.process.wait(15) == 0 and time.monotonic() - start < 10 and 'Traceback' not in web.errors(), web.errors()
