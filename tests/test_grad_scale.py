"""Dynamic loss scaling: the scale's life, skipped steps, agreement of ranks, and the training loop in fp16."""
import dataclasses
import math
import os
import socket

import pytest
import torch

from nanochat.common import UserError
from nanochat.grad_scale import LOWEST, GradScaler, scaler_for, unscale


def weights(n=3):
    """A parameter, its optimizer with momentum, and a function that gives it a gradient."""
    w = torch.nn.Parameter(torch.arange(float(n)))
    optimizer = torch.optim.AdamW([w], lr=.1)
    return w, optimizer


def test_scale_halves_on_overflow_and_grows_back():
    w, optimizer = weights()
    scaler, scales, made = GradScaler(growth_interval=4), [], []
    for grad in [1.0] * 3 + [math.inf, math.nan] + [1.0] * 9:
        w.grad = torch.full_like(w, grad)
        made.append(scaler.step(optimizer))
        scales.append(scaler.scale / 65536)
    assert made == [True] * 3 + [False] * 2 + [True] * 9
    assert scales == [1, 1, 1, .5, .25, .25, .25, .25, .5, .5, .5, .5, 1, 1] and scaler.skipped == 2 and scaler.good == 1


@pytest.mark.parametrize('bad', [math.inf, -math.inf, math.nan])
def test_a_skipped_step_changes_nothing(bad):
    """Neither weights nor the optimizer's averages nor its step count."""
    w, optimizer = weights()
    scaler = GradScaler()
    w.grad = torch.ones_like(w)
    scaler.step(optimizer)
    before, state = w.detach().clone(), {k: v.clone() for k, v in optimizer.state[w].items()}
    w.grad = torch.tensor([1.0, bad, 1.0])
    assert not scaler.step(optimizer) and torch.equal(w, before)
    assert all(torch.equal(v, state[k]) for k, v in optimizer.state[w].items())


def test_a_step_is_the_step_without_scaling():
    """Scales are powers of two: multiplied and divided, no digit differs."""
    torch.manual_seed(0)
    x = torch.randn(8, 5)
    results = []
    for scaled in (False, True):
        torch.manual_seed(1)
        layer = torch.nn.Linear(5, 3)
        optimizer, scaler = torch.optim.AdamW(layer.parameters(), lr=.01), GradScaler(enabled=scaled)
        for _ in range(10):
            (layer(x).square().mean() * scaler.factor).backward()
            assert scaler.step(optimizer)
            optimizer.zero_grad()
        results.append([p.detach().clone() for p in layer.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_unscale_divides_in_place_and_looks_at_every_gradient():
    ps = [torch.nn.Parameter(torch.zeros(n)) for n in (2, 3, 4)]
    for p in ps[:2]: p.grad = torch.full_like(p, 8.0)  # the third has none
    assert unscale(ps, 4.0) and ps[0].grad.tolist() == [2.0, 2.0] and ps[2].grad is None
    ps[1].grad[2] = math.inf
    assert not unscale(ps, 4.0) and unscale([ps[2]], 2.0)


def test_idle_scaler_is_not_there():
    w, optimizer = weights()
    w.grad = torch.tensor([math.inf, 1.0, 1.0])
    scaler = scaler_for(torch.bfloat16)
    assert scaler.factor == 1.0 and scaler.step(optimizer) and not torch.isfinite(w).all(), 'a plain step, as without a scaler'
    assert scaler_for(torch.float16).enabled and not scaler_for(torch.float32).enabled


def test_state_survives():
    scaler = GradScaler(growth_interval=5)
    for finite in (True, False, True, True): scaler.update(finite)
    again = scaler_for(torch.float16)
    again.load_state_dict(scaler.state_dict())
    assert again == scaler and (again.scale, again.good, again.skipped) == (32768, 2, 1)
    again.load_state_dict(None)
    assert again == scaler
    idle = scaler_for(torch.float32)
    idle.load_state_dict(scaler.state_dict())
    assert not idle.enabled and idle.factor == 1, 'a run that goes on in fp32 is not scaled'


def test_never_ending_overflow_is_an_error():
    scaler, n = GradScaler(), 0
    with pytest.raises(UserError, match='not the scale.*NANOCHAT_DTYPE=float32'):
        while True: scaler.update(False); n += 1
    assert scaler.scale < LOWEST and n == 24
    scaler = GradScaler()
    for _ in range(10**5): scaler.update(True)
    assert scaler.scale <= 2**24, 'the scale has a ceiling'


def one_rank(rank, port, out):
    """Rank 1 alone has an overflow."""
    import torch.distributed as dist
    dist.init_process_group('gloo', init_method=f'tcp://127.0.0.1:{port}', rank=rank, world_size=2)
    w, optimizer = weights()
    scaler, made = GradScaler(), []
    for step in range(3):
        w.grad = torch.full_like(w, math.inf if (rank, step) == (1, 1) else 1.0)
        made.append(scaler.step(optimizer))
    out.put((rank, made, scaler.scale, w.tolist()))
    dist.barrier()
    os._exit(0)  # gloo's threads do not always leave in peace


def test_ranks_skip_together():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    ctx = torch.multiprocessing.get_context('fork')
    out = ctx.SimpleQueue()
    ranks = [ctx.Process(target=one_rank, args=(r, port, out)) for r in range(2)]
    for r in ranks: r.start()
    for r in ranks: r.join(60)
    assert [r.exitcode for r in ranks] == [0, 0]
    (_, *a), (_, *b) = sorted(out.get() for _ in ranks)
    assert a == b and a[0] == [True, False, True] and a[1] == 32768


# --- the training loop -----------------------------------------------------------------------------------------------

@pytest.fixture
def half(monkeypatch):
    """Compute in fp16, in a loop that scales."""
    from nanochat.train import TrainState
    if 'scaler' not in {f.name for f in dataclasses.fields(TrainState)}: pytest.skip('the training loop does not scale yet')
    monkeypatch.setenv('NANOCHAT_DTYPE', 'float16')


def tiny():
    from nanochat.gpt import GPT, GPTConfig
    torch.manual_seed(0)
    with torch.device('meta'): model = GPT(GPTConfig(sequence_len=32, vocab_size=64, n_layer=2, n_head=2, n_kv_head=2, n_embd=32))
    model.to_empty(device='cpu')
    model.init_weights()
    return model


def batches():
    gen = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 64, (4, 33), generator=gen)
    while True: yield rows[:, :-1], rows[:, 1:], dict(place=0)


def plan_for(model, steps=4):
    from nanochat.scaling import plan_training
    return plan_training(model.config, device_batch_size=4, total_batch_size=128, num_iterations=steps)


def test_gradients_in_fp16_are_those_of_fp32(half, monkeypatch):
    """After unscaling, to the few digits that fp16 has."""
    from nanochat.train import accumulate
    grads = {}
    for name in ('float16', 'float32'):
        monkeypatch.setenv('NANOCHAT_DTYPE', name)
        model, scaler = tiny(), scaler_for(getattr(torch, name))
        with torch.no_grad():
            for p in model.parameters(): p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)).mul(.02).to(p.dtype))
        x, y, _ = next(batches())
        accumulate(model, [(x, y)], y.numel(), scaler.factor)
        assert unscale(model.parameters(), scaler.factor)
        grads[name] = {n: p.grad.flatten().double() for n, p in model.named_parameters()}
    for n, g in grads['float32'].items(): assert (g - grads['float16'][n]).norm() <= .02 * g.norm(), n


