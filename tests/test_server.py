"""The server's endpoints: a real process asked by the official client and by sockets, and the same application in a thread where a test must reach inside."""
import asyncio, gc, json, math, subprocess, sys, threading, time, urllib.request
from types import ModuleType, SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

pytest.importorskip('fastapi', reason="the serving extra is not installed: pip install 'nanochat[serve]'")
openai = pytest.importorskip('openai', reason='the openai client is not installed')

from nanochat import server
from nanochat.chat import Answer
from nanochat.common import UserError, cli, read_jsonl
from nanochat.engine import Engine, Scheduler
from nanochat.scripts import chat_web as web_script
from nanochat.scripts.chat_web import ChatWebConfig, add_page, chat_web
from nanochat.server import EAGER, APIError, Choice, Cutter, Pool, Running, Served, Service, build_app, content_of, parse_request, parts_of, read_json
from server_process import PARTS, QUESTION, SAID, Process, Wire, ask, check_error, endless_model, events, free_port, get, known_by_heart, post, save, text_of, tokenizer, wait_for


@pytest.fixture(scope='module')
def known():
    """(tokenizer, model) with one answer learnt by heart."""
    return known_by_heart()


@pytest.fixture(scope='module')
def web(known, tmp_path_factory):
    """A real process that serves the model, without the page."""
    base = tmp_path_factory.mktemp('served')
    save(base, known[1], known[0])
    with Process(base) as p:
        yield p
        assert p.close() == 0 and 'Traceback' not in p.errors(), p.errors()


def service_of(known, slots=4, max_waiting=8, workers=1, **kw):
    tok, model = known
    pool = Pool([Scheduler(Engine(model, tok), slots=slots, max_waiting=max_waiting) for _ in range(workers)])
    return Service(pool, Served('sft', 'd1', 7, 1, pool.limit, 1700000000), **kw)


def running(known, origins=(), **kw):
    """The application in a thread of this process."""
    service = service_of(known, **kw)
    return Running(build_app(service, origins), service)


@pytest.fixture
def client(web):
    with openai.OpenAI(base_url=web.url + '/v1', api_key='none', max_retries=0, timeout=30) as c: yield c


# The official client, which knows nothing of us but the address

HELLO = [{'role': 'user', 'content': QUESTION}]


def test_openai_chat(client):
    answer = client.chat.completions.create(model='nanochat', messages=HELLO, temperature=0)
    choice = answer.choices[0]
    assert choice.message.content == SAID and choice.message.role == 'assistant' and choice.finish_reason == 'stop' and choice.message.parts == PARTS
    assert answer.model == 'nanochat-sft-d1' and answer.object == 'chat.completion' and answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.system_fingerprint == 'd1-7' and abs(answer.created - time.time()) < 60


def test_openai_stream(client):
    chunks = list(client.chat.completions.create(model='nanochat-sft-d1', messages=HELLO, temperature=0, stream=True, stream_options={'include_usage': True}))
    whole = client.chat.completions.create(model='nanochat', messages=HELLO, temperature=0)
    assert ''.join(c.choices[0].delta.content or '' for c in chunks[:-1]) == SAID and chunks[0].choices[0].delta.role == 'assistant'
    assert [c.choices[0].finish_reason for c in chunks[:-1] if c.choices[0].finish_reason] == ['stop'] and chunks[-2].choices[0].delta.parts == PARTS
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens and len({c.id for c in chunks}) == 1
    assert len(chunks) >= 4   # a role, at least one piece (a fast model's tokens share one), the end, the counts


def test_openai_stream_helper(client):
    """The client library's own accumulator reads our stream to the same message."""
    with client.chat.completions.stream(model='nanochat', messages=HELLO, temperature=0) as stream: final = stream.get_final_completion()
    assert final.choices[0].message.content == SAID and final.choices[0].finish_reason == 'stop'


def test_openai_async(web):
    async def one(c, i):
        if i % 2: return (await c.chat.completions.create(model='nanochat', messages=HELLO, temperature=0)).choices[0].message.content
        return ''.join([k.choices[0].delta.content or '' async for k in await c.chat.completions.create(model='nanochat', messages=HELLO, temperature=0, stream=True)])
    async def all_():
        async with openai.AsyncOpenAI(base_url=web.url + '/v1', api_key='none', max_retries=0) as c: return await asyncio.gather(*(one(c, i) for i in range(6)))
    assert asyncio.run(all_()) == [SAID] * 6


def test_openai_next_turn(client, known):
    """An answer sent back, as an object of the client or as text, is read as the tokens the model wrote: most of them need not be read again."""
    first = client.chat.completions.create(model='nanochat', messages=HELLO, temperature=0)
    for said in (first.choices[0].message, {'role': 'assistant', 'content': SAID}, first.choices[0].message.model_dump()):
        second = client.chat.completions.create(model='nanochat', messages=[*HELLO, said, {'role': 'user', 'content': 'And 2?'}], temperature=0, max_tokens=5)
        ids = known[0].render_for_completion({'messages': [*HELLO, {'role': 'assistant', 'content': PARTS}, {'role': 'user', 'content': 'And 2?'}]})
        assert second.usage.prompt_tokens == len(ids)
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.total_tokens - 1


def test_openai_seed_n_and_stop(client):
    draw = lambda **kw: client.chat.completions.create(model='nanochat', messages=[{'role': 'user', 'content': 'zebra'}], **dict(temperature=2, max_tokens=20, seed=5) | kw)
    assert draw().choices[0].message.content == draw().choices[0].message.content != draw(seed=6).choices[0].message.content
    assert [c.message.content for c in draw(n=3).choices] == [draw(seed=s).choices[0].message.content for s in (5, 6, 7)]
    chunks = list(draw(n=2, stream=True))
    assert [''.join(c.choices[0].delta.content or '' for c in chunks if c.choices[0].index == i) for i in (0, 1)] == [c.message.content for c in draw(n=2).choices]
    stopped = client.chat.completions.create(model='nanochat', messages=HELLO, temperature=0, stop=['eggs', 'never'])
    assert stopped.choices[0].message.content == SAID.split('eggs')[0] and stopped.choices[0].finish_reason == 'stop' and stopped.choices[0].message.parts == PARTS[:3] + [{'type': 'text', 'text': ' '}]
    streamed = client.chat.completions.create(model='nanochat', messages=HELLO, temperature=0, stop='84>>', stream=True)
    assert ''.join(c.choices[0].delta.content or '' for c in streamed) == 'That is <<12*7='
    short = client.chat.completions.create(model='nanochat', messages=HELLO, temperature=0, max_completion_tokens=3)
    assert short.choices[0].finish_reason == 'length' and short.usage.completion_tokens == 3


