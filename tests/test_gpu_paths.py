"""What a CPU can check of the code for GPUs: its branches imitated, its calls spied upon. What needs a GPU is skipped, and says so."""
import random
import threading
import time
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import nanochat.inference as inference
import nanochat.optim as optim
from imitated_gpu import Tape, imitate
from nanochat.common import Ranks, UserError, distributed, use_gpu
from nanochat.engine import Arriving, Decoder, Draw, Engine, Requests, Scheduler
from nanochat.gpt import SOFTCAP, softcapped_loss
from nanochat.inference import CachedGPT, RecordedGPT
from nanochat.native import runner_for
from nanochat.scaling import gpt_config
from nanochat.train import compiles
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


def error(got, expected): return ((got - expected).norm() / (expected - expected.mean(-1, keepdim=True)).norm()).item()


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


# --- memory and launches ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_long_prompt_takes_few_passes(monkeypatch, dtype):
    """1,024 tokens at once on a GPU, behind what is there already; the same logits as in small pieces, and as the forward pass."""
    monkeypatch.setenv('NANOCHAT_DTYPE', dtype)
    model, text = random_gpt(sequence_len=160), torch.tensor(texts(1, 1500))
    with torch.inference_mode(): truth = model(text)[:, -1]
    imitate(monkeypatch)
    run, lengths, hidden = CachedGPT(model), [], CachedGPT.hidden
    monkeypatch.setattr(CachedGPT, 'hidden', lambda self, ids, *args: (lengths.append(ids.shape[1]), hidden(self, ids, *args))[1])
    cap = lambda z: SOFTCAP * torch.tanh(z.float() / SOFTCAP)
    with torch.inference_mode():
        whole, pieces = run.scratch(1, 1600), run.scratch(1, 1600)
        z = cap(run.read(text, whole))
        for part in text.split(130, 1): again = cap(run.read(part, pieces))
    assert lengths == [1024, 476] + [130] * 11 + [70]
    assert error(z, truth) < (1e-4 if dtype == 'float32' else 0.03) and error(z, again) < (1e-4 if dtype == 'float32' else 0.03)


def test_one_norm_and_one_mask_for_all(monkeypatch):
    """A norm is one kernel, and no layer makes a mask of its own, as PyTorch does of one in bool or in another dtype than the queries'."""
    monkeypatch.setenv('NANOCHAT_DTYPE', 'bfloat16')
    imitate(monkeypatch)
    run, masks, attention = CachedGPT(random_gpt(n_layer=6)), [], F.scaled_dot_product_attention
    slots, ids = run.slots(2, 64), torch.zeros(2, dtype=torch.long)
    monkeypatch.setattr(F, 'scaled_dot_product_attention', lambda *qkv, attn_mask, **kw: (masks.append(attn_mask), attention(*qkv, attn_mask=attn_mask, **kw))[1])
    with torch.inference_mode(), Tape() as tape:
        slots.rows, slots.known = 2, [5, 5]
        run.hidden(ids[:, None], slots, 64, run.step_layers)
    calls = [str(call[0]) for call in tape.calls]
    norms = sum('rms_norm' in c for c in calls) or sum('rsqrt' in c for c in calls)   # CPUs take it apart
    assert norms == 2 * 6 + 1 and sum('linalg_vector_norm' in c for c in calls) == 6
    assert len(masks) == 6 and {m.dtype for m in masks} == {torch.bfloat16} and len({id(m) for m in masks}) == len(set(slots.windows))


def test_idle_recordings_give_way(monkeypatch):
    """Answers of many lengths, one after the other, as in evaluation: only the last size is kept, and the one still in use."""
    imitate(monkeypatch)
    run = RecordedGPT(random_gpt())
    busy = run.slots(4, 64)
    for length in (100, 200, 300, 500):
        slots = run.slots(2, length)
        slots.admit(read_prompt(run, 5))
        run.step(torch.tensor([1]), slots, 6)
        slots.idle = True
    assert [id(c) for c in run._caches] == [id(busy), id(slots)] and {key[0] for key in run._graphs} == {id(slots)}
    assert run.slots(2, 400) is slots and len(run._graphs) == 1, 'the same size finds its recordings again'


@torch.inference_mode()
def read_prompt(run, n):
    cache = run.scratch(1, 64)
    run.read(torch.tensor(texts(1, n)), cache)
    return cache


def test_a_server_reads_longer_chunks_on_a_gpu(monkeypatch):
    engine = Engine(random_gpt(), ByteTokenizer())
    assert (Scheduler(engine).chunk, Scheduler(engine, chunk=7).chunk) == (128, 7)
    imitate(monkeypatch)
    assert (Scheduler(engine).chunk, Scheduler(engine, chunk=7).chunk) == (1024, 7)


def test_an_engine_holds_one_copy_and_can_let_it_go():
    """In training mode the copy is made anew for every call: the old one goes first. Before an update of reinforcement learning it goes altogether."""
    engine, alive = Engine(random_gpt().train(), ByteTokenizer(), in_c=False), weakref.WeakSet()
    make = CachedGPT.__init__
    def count(self, *args):
        assert not alive, 'the last copy is still there'
        make(self, *args)
        alive.add(self)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(CachedGPT, '__init__', count)
        for _ in range(3): engine.generate_many([[1, 2, 3]], max_tokens=2)
    assert len(alive) == 1
    engine.forget()
    assert not alive and len(engine.generate_many([[1, 2, 3]], max_tokens=2)) == 1


