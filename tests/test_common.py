"""Writes that survive kills and full disks, metrics that survive any text, progress, command lines, devices and ranks."""
import errno, io, itertools, json, os, re, signal, subprocess, sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st

from nanochat import common
from nanochat.common import (Progress, Ranks, UserError, append_jsonl, atomic_dir, atomic_file, atomic_write, base_dir, cli, compute_dtype,
                             detect_device, exchange, get_ranks, load_config, parse_config, peak_memory_bytes, print0, read_jsonl, require_folder, require_space)


# Files and directories

def replace_all(home: Path, mark: str) -> None:
    """A file, a directory of two files and a line of metrics, each holding the mark."""
    atomic_write(home/'file', mark)
    with atomic_dir(home/'dir') as d:
        for part in 'ab': (d/part).write_text(mark)
    append_jsonl(home/'log.jsonl', dict(mark=mark))


def killed_at(event: int, work) -> bool:
    """Whether a forked child doing `work` was killed (signal 9) before its event number `event`: an open, rename, removal, ..."""
    child, count = os.fork(), itertools.count()
    if child: return os.WIFSIGNALED(os.waitpid(child, 0)[1])
    def hook(name, args):
        if name.split('.')[0] in ('open', 'os', 'shutil', 'ctypes') and next(count) == event: os.kill(os.getpid(), signal.SIGKILL)
    try:
        sys.addaudithook(hook)
        work()
    finally: os._exit(0)


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork and SIGKILL')
def test_kill_9_at_every_step_leaves_the_old_or_the_new(tmp_path):
    (tmp_path/'x').mkdir(), (tmp_path/'y').mkdir()
    if not exchange(tmp_path/'x', tmp_path/'y'): pytest.skip('this file system cannot swap two names in one step')
    replace_all(tmp_path, 'old')
    for event in itertools.count():
        killed = killed_at(event, lambda: replace_all(tmp_path, f'new{event}'))
        file, a, b = ((tmp_path/p).read_text() for p in ('file', 'dir/a', 'dir/b'))
        assert a == b and {file, a} <= {'old', f'new{event}'}, f'killed before event {event}'
        if not killed: break
        replace_all(tmp_path, 'old')
    assert event > 15 and file == a == read_jsonl(tmp_path/'log.jsonl')[-1]['mark'] == f'new{event}'


@pytest.mark.parametrize('swaps', [True, False])
def test_a_directory_is_replaced_whole_with_and_without_a_swap(tmp_path, monkeypatch, swaps):
    if not swaps: monkeypatch.setattr(common, 'exchange', lambda a, b: False)
    target = tmp_path/'deep'/'target'
    for files in ({'one': '1', 'two': '2'}, {'three': '3'}):
        with atomic_dir(target) as d:
            for name, text in files.items(): (d/name).write_text(text)
        assert {p.name: p.read_text() for p in target.iterdir()} == files
    assert [p.name for p in target.parent.iterdir()] == ['target']


@pytest.mark.parametrize('error', [ValueError('x'), KeyboardInterrupt(), OSError(errno.EIO, 'x')])
def test_errors_leave_the_old_and_no_litter(tmp_path, error):
    atomic_write(tmp_path/'file', 'old')
    with atomic_dir(tmp_path/'dir') as d: (d/'a').write_text('old')
    with pytest.raises(type(error)), atomic_file(tmp_path/'file') as p:
        p.write_text('half')
        raise error
    with pytest.raises(type(error)), atomic_dir(tmp_path/'dir') as d:
        (d/'a').write_text('half')
        raise error
    assert (tmp_path/'file').read_text() == (tmp_path/'dir'/'a').read_text() == 'old'
    assert sorted(p.name for p in tmp_path.iterdir()) == ['dir', 'file']