def test_training_in_fp16_learns(half):
    from nanochat.train import TrainState, train_step
    model, state = tiny(), TrainState()
    optimizer, plan, losses = model.setup_optimizer(), plan_for(model, 20), []
    for _ in range(20):
        train_step(model, optimizer, batches(), plan, state)
        losses.append(state.loss)
    assert losses[0] == pytest.approx(math.log(64), abs=.1) and losses[-1] < 1 and state.scaler.enabled and not state.scaler.skipped


def test_an_overflow_in_training_is_skipped(half):
    """A hook on one weight injects an infinity at the second step: that step changes nothing, the scale halves, and training goes on."""
    from nanochat.train import TrainState, train_step
    model, state, calls = tiny(), TrainState(), []
    def inject(grad):
        calls.append(1)
        return torch.full_like(grad, math.inf) if len(calls) == 2 else grad
    model.lm_head.weight.register_hook(inject)
    optimizer, plan, seen = model.setup_optimizer(), plan_for(model), []
    for _ in range(3):
        train_step(model, optimizer, batches(), plan, state)
        seen.append((model.lm_head.weight.detach().clone(), state.scaler.scale, state.step))
    (a, s1, _), (b, s2, _), (c, s3, n) = seen
    assert torch.equal(a, b) and not torch.equal(b, c) and (s1, s2, s3, n) == (65536, 32768, 32768, 3) and state.scaler.skipped == 1
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_run_in_fp16_goes_on_with_its_scale(half, tmp_path):
    from nanochat.common import read_jsonl
    from nanochat.train import Loop, TrainState, fit, resume
    class NoTokenizer:
        def save(self, folder): folder.mkdir()
    from nanochat.checkpoint_manager import init_run
    run = init_run(tmp_path/'run', {}, NoTokenizer())
    model = tiny()
    state = TrainState()
    state.scaler = GradScaler(scale=1024.0, growth_interval=3)
    fit(model, model.setup_optimizer(), batches(), plan_for(model, 4), Loop(save_every=2), run=run, state=state)
    assert [r['grad_scale'] for r in read_jsonl(run/'metrics.jsonl') if 'lr' in r] == [1024, 1024, 2048, 2048]
    again = tiny()
    back = resume(run, again, again.setup_optimizer())
    assert back.scaler.state_dict() == state.scaler.state_dict() and back.scaler.scale == 2048 and back.scaler.good == 1