def test_openai_models(client):
    (model,) = client.models.list().data
    assert model.id == 'nanochat-sft-d1' and model.step == 7 and client.models.retrieve(model.id).id == model.id and client.models.retrieve('nanochat').id == 'nanochat'
    with pytest.raises(openai.NotFoundError) as e: client.models.retrieve('gpt-9')
    assert e.value.code == 'model_not_found' and e.value.param == 'model'


@pytest.mark.parametrize('wrong, error, code, param', [
    (dict(model='gpt-9'), openai.NotFoundError, 'model_not_found', 'model'), (dict(temperature=2.1), openai.BadRequestError, 'invalid_value', 'temperature'),
    (dict(messages=[]), openai.BadRequestError, 'empty_array', 'messages'), (dict(response_format={'type': 'json_object'}), openai.BadRequestError, 'unsupported_parameter', 'response_format'),
    (dict(tools=[{'type': 'function', 'function': {'name': 'f'}}]), openai.BadRequestError, 'unsupported_parameter', 'tools'), (dict(extra_body={'tempo': 1}), openai.BadRequestError, 'unknown_parameter', 'tempo'),
    (dict(messages=[{'role': 'user', 'content': 'long ' * 300}]), openai.BadRequestError, 'context_length_exceeded', 'messages')])
def test_openai_exceptions(client, wrong, error, code, param):
    for stream in (False, True):
        with pytest.raises(error) as e: client.chat.completions.create(**dict(model='nanochat', messages=HELLO, stream=stream) | wrong)
        assert e.value.code == code and e.value.param == param and e.value.type == 'invalid_request_error'


# Other forms of the same answer

def test_public_stream(web):
    """The public nanochat's own protocol."""
    status, text, headers = web.post('/chat/completions', ask(top_k=50, max_tokens=200, made_up=1))
    found = events(text)
    assert status == 200 and headers['content-type'].startswith('text/event-stream') and found[-1] == {'done': True}
    assert all(set(e) == {'token', 'gpu'} and e['gpu'] == 0 for e in found[:-1]) and ''.join(e['token'] for e in found[:-1]) == SAID
    check_error(*web.post('/chat/completions', ask(temperature=3))[:2], 400)


def test_pieces_are_whole_characters(known):
    """UTF-8 in every chunk as it leaves the socket, not only in the sum: emoji, Chinese, Arabic; with no pause between tokens, nearly each in a chunk of its own."""
    with running(known, pace=0) as r, Wire(int(r.url.split(':')[-1])) as w: raw = w.post('/v1/chat/completions', ask(stream=True)).read_all()
    head, body = raw.split(b'\r\n\r\n', 1)
    chunks = body.split(b'\r\n')[1:-4:2]
    pieces = [text_of(events(c)) for c in chunks]
    assert ''.join(pieces) == SAID and '\ufffd' not in ''.join(pieces) and b'no-cache' in head


def test_fast_tokens_leave_together(known):
    """The first ones each alone, then at most one piece per pause: a thousand tokens a second are a stream, and not a thousand events."""
    for path, n in (('/v1/chat/completions', lambda e: text_of([e])), ('/chat/completions', lambda e: e.get('token', ''))):
        with running(known, pace=.2) as r: pieces = list(filter(None, map(n, events(post(r.url + path, ask(stream=True))[1]))))
        assert ''.join(pieces) == SAID and pieces[:EAGER] == ['T', 'hat', ' is', ' '] and len(pieces) <= EAGER + 3


def test_facts(web):
    from prometheus_client.parser import text_string_to_metric_families as families
    status, health, _ = web.get('/health')
    assert status == 200 and (health['status'], health['model'], health['run'], health['step'], health['workers'], health['slots'], health['context']) == ('ok', 'nanochat-sft-d1', 'd1', 7, 1, 16, 256)
    before = web.worker()
    web.post('/v1/chat/completions', ask())
    after, all_ = web.worker(), web.get('/stats')[1]
    assert after['finished'] == before['finished'] + 1 and after['generated_tokens'] > before['generated_tokens'] and (all_['total_workers'], all_['available_workers'], all_['open_answers']) == (1, 1, 0)
    status, text, headers = web.get('/metrics')
    found = {s.name: s for f in families(text) for s in f.samples}
    assert status == 200 and headers['content-type'].startswith('text/plain') and found['nanochat_slots'].value == 16 and found['nanochat_generated_tokens_total'].value >= after['generated_tokens']
    assert found['nanochat_time_to_first_token_seconds_count'].value >= 1 and 'nanochat_http_requests_total' in found


@pytest.mark.parametrize('method, path, status', [
    ('GET', '/', 404), ('GET', '/nothing', 404), ('GET', '/v1', 404), ('GET', '/v1/chat', 404), ('POST', '/v1/completions', 404), ('GET', '/v1/models/', 404), ('GET', '/docs', 404),
    ('GET', '/v1/chat/completions', 405), ('DELETE', '/v1/models', 405), ('PUT', '/chat/completions', 405), ('POST', '/health', 405), ('OPTIONS', '/v1/chat/completions', 405), ('GET', '/v1/models/..%2f..', 404)])
def test_wrong_paths_and_methods(web, method, path, status):
    from server_process import read
    found, answer, headers = read(urllib.request.Request(web.url + path, method=method))
    check_error(found, answer, status)
    if status == 405: assert headers['allow']


# Bodies that are not what they should be

