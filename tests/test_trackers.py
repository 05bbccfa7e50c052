"""Trackers get the same numbers as metrics.jsonl, and can neither stop nor change a run."""
import json, subprocess, sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nanochat.common import UserError, read_jsonl
from nanochat.optim import MuonAdamW
from nanochat.scaling import TrainPlan
from nanochat.trackers import TRACKERS, check_tracker, numbers, tracking
from nanochat.train import Hook, Job, run_job


class Toy:
    """What trackio, wandb and mlflow have in common with a diary. `fail` makes one of its functions raise."""
    def __init__(self, fail=''):
        self.diary, self.fail = [], fail

    def note(self, what, *args):
        if what == self.fail: raise ConnectionError('no route to host\nsecond line')
        self.diary.append((what, *args))

    def module(self, name):
        if name == 'mlflow':
            run = SimpleNamespace(info=SimpleNamespace(run_id='m1'))
            return SimpleNamespace(set_experiment=lambda project: None, start_run=lambda run_id=None, run_name=None: self.note('init', run_id or 'm1') or run,
                                   log_params=lambda params: self.note('params', params), log_metrics=lambda values, step: self.note('log', step, values), end_run=lambda: self.note('finish'))
        log, finish = lambda values, step: self.note('log', step, values), lambda: self.note('finish')
        init = lambda **kw: self.note('init', kw.get('id') or kw['name']) or SimpleNamespace(log=log, finish=finish)
        return SimpleNamespace(init=init, log=log, finish=finish)


@pytest.fixture
def toy(monkeypatch):
    def put(name, fail=''):
        t = Toy(fail)
        monkeypatch.setitem(sys.modules, name, t.module(name))
        return t
    return put


class Tokenizer:
    def save(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder/'t').write_text('x')
    def fingerprint(self): return 'x'


class Line(torch.nn.Module):
    """The smallest thing that the loop can train."""
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(4))
    def forward(self, x, y, loss_reduction='sum'): return ((self.w[x] - y)**2).sum()


def job(run, tracker, steps=6, save=lambda: None):
    model = Line()
    optimizer = MuonAdamW([dict(kind='adamw', params=[model.w], lr=.1, betas=(.8, .9), eps=1e-8, weight_decay=0.)])
    for g in optimizer.param_groups: g['initial_lr'] = g['lr']
    plan = TrainPlan(**{f: 1 for f in TrainPlan.__dataclass_fields__} | dict(num_iterations=steps, grad_accum_steps=1, weight_decay=0.))
    batches = ((torch.tensor([[0, 1, 2, 3]]), torch.tensor([[1, 2, 3, 4]]), None) for _ in iter(int, 1))
    def looked(step):
        if step == 3: save()
        return dict(val=step / 2)
    return Job(run, dict(depth=1), Tokenizer(), model, optimizer, lambda state: batches, plan, hooks=[Hook(looked, 3)], tracker=tracker)


@pytest.mark.parametrize('name', TRACKERS[1:])
def test_the_same_numbers_as_the_file(name, toy, tmp_path, monkeypatch):
    diary = toy(name)
    run_job(job(tmp_path/'base_checkpoints'/'d1', name), 'training')
    sent = [(step, values) for kind, *rest in diary.diary if kind == 'log' for step, values in [rest]]
    assert sent == [(r['step'], numbers(r)) for r in read_jsonl(tmp_path/'base_checkpoints'/'d1'/'metrics.jsonl')] and len(sent) == 8
    assert [v['val'] for _, v in sent if 'val' in v] == [1.5, 3.0] and diary.diary[0][0] == 'init' and diary.diary[-1] == ('finish',)


