"""The server under load: 64 clients on a real process, readers who dawdle, clients who leave, and signals in mid-stream."""
import asyncio, json, signal, socket, threading, time
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip('fastapi', reason="the serving extra is not installed: pip install 'nanochat[serve]'")
openai = pytest.importorskip('openai', reason='the openai client is not installed')
httpx = pytest.importorskip('httpx', reason='httpx is not installed')
psutil = pytest.importorskip('psutil', reason='psutil is not installed')

from nanochat import engine, server
from nanochat.engine import Engine, Scheduler
from nanochat.server import Pool, Running, Served, Service, build_app
from server_process import Process, Wire, check_error, endless_model, events, get, post, save, text_of, tokenizer, wait_for

SLOTS, WAITING = 8, 24


@pytest.fixture(scope='module')
def tok(): return tokenizer()


@pytest.fixture(scope='module')
def base(tok, tmp_path_factory):
    """A base directory with a model that never ends an answer by itself."""
    path = tmp_path_factory.mktemp('served')
    save(path, endless_model(tok), tok)
    return path


@pytest.fixture(scope='module')
def web(base):
    with Process(base, '--slots', str(SLOTS), '--max-waiting', str(WAITING), '--pace', '0', '--drain-seconds', '30') as p:
        yield p
        assert p.close() == 0 and 'Traceback' not in p.errors(), p.errors()


def chat(i, **kw): return {'messages': [{'role': 'user', 'content': f'client {i} says ' + 'hello ' * (i % 7)}], 'max_tokens': 40 + i % 5, 'seed': i, 'temperature': 1, 'top_k': 20} | kw
def client(web, retries=0): return openai.OpenAI(base_url=web.url + '/v1', api_key='x', max_retries=retries, timeout=60, http_client=httpx.Client(verify=False))   # verify: reading all authorities takes longer than an answer
def idle(web): return wait_for(lambda: (w := web.worker())['active'] == w['waiting'] == 0 and web.get('/stats')[1]['open_answers'] == 0 and w)


def answer(web, i):
    """One client's answer over the official client, every second one streaming: its text, or the status it was refused with."""
    with client(web) as c:
        extra = chat(i)
        extra.pop('messages'), extra.pop('max_tokens')
        try:
            got = c.chat.completions.create(model='nanochat', messages=chat(i)['messages'], max_tokens=chat(i)['max_tokens'], stream=bool(i % 2), extra_body=extra)
            return ''.join(k.choices[0].delta.content or '' for k in got) if i % 2 else got.choices[0].message.content
        except openai.RateLimitError as e:
            assert int(e.response.headers['retry-after']) >= 1
            return 429


def test_64_clients(web):
    """All at once on 8 slots and 24 places to wait: everyone is answered or told to come back, and every answer is the one that its client gets alone."""
    start = threading.Barrier(64)
    def together(i):
        start.wait()
        return answer(web, i)
    with ThreadPoolExecutor(64) as crowd: answers = list(crowd.map(together, range(64)))
    idle(web)
    assert all(isinstance(a, str) and a or a == 429 for a in answers)
    served = [i for i, a in enumerate(answers) if a != 429]
    assert len(served) >= SLOTS + WAITING
    alone = {i: answer(web, i) for i in served}
    assert {i: answers[i] for i in served} == alone and len(set(alone.values())) == len(served)


def test_patient_clients_are_all_answered(web):
    """With the client library's own retries nobody goes away empty-handed."""
    def patient(i):
        with client(web, 20) as c: return c.chat.completions.create(model='nanochat', messages=chat(i)['messages'], max_tokens=20).choices[0].finish_reason
    with ThreadPoolExecutor(40) as crowd: assert set(crowd.map(patient, range(40))) == {'length'}


def figures(web):
    p = psutil.Process(web.process.pid)
    return dict(memory=p.memory_info().rss, threads=p.num_threads(), files=p.num_fds(), sockets=len(p.net_connections()), **{k: web.worker()[k] for k in ('active', 'waiting')})