BAD = {'empty': b'', 'not json': b'{"messages": [', 'array': b'[]', 'string': b'"x"', 'null': b'null', 'nan': b'{"temperature": NaN, "messages": []}', 'infinity': b'{"temperature": Infinity}', 'not utf-8': b'{"messages": "\xff\xfe"}',
       'utf-16': '{}'.encode('utf-16'), 'nested': b'[' * 200_000, 'nested objects': b'{"a":' * 100_000, 'nested field': b'{"messages": ' + b'[' * 900 + b']' * 900 + b'}', 'long number': b'{"seed": ' + b'9' * 10_000 + b'}', 'nul': b'\0' * 100,
       'lone surrogate': b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 'bom': b'\xef\xbb\xbf{}', 'no messages': b'{}', 'messages null': b'{"messages": null}', 'messages object': b'{"messages": {}}', 'message string': b'{"messages": ["hi"]}',
       'no role': b'{"messages": [{"content": "hi"}]}', 'role list': b'{"messages": [{"role": ["user"], "content": "hi"}]}', 'content number': b'{"messages": [{"role": "user", "content": 1}]}', 'blank': b'{"messages": [{"role": "user", "content": " "}]}',
       'image': b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}', 'tool role': b'{"messages": [{"role": "tool", "content": "hi"}]}', 'stray field': b'{"messages": [{"role": "user", "content": "hi", "mood": 1}]}'}


@pytest.mark.parametrize('body', BAD.values(), ids=BAD.keys())
def test_bad_bodies(web, body):
    for path in ('/v1/chat/completions', '/chat/completions'): check_error(*web.post(path, body)[:2], 400)


@pytest.mark.parametrize('field, value', [('temperature', 'hot'), ('temperature', True), ('top_k', 1.5), ('n', 9), ('n', 0), ('stop', ''), ('stop', [1]), ('stop', ['a'] * 5), ('stream', 1), ('stream', 'true'), ('stream_options', {'include_usage': True}), ('seed', 2**63), ('seed', 'x'),
                                          ('top_p', 1.1), ('top_p', -.1), ('model', 7), ('trim', 'yes'), ('logprobs', True), ('presence_penalty', False), ('logit_bias', {'5': 1}), ('max_tokens', 1.5), ('tool_choice', 'required')])
def test_bad_fields(web, field, value):
    error = check_error(*web.post('/v1/chat/completions', ask(**{field: value}))[:2], 400)
    assert error['param'] == field and field in error['message']


HALF = '\ud800'


@pytest.mark.parametrize('body, status', [({'model': HALF}, 404), ({HALF: 1}, 400), ({'messages': [{'role': 'user', 'content': 'x', HALF: 1}]}, 400), ({'messages': [{'role': HALF, 'content': 'x'}]}, 400), ({'messages': [{'role': 'user', 'content': HALF}]}, 400),
                                          ({'messages': [{'role': 'user', 'content': [{'type': HALF, 'text': 'x'}]}]}, 400), ({'stream_options': {HALF: 1}}, 400), ({'seed': HALF}, 400)])
@pytest.mark.parametrize('path', ['/v1/chat/completions', '/chat/completions'])
def test_half_surrogate_pairs(web, path, body, status):
    """JSON can spell them and UTF-8 cannot: quoted in an error they must not break it."""
    got, answer, _ = web.post(path, ask() | body)
    if path == '/chat/completions' and not {'model', 'messages', 'seed'} & set(body): assert got == 200     # the public form overlooks other fields
    else: check_error(got, answer, status)


def test_parts_that_are_no_text(web):
    for part, words in (({'type': 'image_url', 'image_url': {'url': 'data:'}}, 'text only, not image_url'), ({'type': 'text'}, "needs a 'text'"), ('x', 'text only, not str')):
        for parts in ([part], [{'type': 'text', 'text': 'see'}, part]):
            assert words in check_error(*web.post('/v1/chat/completions', {'messages': [{'role': 'user', 'content': parts}]})[:2], 400)['message']


def test_fields_that_change_nothing(web):
    answer = web.post('/v1/chat/completions', ask(user='me', store=False, metadata={'a': 'b'}, presence_penalty=0, frequency_penalty=0.0, logit_bias={}, tools=None, tool_choice='auto', n=None, top_p=None, stop=None, seed=None, max_tokens=None, top_k=None, response_format={'type': 'text'}))
    assert answer[0] == 200 and answer[1]['choices'][0]['message']['content'] == SAID
    assert web.post('/v1/chat/completions', ask(temperature=1, top_p=0))[1]['choices'][0]['message']['content'] == SAID   # the likeliest token alone


@pytest.mark.parametrize('type', ['text/plain', 'application/x-www-form-urlencoded', 'application/jsonx', ''])
def test_content_type(web, type):
    """Also what keeps web pages from posting: a browser sends these without asking, and JSON only with permission."""
    check_error(*web.post('/v1/chat/completions', ask(), Content_Type=type)[:2], 415)
    assert web.post('/v1/chat/completions', ask(), Content_Type='Application/JSON; charset=utf-8')[0] == 200


def talk(n, chars=1): return [{'role': ('user', 'assistant')[i % 2], 'content': 'x' * chars} for i in range(n)]


def accepts(**fields):
    """Whether a request gets past the checks of its body; None, or the error."""
    try: parse_request({'messages': HELLO} | fields)
    except APIError as e:
        assert e.status == 400
        return e.param
    return None


def test_limits_at_the_edge():
    """At limit - 1 and limit: yes; at limit + 1: no, and the field is named."""
    for name, low, high, step in (('temperature', 0, 2, 1e-6), ('top_p', 0, 1, 1e-6), ('top_k', 0, 200, 1), ('max_tokens', 1, 4096, 1), ('max_completion_tokens', 1, 4096, 1), ('n', 1, 8, 1)):
        assert [accepts(**{name: v}) for v in (low, low + step, high - step, high)] == [None] * 4, name
        assert [accepts(**{name: v}) for v in (low - step, high + step)] == [name] * 2
    assert [accepts(messages=talk(n)) for n in (497, 499)] == [None] * 2 and accepts(messages=talk(501)) == 'messages'
    with_system = lambda n: [{'role': 'system', 'content': 'x'}, *talk(n)]
    assert accepts(messages=with_system(499)) is None and accepts(messages=with_system(501)) == 'messages'
    assert [accepts(messages=talk(1, n)) for n in (7999, 8000)] == [None] * 2 and accepts(messages=talk(1, 8001)) == 'messages[0].content'
    total = lambda n: [*talk(4, 8000 - 2), {'role': 'user', 'content': 'x' * (n - 4 * 7998)}]
    assert [accepts(messages=total(n)) for n in (31999, 32000)] == [None] * 2 and accepts(messages=total(32001)) == 'messages'
    assert accepts(stop=['x' * 200] * 4) is None and accepts(stop='x' * 201) == accepts(stop=['x'] * 5) == 'stop'


