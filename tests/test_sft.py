"""Fine-tuning at full size, in small: mixtures by flag, settings and momentum from the checkpoint, ChatCORE during training, public checkpoints."""
import dataclasses
import json
import math
import os
import shutil

import pytest
import torch

from nanochat.checkpoint_manager import init_run, load_checkpoint, run_dir, save_checkpoint
from nanochat.common import Ranks, UserError, read_jsonl
from nanochat.gpt import GPT, GPTConfig
from nanochat.scaling import plan_training
from nanochat.scripts import chat_sft as sft, mid_train as mt
from nanochat.tasks.common import TASK_DATA, hub_folder
from nanochat.tasks.mixture import MIXTURES, PARTS, Item, make_part, make_parts, need_data, parse_mixture, watched_parts
from nanochat.tokenizer import RustBPETokenizer

TOK = RustBPETokenizer.train_from_iterator(['How many letters are in the word? The answer is 12. Which function of the standard library does this? Spell it.'], 300)
CPU = torch.device('cpu')


@pytest.fixture(autouse=True)
def exact(fp32): torch.manual_seed(0)


def config(**kw): return GPTConfig(**dict(dict(sequence_len=128, vocab_size=TOK.get_vocab_size(), n_layer=2, n_head=2, n_kv_head=2, n_embd=32, window_pattern='L'), **kw))


def tiny(c):
    with torch.device('meta'): model = GPT(c)
    model.to_empty(device='cpu')
    model.init_weights()
    return model


def pretrained(corpus='climbmix', **kw):
    """A base model as base_train leaves it: settings that are not the defaults, and an optimizer with momentum."""
    c = config(**kw)
    model, plan = tiny(c), plan_training(c, device_batch_size=2, total_batch_size=512, num_iterations=9)
    optimizer = model.setup_optimizer(**plan.optimizer_args())
    x = torch.randint(0, 300, (2, 64))
    model(x, x.roll(-1, 1)).backward()
    optimizer.step()
    save_checkpoint(init_run(run_dir('base', 'd2'), {}, TOK), 9, model, optimizer, dict(corpus=corpus, device_batch_size=2, plan=dataclasses.asdict(plan)))
    return model, optimizer, plan


def place(shared_data, *names):
    """The hub's files where a download would have put them."""
    for name in names:
        for where in TASK_DATA[name]:
            if (source := shared_data/'hub'/os.path.join(*where)).exists(): shutil.copytree(source, hub_folder(*where), dirs_exist_ok=True)


# --- mixtures --------------------------------------------------------------------------------------------------------

def test_the_corpus_chooses_the_mixture():
    for corpus, name in (('climbmix', 'hub'), ('fineweb-edu', 'hub'), ('stdlib', 'offline'), ('my-books', 'offline'), (None, 'offline')):
        cfg = mt.with_mixture(sft.ChatSFTConfig(), corpus)
        assert (cfg.mixture == 'offline') == (name == 'offline')
        if name == 'hub': assert parse_mixture(cfg.mixture) == parse_mixture('hub') == [Item('smoltalk'), Item('mmlu', None, 3), Item('gsm8k', None, 4), Item('simplespelling', 200000), Item('spellingbee', 80000), Item('identity-hub', None, 2)]
    assert mt.with_mixture(sft.ChatSFTConfig(mixture='offline'), 'climbmix').mixture == 'offline'
    with pytest.raises(UserError, match='--arithmetic belongs to the offline mixture.*arithmetic:8000'): mt.with_mixture(sft.ChatSFTConfig(arithmetic=8000), 'climbmix')


@pytest.mark.parametrize('text, sentence', [
    ('gsm9k', "there is no 'gsm9k' to mix; use the recipes hub or offline.*gsm8k"), ('gsm8k:x', 'is not an entry'), ('gsm8k**2', 'is not an entry'), ('hub:5', 'is a recipe'),
    ('gsm8k:0', 'is nothing'), (',', 'mixture is empty'), ('none.toml', 'cannot read the mixture')])
def test_mistakes_in_a_mixture(text, sentence):
    with pytest.raises(UserError, match=sentence): parse_mixture(text)


def test_every_word_of_the_example():
    """The line of the contract, as it may be typed."""
    items = parse_mixture('smoltalk:460000,mmlu:100000*3,gsm8k*4,simplespelling:200000,spellingbee:80000,identity*2')
    assert [(i.name, i.count, i.times) for i in items] == [('smoltalk', 460000, 1), ('mmlu', 100000, 3), ('gsm8k', None, 4), ('simplespelling', 200000, 1), ('spellingbee', 80000, 1), ('identity', None, 2)]
    assert parse_mixture(', '.join(map(str, items))) == items and parse_mixture('hub*2')[2] == Item('gsm8k', None, 8)


