"""The sandbox against an attack corpus. Every property is asserted from outside: what the program printed about itself proves nothing,
except where it prints a secret that it should not know. Controls run the same attacks without a sandbox and must succeed."""
import ctypes
import os
import re
import secrets
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from nanochat import execution
from nanochat.common import UserError
from nanochat.execution import LAYERS, ExecutionResult, execute_code, execute_many, sandbox_status, seccomp_filter

ROOT = Path(__file__).resolve().parents[1]
NAMESPACES = ('mount', 'network', 'processes', 'ipc')
CONFIGS = {                          # what is left out, and which layers must then carry the run
    'everything': ((), execution._NEEDS),
    'container': (NAMESPACES, (('landlock',), ('seccomp',), ('no_new_privs',), ('user',), ('limits',))),     # a kernel that forbids namespaces
    'room only': (('landlock', 'seccomp'), tuple((n,) for n in NAMESPACES)),                                   # the second line of defence alone
}
linux = pytest.mark.skipif(sys.platform != 'linux', reason='the walls are those of Linux')
pytestmark = linux


@pytest.fixture(scope='module')
def status():
    return sandbox_status()


def need(status, groups):
    for group in groups:
        if any('got through' in status.layers[layer] for layer in group): pytest.fail(f'a layer is up and does not hold: {status}')
        if all(status.layers[layer] for layer in group): pytest.skip(f"this kernel gives no {' or '.join(group)}: {status.layers[group[0]]}")


@pytest.fixture(params=CONFIGS)
def config(request, status):
    lacking, groups = CONFIGS[request.param]
    need(status, groups)
    return request.param


@pytest.fixture
def run(config):
    def run(code, timeout=15.0, **settings):
        return execute_code(code, timeout, i_understand=config == 'room only', lacking=CONFIGS[config][0], **settings)
    return run


@pytest.fixture
def run_many(config):
    """Several attacks at a time, as {code: result}: most of their time they wait."""
    def run(codes, timeout=15.0, memory=256 * 2**20):
        return dict(zip(codes, execute_many(codes, 6, timeout, memory, i_understand=config == 'room only', lacking=CONFIGS[config][0]), strict=True))
    return run


@pytest.fixture
def strong(status):
    need(status, execution._NEEDS)
    return execute_code


def processes(marker):
    """Numbers of all processes on the machine whose command line carries the marker; a fork keeps its parent's."""
    found = []
    for entry in os.listdir('/proc'):
        if not entry.isdigit(): continue
        try:
            if marker in Path(f'/proc/{entry}/cmdline').read_bytes(): found.append(int(entry))
        except OSError: pass
    return found


def gone(marker, patience=3.0):
    end = time.monotonic() + patience
    while (left := processes(marker)) and time.monotonic() < end: time.sleep(.01)
    return not left


def children():
    """Numbers of this process's own children, zombies included."""
    found = set()
    for entry in os.listdir('/proc') if sys.platform == 'linux' else ():
        if not entry.isdigit(): continue
        try: stat = Path(f'/proc/{entry}/stat').read_text()
        except OSError: continue
        if int(stat.rpartition(')')[2].split()[1]) == os.getpid(): found.add(int(entry))
    return found


@pytest.fixture(autouse=True)
def marker(monkeypatch):
    """Marks the command lines of this test's processes. Afterwards: no process, no descriptor, no zombie is left."""
    marker = f'marker-{secrets.token_hex(8)}'
    monkeypatch.setattr(execution, '_START', f'{execution._START} # {marker}')
    before, family = len(os.listdir('/proc/self/fd')) if sys.platform == 'linux' else 0, children()   # others' tests may have left one for their next
    yield marker.encode()
    assert len(os.listdir('/proc/self/fd')) == before, 'descriptors leaked'
    assert gone(marker.encode()), 'processes are left'
    assert children() <= family, 'children are left, or were never waited for'


@pytest.fixture
def prey():
    """A directory that everybody may read and write, so that nothing but the sandbox protects it, with a secret in it."""
    folder = Path(tempfile.mkdtemp(prefix='prey-'))
    secret = secrets.token_hex(16)
    (folder/'.ssh').mkdir()
    (folder/'.ssh'/'id_ed25519').write_text(secret)
    (folder/'thesis.txt').write_text('three years of work')
    for p in (folder, *folder.rglob('*')): p.chmod(0o777)
    yield folder, secret
    shutil.rmtree(folder, ignore_errors=True)


def state(folder):
    return {str(p.relative_to(folder)): (p.lstat().st_mode, p.lstat().st_mtime_ns, p.lstat().st_nlink, p.read_bytes() if p.is_file() else None) for p in sorted(folder.rglob('*'))}


def unprotected(code, timeout=20):
    """The same program without a sandbox: the control."""
    python = getattr(sys, '_base_executable', sys.executable)
    with tempfile.TemporaryDirectory() as folder: return subprocess.run([python, '-I', '-S', '-c', code], capture_output=True, timeout=timeout, text=True, cwd=folder)


# ---- what ordinary programs may expect

def test_captures_output(run):
    result = run('import sys\nprint("out", __name__)\nprint("err", file=sys.stderr)\nif __name__ == "__main__": print("main ran")')
    assert result == ExecutionResult(True, 'out __main__\nmain ran\n', 'err\n', None, False, False)


@pytest.mark.parametrize('code, error', [
    ('raise ValueError("boom")', 'ValueError: boom'), ('assert 1 == 2', 'AssertionError'), ('assert 1 == 2, "one\\ntwo"', 'AssertionError: one\ntwo'), ('1/0', 'ZeroDivisionError: division by zero'),
    ('def f(:', 'SyntaxError: invalid syntax (program.py, line 1)'), ('x', "NameError: name 'x' is not defined"), ('import numpy', "ModuleNotFoundError: No module named 'numpy'"),
    ('class E(Exception):\n  def __str__(self): raise E\nraise E', 'E: (its message cannot be shown)'), ('raise KeyboardInterrupt', 'KeyboardInterrupt'), ('raise BaseException("b")', 'BaseException: b'),
    ('input()', 'EOFError: EOF when reading a line'), ('def f(): f()\nf()', 'RecursionError: maximum recursion depth exceeded'), ('raise ExceptionGroup("g", [ValueError(1)])', 'ExceptionGroup: g (1 sub-exception)'),
    ('print(1)\n  print(2)', 'IndentationError: unexpected indent (program.py, line 2)'), ('return 1', "SyntaxError: 'return' outside function (program.py, line 1)"),
])
def test_errors_are_told(strong, code, error):
    result = strong(code)
    assert not result.success and result.error == error and not result.timeout and not result.memory_exceeded
    assert error.split(':')[0] in result.stderr and '_run' not in result.stderr


def test_reads_nothing_from_stdin(strong):
    assert strong('import sys; assert sys.stdin.read() == ""').success


def test_shell_and_descriptors_are_not_inherited(run):
    r, w = os.pipe()
    os.set_inheritable(r, True), os.set_inheritable(w, True)
    try:
        os.write(w, b'secret of another pipe')
        result = run('import os\nfor fd in range(3, 2000):\n  try: print(fd, os.read(fd, 99))\n  except OSError: pass', timeout=1)
    finally: os.close(r), os.close(w)
    assert 'secret' not in result.stdout


def test_only_four_descriptors_are_open(run):
    """Input, output, errors, and one of a random number; it is not where the next `open` would look."""
    seen = set()
    for _ in range(3):
        result = run('import os\nfor fd in range(2000):\n  try: os.fstat(fd); print(fd)\n  except OSError: pass')
        assert result.success and result.stdout.split()[:3] == ['0', '1', '2'] and len(result.stdout.split()) == 4
        seen.add(int(result.stdout.split()[3]))
    assert len(seen) > 1 and min(seen) >= 100