def test_context_at_the_edge(web, known):
    """Prompts of limit - 1, limit and limit + 1 tokens: the first has room for one new token, the others are refused."""
    count = lambda n: len(known[0].render_for_completion({'messages': [{'role': 'user', 'content': '7' * n}]}))
    n = next(n for n in range(1000) if count(n) == 255)
    assert (count(n), count(n + 1), count(n + 2)) == (255, 256, 257)
    status, answer, _ = web.post('/v1/chat/completions', ask('7' * n, max_tokens=50))
    assert status == 200 and answer['usage']['completion_tokens'] == 1 and answer['usage']['prompt_tokens'] == 255
    for more in (1, 2):
        error = check_error(*web.post('/v1/chat/completions', ask('7' * (n + more)))[:2], 400)
        assert error['code'] == 'context_length_exceeded' and '256 tokens' in error['message'] and str(255 + more) in error['message']


def test_trimming_only_when_asked(web):
    old = [{'role': ('user', 'assistant')[i % 2], 'content': f'number {i} of many'} for i in range(30)]
    assert check_error(*web.post('/v1/chat/completions', dict(messages=[*old, *HELLO]))[:2], 400)['code'] == 'context_length_exceeded'
    status, answer, _ = web.post('/v1/chat/completions', dict(messages=[*old, *HELLO], trim=True, temperature=0))
    assert status == 200 and 0 < answer['trimmed_turns'] <= 30 and answer['trimmed_turns'] % 2 == 0 and answer['usage']['prompt_tokens'] <= 256 - 64
    first = events(web.post('/v1/chat/completions', dict(messages=[*old, *HELLO], trim=True, stream=True))[1])[0]
    assert first['trimmed_turns'] == answer['trimmed_turns']
    assert web.post('/v1/chat/completions', ask(trim=True))[1]['trimmed_turns'] == 0 and 'trimmed_turns' not in web.post('/v1/chat/completions', ask())[1]
    check_error(*web.post('/v1/chat/completions', ask('long ' * 300, trim=True))[:2], 400)


def chunked(w, size, count, path='/v1/chat/completions'):
    w.send(f'POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n'.encode())
    for _ in range(count): w.send(b'%x\r\n' % size + b' ' * size + b'\r\n')


def test_oversized_bodies(web):
    """Announced or not, more than a megabyte is refused before it is parsed, and at the limit it is not."""
    body = json.dumps(ask()).encode()
    pad = lambda n: body + b' ' * (n - len(body))
    assert [web.post('/v1/chat/completions', pad(server.MAX_BODY - k))[0] for k in (1, 0)] == [200, 200]
    assert check_error(*web.post('/v1/chat/completions', pad(server.MAX_BODY + 1))[:2], 413)['code'] == 'request_too_large'
    with Wire(web.port) as w:   # the announcement is enough
        w.send(b'POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99999999999\r\n\r\n')
        assert b' 413 ' in w.read_until(b'request_too_large')
    with Wire(web.port) as w:   # no announcement, and no end
        chunked(w, 65536, 17)
        assert b' 413 ' in w.read_until(b'request_too_large')
    with Wire(web.port) as w:
        chunked(w, 65536, 3)
        w.send(b'0\r\n\r\n')
        assert b' 400 ' in w.read_until(b'could not parse')


def test_not_even_http(web):
    for raw in (b'hello\r\n\r\n', b'\x16\x03\x01\x02\0', b'POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n'):
        with Wire(web.port) as w:
            w.send(raw + b'\r\n\r\n')
            head, body = w.read_all().split(b'\r\n\r\n', 1)
            check_error(int(head.split()[1]), json.loads(body), 400)


def test_what_else_is_installed_changes_nothing(known, monkeypatch):
    """uvicorn takes httptools and uvloop by itself where they are; then clients of HTTP/1.0 would get chunks."""
    for name in ('httptools', 'uvloop'): monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name in ('http.auto', 'http.httptools_impl'): monkeypatch.delitem(sys.modules, f'uvicorn.protocols.{name}', raising=False)
    body = json.dumps(ask(stream=True)).encode()
    with running(known) as site, Wire(int(site.url.rsplit(':', 1)[1])) as w:
        w.send(b'POST /v1/chat/completions HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s' % (len(body), body))
        head, events = w.read_all().split(b'\r\n\r\n', 1)
    assert b' 200 ' in head and events.startswith(b'data: ') and events.endswith(b'data: [DONE]\n\n') and b'\r\n' not in events


def test_half_requests_leave_nothing(web):
    """Clients who leave before their request is whole: no answer, no error in the log, no slot."""
    for raw in (b'POST /v1/chat', b'POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"mess'):
        with Wire(web.port) as w: w.send(raw)
    assert web.post('/v1/chat/completions', ask())[0] == 200 and web.get('/stats')[1]['open_answers'] == 0


def test_foreign_names_are_refused(web):
    """DNS rebinding: a page from elsewhere that calls this machine by its own name."""
    for name in ('evil.example', 'evil.example:80', 'localhost.evil.example', '127.0.0.1.evil.example', ''): check_error(*get(web.url + '/health', Host=name)[:2], None if name == '' else 421)
    for name in ('localhost', 'LOCALHOST:1234', '127.0.0.1', '[::1]:8000'): assert get(web.url + '/health', Host=name)[0] == 200


# What only the application itself can show

def test_api_key(known):
    with running(known, api_key='s3cret-k3y') as r:
        for given in ({}, {'Authorization': 'Bearer wrong'}, {'Authorization': 's3cret-k3y'}, {'Authorization': 'Basic s3cret-k3y'}, {'Authorization': 'Bearer s3cret-k3'}, {'Authorization': 'Bearer \xff'}):
            for path in ('/v1/models', '/stats', '/metrics', '/v1/nothing'): assert check_error(*get(r.url + path, **given)[:2], 401)['code'] == 'invalid_api_key'
            check_error(*post(r.url + '/v1/chat/completions', ask(), **given)[:2], 401)
            check_error(*post(r.url + '/chat/completions', ask(), **given)[:2], 401)
        assert get(r.url + '/stats', Authorization='bearer s3cret-k3y')[0] == get(r.url + '/health')[0] == 200
        with pytest.raises(openai.AuthenticationError) as e: openai.OpenAI(base_url=r.url + '/v1', api_key='guess', max_retries=0).models.list()
        assert e.value.code == 'invalid_api_key'
        assert openai.OpenAI(base_url=r.url + '/v1', api_key='s3cret-k3y', max_retries=0).chat.completions.create(model='nanochat', messages=HELLO, temperature=0).choices[0].message.content == SAID


