"""Reinforcement learning and chat evaluation: exact gradients, on-policy data, exact resume, marks that batching does not change."""
import json
import math

import pytest
import torch

from nanochat.checkpoint_manager import init_run, list_checkpoints, load_checkpoint, run_dir, save_checkpoint
from nanochat.common import UserError, base_dir, read_jsonl
from nanochat.engine import Engine, last_logits
from nanochat.gpt import GPT, GPTConfig
from nanochat.scripts import chat_rl as rl
from nanochat.scripts.chat_eval import (TASKS, ChatEvalConfig, accuracy, centered, chat_core, chat_eval, evaluate_task, evaluate_task_categorical, evaluate_task_generative,
                                        letter_ids, task_names)
from nanochat.scripts.chat_rl import ChatRLConfig, Rollout, chat_rl, chosen_tokens, padded, pass_at_k, policy_gradient, questions_of, rate_at, rl_step, roll_out, with_advantages
from nanochat.tasks.common import Task, assistant, completion_text, spoken_text, user
from nanochat.tokenizer import RustBPETokenizer


class Vowels(Task):
    """Any answer earns its share of vowels: even a model that knows nothing earns something."""
    def num_examples(self): return 8
    def get_example(self, i): return {'messages': [user(f'Sing {"abcdefgh"[i]}' + '!' * i), assistant('aeiou')]}
    def reward(self, conversation, completion):
        said = spoken_text(completion)
        return sum(c in 'aeiou' for c in said) / max(len(said), 4)
    def evaluate(self, conversation, completion): return int(self.reward(conversation, completion) > 0.9)


class Letters(Task):
    """Multiple choice whose right letter is in the question."""
    eval_type = 'categorical'
    def num_examples(self): return 12
    def get_example(self, i): return {'messages': [user('Choose ' + 'ABCD'[i % 4] + '.' * i), assistant('ABCD'[i % 4])], 'letters': list('ABCD')}
    def evaluate(self, conversation, completion): return int(completion == completion_text(conversation))


TOK = RustBPETokenizer.train_from_iterator(['Sing a song of sixpence, choose a letter. Spell the word letter by letter.'], 280)
SETTINGS = dict(num_samples=8, max_tokens=8, temperature=1.0, top_k=50, batch_size=64)


@pytest.fixture(autouse=True)
def exact(fp32): torch.manual_seed(0)


def tiny(seed=0, random=False, sequence_len=128):
    torch.manual_seed(seed)
    with torch.device('meta'): model = GPT(GPTConfig(sequence_len=sequence_len, vocab_size=TOK.get_vocab_size(), n_layer=2, n_head=2, n_kv_head=2, n_embd=32, window_pattern='L'))
    model.to_empty(device='cpu')
    model.init_weights()
    if random:
        with torch.no_grad():
            for p in model.parameters(): p.add_(torch.randn(p.shape) * (0.1 if p.ndim < 2 else p.shape[-1]**-0.5))
    return model


# --- the gradient ----------------------------------------------------------------------------------------------------

def test_gradient_equals_the_definition():
    """Against log-softmax of the model's logits, one answer at a time; padding, batches and skipped answers change nothing."""
    model = tiny(random=True)
    rollouts = roll_out(Engine(model, TOK), Vowels(), [0, 3, 5], seed=1, **SETTINGS)
    tokens = chosen_tokens(rollouts)
    loss = -sum(r.advantage * model(torch.tensor([r.ids]))[0].log_softmax(-1)[t - 1, r.ids[t]] for r in rollouts for t in range(1, len(r.ids)) if r.mask[t]) / tokens
    loss.backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for batch_size in (1, 5, 100):
        model.zero_grad(set_to_none=True)
        assert policy_gradient(model, rollouts, tokens, batch_size) == pytest.approx(loss.item(), abs=1e-5)
        for n, p in model.named_parameters():
            if n in expected: torch.testing.assert_close(p.grad, expected[n], atol=1e-5, rtol=1e-4)


def test_tool_output_and_prompt_carry_no_gradient():
    """Changing a forced token's own prediction must not matter: only chosen tokens are targets."""
    r = Rollout([1, 2, 3, 4, 5, 6], [0, 0, 1, 0, 0, 1], 1.0, 0.5)
    x, y, advantage = padded([r, Rollout([7, 8], [0, 1], 0.0, -0.5)], torch.device('cpu'))
    assert x.tolist() == [[1, 2, 3, 4, 5], [7, 0, 0, 0, 0]] and y.tolist() == [[-1, 3, -1, -1, 6], [8, -1, -1, -1, -1]]
    assert advantage.tolist() == [[0.5], [-0.5]] and chosen_tokens([r]) == 2
    model = tiny(random=True)
    x = torch.tensor([r.ids[:-1]])
    all_masked = model(x, torch.full_like(x, -1), loss_reduction='none')
    assert all_masked.abs().sum() == 0


