"""The chat: from turns to tokens and back, Stop within a token, visitors kept apart, a page that asks nothing of the outside."""
import json, os, shutil, subprocess, sys, threading, time
from pathlib import Path

import pytest

from nanochat.common import UserError
from nanochat.chat import Answer, Sampling, prompt_ids, reply, with_answer, with_question, without_last
from nanochat.demo import Stops, bubbles, converse, sampling_of

sys.path.insert(0, str(Path(__file__).parent))
from chat_actor import Parrot, make_tokenizer

TEXTS = ['plain', 'naïve café', '你好，世界', 'مرحبا بالعالم', '🦜🦜🏳️‍🌈 done', 'def f(x):\n\treturn x', '']


@pytest.fixture(scope='module')
def tok(): return make_tokenizer()


def ids_of(tok, *pieces): return [i for p in pieces for i in ([tok.encode_special(p)] if p.startswith('<|') else tok.encode(p))]


@pytest.mark.parametrize('text', TEXTS)
def test_pieces_joined_are_the_text(tok, text):
    answer = Answer(tok)
    pieces = [answer.push(i).piece[1] for i in ids_of(tok, text, '<|assistant_end|>')]
    assert ''.join(pieces) == text and answer.done
    assert '\ufffd' not in ''.join(pieces)
    assert answer.parts == ([{'type': 'text', 'text': text}] if text else [])


@pytest.mark.parametrize('before', TEXTS)
def test_tool_calls_become_parts_and_render_back(tok, before):
    """What the model wrote, put back into the conversation, is the same ids."""
    ids = ids_of(tok, before, '<|python_start|>', "'你好'.count('好')", '<|python_end|>', '<|output_start|>', '1', '<|output_end|>', 'So 1.', '<|assistant_end|>')
    answer = Answer(tok)
    for i in ids: answer.push(i)
    assert [p['type'] for p in answer.parts] == ['text'] * bool(before) + ['python', 'python_output', 'text']
    talk = with_answer(with_question([], 'q'), answer)
    assert tok.render_conversation({'messages': talk})[0][-len(ids):] == ids
    more = with_question(talk, 'next')
    assert tok.render_for_completion({'messages': more})[:len(tok.render_conversation({'messages': talk})[0])] == tok.render_conversation({'messages': talk})[0]


def test_marks_in_any_order_never_fail(tok):
    """An untrained model may say anything; the parts hold what was said, and rendering them back works."""
    import random
    rng, marks = random.Random(0), [tok.encode_special(t) for t in tok.get_special_tokens() if t not in ('<|bos|>', '<|assistant_end|>')]
    for _ in range(200):
        answer = Answer(tok)
        for _ in range(40): answer.push(rng.choice(marks) if rng.random() < .3 else rng.randrange(256))
        talk = with_answer(with_question([], 'q'), answer.finish())
        tok.render_conversation({'messages': talk})
        bubbles(talk)
        assert not answer.done and answer.tokens == 40


def test_old_turns_go_first_and_the_system_message_stays(tok):
    talk = [{'role': 'system', 'content': 'SYSTEM'}]
    for n in range(20): talk += [{'role': 'user', 'content': f'question {n} '}, {'role': 'assistant', 'content': f'answer {n}'}]
    talk.append({'role': 'user', 'content': 'last'})
    whole = len(tok.render_for_completion({'messages': talk}))
    assert prompt_ids(tok, talk, whole + 64) == (tok.render_for_completion({'messages': talk}), 0)
    seen = set()
    for limit in [*range(100, whole + 64, 7), whole + 63, whole + 64]:
        ids, dropped = prompt_ids(tok, talk, limit)
        text = tok.decode(ids)
        assert len(ids) + min(64, limit//2) <= limit and dropped % 2 == 0 and 'SYSTEM' in text and 'last' in text
        assert text.count('question') == 20 - dropped//2
        seen.add(dropped)
    assert {0, 2} < seen
    with pytest.raises(UserError, match='shorten'): prompt_ids(tok, talk, 20)
    with pytest.raises(UserError, match='nothing to answer'): prompt_ids(tok, [], 20)


def test_reply_never_exceeds_the_context(tok):
    asked = {}
    class Spy(Parrot):
        def generate(self, tokens, max_tokens=None, **kw):
            asked.update(n=len(tokens), max_tokens=max_tokens, **kw)
            return super().generate(tokens, max_tokens, **kw)
    engine = Spy(tok, delay=0, repeat=1)
    engine.model.config.sequence_len = 100
    list(reply(engine, with_question([], 'fox'), Sampling(max_tokens=10_000, top_k=0, temperature=0)))
    assert asked['n'] + asked['max_tokens'] == 100 and asked['top_k'] is None and asked['temperature'] == 0


def test_stop_and_close_end_the_engine(tok, tmp_path):
    log = tmp_path/'log'
    for at in (1, 2, 7):
        flag = threading.Event()
        for n, (talk, status) in enumerate(converse(Parrot(tok, log, 0), flag, [], 'fox', '', Sampling()), 1):
            if n == at: flag.set()
        assert json.loads(log.read_text().splitlines()[-1])['said'] == at and status == f'stopped after {at} tokens'
        assert [m['role'] for m in talk] == ['user', 'assistant']
    stream = converse(Parrot(tok, log, 0), threading.Event(), [], 'fox', '', Sampling())
    next(stream), next(stream), stream.close()
    assert json.loads(log.read_text().splitlines()[-1])['said'] == 2


def test_trouble_becomes_a_sentence(tok, capsys):
    class Broken(Parrot):
        def generate(self, *a, **kw):
            yield self.tokenizer.encode('a')[:1], [1]
            raise RuntimeError('CUDA out of memory')
    before = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}]
    *_, (talk, status) = converse(Broken(tok), threading.Event(), before, 'fox', '', Sampling())
    assert talk == before and 'went wrong' in status and 'CUDA out of memory' in capsys.readouterr().err
    *_, (talk, status) = converse(Parrot(tok), threading.Event(), before, 'fox ' * 3000, '', Sampling())
    assert talk == before and 'shorten' in status


