"""The terminal chat as a process of its own, with a real (untrained) checkpoint: one prompt, a pipe, a terminal with Ctrl-C."""
import os, re, select, subprocess, sys, time

import pytest
import torch

from nanochat.checkpoint_manager import init_run, run_dir, save_checkpoint
from nanochat.common import cli
from nanochat.gpt import GPT, GPTConfig
from nanochat.scripts.chat_cli import ChatConfig, chat_cli
from nanochat.tokenizer import RustBPETokenizer
from warm_python import warm_python


@pytest.fixture
def checkpoint(base_directory):
    """A tiny random GPT under sft/d1 that never ends an answer by itself within the test's patience."""
    tok = RustBPETokenizer.train_from_iterator(['hello world, how many letters has a word? 12*7 = 84'] * 3, 300)
    config = dict(sequence_len=512, vocab_size=tok.get_vocab_size(), n_layer=1, n_head=2, n_kv_head=2, n_embd=32, window_pattern='L')
    with torch.device('meta'): model = GPT(GPTConfig(**config))
    model.to_empty(device='cpu')
    torch.manual_seed(0)
    model.init_weights()
    run = init_run(run_dir('sft', 'd1'), dict(depth=1), tok, torch.device('cpu'))
    save_checkpoint(run, 3, model)
    return base_directory


def command(*flags): return [sys.executable, '-m', 'nanochat.scripts.chat_cli', '--device', 'cpu', *flags]


def environment(base): return {**os.environ, 'NANOCHAT_BASE_DIR': str(base), 'NANOCHAT_DTYPE': 'float32', 'OMP_NUM_THREADS': '1', 'TERM': 'xterm'}


def run(base, *flags, stdin=''):
    return subprocess.run([warm_python().python, *command(*flags)[1:]], input=stdin, capture_output=True, text=True, env=warm_python().environ(**environment(base)), timeout=120)


def test_seed_decides(checkpoint, capsys):
    said = [(chat_cli(ChatConfig(prompt='hello', device='cpu', temperature=1, max_tokens=20, seed=s)), capsys.readouterr().out)[1] for s in (1, 1, 2)]
    assert said[0] == said[1] != said[2]


def test_answer_is_the_engines(checkpoint):
    """What is printed for one prompt is what the engine says, token for token: no prompt, no banner, no colours."""
    from nanochat.checkpoint_manager import load_model
    from nanochat.chat import Sampling, reply
    from nanochat.engine import Engine
    from nanochat.scripts.chat_cli import harmless
    os.environ['NANOCHAT_DTYPE'] = 'float32'
    try:
        model, tok, _ = load_model('sft', 'cpu')
        *_, answer = reply(Engine(model, tok), [{'role': 'user', 'content': 'hello'}], Sampling(temperature=0, max_tokens=25))
    finally: del os.environ['NANOCHAT_DTYPE']
    out = run(checkpoint, '-p', 'hello', '--max-tokens', '25', '--temperature', '0')
    printed = out.stdout
    assert out.returncode == 0 and len(printed) > 1 and printed.endswith('\n') and '\x1b' not in printed and 'parameters' not in printed, out.stderr
    if all(p['type'] == 'text' for p in answer.parts): assert printed == harmless(''.join(p['text'] for p in answer.parts)) + '\n'


@pytest.mark.parametrize('flags, words', [
    (['--source', 'rl', '-p', 'x'], 'chat_rl'), (['--model-tag', 'd9', '-p', 'x'], 'd9'), (['--step', '99', '-p', 'x'], '99'), (['--source', 'nonsense', '-p', 'x'], 'base, mid, sft, rl'),
    (['-p', 'hello ' * 2000], 'shorten'), (['-p', 'x', '--temperature', '-1'], 'temperature -1.0'), (['-p', 'x', '--temperature', 'nan'], 'temperature nan'), (['-p', 'x', '--max-tokens', '0'], 'max-tokens')])
