"""As much of a GPU as a CPU can imitate: the branches of `nanochat.inference` that only a GPU takes, and CUDA graphs that replay."""
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import nanochat.inference as inference

WAITS = ('_local_scalar_dense', 'nonzero', 'unique')   # the host would wait for the device, which no recording allows


class Tape(TorchDispatchMode):
    """Writes down every operation inside, and does them again with the same memory: a CUDA graph."""
    def __init__(self):
        super().__init__()
        self.calls, self.replays = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(name in str(func) for name in WAITS), f'{func} makes the host wait, in a recording'
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        self.replays += 1
        for func, args, kwargs, out in self.calls:
            again, out = ([x] if isinstance(x, torch.Tensor) else x for x in (func(*args, **kwargs), out))
            for a, b in zip(again, out):
                if a.data_ptr() != b.data_ptr(): b.copy_(a)


class Stream:
    """A stream of one device."""
    def __init__(self, device='GPU 0'): self.device, self.waited = device, []
    def wait_stream(self, other): self.waited.append(other)


class ImitatedCuda:
    """What of `torch.cuda` a recording uses. Each thread begins with 'GPU 0' as its current device. `log`: (device, stream, pool, mode) of each recording."""
    def __init__(self):
        self.here, self.log, self.tapes, self.busy = threading.local(), [], [], threading.Lock()

    def now(self): return getattr(self.here, 'device', 'GPU 0')

    @contextmanager
    def device(self, device):
        before, self.here.device = self.now(), device
        try: yield
        finally: self.here.device = before

    @contextmanager
    def stream(self, stream):
        with self.device(stream.device): yield

    def current_stream(self, device=None): return Stream(device or self.now())

    @contextmanager
    def graph(self, tape, pool=None, stream=None, capture_error_mode='global'):
        assert self.busy.acquire(blocking=False), 'two recordings at once'
        try:
            self.log.append(SimpleNamespace(device=self.now(), stream=stream or Stream(), pool=pool, mode=capture_error_mode))
            self.tapes.append(tape)
            with tape: yield
        finally: self.busy.release()


def imitate(monkeypatch):
    """From now on `nanochat.inference` does on this CPU what it would do on a GPU."""
    cuda = ImitatedCuda()
    monkeypatch.setattr(inference, 'on_cpu', lambda device: False)
    for name in ('device', 'stream', 'current_stream', 'graph'): monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    monkeypatch.setattr(torch.cuda, 'Stream', Stream)
    monkeypatch.setattr(torch.cuda, 'CUDAGraph', Tape)
    monkeypatch.setattr(torch.cuda, 'graph_pool_handle', object)
    return cuda