@pytest.mark.parametrize('name', TRACKERS[1:])
def test_a_stopped_run_goes_on_in_its_old_place(name, toy, tmp_path):
    diary, run = toy(name), tmp_path/'base_checkpoints'/'d1'
    def stop(): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): run_job(job(run, name, save=stop), 'training')
    assert diary.diary[-1] == ('finish',)
    again = job(run, name)
    again.begin = False
    run_job(again, 'training')
    first, second = [d[1] for d in diary.diary if d[0] == 'init']
    assert first == second == json.loads((run/'tracker.json').read_text())[name]
    assert [d[0] for d in diary.diary].count('params') == (name == 'mlflow')


def test_a_second_tracker_keeps_the_first_ones_place(toy, tmp_path):
    diaries = {name: toy(name) for name in ('wandb', 'mlflow')}
    for name in ('wandb', 'mlflow', 'wandb'):
        with tracking(name, tmp_path, {}): pass
    first, again = [d[1] for d in diaries['wandb'].diary if d[0] == 'init']
    assert first == again and set(json.loads((tmp_path/'tracker.json').read_text())) == {'wandb', 'mlflow'}


@pytest.mark.parametrize('name', TRACKERS[1:])
@pytest.mark.parametrize('fail', ['log', 'finish'])
def test_a_broken_tracker_is_said_once_and_stops_nothing(name, fail, toy, tmp_path, capsys):
    toy(name, fail)
    result = run_job(job(tmp_path/'d1', name), 'training')
    plain = run_job(job(tmp_path/'d2', 'none'), 'training')
    assert result.loss == plain.loss and result.step == 6 and len(read_jsonl(tmp_path/'d1'/'metrics.jsonl')) == 8
    assert capsys.readouterr().out.count(f'{name} failed (ConnectionError: no route to host)') == 1


def test_one_that_cannot_begin_says_what_to_do(toy, tmp_path):
    toy('wandb', 'init')
    with pytest.raises(UserError, match='wandb could not begin a run: no route to host; log in with: wandb login'):
        with tracking('wandb', tmp_path, {}): pass
    assert not (tmp_path/'tracker.json').exists()


def test_only_the_first_rank_talks(toy, tmp_path, monkeypatch):
    diary = toy('trackio')
    for k, v in dict(RANK='1', LOCAL_RANK='1', WORLD_SIZE='2').items(): monkeypatch.setenv(k, v)
    with tracking('trackio', tmp_path, {}) as t: t.log(dict(step=1, loss=2.))
    assert diary.diary == []


def test_absent_and_unknown(monkeypatch):
    import importlib.util
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name, *a: None if name == 'mlflow' else real(name, *a))
    monkeypatch.delitem(sys.modules, 'mlflow', raising=False)
    with pytest.raises(UserError, match='mlflow is not installed; run: pip install mlflow'): check_tracker('mlflow')
    with pytest.raises(UserError, match='use none, trackio, wandb or mlflow'): check_tracker('tensorboard')
    check_tracker('none')


def test_unknown_tracker_on_the_command_line():
    done = subprocess.run([sys.executable, '-m', 'nanochat.scripts.base_train', '--tracker', 'tensorboard'], capture_output=True, text=True)
    assert done.returncode == 2 and 'use none, trackio, wandb or mlflow' in done.stderr and 'Traceback' not in done.stderr


@pytest.mark.parametrize('name', TRACKERS[1:])
def test_the_real_package_where_it_is_installed(name, tmp_path, monkeypatch):
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('TRACKIO_DIR', str(tmp_path/'trackio'))
    monkeypatch.setenv('MLFLOW_TRACKING_URI', f'sqlite:///{tmp_path}/mlflow.db')
    monkeypatch.chdir(tmp_path)
    pytest.importorskip(name, reason=f'{name} is not installed')
    run_job(job(tmp_path/'d1', name), 'training')
    again = job(tmp_path/'d1', name, steps=6)
    again.begin = False
    run_job(again, 'training')
    assert json.loads((tmp_path/'d1'/'tracker.json').read_text())[name]
    assert any(p.is_file() and p.stat().st_size > 100 for top in ('trackio', 'd1/wandb', 'mlflow.db') for p in [tmp_path/top, *(tmp_path/top).rglob('*')])