def test_origins(known):
    with running(known, origins=('https://good.example',)) as r:
        good, bad = (get(r.url + '/v1/models', Origin=f'https://{o}.example')[2] for o in ('good', 'bad'))
        assert good['access-control-allow-origin'] == 'https://good.example' and bad['access-control-allow-origin'] is None and good['access-control-allow-credentials'] is None
        ask_first = lambda origin: urllib.request.Request(r.url + '/v1/chat/completions', method='OPTIONS', headers={'Origin': origin, 'Access-Control-Request-Method': 'POST', 'Access-Control-Request-Headers': 'authorization,content-type,x-stainless-os'})
        from server_process import read
        assert read(ask_first('https://good.example'))[0] == 200
        check_error(*read(ask_first('https://bad.example'))[:2], 400)
    with running(known) as r: assert get(r.url + '/v1/models', Origin='https://good.example')[2]['access-control-allow-origin'] is None


def test_conversations_are_logged_only_when_asked(known, tmp_path):
    log = tmp_path/'talk.jsonl'
    with running(known, log=log) as r:
        post(r.url + '/v1/chat/completions', ask(n=2, seed=3))
        post(r.url + '/chat/completions', ask())
        wait_for(lambda: len(read_jsonl(log)) == 2)
    first, second = read_jsonl(log)
    assert [a['content'] for a in first['answers']] == [SAID] * 2 and first['messages'] == HELLO and first['seed'] == 3 and second['answers'][0]['finish_reason'] == 'stop'
    assert log.stat().st_mode & 0o077 == 0   # nobody else's business
    with running(known) as r: post(r.url + '/v1/chat/completions', ask())
    assert [p.name for p in tmp_path.iterdir()] == ['talk.jsonl']


def test_trouble_inside(known, monkeypatch, capfd):
    """The engine breaks: before the answer a 500, within a stream an event that the client raises; and the next request is answered."""
    from nanochat import engine
    broken = SimpleNamespace(now=True)
    take = engine.Batch.take
    def fail(self):
        if broken.now: raise RuntimeError('CUDA out of memory')
        return take(self)
    monkeypatch.setattr(engine.Batch, 'take', fail)
    with running(known) as r:
        error = check_error(*post(r.url + '/v1/chat/completions', ask())[:2], 500)
        assert error['type'] == 'server_error' and 'CUDA' not in error['message']
        client = openai.OpenAI(base_url=r.url + '/v1', api_key='x', max_retries=0)
        with pytest.raises(openai.APIError, match='error while answering'): list(client.chat.completions.create(model='nanochat', messages=HELLO, stream=True))
        broken.now = False
        assert post(r.url + '/v1/chat/completions', ask())[1]['choices'][0]['message']['content'] == SAID
        monkeypatch.setattr(server, 'parse_request', lambda body: 1 / 0)
        check_error(*post(r.url + '/v1/chat/completions', ask())[:2], 500)
    assert 'CUDA out of memory' in capfd.readouterr().err   # the terminal has the whole story


def test_slow_body(known, monkeypatch):
    monkeypatch.setattr(server, 'BODY_SECONDS', .2)
    with running(known) as r, Wire(int(r.url.split(':')[-1])) as w:
        w.send(b'POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{')
        assert b' 408 ' in w.read_until(b'request_timeout')


def port_of(r): return int(r.url.split(':')[-1])
def head(path, length, method='POST'): return f'{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n'.encode()


def closed_after(wires, drip, seconds):
    """Which wires the server has closed after so many seconds in which `drip` was sent to each now and then; what they were answered is in their `data`."""
    end, gone = time.monotonic() + seconds, set()
    for w in wires: w.socket.settimeout(.01)
    while time.monotonic() < end and len(gone) < len(wires):
        for i, w in enumerate(wires):
            if i in gone: continue
            try:
                if drip[i]: w.send(drip[i])
                if new := w.socket.recv(65536): w.data += new
                else: gone.add(i)
            except TimeoutError: pass
            except OSError: gone.add(i)
        time.sleep(.02)
    return gone


def test_idle_connections_are_closed(known, monkeypatch):
    """Nothing sent, half a head, a head that drips, a body that nobody reads, an idle keep-alive: all are closed, and the server lives."""
    monkeypatch.setattr(server, 'IDLE_SECONDS', .3)
    health, half = b'GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n', b'GET /health HTTP/1.1\r\nHost: localhost\r\n'
    sent = [(b'', b''), (half, b''), (half + b'X-A: ', b'a'), (health, b''), (health + b'GET /he', b''), (health + half + b'X-A: ', b'a'), (head('/nothing', 9999), b'a')]
    with running(known) as r:
        wires = [Wire(port_of(r)) for _ in sent]
        for w, (first, _) in zip(wires, sent): w.send(first)
        assert closed_after(wires, [d for _, d in sent], 5) == set(range(len(sent)))
        assert [b'200 OK' in w.data for w in wires] == [health in first for first, _ in sent]
        for w in wires: w.close()
        assert get(r.url + '/health')[0] == 200


def test_the_clock_leaves_who_is_busy(known, monkeypatch):
    """Answers that take longer than an idle connection may live, a client that asks again and again on one connection, and an event stream of the page."""
    from nanochat import engine
    monkeypatch.setattr(server, 'IDLE_SECONDS', .3)
    take = engine.Batch.take
    monkeypatch.setattr(engine.Batch, 'take', lambda batch: time.sleep(.04) or take(batch))
    service = service_of((known[0], endless_model(known[0])))
    app = build_app(service)
    @app.get('/events')
    async def quiet():
        from starlette.responses import StreamingResponse
        async def later():
            yield b'begun'
            await asyncio.sleep(1)
            yield b'ended'
        return StreamingResponse(later())
    with Running(app, service) as r:
        wires = [Wire(port_of(r)).post('/v1/chat/completions', ask(max_tokens=30, stream=s)) for s in (True, False)] + [Wire(port_of(r))]
        wires[2].send(b'GET /events HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n')
        with Wire(port_of(r)) as polite:
            for _ in range(8):
                polite.send(head('/health', 0, 'GET'))
                polite.read_until(b'"uptime"')
                polite.data = b''
                time.sleep(.15)
        for w, last in zip(wires, (b'[DONE]', b'"finish_reason": "length"', b'ended')): assert last in w.read_until(last) and w.close() is None