def test_conversation_functions():
    talk = with_question([], 'a', ' be kind ')
    assert talk[0] == {'role': 'system', 'content': 'be kind'}
    assert [m['content'] for m in with_question(talk + [{'role': 'assistant', 'content': 'x'}], 'b', 'be brief')] == ['be brief', 'a', 'x', 'b']
    assert without_last([]) == ([], '') and without_last(talk) == (talk[:1], 'a')
    assert sampling_of(None, None, None, None) == Sampling() and sampling_of(1, 3.0, 7.0, 9.0) == Sampling(1.0, 3, 7, 9)


def test_bubbles_carry_no_markup():
    evil = '<img src=http://e/x.png>![x](http://e/y.png)'
    out = bubbles([{'role': 'system', 'content': 's'}, {'role': 'user', 'content': evil}, {'role': 'assistant', 'content': [
        {'type': 'python', 'text': evil}, {'type': 'python_output', 'text': evil}, {'type': 'text', 'text': evil}, {'type': 'python', 'text': '1+1'}, {'type': 'python_output', 'text': '2'}, {'type': 'python', 'text': '3'}]}])
    assert all('<' not in b['content'] for b in out) and len(out) == 5
    assert [b['metadata']['title'] for b in out if 'metadata' in b] == ['calculator', 'calculator: 2', 'calculator']
    assert [b['metadata']['status'] for b in out if 'metadata' in b] == ['done', 'done', 'pending']


def test_stops_are_per_session():
    stops = Stops()
    first = stops.start('a')
    other, second = stops.start('b'), stops.start('a')   # a new answer ends the old one of the same session
    assert first.is_set() and not second.is_set() and not other.is_set()
    stops.stop('b')
    assert other.is_set() and not second.is_set()


def test_import_leaves_gradio_alone():
    code = "import sys, nanochat.demo, nanochat.scripts.chat_cli, nanochat.scripts.chat_web; sys.exit('gradio' in sys.modules)"
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0


def test_without_gradio_one_sentence(monkeypatch):
    from nanochat.demo import import_gradio
    monkeypatch.setitem(sys.modules, 'gradio', None)
    with pytest.raises(UserError, match='pip install'): import_gradio()


# A real server in a process of its own, with a slow parrot instead of a model.

@pytest.fixture(scope='module')
def server(tmp_path_factory):
    pytest.importorskip('gradio', reason='gradio is not installed')
    log = tmp_path_factory.mktemp('parrot')/'log'
    log.touch()
    process = subprocess.Popen([sys.executable, str(Path(__file__).parent/'chat_actor.py'), str(log), '0.02', '400'], stdout=subprocess.PIPE, text=True,
                               env={**os.environ, 'GRADIO_ANALYTICS_ENABLED': 'False', 'OMP_NUM_THREADS': '1'})
    url = process.stdout.readline().strip()
    assert url.startswith('http://127.0.0.1'), 'the server did not start'
    yield url, lambda: [json.loads(line) for line in log.read_text().splitlines()]
    process.terminate()
    process.wait(10)


def wait_for(condition, seconds=15):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(.02)
    return found


def text_of(result): return result[0][-1]['content'][0]['text'] if isinstance(result[0][-1]['content'], list) else result[0][-1]['content']


