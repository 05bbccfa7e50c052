"""The chat page: what it shows, whose Stop it is, conversations that stay in the browser; and the page itself in a real Chromium, asking nothing of the outside."""
import contextlib, functools, json, os, re, shutil, subprocess, sys, threading, time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from nanochat.chat import Sampling, with_question
from nanochat.common import UserError
from nanochat.demo import EXAMPLES, MOST_CHARACTERS, MOST_MESSAGES, MOST_SEED, Frame, Touch, Turn, Turns, before_question, bubbles, converse, plain_question, recalled, sampling_of, typed

sys.path.insert(0, str(Path(__file__).parent))
from chat_actor import Parrot, make_tokenizer
from server_process import wait_for


@pytest.fixture(scope='module')
def tok(): return make_tokenizer()


def said(log, **what): return [e for e in map(json.loads, log.read_text().splitlines()) if all(e.get(k) == v for k, v in what.items())]


# Without a browser.

def test_stop_and_close_end_the_engine(tok, tmp_path):
    log = tmp_path/'log'
    for at in (1, 2, 7):
        flag = threading.Event()
        frames = converse(Parrot(tok, log, 0), flag, [], 'fox', pause=0)
        for _ in range(at): next(frames)
        flag.set()
        *_, last = frames
        assert said(log, event='end')[-1]['said'] == at + 1 and last.status.endswith('stopped')   # the token on its way was the last
        assert [m['role'] for m in last.messages] == ['user', 'assistant']
    stream = converse(Parrot(tok, log, 0), threading.Event(), [], 'fox', pause=0)
    next(stream), next(stream), stream.close()
    assert said(log, event='end')[-1]['said'] == 2


def test_frames_are_few_and_the_last_is_whole(tok):
    frames = list(converse(Parrot(tok, delay=.001, repeat=30), threading.Event(), [], 'quick brown fox', sampling=Sampling(max_tokens=300), pause=.05))
    assert 3 <= len(frames) < 40 and frames[-1].messages[-1]['content'][0]['text'].count('🦜') == 30 or 'cut off' in frames[-1].status
    whole = list(converse(Parrot(tok, delay=0), threading.Event(), [], 'fox', sampling=Sampling(max_tokens=20), pause=0))[-1]
    assert 'cut off' in whole.status and whole.status.startswith('20 tokens')
    full = list(converse(Parrot(tok, delay=0, limit=128), threading.Event(), [], 'fox', pause=0))[-1]
    assert full.status.endswith('context 128/128 · the context is full')


def test_trouble_becomes_a_sentence_and_the_question_comes_back(tok, capsys):
    class Broken(Parrot):
        def generate(self, *a, **kw):
            yield self.tokenizer.encode('a')[:1], [1]
            raise RuntimeError('CUDA out of memory')
    before = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}]
    for engine, text, words in ((Broken(tok), 'fox', 'went wrong'), (Parrot(tok), 'fox ' * 1500, 'shorten'), (Parrot(tok), 'crowded', 'waiting already'), (Parrot(tok), 'x' * (MOST_CHARACTERS + 1), '8,001 characters')):
        *_, last = converse(engine, threading.Event(), before, text)
        assert last.messages == before and words in last.status and last.box == text
    assert 'CUDA out of memory' in capsys.readouterr().err
    *_, last = converse(Parrot(tok, delay=0), threading.Event(), before, 'x' * MOST_CHARACTERS)
    assert 'shorten' in last.status      # the most characters are taken; then the context decides


def test_old_turns_leave_with_a_note(tok):
    talk = []
    for n in range(4): talk += [{'role': 'user', 'content': f'question {n} ' + 'z' * 40}, {'role': 'assistant', 'content': 'z' * 40}]
    *_, last = converse(Parrot(tok, delay=0, limit=300), threading.Event(), talk, 'brief')
    assert 'earlier turns no longer fit into the 300 tokens' in last.note and len(last.messages) == 10
    *_, last = converse(Parrot(tok, delay=0), threading.Event(), talk, 'brief')
    assert last.note == ''


def test_form_values():
    assert sampling_of(None, None, None, None, None) == Sampling() and sampling_of(1, 3.0, 7.0, 9.0, .5) == Sampling(1.0, 3, 7, 9, .5)
    assert [sampling_of(1, 3, seed).seed for seed in (10**20, -10**20, MOST_SEED, -5)] == [MOST_SEED, -MOST_SEED, MOST_SEED, -5]


EVIL = '<img src=http://e/x.png>![x](http://e/y.png)</div><!--&lt;'

def test_bubbles_carry_no_markup():
    out = bubbles([{'role': 'system', 'content': 's'}, {'role': 'user', 'content': EVIL}, {'role': 'assistant', 'content': [
        {'type': 'python', 'text': EVIL}, {'type': 'python_output', 'text': EVIL}, {'type': 'text', 'text': EVIL}, {'type': 'python', 'text': '1+1'}, {'type': 'python_output', 'text': '2'}, {'type': 'python', 'text': '3'}]}])
    assert all('<' not in b['content'] for b in out[1:]) and len(out) == 5
    assert [b['metadata']['title'] for b in out if 'metadata' in b] == ['calculator', 'calculator: 2', 'calculator']
    assert [b['metadata']['status'] for b in out if 'metadata' in b] == ['done', 'done', 'pending']