def test_slow_bodies_for_the_page(known, monkeypatch):
    """Routes that read their bodies themselves, as Gradio's do, are behind the same clock; one that has begun to answer is not."""
    monkeypatch.setattr(server, 'BODY_SECONDS', .2)
    service = service_of(known)
    app = build_app(service)
    @app.post('/page/join')
    async def join(data: dict): return data
    with Running(app, service) as r:
        assert post(r.url + '/page/join', {'a': 1})[1] == {'a': 1}
        with Wire(port_of(r)) as silent, Wire(port_of(r)) as dripping:
            for w in (silent, dripping): w.send(head('/page/join', 999) + b'{')
            assert closed_after([silent, dripping], [b'', b' '], 5) == {0, 1}
            for w in (silent, dripping): assert b' 408 ' in w.data and check_error(408, json.loads(w.data.split(b'\r\n\r\n')[1]))['code'] == 'request_timeout'


def test_more_files():
    resource = pytest.importorskip('resource', reason='no limits on files here')
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (300, before[1]))
        assert server.more_files(200) == 300 and server.more_files(400) == 400
    finally: resource.setrlimit(resource.RLIMIT_NOFILE, before)


class Reading:
    """A running server whose reading of long requests can be held; `begun` holds the sizes of those that were begun."""
    def __init__(self, known, monkeypatch, **kw):
        self.hold, self.begun, admit = threading.Event(), [], server.admit
        def slowly(service, body, public):
            if len(body) >= server.LONG_BODY:
                self.begun.append(len(body))
                self.hold.wait(20)
            return admit(service, body, public)
        monkeypatch.setattr(server, 'admit', slowly)
        self.service = service_of(known, **kw)
        self.running = Running(build_app(self.service), self.service)

    def long(self, **kw): return Wire(port_of(self.running)).post('/v1/chat/completions', ask(trim=True, max_tokens=200, **kw) | {'messages': talk(499, 40)})
    def __enter__(self): return self
    def __exit__(self, *exc):
        self.hold.set()
        self.running.close()


def test_long_requests_hold_up_nobody(known, monkeypatch):
    """While one is read and others wait, a question of one line is answered; of too many the last are told to come back."""
    with Reading(known, monkeypatch, slots=32, max_waiting=32) as r:
        most = r.service.long.most
        wires = [r.long() for _ in range(most)]
        wait_for(lambda: len(r.service.long.work) == most)
        assert post(r.running.url + '/v1/chat/completions', ask())[1]['choices'][0]['message']['content'] == SAID
        with r.long() as late: assert b' 429 ' in late.read_until(b'rate_limit_exceeded') and b'retry-after: 1' in late.data
        r.hold.set()
        for w in wires: assert b' 200 ' in w.read_until(b'"usage"')


def test_who_leaves_the_line_is_not_read(known, monkeypatch):
    """Of clients who leave while their requests wait, none is begun; the job of the one that was begun is closed."""
    with Reading((known[0], endless_model(known[0])), monkeypatch) as r:
        wires = [r.long() for _ in range(6)]
        wait_for(lambda: len(r.service.long.work) == 6)
        for w in wires: w.close()
        wait_for(lambda: len(r.service.long.work) == 1)
        assert r.service.busy()
        r.hold.set()
        wait_for(lambda: r.service.pool.stats()['cancelled'] == 1 and not r.service.busy())
        assert len(r.begun) == 1 and r.service.pool.stats()['submitted'] == 1
        assert server.stats(r.service)['open_answers'] == 0


def test_who_has_heard_nothing_hears_why(known):
    """A route that is cut off at the end before it answered: 503 in JSON, where uvicorn says Internal Server Error."""
    service = service_of(known)
    app = build_app(service)
    @app.get('/endless')
    async def endless(): await asyncio.sleep(60)
    with Running(app, service) as r, Wire(port_of(r)) as w:
        w.send(b'GET /endless HTTP/1.1\r\nHost: localhost\r\n\r\n')
        time.sleep(.1)
        for _ in range(2): service.stop()
        status, body = w.read_until(b'server_shutdown').split(b'\r\n\r\n')
        check_error(int(status.split()[1]), json.loads(body), 503)


def test_two_workers(known):
    """Requests go to the least loaded, a full one passes them on, and who answers makes no difference."""
    tok = known[0]
    endless = endless_model(tok)
    service = service_of((tok, endless), slots=1, max_waiting=1, workers=2)
    pool, prompt = service.pool, tok.encode('hello')
    placed = [pool.place(prompt, [9], max_tokens=200, temperature=1., top_k=20) for _ in range(4)]
    assert sorted(i for i, _ in placed) == [0, 0, 1, 1] and placed[0][0] != placed[1][0]
    with pytest.raises(server.Busy): pool.place(prompt, [9])
    said = [[t for t, _ in ticket] for _, (ticket,) in placed]
    assert all(s == said[0] and len(s) == 200 for s in said) and [t for (t,), _ in pool.generate(prompt, max_tokens=200, seed=9, top_k=20)] == said[0]
    assert pool.stats()['slots'] == 2 and pool.stats()['finished'] == 5
    with pytest.raises(server.Busy): pool.place(prompt, [1, 2, 3])     # all samples of a request or none
    wait_for(lambda: pool.unfinished() == 0)
    pool.close()
    with pytest.raises(APIError): pool.submit(prompt)


def test_busy_is_429(known):
    tok = known[0]
    with running((tok, endless_model(tok)), slots=1, max_waiting=1) as r:
        with openai.OpenAI(base_url=r.url + '/v1', api_key='x', max_retries=0) as client:
            long = dict(model='nanochat', messages=[{'role': 'user', 'content': 'hello'}], max_tokens=4000, stream=True, temperature=1, extra_body={'top_k': 20})
            streams = [client.chat.completions.create(**long) for _ in range(2)]
            with pytest.raises(openai.RateLimitError) as e: client.chat.completions.create(**long)
            assert int(e.value.response.headers['retry-after']) >= 1 and e.value.type == 'rate_limit_error'
            for s in streams: s.close()
        wait_for(lambda: sum(get(r.url + '/health')[1][k] for k in ('active', 'waiting')) == 0)
        status, answer, _ = post(r.url + '/v1/chat/completions', ask('hello', max_tokens=3))
        assert status == 200


