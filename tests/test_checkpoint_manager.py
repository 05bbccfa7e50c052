"""Checkpoints: what a kill, a full disk, a flipped bit or a foreign file can do to them. Real processes, real SIGKILL."""
import errno, json, os, subprocess
from pathlib import Path

import pytest
import torch

from nanochat import checkpoint_manager as cm
from nanochat.common import UserError
from nanochat.gpt import GPTConfig
from nanochat.tokenizer import RustBPETokenizer
from warm_python import warm_python

CPU = torch.device('cpu')


def tiny_model(n_layer=1, seed=0):
    torch.manual_seed(seed)
    return cm.empty_model(GPTConfig(sequence_len=32, vocab_size=320, n_layer=n_layer, n_head=2, n_kv_head=1, n_embd=32), CPU)


def trained(model):
    """An optimizer with every kind of state filled, after one step."""
    optimizer = model.setup_optimizer()
    x = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(1))
    model(x, x.roll(-1, 1)).backward()
    optimizer.step()
    model.zero_grad(set_to_none=True)
    return optimizer


@pytest.fixture(scope='module')
def tokenizer(): return RustBPETokenizer.train_from_iterator(['the quick brown fox jumps over the lazy dog'] * 20, 300)


@pytest.fixture
def run(tokenizer): return cm.init_run(cm.run_dir('base', 'd1'), dict(depth=1), tokenizer, CPU)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 300 kB; needs the right to mount one."""
    disk = tmp_path/'disk'
    disk.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=300k', 'tmpfs', str(disk)], capture_output=True).returncode: pytest.skip('cannot mount a small file system here')
    yield disk
    subprocess.run(['umount', str(disk)], check=True)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_everything_comes_back_bit_for_bit(run, monkeypatch, dtype):
    monkeypatch.setenv('NANOCHAT_DTYPE', dtype)
    model = tiny_model()
    optimizer = trained(model)
    cm.save_checkpoint(run, 7, model, optimizer, dict(loss=1.5), loader_state=dict(epoch=2, rows=[1, 2]))
    expected = torch.rand(3)  # the generator as it was saved
    found = cm.load_checkpoint(run)
    cm.set_rng_state(found.rng)
    assert torch.equal(torch.rand(3), expected)
    assert found.meta['step'] == 7 and found.meta['loss'] == 1.5 and found.loader_state == dict(epoch=2, rows=[1, 2])
    again = tiny_model(seed=1)
    cm.load_weights(again, found.model_state)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    other = again.setup_optimizer()
    other.load_state_dict(found.optim_state)
    for p, q in zip(model.parameters(), again.parameters()):
        for k, v in optimizer.state.get(p, {}).items(): assert torch.equal(torch.as_tensor(v), torch.as_tensor(other.state[q][k])) and (not torch.is_tensor(v) or v.dtype == other.state[q][k].dtype)


SAVER = r'''
import os, random, signal, sys, time
import torch
from pathlib import Path
from nanochat import checkpoint_manager as cm
torch.set_num_threads(1)
run, kills = Path(sys.argv[1]), int(sys.argv[2])
random.seed(0)

def saver(first, run, last=10**9):
    """Saves forever, each checkpoint marked by its step in weights, optimizer and meta."""
    model = torch.nn.Linear(200, 200)
    optimizer = torch.optim.SGD(model.parameters(), lr=1, momentum=.9)
    for step in range(first + 1, last):
        with torch.no_grad(): model.weight.fill_(step)
        cm.save_checkpoint(run, step, model, optimizer, dict(mark=step), loader_state=dict(mark=step), keep=2)

saver(0, run/'warm', 2)  # what is imported late is imported here, once
newest, seen = 0, []
for kill in range(kills):
    pid = os.fork()
    if pid == 0:
        try: saver(newest, run)
        finally: os._exit(1)
    time.sleep(random.uniform(.02, .12))
    os.kill(pid, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(pid, 0)[1]), 'the saver died before it was killed'
    steps = cm.list_checkpoints(run)
    assert (steps or [0])[-1] >= newest, f'step {newest} was there and is gone: {steps}'
    if steps:
        found = cm.load_checkpoint(run)
        assert found.meta['mark'] == found.loader_state['mark'] == steps[-1] and (found.model_state['weight'] == steps[-1]).all()
        newest = steps[-1]
    seen.append(newest)
debris = len(list(run.glob('.*')))
cm.clean_run(run)
assert not list(run.glob('.*')) and cm.list_checkpoints(run)[-1] == newest
print('saved', newest, 'debris', debris)
'''


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_sixty_kills_never_lose_the_newest_checkpoint(tmp_path):
    run = tmp_path/'run'
    run.mkdir()
    out = subprocess.run([warm_python().python, '-c', SAVER, str(run), '60'], env=warm_python().environ(), capture_output=True, text=True, timeout=120)
    assert out.returncode == 0, out.stderr
    saved, debris = (int(out.stdout.split()[i]) for i in (1, 3))
    assert saved >= 10, 'hardly anything was saved: the kills came too early to test anything'
    assert debris > 0, 'no kill fell into a save: the kills came too late to test anything'


def test_half_written_and_half_deleted_checkpoints_are_ignored(run):
    model = tiny_model()
    for step in (1, 2, 3): cm.save_checkpoint(run, step, model)
    (cm.step_dir(run, 3)/'meta.json').unlink()
    weights = cm.step_dir(run, 2)/'model.safetensors'
    weights.write_bytes(weights.read_bytes()[:-10])
    (run/'.step_000009.123-abc.tmp').mkdir()
    cm.save_checkpoint(run, 4, model)
    (cm.step_dir(run, 4)/'meta.json').write_text('[]')
    assert cm.list_checkpoints(run) == [1] and cm.load_checkpoint(run).meta['step'] == 1


def test_a_flipped_bit_is_found_and_named(run):
    cm.save_checkpoint(run, 1, tiny_model())
    cm.save_checkpoint(run, 2, tiny_model())
    for name in ('model.safetensors', 'optim_rank0.pt'):
        path = cm.step_dir(run, 2)/name
        good = path.read_bytes()
        path.write_bytes(good[:100] + bytes([good[100] ^ 1]) + good[101:])
        with pytest.raises(UserError, match=f'{name}.*damaged.*step 1'): cm.load_checkpoint(run)
        path.write_bytes(good)
    cm.load_checkpoint(run)


def test_full_disk_leaves_the_previous_checkpoint(small_disk):
    run, model = small_disk/'run', torch.nn.Linear(100, 200)  # 80 kB
    run.mkdir()
    cm.save_checkpoint(run, 1, model)
    (small_disk/'ballast').write_bytes(b'x' * 120_000)
    with pytest.raises(UserError, match='disk'): cm.save_checkpoint(run, 2, model)
    assert cm.list_checkpoints(run) == [1] and cm.load_checkpoint(run).meta['step'] == 1 and not list(run.glob('.*'))


@pytest.mark.parametrize('part', ['model.safetensors', 'optim_rank0.pt'])
def test_disk_that_fills_up_during_the_write(small_disk, monkeypatch, part):
    """The space is there when asked for and gone when written: the libraries' own errors must become the sentence."""
    run = small_disk/'run'
    run.mkdir()
    model = torch.nn.Linear(100, 100 if part == 'model.safetensors' else 10)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 100)).sum().backward()
    optimizer.step()
    monkeypatch.setattr(cm, 'require_space', lambda path, nbytes: None)
    room = 20_000 if part == 'model.safetensors' else 9_000
    cm.save_checkpoint(run, 1, torch.nn.Linear(10, 10))
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    (small_disk/'ballast').write_bytes(b'x' * (free - room))
    with pytest.raises(UserError, match='the disk is full'): cm.save_checkpoint(run, 2, model, optimizer)
    assert cm.list_checkpoints(run) == [1] and not list(run.glob('.*'))