def test_the_hub_mixture_on_real_data(shared_data, base_directory):
    """Sizes, repetitions, held-out splits; without the data the command that fetches it, for a count beyond a set its size."""
    for split_of_the_work in (lambda: make_parts(parse_mixture('hub')), lambda: need_data(parse_mixture('hub'))):
        with pytest.raises(UserError, match='data of smoltalk, mmlu, gsm8k is not on this machine; type: python -m nanochat.tasks.common smoltalk mmlu gsm8k .or: all.'): split_of_the_work()
    place(shared_data, 'smoltalk', 'mmlu', 'gsm8k')
    tasks = make_parts(parse_mixture('hub'))
    assert list(map(len, tasks))[:10] == [8000, 8315, 8315, 8315, 7473, 7473, 7473, 7473, 200_000, 80_000] and len(tasks) == 12
    cfg = mt.with_mixture(sft.ChatSFTConfig(eval_size=7), 'climbmix')
    whole, watched = mt.mixture(cfg), mt.held_out(cfg)
    assert len(whole) == sum(map(len, tasks)) and len(watched) == 7 * 5
    asked = lambda c: json.dumps(c['messages'])
    trained = {asked(c) for t in tasks[:1] + tasks[1:2] + tasks[4:5] for c in t}
    assert not any(asked(c) in trained for c in watched)
    with pytest.raises(UserError, match='gsm8k has 7,473 conversations, not 8,000; write gsm8k for all of them, or gsm8k.2 for two passes'): make_part(Item('gsm8k', 8000))
    assert len(make_part(Item('gsm8k', 50))) == 50 and make_part(Item('gsm8k', 50))[3] == make_part(Item('gsm8k'))[3], 'a count takes the first of one order'


def test_every_part_can_be_made_and_watched(shared_data, base_directory):
    place(shared_data, 'smoltalk', 'mmlu', 'gsm8k')
    for name in PARTS:
        if name.startswith('arc'): continue  # its training split is not among the real data here
        assert len(make_part(Item(name, 3))) == 3 and [len(t) for t in watched_parts([Item(name, 3, 2), Item(name)], 2)] == ([] if name.startswith('identity') else [2])
    assert set(MIXTURES) == {'hub', 'offline'} and all(parse_mixture(m) for m in MIXTURES)


def test_a_mixture_from_toml_and_your_own_file(tmp_path):
    (tmp_path/'own.jsonl').write_text('[{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ada."}]\n' * 3)
    (tmp_path/'mix.toml').write_text(f'arithmetic = 5\nspellingbee = {{count = 4, times = 2}}\n"{tmp_path}/own.jsonl" = {{times = 3}}\n')
    task = mt.mixture(mt.with_mixture(sft.ChatSFTConfig(mixture=str(tmp_path/'mix.toml')), 'stdlib'))
    assert len(task) == 5 + 8 + 9 and sum(c['messages'][0]['content'] == 'Who?' for c in task) == 9
    with pytest.raises(UserError, match='cannot read the conversations'): mt.mixture(sft.ChatSFTConfig(mixture='nowhere.jsonl'))


# --- what comes from the checkpoint ----------------------------------------------------------------------------------

def prepared(**kw): return mt.prepare(sft.ChatSFTConfig(**dict(dict(mixture='arithmetic:40', device='cpu'), **kw)), sft.SFT, CPU, Ranks())