def test_a_rename_that_fails_puts_the_old_directory_back(tmp_path, monkeypatch):
    with atomic_dir(tmp_path/'dir') as d: (d/'a').write_text('old')
    real, calls = os.replace, []
    def second_fails(a, b):
        calls.append(b)
        if len(calls) == 2: raise OSError(errno.EIO, 'input/output error')
        real(a, b)
    monkeypatch.setattr(common, 'exchange', lambda a, b: False)
    monkeypatch.setattr(os, 'replace', second_fails)
    with pytest.raises(OSError), atomic_dir(tmp_path/'dir') as d: (d/'a').write_text('new')
    assert (tmp_path/'dir'/'a').read_text() == 'old' and [p.name for p in tmp_path.iterdir()] == ['dir']


@pytest.mark.parametrize('code,words', [(errno.ENOSPC, 'the disk is full'), (errno.EDQUOT, 'quota'), (errno.EROFS, 'read-only'), (errno.EACCES, 'permission denied')])
def test_a_full_disk_is_a_sentence(tmp_path, code, words):
    for writer in (atomic_file, atomic_dir):
        with pytest.raises(UserError, match=words) as e, writer(tmp_path/'weights'): raise OSError(code, os.strerror(code))
        assert 'NANOCHAT_BASE_DIR' in str(e.value) and not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='needs /dev/full')
def test_a_really_full_device(tmp_path):
    with pytest.raises(UserError, match='full'), atomic_file(tmp_path/'x'):
        with open('/dev/full', 'w') as f: f.write('x')
    assert not list(tmp_path.iterdir())


def test_everything_is_synced_before_it_is_named(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(common, 'fsync_path', lambda p: seen.append((p.name.lstrip('.').split('.')[0], (tmp_path/'dir').exists())))
    with atomic_dir(tmp_path/'dir') as d:
        (d/'sub').mkdir()
        (d/'sub'/'a').touch()
    assert sorted(seen[:-1]) == [('a', False), ('dir', False), ('sub', False)] and seen[-1][1]


def test_space_is_asked_for_where_the_folder_will_be(tmp_path):
    require_space(tmp_path/'not'/'yet'/'there', 1)
    with pytest.raises(UserError, match='free some space'): require_space(tmp_path/'not'/'yet', 10**18)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path/'file').write_text('mine')
    for path in (tmp_path/'file', tmp_path/'file'/'below', tmp_path/'file'/'far'/'below', tmp_path/('x' * 300), Path('/proc/nanochat/here')):
        with pytest.raises(UserError, match=f'cannot write to {path}: .*; give a folder'): require_folder(path)
    for path in (tmp_path, tmp_path/'new', tmp_path/'not'/'yet'): require_folder(path)
    assert [p.name for p in tmp_path.iterdir()] == ['file'] and (tmp_path/'file').read_text() == 'mine', 'nothing is left behind'


def test_base_directory(tmp_path, monkeypatch):
    monkeypatch.setenv('NANOCHAT_BASE_DIR', str(tmp_path/'a'/'b'))
    assert base_dir() == tmp_path/'a'/'b' and base_dir().is_dir()
    (tmp_path/'file').touch()
    monkeypatch.setenv('NANOCHAT_BASE_DIR', str(tmp_path/'file'/'x'))
    with pytest.raises(UserError, match='set NANOCHAT_BASE_DIR'): base_dir()


# Lines of JSON

VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()) | st.sampled_from(['\u2028', '\x85', '\ud800', '\r\n', '\x1c']),
                      lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(), v, max_size=3), max_leaves=8)


def finite(x):
    """The value as JSON can hold it, written another way than the package does."""
    return json.loads(json.dumps(x), parse_constant=lambda name: None)