@pytest.mark.parametrize('text', [EVIL, 'a < b & c', 'a<b', '<<i>', '&amp;', '&#60;i>', '</script>', '<?php', 'plain', 'x <3 y', '<ſ>', '<!DOCTYPE'])
def test_a_question_shows_as_typed(text):
    """An HTML parser finds only text in it, the very text that was typed."""
    from html.parser import HTMLParser
    found = []
    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs): raise AssertionError(tag)
        handle_endtag = handle_comment = handle_decl = handle_pi = unknown_decl = lambda self, what: (_ for _ in ()).throw(AssertionError(what))
        def handle_data(self, data): found.append(data)
    reader = Reader()
    reader.feed(plain_question(text))
    reader.close()
    assert typed(''.join(found)) == typed(plain_question(text)) == text


def test_editing_finds_its_question():
    parts = [{'type': 'text', 'text': 'a'}, {'type': 'python', 'text': '1'}, {'type': 'python_output', 'text': '1'}, {'type': 'text', 'text': 'b'}]
    talk = [{'role': 'system', 'content': 's'}]
    for n in range(3): talk += [{'role': 'user', 'content': f'q{n}'}, {'role': 'assistant', 'content': parts}]
    shown = bubbles(talk)
    for n in range(3): assert before_question(talk, [b['content'] for b in shown].index(f'q{n}')) == talk[:1 + 2 * n]
    assert before_question(talk, 99) == talk and before_question([], 0) == []


def test_what_a_browser_sends_is_checked():
    pair = [{'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': [{'type': 'text', 'text': 'a'}]}]
    assert recalled(pair) == pair and recalled([{'role': 'system', 'content': 's'}, *pair])[1:] == pair
    for odd in (None, 1, 'x', {}, [1], pair[:1], pair[::-1], [*pair, *pair[::-1]], [{'role': 'tool', 'content': 'x'}, pair[1]], [pair[0], {'role': 'assistant', 'content': [{'type': 'image', 'text': 'x'}]}],
                [pair[0], {'role': 'assistant', 'content': [{'type': 'text', 'text': 1}]}], [{'role': 'user', 'content': None}, pair[1]], [{'role': 'user', 'content': 'x' * 10**6}, pair[1]]):
        assert recalled(odd) == []
    assert len(recalled(pair * MOST_MESSAGES)) == MOST_MESSAGES
    large = [{'role': 'user', 'content': 'x' * MOST_CHARACTERS}, pair[1]]
    assert 2 < len(recalled([*pair, *large * 30])) < 60 and recalled([*large * 30, *pair])[-2:] == pair


def test_turns_are_per_session():
    turns, (first, other, second) = Turns(), [Turn(Frame([]), stage='asked') for _ in range(3)]
    turns.start('a', first), turns.start('b', other), turns.start('a', second)   # a new answer ends the old one of the same session
    assert first.stopped.is_set() and not second.stopped.is_set() and not other.stopped.is_set() and len(turns) == 2
    assert turns.take('a') is second and turns.take('a') is None and turns.running('a')    # one answer each
    assert not turns.show('a', first, Frame([])) and turns.show('a', second, Frame([]), 'over') and not turns.running('a') and turns.take('a') is None
    turns.stop('b')
    assert other.stopped.is_set() and not turns.running('b') and turns.take('b') is other   # who was stopped while waiting is told so
    turns.leave('b')
    assert len(turns) == 0 and turns.get('b') is None


def test_turns_are_not_kept_for_ever():
    turns, made = Turns(most=3), [Turn(Frame([]), stage='asked') for _ in range(5)]
    for n, turn in enumerate(made[:4]): turns.start(f's{n}', turn)
    turns.start('s1', made[4])
    assert [n for n in range(4) if turns.get(f's{n}')] == [1, 2, 3] and [t.stopped.is_set() for t in made] == [True, True, False, False, False]


@pytest.fixture
def touch(tok, tmp_path):
    gr = pytest.importorskip('gradio', reason='gradio is not installed')
    return Touch(gr, Parrot(tok, tmp_path/'log', 0, repeat=2), places=2)


FORM = (None, .3, 50, 42, 256, 1.)     # system prompt and settings
EVENT = SimpleNamespace(value='  \u200b ', index=0)


def same(outputs, touch): return list(outputs[:-1]) == list(touch.nothing[:-1])


def settled(touch, painted): return touch.settle('s', None, painted)


def test_an_answer_that_was_replaced_says_nothing_more(touch):
    """Undo, New chat, a retry: what an old answer still wants to say must not overwrite the page. Its last word leaves everything as it is: Gradio repeats it."""
    touch.ask('s', None, 'fox', [], *FORM)
    old = touch.answer('s', None)
    next(old)
    touch.new('s', None)
    words = list(old)
    assert len(words) == 1 and same(words[0], touch) and words[0] != touch.nothing   # but it asks for the page as it should be
    touch.ask('s', None, 'fox', [], *FORM)
    old = touch.answer('s', None)
    next(old)
    touch.begin('s', [], 'another', *FORM)
    assert all(same(word, touch) for word in old) and touch.turns.running('s')
    *_, last = touch.answer('s', None)
    assert last[0][0]['content'] == 'another' and not touch.turns.running('s')