def test_installed_packages_are_covered(strong, status):
    need(status, [('mount',)])
    result = strong("import os\ntry: print(os.listdir(os.path.dirname(os.__file__) + '/site-packages'))\nexcept OSError: print([])")
    assert result.success and result.stdout == '[]\n'


ORDINARY = """
import abc, array, asyncio, base64, bisect, calendar, cmath, collections, contextlib, copy, csv, dataclasses, datetime, decimal, difflib, enum, fractions, functools, glob, hashlib, heapq, hmac, html, inspect
import io, ipaddress, itertools, json, logging, math, numbers, operator, os, pathlib, pickle, pprint, queue, random, re, secrets, shutil, sqlite3, statistics, string, struct, sys, tempfile, textwrap, threading
import time, timeit, traceback, types, typing, unicodedata, unittest, uuid, warnings, weakref, xml.etree.ElementTree, zlib, zoneinfo, lzma, bz2, ctypes, multiprocessing, subprocess, socket, ssl, urllib.request
from concurrent.futures import ThreadPoolExecutor
async def double(x):
    await asyncio.sleep(0.001)
    return 2 * x
async def main(): return await asyncio.gather(*map(double, range(5)))
assert asyncio.run(main()) == [0, 2, 4, 6, 8]
with ThreadPoolExecutor(4) as pool: assert list(pool.map(math.factorial, range(5))) == [1, 1, 2, 6, 24]
assert hashlib.sha256(b'x').hexdigest()[:4] == '2d71' and sqlite3.connect(':memory:').execute('select 1+1').fetchone() == (2,)
assert len(os.urandom(8)) == 8 and random.random() < 1 and uuid.uuid4() and time.time() > 0 and datetime.datetime.now()
assert open('/dev/null').read() == '' and os.getcwd() and unicodedata.name('ä') and not os.environ.get('SECRET')
done = []
threading.Thread(target=lambda: (time.sleep(.05), done.append(1))).start()
import atexit
atexit.register(lambda: print('thread', done))
"""


def test_the_standard_library_works(run, config):
    try: import sqlite3, lzma, bz2, ssl  # noqa: F401
    except ImportError as e: pytest.skip(f'this interpreter was built without {e.name}')
    result = run(ORDINARY, timeout=20)
    assert result.success and result.stdout == 'thread [1]\n', result


def test_scratch_is_private_and_vanishes(strong, status):
    need(status, [('mount',)])
    code = 'import os, tempfile\nassert os.listdir(".") == []\nwith open("note", "w") as f: f.write("x")\nos.rename("note", "n2")\nos.mkdir("d")\nwith tempfile.NamedTemporaryFile() as f: print(f.name)\nprint(os.listdir("."))'
    for _ in range(2):
        result = strong(code)
        assert result.success and "'n2'" in result.stdout, result
    assert not os.path.exists('/scratch')


@pytest.mark.parametrize('code', ['', '\n', '# nothing', 'x = 1\r\ny = 2\r\n', '# -*- coding: latin-1 -*-\nassert "ü" == chr(252)', 'try:\n  import sys; sys.exit(0)\nexcept SystemExit: pass', 'π = 3; assert π == 3'])
def test_odd_but_fine(strong, code):
    assert strong(code).success


@pytest.mark.parametrize('code', ['\ufeffx = 1', 'x = "\0"', '\0', '\ud800', 'x = "\ud800"', '(' * 5000, '-' * 100_000 + '1', 'x' * 2**20 + 'y', '[' * 90 + ']' * 90 + '.x', '"' + 'a' * 2**19])
def test_odd_and_wrong(strong, code):
    result = strong(code)
    assert not result.success and result.error


def test_huge_code_is_run_up_to_the_limit(strong):
    line = 'x = 1\n'
    assert strong(line * 60_000, timeout=20).success
    result = strong('#' * (execution.MAX_CODE_CHARS + 1))
    assert not result.success and 'characters of code' in result.error


def test_output_that_is_not_text(run):
    result = run(r'import os; os.write(1, b"a\xff\xfe\x00b"); os.write(2, b"\xc3")')
    assert result.success and result.stdout == 'a\ufffd\ufffd\x00b' and result.stderr == '\ufffd'


def test_bad_settings():
    for settings in (dict(timeout=0), dict(timeout=float('nan')), dict(timeout=-1), dict(maximum_memory_bytes=1000), dict(maximum_output_bytes=-1), dict(lacking=['walls'])):
        with pytest.raises(UserError): execute_code('', **settings)
    with pytest.raises(UserError): execute_many([''], workers=0)
    with pytest.raises(TypeError): execute_code(None)


# ---- success cannot be had by ending early

EARLY = ['import sys; sys.exit(0)', 'import sys; sys.exit()', 'raise SystemExit', 'exit()', 'import os; os._exit(0)', 'import ctypes; ctypes.CDLL(None)._exit(0)', 'import ctypes; ctypes.CDLL(None).exit(0)',
         'import os; os.kill(os.getpid(), 9)', 'import os; os.kill(os.getpid(), 15)', 'import os; os.abort()', 'import ctypes; ctypes.string_at(0)', 'import threading, os; threading.Thread(target=os._exit, args=(0,)).start(); import time; time.sleep(9)',
         'import atexit, os; atexit.register(os._exit, 0)', 'import sys; sys.settrace(lambda *a: __import__("os")._exit(0)); (lambda: 0)()', 'import signal, os, time; signal.signal(14, lambda *a: os._exit(0)); signal.setitimer(signal.ITIMER_REAL, .05); time.sleep(9)',
         'print("done")\nimport os; os._exit(0)', 'import os\nfor fd in range(2000):\n  try: os.write(fd, b"0" * 32 + b" done\\n")\n  except OSError: pass\nos._exit(0)',
         'import os; os.closerange(0, 70000)', 'import os; os.closerange(0, 70000); os._exit(0)', 'import os; os.close(1); os.dup2(2, 1); os._exit(0)', 'import sys\ntry: sys.exit(0)\nfinally: pass', 'import os; os.execv("/bin/true", ["true"])',
         'import faulthandler; faulthandler._sigsegv()', 'class Liar(SystemExit):\n  def __bool__(self): return False\nraise Liar(0)']


def test_ending_early_is_failure(run_many):
    for code, result in run_many([code + '\nassert False, "the test that must not be skipped"' for code in EARLY], timeout=9).items():
        assert not result.success and result.error and not result.timeout, (code, result)


@pytest.mark.parametrize('code', ['import sys; sys.setrecursionlimit(10**9)\ndef f(): f()\nf()', 'import sys; sys.setrecursionlimit(10**9)\nx = []\nfor _ in range(10**6): x = [x]\nprint(x)', 'import re; re.compile("(" * 10**5)', 'eval("-" * 10**5 + "1")'], ids=range(4))
def test_deep_recursion_ends(strong, code):
    result = strong(code, timeout=1.0)
    assert not result.success and result.error


OVERWRITTEN = ['import builtins\nset = setattr\nfor name in dir(builtins):\n  if name not in ("AssertionError", "__build_class__", "__import__"): set(builtins, name, None)',
               'import builtins; builtins.BaseException = builtins.Exception = int; builtins.exec = builtins.print = lambda *a: None', 'import sys; sys.stdout = sys.stderr = sys.__stdout__ = None',
               'import os; os._exit = os.write = lambda *a: None', 'import sys; sys.excepthook = sys.__excepthook__ = lambda *a: __import__("os")._exit(0)', 'import sys; sys.modules.clear()', 'import sys; del sys.modules["builtins"]',
               'class Quiet:\n  def flush(self): raise SystemExit(0)\n  def write(self, x): pass\nimport sys; sys.stdout = sys.stderr = Quiet()', 'import threading; threading._shutdown = lambda: __import__("os")._exit(0)', 'import sys; sys.stdout.close(); sys.stderr.close()']


