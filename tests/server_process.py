"""What the server's tests share: two tiny models, a real server process, and plain sockets to be rude with."""
import contextlib, functools, json, os, signal, socket, subprocess, sys, time, urllib.error, urllib.request
from pathlib import Path

import torch

from nanochat.checkpoint_manager import init_run, run_dir, save_checkpoint
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import SPECIAL_TOKENS, RustBPETokenizer
from warm_python import warm_python

TEXT = ['What is 12 * 7? That is 84 eggs. naïve café, 你好世界, مرحبا بالعالم, 🦜🦜 def f(x): return x'] * 3
QUESTION = 'What is 12 * 7?'
PARTS = [{'type': 'text', 'text': 'That is '}, {'type': 'python', 'text': '12*7'}, {'type': 'python_output', 'text': '84'}, {'type': 'text', 'text': ' eggs 🦜🦜, 你好世界, مرحبا بالعالم!'}]
SAID = 'That is <<12*7=84>> eggs 🦜🦜, 你好世界, مرحبا بالعالم!'


def tiny_gpt(tok, length=256, seed=0):
    """A GPT of one layer with random weights, in float32."""
    config = GPTConfig(sequence_len=length, vocab_size=tok.get_vocab_size(), n_layer=1, n_head=2, n_kv_head=2, n_embd=64, window_pattern='L')
    with torch.device('meta'): model = GPT(config)
    model.to_empty(device='cpu')
    torch.manual_seed(seed)
    model.init_weights()
    return model.float()


def tokenizer(): return RustBPETokenizer.train_from_iterator(TEXT, 320)


@functools.cache
def known_by_heart():
    """(tokenizer, model), learnt once for all tests of a session."""
    tok = tokenizer()
    return tok, knowing_model(tok)


def knowing_model(tok):
    """A model that has learnt one answer by heart: a tool call, emoji, Chinese and Arabic, many of their characters cut in two by the tokenizer."""
    ids, mask = tok.render_conversation({'messages': [{'role': 'user', 'content': QUESTION}, {'role': 'assistant', 'content': PARTS}]})
    model, ids = tiny_gpt(tok), torch.tensor([ids])
    targets = torch.where(torch.tensor([mask[1:]]) == 1, ids[:, 1:], -1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(300):
        loss = model(ids[:, :-1], targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < .01: return model.eval()
    raise AssertionError(f'the model did not learn its line: loss {loss}')


def endless_model(tok, length=4096):
    """A model that says nonsense and, among its 20 favourite tokens, never the end: rows of its head for special tokens are zero, the others wild."""
    model = tiny_gpt(tok, length)
    with torch.no_grad():
        for p in model.parameters(): p.copy_(torch.randn(p.shape) * (.5 if p.ndim < 2 else p.shape[-1]**-.5))
        model.lm_head.weight.mul_(20)
        model.lm_head.weight[[tok.encode_special(s) for s in SPECIAL_TOKENS]] = 0
    return model.eval()


def save(base, model, tok, phase='sft'):
    """A run directory as training leaves it."""
    before, os.environ['NANOCHAT_BASE_DIR'] = os.environ.get('NANOCHAT_BASE_DIR'), str(base)
    try: save_checkpoint(init_run(run_dir(phase, 'd1'), dict(depth=1), tok, torch.device('cpu')), 7, model)
    finally: os.environ.pop('NANOCHAT_BASE_DIR') if before is None else os.environ.update(NANOCHAT_BASE_DIR=before)


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


class Process:
    """A real `python -m nanochat.scripts.chat_web`; `url` is where it listens. `warm`: forked, behind a stand-in that passes signals on, so that its process number is not the server's."""
    def __init__(self, base, *flags, page=False, warm=False, **env):
        self.port = free_port()
        self.url, self.log = f'http://127.0.0.1:{self.port}', Path(base)/f'server-{self.port}.log'
        command = [warm_python().python if warm else sys.executable, '-m', 'nanochat.scripts.chat_web', '--device', 'cpu', '--port', str(self.port), *([] if page else ['--no-page']), *flags]
        environment = {**(warm_python().environ() if warm else os.environ), 'NANOCHAT_BASE_DIR': str(base), 'NANOCHAT_DTYPE': 'float32', 'OMP_NUM_THREADS': '1', **env}
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=self.log.open('w'), text=True)
        self.hello = self.process.stdout.readline()
        assert self.url in self.hello, self.errors()

    def errors(self): return self.log.read_text()
    def get(self, path): return get(self.url + path)
    def post(self, path, body, **headers): return post(self.url + path, body, **headers)
    def worker(self): return self.get('/stats')[1]['workers'][0]
    def signal(self, which=signal.SIGTERM): self.process.send_signal(which)

    def close(self):
        """End it and return its exit code."""
        if self.process.poll() is None: self.signal()
        try: return self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError('the server did not end: ' + self.errors())
        finally: self.process.stdout.close()

    def __enter__(self): return self
    def __exit__(self, *exc): self.close()


def ask(text=QUESTION, **kw): return {'messages': [{'role': 'user', 'content': text}], 'temperature': 0, **kw}


def read(request):
    """(status, JSON or text, headers) of an answer, errors included."""
    try: answer = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as e: answer = e
    with answer:
        body = answer.read().decode()
        return answer.status, json.loads(body) if answer.headers['content-type'].startswith('application/json') else body, answer.headers


def get(url, **headers): return read(urllib.request.Request(url, headers=headers))


def post(url, body, **headers):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return read(urllib.request.Request(url, data, {'Content-Type': 'application/json'} | {k.replace('_', '-'): v for k, v in headers.items()}))


def check_error(status, answer, expected=None):
    """An error has OpenAI's form, whatever it is."""
    assert status >= 400 and (expected is None or status == expected), (status, answer)
    error = answer['error']
    assert {'message', 'type', 'param', 'code'} <= set(error) and isinstance(error['message'], str) and error['message'] and isinstance(error['type'], str)
    return error


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(.01)
    return found


class Wire:
    """A client without manners: a socket that sends what it likes and reads when it likes."""
    def __init__(self, port, receive_buffer=None):
        self.socket, self.data = socket.socket(), b''
        if receive_buffer: self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(30)
        self.socket.connect(('127.0.0.1', port))

    def post(self, path, body):
        data = json.dumps(body).encode()
        self.send(f'POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n'.encode() + data)
        return self

    def send(self, data): self.socket.sendall(data)

    def read_until(self, *marks):
        while not any(mark in self.data for mark in marks):
            new = self.socket.recv(65536)
            assert new, f'closed before {marks!r}: {self.data[-300:]!r}'
            self.data += new
        return self.data

    def read_all(self):
        """All until the server closes, or the stream's end."""
        while not self.data.endswith(b'0\r\n\r\n'):
            with contextlib.suppress(ConnectionError):
                if new := self.socket.recv(65536):
                    self.data += new
                    continue
            break
        return self.data

    def close(self): self.socket.close()
    def __enter__(self): return self
    def __exit__(self, *exc): self.close()


def events(text):
    """The JSON objects of a stream of server-sent events, whose form is checked; '[DONE]' stays a string."""
    text = text.decode() if isinstance(text, bytes) else text
    assert text.endswith('\n\n') and all(line.startswith('data: ') for line in text.split('\n\n')[:-1])
    return [line[6:] if line == 'data: [DONE]' else json.loads(line[6:]) for line in text.split('\n\n')[:-1]]


def text_of(stream): return ''.join(c['delta'].get('content', '') for e in stream if isinstance(e, dict) for c in e.get('choices', []))