def burst(web, n=48):
    """Clients of every sort: who read to the end, who leave in the middle, who leave at once, who send nonsense."""
    def visit(i):
        with Wire(web.port) as w:
            w.post('/v1/chat/completions', chat(i, stream=True, max_tokens=2000 if i % 4 else 20) if i % 6 else {'messages': 7})
            if i % 4 == 0: w.read_all()
            elif i % 4 == 1: w.read_until(b'data: ', b'error')
    with ThreadPoolExecutor(16) as crowd: list(crowd.map(visit, range(n)))
    idle(web)


def test_nothing_leaks(web):
    """Slots, threads, files, sockets and memory, before and after bursts of 48 clients, most of whom leave early."""
    burst(web)
    burst(web)
    time.sleep(.3)
    before = figures(web)
    for _ in range(4): burst(web)
    samples = []  # a connection that is just being closed is no leak: one calm moment must show everything given back
    def calm():
        samples.append(figures(web))
        return all(samples[-1][k] <= before[k] for k in ('files', 'sockets')) and samples[-1]['active'] == samples[-1]['waiting'] == 0
    wait_for(calm)
    after = samples[-1]
    assert after['threads'] <= before['threads'] + 12     # pools fill up as they are needed; a leak would be a thread per client
    assert after['memory'] - before['memory'] < 30e6, f'{(after["memory"] - before["memory"]) / 1e6:.1f} MB more after {4 * 48} clients'
    print(before, after)