@pytest.mark.parametrize('victim', ['write_weights', 'write_state'])
def test_write_error_of_any_part_leaves_the_previous_checkpoint(run, monkeypatch, victim):
    cm.save_checkpoint(run, 1, tiny_model())
    def full(path, state): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(cm, victim, full)
    with pytest.raises(UserError, match='the disk is full'): cm.save_checkpoint(run, 2, tiny_model())
    assert cm.list_checkpoints(run) == [1] and not list(run.glob('.*'))


def test_keeps_the_last_n(run):
    for step in range(1, 6): cm.save_checkpoint(run, step, tiny_model(), keep=2)
    assert cm.list_checkpoints(run) == [4, 5] and not list(run.glob('.*'))


def test_the_public_projects_files_are_not_pruned(run):
    (run/'model_000001.pt').write_bytes(b'weights')
    (run/'meta_000001.json').write_text('{}')
    for step in (2, 3, 4): cm.save_checkpoint(run, step, tiny_model(), keep=2)
    assert cm.list_checkpoints(run) == [1, 3, 4] and (run/'model_000001.pt').read_bytes() == b'weights'


def test_building_a_model_leaves_the_devices_generator_where_it_was(run, monkeypatch):
    """On a machine without a GPU: its generator is imitated, and drawn from as `init_weights` would."""
    cm.save_checkpoint(run, 1, model := tiny_model())
    state = [torch.tensor([7])]
    def drawn(config, device): state[0] = state[0] + 1; return model
    monkeypatch.setattr(cm, 'empty_model', drawn)
    monkeypatch.setattr(torch.cuda, 'get_rng_state', lambda device: state[0])
    monkeypatch.setattr(torch.cuda, 'set_rng_state', lambda new, device: state.__setitem__(0, new))
    cm.build_model(run, 1, torch.device('cuda'))
    assert state[0].item() == 7