def test_bad_input_is_one_sentence(checkpoint, capsys, flags, words):
    with pytest.raises(SystemExit) as stop: cli(ChatConfig, chat_cli, ['--device', 'cpu', *flags])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and words in err and err.count('\n') == 1 and out == ''


SPAWN = 'import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))'   # a fork of this process, with all its threads, could hang


class Terminal:
    """A child on a pseudo-terminal, and what it has written."""
    def __init__(self, base, *flags):
        self.process = subprocess.Popen([sys.executable, '-c', SPAWN, *command(*flags)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(base))
        self.text = ''

    def read_some(self):
        if select.select([self.process.stdout], [], [], .1)[0]: self.text += os.read(self.process.stdout.fileno(), 4096).decode(errors='replace')

    def read_until(self, pattern, seconds=120):
        end = time.monotonic() + seconds
        while not re.search(pattern, self.text):
            assert time.monotonic() < end and self.process.poll() is None, f'no {pattern!r} in {self.text[-500:]!r}'
            self.read_some()
        seen, self.text = self.text, ''
        return seen

    def ctrl_c(self, pattern):
        """Press Ctrl-C until `pattern` shows. Once is enough for a person; Python's readline overlooks a signal that comes
        between printing the prompt and waiting for a key, which only a program is fast enough to hit."""
        for _ in range(20):
            self.type('\x03')
            end = time.monotonic() + 5
            while time.monotonic() < end and not re.search(pattern, self.text): self.read_some()
            if re.search(pattern, self.text): break
        return self.read_until(pattern, 1)

    def type(self, text):
        self.process.stdin.write(text.encode())
        self.process.stdin.flush()

    def wait(self, seconds=60):
        end = time.monotonic() + seconds
        while self.process.poll() is None:
            if time.monotonic() > end:
                self.process.kill()
                raise AssertionError(f'still running: {self.text[-300:]!r}')
            self.read_some()
        return self.process.returncode


def test_terminal_ctrl_c_stops_the_answer_not_the_program(checkpoint):
    """A real terminal: the answer is interrupted, the program goes on, answers again, survives Ctrl-C at the prompt and leaves with Ctrl-D."""
    t = Terminal(checkpoint, '--max-tokens', '400', '--temperature', '1.5', '--top-k', '0')
    banner = t.read_until(r'\n> $')
    assert 'sft · d1 · step 3' in banner and 'parameters · cpu' in banner
    t.type('hello\r')
    t.read_until(r'hello\r\n(?s:.{20,})')          # it is answering
    assert '(stopped)' in t.ctrl_c(r'\n> $')
    assert 'Ctrl-C stops an answer' in t.ctrl_c(r'\n> $')   # at the prompt
    t.type('/clear\r')
    t.read_until(r'\n> $', 30)
    t.type('again\r')
    t.read_until(r'again\r\n(?s:.{5,})')
    said = t.ctrl_c(r'\n> $')
    assert re.search(r'\x1b\[2m\d+ tokens · [\d,]+ tokens/s · context \d+/512 · stopped\x1b\[0m', said)   # on a terminal: dim, below the answer
    t.type('\x04')
    assert t.wait() == 0
    pytest.importorskip('readline', reason='this Python has no readline')
    path = checkpoint/'chat_history'             # what was asked yesterday comes back with the arrow key, and is nobody else's business
    assert path.read_text().split()[-3:] == ['hello', '/clear', 'again'] and path.stat().st_mode & 0o077 == 0
    t = Terminal(checkpoint, '--max-tokens', '5')
    t.read_until(r'\n> $')
    t.type('\x1b[A' * 3)
    t.read_until('hello')
    t.type('\x15/quit\r')
    assert t.wait() == 0


def test_commands_from_a_pipe(checkpoint, capsys):
    """/retry answers anew with another seed, /undo forgets, /system is told to the model from the next question on; help for what is none."""
    out = run(checkpoint, '--max-tokens', '30', '--temperature', '1', '--top-k', '0', stdin='/retry\nhello\n/retry\n/undo\n\n/undo\n/system be brief\n/system\n/nonsense\n/quit\nnever\n')
    assert out.returncode == 0, out.stderr
    for words in ('nothing was asked yet', 'taken back: hello', 'nothing to take back', 'on: be brief', 'no system prompt'): assert words in out.stdout
    said = []
    os.environ['NANOCHAT_DTYPE'] = 'float32'
    try:
        for seed in (42, 43): said.append((chat_cli(ChatConfig(prompt='hello', device='cpu', temperature=1, top_k=0, max_tokens=30, seed=seed)), capsys.readouterr().out)[1])
    finally: del os.environ['NANOCHAT_DTYPE']
    assert out.stdout.startswith('(nothing was asked yet)\n' + ''.join(said) + '(taken back') and said[0] != said[1]
    assert 'tokens/s' not in out.stdout and '> ' not in out.stdout[:40] and out.stdout.count('/quit leaves') == 1   # a pipe gets what the model says


def test_what_was_forgotten_is_said(checkpoint):
    """When old turns no longer fit, a note goes to the error stream of a pipe; a question that alone does not fit is one sentence, and the chat goes on."""
    question = 'hello world ' * 25
    out = run(checkpoint, '--max-tokens', '60', stdin='\n'.join([question] * 9) + '\n' + 'hello ' * 2000 + '\nhello\n')
    assert re.search(r'\d+ earlier turns no longer fit into the 512 tokens', out.stderr) and 'please shorten it' in out.stderr
    assert 'earlier turns' not in out.stdout and 'shorten' not in out.stdout
    assert out.returncode == 2 and out.stderr.endswith('error: 1 question could not be answered; why stands above\n')


def shell(base, line):
    """A line of bash with $CHAT in it: (exit status of its first command, stdout, stderr)."""
    env = environment(base) | dict(CHAT=' '.join(command('--max-tokens', '30')))
    done = subprocess.run(['bash', '-c', f'{line}; exit ${{PIPESTATUS[0]}}'], capture_output=True, env=env, timeout=120)
    return done.returncode, done.stdout.decode(errors='replace'), done.stderr.decode()


def test_an_end_of_output_nobody_minds(checkpoint):
    """As other Unix tools: a reader that has gone ends it quietly, a full disk with a sentence; without input it has nothing to do, without output nobody to tell."""
    assert shell(checkpoint, '$CHAT < <(yes hello | head -400) | head -c 1')[::2] == (141, '')
    assert shell(checkpoint, '$CHAT -p hello > /dev/full') == (2, '', 'error: there is no space left; free some and start again\n')
    assert shell(checkpoint, '$CHAT <&-') == shell(checkpoint, '$CHAT -p hello >&-') == (0, '', '')


def test_any_bytes_from_a_pipe(checkpoint):
    code, out, err = shell(checkpoint, r"PYTHONIOENCODING=utf-8:strict $CHAT < <(printf 'caf\xe9\n')")
    assert code == 0 and out and err == ''


def test_history_survives_a_closed_terminal(checkpoint):
    pytest.importorskip('readline', reason='this Python has no readline')
    t = Terminal(checkpoint, '--max-tokens', '5')
    t.read_until(r'\n> $')
    t.type('hello\r')
    t.read_until(r'(?s)hello.*\n> $')
    t.process.kill()
    t.process.wait()
    assert (checkpoint/'chat_history').read_text().split()[-1] == 'hello'


def test_ctrl_c_during_one_prompt_is_130(checkpoint):
    t = Terminal(checkpoint, '-p', 'hello', '--max-tokens', '480', '--temperature', '1.5', '--top-k', '0')
    t.read_until(r'(?s:.{10,})')
    t.type('\x03')
    assert t.wait() == 130