def test_rollouts_of_the_engine_mark_what_was_chosen():
    """Every 1 in the mask is a token the policy gave odds to; masks and ids fit; the end token is part of the answer."""
    model = tiny(random=True)
    rollouts = roll_out(Engine(model, TOK), Vowels(), list(range(8)), seed=4, **SETTINGS)
    end = TOK.encode_special('<|assistant_end|>')
    assert len(rollouts) == 64 and all(len(r.ids) == len(r.mask) for r in rollouts)
    assert any(r.ids[-1] == end and r.mask[-1] == 1 for r in rollouts), 'stopping is a choice too'
    for i, r in enumerate(rollouts): assert r.ids[:sum(m == 0 for m in r.mask)][:5] == TOK.render_for_completion(Vowels()[i // 8])[:5]


def test_the_engine_holds_nothing_during_an_update(vowels, monkeypatch):
    """On a GPU its copy of the weights, its caches and recordings would stand beside the activations of the backward pass."""
    held, engines, step, make = [], [], rl.rl_step, Engine.__init__
    monkeypatch.setattr(Engine, '__init__', lambda self, *args: (engines.append(self), make(self, *args))[1])
    monkeypatch.setattr(rl, 'rl_step', lambda *args: (held.extend(len(e._made) for e in engines), step(*args))[1])
    chat_rl(config(num_iterations=2))
    assert held == [0, 0]


def test_advantages_sum_to_zero_per_question():
    rollouts = with_advantages([Rollout([], [], x) for x in (0, 1, 0.5, 0.5, 1, 1, 1, 1)], 4)
    assert [r.advantage for r in rollouts] == [-0.5, 0.5, 0, 0, 0, 0, 0, 0]


def test_equal_rewards_change_no_weight():
    model = tiny(random=True)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rollouts = with_advantages([Rollout([1, 2, 3], [0, 1, 1], 1.0) for _ in range(4)], 4)
    line = rl_step(model, model.setup_optimizer(), rollouts, 1.0, 8, 0)
    assert line['useful'] == 0 and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_loss_that_is_not_finite_stops_before_weights_change():
    model = tiny(random=True)
    with torch.no_grad(): model.x0_lambdas[0] = math.nan
    before = model.lm_head.weight.clone()
    with pytest.raises(UserError, match='nan'):
        rl_step(model, model.setup_optimizer(), with_advantages([Rollout([1, 2 + int(x)], [0, 1], x) for x in (0.0, 1.0)], 2), 1.0, 8, 0)
    assert torch.equal(model.lm_head.weight, before)


def test_reward_rises():
    model, task = tiny(), Vowels()
    optimizer, engine, history = model.setup_optimizer(), Engine(model, TOK), []
    for step in range(30):
        rollouts = roll_out(engine, task, questions_of(step, 4, 8, 0), seed=step, **SETTINGS)
        history.append(rl_step(model, optimizer, rollouts, rate_at(step, 30, 1.0), 32, step)['reward'])
    assert sum(history[-5:]) / 5 > sum(history[:5]) / 5 + 0.3


def test_rollouts_are_on_policy():
    """The engine samples from the weights as they are now, not from a copy of before the step."""
    model, task = tiny().train(), Vowels()
    engine = Engine(model, TOK)
    first = roll_out(engine, task, [0], seed=0, **SETTINGS)
    with torch.no_grad(): model.lm_head.weight.copy_(torch.randn_like(model.lm_head.weight))
    assert [r.ids for r in roll_out(engine, task, [0], seed=0, **SETTINGS)] == [r.ids for r in roll_out(Engine(model, TOK), task, [0], seed=0, **SETTINGS)] != [r.ids for r in first]


# --- small parts -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('n', [2, 5, 8])
def test_pass_at_k_against_counting(n):
    from itertools import combinations
    for c in range(n + 1):
        for k in range(1, n + 1):
            draws = list(combinations(range(n), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(min(d) < c for d in draws) / len(draws))


def test_every_question_comes_once_per_pass():
    for per_step in (3, 7, 20):
        order = [i for step in range(40) for i in questions_of(step, per_step, 10, seed=5)]
        for start in range(0, len(order) - 9, 10): assert sorted(order[start:start + 10]) == list(range(10))
    assert questions_of(0, 10, 10, 5) != questions_of(1, 10, 10, 5) != questions_of(1, 10, 10, 6)


def test_rates_fall_linearly_to_zero():
    assert [rate_at(s, 4, 0.05) for s in range(5)] == pytest.approx([0.05, 0.0375, 0.025, 0.0125, 0])


# --- the stage -------------------------------------------------------------------------------------------------------

@pytest.fixture
def vowels(monkeypatch):
    """The stage on the vowel task, from a fresh model saved as a fine-tuned one."""
    from nanochat.scripts.chat_eval import TaskSpec
    monkeypatch.setitem(TASKS, 'vowels', TaskSpec(lambda size, split: Vowels(), 0.0, 8))
    save_checkpoint(init_run(run_dir('sft', 'd2'), {}, TOK), 7, tiny(random=True))


def config(**kw): return ChatRLConfig(**dict(dict(task='vowels', num_iterations=4, examples_per_step=2, num_samples=4, eval_problems=4, eval_samples=2, init_lr_frac=0.5), **kw))


def test_stage_writes_what_it_should(vowels, capsys):
    result = chat_rl(config(save_every=2))
    run = run_dir('rl', 'd2')
    rows = read_jsonl(run/'metrics.jsonl')
    assert list_checkpoints(run) == [2, 4] and [r['step'] for r in rows if 'lr' in r] == [1, 2, 3, 4] and [r['step'] for r in rows if 'eval_reward' in r] == [0, 4]
    assert {'reward_before', 'reward_after', 'accuracy_before', 'pass@1_before', 'pass@2_after'} <= set(result)
    logged = read_jsonl(base_dir()/'report'/'results.jsonl')[-1]
    assert logged['stage'] == 'chat_rl' and logged['reward_after'] == result['reward_after']
    stamp = (run/'step_000004'/'meta.json').stat().st_mtime_ns
    assert chat_rl(config(save_every=2)) == result and (run/'step_000004'/'meta.json').stat().st_mtime_ns == stamp, 'a finished run is found, not run again'
    assert 'is finished' in capsys.readouterr().out
    with pytest.raises(UserError, match='other settings'): chat_rl(config(seed=1))
    assert chat_rl(config(seed=1, fresh=True))['num_iterations'] == 4


def test_resume_is_exact(vowels, monkeypatch):
    """Four updates equal two, a crash, and two more: weights, optimizer and metrics, bit for bit."""
    chat_rl(config(model_tag='d2', save_every=2))
    whole, run = load_checkpoint(run_dir('rl', 'd2'), 4), run_dir('rl', 'd2')
    lines = [{k: v for k, v in r.items() if 'seconds' not in k and k not in ('tok_per_sec', 'memory')} for r in read_jsonl(run/'metrics.jsonl')]
    step = rl.rl_step
    def crash(*args):
        if args[5] == 3: raise RuntimeError('power cut')
        return step(*args)
    monkeypatch.setattr(rl, 'rl_step', crash)
    with pytest.raises(RuntimeError): chat_rl(config(save_every=2, fresh=True))
    assert list_checkpoints(run) == [2]
    monkeypatch.setattr(rl, 'rl_step', step)
    torch.manual_seed(12345)
    chat_rl(config(save_every=2))
    again = load_checkpoint(run, 4)
    assert all(torch.equal(v, again.model_state[k]) for k, v in whole.model_state.items())
    flat = lambda s: [t for g in s.optim_state['state'].values() for t in g.values() if isinstance(t, torch.Tensor)]
    assert flat(whole) and all(torch.equal(a, b) for a, b in zip(flat(whole), flat(again), strict=True))
    assert [{k: v for k, v in r.items() if 'seconds' not in k and k not in ('tok_per_sec', 'memory')} for r in read_jsonl(run/'metrics.jsonl')] == lines


def test_resume_in_fp16_keeps_the_scale(vowels, monkeypatch):
    """Scaled updates, one of them skipped because a gradient overflowed; a run that stopped in between ends with the same weights and the same scale."""
    from nanochat.grad_scale import GradScaler
    monkeypatch.setenv('NANOCHAT_DTYPE', 'float16')
    monkeypatch.setattr(rl, 'scaler_for', lambda dtype: GradScaler(scale=2.0**30, growth_interval=2, enabled=dtype == torch.float16))
    chat_rl(config(save_every=2))
    run = run_dir('rl', 'd2')
    rows = [r for r in read_jsonl(run/'metrics.jsonl') if 'lr' in r]
    assert rows[0]['skipped_steps'] >= 1 and rows[0]['grad_scale'] < 2.0**30 and all('grad_scale' in r for r in rows)
    whole = load_checkpoint(run, 4)
    assert torch.equal(load_checkpoint(run, 2).model_state['lm_head.weight'], whole.model_state['lm_head.weight']) == (rows[3]['skipped_steps'] - rows[1]['skipped_steps'] == 2)
    step = rl.rl_step
    def crash(*args):
        if args[5] == 3: raise RuntimeError('power cut')
        return step(*args)
    monkeypatch.setattr(rl, 'rl_step', crash)
    with pytest.raises(RuntimeError): chat_rl(config(save_every=2, fresh=True))
    monkeypatch.setattr(rl, 'rl_step', step)
    chat_rl(config(save_every=2))
    again = load_checkpoint(run, 4)
    assert again.meta['scaler'] == whole.meta['scaler'] and all(torch.equal(v, again.model_state[k]) for k, v in whole.model_state.items())


def test_scaled_updates_are_the_plain_ones():
    """In fp32 a scale changes nothing but the number in the log; an infinite gradient leaves every weight as it was."""
    from nanochat.grad_scale import GradScaler
    results = []
    for scaler in (None, GradScaler(scale=1024.0)):
        model = tiny(random=True)
        rollouts = with_advantages([Rollout([1, 2 + i, 3], [0, 1, 1], float(i)) for i in range(4)], 4)
        rl_step(model, model.setup_optimizer(), rollouts, 1.0, 8, 0, scaler)
        results.append(model.state_dict())
    assert all(torch.equal(v, results[1][k]) for k, v in results[0].items())
    model, scaler = tiny(random=True), GradScaler(scale=1024.0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.lm_head.weight.register_hook(lambda g: g * math.inf)
    line = rl_step(model, model.setup_optimizer(), rollouts, 1.0, 8, 0, scaler)
    assert line['grad_scale'] == 512 and line['skipped_steps'] == 1 and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_resuming_without_a_checkpoint_needs_the_model_it_began_with(vowels):
    """Such a run is its settings alone: with the weights of another model it would be another run under its name."""
    r, done = rl.prepare(rl.with_recipe(config()), torch.device('cpu'), 0.0)
    assert not done and list_checkpoints(r.run) == []
    save_checkpoint(init_run(run_dir('sft', 'd2'), {}, TOK), 7, tiny(seed=1, random=True))
    with pytest.raises(UserError, match='began from another model .--source sft, step 7'): chat_rl(config(resume=True))
    save_checkpoint(init_run(run_dir('sft', 'd2'), {}, TOK), 7, tiny(random=True))
    assert chat_rl(config(resume=True))['num_iterations'] == 4
    save_checkpoint(init_run(run_dir('sft', 'd2'), {}, TOK), 7, tiny(seed=1, random=True))
    assert chat_rl(config(resume=True))['num_iterations'] == 4, 'one with a checkpoint has its own weights'


def test_a_tracker_hears_all_of_it(vowels, monkeypatch):
    import sys
    from nanochat import trackers
    got = []
    monkeypatch.setitem(sys.modules, 'trackio', object())
    monkeypatch.setitem(trackers.OPENERS, 'trackio', lambda info: ('id', lambda values, step: got.append((step, set(values))), lambda: got.append('closed')))
    chat_rl(config(tracker='trackio'))
    assert [g[0] for g in got[:-1]] == [0, 1, 2, 3, 4, 4] and got[-1] == 'closed' and 'eval_reward' in got[0][1] and 'reward' in got[1][1]
    with pytest.raises(UserError, match="tracker 'paper' is unknown"): chat_rl(config(tracker='paper'))


def test_longer_runs_move_the_model_no_further():
    """The sum of all rates: as given; else that of the usual run, and beyond it that of 80 updates. A run that goes on has the same rates."""
    total = lambda **kw: sum(rl.rate_at(s, c.num_iterations, rl.first_rate(c)) for c in [rl.with_recipe(ChatRLConfig(**kw))] for s in range(c.num_iterations))
    assert total(num_iterations=80) == pytest.approx(.1 * 81 / 2) and total(num_iterations=40) == pytest.approx(.1 * 41 / 2)
    for n in (81, 150, 1000): assert total(num_iterations=n) == pytest.approx(total(num_iterations=80), rel=.02)
    assert total(num_iterations=150, init_lr_frac=.1) == pytest.approx(.1 * 151 / 2)


def test_the_recipe_for_gsm8k(shared_data, base_directory, monkeypatch):
    """`--task gsm8k` alone is the public recipe, on the real problems; without the data the command is named."""
    import shutil
    from nanochat.tasks.common import hub_folder
    save_checkpoint(init_run(run_dir('sft', 'd2'), {}, TOK), 7, tiny(random=True, sequence_len=64))
    with pytest.raises(UserError, match='gsm8k is not on this machine; type: python -m nanochat.tasks.common gsm8k'): chat_rl(ChatRLConfig(task='gsm8k'))
    for split in ('train', 'test'): shutil.copytree(shared_data/'hub'/'openai'/'gsm8k'/'main'/split, hub_folder('openai/gsm8k', 'main', split))
    r, done = rl.prepare(rl.with_recipe(ChatRLConfig(task='gsm8k', eval_problems=400)), torch.device('cpu'), 0.0)
    assert not done and (len(r.train_task), len(r.test_task)) == (7473, 400) and r.cfg.num_iterations == 7473 // 16
    assert r.cfg.num_samples == 16 and rl.first_rate(r.cfg) == .05 and r.sampling == dict(max_tokens=256, temperature=1.0, top_k=50, batch_size=128)
    result = chat_rl(ChatRLConfig(task='gsm8k', num_iterations=2, examples_per_step=2, num_samples=3, max_new_tokens=6, eval_problems=3, eval_samples=2, fresh=True))
    rows = [row for row in read_jsonl(r.run/'metrics.jsonl') if 'pass@2' in row]
    assert [row['step'] for row in rows] == [0, 2] and {'pass@1_before', 'pass@2_after', 'accuracy_after'} <= set(result)


def test_minutes_decide_the_length_once(vowels, monkeypatch):
    """The number of updates is measured when the run begins and kept: the same command finds it, a crash changes nothing."""
    monkeypatch.setattr(rl, 'iterations_for', lambda seconds, step_seconds, least=10: 3)
    result = chat_rl(config(minutes=0.01))
    assert result['num_iterations'] == 3 == list_checkpoints(run_dir('rl', 'd2'))[-1]
    monkeypatch.setattr(rl, 'iterations_for', lambda *a: 1 / 0)
    assert chat_rl(config(minutes=0.01)) == result
    with pytest.raises(UserError, match='minutes'): chat_rl(config(minutes=0.02))
    with pytest.raises(UserError, match='too short'): chat_rl(config(minutes=-1.0))


def test_measuring_changes_nothing(vowels):
    """A run whose length was measured is the run whose length was given."""
    result = chat_rl(config(minutes=1e-6))
    measured = load_checkpoint(run_dir('rl', 'd2')).model_state
    assert result['num_iterations'] == 10, 'never fewer than ten'
    chat_rl(config(num_iterations=10, fresh=True))
    assert all(torch.equal(v, measured[k]) for k, v in load_checkpoint(run_dir('rl', 'd2')).model_state.items())


@pytest.mark.parametrize('kw, word', [(dict(task='chess'), 'chess'), (dict(task='pydoc'), 'multiple choice'), (dict(num_samples=1), 'num-samples'), (dict(temperature=0.0), 'temperature'),
                                      (dict(num_iterations=0), 'num-iterations takes 1 or more'), (dict(source='other'), 'other')], ids=str)
def test_bad_settings_are_refused(kw, word):
    with pytest.raises(UserError, match=word): chat_rl(ChatRLConfig(**kw))


def test_only_tasks_with_training_questions_are_practised(monkeypatch):
    """Practised on its test questions, a model would be marked on what it has learned by heart. Asked before any data is."""
    monkeypatch.setattr(rl, 'need_task_data', lambda *args: None)
    for task in TASKS:
        check = lambda: rl.check_settings(rl.with_recipe(ChatRLConfig(task=task)))
        if TASKS[task].chance or task == 'humaneval':
            with pytest.raises(UserError, match='multiple choice|test questions'): check()
        else: check()


def test_no_model_says_what_to_run():
    with pytest.raises(UserError, match='chat_sft'): chat_rl(ChatRLConfig())
    with pytest.raises(UserError, match='chat_sft'): chat_eval(ChatEvalConfig())


# --- evaluation ------------------------------------------------------------------------------------------------------

def test_batching_changes_no_mark():
    model, task = tiny(random=True).eval(), Vowels()
    engine = Engine(model, TOK)
    one = evaluate_task_generative(task, engine, batch_size=1, max_tokens=10)
    assert one == evaluate_task_generative(task, engine, batch_size=3, max_tokens=10) == evaluate_task(task, engine, max_tokens=10)
    single = [evaluate_task_categorical(Letters(start=i, stop=i + 1), engine)[0]['completion'] for i in range(12)]
    assert single == [r['completion'] for r in evaluate_task_categorical(Letters(), engine, batch_size=5)]


def test_categorical_takes_the_likeliest_offered_letter():
    """Only the offered letters count, at the last position of the prompt, whatever else the model would rather say."""
    model, task = tiny(random=True).eval(), Letters()
    for r in evaluate_task_categorical(task, Engine(model, TOK)):
        logits = last_logits(model, [TOK.render_for_completion(task[r['index']])])[0]
        with torch.inference_mode(): plain = model(torch.tensor([TOK.render_for_completion(task[r['index']])]))[0, -1]
        assert r['completion'] == max('ABCD', key=lambda c: plain[TOK.encode(c)[0]]) == max('ABCD', key=lambda c: logits[TOK.encode(c)[0]])
        assert r['correct'] == (r['completion'] == 'ABCD'[r['index'] % 4]) and sum(r['odds']) == pytest.approx(1, abs=1e-3)
    with pytest.raises(UserError, match='one token'): letter_ids(TOK, ['A', 'ABCDXYZ'])


def test_a_model_that_learns_the_letters_scores_full_marks():
    """The whole chain can reach 1.0: rendering, logits position, letters, marking. An off-by-one anywhere keeps it at chance."""
    model, task = tiny(), Letters()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    rows = [Rollout(*TOK.render_conversation(task[i]), 0.0, 1.0) for i in range(12)]
    for _ in range(250):
        loss = policy_gradient(model, rows, chosen_tokens(rows), 12)
        if loss < 0.02: break
        optimizer.step()
        optimizer.zero_grad()
    engine = Engine(model.eval(), TOK)
    assert accuracy(evaluate_task_categorical(task, engine)) == 1
    task.eval_type = 'generative'
    assert accuracy(evaluate_task(task, engine, max_tokens=4)) == 1


def test_chat_eval_records_everything(capsys, monkeypatch):
    from nanochat.scripts.chat_eval import TaskSpec
    monkeypatch.setitem(TASKS, 'letters', TaskSpec(lambda size, split: Letters(), 0.25))
    monkeypatch.setitem(TASKS, 'vowels', TaskSpec(lambda size, split: Vowels(), 0.0))
    save_checkpoint(init_run(run_dir('sft', 'd2'), {}, TOK), 7, tiny(random=True))
    result = chat_eval(ChatEvalConfig(tasks='vowels,letters', max_problems=6, max_new_tokens=8))
    assert result['source'] == 'sft' and result['model_tag'] == 'd2' and result['step'] == 7
    for name, chance in (('vowels', 0.0), ('letters', 0.25)):
        score, rows = result['tasks'][name], read_jsonl(run_dir('sft', 'd2')/f'eval_{name}.jsonl')
        assert score['chance'] == chance and score['n'] == len(rows) == 6 and score['accuracy'] == sum(r['correct'] for r in rows) / 6
        assert {'index', 'question', 'answer', 'completion', 'correct', 'reward'} <= set(rows[0])
    logged = read_jsonl(base_dir()/'report'/'results.jsonl')[-1]
    assert logged['stage'] == 'chat_eval' and logged['tasks'] == json.loads(json.dumps(result['tasks']))
    out = capsys.readouterr().out
    assert 'chance  25%' in out and 'ChatCORE' in out


def test_scores_and_names():
    assert centered(0.25, 0.25) == 0 and centered(1, 0.25) == 1 and chat_core({'a': dict(accuracy=1.0, chance=0.25), 'b': dict(accuracy=0.0, chance=0.0)}) == 0.5
    assert task_names('all') == [n for n in TASKS if not TASKS[n].hub] and task_names(' pydoc , arithmetic') == ['pydoc', 'arithmetic']
    for bad in ('', 'pydoc,chess'):
        with pytest.raises(UserError, match='use'): task_names(bad)
