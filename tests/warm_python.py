"""A `python` and a `torchrun` that start at once, for tests of shell scripts that start dozens of processes.

One process imports torch and this package, then forks for every request. What it runs, and how (module, arguments, environment, working
directory, standard streams, exit code), is what the real interpreter would be given; torchrun's own agent and rendezvous are the real ones.
What differs: modules are already imported, and the processes are children of that one process, not of the script.

    warm = warm_python()  # the same one for all files of a test process
    subprocess.run(['bash', 'runs/x.sh'], env=warm.environ(NANOCHAT_BASE_DIR='...'))
    subprocess.run([warm.python, '-m', 'nanochat.x'], env=warm.environ())
"""
import atexit, functools, gc, json, os, select, signal, socket, subprocess, sys, tempfile, time
from pathlib import Path

REAL = sys.executable

SHIM = r'''
import json, os, signal, socket, sys
s = socket.socket(socket.AF_UNIX)
s.connect(os.environ['WARM_PYTHON'])
message = json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]).encode()
socket.send_fds(s, [len(message).to_bytes(4, 'big')], [0, 1, 2])
s.sendall(message)
for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, lambda n, _: s.sendall(bytes([n])))
code = s.recv(1)
sys.exit(code[0] if code else 1)
'''


def run_job(args):
    """What `python ARGS` would do, in this forked process; returns the exit code."""
    import runpy, traceback, warnings
    warnings.simplefilter('ignore')
    sys.executable = os.environ['PYTHON_EXEC']  # what it starts is warm, too
    while args[:1] == ['-u']: args = args[1:]
    try:
        if args[:1] == ['-m']:
            sys.argv = args[1:]
            runpy.run_module(args[1], run_name='__main__', alter_sys=True)
        elif args[:1] == ['-c']:
            sys.argv = ['-c', *args[2:]]
            exec(compile(args[1], '<string>', 'exec'), {'__name__': '__main__'})
        else: os.execv(REAL, [REAL, *args])
    except SystemExit as e:
        if isinstance(e.code, str): print(e.code, file=sys.stderr)
        return e.code if isinstance(e.code, int) else int(e.code is not None)
    except KeyboardInterrupt: return 130
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def serve_one(connection):
    """Fork the job of one connection, pass signals on, answer with its exit code."""
    head, fds, _, _ = socket.recv_fds(connection, 4, 3)
    message, size = b'', int.from_bytes(head, 'big')
    while len(message) < size: message += connection.recv(65536)
    args, env, folder = json.loads(message)
    job = os.fork()
    if not job:
        for number, fd in enumerate(fds): os.dup2(fd, number)
        for fd in (*fds, connection.fileno()): os.close(fd)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(env)
        code = run_job(args)
        for stream in (sys.stdout, sys.stderr): stream.flush()
        os._exit(code)
    for fd in fds: os.close(fd)
    while True:
        ended, status = os.waitpid(job, os.WNOHANG)
        if ended: break
        if select.select([connection], [], [], .01)[0]:
            asked = connection.recv(1)
            os.kill(job, asked[0] if asked else signal.SIGKILL)  # nothing: the one who asked is gone
            if not asked: os.waitpid(job, 0); os._exit(0)
    code = os.waitstatus_to_exitcode(status)
    try: connection.sendall(bytes([code if code >= 0 else 128 - code]))
    except OSError: pass
    os._exit(0)


def listen(path):
    """Fork for every request, until the process that started this one is gone."""
    gc.collect()
    gc.freeze()  # no collection in a fork touches, and so copies, the pages of all these modules
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests were started in the background, which ignores it
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    parent = os.getppid()
    while os.getppid() == parent:
        if not select.select([listener], [], [], 1)[0]: continue
        connection, _ = listener.accept()
        if not os.fork():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            serve_one(connection)
        connection.close()


def serve(path):
    """Import, listen, fork."""
    import importlib, pkgutil
    import numpy, pyarrow.parquet, rustbpe, safetensors.torch, tiktoken, tokenizers, torch._dynamo, torch.distributed.run, tyro, matplotlib.figure, matplotlib.backends.backend_svg  # noqa: F401, E401
    import nanochat.core_eval, nanochat.leaderboard, nanochat.scripts, nanochat.tasks.pydoc  # noqa: F401, E401
    for m in pkgutil.iter_modules(nanochat.scripts.__path__):
        if m.name != 'chat_web': importlib.import_module(f'nanochat.scripts.{m.name}')
    torch.empty(2).sum()
    nanochat.tasks.pydoc.pydoc_index()  # three seconds for every process that fine-tunes in a new base directory
    listen(path)


class WarmPython:
    """The folder with the two commands, and the process behind them."""
    def __enter__(self):
        self.folder = Path(tempfile.mkdtemp(prefix='warm'))
        bin = self.folder/'bin'
        bin.mkdir()
        (self.folder/'shim.py').write_text(SHIM)
        for name, command in (('python', f'exec {sys.executable} -IS {self.folder}/shim.py "$@"'), ('python3', f'exec {sys.executable} -IS {self.folder}/shim.py "$@"'),
                              ('torchrun', f'exec {bin}/python -m torch.distributed.run "$@"')):
            (bin/name).write_text(f'#!/bin/sh\n{command}\n')
            (bin/name).chmod(0o755)
        self.bin, self.python, self.socket = bin, str(bin/'python'), self.folder/'socket'
        self.process = subprocess.Popen([sys.executable, __file__, str(self.socket)], env=os.environ | dict(OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1', MPLBACKEND='Agg', NANOCHAT_BASE_DIR=str(self.folder/'base')))
        while not self.socket.exists():
            assert self.process.poll() is None, 'the warm interpreter did not start'
            time.sleep(.02)
        return self

    def environ(self, **more):
        """An environment whose `python` and `torchrun` are warm."""
        return os.environ | dict(PATH=f'{self.bin}{os.pathsep}{os.environ["PATH"]}', WARM_PYTHON=str(self.socket), PYTHON_EXEC=str(self.bin/'python'), NANOCHAT_SKIP_INSTALL='1',
                                 OMP_NUM_THREADS='1') | more

    def __exit__(self, *exc):
        import shutil
        self.process.kill()
        self.process.wait()
        shutil.rmtree(self.folder)


@functools.cache
def warm_python():
    """One for all files of this test process; it ends with it."""
    warm = WarmPython().__enter__()
    atexit.register(warm.__exit__)
    return warm


if __name__ == '__main__': serve(sys.argv[1])