def test_settings_are_inherited():
    _, _, old = pretrained()
    setup = prepared()
    assert setup.rows == 2 and setup.plan.total_batch_size == 512 and setup.plan.grad_accum_steps == 2 and setup.plan.lr_scale == old.lr_scale
    assert (setup.plan.weight_decay, setup.plan.warmup_steps, setup.plan.final_lr_frac, setup.plan.warmdown_ratio) == (0, 0, 0, .5)
    model, optimizer = mt.build(setup)
    fresh = model.setup_optimizer(**old.optimizer_args())
    assert [g['lr'] for g in optimizer.param_groups] == pytest.approx([.8 * g['lr'] for g in fresh.param_groups]) and all(g['weight_decay'] == 0 for g in optimizer.param_groups if g['kind'] == 'muon')
    n = setup.plan.num_iterations
    assert [setup.plan.schedule(s)['lr'] for s in (0, n // 2 - 1, n)] == pytest.approx([1, 1, 0], abs=.01)
    assert prepared(total_batch_size=1024, device_batch_size=4).plan.grad_accum_steps == 2


def test_momentum_is_taken_over():
    _, old, _ = pretrained()
    _, warm = mt.build(prepared())
    _, cold = mt.build(prepared(fresh_momentum=True))
    flat = lambda o: [v for p in (p for g in o.param_groups for p in g['params']) for v in o.state.get(p, {}).values() if isinstance(v, torch.Tensor)]
    assert flat(warm) and not flat(cold) and all(torch.equal(a, b) for a, b in zip(flat(old), flat(warm), strict=True))


def test_an_optimizer_that_does_not_fit_is_refused():
    model, optimizer, plan = pretrained()
    half = type(optimizer)([{k: v for k, v in g.items() if k != 'initial_lr'} for g in optimizer.param_groups[:3]])
    save_checkpoint(run_dir('base', 'd2'), 10, model, half, dict(corpus='stdlib', device_batch_size=2, plan=dataclasses.asdict(plan)))
    with pytest.raises(UserError, match='does not fit this model.*--fresh-momentum'): mt.build(prepared())


def test_a_public_checkpoint_is_tuned(shared_data, base_directory):
    """Somebody else's directory: no optimizer, no plan, a tokenizer beside it; the hub's mixture is the default."""
    path = shared_data/'reference'/'base_checkpoints'/'d4'
    with pytest.raises(UserError, match='smoltalk, mmlu, gsm8k is not on this machine'): sft.chat_sft(sft.ChatSFTConfig(source='public', path=str(path), device='cpu'))
    result = sft.chat_sft(sft.ChatSFTConfig(source='public', path=str(path), mixture='arithmetic:30', num_iterations=2, device_batch_size=1, total_batch_size=256, eval_size=2, device='cpu'))
    assert result['tag'] == 'd4' and result['num_iterations'] == 2 and math.isfinite(result['val_loss']) and load_checkpoint(run_dir('sft', 'd4')).meta['source'] == 'public'


# --- the stage -------------------------------------------------------------------------------------------------------

SMALL = dict(mixture='arithmetic:60, spellingbee:40', num_iterations=4, eval_size=3, device='cpu')


def test_chatcore_during_training():
    """Every two steps and at the end, into the metrics; it changes nothing of what is trained."""
    pretrained('stdlib')
    result = sft.chat_sft(sft.ChatSFTConfig(**SMALL, chatcore_every=2, chatcore_max_problems=3, chatcore_tasks='pydoc,arithmetic'))
    run = run_dir('sft', 'd2')
    rows = [r for r in read_jsonl(run/'metrics.jsonl') if 'chatcore' in r]
    assert [r['step'] for r in rows] == [2, 4] and rows[-1]['chatcore'] == result['chatcore']
    for r in rows: assert r['chatcore'] == pytest.approx(((r['chatcore/pydoc'] - .25) / .75 + r['chatcore/arithmetic']) / 2)
    weights = load_checkpoint(run).model_state
    again = sft.chat_sft(sft.ChatSFTConfig(**SMALL, fresh=True))
    assert 'chatcore' not in again and all(torch.equal(v, weights[k]) for k, v in load_checkpoint(run).model_state.items())
    assert sft.chat_sft(sft.ChatSFTConfig(**SMALL))['skipped'], 'the same run, asked or not'
    with pytest.raises(UserError, match='other settings'): sft.chat_sft(sft.ChatSFTConfig(**SMALL | dict(mixture='arithmetic:61')))
    with pytest.raises(UserError, match='other settings'): sft.chat_sft(sft.ChatSFTConfig(num_iterations=4, mixture='offline', device='cpu'))


def test_chatcore_is_refused_before_training(base_directory):
    pretrained('stdlib')
    for kw, sentence in ((dict(chatcore_every=2, chatcore_tasks='gsm8k'), 'gsm8k is not on this machine.*--chatcore-tasks'), (dict(chatcore_tasks='chess'), "no task 'chess'"), (dict(chatcore_every=-2), 'takes -1 or more')):
        with pytest.raises(UserError, match=sentence): sft.chat_sft(sft.ChatSFTConfig(**SMALL, **kw))
    assert not run_dir('sft', 'd2').exists()


def test_runs_from_before_there_was_a_choice_are_recognised():
    """A run directory whose config knows nothing of mixtures is the offline mixture's."""
    pretrained('stdlib')
    sizes = dict(dict.fromkeys(mt.SIZES, 0), arithmetic=40, identity=0)
    cfg = sft.ChatSFTConfig(**sizes, num_iterations=2, eval_size=2, device='cpu')
    sft.chat_sft(cfg)
    path = run_dir('sft', 'd2')/'config.json'
    stored = json.loads(path.read_text())
    for k in ('mixture', 'fresh_momentum', 'path'): assert stored.pop(k) is None
    path.write_text(json.dumps(stored))
    assert sft.chat_sft(cfg)['skipped'] and sft.chat_sft(sft.ChatSFTConfig(resume=True, device='cpu'))['skipped']


def test_fine_tuning_in_fp16(monkeypatch):
    monkeypatch.setenv('NANOCHAT_DTYPE', 'float16')
    pretrained('stdlib')
    result = sft.chat_sft(sft.ChatSFTConfig(**SMALL))
    rows = [r for r in read_jsonl(run_dir('sft', 'd2')/'metrics.jsonl') if 'lr' in r]
    assert math.isfinite(result['val_loss']) and rows[-1]['grad_scale'] > 0 and load_checkpoint(run_dir('sft', 'd2')).meta['scaler']['scale'] == rows[-1]['grad_scale']
