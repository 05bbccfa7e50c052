"""The optimizer shared by real processes (gloo): the weights of a single process, parts of the state, and parts loaded by another number of processes."""
import json
import os
import subprocess

import pytest
import torch

from nanochat.optim import MuonAdamW, lengths_of_parts, merged_state, part_of
from warm_python import warm_python

pytestmark = pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')

# One process imports everything, then forks the ranks of each phase: (name, ranks, first step, last step, phase whose states it loads, how).
DRIVER = r'''
import json, os, signal, socket, sys, traceback
import torch, torch.distributed as dist
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import merged_state

phases, out = json.loads(sys.argv[1]), sys.argv[2]

def make():
    torch.manual_seed(0)
    model = GPT(GPTConfig(sequence_len=32, vocab_size=192, n_layer=5, n_head=2, n_kv_head=1, n_embd=32, window_pattern='L'))
    model.to_empty(device='cpu')
    model.init_weights()
    for p in model.parameters(): p.data += 0.02 * torch.randn(p.shape)
    return model, model.setup_optimizer(weight_decay=0.1)

def load(model, optimizer, origin, ranks):
    states = [torch.load(f'{out}/{origin}.{r}.pt', weights_only=True) for r in range(ranks)]
    model.load_state_dict(states[0]['model'])
    optimizer.load_state_dict(merged_state([s['optimizer'] for s in states[::-1]]))

def work(name, W, first, last, origin, how, rank):
    model, optimizer = make()
    if how != 'late' and how != 'summed before': optimizer.share()
    if origin: load(model, optimizer, *origin)
    if how == 'late': optimizer.share()
    assert optimizer.shares == (W > 1 and how != 'summed before')
    for step in range(first, last):
        x = torch.randint(0, 192, (6, 33), generator=torch.Generator().manual_seed(step))[rank::W]
        (model(x[:, :-1], x[:, 1:], loss_reduction='sum') / (6 * 32)).backward()
        if how == 'holes':
            model.smear_gate.weight.grad = None                         # nobody has one
            if rank: model.lm_head.weight.grad = model.transformer.h[2].attn.c_q.weight.grad = None  # only some have one
        if how == 'summed before' and W > 1:
            for p in model.parameters(): dist.all_reduce(p.grad)
        for g in optimizer.param_groups: g['lr'] = g['initial_lr'] * (1 - step / 10)
        optimizer.step()
        model.zero_grad(set_to_none=True)
    torch.save(dict(model=model.state_dict(), optimizer=optimizer.state_dict()), f'{out}/{name}.{rank}.pt')

def child(rank, port, phase):
    signal.alarm(60)  # ranks that wait for each other
    try:
        if phase[1] > 1: dist.init_process_group('gloo', init_method=f'tcp://127.0.0.1:{port}', rank=rank, world_size=phase[1])
        work(*phase, rank)
        code = 0
    except BaseException: traceback.print_exc(); code = 1
    sys.stderr.flush()
    os._exit(code)

warm, optimizer = make()  # what torch imports at the first step is imported once
for p in warm.parameters(): p.grad = torch.zeros_like(p)
optimizer.step()
for phase in phases:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    pids = [os.fork() or child(rank, port, phase) for rank in range(phase[1])]
    if any([os.waitpid(p, 0)[1] for p in pids]): sys.exit(f'{phase} failed')
'''

PHASES = [('whole', 1, 0, 6, None, ''), ('two', 2, 0, 6, None, ''), ('three', 3, 0, 6, None, ''), ('before', 2, 0, 6, None, 'summed before'),
          ('half2', 2, 0, 3, None, ''), ('half3', 3, 0, 3, None, ''), ('half1', 1, 0, 3, None, ''),
          ('2to3', 3, 3, 6, ('half2', 2), ''), ('3to2', 2, 3, 6, ('half3', 3), 'late'), ('3to1', 1, 3, 6, ('half3', 3), ''), ('1to2', 2, 3, 6, ('half1', 1), 'late'),
          ('holes2', 2, 0, 2, None, 'holes'), ('holes3', 3, 0, 2, None, 'holes')]


@pytest.fixture(scope='module')
def results(tmp_path_factory):
    """What each rank of each phase saved: {phase: [states by rank]}."""
    folder = tmp_path_factory.mktemp('ranks')
    env = warm_python().environ(NANOCHAT_DTYPE='float32')
    done = subprocess.run([warm_python().python, '-c', DRIVER, json.dumps(PHASES), str(folder)], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: [torch.load(folder/f'{name}.{r}.pt', weights_only=True) for r in range(W)] for name, W, *_ in PHASES}


def same(a, b):
    """Parameters within rounding: sums over ranks are added in another order than sums over rows. (All-reduced gradients on replicas differ as much.)"""
    assert a.keys() == b.keys()
    for k in a: torch.testing.assert_close(a[k], b[k], atol=1e-4, rtol=1e-3, msg=lambda m: f'{k}: {m}')