def test_server_streams_and_keeps_visitors_apart(server):
    """Two clients at once: each hears only its own words, and one's Stop leaves the other's answer running."""
    from gradio_client import Client
    url, log = server
    one, two = Client(url, verbose=False), Client(url, verbose=False)
    a = one.submit('alpha', '', .5, 0, 11, 300, 1, api_name='/chat')
    b = two.submit('omega', '', 0, 5, 12, 300, 1, api_name='/chat')
    wait_for(lambda: len(a.outputs()) > 3 and len(b.outputs()) > 3)
    one.predict(api_name='/stop')
    ended = wait_for(lambda: [e for e in log() if e['event'] == 'end' and e['question'] == 'alpha'])[0]
    seen = len(b.outputs())
    wait_for(lambda: len(b.outputs()) > seen + 3)          # the other goes on
    assert ended['said'] < 300 and not [e for e in log() if e['event'] == 'end' and e['question'] == 'omega']
    first, second = a.result(timeout=20), b.outputs()[-1]
    assert 'alpha' in text_of(first) and 'omega' not in text_of(first) and 'stopped' in first[2]
    assert 'omega' in text_of(second) and 'alpha' not in text_of(second)
    again = one.submit('gamma', '', .5, 0, 11, 5, 1, api_name='/chat')
    again.result(timeout=20)
    prompts = [e['prompt'] for e in log() if e['event'] == 'start']
    assert not any('alpha' in p and 'omega' in p for p in prompts)
    assert 'alpha' in prompts[-1] and 'gamma' in prompts[-1]   # a stopped answer stays in the conversation
    starts = {e['seed']: e for e in log() if e['event'] == 'start'}
    assert starts[12]['top_k'] == 5 and starts[12]['temperature'] == 0 and starts[11]['top_k'] is None
    two.predict(api_name='/stop')
    for c in (one, two): c.close()


@pytest.fixture(scope='module')
def browser():
    sync_api = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
    chromium = next((p for p in map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome')) if p), None)
    if not chromium: pytest.skip('no Chromium on this machine')
    with sync_api.sync_playwright() as p:
        b = p.chromium.launch(executable_path=chromium, args=['--no-sandbox'])
        yield b
        b.close()


def test_in_a_real_browser(server, browser):
    """Type, watch the answer grow, fold out the tool call, press Stop, undo, close the tab; nothing is asked of the outside."""
    url, log = server
    page, requests, errors = browser.new_page(viewport=dict(width=390, height=800)), [], []
    page.on('request', lambda r: requests.append(r.url))
    page.on('pageerror', lambda e: errors.append(str(e)))
    page.goto(url)
    page.fill('#box textarea', 'tool <b>bold</b> <img src=http://outside.example/x.png>')
    page.click('#send')
    bot = page.locator('[data-testid="bot"]').last
    bot.wait_for()
    first = bot.inner_text()
    page.wait_for_function('n => [...document.querySelectorAll(\'[data-testid="bot"]\')].at(-1).innerText.length > n', arg=len(first))   # it grows
    page.locator('[data-testid="bot"]', has_text='bold</b>').last.wait_for()
    assert 'parrot · step 7' in page.inner_text('#info') and 'calculator: 84' in page.inner_text('body')
    page.click('#stop')
    page.wait_for_selector('#send')
    said = wait_for(lambda: [e for e in log() if e['event'] == 'end' and 'tool' in e['question']])[0]['said']
    assert page.inner_text('#status') == f'stopped after {said} tokens'
    assert page.locator('[data-testid="bot"] b, [data-testid="bot"] img, [data-testid="user"] img').count() == 0
    page.click('text=calculator: 84')
    page.wait_for_selector('text=12*7')
    assert page.evaluate('document.documentElement.scrollWidth') <= 390
    page.locator('button[aria-label="Undo"], button[title="Undo"]').first.click()
    page.wait_for_function('document.querySelectorAll(\'[data-testid="user"]\').length == 0')
    assert 'bold' in page.input_value('#box textarea')
    page.fill('#box textarea', 'vanishing')
    page.press('#box textarea', 'Enter')
    wait_for(lambda: [e for e in log() if e['event'] == 'start' and 'vanishing' in e['prompt']])
    assert 'bold' not in [e for e in log() if e['event'] == 'start'][-1]['prompt']
    page.locator('[data-testid="bot"]').last.wait_for()
    page.close()
    wait_for(lambda: [e for e in log() if e['event'] == 'end' and e['question'] == 'vanishing'], seconds=5)   # 400 repetitions would take half a minute
    assert not errors and {r.split('/')[2] for r in requests if r.startswith('http')} == {url.split('/')[2]}
