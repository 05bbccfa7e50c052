"""What a CPU can check of the code for GPUs: its branches imitated, its calls spied upon. What needs a GPU is skipped, and says so."""
import random
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import nanochat.inference as inference
from imitated_gpu import imitate
from nanochat.engine import Arriving, Engine, Scheduler
from nanochat.gpt import SOFTCAP
from nanochat.inference import CachedGPT, RecordedGPT
from nanochat.native import runner_for
from nanochat.scaling import gpt_config
from test_engine import ByteTokenizer, random_gpt
from test_inference import BUSY, Company

CUDA1 = torch.device('cuda', 1)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs an NVIDIA GPU')
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two NVIDIA GPUs')
SHAPES = {'like depth 12': (12, None), 'like depth 12, grouped': (12, 2), 'like depth 20': (20, None)}


@pytest.fixture(autouse=True)
def exact(fp32): torch.manual_seed(0)


def wide_gpt(depth, kv_heads=None, layers=3, **shape):
    """Three layers, value embeddings in two, as wide as a model of that depth."""
    c = gpt_config(depth, 300, 64, n_kv_head=kv_heads)
    return random_gpt(n_layer=layers, n_head=c.n_head, n_kv_head=c.n_kv_head, n_embd=c.n_embd, window_pattern='SL', **shape)


@torch.inference_mode()
def read_and_step(run, texts, at):
    """Logits (texts, positions, V) after the first `at` tokens, read at once, and after each of the rest, taken as a step."""
    ids, device = torch.tensor(texts), run.device
    cache, slots = run.scratch(len(ids), ids.shape[1]), run.slots(len(ids), ids.shape[1])
    out = [run.read(ids[:, :at].to(device), cache)]
    slots.admit(cache)
    for i in range(at, ids.shape[1]): out.append(run.step(ids[:, i].to(device), slots, i + 1).clone())
    return SOFTCAP * torch.tanh(torch.stack(out, 1).float() / SOFTCAP)


def texts(rows, n): return [[random.Random(i).randrange(300) for i in range(r, r + n)] for r in range(0, rows * n, n)]


# --- what the kernels are given --------------------------------------------------------------------------------------

@pytest.mark.parametrize('shape', SHAPES.values(), ids=SHAPES)
def test_attention_kernels_get_rows_they_can_read(monkeypatch, shape):
    """Every stride but the last of queries, keys, values and mask is a multiple of 8 values: 16 bytes in bf16. And the numbers are those of the forward pass."""
    imitate(monkeypatch)
    model, words, seen, attention = wide_gpt(*shape), texts(2, 34), [], F.scaled_dot_product_attention

    def spy(*qkv, attn_mask, **settings):
        seen.append([t.stride()[:-1] for t in qkv] + [t.stride()[-1] for t in qkv])
        return attention(*qkv, attn_mask=attn_mask, **settings)
    with torch.inference_mode(): truth = model(torch.tensor(words))[:, 29:]
    run = CachedGPT(model)
    with monkeypatch.context() as m:
        m.setattr(F, 'scaled_dot_product_attention', spy)
        found = read_and_step(run, words, 30)
    torch.testing.assert_close(found, truth, atol=2e-3, rtol=1e-3)
    assert len(seen) == 5 * 3 and any(layer.gated for layer in run.read_layers)
    for *strides, q, k, v in seen: assert all(s % 8 == 0 for each in strides for s in each) and q == k == v == 1


def test_a_cpu_keeps_the_gate_as_it_is():
    """C reads these weights: padding is for GPUs only."""
    layers = inference.prepare_layers(wide_gpt(12), inference.Dense)
    assert [len(layer.qkv.weight) for layer in layers if layer.gated] == [18 * 128 + 6] * 2


# --- recordings ------------------------------------------------------------------------------------------------------

def test_recordings_replay_as_rows_come_and_go(monkeypatch):
    """Recorded steps, replayed, against the same steps taken one by one: nothing that changes from step to step may be held by the host."""
    cuda, model = imitate(monkeypatch), random_gpt()
    graphed, eager = RecordedGPT(model), CachedGPT(model)
    for _ in range(2):
        a, b = (Company(run, 8, 400, 0).play(BUSY) for run in (graphed, eager))
        a.cache.idle = True
        for (_, ta, la), (_, tb, lb) in zip(a.all, b.all):
            assert ta == tb
            torch.testing.assert_close(torch.stack(la), torch.stack(lb), atol=1e-3, rtol=1e-3)
    assert 1 < len(cuda.tapes) < 20 and sum(t.replays for t in cuda.tapes) > 5 * len(cuda.tapes)


def test_a_recording_is_made_on_its_own_device(monkeypatch):
    """The thread's current device is another one: device, stream and pool are the runner's, and other threads may allocate meanwhile."""
    cuda = imitate(monkeypatch)
    run = RecordedGPT(random_gpt())
    read_and_step(run, texts(3, 12), 4)
    assert cuda.log and all((r.device, r.stream, r.pool, r.mode) == (run.device, run._stream, run._pool, 'thread_local') for r in cuda.log)
    assert run._stream.device == run.device and {s.device for s in run._stream.waited} == {run.device} and cuda.now() == 'GPU 0'