def test_every_click_ends_in_the_page_as_it_should_be(touch):
    """What `settle` shows at each moment: nothing where the newest turn painted last, its page where another did."""
    assert settled(touch, 0) == touch.nothing                       # nothing was done yet
    asked = touch.ask('s', None, 'fox', [], *FORM)
    assert settled(touch, asked[6]) == touch.nothing
    assert settled(touch, 0)[:5] == asked[:5] and settled(touch, 0)[6] == touch.gr.skip()     # it asks for no other
    answer = touch.answer('s', None)
    frame = next(answer)
    assert settled(touch, 0) == touch.nothing and frame[6] == touch.gr.skip()       # an answer paints itself
    *_, last = answer
    assert settled(touch, asked[6]) == settled(touch, last[6]) == touch.nothing     # an edit that has begun goes on
    assert settled(touch, 0)[1:5] == last[1:5] and last[0][-1]['role'] == 'assistant'
    undone = touch.undo('s', None, [])
    assert settled(touch, undone[6]) == touch.nothing
    for old in (asked, last): assert settled(touch, old[6])[:5] == undone[:5]
    assert undone[2]['value'] == 'fox' and undone[0] == []
    counts = [asked[6], last[6], undone[6], touch.new('s', None)[6]]
    assert counts == sorted(set(counts))                            # each differs from the one before


def test_what_is_undone_is_what_the_page_shows(touch):
    """The browser's copy lags behind: it knows nothing of a question that is being read, or of a click a moment ago."""
    before = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}]
    asked = touch.ask('s', None, 'fox', before, *FORM)
    assert asked[0] == before and asked[1][-1]['content'] == 'fox'
    again = touch.retry('s', None, before, *FORM)
    assert again[1][-1]['content'] == 'fox' and again[0] == before
    undone = touch.undo('s', None, before)
    assert undone[0] == before and undone[2]['value'] == 'fox'
    assert touch.undo('s', None, before)[0] == [] and touch.undo('s', None, before)[0] == []


def test_nothing_is_asked_with_nothing(touch):
    """An empty box, and a question edited to nothing: no page, no conversation and no running answer is lost."""
    before = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}]
    assert all(touch.ask('s', None, text, before, *FORM) == touch.nothing for text in ('', '  ', None))
    assert list(touch.answer('s', None)) == [touch.nothing]         # what Gradio starts then; without a yield it would empty the page
    kept, chat, _, status, *_ = touch.edit('s', EVENT, before, *FORM)
    assert kept == before and chat == bubbles(before) and 'changes nothing' in status and list(touch.answer('s', None)) == [touch.nothing]
    touch.ask('s', None, 'fox', before, *FORM)
    answer = touch.answer('s', None)
    frame = next(answer)
    again = touch.edit('s', EVENT, before, *FORM)
    assert again[1] == frame[1] and touch.turns.running('s')
    *_, last = answer
    assert settled(touch, again[6])[:5] == last[:5]                 # the answer may have ended before that was painted
    assert last[0][:2] == before and len(last[0]) == 4


def test_a_huge_seed(touch, tmp_path):
    """No number leaves the page that Gradio cannot send."""
    before, huge = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}], (None, .3, 50, 10**20, 256, 1.)
    assert touch.ask('s', None, 'fox', before, *huge)[5] == MOST_SEED
    list(touch.answer('s', None))
    assert said(tmp_path/'log', event='start')[-1]['seed'] == MOST_SEED
    assert touch.retry('s', None, before, *huge)[5] == 0 and touch.retry('s', None, before, *FORM)[5] == 43


def test_stop_before_the_first_token(touch, tmp_path):
    """While waiting for a free place Stop works too, and the question comes back."""
    touch.ask('s', None, 'fox', [], *FORM)
    touch.stop('s', None)
    *_, last = touch.answer('s', None)
    assert last[0] == [] and last[2]['value'] == 'fox' and 'before it began' in last[3] and not (tmp_path/'log').exists()
    assert touch.ask('s', None, 'again', [], *FORM)[1][-1]['content'] == 'again'     # and the page is free again


def test_a_question_stopped_while_it_waits_takes_nothing_with_it(touch):
    """The next question is asked before the stopped one has said its last: what was said before stays, on the page and in the browser."""
    touch.ask('s', None, 'fox', [], *FORM)
    *_, last = touch.answer('s', None)
    assert len(last[0]) == 2
    touch.ask('s', None, 'another', last[0], *FORM)
    touch.stop('s', None)
    kept, page, *_ = touch.ask('s', None, 'third', last[0], *FORM)
    assert kept == last[0] and [b['content'] for b in page if b['role'] == 'user'] == ['fox', 'third']
    *_, end = touch.answer('s', None)
    assert [m['content'] for m in end[0] if m['role'] == 'user'] == ['fox', 'third']


def test_a_visitor_who_left_is_not_answered(touch, tmp_path):
    touch.ask('s', None, 'fox', [], *FORM)
    touch.leave('s', None)
    assert list(touch.answer('s', None)) == [touch.nothing] and not (tmp_path/'log').exists()


def test_who_waits_is_told(touch):
    assert [touch.begin(name, [], 'q', *FORM)[3] for name in 'abc'] == ['reading …', 'reading …', 'waiting for a free place …']
    assert touch.ask('a', None, 'impatient', [], *FORM) == touch.nothing