def test_refuses_another_tokenizer(run, tokenizer):
    cm.check_tokenizer(run, tokenizer)
    with pytest.raises(UserError, match='not the one d1 was trained with'):
        cm.check_tokenizer(run, RustBPETokenizer.train_from_iterator(['something else entirely'] * 20, 290))


def test_refuses_another_shape_and_names_the_difference(run):
    cm.save_checkpoint(run, 1, tiny_model())
    found = cm.load_checkpoint(run)
    with pytest.raises(UserError, match='n_layer 1 there, 2 here'): cm.check_config(found.meta, GPTConfig(32, 320, 2, 2, 1, 32))
    with pytest.raises(UserError, match=r'\(1,\) there and \(2,\) here'): cm.load_weights(tiny_model(n_layer=2), found.model_state)


def test_settles_whether_a_run_goes_on(run):
    assert cm.settle_run(run, dict(depth=1)) == dict(depth=1)
    with pytest.raises(UserError, match='depth 1 there, 2 here.*--resume.*--fresh.*--model-tag'): cm.settle_run(run, dict(depth=2))
    assert cm.settle_run(run, dict(depth=2), resume=True) == dict(depth=1) and cm.settle_run(run, dict(depth=2), fresh=True) is None
    with pytest.raises(UserError, match='no run other to resume'): cm.settle_run(run.parent/'other', {}, resume=True)


@pytest.mark.parametrize('tag', ['../x', '', '.hidden', 'a/b', 'a b'])
def test_tag_cannot_leave_the_folder(tag):
    with pytest.raises(UserError): cm.run_dir('base', tag)


def test_missing_things_say_what_to_type(run):
    with pytest.raises(UserError, match='nanochat.scripts.base_train'): cm.load_checkpoint(run)
    with pytest.raises(UserError, match='nanochat.scripts.chat_sft'): cm.load_model('sft', CPU)
    cm.save_checkpoint(run, 3, tiny_model())
    with pytest.raises(UserError, match='no checkpoint of step 4; it has 3'): cm.load_checkpoint(run, 4)


def test_deepest_run_is_the_default(tokenizer):
    for tag in ('d9', 'd12', 'mine'):
        cm.save_checkpoint(cm.init_run(cm.run_dir('base', tag), {}, tokenizer, CPU), 1, tiny_model())
    cm.init_run(cm.run_dir('base', 'd20'), {}, tokenizer, CPU)  # no checkpoint yet
    assert cm.newest_tag('base') == 'd12'


def test_files_can_be_read_without_running_code(run):
    model = tiny_model()
    cm.save_checkpoint(run, 1, model, trained(model), loader_state=dict(a=[1], b=None, c='x', d=1.5))
    folder = cm.step_dir(run, 1)
    assert not [p for p in folder.iterdir() if p.suffix in ('.pkl', '.pickle')]
    assert set(torch.load(folder/'optim_rank0.pt', weights_only=True)) == {'optimizer', 'loader', 'rng'}


def test_pickled_code_in_a_public_checkpoint_does_not_run(tmp_path):
    class Evil:
        def __reduce__(self): return os.mkdir, (str(tmp_path/'owned'),)
    run = cm.run_dir('base', 'evil')
    run.mkdir(parents=True)
    torch.save({'lm_head.weight': Evil()}, run/'model_000001.pt')
    (run/'meta_000001.json').write_text(json.dumps(dict(model_config=dict(n_layer=1))))
    with pytest.raises(Exception, match='(?i)weights'): cm.load_checkpoint(run)
    assert not (tmp_path/'owned').exists()