def test_overwriting_does_not_hide_a_failure(run_many):
    results = run_many([code + '\nassert False' for code in OVERWRITTEN])
    for code, result in results.items(): assert not result.success, code
    assert [r.error for r in results.values()][:2] == ['AssertionError'] * 2  # told as it was, though every builtin is None


@pytest.mark.parametrize('code', OVERWRITTEN[:4], ids=range(4))
def test_overwriting_is_not_a_crime(strong, code):
    """What the code does to its own builtins does not break the report of its success; it may run without its streams, but not flush them."""
    assert strong(code).success == ('sys.stdout = ' not in code)


# ---- the user's files

def reading(path, control=False):
    """Every way I know to read a file; all print what they get. A control, which nothing holds, leaves out what would touch the machine."""
    return f"""
import os, ctypes
path = {str(path)!r}
ways = [lambda: open(path).read(), lambda: os.read(os.open(path, os.O_RDONLY), 999), lambda: open('/proc/self/root' + path).read(), lambda: open('/proc/1/root' + path).read(),
        lambda: open('/proc/{os.getpid()}/root' + path).read(), lambda: open('/proc/self/cwd/../../../../..' + path).read(), lambda: open('../../../../../../..' + path).read(),
        lambda: (os.symlink(path, 'link'), print(open('link').read())), lambda: (os.link(path, 'hard'), print(open('hard').read())), lambda: os.listdir(os.path.dirname(path)),
        lambda: (os.chroot('.'), os.chdir('../../../../../..'), os.chroot('.'), print(open(path).read())), lambda: open('/proc/{os.getpid()}/cwd/pyproject.toml').read(),
        lambda: own_mounts() and print(open('/scratch' + path).read(), open(path).read())]
def own_mounts():
    "A mount table of our own within a user namespace of our own, if we can have one; nothing is mounted outside."
    if libc.unshare(0x10020000) or libc.mount(None, b'/', None, 0x44000, None): return False
    for place in (b'/lib', b'/usr/lib', b'/dev/null', b'/scratch'): libc.umount2(place, 2)
    libc.mount(b'/proc', b'/scratch', b'proc', 0, None), libc.mount(b'/', b'/scratch', None, 4096, None)
    return True
libc, buffer = ctypes.CDLL(None, use_errno=True), ctypes.create_string_buffer(4096)
def by_call(number, *arguments):
    fd = libc.syscall(number, *arguments)
    if fd >= 0: print(buffer.raw[:libc.read(fd, buffer, 4096)])
how = ctypes.create_string_buffer(24)
ways += [lambda: by_call(257, -100, path.encode(), 0), lambda: by_call(2, path.encode(), 0), lambda: by_call(437, -100, path.encode(), how, 24)]
for way in ways[:10 if {control} else None]:
    try: print(way())
    except BaseException as e: pass
for top in ('/', '/root', '/home', '/scratch', '/etc', '/proc', '/sys', '/dev', '/run', '/var', os.path.dirname(path)):
    try: print(top, os.listdir(top))
    except OSError: pass
"""


def test_secrets_cannot_be_read(run, prey):
    folder, secret = prey
    assert secret in unprotected(reading(folder/'.ssh'/'id_ed25519', control=True)).stdout  # the attack works where nothing stops it
    result = run(reading(folder/'.ssh'/'id_ed25519'))
    assert result.success and result.stdout, result
    assert secret not in result.stdout + result.stderr and 'id_ed25519' not in result.stdout and 'thesis' not in result.stdout


@pytest.mark.parametrize('path', [ROOT/'pyproject.toml', Path(execution.__file__), Path('/etc/passwd'), Path('/etc/shadow'), Path('/etc/hostname'), Path('/proc/version'), Path('/proc/cpuinfo'), Path(sys.prefix)/'pyvenv.cfg'], ids=lambda p: p.name)
def test_the_machine_cannot_be_read(run, path):
    try: lines = [line for line in path.read_text().splitlines() if len(line) > 4]
    except OSError: pytest.skip(f'{path.name} is not here or not ours to read')
    result = run(reading(path))
    assert not any(line in result.stdout for line in lines)


def test_the_environment_is_empty(run, monkeypatch):
    secret = secrets.token_hex(16)
    monkeypatch.setenv('HF_TOKEN', secret)
    code = f"""
import os, ctypes
print(dict(os.environ), os.environb)
libc = ctypes.CDLL(None)
libc.getenv.restype = ctypes.c_char_p
print(libc.getenv(b'HF_TOKEN'))
environ = ctypes.POINTER(ctypes.c_char_p).in_dll(libc, 'environ')
for i in range(100):
    if not environ or environ[i] is None: break
    print(environ[i])
for pid in ('self', 1, 2, os.getppid(), {os.getpid()}):
    for name in ('environ', 'cmdline', 'maps', 'mem'):
        try: print(open(f'/proc/{{pid}}/{{name}}', 'rb').read(100000))
        except OSError: pass
"""
    result = run(code)
    assert result.success and secret not in result.stdout
    # what the kernel put on the stack at the start stays there, whatever os.environ says: read upwards from the program's name to the end of the stack
    result = run("import ctypes, os\np = ctypes.c_void_p.in_dll(ctypes.CDLL(None), 'program_invocation_name').value\nfor i in range(10**6): os.write(1, ctypes.string_at(p + i, 1))")
    assert 'MALLOC_ARENA_MAX' in result.stdout and secret not in result.stdout


def test_the_parents_memory_cannot_be_read(run):
    """process_vm_readv, /proc/PID/mem and ptrace against a process that is ours and would allow it."""
    secret = secrets.token_hex(16).encode()
    holder = ctypes.create_string_buffer(secret)
    address, pid = ctypes.addressof(holder), os.getpid()
    code = f"""
import ctypes, os, struct
libc, buffer = ctypes.CDLL(None, use_errno=True), ctypes.create_string_buffer(32)
local, remote = struct.pack('PN', ctypes.addressof(buffer), 32), struct.pack('PN', {address}, 32)
libc.process_vm_readv({pid}, local, 1, remote, 1, 0)
print(buffer.raw)
try:
    with open('/proc/{pid}/mem', 'rb', 0) as f: f.seek({address}); print(f.read(32))
except OSError: pass
print([libc.ptrace(request, {pid}, 0, 0) for request in (16, 0x4206)])
"""
    if os.geteuid() == 0: assert secret in unprotected(code.replace('print([libc.ptrace', '0 and print([libc.ptrace')).stdout.encode()
    result = run(code)
    assert result.success and secret.decode() not in result.stdout and '[-1, -1]' in result.stdout


WRITING = """
import os, shutil, ctypes
folder = %r
thesis = folder + '/thesis.txt'
ways = [lambda: open(folder + '/new', 'w'), lambda: open(thesis, 'a').write('x'), lambda: open(thesis, 'w'), lambda: os.truncate(thesis, 0), lambda: os.chmod(thesis, 0), lambda: os.chown(thesis, 1, 1),
        lambda: os.utime(thesis, (1, 1)), lambda: os.rename(thesis, thesis + '2'), lambda: os.rename(thesis, 'mine'), lambda: os.link(thesis, folder + '/hard'), lambda: os.link(thesis, 'hard'), lambda: os.mkdir(folder + '/dir'),
        lambda: os.symlink(thesis, folder + '/soft'), lambda: os.mkfifo(folder + '/fifo'), lambda: os.mknod(folder + '/node'), lambda: os.setxattr(thesis, 'user.x', b'1'),
        lambda: (os.symlink(folder, 'way'), open('way/new', 'w')), lambda: (os.symlink(thesis, 'file'), open('file', 'w')), lambda: (os.symlink(thesis, 'file2'), os.truncate('file2', 0)), lambda: (os.symlink(thesis, 'file3'), os.chmod('file3', 0)),
        lambda: open('../../../../..' + thesis, 'w'), lambda: open('/proc/self/root' + thesis, 'w'), lambda: ctypes.CDLL(None).syscall(76, thesis.encode(), 0), lambda: ctypes.CDLL(None).syscall(90, thesis.encode(), 0),
        lambda: os.unlink(thesis), lambda: os.unlink(folder + '/.ssh/id_ed25519'), lambda: os.rmdir(folder + '/.ssh'), lambda: shutil.rmtree(folder), lambda: os.system('rm -rf ' + folder)]
for way in ways[%d:]:
    try: way()
    except BaseException: pass
for place in ('/lib', '/usr/lib', os.path.dirname(os.__file__), '/dev', '/dev/shm', '/', '/var/tmp', '/tmp', os.path.expanduser('~%s')):
    try: open(place + '/planted-by-the-sandbox-test', 'w')
    except (OSError, KeyError): pass
print('tried')
"""


