"""The training loop and the stages on it: exactness of accumulation and resume, refusal of bad input, and that it learns."""
import dataclasses, itertools, json, math, os, shutil, signal, subprocess, time, weakref
from pathlib import Path

import pytest
import torch

from nanochat import train
from nanochat.checkpoint_manager import list_checkpoints, load_checkpoint, run_config, run_dir, step_dir
from nanochat.common import Ranks, UserError, parse_config, read_jsonl
from nanochat.optim import MuonAdamW
from nanochat.scaling import TrainPlan
from nanochat.scripts import base_eval as be, base_train as bt, chat_sft as sft, mid_train as mt
from nanochat.tokenizer import RustBPETokenizer
from nanochat.train import Hook, Loop, NonFiniteLoss, TrainState, accumulate, count_targets, fit, resume, train_step
from warm_python import warm_python

CPU = torch.device('cpu')
TINY = dict(depth=1, head_dim=32, aspect_ratio=32, sequence_len=64, device_batch_size=4, total_batch_size=256, eval_tokens=512)
CHATS = dict(dict.fromkeys(mt.SIZES, 0), spelling_bee=40, simple_spelling=20, arithmetic=40, identity=0, eval_size=4)


@pytest.fixture
def home(prepared, base_directory, fp32):
    """This test's own base directory with corpus and tokenizer, computing in fp32."""
    shutil.copytree(prepared, base_directory, dirs_exist_ok=True)
    return base_directory


class Bigram(torch.nn.Module):
    """The smallest language model, with the interface of GPT."""
    def __init__(self, vocab=16):
        super().__init__()
        self.table = torch.nn.Embedding(vocab, vocab)
        torch.nn.init.normal_(self.table.weight, std=.1)

    def forward(self, x, y=None, loss_reduction='mean'):
        logits = self.table(x)
        if y is None: return logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-1, reduction=loss_reduction)


def bigram(seed=0):
    torch.manual_seed(seed)
    return Bigram()


def sgd(model, lr=1.): return torch.optim.SGD([dict(params=list(model.parameters()), kind='sgd', initial_lr=lr)], lr=lr, momentum=.9)


def rows(B, place=0, ragged=False):
    """Endless batches of B rows; row i is the same whatever B is. Ragged: rows have very different numbers of targets."""
    while True:
        found = [torch.randint(0, 16, (9,), generator=torch.Generator().manual_seed(place + i)) for i in range(B)]
        x, y = torch.stack(found)[:, :-1], torch.stack(found)[:, 1:].clone()
        if ragged:
            for i in range(B): y[i, (place + i) % 8 + 1:] = -1
        place += B
        yield x, y, dict(place=place)


def a_plan(steps, accum=1, **more): return TrainPlan(64, steps, accum, 1.0, 0.0, warmup_steps=2, **more)


@pytest.mark.parametrize('ragged', [False, True])
def test_every_micro_batch_size_gives_the_same_curve(tmp_path, ragged):
    def curve(B, accum):
        model, run = bigram(), tmp_path/f'{B}'
        run.mkdir()
        fit(model, sgd(model), rows(B, ragged=ragged), a_plan(20, accum), run=run)
        return torch.tensor([r['loss'] for r in read_jsonl(run/'metrics.jsonl')])
    one, two, four = (curve(B, n) for B, n in ((8, 1), (4, 2), (2, 4)))
    torch.testing.assert_close(two, one, rtol=0, atol=1e-5)
    torch.testing.assert_close(four, one, rtol=0, atol=1e-5)


def test_accumulated_gradient_of_the_gpt_is_that_of_the_whole_batch(home):
    setup = bt.prepare(bt.BaseTrainConfig(**TINY, num_iterations=3), CPU, bt.Ranks())
    x, y, _ = next(bt.training_loader(setup))
    y[0, 5:] = -1  # one row with few targets
    def gradient(slices):
        model, _ = bt.build(setup)
        batches = list(zip(x.chunk(slices), y.chunk(slices)))
        with torch.no_grad(): model.lm_head.weight.normal_(std=.1, generator=torch.Generator().manual_seed(1))  # at zero, nothing would reach the trunk
        loss = accumulate(model, batches, count_targets(batches))
        return loss, torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])
    (loss1, g1), (loss2, g2), (loss4, g4) = (gradient(n) for n in (1, 2, 4))
    assert abs(loss1 - loss2) < 1e-5 and abs(loss1 - loss4) < 1e-5
    for g in (g2, g4): assert (g - g1).norm() / g1.norm() < 1e-5