@pytest.fixture(scope='module')
def tiny(tok):
    """A model that knows nothing, on an engine."""
    import torch
    from nanochat.engine import Engine
    from nanochat.gpt import GPT, GPTConfig
    model = GPT(GPTConfig(sequence_len=256, vocab_size=tok.get_vocab_size(), n_layer=1, n_head=2, n_kv_head=2, n_embd=32, window_pattern='L')).to_empty(device='cpu')
    torch.manual_seed(0)
    model.init_weights()
    return Engine(model.eval(), tok)


def ask(scheduler, text, out, flag=None): out[text] = list(converse(scheduler, flag or threading.Event(), [], text, sampling=Sampling(temperature=1, max_tokens=60), pause=0))


def test_many_visitors_of_one_scheduler(tiny):
    """More visitors than slots: each gets the answer that the engine alone would give, and nothing is left behind."""
    from nanochat.engine import Scheduler
    alone, together = {}, {}
    for n in range(6): ask(tiny, f'question {n}', alone)
    with Scheduler(tiny, slots=2) as scheduler:
        threads = [threading.Thread(target=ask, args=(scheduler, f'question {n}', together)) for n in range(6)]
        for t in threads: t.start()
        for t in threads: t.join()
        assert scheduler.unfinished() == 0
        flag, seen = threading.Event(), []
        for frame in converse(scheduler, flag, [], 'question 0', sampling=Sampling(temperature=1), pause=0):
            seen.append(frame)
            if len(seen) == 3: flag.set()
        wait_for(lambda: scheduler.unfinished() == 0)     # Stop frees the slot
        assert seen[-1].status.startswith('4 tokens') and len(seen) == 4
    for text in alone: assert together[text][-1].messages == alone[text][-1].messages and together[text][-1].status.split()[0] == alone[text][-1].status.split()[0]


def test_the_reason_of_a_cut(tiny):
    """The longest answer, or a server that closes, which is not the reader's setting."""
    from nanochat.engine import Scheduler
    ask = lambda most: converse(scheduler, threading.Event(), [], 'hello', sampling=Sampling(temperature=1., top_k=0, max_tokens=most), pause=0)
    with Scheduler(tiny) as scheduler:
        assert [f.status for f in ask(3)][-1].endswith('the longest answer is set to that')
        frames = ask(200)
        for _, frame in zip(range(3), frames): pass
        scheduler.close(drain=False)
        *_, last = frames
    assert last.status.endswith('cut off: the server is closing'), last


def test_a_full_queue_puts_the_question_back(tiny):
    from nanochat.engine import Scheduler
    scheduler = Scheduler(tiny, slots=1, max_waiting=0)
    first = converse(scheduler, threading.Event(), [], 'first', sampling=Sampling(temperature=1), pause=0)
    next(first)
    out = {}
    ask(scheduler, 'second', out)
    assert 'try again' in out['second'][-1].status and out['second'][-1].box == 'second'
    first.close()
    wait_for(lambda: scheduler.unfinished() == 0)
    ask(scheduler, 'third', out)
    assert out['third'][-1].box is None
    scheduler.close()
    ask(scheduler, 'late', out)
    assert 'closed' in out['late'][-1].status and out['late'][-1].box == 'late'


def test_closing_the_page_closes_its_scheduler(tiny):
    """A page that made its scheduler ends it; one that was given a scheduler leaves it alone."""
    pytest.importorskip('gradio', reason='gradio is not installed')
    from nanochat.demo import build_demo, shared
    from nanochat.engine import Scheduler
    threads = lambda: [t for t in threading.enumerate() if t.name == 'nanochat-scheduler']
    before = len(threads())
    scheduler, places, ours = shared(tiny)
    assert ours and places == scheduler.slots and shared(scheduler) == (scheduler, places, False) and len(threads()) == before   # nothing runs before the first question
    demo = build_demo(tiny)
    demo.close(verbose=False)
    with Scheduler(tiny, slots=3) as given:
        demo = build_demo(given)
        demo.close(verbose=False)
        out = {}
        ask(given, 'still there?', out)
        assert out['still there?'][-1].box is None and len(threads()) == before + 1
    assert len(threads()) == before


def test_import_leaves_gradio_alone():
    code = "import sys, nanochat.demo, nanochat.chat, nanochat.scripts.chat_cli; sys.exit('gradio' in sys.modules)"
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0


def test_without_gradio_one_sentence(monkeypatch):
    from nanochat.demo import import_gradio
    monkeypatch.setitem(sys.modules, 'gradio', None)
    with pytest.raises(UserError, match='pip install'): import_gradio()


# A real server in a process of its own, with a slow parrot instead of a model, and a real browser.

@pytest.fixture(scope='module')
def server(tmp_path_factory):
    pytest.importorskip('gradio', reason='gradio is not installed')
    log = tmp_path_factory.mktemp('parrot')/'log'
    log.touch()
    process = subprocess.Popen([sys.executable, str(Path(__file__).parent/'chat_actor.py'), str(log), '0.005', '400', '600'], stdout=subprocess.PIPE, text=True,
                               env={**os.environ, 'GRADIO_ANALYTICS_ENABLED': 'False', 'OMP_NUM_THREADS': '1'})
    url = process.stdout.readline().strip()
    assert url.startswith('http://127.0.0.1'), 'the server did not start'
    yield SimpleNamespace(url=url, log=log, host=url.split('/')[2])
    process.terminate()
    process.wait(10)