def test_files_cannot_be_changed(run, prey, config):
    folder, _ = prey
    before = state(folder)
    result = run(WRITING % (str(folder), 0, 'root'))
    assert result.success and result.stdout == 'tried\n', result
    assert state(folder) == before
    places = ['/lib', '/usr/lib', os.path.dirname(os.__file__), '/dev', '/dev/shm', '/', '/var/tmp', tempfile.gettempdir(), os.path.expanduser('~')]
    assert not [p for p in places if os.path.exists(os.path.join(p, 'planted-by-the-sandbox-test'))]


def test_files_can_be_changed_without_a_sandbox(prey):
    folder, _ = prey
    unprotected(WRITING.split('for place in (')[0] % (str(folder), 0))
    assert not (folder/'thesis.txt').exists()


def test_libraries_are_read_only(strong):
    """The room shows the interpreter's own files; an ordinary user owns them, so that the mount or Landlock must protect them."""
    code = "import os\nfor name in ('chmod', 'utime', 'unlink', 'truncate'):\n  try: getattr(os, name)(os.__file__, *((0o777,) if name == 'chmod' else (0,) if name == 'truncate' else ()))\n  except OSError as e: print(e.errno)"
    before = os.stat(os.__file__)
    assert strong(code).stdout.split() and os.stat(os.__file__) == before


def test_the_room_alone_is_read_only(status):
    """Without Landlock, seccomp or a change of user, root or the owner of the libraries is held by the read-only mounts alone."""
    need(status, [('mount',)])
    code = "import os, sys\nfor place in ['', '/dev', '/lib', '/usr/lib', *sys.path]:\n  try: open(place + '/planted-by-the-sandbox-test', 'w')\n  except OSError as e: pass\n  else: print(place)\nopen('fine', 'w')"
    result = execute_code(code, lacking=set(LAYERS) - {'mount'}, i_understand=True)
    assert result.success and result.stdout == '', result


@pytest.mark.parametrize('size', ['one file', 'many files', 'many names'])
def test_scratch_is_bounded(run, size, config):
    code = {'one file': "with open('f', 'wb') as f:\n  while True: total += f.write(bytes(2**20))", 'many files': "for i in range(10**6):\n  with open(str(i), 'wb') as f: total += f.write(bytes(2**20))",
            'many names': "for i in range(10**6): open(str(i), 'w').close(); total += 1"}[size]
    before = shutil.disk_usage(tempfile.gettempdir()).free
    result = run('total = 0\ntry:\n  ' + code.replace('\n', '\n  ') + '\nexcept OSError: print(total)', timeout=10)
    assert result.success and int(result.stdout) <= 16 * 2**20, result
    assert before - shutil.disk_usage(tempfile.gettempdir()).free < 2**30


# ---- the network

def test_no_connection_leaves(run):
    """A real listener of each kind; afterwards none has been knocked at."""
    name = f'nanochat-{secrets.token_hex(8)}'
    with tempfile.TemporaryDirectory() as folder, socket.socket() as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp, socket.socket(socket.AF_UNIX) as unix, socket.socket(socket.AF_UNIX) as abstract:
        os.chmod(folder, 0o777)
        for s, address in ((tcp, ('127.0.0.1', 0)), (udp, ('127.0.0.1', 0)), (unix, f'{folder}/s'), (abstract, f'\0{name}')):
            s.bind(address)
            s.setblocking(False)
            if s is not udp: s.listen()
        os.chmod(f'{folder}/s', 0o777)
        code = f"""
import socket
for family, kind, address in ((2, 1, ('127.0.0.1', {tcp.getsockname()[1]})), (2, 2, ('127.0.0.1', {udp.getsockname()[1]})), (1, 1, {folder + '/s'!r}), (1, 1, {chr(0) + name!r})):
    try:
        with socket.socket(family, kind) as s:
            s.settimeout(.5)
            if kind == 2: s.sendto(b'knock', address)
            else: s.connect(address)
    except OSError: pass
"""
        def knocked():
            def one(action):
                try: result = action()
                except BlockingIOError: return False
                if isinstance(result[0], socket.socket): result[0].close()
                return True
            return [one(tcp.accept), one(lambda: udp.recvfrom(9)), one(unix.accept), one(abstract.accept)]
        unprotected(code)
        assert knocked() == [True] * 4
        assert run(code).success
        assert knocked() == [False] * 4


def test_no_socket_at_all(strong):
    code = "import socket\nfor family in range(45):\n  for kind in (1, 2, 3, 5):\n    try: socket.socket(family, kind)\n    except OSError: pass\n    else: print('got', family, kind)\na, b = socket.socketpair()\na.sendall(b'x')\nassert b.recv(9) == b'x'"
    result = strong(code)
    assert result.success and result.stdout == ''  # only nameless pairs, as asyncio needs


# ---- other processes

def test_landlock_alone_keeps_signals_and_connections_in(status, victim):
    """Its newer parts, which nothing else would notice missing while seccomp stands before them."""
    need(status, [('landlock',), ('no_new_privs',)])
    if execution._call('syscall', 444, None, 0, 1) < 6: pytest.skip('Landlock here is older than its sixth version (Linux 6.12)')
    with socket.socket() as tcp, socket.socket(socket.AF_UNIX) as abstract:
        tcp.bind(('127.0.0.1', 0)), abstract.bind(f'\0{secrets.token_hex(8)}')
        for s in (tcp, abstract): s.listen(), s.setblocking(False)
        code = f"import os, signal, socket\nfor way in (lambda: os.kill({victim.pid}, signal.SIGURG), lambda: socket.create_connection(('127.0.0.1', {tcp.getsockname()[1]})), lambda: socket.socket(1).connect({abstract.getsockname().decode()!r})):\n  try: way()\n  except OSError as e: print(e.errno)"
        result = execute_code(code, lacking=set(LAYERS) - {'landlock', 'no_new_privs'}, i_understand=True)
        for s in (tcp, abstract):
            with pytest.raises(BlockingIOError): s.accept()
    assert result.stdout == '1\n13\n1\n' and victim.poll() is None


@pytest.fixture
def victim():
    """A process of our own user that ends when SIGURG reaches it; everybody else ignores that signal, should the attack succeed."""
    process = subprocess.Popen([getattr(sys, '_base_executable', sys.executable), '-I', '-S', '-c', 'import signal, os\nsignal.signal(signal.SIGURG, lambda *a: os._exit(3))\nprint("ready", flush=True)\nwhile True: signal.pause()'], stdout=subprocess.PIPE)
    process.stdout.readline()
    yield process
    process.kill(), process.wait(), process.stdout.close()