RANKS = r'''
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_train import bigram, sgd, rows, a_plan
from nanochat.common import distributed, read_jsonl
from nanochat.train import Loop, fit
torch.set_num_threads(1)
with distributed(torch.device('cpu')) as ranks:
    def mine():
        for x, y, state in rows(8, ragged=True): yield x[ranks.rank::2], y[ranks.rank::2], state
    model = bigram()
    fit(model, sgd(model), mine(), a_plan(10), Loop(save_every=5), run=Path(sys.argv[1]))
'''


def test_two_ranks_train_as_one(tmp_path):
    """Rows split over two processes, with different numbers of targets: the same losses and weights as one process with all rows."""
    alone, both = tmp_path/'alone', tmp_path/'both'
    alone.mkdir(), both.mkdir()
    model = bigram()
    fit(model, sgd(model), rows(8, ragged=True), a_plan(10), run=alone)
    port = str(free_port())
    env = lambda r: warm_python().environ() | dict(RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
    children = [subprocess.Popen([warm_python().python, '-c', RANKS, str(both), str(Path(__file__).parent)], env=env(r), stderr=subprocess.PIPE, text=True) for r in range(2)]
    for c in children:
        err = c.communicate(timeout=100)[1]
        assert c.returncode == 0, err
    losses = [torch.tensor([r['loss'] for r in read_jsonl(p/'metrics.jsonl')]) for p in (alone, both)]
    torch.testing.assert_close(*losses, rtol=0, atol=1e-5)
    torch.testing.assert_close(load_checkpoint(both).model_state['table.weight'], model.table.weight.detach(), rtol=0, atol=1e-5)
    assert (step_dir(both, 10)/'optim_rank1.pt').exists() and list_checkpoints(both) == [5, 10]


@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_loss_that_is_not_finite_stops_before_weights_change(tmp_path, bad):
    model = bigram()
    optimizer = sgd(model)
    def poisoned():
        for i, (x, y, state) in enumerate(rows(4)):
            if i == 5:
                with torch.no_grad(): model.table.weight[0, 0] = bad
            yield x, y, state
    before = {}
    def look(step):
        before.update({k: v.clone() for k, v in model.state_dict().items()}, buffer=optimizer.state[model.table.weight]['momentum_buffer'].clone())
        return {}
    with pytest.raises(NonFiniteLoss, match='step 5.*No weight was changed.*learning rate.*batch.*float32'):
        fit(model, optimizer, poisoned(), a_plan(20), Loop(save_every=1), run=tmp_path, hooks=[Hook(look, 1)])
    after = model.table.weight.detach().clone()
    after[0, 0] = before['table.weight'][0, 0]
    assert torch.equal(after, before['table.weight']) and torch.equal(optimizer.state[model.table.weight]['momentum_buffer'], before['buffer'])
    assert list_checkpoints(tmp_path)[-1] == 5 and load_checkpoint(tmp_path).model_state['table.weight'].isfinite().all()


def test_checkpoint_is_written_before_an_evaluation_that_fails(tmp_path):
    def crash(step): raise RuntimeError('new evaluation code')
    model = bigram()
    with pytest.raises(RuntimeError): fit(model, sgd(model), rows(4), a_plan(9), Loop(save_every=3), run=tmp_path, hooks=[Hook(crash, 3)])
    assert list_checkpoints(tmp_path) == [3]


def test_an_evaluation_missed_by_a_kill_is_made_up_for(tmp_path):
    model = bigram()
    def crash(step): raise RuntimeError
    with pytest.raises(RuntimeError): fit(model, sgd(model), rows(4), a_plan(3), run=tmp_path, hooks=[Hook(crash)])
    again = bigram(1)
    optimizer = sgd(again)
    state = resume(tmp_path, again, optimizer)
    result = fit(again, optimizer, rows(4, state.loader_state['place']), a_plan(3), run=tmp_path, state=state, hooks=[Hook(lambda step: dict(val=1.5))])
    assert result.step == 3 and result.evals == dict(val=1.5) and read_jsonl(tmp_path/'metrics.jsonl')[-1] == dict(step=3, val=1.5)


def test_evaluations_do_not_change_the_training():
    def weights(hooks):
        model = bigram()
        def noisy():
            for x, y, state in rows(4): yield (x + torch.randint(0, 2, x.shape)) % 16, y, state  # data that draw on the global generator
        torch.manual_seed(5)
        fit(model, sgd(model), noisy(), a_plan(8), hooks=hooks)
        return model.table.weight.detach()
    assert torch.equal(weights([]), weights([Hook(lambda step: dict(noise=torch.rand(7).sum().item()), 1)]))


@pytest.mark.parametrize('every, steps', [(0, [9]), (4, [4, 8, 9])])
def test_metrics_as_often_as_asked(tmp_path, every, steps):
    model = bigram()
    fit(model, sgd(model), rows(4), a_plan(9), Loop(log_every=every), run=tmp_path)
    assert [r['step'] for r in read_jsonl(tmp_path/'metrics.jsonl')] == steps


def test_data_that_end_too_early_say_so():
    model = bigram()
    with pytest.raises(UserError, match='data ended'): fit(model, sgd(model), iter(list(zip(range(2), rows(4)))[:0]), a_plan(3))


def test_first_ctrl_c_finishes_the_step_and_saves(tmp_path):
    model = bigram()
    def press():
        for i, item in enumerate(rows(4)):
            if i == 6: os.kill(os.getpid(), signal.SIGINT)  # in the middle of step 6
            yield item
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt): fit(model, sgd(model), press(), a_plan(50), run=tmp_path)
    assert signal.getsignal(signal.SIGINT) is handler
    step, = list_checkpoints(tmp_path)
    assert step in (7, 8) and torch.equal(load_checkpoint(tmp_path).model_state['table.weight'], model.table.weight) and load_checkpoint(tmp_path).loader_state['place'] == 4 * step