@pytest.mark.parametrize('prefix', ['', '_orig_mod.'])
def test_public_checkpoint_gives_the_reference_logits(shared_data, fp32, base_directory, prefix):
    """The public project's own directory: tokenizer as a pickle beside base_checkpoints, weights as .pt."""
    reference = torch.load(shared_data/'reference'/'reference.pt', weights_only=True)
    run = cm.run_dir('base', 'd4')
    run.parent.mkdir(parents=True)
    (base_directory/'tokenizer').symlink_to(shared_data/'reference'/'tokenizer')
    if prefix:
        run.mkdir()
        state = torch.load(shared_data/'reference'/'base_checkpoints'/'d4'/'model_000010.pt', weights_only=True)
        torch.save({prefix + k: v for k, v in state.items()}, run/'model_000010.pt')
        (run/'meta_000010.json').symlink_to(shared_data/'reference'/'base_checkpoints'/'d4'/'meta_000010.json')
    else: run.symlink_to(shared_data/'reference'/'base_checkpoints'/'d4')
    model, tokenizer, meta = cm.load_model('base', CPU)
    assert meta['step'] == 10 and tokenizer.get_vocab_size() == 512
    with torch.no_grad(): logits = model(reference['x'])
    torch.testing.assert_close(logits[:, ::7], reference['logits'], rtol=1e-4, atol=1e-5)
    assert abs(model(reference["x"], reference["y"]).item() - float(reference['loss'])) < 1e-5


def write_parts(run, parts, step=1):
    """A checkpoint as several processes that share the optimizer's state write it: one file each."""
    run.mkdir(parents=True, exist_ok=True)
    staged = [run/f'.{step:06d}-optim_rank{r}.pt' for r in range(1, len(parts))]
    for r, p in enumerate(staged, 1): cm.write_state(p, dict(optimizer=parts[r], loader=dict(rank=r)))
    cm.write_checkpoint(run, step, tiny_model(), dict(optimizer=parts[0], loader=dict(rank=0)), {}, staged)


@pytest.mark.parametrize('rank', [0, 1, 2, 5])
def test_optimizer_state_in_parts_is_joined(tmp_path, monkeypatch, rank):
    """Every process, also one that was not there when it was saved, gets the whole state, and its own place in the data."""
    whole = torch.randn(5, 3)
    cut = torch.cat([whole, torch.zeros(1, 3)]).chunk(3)
    parts = [dict(state={0: dict(m=cut[r], step=torch.tensor(4.))}, param_groups=[dict(lr=1)], shard=dict(rank=r, world_size=3, lengths={0: 5})) for r in range(3)]
    write_parts(tmp_path/'run', parts)
    monkeypatch.setenv('RANK', str(rank))
    monkeypatch.setenv('WORLD_SIZE', '6')
    found = cm.load_checkpoint(tmp_path/'run')
    assert torch.equal(found.optim_state['state'][0]['m'], whole) and 'shard' not in found.optim_state
    assert found.loader_state == dict(rank=rank if rank < 3 else 0)


def test_a_lost_or_damaged_part_is_named(tmp_path):
    parts = [dict(state={0: dict(m=torch.ones(1, 2))}, param_groups=[], shard=dict(rank=r, world_size=3, lengths={0: 3})) for r in range(3)]
    write_parts(tmp_path/'two', parts[:2])
    with pytest.raises(UserError, match='lacks optim_rank2.pt'): cm.load_checkpoint(tmp_path/'two')
    write_parts(tmp_path/'three', parts)
    path = cm.step_dir(tmp_path/'three', 1)/'optim_rank2.pt'
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match='optim_rank2.pt.*damaged'): cm.load_checkpoint(tmp_path/'three')


def test_settings_younger_than_a_run_have_their_default(run):
    assert cm.settle_run(run, dict(depth=1, smear=True), defaults=dict(smear=True)) == dict(depth=1, smear=True)
    with pytest.raises(UserError, match='smear True there, False here'): cm.settle_run(run, dict(depth=1, smear=False), defaults=dict(smear=True))
    assert cm.settle_run(run, dict(depth=2), resume=True, defaults=dict(depth=7, smear=True)) == dict(depth=1, smear=True)


def test_weights_may_be_read_by_others(run):
    """Files get the permissions of the user's umask, weights like all others."""
    folder = cm.save_checkpoint(run, 1, tiny_model())
    assert len({p.stat().st_mode for p in folder.iterdir()}) == 1