SIGNALS = """
import os, signal, ctypes, fcntl, threading
pid, group = %d, %d
libc = ctypes.CDLL(None, use_errno=True)
def by_input():
    "The kernel sends the signal when there is something to read."
    r, w = os.pipe()
    fcntl.fcntl(r, 10, signal.SIGURG)
    fcntl.fcntl(r, fcntl.F_SETOWN, pid)
    fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC)
    os.write(w, b'x')
ways = [lambda: os.kill(pid, signal.SIGURG), lambda: os.killpg(group, signal.SIGURG), lambda: os.kill(-1, signal.SIGURG), lambda: libc.syscall(200, pid, 23), lambda: libc.syscall(234, pid, pid, 23), by_input,
        lambda: libc.syscall(424, libc.syscall(434, pid, 0), 23, 0, 0), lambda: libc.syscall(129, pid, 23, ctypes.create_string_buffer(128)), lambda: os.kill(os.getppid(), 9), lambda: os.kill(0, signal.SIGURG)]
for way in ways[:%d]:
    try: way()
    except OSError: pass
"""


def test_nobody_is_signalled(run, victim):
    result = run(SIGNALS % (victim.pid, os.getpgrp(), 99))
    time.sleep(.05)
    assert victim.poll() is None and (result.success or result.error)


@pytest.mark.parametrize('way', [0, 5])
def test_signals_arrive_without_a_sandbox(victim, way):
    code = (SIGNALS % (victim.pid, os.getpgrp(), 99)).replace('ways[:99]', f'ways[{way}:{way + 1}]')
    unprotected(code)
    assert victim.wait(5) == 3


FORKS = {
    'fork bomb': 'import os\nwhile True:\n  try: os.fork()\n  except OSError: pass',
    'thread bomb': 'import threading, time\nwhile True:\n  try: threading.Thread(target=time.sleep, args=(99,)).start()\n  except RuntimeError: pass',
    'ctypes fork bomb': 'import ctypes\nl = ctypes.CDLL(None)\nwhile True: l.fork(), l.vfork() if 0 else 0, l.syscall(57), l.syscall(56, 17, 0, 0, 0, 0)',
    'subprocesses': 'import subprocess, sys\nwhile True:\n  try: subprocess.Popen([sys.executable, "-c", "while 1: pass"])\n  except Exception: pass',
}


@pytest.mark.parametrize('name', FORKS)
def test_bombs_are_bounded(run, name, marker):
    most, stop = 0, threading.Event()
    def watch():
        nonlocal most
        while not stop.is_set(): most = max(most, sum(len(os.listdir(f'/proc/{p}/task')) for p in processes(marker) if os.path.exists(f'/proc/{p}/task')))
    def tasks(): 
        try: watch()
        except OSError: tasks()
    watcher = threading.Thread(target=tasks)
    watcher.start()
    start = time.monotonic()
    try: result = run(FORKS[name], timeout=.5)
    finally: stop.set(), watcher.join()
    assert not result.success and 0 < most <= 75 and (result.timeout or name == 'thread bomb')
    assert time.monotonic() - start < 10


LINGERERS = {
    'daemon': 'import os, time\nif os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0:\n    time.sleep(600)\n  os._exit(0)',
    'pipe holder': 'import os, time\nif os.fork() == 0: time.sleep(600)',
    'stubborn': 'import os, signal, time\nfor s in range(1, 64):\n  try: signal.signal(s, signal.SIG_IGN)\n  except (OSError, ValueError): pass\nif os.fork() == 0:\n  os.setsid()\n  while True: time.sleep(1)',
    'threads': 'import threading, time\nthreading.Thread(target=time.sleep, args=(600,), daemon=True).start()',
    'group leader': 'import os, time\nif os.fork() == 0:\n  os.setpgid(0, 0)\n  os.closerange(0, 3)\n  time.sleep(600)',
}


@pytest.mark.parametrize('name', LINGERERS)
def test_nothing_outlives(run, name, marker):
    start = time.monotonic()
    run(LINGERERS[name], timeout=10)
    assert time.monotonic() - start < 8 and gone(marker)


ENDLESS = ['while True: pass', 'import time; time.sleep(600)', 'import signal\nfor s in range(1, 64):\n  try: signal.signal(s, signal.SIG_IGN)\n  except (OSError, ValueError): pass\nwhile True: pass', 'while True:\n  try:\n    while True: pass\n  except BaseException: pass',
           '9**9**9', 'import re; re.match("(a+)+$", "a" * 40 + "b")', 'import os; r, w = os.pipe(); os.read(r, 1)', 'import signal; signal.pause()', 'import threading; threading.Lock().acquire(); l = threading.Lock(); l.acquire(); l.acquire()',
           'import threading, time; threading.Thread(target=time.sleep, args=(600,)).start()', 'import atexit, time; atexit.register(time.sleep, 600)', 'class E(Exception):\n  def __str__(self):\n    while True: pass\nraise E', 'import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)',
           'import ctypes; ctypes.CDLL(None).pause()', 'import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nwhile True: pass', 'import sys\nsys.stdin.close()\nwhile True: pass', 'import os\nos.closerange(0, 9999)\nwhile True: pass']


def test_the_deadline_holds(run_many):
    start = time.monotonic()
    for code, result in run_many(ENDLESS, timeout=.4).items():
        assert result.timeout and not result.success and result.error == 'still running after 0.4 s', (code, result)
    assert time.monotonic() - start < len(ENDLESS)  # they sleep or spin for ever


def test_processor_seconds_are_limited(strong):
    """Four busy threads inside C code cannot use more than the timeout plus a second of processor time, whatever the clock says."""
    result = strong('import resource; print(resource.getrlimit(resource.RLIMIT_CPU))', timeout=2.5)
    assert result.stdout == '(4, 4)\n'


# ---- memory and output

MEMORY = ['x = "a" * 10**10', 'x = [0] * 10**9', 'x = []\nwhile True: x.append(bytearray(2**20))', 'x = "a"\nwhile True: x += x', 'import mmap; mmap.mmap(-1, 2**30)', 'import mmap\nx = []\nwhile True: x.append(mmap.mmap(-1, 2**22)); x[-1][::4096] = b"x" * 1024',
          'x = {}\nwhile True: x[len(x)] = [x]', 'def f(): yield from f()\nx = [[] for _ in range(10**8)]', 'import mmap; mmap.mmap(-1, 2**30, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)',
          'import resource\nfor r in (resource.RLIMIT_AS, resource.RLIMIT_DATA):\n  try: resource.setrlimit(r, (resource.RLIM_INFINITY,) * 2)\n  except (OSError, ValueError): pass\nx = bytearray(2**30)']


def test_memory_is_bounded(run_many):
    for code, result in run_many(MEMORY, timeout=20, memory=64 * 2**20).items():
        assert not result.success and result.memory_exceeded and not result.timeout, (code, result)