def command(*flags): return [warm_python().python, '-m', 'nanochat.scripts.base_train', '--config', *map(str, flags)]


def kill_at(args, run, lines, env):
    """Start a training process and kill -9 it once its metrics have so many lines."""
    child = subprocess.Popen(args, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    for _ in range(20_000):
        if len(read_jsonl(run/'metrics.jsonl')) >= lines or child.poll() is not None: break
        time.sleep(.003)
    assert child.poll() is None, f'ended before it was killed: {child.stderr.read().decode()[-2000:]}'
    child.send_signal(signal.SIGKILL)
    child.communicate()
    return len([r for r in read_jsonl(run/'metrics.jsonl') if 'lr' in r])


def test_killed_twice_equals_uninterrupted_bit_for_bit(home, tmp_path):
    """Real processes, real SIGKILL, the real loader, model and optimizer, started by the same command line each time."""
    steps, toml = 30, tmp_path/'run.toml'
    settings = dict(TINY, num_iterations=steps, save_every=4, eval_every=8, keep=2, device='cpu')
    toml.write_text('\n'.join(f'{k} = {json.dumps(v)}' for k, v in settings.items()))
    env, run = warm_python().environ(), run_dir('base', 'killed')
    subprocess.run(command(toml, '--model-tag', 'whole'), env=env, check=True, capture_output=True)
    made = [kill_at(command(toml, '--model-tag', 'killed'), run, n, env) for n in (6, 17)]
    assert 0 < made[0] < made[1] < steps, 'the kills did not fall into the run'
    assert list_checkpoints(run)[-1] < made[1], 'nothing was lost: the kill fell on a save, and the test has tested nothing'
    done = subprocess.run(command(toml, '--model-tag', 'killed'), env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert 'going on after step' in done.stdout
    whole, killed = (load_checkpoint(run_dir('base', tag)) for tag in ('whole', 'killed'))
    assert whole.meta['step'] == killed.meta['step'] == steps and whole.loader_state == killed.loader_state
    for k, v in whole.model_state.items(): assert torch.equal(v, killed.model_state[k]), k
    for i, state in whole.optim_state['state'].items():
        for k, v in state.items(): assert torch.equal(torch.as_tensor(v), torch.as_tensor(killed.optim_state['state'][i][k])), (i, k)
    numbers = lambda tag: [{k: r[k] for k in ('step', 'tokens', 'loss', 'lr', 'val_bpb') if k in r} for r in read_jsonl(run_dir('base', tag)/'metrics.jsonl')]
    assert numbers('whole') == numbers('killed') and len(numbers('whole')) == steps + 4


def test_a_run_goes_on_with_two_processes_and_again_with_one(home, tmp_path):
    """The plan, the batch in tokens and the place in the data stay; only the sharing of the work changes."""
    toml, run = tmp_path/'run.toml', run_dir('base', 'd1')
    toml.write_text('\n'.join(f'{k} = {json.dumps(v)}' for k, v in dict(TINY, device_batch_size=2, num_iterations=9, save_every=3, keep=3, device='cpu').items()))
    bt.base_train(parse_config(bt.BaseTrainConfig, ['--config', str(toml)]))
    def back_to(step):
        (run/'result.json').unlink()
        for s in list_checkpoints(run):
            if s > step: shutil.rmtree(step_dir(run, s))
    back_to(3)
    torchrun = [warm_python().python, '-m', 'torch.distributed.run', '--nproc-per-node', '2', '--master-port', str(free_port()), '-m', 'nanochat.scripts.base_train', '--', '--config', str(toml)]
    done = subprocess.run(torchrun, env=warm_python().environ(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert 'going on after step 3 of 9' in done.stdout and list_checkpoints(run) == [3, 6, 9]
    assert load_checkpoint(run, 6).meta['world_size'] == 2 and (step_dir(run, 6)/'optim_rank1.pt').exists()
    back_to(6)
    assert bt.base_train(parse_config(bt.BaseTrainConfig, ['--config', str(toml)]))['tokens'] == 9 * 256
    steps = [r for r in read_jsonl(run/'metrics.jsonl') if 'lr' in r]
    assert [r['step'] for r in steps] == list(range(1, 10)) and [r['tokens'] for r in steps] == [256 * i for i in range(1, 10)]
    assert steps[-1]['loss'] < steps[0]['loss']


def free_port():
    import socket
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def test_ctrl_c_on_the_command_line(home, tmp_path):
    toml = tmp_path/'run.toml'
    toml.write_text('\n'.join(f'{k} = {json.dumps(v)}' for k, v in dict(TINY, num_iterations=100_000, device='cpu').items()))
    run = run_dir('base', 'd1')
    child = subprocess.Popen(command(toml), env=warm_python().environ(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while len(read_jsonl(run/'metrics.jsonl')) < 3 and child.poll() is None: time.sleep(.01)
    child.send_signal(signal.SIGINT)
    err = child.communicate(timeout=60)[1]
    assert child.returncode == 130 and 'Traceback' not in err and 'saved' in err
    assert list_checkpoints(run) == [load_checkpoint(run).meta['step']]


def test_base_loss_decreases_within_ten_seconds(home):
    start = time.process_time()   # of this process: another program beside it does not count
    result = bt.base_train(bt.BaseTrainConfig(**TINY, num_iterations=60, eval_every=-1))
    losses = [r['loss'] for r in read_jsonl(run_dir('base', 'd1')/'metrics.jsonl') if 'loss' in r]
    assert abs(losses[0] - math.log(320)) < .1 and sum(losses[-5:]) / 5 < losses[0] - 1.5 and result['val_bpb'] < 4.2
    assert time.process_time() - start < 10
    row = read_jsonl(home/'report'/'results.jsonl')[-1]
    assert row['stage'] == 'base_train' and row['val_bpb'] == result['val_bpb'] and row['tokens'] == 60 * 256


def test_a_model_without_the_optional_parts(home):
    """The switches reach the model and are kept with the run: --resume trains the same model whatever is typed."""
    off = dict(value_embeds=False, smear=False, backout=False, layer_scalars=False, qk_scale=1.0)
    bt.base_train(bt.BaseTrainConfig(**TINY, **off, num_iterations=2, eval_every=-1))
    meta = load_checkpoint(run_dir('base', 'd1')).meta
    assert {k: meta['model_config'][k] for k in off} == off and not {'smear_lambda', 'x0_lambdas'} & set(load_checkpoint(run_dir('base', 'd1')).model_state)
    with pytest.raises(UserError, match='smear False there, True here'): bt.base_train(bt.BaseTrainConfig(**TINY, num_iterations=2))
    assert bt.base_train(bt.BaseTrainConfig(model_tag='d1', resume=True))['skipped']


def test_core_during_training(home):
    """It enters the metrics at its own steps, and changes nothing about the training."""
    result = bt.base_train(bt.BaseTrainConfig(**TINY, num_iterations=6, eval_every=-1, core='mini', core_every=4, core_max_per_task=12))
    found = {r['step']: r['core_metric'] for r in read_jsonl(run_dir('base', 'd1')/'metrics.jsonl') if 'core_metric' in r}
    assert list(found) == [4, 6] and result['core_metric'] == found[6] and result['mfu'] is None
    plain = bt.base_train(bt.BaseTrainConfig(**TINY, num_iterations=6, eval_every=-1, model_tag='plain'))
    assert plain['loss'] == result['loss'] and 'core_metric' not in plain


def test_core_of_the_real_bundle_during_training(home, shared_data):
    bundle = shared_data/'eval_bundle.zip'
    if not bundle.exists(): pytest.skip('no eval_bundle.zip among the real data')
    result = bt.base_train(bt.BaseTrainConfig(**TINY | dict(sequence_len=128, device_batch_size=2), num_iterations=2, eval_every=-1, core='full', bundle=str(bundle), core_max_per_task=12))
    assert -1 < result['core_metric'] < 1


@pytest.fixture
def pretrained(home): return bt.base_train(bt.BaseTrainConfig(**TINY | dict(sequence_len=128, device_batch_size=2), num_iterations=15, eval_every=-1))


def test_sft_loss_decreases_within_ten_seconds(home, pretrained):
    setup = mt.prepare(sft.ChatSFTConfig(**CHATS), sft.SFT, CPU, mt.Ranks())
    before, start = mt.validation_loss(mt.build(setup)[0], setup)['val_loss'], time.process_time()
    result = sft.chat_sft(sft.ChatSFTConfig(**CHATS, num_iterations=50, eval_every=-1))
    losses = [r['loss'] for r in read_jsonl(run_dir('sft', 'd1')/'metrics.jsonl') if 'loss' in r]
    assert sum(losses[-5:]) / 5 < losses[0] - 1.5 and result['val_loss'] < before - 1
    assert time.process_time() - start < 10
    assert read_jsonl(home/'report'/'results.jsonl')[-1]['stage'] == 'chat_sft'
    assert sft.chat_sft(sft.ChatSFTConfig(**CHATS, num_iterations=50, eval_every=-1))['skipped']


def test_sft_takes_over_momentum_but_not_rates(pretrained):
    setup = mt.prepare(sft.ChatSFTConfig(**CHATS, num_iterations=10), sft.SFT, CPU, mt.Ranks())
    model, optimizer = mt.build(setup)
    base_plan = TrainPlan(**load_checkpoint(run_dir('base', 'd1')).meta['plan'])
    own = model.setup_optimizer(**base_plan.optimizer_args())
    for g, o in zip(optimizer.param_groups, own.param_groups):
        assert g['lr'] == pytest.approx(.8 * o['lr']) and g['initial_lr'] == pytest.approx(.8 * o['initial_lr'])
        if g['kind'] == 'muon': assert g['weight_decay'] == 0
    saved = setup.origin.optim_state['state']
    buffers = [s['momentum_buffer'] for s in optimizer.state.values() if 'momentum_buffer' in s]
    assert buffers and all(any(torch.equal(b, s.get('momentum_buffer', torch.zeros(0))) for s in saved.values()) for b in buffers)
    rates = [setup.plan.schedule(s)['lr'] for s in range(11)]
    assert rates[:6] == [1] * 6 and rates[10] == 0 and rates[8] == pytest.approx(.4)


def test_sft_trains_assistant_tokens_and_mid_training_all(pretrained):
    share = {}
    for stage in (sft.SFT, mt.MID):
        setup = mt.prepare(mt.TuneConfig(**CHATS), stage, CPU, mt.Ranks())
        x, y, _ = next(mt.training_loader(setup))
        share[stage.name] = float((y >= 0).float().mean())
        user_end = setup.tokenizer.encode_special('<|user_end|>')
        assert bool((y == user_end).any()) == (stage is mt.MID)
    assert share['chat_sft'] < share['mid_train']


def test_from_base_to_mid_to_sft(pretrained):
    mid = mt.mid_train(mt.MidTrainConfig(**CHATS, num_iterations=4))
    both = sft.chat_sft(sft.ChatSFTConfig(**CHATS, source='mid', num_iterations=4))
    assert mid['source'] == 'base' and both['source'] == 'mid' and list_checkpoints(run_dir('sft', 'd1')) == [4]
    with pytest.raises(UserError, match='source mid there, base here'): sft.chat_sft(sft.ChatSFTConfig(**CHATS, source='base', num_iterations=4))


def test_fine_tuning_starts_from_a_public_checkpoint(shared_data, base_directory, fp32):
    """No optimizer state, no plan, the tokenizer as a pickle beside the run: what is missing follows from the size."""
    (base_directory/'base_checkpoints').mkdir()
    (base_directory/'base_checkpoints'/'d4').symlink_to(shared_data/'reference'/'base_checkpoints'/'d4')
    (base_directory/'tokenizer').symlink_to(shared_data/'reference'/'tokenizer')
    result = sft.chat_sft(sft.ChatSFTConfig(**CHATS, num_iterations=2, total_batch_size=1024))
    run = run_dir('sft', 'd4')
    assert result['tokens'] == 2048 and list_checkpoints(run) == [2] and (run/'tokenizer'/'tokenizer_config.json').exists()
    assert load_checkpoint(run).meta['model_config']['n_kv_head'] == 2


def test_base_eval_stands_beside_an_ngram(home, pretrained):
    result = be.base_eval(be.BaseEvalConfig(eval_tokens=1024))
    assert 1 < result['ngram_bpb'] < 8 and 1 < result['val_bpb'] < 8 and len(result['samples']) == len(bt.PROMPTS)
    assert be.base_eval(be.BaseEvalConfig(eval_tokens=1024))['skipped'] and not be.base_eval(be.BaseEvalConfig(eval_tokens=1024, ngram_tokens=0)).get('ngram_bpb')


class Compiled(torch.nn.Module):
    """What `torch.compile` would make of a model."""
    def __init__(self, model, steps):
        super().__init__()
        self._orig_mod, self.steps = model, steps
        self.__dict__['cycle'] = self   # a compiled model is not gone before garbage is collected

    def forward(self, *args, **settings):
        if torch.is_grad_enabled(): self.steps.append('compiled step')
        return self._orig_mod(*args, **settings)


def test_the_ngram_reads_the_rows_of_all_ranks(home, monkeypatch):
    """The model is scored on those of every process, so its rival must be, though rank 0 alone counts."""
    from nanochat.dataloader import tokenizing_distributed_data_loader_bos_bestfit as loader
    from nanochat.dataset import open_corpus
    from nanochat.tokenizer import get_tokenizer
    tokenizer, corpus = get_tokenizer(), open_corpus('stdlib')
    monkeypatch.setattr(be, 'get_ranks', lambda: Ranks(0, 0, 2))
    found = be.held_out_ids(tokenizer, corpus, 4, 64, 1024).reshape(2, 2 * 4, 65)  # two ranks, two batches each
    for rank in range(2):
        batches = loader(tokenizer, 4, 64, 'val', corpus=corpus, ranks=Ranks(rank, rank, 2), long_documents='split')
        assert torch.equal(torch.cat([next(batches)[1].clone() for _ in range(2)]), torch.tensor(found[rank, :, 1:]).long())
        train.close(batches)
    assert not (found[0] == found[1]).all()


def test_a_rehearsal_runs_the_program_of_the_run(home, monkeypatch):
    """Its steps go through the compiler and are shared, if those of the run are; its model is gone before the run's is made."""
    did, models = [], []
    monkeypatch.setattr(torch, 'compile', lambda model, dynamic: Compiled(model, did))
    monkeypatch.setattr(train, 'settle_backend', lambda model: did.append('kernel chosen'))
    monkeypatch.setattr(MuonAdamW, 'share', lambda self: did.append('shared'))
    for stage in (bt, mt):
        def built(setup, build=stage.build):
            assert not any(ref() for ref in models), 'the model of the rehearsal is still there'
            model, optimizer = build(setup)
            models.append(weakref.ref(model))
            return model, optimizer
        monkeypatch.setattr(stage, 'build', built)
    bt.base_train(bt.BaseTrainConfig(**TINY, minutes=1e-4, compile=True))
    assert [name for name, _ in itertools.groupby(did)] == ['shared', 'kernel chosen', 'compiled step'] * 2 and did.count('compiled step') == 4 + 10
    did.clear(), models.clear()
    mt.mid_train(mt.MidTrainConfig(**CHATS, minutes=1e-4, compile=True))
    assert [name for name, _ in itertools.groupby(did)] == ['shared', 'kernel chosen', 'compiled step'] * 2
    did.clear(), models.clear()
    bt.base_train(bt.BaseTrainConfig(**TINY, minutes=1e-4, model_tag='eager'))
    assert did == ['shared', 'shared'], 'nothing is compiled on a CPU'


def test_questions_at_the_end_are_counted_once(home, pretrained, monkeypatch):
    """`--chatcore-every -1` takes the time of one evaluation out of the budget, not of the six that a loss gets."""
    asked, started = [], []
    monkeypatch.setattr(mt, 'chatcore_values', lambda *args: asked.append(time.sleep(.05)) or {})
    monkeypatch.setattr(mt, 'steps_within', lambda minutes, start, *args, **kw: started.append(start) or args[-1]() and 10)
    for every in (-1, 5): mt.within_minutes(mt.prepare(mt.MidTrainConfig(**CHATS, chatcore_every=every, minutes=1.), mt.MID, CPU, Ranks()), 100.)
    assert started[0] < 99.96 and started[1] > 99.96 and len(asked) == 2


def test_a_budget_of_minutes_becomes_a_number_of_steps_that_stays(home, monkeypatch):
    cfg = bt.BaseTrainConfig(**TINY, minutes=.03)
    bt.base_train(cfg)
    run = run_dir('base', 'd1')
    steps = run_config(run)['plan']['num_iterations']
    assert steps >= 10 and list_checkpoints(run)[-1] == steps
    lr = [r['lr'] for r in read_jsonl(run/'metrics.jsonl') if 'lr' in r]
    assert lr[-1] < .4 * max(lr), 'a run that ends by the clock must still warm down'
    (run/'result.json').unlink()  # as if it had been killed at the very end
    monkeypatch.setattr(bt, 'within_minutes', lambda *a: pytest.fail('measured again'))
    assert bt.base_train(cfg)['num_iterations'] == steps
    assert bt.base_train(dataclasses.replace(cfg, num_iterations=2, model_tag='steps-count'))['num_iterations'] == 2


def test_same_command_again_is_skipped_and_another_is_refused(home):
    cfg = bt.BaseTrainConfig(**TINY, num_iterations=3)
    bt.base_train(cfg)
    assert bt.base_train(dataclasses.replace(cfg, eval_every=1, keep=1))['skipped']  # incidental settings do not make it another run
    other = dataclasses.replace(cfg, num_iterations=4)
    with pytest.raises(UserError, match='num_iterations 3 there, 4 here.*--resume.*--fresh.*--model-tag'): bt.base_train(other)
    assert bt.base_train(dataclasses.replace(other, resume=True))['num_iterations'] == 3
    assert bt.base_train(dataclasses.replace(other, fresh=True))['num_iterations'] == 4
    assert list_checkpoints(run_dir('base', 'd1'))[-1] == 4
    assert bt.base_train(dataclasses.replace(other, model_tag='mine'))['num_iterations'] == 4


def test_a_finished_run_is_shown_again_after_another(home):
    """The report shows the newest line of each stage: after runs a, b and a again, that is a, in pretraining, its evaluation and fine-tuning."""
    rows = lambda stage: [r['tag'] for r in read_jsonl(home/'report'/'results.jsonl') if r['stage'] == stage]
    def pipeline(tag):
        bt.base_train(bt.BaseTrainConfig(**TINY | dict(sequence_len=128, device_batch_size=2), num_iterations=2, seed=ord(tag), model_tag=tag))
        be.base_eval(be.BaseEvalConfig(model_tag=tag, eval_tokens=256, device_batch_size=2, ngram_tokens=0))
        sft.chat_sft(sft.ChatSFTConfig(**CHATS, num_iterations=2, model_tag=tag))
    for tag in 'aabba': pipeline(tag)
    assert rows('base_train') == rows('base_eval') == rows('chat_sft') == ['a', 'b', 'a']
    be.base_eval(be.BaseEvalConfig(source='sft', model_tag='a', eval_tokens=256, device_batch_size=2, ngram_tokens=0))
    pipeline('a')
    last = read_jsonl(home/'report'/'results.jsonl')[-1]
    assert (last['stage'], last['source'], last['tag']) == ('base_eval', 'base', 'a'), 'the evaluation of another stage came between'
    assert {k: v for k, v in last.items() if k != 'time'} == {k: v for k, v in read_jsonl(home/'report'/'results.jsonl')[1].items() if k != 'time'}


def test_another_tokenizer_makes_it_another_run(home, prepared):
    cfg = bt.BaseTrainConfig(**TINY, num_iterations=3)
    bt.base_train(cfg)
    RustBPETokenizer.train_from_iterator(['other words entirely'] * 30, 290).save(home/'tokenizer')
    with pytest.raises(UserError, match='tokenizer'): bt.base_train(cfg)


@pytest.mark.parametrize('flags, sentence', [
    (dict(depth=0), 'depth 0 is too small; give --depth 1'),
    (dict(preset='toaster'), "preset 'toaster' is unknown.*tiny-cpu"),
    (dict(device_batch_size=24, sequence_len=512, total_batch_size=65536), 'use --device-batch-size 16 or 32'),
    (dict(num_iterations=0), 'num_iterations 0'),
    (dict(num_iterations=None, minutes=0), 'minutes'),
    (dict(model_tag='../up'), 'cannot name a run'),
    (dict(corpus='nothing-like-this'), "no corpus 'nothing-like-this'"),
    (dict(device='tpu'), 'not available'),
    (dict(core='full'), 'no CORE bundle at .*run: python -m nanochat.core_eval'),
    (dict(core='half'), "core 'half' is unknown; use none, mini or full"),
    (dict(core='mini', core_max_per_task=0), 'leaves nothing to ask'),
    (dict(tracker='tensorboard'), 'use none, trackio, wandb or mlflow'),
    (dict(resume=True), 'no run d1 to resume')])
def test_bad_input_is_refused_before_work_begins(home, flags, sentence):
    with pytest.raises(UserError, match=sentence): bt.base_train(bt.BaseTrainConfig(**TINY | dict(num_iterations=3) | flags))
    assert not (home/'base_checkpoints').exists()


def test_full_disk_is_noticed_before_training(home, monkeypatch):
    import nanochat.common
    real = shutil.disk_usage
    monkeypatch.setattr(nanochat.common.shutil, 'disk_usage', lambda path: real(path)._replace(free=10_000))
    with pytest.raises(UserError, match='of disk and only'): bt.base_train(bt.BaseTrainConfig(**TINY, num_iterations=3))
    assert not (home/'base_checkpoints').exists()


def test_missing_tokenizer_and_missing_model_name_the_command(base_directory):
    with pytest.raises(UserError, match='nanochat.scripts.tok_train'): bt.base_train(bt.BaseTrainConfig(**TINY, num_iterations=3))
    with pytest.raises(UserError, match='nanochat.scripts.base_train'): sft.chat_sft(sft.ChatSFTConfig(**CHATS))
    assert not list(base_directory.rglob('config.json'))


def test_toml_config_with_flags_on_top(tmp_path):
    toml = tmp_path/'mine.toml'
    toml.write_text('depth = 6\nminutes = 2.5\ndevice-batch-size = 4\nmodel_tag = "six"\n')
    cfg = parse_config(bt.BaseTrainConfig, ['--config', str(toml), '--depth', '3', '--window-pattern', 'SL'])
    assert (cfg.depth, cfg.minutes, cfg.device_batch_size, cfg.model_tag, cfg.window_pattern) == (3, 2.5, 4, 'six', 'SL')
    toml.write_text('detph = 6\n')
    with pytest.raises(UserError, match='detph'): parse_config(bt.BaseTrainConfig, ['--config', str(toml)])
    chat = parse_config(sft.ChatSFTConfig, ['--minutes', '2', '--arithmetic', '100', '--source', 'mid'])
    assert (chat.minutes, chat.arithmetic, chat.source) == (2, 100, 'mid')