def test_slow_readers_slow_nobody(web):
    """Two clients take every slot for four answers each, a megabyte each client, and do not read a byte. Their answers are written all the same, their slots are free again, and others are served."""
    longest = lambda i, **kw: Wire(web.port, **kw).post('/v1/chat/completions', chat(i, stream=True, max_tokens=1500, n=SLOTS // 2))
    for w in [longest(i) for i in range(2)]:     # the same load with readers who read: what memory it takes
        w.read_all()
        w.close()
    idle(web)
    memory = psutil.Process(web.process.pid).memory_info().rss
    slow = [longest(i, receive_buffer=2048) for i in range(2)]
    wait_for(lambda: web.get('/stats')[1]['open_answers'] == 2)
    assert web.post('/v1/chat/completions', chat(99))[0] == 200
    wait_for(lambda: web.worker()['active'] == web.worker()['waiting'] == 0, 60)     # written, though nobody has read
    assert web.get('/stats')[1]['open_answers'] == 2
    assert psutil.Process(web.process.pid).memory_info().rss - memory < 50e6
    first = slow[0].read_all()
    assert first.endswith(b'data: [DONE]\n\n\r\n0\r\n\r\n') and first.count(b'"length"') == SLOTS // 2
    for w in slow: w.close()
    idle(web)


def test_who_leaves_frees_the_queue_too(web):
    """A client that waits and leaves makes room, although nothing was ever sent to it."""
    running = [Wire(web.port).post('/v1/chat/completions', chat(i, stream=True, max_tokens=4000)) for i in range(SLOTS)]
    for w in running: w.read_until(b'"content":"')
    waiting = [Wire(web.port).post('/v1/chat/completions', chat(i)) for i in range(5)]
    wait_for(lambda: web.worker()['waiting'] == 5)
    for w in waiting: w.close()
    wait_for(lambda: web.worker()['waiting'] == 0)
    assert web.worker()['active'] == SLOTS     # the others go on
    for w in running: w.close()
    idle(web)


class Slowly:
    """A service in this process whose steps are counted and take a while each."""
    def __init__(self, tok, monkeypatch, seconds, **kw):
        self.steps, take = 0, engine.Batch.take
        def slow(batch):
            self.steps += 1
            time.sleep(seconds)
            return take(batch)
        monkeypatch.setattr(engine.Batch, 'take', slow)
        self.pool = Pool([Scheduler(Engine(endless_model(tok), tok), **kw)])
        service = Service(self.pool, Served('sft', 'd1', 7, 1, self.pool.limit, 1700000000), pace=0)
        self.running = Running(build_app(service), service)
        self.url, self.port = self.running.url, int(self.running.url.split(':')[-1])


def test_a_reader_who_never_reads_is_let_go(tok, monkeypatch):
    """After the patience for a client that takes nothing, its answer is dropped and its connection ended; who takes a little is kept."""
    monkeypatch.setattr(server, 'SEND_SECONDS', 2.0)
    s = Slowly(tok, monkeypatch, 0, slots=2)
    try:
        with Wire(s.port, receive_buffer=2048) as dead, Wire(s.port, receive_buffer=2048) as slow:
            for w in (dead, slow): w.post('/v1/chat/completions', chat(1, stream=True, max_tokens=4000))
            end = time.monotonic() + 3.0
            while time.monotonic() < end:  # never so long without reading that a busy machine makes a dead reader of a slow one
                slow.data += slow.socket.recv(20_000)
                time.sleep(.02)
            wait_for(lambda: get(s.url + '/stats')[1]['open_answers'] <= 1)
            assert slow.read_all().endswith(b'data: [DONE]\n\n\r\n0\r\n\r\n')
            wait_for(lambda: get(s.url + '/stats')[1]['open_answers'] == 0)
            assert b'[DONE]' not in dead.read_all()
    finally: s.running.close()


@pytest.mark.parametrize('stream', [True, False])
def test_a_disconnect_frees_the_slot_within_one_token(tok, monkeypatch, stream):
    """Steps of 100 ms: after the client has hung up no more than the step that is running ends, plus the one that notices."""
    s = Slowly(tok, monkeypatch, .1, slots=2)
    try:
        for leave in ('close', 'reset'):
            w = Wire(s.port).post('/v1/chat/completions', chat(1, stream=stream, max_tokens=500))
            wait_for(lambda: s.pool.stats()['active'] == 1)
            if stream: w.read_until(b'"content":"')
            else: time.sleep(.35)
            if leave == 'reset': w.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b'\1\0\0\0\0\0\0\0')
            before = s.steps
            w.close()
            wait_for(lambda: s.pool.stats()['active'] == 0, 3)
            assert s.steps - before <= 2 and s.pool.stats()['waiting'] == 0
        assert s.pool.stats()['cancelled'] == 2
    finally: s.running.close()


def test_idle_crowds_are_let_go(web):
    """More idle connections than files the process may open: the oldest give way within seconds, and the log does not grow."""
    resource = pytest.importorskip('resource', reason='no limits on files here')
    if not hasattr(resource, 'prlimit'): pytest.skip('the limits of another process can be set on Linux only')
    before, files, lines = resource.prlimit(web.process.pid, resource.RLIMIT_NOFILE), psutil.Process(web.process.pid).num_fds(), len(web.errors().splitlines())
    resource.prlimit(web.process.pid, resource.RLIMIT_NOFILE, (files + 60, before[1]))
    crowd = []
    try:
        for i in range(90):
            crowd.append(Wire(web.port))
            crowd[-1].send(b'GET / HTTP/1.1\r\n' * (i % 2))
        wait_for(lambda: len(web.errors().splitlines()) > lines)
        with Wire(web.port) as w:
            w.send(b'GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n')
            w.socket.settimeout(10)     # the crowd would be closed after 30 s
            assert b'200 OK' in w.read_until(b'uptime')
        assert len(web.errors().splitlines()) == lines + 1 and 'no more connections' in web.errors() and 'Traceback' not in web.errors()
    finally:
        resource.prlimit(web.process.pid, resource.RLIMIT_NOFILE, before)
        for w in crowd: w.close()
    idle(web)


def test_sigterm_in_mid_stream(web):
    """The door closes, the answer is finished to its [DONE] even for a reader who pauses, the process leaves with 0. It is the process of the tests above, which need it no more."""
    with Wire(web.port, receive_buffer=2048) as w:
        w.post('/v1/chat/completions', chat(1, stream=True, max_tokens=1500, n=SLOTS // 2)).read_until(b'"content":"')
        web.signal(signal.SIGTERM)
        status, health, _ = wait_for(lambda: (a := web.get('/health'))[0] == 503 and a)
        check_error(status, health, 503)
        assert health['status'] == 'draining' and not health['ready']
        for path in ('/v1/chat/completions', '/chat/completions'): assert check_error(*web.post(path, chat(2))[:2], 503)['code'] == 'server_shutdown'
        time.sleep(2.5)     # longer than uvicorn by itself would wait
        assert web.get('/v1/models')[0] == 200
        body = w.read_all()
        assert body.endswith(b'data: [DONE]\n\n\r\n0\r\n\r\n') and b'"finish_reason":"length"' in body
        assert web.process.wait(20) == 0 and 'Traceback' not in web.errors(), web.errors()


def test_drain_is_bounded_and_a_second_signal_ends_at_once(base):
    """`--drain-seconds` cuts off what takes longer, with an event that says so; a second Ctrl-C does not wait for it."""
    with Process(base, '--drain-seconds', '0.3', '--slots', '2', '--pace', '0', warm=True) as p, Wire(p.port) as w:
        w.post('/v1/chat/completions', chat(1, stream=True, max_tokens=4000)).read_until(b'"content":"')
        p.signal(signal.SIGINT)
        body = w.read_all().split(b'\r\n')[-4]
        error = check_error(500, json.loads(body.removeprefix(b'data: ')))
        assert error['code'] == 'server_shutdown' and p.process.wait(10) == 0 and 'cut off' in p.errors() and 'Traceback' not in p.errors(), p.errors()
    with Process(base, '--drain-seconds', '60', '--slots', '2', '--pace', '0', warm=True) as p, Wire(p.port, receive_buffer=2048) as w:
        w.post('/v1/chat/completions', chat(1, stream=True, max_tokens=4000)).read_until(b'"content":"')   # and reads no further: it would hold up the end
        p.signal(signal.SIGTERM)
        wait_for(lambda: p.get('/health')[0] == 503)
        start = time.monotonic()
        p.signal(signal.SIGTERM)
        assert p.process.wait(10) == 0 and time.monotonic() - start < 5 and 'Traceback' not in p.errors(), p.errors()


def test_nobody_is_left_without_a_word(base):
    """A request half sent at the first signal, and at the second one that streams, those that wait, and one that reads nothing: each hears why, in JSON or as an event."""
    with Process(base, '--drain-seconds', '60', '--slots', '1', '--pace', '0', warm=True) as p:
        half, stream, *waiting = [Wire(p.port) for _ in range(8)]
        stream.post('/v1/chat/completions', chat(1, stream=True, max_tokens=4000)).read_until(b'"content":"')
        for i, w in enumerate(waiting): w.post('/v1/chat/completions', chat(i, max_tokens=2000, n=2))
        wait_for(lambda: p.worker()['waiting'] == 2 * len(waiting))
        half.send(b'POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{')
        time.sleep(.2)
        p.signal(signal.SIGTERM)
        said = [half.read_until(b'server_shutdown')]
        start = time.monotonic()
        p.signal(signal.SIGTERM)
        said += [w.read_until(b'server_shutdown') for w in waiting]
        for raw in said:
            status, body = raw.split(b'\r\n\r\n')
            check_error(int(status.split()[1]), json.loads(body), 503)
        tail = stream.read_all()
        assert tail.endswith(b'0\r\n\r\n') and check_error(503, json.loads(tail.split(b'\r\n')[-4].removeprefix(b'data: ')))['code'] == 'server_shutdown'
        assert p.process.wait(10) == 0 and time.monotonic() - start < 5 and 'Traceback' not in p.errors(), p.errors()
        for w in (half, stream, *waiting): w.close()