def test_more_answers_than_there_will_ever_be_room_for(known):
    """'try again' would be said for ever."""
    with running(known, slots=1, max_waiting=1) as r:
        error = check_error(*post(r.url + '/v1/chat/completions', ask(n=8))[:2], 400)
        assert error['param'] == 'n' and 'takes 2 answers' in error['message']
        assert post(r.url + '/v1/chat/completions', ask(n=2, max_tokens=2))[0] == 200


def test_a_second_signal_is_not_slowed_by_the_first(known):
    """What ends gently must not give open pages two more seconds after somebody asked for haste."""
    async def both():
        fake, service = SimpleNamespace(config=SimpleNamespace(timeout_graceful_shutdown=9), should_exit=False), service_of(known)
        service.busy = lambda: time.monotonic() < end
        end = time.monotonic() + .3
        gently = asyncio.create_task(server.stop_gently(service, fake, 5))
        await asyncio.sleep(.05)
        await server.stop_soon(service, fake, .05)
        await gently
        return fake.config.timeout_graceful_shutdown
    assert asyncio.run(both()) == 0


def test_page_and_key(known):
    """Gradio at '/', behind its own login when there is a key, and errors in one form there too."""
    pytest.importorskip('gradio', reason='gradio is not installed')
    service = service_of(known, api_key='s3cret')
    app = build_app(service)
    add_page(app, service.pool, 'the knowing model', 's3cret')
    with Running(app, service) as r:
        status, text, _ = get(r.url + '/')
        assert status == 200 and 's3cret' not in text and '"auth_required":true' in text.replace(' ', '')
        for path in ('/config', '/gradio_api/info'): check_error(*get(r.url + path)[:2], 401)
        check_error(*post(r.url + '/gradio_api/queue/join', {'fn_index': 0, 'data': [], 'session_hash': 'x'})[:2], 401)
        login = lambda word: post(r.url + '/login', f'username=me&password={word}'.encode(), Content_Type='application/x-www-form-urlencoded')
        check_error(*login('guess')[:2], 400)
        status, _, headers = login('s3cret')
        cookie = '; '.join(c.split(';')[0] for c in headers.get_all('set-cookie'))
        assert status == 200 and 'the knowing model' in json.dumps(get(r.url + '/config', Cookie=cookie)[1])
        for path in ('/gradio_api/upload', '/gradio_api/proxy=http://x', '/gradio_api/vibe-code'): check_error(*get(r.url + path, Cookie=cookie)[:2], 404)
        check_error(*get(r.url + '/v1/models', Cookie=cookie)[:2], 401)   # the API wants the key itself
        check_error(*get(r.url + '/v1/chat/completions', Authorization='Bearer s3cret')[:2], 405)
        check_error(*get(r.url + '/nothing', Cookie=cookie)[:2], 404)


def test_without_gradio(known, monkeypatch):
    monkeypatch.setitem(sys.modules, 'gradio', None)
    service = service_of(known)
    app = build_app(service)
    add_page(app, service.pool, 'x')
    with Running(app, service) as r:
        status, text, _ = get(r.url + '/')
        assert status == 200 and 'pip install' in text and get(r.url + '/v1/models')[0] == 200


def test_ipv6_and_names(known):
    service = service_of(known, hosts=('[::1]',))
    try: sock = server.listen('::1', 0)
    except OSError: pytest.skip('no IPv6 on this machine')
    with Running(build_app(service), service, sock=sock) as r:
        assert r.url.startswith('http://[::1]:') and get(r.url + '/health')[0] == 200
        check_error(*get(r.url + '/health', Host='localhost')[:2], 421)


# Properties

JSON = st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=20), lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=8), x, max_size=4), max_leaves=12)
NAMES = st.sampled_from([*server.FIELDS, *server.NEUTRAL, *server.IGNORED, 'other'])
MESSAGE = st.fixed_dictionaries({'role': st.sampled_from(['user', 'assistant', 'system', 'tool']) | JSON, 'content': st.text(max_size=30) | JSON}, optional={'name': JSON, 'parts': JSON, 'tool_calls': JSON})


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(NAMES, JSON, max_size=6), st.lists(MESSAGE, max_size=5) | JSON)
def test_any_json_is_a_request_or_an_error(body, messages):
    """Nothing else comes out of the checks, and what passes is within all limits and can be rendered."""
    try: chat = parse_request(body | {'messages': messages})
    except APIError as e:
        assert e.status == 400 and str(e) and json.dumps(e.body())
        return
    assert 0 <= chat.temperature <= 2 and 0 <= chat.top_p <= 1 and 0 <= chat.top_k <= 200 and 1 <= chat.max_tokens <= 4096 and 1 <= chat.n <= 8 and chat.messages[-1]['role'] == 'user'
    assert TOK.render_for_completion({'messages': chat.messages})


TOK = tokenizer()


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_json_or_an_error(data):
    try: assert isinstance(read_json(data), dict)
    except APIError as e: assert e.status == 400


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text('abc', max_size=4), max_size=12), st.lists(st.text('abc', min_size=1, max_size=4), max_size=3))
def test_stop_sequences(pieces, stops):
    """However the text is cut into pieces, what comes out is the text before the first stop sequence, and never a part of one."""
    cutter, whole = Cutter(tuple(stops)), ''.join(pieces)
    out = ''.join(cutter.push(p) for p in pieces)
    ends = [whole.find(s) + len(s) for s in stops if s in whole]
    first = min((whole.find(s) for s in stops if s in whole and whole.find(s) + len(s) <= max(ends)), default=None)
    assert cutter.hit == bool(ends)
    if cutter.hit: assert whole.startswith(out) and not any(s in out for s in stops) and len(out) in {whole.find(s) for s in stops}
    else: assert out + cutter.flush() == whole


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, TOK.get_vocab_size() - 1), max_size=40))
def test_any_tokens_stream_to_the_whole(ids):
    """Streamed pieces joined equal the rendering of the parts, whatever nonsense the model says; no piece takes back what an earlier one said."""
    choice, answer = Choice(0, None, TOK), Answer(TOK)
    pieces = [choice.push(i) for i in ids] + [choice.finish()]
    for i in ids: answer.push(i)
    assert ''.join(pieces) == choice.content == content_of(answer.finish().parts) and choice.tokens == len(ids)