@pytest.mark.parametrize('name', ['two', 'three', '2to3', '3to2', '3to1', '1to2'])
def test_weights_are_those_of_one_process(results, name):
    whole, ranks = results['whole'][0]['model'], results[name]
    same(ranks[0]['model'], whole)
    assert all(ranks[0]['model'][k].equal(r['model'][k]) for r in ranks for k in whole), 'ranks differ from each other'


@pytest.mark.parametrize('name', ['2to3', '3to2', '3to1', '1to2'])
def test_the_state_goes_on_too(results, name):
    """A lost momentum would give other weights; and the state itself, joined, is that of a single process."""
    whole, got = results['whole'][0]['optimizer'], merged_state([r['optimizer'] for r in results[name]])
    assert got['state'].keys() == whole['state'].keys() and 'shard' not in got
    for i, entry in whole['state'].items():
        for k in entry: torch.testing.assert_close(got['state'][i][k], entry[k], atol=2e-4, rtol=5e-3, msg=lambda m: f'{i} {k}: {m}')


def test_shared_equals_replicated(results):
    """The same gradients summed by all-reduce, every rank doing all the work: only batched products may round differently."""
    for k, v in results['before'][0]['model'].items(): torch.testing.assert_close(results['two'][0]['model'][k], v, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('name, W', [('two', 2), ('three', 3)])
def test_each_rank_keeps_its_share(results, name, W):
    """Two thirds or more of what a single process keeps is gone from each of three; nothing is kept twice but small parameters."""
    size = lambda r: sum(t.numel() for e in r['optimizer']['state'].values() for t in e.values())
    whole, parts = size(results['whole'][0]), [size(r) for r in results[name]]
    assert max(parts) < whole / W * 1.25 and results[name][1]['optimizer']['shard']['rank'] == 1


@pytest.mark.parametrize('name', ['holes2', 'holes3'])
def test_missing_gradients_on_some_ranks(results, name):
    """They count as zeros, and no rank waits for a collective that another never begins."""
    first = results[name][0]['model']
    assert all(first[k].equal(r['model'][k]) and first[k].isfinite().all() for r in results[name] for k in first)
    start = results['half1'][0]['model']
    assert not first['lm_head.weight'].equal(start['lm_head.weight'])


def toy():
    p = [torch.nn.Parameter(torch.ones(4, 4)) for _ in range(3)] + [torch.nn.Parameter(torch.ones(64, 32)), torch.nn.Parameter(torch.ones(5))]
    return p, MuonAdamW([dict(kind='adamw', params=p[3:]), dict(kind='muon', params=p[:3])])


class Alone:
    """Collectives of a rank among others that are not there."""
    def __init__(self, rank, world_size): self.rank, self.world_size = rank, world_size


def stepped():
    params, opt = toy()
    for i, p in enumerate(params): p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    opt.step()
    return opt


@pytest.mark.parametrize('W', [2, 3, 4, 8])
def test_cut_and_joined_is_the_same(W):
    """With stacks that do not divide, more ranks than matrices, parameters too small or odd to be cut, and a state cut after it was filled."""
    opt, parts = stepped(), []
    whole = opt.state_dict()
    for rank in range(W):
        other = stepped().share(Alone(rank, W))
        parts.append(other.state_dict())
        again = toy()[1].share(Alone(rank, W))
        again.load_state_dict(parts[-1])
        assert all(a.equal(b) for i, e in again.state_dict()['state'].items() for a, b in zip(e.values(), parts[-1]['state'][i].values()))
    joined = merged_state(parts[::-1])
    assert all(joined['state'][i][k].equal(v) for i, e in whole['state'].items() for k, v in e.items())
    assert lengths_of_parts(opt.param_groups, W) == ({2: 3} if W == 3 else {0: 64, 2: 3})


def test_wrong_parts_are_refused():
    part = stepped().share(Alone(1, 3)).state_dict()
    with pytest.raises(ValueError, match='part 1 of an optimizer state that 3 processes kept; load the merged_state'): toy()[1].load_state_dict(part)
    with pytest.raises(ValueError, match='part 1'): toy()[1].share(Alone(1, 2)).load_state_dict(part)
    with pytest.raises(ValueError, match=r'needs the parts 0 to 2, not \[1\]'): merged_state([part])


def test_sharing_needs_others():
    opt = stepped()
    assert opt.share() is opt and not opt.shares and not opt.share(Alone(0, 1)).shares
    assert merged_state([opt.state_dict()])['state'].keys() == opt.state_dict()['state'].keys()
    assert part_of(dict(step=torch.tensor(2.)), 3, 0, 2)['step'] == 2