@pytest.fixture(scope='module')
def chromium():
    sync_api = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
    path = next((p for p in map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome')) if p), None)
    if not path: pytest.skip('no Chromium on this machine')
    with sync_api.sync_playwright() as p:
        b = p.chromium.launch(executable_path=path, args=['--no-sandbox'])
        yield b
        b.close()


class Visitor:
    """Someone with a browser of their own. Every request, page error and console error is noted, and must be none of the outside's."""
    def __init__(self, chromium, server, **context):
        self.server, self.troubles = server, []
        self.context = chromium.new_context(**dict(viewport=dict(width=900, height=760)) | context)
        self.context.on('request', lambda r: r.url.startswith(('data:', 'blob:')) or r.url.split('/')[2] == server.host or self.troubles.append(r.url))
        self.open()

    def open(self):
        self.page = self.context.new_page()
        self.page.set_default_timeout(30_000)
        self.page.on('pageerror', lambda e: self.trouble(str(e)))
        self.page.on('console', lambda m: m.type in ('error', 'warning') and self.trouble(m.text))
        self.page.goto(self.server.url)
        self.ready()

    def trouble(self, text):
        if not re.match('AbortError|Unexpected error Connection errored out', text): self.troubles.append(text)   # Gradio's own, when a page with a running answer goes

    def ready(self):
        self.page.wait_for_selector('#box .submit-button')
        self.page.wait_for_function('document.querySelector("#status")?.innerText.length > 0')
        self.page.evaluate('new MutationObserver(() => { window.ran ||= !!document.querySelector("#box .stop-button") }).observe(document.body, {subtree: true, childList: true})')

    def reload(self):
        self.page.reload()
        self.ready()

    def ask(self, text, wait=True):
        self.page.fill('#box textarea', text)
        self.begin(lambda: self.page.press('#box textarea', 'Enter'))
        if wait: self.done()

    def begin(self, act):
        """Do what starts an answer, and wait until it has started."""
        self.page.evaluate('window.ran = false')
        act()
        self.page.wait_for_function('window.ran')

    def done(self):
        """Until the answer has ended."""
        self.page.wait_for_selector('#box .submit-button')

    def told(self, words):
        """The status line, once it says `words`."""
        self.page.wait_for_function('w => document.querySelector("#status").innerText.includes(w)', arg=words)
        return self.status

    def shows(self, **wanted):
        """Wait until `questions`, `answers` or `box` are these: what an event changes is not all drawn at the same moment."""
        seen = lambda: {k: getattr(self, k) for k in wanted}
        try: wait_for(lambda: seen() == wanted)
        except AssertionError: assert seen() == wanted

    @contextlib.contextmanager
    def answered(self, count):
        """Do something and wait until Gradio has taken this many events of it."""
        seen = []
        note = lambda r: '/queue/join' in r.url and seen.append(r)
        self.page.on('response', note)
        yield
        wait_for(lambda: len(seen) >= count or self.page.wait_for_timeout(10))
        self.page.wait_for_timeout(100)
        self.page.remove_listener('response', note)

    def growing(self, text=''):
        self.page.wait_for_selector('#box .stop-button')
        self.page.locator('[data-testid="bot"]', has_text=text).last.wait_for()

    def texts(self, who): return self.page.evaluate('w => [...document.querySelectorAll(`[data-testid="${w}"]`)].map(e => e.innerText)', who)   # at one moment: what is drawn anew meanwhile does not vanish under us

    questions = property(lambda self: [typed(t) for t in self.texts('user')])
    answers = property(lambda self: [t.strip() for t in self.texts('bot')])
    status = property(lambda self: self.page.inner_text('#status'))
    box = property(lambda self: self.page.input_value('#box textarea'))

    def close(self):
        self.context.close()
        assert not self.troubles, self.troubles


@pytest.fixture
def visitor(chromium, server):
    """Makes visitors and sees them out."""
    there = []
    def enter(**context):
        there.append(Visitor(chromium, server, **context))
        return there[-1]
    yield enter
    for v in there: v.close()


def test_type_stream_stop(visitor, server):
    """The answer grows; Escape, and the button, end it within a token; markup stays text; the tool call unfolds by keyboard."""
    v = visitor(viewport=dict(width=390, height=800))
    v.page.wait_for_selector('#info:has-text("parrot · step 7")')
    v.page.wait_for_function('document.activeElement.tagName == "TEXTAREA"')
    v.page.keyboard.type('slowly tool <b>bold</b> <img src=http://outside.example/x.png>')
    v.page.keyboard.press('Shift+Enter')
    v.page.keyboard.type('two  lines')
    v.page.keyboard.press('Enter')
    v.growing('lines🦜')
    first = len(v.answers[-1])
    v.page.wait_for_function('n => [...document.querySelectorAll(\'[data-testid="bot"]\')].at(-1).innerText.length > n', arg=first)
    v.page.keyboard.press('Escape')
    status = v.told('stopped')
    v.done()
    end = wait_for(lambda: said(server.log, event='end'))[-1]
    assert status.startswith(f"{end['said']} tokens · ") and status.endswith(' · stopped') and ' tokens/s · context ' in status
    v.shows(questions=['slowly tool <b>bold</b> <img src=http://outside.example/x.png>\ntwo  lines'])
    assert '\ntwo  lines🦜' in v.answers[-1]
    assert v.page.locator('#chat .message b, #chat .message img').count() == 0
    assert v.page.evaluate('[document.documentElement.scrollWidth, document.documentElement.scrollHeight]') == [390, 800]
    v.page.focus('.thought-group [role="button"]')
    v.page.keyboard.press('Enter')
    v.page.wait_for_selector('text=/^12\\*7\\s*= 84$/')
    v.ask('slowly, stop by the button', wait=False)
    v.growing('slowly')
    v.page.click('#box .stop-button')
    v.done()
    assert wait_for(lambda: said(server.log, event='end', question='slowly, stop by the button'))[0]['said'] < 256


def test_retry_undo_edit(visitor, server):
    v = visitor()
    v.ask('brief one')
    v.ask('brief two')
    v.shows(questions=['brief one', 'brief two'], answers=['brief one🦜', 'brief two🦜'], box='')
    v.begin(lambda: v.page.click('button[aria-label="Retry"]'))
    v.done()
    assert [e['seed'] for e in said(server.log, event='start', question='brief two')] == [42, 43] and len(v.questions) == 2
    v.page.click('button[aria-label="Undo"]')
    v.shows(questions=['brief one'], box='brief two', answers=['brief one🦜'])
    v.ask('brief a<b & c')
    v.page.hover('[data-testid="user"] >> nth=1')
    v.page.click('button[aria-label="Edit"] >> nth=1')
    editor = v.page.locator('#chat textarea')
    wait_for(lambda: typed(editor.input_value()) == 'brief a<b & c')
    editor.fill('brief <i>edited</i>')
    v.begin(lambda: v.page.click('button[aria-label="Submit"]'))
    v.done()
    v.shows(questions=['brief one', 'brief <i>edited</i>'])
    assert 'a<b' not in said(server.log, event='start')[-1]['prompt']
    v.page.hover('[data-testid="user"] >> nth=0')
    v.page.click('button[aria-label="Edit"] >> nth=0')   # the earlier question: what came after it goes
    v.page.locator('#chat textarea').fill('brief anew')
    v.begin(lambda: v.page.click('button[aria-label="Submit"]'))
    v.done()
    v.shows(questions=['brief anew'], answers=['brief anew🦜'])
    v.page.click('#new')
    v.page.wait_for_selector('#chat .examples')
    v.shows(questions=[])
    wait_for(lambda: v.page.locator('#chat .example').count() == len(EXAMPLES))


def test_an_empty_box_changes_nothing(visitor, server):
    """Enter and Send with nothing to say: the conversation stays on the page, in the browser and for the next question."""
    v = visitor()
    v.ask('brief kept')
    for text, send in (('', lambda: v.page.press('#box textarea', 'Enter')), ('   ', lambda: v.page.press('#box textarea', 'Enter')), ('', lambda: v.page.click('#box .submit-button'))):
        v.page.fill('#box textarea', text)
        with v.answered(2): send()
        v.shows(questions=['brief kept'], answers=['brief kept🦜'], box=text)
        assert ' tokens · ' in v.status
    v.ask('brief next')
    v.shows(questions=['brief kept', 'brief next'])
    assert 'brief kept' in said(server.log, event='start', question='brief next')[0]['prompt']


def test_an_edit_to_nothing(visitor, server):
    v = visitor()
    for n in range(2): v.ask(f'brief blank {n}')
    v.page.hover('[data-testid="user"] >> nth=0')
    v.page.click('button[aria-label="Edit"] >> nth=0')
    v.page.locator('#chat textarea').fill('  ')
    v.page.click('button[aria-label="Submit"]')
    v.told('empty question changes nothing')
    v.shows(questions=['brief blank 0', 'brief blank 1'], answers=['brief blank 0🦜', 'brief blank 1🦜'])
    v.reload()
    v.shows(questions=['brief blank 0', 'brief blank 1'])


def test_a_seed_beyond_64_bits(visitor, server):
    v = visitor()
    field = v.page.get_by_role('spinbutton', name='Seed')
    v.page.click('#settings .toggle-button')
    field.fill('99999999999999999999')
    v.page.keyboard.press('Tab')
    v.page.click('#settings .toggle-button')
    v.ask('brief seed')
    wait_for(lambda: field.input_value() == str(MOST_SEED))
    v.begin(lambda: v.page.click('button[aria-label="Retry"]'))
    v.done()
    wait_for(lambda: field.input_value() == '0')
    assert [e['seed'] for e in said(server.log, event='start', question='brief seed')] == [MOST_SEED, 0]


def button(name): return lambda v: v.page.dispatch_event(f'button[aria-label="{name}"]', 'click')   # a click would wait for it to stand still

def new(v): v.page.click('#new')

CLICKS = {  # what is clicked while an answer grows, one after the other; then the questions, and the box
    'Undo, Undo': ([button('Undo'), button('Undo')], [], 'brief before'),
    'Retry, New chat': ([button('Retry'), new], [], ''),
}

@pytest.mark.parametrize('clicks', CLICKS)
def test_what_is_clicked_during_an_answer_stays(visitor, clicks):
    """Whatever the answer had under way: the page shows what was clicked last, with a Send that works."""
    v = visitor()
    acts, questions, box = CLICKS[clicks]
    v.ask('brief before')
    v.ask('slowly told', wait=False)
    v.growing('told')
    for act in acts: act(v)
    v.done()
    v.shows(questions=questions, box=box)
    v.page.wait_for_timeout(300)           # some more frames of a slow answer
    v.shows(questions=questions, box=box)
    v.done()
    v.ask('brief after')
    v.shows(questions=[*questions, 'brief after'])


def test_an_answer_painted_too_late(visitor):
    """All that an answer says reaches the page after New chat, since the browser learns late which event it belongs to. The page recovers."""
    v, held = visitor(), []
    answers = {d['id'] for d in v.page.evaluate('gradio_config.dependencies') if d['trigger_after'] is not None}
    def hold(route):
        if route.request.post_data_json['fn_index'] in answers and not held: held.append((route, route.fetch()))
        else: route.continue_()
    v.page.route('**/queue/join*', hold)
    v.page.fill('#box textarea', 'slowly delayed')
    v.page.press('#box textarea', 'Enter')
    wait_for(lambda: held or v.page.wait_for_timeout(10))
    wait_for(lambda: said(v.server.log, event='start', question='slowly delayed'))
    v.page.wait_for_timeout(200)           # some frames, which wait in the browser
    v.page.click('#new')
    v.page.wait_for_selector('#chat .examples')
    v.page.evaluate('new MutationObserver(() => { window.late ||= document.body.innerText.includes("delayed🦜") || document.querySelectorAll("[data-testid=bot]").length > 0 }).observe(document.body, {subtree: true, childList: true})')
    route, response = held[0]
    route.fulfill(response=response)
    v.page.wait_for_function('window.late')
    v.page.wait_for_selector('#chat .examples')
    v.done()
    v.shows(questions=[])


def test_clicks_are_heard_in_their_order(chromium, tok, tmp_path, monkeypatch):
    """A Retry that takes long to be read is not overtaken by the New chat that was clicked after it."""
    gr = pytest.importorskip('gradio', reason='gradio is not installed')
    from nanochat.demo import build_demo, look
    retry = Touch.retry
    def slow(*args):
        time.sleep(.4)
        return retry(*args)
    monkeypatch.setattr(Touch, 'retry', slow)
    demo = build_demo(Parrot(tok, tmp_path/'log', .005, 400, 600), info='parrot')
    _, url, _ = demo.launch(server_name='127.0.0.1', prevent_thread_lock=True, quiet=True, inline=False, share=False, ssr_mode=False, footer_links=[], **look())
    v = Visitor(chromium, SimpleNamespace(url=url, host=url.split('/')[2]))
    v.ask('brief first')
    with v.answered(2):
        v.page.click('button[aria-label="Retry"]')
        v.page.click('#new')
    v.page.wait_for_timeout(700)
    v.done()
    v.shows(questions=[])
    v.close()
    demo.close(verbose=False)


def test_settings_take_effect(visitor, server):
    v = visitor()
    v.page.click('#settings .toggle-button')
    v.page.get_by_label('System prompt').fill('Be a parrot.')
    for name, value in (('Temperature', '0.7'), ('Top-k', '7'), ('Top-p', '0.9'), ('Longest answer', '9')):
        v.page.get_by_label(f'number input for {name}').fill(value)
        v.page.keyboard.press('Tab')
    v.page.get_by_label('Seed').fill('11')
    v.page.keyboard.press('Tab')
    v.page.click('#settings .toggle-button')
    v.ask('settings matter')
    e = said(server.log, event='start')[-1]
    assert (e['temperature'], e['top_k'], e['top_p'], e['seed'], e['max_tokens']) == (.7, 7, .9, 11, 9) and 'Be a parrot.' in e['prompt'] and 'settings matter' in e['prompt']
    assert v.told('cut off').startswith('9 tokens')
    v.reload()
    v.page.locator('[data-testid="user"]').wait_for()
    wait_for(lambda: v.page.get_by_label('System prompt').input_value() == 'Be a parrot.')


def test_two_browsers_at_once(visitor, server):
    """Each hears only its own words, and one's Stop leaves the other's answer running."""
    one, two = visitor(), visitor()
    one.ask('slowly alpha', wait=False)
    two.ask('slowly omega', wait=False)
    one.growing('slow'), two.growing('slow')
    one.page.keyboard.press('Escape')
    one.done()
    two.growing('omega')
    length = len(two.answers[-1])
    two.page.wait_for_function('n => [...document.querySelectorAll(\'[data-testid="bot"]\')].at(-1).innerText.length > n', arg=length)
    assert wait_for(lambda: said(server.log, event='end', question='slowly alpha'))[0]['said'] < 256 and not said(server.log, event='end', question='slowly omega')
    assert 'omega' not in one.page.inner_text('body') and 'alpha' not in two.page.inner_text('body')
    one.ask('brief gamma')
    last = said(server.log, event='start', question='brief gamma')[0]['prompt']
    assert 'alpha' in last and 'omega' not in last     # what was said until Stop stays in the conversation
    two.page.keyboard.press('Escape')
    two.done()
    wait_for(lambda: one.answers[-1] == 'brief gamma🦜')
    assert 'gamma' not in two.page.inner_text('body')


def test_reload_and_leaving(visitor, server):
    """The conversation is this browser's: a reload shows it again, another browser never; a running answer ends with its page."""
    v = visitor()
    v.ask('brief memory')
    v.reload()
    v.page.locator('[data-testid="bot"]', has_text='brief memory').wait_for()
    v.ask('brief again')
    assert 'brief memory' in said(server.log, event='start', question='brief again')[0]['prompt']
    v.ask('slowly cut by a reload', wait=False)
    v.growing('slow')
    v.reload()
    v.page.locator('[data-testid="bot"]', has_text='brief again').wait_for()
    assert wait_for(lambda: said(server.log, event='end', question='slowly cut by a reload'))[0]['said'] < 256
    assert visitor().questions == []
    v.ask('slowly vanishing', wait=False)
    v.growing('slow')
    v.page.close()
    assert wait_for(lambda: said(server.log, event='end', question='slowly vanishing'))[0]['said'] < 256
    v.open()
    v.page.locator('[data-testid="bot"]', has_text='brief again').wait_for()
    v.page.click('#new')
    v.page.wait_for_selector('#chat .examples')
    v.reload()
    v.page.wait_for_selector('#chat .examples')
    v.shows(questions=[])


def test_the_reader_is_told(visitor, server):
    """Forgotten turns are noted; a message that cannot fit, or a full queue, is a sentence, and the question stays in the box."""
    v = visitor()
    for n in range(2): v.ask(f'brief {n} ' + 'z' * 120)
    assert not v.page.is_visible('#note')
    v.ask('brief 2 ' + 'z' * 120)
    v.page.wait_for_selector('#note:has-text("earlier turns no longer fit into the 600 tokens")')
    kept = v.questions
    for text, words in (('y' * 700, 'shorten'), ('crowded', 'waiting already; try again')):
        v.ask(text)
        v.told(words)
        v.page.wait_for_selector(f'#status [role="alert"]:has-text("{words}")')
        v.shows(box=text, questions=kept)
    v.page.click('#new')
    v.page.wait_for_selector('#chat .examples')
    wait_for(lambda: not v.page.is_visible('#note'))
    v.page.click('#chat .example >> nth=0')
    v.growing('possession')
    v.page.keyboard.press('Escape')
    v.done()
    v.shows(questions=[list(EXAMPLES)[0]])


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args): pass


def test_inside_another_page(chromium, server, tmp_path):
    """As in a notebook, in a browser that keeps its storage from foreign frames: the chat works and remembers, until a reload."""
    (tmp_path/'index.html').write_text(f'<link rel=icon href=data:,><iframe src="{server.url}" width=780 height=640></iframe>')
    notebook = ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(QuietHandler, directory=tmp_path))
    threading.Thread(target=notebook.serve_forever, daemon=True).start()
    outer = f'localhost:{notebook.server_port}'      # another site than 127.0.0.1
    context = chromium.new_context(viewport=dict(width=800, height=700))
    page, hosts = context.new_page(), set()
    page.set_default_timeout(30_000)
    context.on('request', lambda r: r.url.startswith(('data:', 'blob:')) or hosts.add(r.url.split('/')[2]))
    page.goto(f'http://{outer}/')
    frame = page.frame_locator('iframe')
    for n in range(2):
        frame.locator('#box textarea').fill(f'brief {n}')
        frame.locator('#box textarea').press('Enter')
        frame.locator('[data-testid="bot"]', has_text=f'brief {n}').wait_for()
        frame.locator('#box .submit-button').wait_for()
    assert 'brief 0' in said(server.log, event='start', question='brief 1')[-1]['prompt']
    frame.locator('#dark').click()
    frame.locator('#new').click()
    frame.locator('#chat .examples').wait_for()
    context.close()
    notebook.shutdown()
    notebook.server_close()
    assert hosts == {server.host, outer}


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_light_and_dark(visitor, scheme):
    """Follows the system, switches by hand and remembers that; text stands out from its ground."""
    v = visitor(color_scheme=scheme)
    dark = lambda: v.page.evaluate('document.body.classList.contains("dark")')
    light_of = lambda what, kind: sum(map(int, v.page.evaluate(f'getComputedStyle(document.querySelector("{what}")).{kind}').split('(')[1].split(')')[0].split(',')[:3]))
    stands_out = lambda: (light_of('gradio-app', 'backgroundColor') < 200) == dark() and abs(light_of('#chat h2', 'color') - light_of('gradio-app', 'backgroundColor')) > 400
    v.page.wait_for_selector('#chat h2')   # drawn after the status line on a slow machine
    wait_for(lambda: dark() == (scheme == 'dark'))
    for _ in range(2):
        wait_for(stands_out)               # colours may fade over
        v.page.click('#dark')
    v.page.click('#dark')
    v.reload()
    v.page.wait_for_selector('#chat h2')
    wait_for(lambda: dark() == (scheme == 'light'))


def test_everything_by_keyboard(visitor):
    """Tab reaches every control that the mouse has, and each says what it is."""
    v = visitor()
    v.ask('brief tool')
    for name in ('Edit', 'Retry', 'Undo'): v.page.locator(f'button[aria-label="{name}"]').first.wait_for(state='attached')
    v.page.wait_for_selector('.thought-group [role="button"]')
    seen, names = set(), []
    for _ in range(40):
        v.page.keyboard.press('Tab')
        names.append(v.page.evaluate('(e => e.getAttribute("aria-label") || e.innerText || e.tagName)(document.activeElement)'))
    assert {'Edit', 'Retry', 'Undo', 'New chat', 'Send', 'TEXTAREA'} <= set(names) and any('calculator' in n for n in names) and any('ettings' in n for n in names) and any('dark' in n for n in names), names