@settings(max_examples=200, deadline=None)
@given(rows=st.lists(st.dictionaries(st.text(), VALUES, max_size=3), max_size=4))
def test_every_row_comes_back_whatever_it_holds(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp('log')/'metrics.jsonl'
    for r in rows: append_jsonl(path, r)
    assert read_jsonl(path) == [finite(r) for r in rows]
    if rows: # any other reader sees the same lines, and strict JSON
        text = path.read_bytes().decode('ascii')
        assert len(text.splitlines()) == len(rows)
        for line in text.splitlines(): json.loads(line, parse_constant=lambda name: pytest.fail(f'{name} is not JSON'))


@pytest.mark.parametrize('cut', range(1, 30))
def test_a_torn_line_costs_that_line_only(tmp_path, cut):
    path = tmp_path/'log.jsonl'
    append_jsonl(path, dict(n=1))
    with open(path, 'ab') as f: f.write(json.dumps(dict(n=2, text='über'), ensure_ascii=False).encode()[:cut])  # also within a character
    append_jsonl(path, dict(n=3))
    assert [r['n'] for r in read_jsonl(path) if r['n'] != 2] == [1, 3]


def test_lines_written_by_others_are_read(tmp_path):
    (tmp_path/'a.jsonl').write_bytes('{"a": "\u2028ü"}\r\n\n{"b": 1}'.encode())
    assert read_jsonl(tmp_path/'a.jsonl') == [dict(a='\u2028ü'), dict(b=1)] and read_jsonl(tmp_path/'none') == []
    append_jsonl(tmp_path/'sub'/'b.jsonl', dict(path=tmp_path, dtype=torch.float32, n=torch.tensor(2.).item()))
    assert read_jsonl(tmp_path/'sub'/'b.jsonl') == [dict(path=str(tmp_path), dtype='torch.float32', n=2.0)]


# Progress

class Terminal(io.StringIO):
    def isatty(self): return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves only when told to."""
    now = [100.]
    monkeypatch.setattr(common.time, 'monotonic', lambda: now[0])
    return now


def test_terminal_redraws_one_line(clock):
    out = Terminal()
    with Progress(20, 'train', 'steps', file=out) as bar:
        for _ in range(20): clock[0] += .5; bar.update(loss=1.23456)
    text = out.getvalue()
    assert text.count('\n') == 1 and text.endswith('\n') and text.count('\r') == 20
    assert text.split('\r\x1b[2K')[10] == 'train 10/20  50% steps | 2 steps/s ETA 5.0s | loss 1.235'
    assert '20/20 100% steps | 2 steps/s in 10s' in text.split('\r')[-1]


def test_log_file_gets_a_line_now_and_then(clock):
    out = io.StringIO()
    with Progress(100, 'train', file=out, log_every=10) as bar:
        for _ in range(100): clock[0] += 1; bar.update()
    lines = out.getvalue().splitlines()
    assert 8 < len(lines) < 13 and '\r' not in out.getvalue() and '\x1b' not in out.getvalue() and '100/100' in lines[-1]


def test_notebook_updates_one_output(clock, monkeypatch, capsys):
    display, shown, made = pytest.importorskip('IPython.display'), [], []
    class Handle:
        def update(self, data, raw): shown.append(data['text/plain'])
    def first(data, raw, display_id):
        made.append(data)
        return Handle()
    monkeypatch.setattr(common, '_in_notebook', lambda: True)
    monkeypatch.setattr(display, 'display', first)
    with Progress(10, 'train') as bar:
        for _ in range(10): clock[0] += .3; bar.update()
    assert len(made) == 1 and 3 < len(shown) < 8 and '10/10 100%' in shown[-1]
    assert capsys.readouterr() == ('', '')


def test_unknown_total_has_no_eta(clock):
    out = io.StringIO()
    with Progress(None, 'reading', 'docs', file=out) as bar:
        for _ in range(5): clock[0] += 11; bar.update(300)
    lines = out.getvalue().splitlines()
    assert lines[-1] == 'reading 1.5k docs | 27.3 docs/s in 55s' and not any('ETA' in x or '%' in x for x in lines)


def test_resumed_steps_do_not_count_as_speed(clock):
    bar = Progress(100, 'train', file=io.StringIO())
    bar.resume_at(90)
    clock[0] += 5
    bar.update(5)
    assert '95/100  95% it | 1 it/s ETA 5.0s' in bar.line()


def test_nothing_and_zero(clock):
    for total in (0, 1, None):
        out = io.StringIO()
        with Progress(total, 'x', file=out): pass
        assert out.getvalue() == ''
        Progress(total, 'x', file=out).line()


def test_other_ranks_are_silent(monkeypatch, capsys):
    monkeypatch.setenv('RANK', '1'), monkeypatch.setenv('WORLD_SIZE', '2')
    out = io.StringIO()
    with Progress(1, 'x', file=out) as bar: bar.update()
    print0('hello')
    assert out.getvalue() == '' and capsys.readouterr().out == ''


# Ranks, devices, precision

def test_ranks_come_from_torchrun(monkeypatch):
    for k in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE'): monkeypatch.delenv(k, raising=False)
    assert get_ranks() == Ranks(0, 0, 1) and get_ranks().is_main
    for k, v in dict(RANK='9', LOCAL_RANK='1', WORLD_SIZE='16').items(): monkeypatch.setenv(k, v)
    assert get_ranks() == Ranks(rank=9, local_rank=1, world_size=16) and not get_ranks().is_main


def test_precision_asks_the_hardware_and_obeys_the_variable(monkeypatch):
    monkeypatch.delenv('NANOCHAT_DTYPE', raising=False)
    for has, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(common, 'cpu_has_bf16', lambda: has)
        assert compute_dtype('cpu') is dtype
    for capability, dtype in (((7, 5), torch.float32), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda d=None: capability)
        assert compute_dtype('cuda') is dtype
    assert compute_dtype('mps') is torch.float32
    for name in ('float32', 'bfloat16', 'float16'):
        monkeypatch.setenv('NANOCHAT_DTYPE', name)
        assert compute_dtype('cpu') is compute_dtype('cuda') is getattr(torch, name)
    monkeypatch.setenv('NANOCHAT_DTYPE', 'fp8')
    with pytest.raises(UserError, match='float32, bfloat16, float16'): compute_dtype('cpu')


@pytest.mark.parametrize('amx,avx,has', [(True, False, True), (False, True, True), (False, False, False)])
def test_bf16_needs_amx_or_avx512_bf16(monkeypatch, amx, avx, has):
    monkeypatch.setattr(torch.cpu, '_is_amx_tile_supported', lambda: amx, raising=False)
    monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: avx, raising=False)
    assert common.cpu_has_bf16() is has


def test_device_by_argument_variable_or_rank_of_goodness(monkeypatch):
    monkeypatch.delenv('NANOCHAT_DEVICE', raising=False)
    monkeypatch.setattr(common, 'available_devices', lambda: ['cuda', 'cpu'])
    assert detect_device() == torch.device('cuda') and detect_device('cpu') == torch.device('cpu') and detect_device('cuda:1').index == 1
    monkeypatch.setenv('NANOCHAT_DEVICE', 'cpu')
    assert detect_device() == torch.device('cpu') and detect_device('cuda').type == 'cuda'
    with pytest.raises(UserError, match="'mps' is not available here; use one of: cuda, cpu"): detect_device('mps')
    with pytest.raises(UserError, match="'cpu:x' is not a name PyTorch knows; use one of: cuda, cpu"): detect_device('cpu:x')


def test_peak_memory_sees_an_allocation():
    before = peak_memory_bytes()
    torch.ones(64 * 2**20, dtype=torch.uint8)
    assert 10e6 < before <= peak_memory_bytes() < 1e12


@pytest.mark.skipif(sys.platform != 'linux', reason='how Linux counts')
def test_peak_memory_is_this_programs_and_not_its_parents():
    torch.ones(500 * 2**20, dtype=torch.uint8)  # this process has held more than the child ever will
    child = subprocess.run([sys.executable, '-c', 'from nanochat.common import peak_memory_bytes; print(peak_memory_bytes())'], capture_output=True, text=True)
    assert 20e6 < int(child.stdout) < peak_memory_bytes() - 200e6


# The command line

@dataclass
class Stage:
    """A stage."""
    depth: int = 4  # layers
    rate: float = 0.5  # learning rate
    length: int | None = None  # steps
    minutes: float | None = None  # or minutes
    tag: str = 'd4'  # name
    fresh: bool = False  # begin again


def run(capsys, fn, *args):
    """(result or exit code, standard error) of a command line."""
    try: out = cli(Stage, fn, list(args))
    except SystemExit as e: out = e.code
    return out, capsys.readouterr().err


def test_flags_file_and_both(tmp_path):
    (tmp_path/'a.toml').write_text('depth = 6\nrate = 1\ntag = "six"\nfresh = true\n')
    file = str(tmp_path/'a.toml')
    assert cli(Stage, lambda c: c, ['--config', file]) == Stage(6, 1, None, None, 'six', True)
    assert cli(Stage, lambda c: c, ['--depth', '3', f'--config={file}', '--length', '7', '--no-fresh']) == Stage(3, 1, 7, None, 'six', False)
    assert cli(Stage, lambda c: c, ['--', '--depth=9']) == Stage(9)  # what torchrun passes on


@dataclass
class Errand:
    """A stage that must be told something."""
    source: str  # from
    out: str  # to
    seed: int = 0  # order


def test_file_and_flags_share_what_must_be_given(tmp_path, capsys):
    (tmp_path/'a.toml').write_text('out = "b"\nseed = 3\n')
    assert parse_config(Errand, ['--config', str(tmp_path/'a.toml'), '--source', 'a']) == Errand('a', 'b', 3)
    with pytest.raises(SystemExit): parse_config(Errand, ['--config', str(tmp_path/'a.toml')])
    assert '--source' in capsys.readouterr().err


@pytest.mark.parametrize('toml,words', [
    ('detph = 6', 'detph.*it knows: depth, rate'), ('depth = "six"', "depth = 'six', which should be int"), ('depth = 4.5', 'should be int'),
    ('depth = true', 'should be int'), ('fresh = 1', 'should be bool'), ('tag = 4', 'should be str'), ('length = "all"', r'should be int \| None'),
    ('minutes = [1]', 'should be float'), ('depth = ', 'cannot read the config file'), ('[table]\ndepth = 4', 'table')])
def test_a_bad_file_is_one_sentence_and_exit_code_2(tmp_path, capsys, toml, words):
    (tmp_path/'a.toml').write_text(toml)
    code, err = run(capsys, lambda c: pytest.fail('work began'), '--config', str(tmp_path/'a.toml'))
    assert code == 2 and err.count('\n') == 1 and err.startswith('error: ') and re.search(words, err)
    with pytest.raises(UserError, match=words): load_config(Stage, tmp_path/'a.toml')


def test_a_missing_file_or_name(tmp_path, capsys):
    for args in (['--config', str(tmp_path/'none.toml')], ['--config']):
        code, err = run(capsys, lambda c: pytest.fail('work began'), *args)
        assert code == 2 and err.startswith('error: ') and 'Traceback' not in err
    (tmp_path/'bytes.toml').write_bytes(b'tag = "\xff"')
    assert run(capsys, lambda c: 0, '--config', str(tmp_path/'bytes.toml'))[0] == 2


def fails(error):
    """A stage that raises."""
    def stage(cfg): raise error
    return stage


def test_exit_codes(capsys):
    assert run(capsys, lambda c: c.depth, '--depth', '5') == (5, '')
    assert run(capsys, fails(UserError('depth 0 is too small'))) == (2, 'error: depth 0 is too small\n')
    assert run(capsys, fails(KeyboardInterrupt())) == (130, 'stopped; what was finished is saved\n')
    assert run(capsys, fails(OSError(28, 'No space left on device', 'model.safetensors'))) == (2, 'error: there is no space left for model.safetensors; free some and start again\n')
    with pytest.raises(BrokenPipeError): cli(Stage, fails(BrokenPipeError(32, 'a pipe of its own')), [])  # not that of its output
    for bad in (['--depth', 'six'], ['--detph', '6']): assert run(capsys, lambda c: pytest.fail('work began'), *bad)[0] == 2
    with pytest.raises(ZeroDivisionError): cli(Stage, fails(ZeroDivisionError()), [])  # a bug keeps its traceback
    assert parse_config(Stage, []) == Stage()