def test_tool_calls_as_text():
    assert content_of(PARTS) == SAID and parts_of(SAID) == PARTS
    for text in ('<<1+1=3>>', '<<=2>>', 'a << b = c >> d', '<<__import__("os")=1>>', '<<<<1+1=2', '<<\n=2>>'): assert parts_of(text) == [{'type': 'text', 'text': text}]
    assert parts_of('<<1+1=2>><<2*2=4>>') == [{'type': t, 'text': s} for t, s in (('python', '1+1'), ('python_output', '2'), ('python', '2*2'), ('python_output', '4'))]
    assert content_of([{'type': 'python', 'text': 'a.b'}, {'type': 'text', 'text': 'x'}]) == '<<a.b>>x' and content_of([{'type': 'python_output', 'text': '3'}]) == '<<=3>>'


def test_schema_attacks(web):
    """schemathesis reads /openapi.json and sends what it allows and what it forbids."""
    schemathesis = pytest.importorskip('schemathesis', reason='schemathesis is not installed')
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import content_type_conformance, negative_data_rejection, response_schema_conformance, status_code_conformance
    schema = schemathesis.openapi.from_url(web.url + '/openapi.json')
    schema.config.update(base_url=web.url)
    modes = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]
    answered = set()
    for operation in (r.ok() for r in schema.get_all_operations()):
        for mode in modes if operation.body else modes[:1]:
            @settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
            @given(operation.as_strategy(generation_mode=mode))
            def attack(case):
                response = case.call()
                answered.add((operation.path, response.status_code))
                if response.status_code >= 400: check_error(response.status_code, response.json())
                case.validate_response(response, checks=[not_a_server_error, content_type_conformance, response_schema_conformance, status_code_conformance, *([negative_data_rejection] if operation.path.startswith('/v1/chat') else [])])
            attack()
    assert ('/v1/chat/completions', 400) in answered and len({p for p, _ in answered}) == 7
    assert web.post('/v1/chat/completions', ask())[0] == 200


# The command

@pytest.mark.parametrize('flags, words', [(['--port', '0'], '--port 0'), (['--slots', '0'], '--slots'), (['--max-waiting', '0'], '--max-waiting'), (['--drain-seconds', '-1'], '--drain-seconds'), (['--api-key', ''], 'API key'), (['--api-key', 'ä'], 'API key'),
                                          (['--allow-origin', '*'], '--allow-origin'), (['--workers', '0'], '--workers'), (['--pace', '-1'], '--pace'), (['--source', 'rl'], 'chat_rl'), (['--host', 'no.such.name.invalid'], 'cannot listen')])
def test_bad_flags_are_one_sentence(flags, words, capsys):
    with pytest.raises(SystemExit) as stop: cli(ChatWebConfig, chat_web, ['--device', 'cpu', '--port', str(free_port()), *flags])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and words in err and err.count('\n') == 1 and out == ''


def test_a_port_that_one_may_not_use(monkeypatch):
    """No program holds it, and another address would not help."""
    def refuse(host, port): raise PermissionError(13, 'Permission denied')
    monkeypatch.setattr(web_script, 'listen', refuse)
    with pytest.raises(UserError, match='port 80 is reserved .* try --port 8000') as refused: web_script.bind('127.0.0.1', 80)
    assert 'another program' not in str(refused.value)


@pytest.mark.parametrize('cores, threads', [(2, 1), (8, 7), (1.5, 1), (1, 1)])
def test_cores_that_may_not_be_used_get_no_thread(cores, threads, monkeypatch):
    """A container's share of a machine with 64 cores."""
    set_to = []
    monkeypatch.setattr(web_script.os, 'cpu_count', lambda: 64)
    monkeypatch.setattr(web_script, 'usable_cores', lambda: cores, raising=False)
    monkeypatch.setattr(web_script.torch, 'set_num_threads', set_to.append)
    assert web_script.use_threads(None) == threads and web_script.use_threads(3) == 3 and set_to == [threads, 3]


def test_from_a_notebook(known, base_directory, capsys):
    save(base_directory, known[1], known[0])
    running = chat_web(ChatWebConfig(device='cpu', port=free_port(), workers=2, page=False), block=False)
    assert f'the API is at {running.url}' in capsys.readouterr().out and get(running.url + '/health')[1]['workers'] == 2
    assert post(running.url + '/v1/chat/completions', ask())[1]['choices'][0]['message']['content'] == SAID
    running.close()
    running.close()
    with pytest.raises(OSError): get(running.url + '/health')


def test_a_wider_address_is_announced():
    from nanochat.scripts.chat_web import hosts_of, warning
    assert 'api-key' in warning(ChatWebConfig(host='0.0.0.0'), None) and warning(ChatWebConfig(host='0.0.0.0'), 'key') is None and warning(ChatWebConfig(), None) is None
    assert hosts_of(ChatWebConfig(host='0.0.0.0')) is None and 'box.lan' in hosts_of(ChatWebConfig(allow_host=('box.lan',))) and '[::1]' in hosts_of(ChatWebConfig(host='::1'))


def test_import_has_no_effect():
    code = "import sys, threading, nanochat.server, nanochat.scripts.chat_web; sys.exit(any(m in sys.modules for m in ('fastapi', 'starlette', 'uvicorn', 'gradio', 'prometheus_client', 'openai')) or threading.active_count() > 1)"
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0


def test_a_refusal_that_nobody_hears_is_not_printed():
    """A client leaves while its request is read, which then fails: asyncio would print a traceback for each."""
    heard, begun = [], threading.Event()
    def reading():
        begun.set()
        time.sleep(.1)
        raise APIError(429, 'full')
    async def receive():
        await asyncio.to_thread(begun.wait)
        return {'type': 'http.disconnect'}
    async def main():
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: heard.append(context))
        line = server.Line(1, 4)
        with pytest.raises(server.ClientGone): await server.in_line(line, receive, reading)
        while line.work: await asyncio.sleep(.01)
        await asyncio.sleep(.05)
        gc.collect()
    asyncio.run(main())
    assert not heard