def test_only_cuda_copies_without_waiting(monkeypatch):
    """From memory that is not pinned, MPS may read what has been freed (pytorch issue 189690); CUDA takes its own copy first."""
    to, flags = torch.Tensor.to, []
    monkeypatch.setattr(torch.Tensor, 'to', lambda self, *args, non_blocking=False, **kw: (flags.append(non_blocking), to(self, *args, **kw))[1])
    engine = Engine(random_gpt(), ByteTokenizer(), in_c=False)
    decoder = Decoder(engine.runner(), engine.tokenizer, Requests([[1, 2, 3]], [6], [0], 1, Draw()), 1, ahead=True)
    steps = decoder.steps()
    next(steps)
    decoder.batch.rows[0].tools.forced.extend([7, 8])   # as after a tool's answer
    said = [row.token for step in steps for row, _ in step]
    assert said[:2] == [7, 8] and len(flags) > 6 and not any(flags)


# --- devices and compilers -------------------------------------------------------------------------------------------

@pytest.mark.parametrize('world, device, chosen', [(1, 'cuda', []), (1, 'cuda:1', [CUDA1]), (8, 'cuda', [3]), (8, 'cpu', []), (1, 'mps', [])])
def test_each_process_makes_its_gpu_the_current_one(monkeypatch, world, device, chosen):
    found = []
    monkeypatch.setattr(torch.cuda, 'set_device', found.append)
    use_gpu(torch.device(device), Ranks(rank=3, local_rank=3, world_size=world) if world > 1 else Ranks())
    assert found == chosen


def test_several_processes_do_not_share_a_gpu(monkeypatch):
    """NCCL would say "Duplicate GPU detected", each process for itself, minutes later."""
    for name, value in dict(RANK='1', LOCAL_RANK='1', WORLD_SIZE='8').items(): monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, 'set_device', lambda device: pytest.fail('chosen'))
    with pytest.raises(UserError, match='8 processes each takes its own GPU; give --device cuda, not cuda:0'):
        with distributed(torch.device('cuda', 0)): pytest.fail('went on')


@pytest.fixture
def builder(tmp_path, monkeypatch):
    """A machine with a GPU, Triton, Python's headers and, in an otherwise empty PATH, gcc."""
    (tmp_path/'include').mkdir()
    for path in (tmp_path/'gcc', tmp_path/'include'/'Python.h'): path.write_text('#!/bin/sh\n')
    (tmp_path/'gcc').chmod(0o755)
    monkeypatch.setenv('PATH', str(tmp_path))
    monkeypatch.delenv('CC', raising=False)
    monkeypatch.setattr(optim.sysconfig, 'get_path', lambda name, scheme: str(tmp_path/name))
    monkeypatch.setattr(optim.importlib.util, 'find_spec', lambda name: name)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (8, 0))
    optim.can_compile.cache_clear()
    yield tmp_path
    optim.can_compile.cache_clear()


def test_compiling_needs_what_triton_builds_with(builder, monkeypatch):
    able = lambda device='cuda': (optim.can_compile.cache_clear(), optim.can_compile(torch.device(device)))[1]
    assert able() and not able('cpu') and not able('mps')
    for name, value in (('CC', 'no-such-compiler'), ('PATH', '/nowhere')):
        with monkeypatch.context() as m:
            m.setenv(name, value)
            assert not able()
    with monkeypatch.context() as m:
        m.setenv('PATH', '/nowhere')
        m.setenv('CC', str(builder/'gcc'))
        assert able()
    for target, name, value in ((optim.importlib.util, 'find_spec', lambda name: None), (torch.cuda, 'get_device_capability', lambda device: (6, 1))):
        with monkeypatch.context() as m:
            m.setattr(target, name, value)
            assert not able()
    (builder/'include'/'Python.h').unlink()
    assert not able()


def test_models_compile_where_that_can_be(builder):
    cuda = torch.device('cuda')
    assert compiles(None, cuda) and not compiles(False, cuda) and compiles(True, torch.device('cpu')) and not compiles(None, torch.device('cpu'))
    (builder/'gcc').unlink()
    optim.can_compile.cache_clear()
    assert not compiles(None, cuda) and compiles(True, cuda)


def test_what_is_not_a_cpu_takes_the_gpus_way_through_the_loss():
    """On MPS as on CUDA: no wait for the number of targets, no softmax into its own input. The meta device stands for it here."""
    x, w = torch.empty(7000, 32, device='meta', requires_grad=True), torch.empty(320, 32, device='meta', requires_grad=True)
    with Tape() as tape: loss = softcapped_loss(x, w, torch.empty(7000, dtype=torch.long, device='meta'), 300)
    calls = [str(call[0]) for call in tape.calls]
    assert loss.shape == () and sum(c.startswith('aten.mm') for c in calls) == 3, 'all rows at once'
    assert sum('_softmax' in c for c in calls) == 1 and not any('_softmax.out' in c for c in calls)


# --- what only a GPU can show ----------------------------------------------------------------------------------------

def on_gpu(model, device='cuda'): return model.to(device)


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