def test_memory_is_bounded_as_seen_from_outside(run, marker):
    """The sum over all processes of a run that tries everything at once: forks, shared memory, memory files, the scratch directory, pipes."""
    code = """
import ctypes, mmap, os, time
keep, libc = [], ctypes.CDLL(None)
for _ in range(30):
    try:
        if os.fork() == 0: break
    except OSError: break
def eat(action):
    try:
        while True: keep.append(action())
    except (OSError, MemoryError, ValueError): pass
def memory_file():
    fd = libc.memfd_create(b'x', 0)
    if fd < 0: raise OSError
    os.write(fd, bytes(2**20))
def scratch_file():
    with open(str(time.time_ns()) + str(os.getpid()), 'wb') as f: f.write(bytes(2**20))
eat(scratch_file), eat(memory_file), eat(lambda: bytearray(2**22))
time.sleep(9)
"""
    if run('import os\ntry: os.fork()\nexcept OSError: print("no fork")').stdout != 'no fork\n':
        pytest.skip('without seccomp a run may have many processes, each below the limit: one reason why seccomp is needed')
    most, stop = 0, threading.Event()
    def resident(pid):
        try: return int(Path(f'/proc/{pid}/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')
        except (OSError, IndexError): return 0
    def watch():
        nonlocal most
        while not stop.wait(.02): most = max(most, sum(map(resident, processes(marker))))
    watcher = threading.Thread(target=watch)
    watcher.start()
    try: run(code, timeout=1.5, maximum_memory_bytes=64 * 2**20)
    finally: stop.set(), watcher.join()
    assert 2**20 < most < (64 + 3 * 20) * 2**20  # the program and two small helpers


def test_a_caught_memory_error_is_no_failure(strong):
    result = strong('try: x = bytearray(2**40)\nexcept MemoryError: print("survived")')
    assert result.success and result.stdout == 'survived\n' and not result.memory_exceeded


@pytest.mark.parametrize('code', ['while True: print("x" * 1000)', 'import sys\nwhile True: sys.stderr.write("x" * 1000)', 'import os\nb = b"x" * 2**20\nwhile True: os.write(1, b)', 'import os\nwhile True: os.write(2, b"\\xff" * 65536)',
                                  'print("x" * 10**7)', 'raise Exception("x" * 10**7)', 'import sys; sys.excepthook = print; raise Exception("x" * 10**7)'], ids=range(7))
def test_floods_are_cut(run, code):
    start = time.monotonic()
    result = run(code, timeout=20, maximum_output_bytes=100_000)
    assert not result.success and len(result.stdout) <= 100_000 and len(result.stderr) <= 100_000 and len(result.error) < 2000
    assert time.monotonic() - start < 10


def test_a_flood_of_reports_is_cut(strong):
    result = strong('import os\nwhile True:\n  for fd in range(3, 1100):\n    try: os.write(fd, b"x" * 4096)\n    except OSError: pass', timeout=5)
    assert not result.success


def test_a_report_of_its_own_is_no_exception(strong):
    """Code that walks the frames to the token can say what it likes (the notebook says so); what it says wrongly is its own failure."""
    for words in ('fail zz', 'fail \\xff\\xfe', 'fail 0', 'memory', 'done done'):
        result = strong(f'''
import os, sys
f = sys._getframe()
while 'job' not in f.f_locals: f = f.f_back
for fd in range(3, 1100):
    try: os.write(fd, f.f_locals['job']['token'] + b' {words}\\n')
    except OSError: pass
os._exit(0)''')
        assert not result.success and result.error, (words, result)


def test_output_at_the_limit(strong):
    assert strong('print("x" * 99, end="")', maximum_output_bytes=99).success
    result = strong('print("x" * 100, end="")', maximum_output_bytes=99)
    assert not result.success and result.error == 'more than 99 bytes of output' and result.stdout == 'x' * 99


def test_output_before_the_deadline_is_kept(strong):
    assert strong('print("so far")\nwhile True: pass', timeout=.3).stdout == 'so far\n'


def test_open_files_are_limited(run):
    result = run('import os\nn = 0\ntry:\n  while True: os.dup(0); n += 1\nexcept OSError: print(n)')
    assert result.success and int(result.stdout) < 64


@pytest.mark.parametrize('what', ['RLIMIT_AS', 'RLIMIT_CPU', 'RLIMIT_NOFILE', 'RLIMIT_NPROC', 'RLIMIT_FSIZE', 'RLIMIT_CORE'])
def test_limits_cannot_be_raised(run, what):
    code = f'import resource as r\nbefore = r.getrlimit(r.{what})\nfor new in ((r.RLIM_INFINITY,) * 2, (before[1] + 1,) * 2):\n  try: r.setrlimit(r.{what}, new)\n  except (OSError, ValueError): pass\nassert r.getrlimit(r.{what}) == before and before[1] != r.RLIM_INFINITY'
    assert run(code).success


# ---- the kernel

FORBIDDEN = dict(fork=57, vfork=58, execve=59, execveat=322, ptrace=101, mount=165, umount2=166, pivot_root=155, chroot=161, unshare=272, setns=308, keyctl=250, add_key=248, request_key=249, bpf=321, perf_event_open=298, io_uring_setup=425,
                 userfaultfd=323, memfd_create=319, shmget=29, msgget=68, semget=64, mq_open=240, socket=41, connect=42, bind=49, listen=50, accept=43, sendmsg=46, recvmsg=47, setrlimit=160, sched_setaffinity=203, setpriority=141, process_vm_readv=310,
                 process_vm_writev=311, kcmp=312, pidfd_open=434, pidfd_getfd=438, pidfd_send_signal=424, tkill=200, rt_sigqueueinfo=129, timer_create=222, init_module=175, finit_module=313, kexec_load=246, reboot=169, swapon=167, sethostname=170,
                 setuid=105, setgid=106, setresuid=117, setgroups=116, capset=126, setsid=112, setpgid=109, mknod=133, mknodat=259, chown=92, fchown=93, lchown=94, fchownat=260, setxattr=188, open_by_handle_at=304, name_to_handle_at=303, fanotify_init=300,
                 inotify_init1=294, quotactl=179, acct=163, settimeofday=164, clock_settime=227, adjtimex=159, iopl=172, ioperm=173, personality=135, syslog=103, vhangup=153, lookup_dcookie=212, move_pages=279, mbind=237, mlock=149, mlockall=151, seccomp=317,
                 landlock_create_ruleset=444, mount_setattr=442, fsopen=430, open_tree=428, move_mount=429, modify_ldt=154, remap_file_pages=216, splice=275, vmsplice=278, tee=276, process_madvise=440, memfd_secret=447, cachestat=451, openat2=437, clone3=435)


def test_forbidden_calls_are_refused_by_the_kernel(strong):
    if os.uname().machine != 'x86_64': pytest.skip('the numbers are those of x86-64')
    code = f"import ctypes\nl = ctypes.CDLL(None, use_errno=True)\nfor name, n in {FORBIDDEN}.items():\n  r = l.syscall(n, 0, 0, 0, 0, 0, 0)\n  print(name, r, ctypes.get_errno())"
    result = strong(code)
    assert result.success and len(result.stdout.splitlines()) == len(FORBIDDEN)
    assert [line for line in result.stdout.splitlines() if line.split()[1:] not in (['-1', '1'], ['-1', '38'])] == []


def decide(program, number, arguments=(), architecture=0xc000003e):
    """What a filter answers: an interpreter of the four instructions it is made of, written apart from the assembler."""
    data = struct.pack('<IIQ6Q', number, architecture, 0, *(*arguments, *[0] * (6 - len(arguments))))
    at = accumulator = 0
    while True:
        code, yes, no, k = struct.unpack_from('<HBBI', program, 8 * at)
        at += 1
        if code == 0x20: accumulator, = struct.unpack_from('<I', data, k)
        elif code == 0x06: return k
        else: at += yes if {0x15: accumulator == k, 0x35: accumulator >= k, 0x45: accumulator & k}[code] else no


ALLOW, REFUSE, NO_CALL, KILL = 0x7fff0000, 0x50001, 0x50026, 0x80000000


@pytest.mark.parametrize('private', [True, False])
def test_the_filter_decides_as_listed(private):
    program = seccomp_filter(private, 'x86_64')
    allowed = {n for n in range(1000) if decide(program, n) == ALLOW}
    assert not allowed & set(FORBIDDEN.values()) and {0, 1, 9, 231, 257} <= allowed
    assert bool(allowed & {76, 87, 90, 82, 83, 280}) == private           # truncate, unlink, chmod, rename, mkdir, utimensat
    assert {n for n in range(1000) if decide(program, n) == NO_CALL} == {435, 437}
    assert {decide(program, n | 0x40000000) for n in range(600)} == {NO_CALL}
    for other in (0x40000003, 0xc00000b7): assert {decide(program, n, architecture=other) for n in range(500)} == {KILL}  # 32-bit numbers mean other calls
    clone = lambda flags: decide(program, 56, (flags,))
    assert clone(0x3d0f00) == ALLOW and clone(17) == clone(0x4011) == clone(0x10000000) == clone(0) == REFUSE
    kill = lambda pid: decide(program, 62, (pid & 2**64 - 1, 9))
    assert kill(execution._SELF) == ALLOW and kill(-1) == kill(0) == kill(1) == kill(-execution._SELF) == REFUSE
    assert decide(program, 72, (3, 8)) == decide(program, 72, (3, 10)) == decide(program, 16, (0, 0x5412)) == decide(program, 157, (22,)) == REFUSE  # F_SETOWN, F_SETSIG, TIOCSTI, PR_SET_SECCOMP
    assert decide(program, 302, (0, 9, 0)) == ALLOW and decide(program, 302, (0, 9, 1)) == decide(program, 302, (0, 9, 1 << 32)) == REFUSE
    assert decide(program, 44, (3, 1, 1, 0, 0)) == ALLOW and decide(program, 44, (3, 1, 1, 0, 1 << 40)) == REFUSE


def test_the_filter_of_the_other_machine():
    program = seccomp_filter(True, 'aarch64')
    ask = lambda n, *a: decide(program, n, a, 0xc00000b7)
    assert {ask(n) for n in (63, 64, 222, 94, 56, 98)} == {ALLOW}  # read, write, mmap, exit_group, openat, futex
    assert {ask(n) for n in (221, 281, 117, 40, 198, 203, 200, 97, 268, 51, 279, 425, 280, 241, 217, 219, 130, 240, 157, 146, 91, 33, 54)} == {REFUSE}
    assert ask(220, 0x3d0f00) == ALLOW and ask(220, 17) == REFUSE and ask(435) == NO_CALL and decide(program, 63, (), 0xc000003e) == KILL
    assert seccomp_filter(True, 'riscv64') == b''


def test_numbers_match_the_headers():
    """The table against the kernel's headers, where they are installed."""
    header = Path('/usr/include/x86_64-linux-gnu/asm/unistd_64.h')
    if not header.exists(): pytest.skip('no kernel headers here')
    numbers = {words[1].removeprefix('__NR_'): int(words[2]) for line in header.read_text().splitlines() if len(words := line.split()) == 3 and words[1].startswith('__NR_')}
    rows = [row.split() for row in (execution._ALLOWED + ',' + execution._ALLOWED_IN_PRIVATE).replace('\n', ' ').split(',')]
    ours = {name: int(x86) for name, x86, _ in rows if x86 != '-'} | {name: both[0] for name, (both, *_) in execution._CONDITIONAL.items()}
    assert {n: v for n, v in ours.items() if numbers[n] != v} == {} and {n: v for n, v in FORBIDDEN.items() if numbers.get(n, v) != v} == {}


def test_nobody_inside(run, config):
    """No capability, a user number that is not ours, no way to gain privileges."""
    code = """
import ctypes, os
l = ctypes.CDLL(None, use_errno=True)
header, data = ctypes.create_string_buffer(b'\\x22\\x05\\x08\\x20\\0\\0\\0\\0', 8), ctypes.create_string_buffer(24)
print(l.capget(header, data), data.raw == bytes(24), os.getuid())
for way in (lambda: os.setuid(0), lambda: os.chroot('/'), lambda: os.setgroups([0]), lambda: os.sethostname('x') if hasattr(os, 'sethostname') else os.chroot('/')):
    try: way()
    except OSError: pass
    else: print('power')
"""
    result = run(code)
    assert result.success and 'power' not in result.stdout
    if config == 'room only': assert result.stdout.startswith('0 True') and result.stdout.split()[2] != '0'


def test_the_walls_are_the_kernels(status):
    """Every layer alone stops its probe, and the probe gets through where the layer is missing: so the probes can fail."""
    for layer in LAYERS:
        if status.layers[layer]: continue
        run = execution._drive([execution._PROBES[layer].replace('OUTSIDE', repr(os.readlink('/proc/self/ns/ipc')))], 1, execution._Options(10.0, i_understand=True, lacking=tuple(LAYERS)))[0]
        if layer == 'user' and os.geteuid() != 0: continue  # an ordinary user has no power to lose
        assert not execution._verdict(run).success, layer


# ---- refusing, and saying so

@pytest.mark.parametrize('lacking, missing', [(('seccomp',), 'seccomp'), (('mount', 'landlock'), 'mount or landlock'), (('no_new_privs',), 'no_new_privs'), (('user',), 'user'), (('limits',), 'limits'), (tuple(LAYERS), 'seccomp')])
def test_weaker_modes_are_refused_unless_asked(status, lacking, missing):
    need(status, execution._NEEDS)
    with pytest.raises(UserError) as e: execute_code('import os; os.write(2, b"ran")', lacking=lacking)
    assert missing in str(e.value) and '--i-understand' in str(e.value) and 'was not run' in str(e.value)
    assert execute_code('print("ran")', lacking=lacking, i_understand=True).stdout == 'ran\n'
    weak = sandbox_status(lacking)
    assert not weak.strong and '--i-understand' in str(weak)


def test_refused_before_any_code_runs(status, prey):
    need(status, execution._NEEDS)
    folder, _ = prey
    with pytest.raises(UserError): execute_many([f'open({str(folder/"new")!r}, "w")'] * 3, lacking=tuple(LAYERS))
    assert not (folder/'new').exists()
    execute_code(f'open({str(folder/"new")!r}, "w")', lacking=tuple(LAYERS), i_understand=True)
    assert (folder/'new').exists()                                     # with all walls down it would have been written


def run_as(prefix, program):
    """What a program prints whose process began as `prefix` says; skips where that is not allowed."""
    stub = "import sys, types\nstub = sys.modules['nanochat.common'] = types.ModuleType('nanochat.common')\nstub.UserError = type('UserError', (Exception,), {})\nfrom nanochat.execution import *\n"
    done = subprocess.run([*prefix, sys.executable, '-c', stub + program], capture_output=True, text=True, cwd=Path(execution.__file__).parents[1])
    if done.returncode and not done.stderr.startswith('Traceback'): pytest.skip(f'{prefix[0]} is not allowed here: {done.stderr.strip()[-200:]}')
    assert done.returncode == 0, done.stderr
    return done.stdout


ASK = "print(sandbox_status().strong, [n for n, why in sandbox_status().layers.items() if why])\nprint(execute_code('print(5)').stdout)"
POWERLESS = ['setpriv', '--inh-caps=-all', '--bounding-set=-all']
PLACES = {
    'root of a rootless container': ['unshare', '-U', '-r'],
    'root of a container without capabilities': POWERLESS if hasattr(os, 'geteuid') and os.geteuid() == 0 else ['unshare', '-U', '-r', *POWERLESS],
    'no namespaces left': ['unshare', '-U', '-r', 'sh', '-c', 'echo 0 > /proc/sys/user/max_user_namespaces; exec "$0" "$@"', *POWERLESS],
}


@pytest.mark.parametrize('place', PLACES)
def test_other_places(status, place):
    """Conditions of containers, made with the tools of util-linux: the run adapts, and stays strong where Landlock can replace the room."""
    if not shutil.which('unshare') or not shutil.which('setpriv'): pytest.skip('util-linux is not installed')
    need(status, execution._NEEDS + (('landlock',),))
    strong, _, answer = run_as(PLACES[place], ASK).partition('\n')
    assert strong.startswith('True') and answer == '5\n\n'
    missing = set() if 'rootless' in place else set(NAMESPACES)  # since Linux 5.12 root needs CAP_SETFCAP to appear in a user namespace
    assert all((f"'{layer}'" in strong) == (layer in missing) for layer in LAYERS), strong


def test_status_is_readable(status):
    assert set(status.layers) == set(LAYERS)
    assert all(layer in str(status) for layer in LAYERS) and status._repr_markdown_().count('\n') == len(LAYERS) + 2
    assert 'switched off' in str(sandbox_status(['landlock']))


def test_weak_runs_leave_no_files(status):
    result = execute_code('import os\nprint(os.getcwd())\nopen("x", "w").write("y")\nos.mkdir("d")\nos.mkdir("d/e")\nos.chmod("d", 0)', lacking=tuple(LAYERS), i_understand=True)
    assert result.success and 'nanochat-sandbox-' in result.stdout and not os.path.exists(result.stdout.strip())


# ---- many at once, and interruptions

def test_many_are_as_one(status):
    need(status, execution._NEEDS)
    codes = ['print(1)', 'raise ValueError(2)', 'while True: pass', 'x = "a" * 10**10', 'import os; os._exit(0)', 'print("x" * 10**7)', 'def f(:', '', '#' * (2**20 + 1), 'import sys; print(3, file=sys.stderr)']
    one_by_one = [execute_code(code, 1.0) for code in codes]
    for workers in (1, 3, 20): assert execute_many(codes, workers, 1.0) == one_by_one
    assert execute_many([]) == [] and execute_many(iter(['print(5)']))[0].stdout == '5\n'


def test_many_run_at_the_same_time(status, marker):
    need(status, execution._NEEDS)
    start = time.monotonic()
    assert all(r.success for r in execute_many(['import time; time.sleep(1)'] * 8, workers=8))
    assert time.monotonic() - start < 6


def test_threads_do_not_disturb_each_other(status):
    need(status, execution._NEEDS)
    results = {}
    threads = [threading.Thread(target=lambda i=i: results.update({i: execute_many([f'print({i}, {j})' for j in range(5)], 2)})) for i in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert {i: [r.stdout for r in rs] for i, rs in results.items()} == {i: [f'{i} {j}\n' for j in range(5)] for i in range(4)}


def test_no_descriptor_leaks_over_many_runs(status):
    need(status, execution._NEEDS)
    before = len(os.listdir('/proc/self/fd'))
    execute_many(['pass', 'import os; os._exit(1)', '1/0'] * 20, workers=6)
    assert len(os.listdir('/proc/self/fd')) == before


PARENT = """
import signal, sys, types
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job begins with it ignored
stub = sys.modules['nanochat.common'] = types.ModuleType('nanochat.common')
stub.UserError = type('UserError', (Exception,), {})  # the real one imports torch, which takes seconds
from nanochat import execution
execution._START += ' # ' + sys.argv[1]
lacking = sys.argv[2].split(',') if sys.argv[2] else ()
print('started', flush=True)
try: execution.execute_many(['import time\\nwhile True: time.sleep(.01)'] * 3, 3, 300.0, lacking=lacking, i_understand=sys.argv[3] == '1')
except KeyboardInterrupt: print('interrupted', flush=True); sys.exit(7)
"""


@pytest.mark.parametrize('how', [signal.SIGINT, signal.SIGKILL, signal.SIGTERM], ids=lambda s: s.name)
def test_children_end_with_the_parent(config, marker, how):
    lacking = ','.join(CONFIGS[config][0])
    parent = subprocess.Popen([sys.executable, '-c', PARENT, (mark := secrets.token_hex(8)), lacking, str(int(config == 'room only'))], stdout=subprocess.PIPE, text=True, cwd=Path(execution.__file__).parents[1], start_new_session=True)
    try:
        assert parent.stdout.readline() == 'started\n'
        mine = lambda: processes(f'# {mark}'.encode())
        end = time.monotonic() + 20
        while len(mine()) < 9 and time.monotonic() < end: time.sleep(.02)
        assert len(mine()) >= 9
        parent.send_signal(how)
        code = parent.wait(10)
        assert code == (7 if how == signal.SIGINT else -how)
        end = time.monotonic() + 5
        while mine() and time.monotonic() < end: time.sleep(.02)
        assert mine() == []
    finally:
        parent.kill(), parent.wait(), parent.stdout.close()


# ---- as an ordinary user

# What can depend on who one is: files and their owners, namespaces, process numbers, signals, limits per user, refusals that rest on them.
# Not here: what Python does with the code, deadlines, output, the filter as a table; these are the same for everybody.
WHO = """captures_output or descriptors or installed_packages or standard_library or scratch or secrets or machine_cannot or environment or parents_memory or files_can or libraries or room_alone
connection or socket_at_all or landlock_alone or signalled or signals_arrive or bombs or outlives or processor_seconds or seen_from_outside or open_files or limits_cannot or forbidden_calls or nobody_inside or walls
lacking1 or lacking3 or refused_before or other_places or status_is or weak_runs or children_end"""

DROP = """
import ctypes, os, shutil, sys
base, site, package = sys.argv[1:4]
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *a):
    if getattr(libc, name)(*a) == -1: sys.exit(77)
call('unshare', 0x20000)
call('mount', None, b'/', None, 0x44000, None)
call('mount', b'tmpfs', b'/mnt', b'tmpfs', 0, b'mode=755')
for source, target in ((base, '/mnt/py'), (site, '/mnt/site'), (package, '/mnt/pkg')):
    os.makedirs(target)
    call('mount', source.encode(), target.encode(), None, 4096, None)
os.makedirs('/mnt/nobody', mode=0o700)
os.chown('/mnt/nobody', 65534, 65534)
os.setgroups([]), os.setresgid(65534, 65534, 65534), os.setresuid(65534, 65534, 65534)
os.chdir('/mnt/nobody')
os.execve('/mnt/py/bin/python' + '.'.join(map(str, sys.version_info[:2])), ['/mnt/py/bin/python' + '.'.join(map(str, sys.version_info[:2])), '-B', '-m', 'pytest', '-q', '-x', '-rs', '-p', 'no:cacheprovider', '--rootdir=/mnt/pkg', '--basetemp=/mnt/nobody/t',
           '-k', sys.argv[4], '/mnt/pkg/tests/test_sandbox.py'],
          dict(PYTHONPATH='/mnt/pkg:/mnt/site', HOME='/mnt/nobody', PATH='/usr/bin:/bin', LANG='C.UTF-8', PYTHONDONTWRITEBYTECODE='1', NANOCHAT_SANDBOX_AS_NOBODY='1'))
"""


@pytest.mark.slow
def test_all_of_this_as_an_ordinary_user(tmp_path):
    """Root lends its interpreter to nobody in a private mount table, and nobody runs what in this file can depend on who one is (WHO): user namespaces instead of root's power."""
    if os.geteuid() != 0: pytest.skip('we are an ordinary user already')
    package = tmp_path/'pkg'
    (package/'nanochat').mkdir(parents=True), (package/'tests').mkdir()
    for folder in (tmp_path, package, package/'nanochat', package/'tests'): folder.chmod(0o755)
    (package/'nanochat'/'__init__.py').write_text('')
    (package/'nanochat'/'common.py').write_text('class UserError(Exception): pass\n')
    (package/'pyproject.toml').write_text('# a line that nobody should see from inside\n')
    shutil.copy(execution.__file__, package/'nanochat'/'execution.py'), shutil.copy(__file__, package/'tests'/'test_sandbox.py')
    for p in package.rglob('*.*'): p.chmod(0o644 if p.is_file() else 0o755)
    site = str(Path(pytest.__file__).resolve().parents[1])
    done = subprocess.run([sys.executable, '-c', DROP, sys.base_prefix, site, str(package), ' or '.join(WHO.split('\n'))], capture_output=True, text=True, timeout=300)
    if done.returncode == 77: pytest.skip('root here has no power to mount: the interpreter cannot be shown to another user')
    print(done.stdout[-1500:])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert int(re.search(r'(\d+) passed', done.stdout)[1]) >= 100, done.stdout[-1500:]   # a name that finds nothing would be silent