def test_two_threads_never_record_at_once(monkeypatch):
    """PyTorch allows one recording at a time in a process."""
    cuda, hidden = imitate(monkeypatch), RecordedGPT.hidden
    monkeypatch.setattr(RecordedGPT, 'hidden', lambda *args: (time.sleep(.02), hidden(*args))[1])
    models, found, errors = [random_gpt(n) for n in range(3)], {}, []
    def work(n):
        try: found[n] = read_and_step(RecordedGPT(models[n]), texts(2, 8), 5)
        except AssertionError as e: errors.append(e)
    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert not errors and len(cuda.log) >= 3
    for n, z in found.items(): torch.testing.assert_close(z, read_and_step(CachedGPT(models[n]), texts(2, 8), 5))


# --- devices and threads ---------------------------------------------------------------------------------------------

class OnGPU(torch.Tensor):
    """A tensor that says it is on the second GPU."""
    is_cuda, device = property(lambda self: True), property(lambda self: CUDA1)


def test_tokens_arrive_by_the_stream_of_their_own_gpu(monkeypatch):
    asked, empty, events = [], torch.empty, []
    monkeypatch.setattr(torch, 'empty', lambda *shape, pin_memory=False, **kw: empty(*shape, **kw))
    event = SimpleNamespace(synchronize=lambda: events.append('waited'))
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda device=None: (asked.append(device), SimpleNamespace(record_event=lambda: event))[1])
    arriving = Arriving(torch.tensor([3, 4]).as_subclass(OnGPU))
    assert asked == [CUDA1] and arriving.tolist() == [3, 4] and events == ['waited']


def test_a_scheduler_works_on_the_gpu_of_its_model(monkeypatch):
    """A new thread begins with GPU 0 as its current device, whatever the main thread has set."""
    model, chosen = random_gpt(), []
    scheduler = Scheduler(Engine(model, ByteTokenizer()))
    scheduler.model = SimpleNamespace(config=model.config, get_device=lambda: CUDA1)
    monkeypatch.setattr(torch.cuda, 'set_device', lambda device: chosen.append((device, threading.current_thread().name)))
    with scheduler: list(scheduler.submit([1, 2, 3], max_tokens=2, temperature=0.0))
    assert chosen == [(CUDA1, 'nanochat-scheduler')]


# --- what only a GPU can show ----------------------------------------------------------------------------------------

def on_gpu(model, device='cuda'): return model.to(device)


def error(got, expected): return ((got - expected).norm() / (expected - expected.mean(-1, keepdim=True)).norm()).item()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
@pytest.mark.parametrize('shape', SHAPES.values(), ids=SHAPES)
def test_a_gpu_generates_what_its_forward_pass_says(monkeypatch, shape, dtype):
    """Prompts of several tokens, and steps of several rows, in models as wide as the presets for GPUs."""
    monkeypatch.setenv('NANOCHAT_DTYPE', dtype)
    model, words = on_gpu(wide_gpt(*shape)), texts(3, 60)
    with torch.inference_mode(): truth = model(torch.tensor(words, device='cuda'))[:, 39:].float()
    assert error(read_and_step(runner_for(model), words, 40), truth) < dict(float32=1e-3).get(dtype, 0.05)


@pytest.mark.gpu
@needs_two
def test_a_worker_on_the_second_gpu():
    """The same tokens as on the first one; both at once, and from threads whose current device is GPU 0."""
    models = [on_gpu(random_gpt(), device) for device in ('cuda:0', 'cuda:1')]
    answers = [None, None]
    def work(i):
        with Scheduler(Engine(models[i], ByteTokenizer())) as s:
            tickets = [s.submit(text, max_tokens=20, temperature=0.0) for text in texts(4, 20)]
            answers[i] = [list(t) for t in tickets]
    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert answers[0] is not None and answers[0] == answers[1]


@pytest.mark.gpu
@needs_gpu
def test_other_threads_allocate_while_a_graph_is_recorded():
    """Device memory, pinned memory and copies, from two threads, as a loader and another worker would."""
    going, errors = threading.Event(), []
    def allocate():
        try:
            while not going.wait(0):
                torch.cuda.empty_cache()
                torch.empty(2**20, pin_memory=True).cuda(non_blocking=True).sum().item()
        except Exception as e: errors.append(e)
    threads = [threading.Thread(target=allocate) for _ in range(2)]
    for t in threads: t.start()
    try:
        model = on_gpu(random_gpt())
        for _ in range(3): found = read_and_step(runner_for(model), texts(3, 30), 10)
    finally:
        going.set()
        for t in threads: t.join()
    assert not errors
    torch.testing.assert_close(found, read_and_step(CachedGPT(model), texts(3, 30), 10), atol=1e-3, rtol=1e-3)
