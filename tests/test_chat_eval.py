"""Ranking whole answers by mean loss, the tasks that are ranked, and the samples that reach the report."""
import shutil

import pytest
import torch

from nanochat.checkpoint_manager import init_run, run_dir, save_checkpoint
from nanochat.common import UserError, read_jsonl
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.report import generate_report
from nanochat.scripts.chat_eval import (TASKS, ChatEvalConfig, TaskSpec, accuracy, answers_to, chat_eval, evaluate_task, evaluate_task_ranked, make_task, mean_losses,
                                        ks_of, pass_rates, ready_tasks, sample_task, samples_from, score_line, targets_of, task_names)
from nanochat.tasks.arithmetic import Arithmetic
from nanochat.tasks.common import TASK_DATA, Task, assistant, completion_text, hub_folder, user
from nanochat.tasks.pydoc import PyDoc
from nanochat.tokenizer import RustBPETokenizer

ANSWERS = ('no', 'a rather long answer', 'yes', 'sixpence')
TOK = RustBPETokenizer.train_from_iterator(['Sing a song of sixpence, a pocket full of rye. What does it say? A rather long answer, yes or no.'], 300)


class Sayings(Task):
    """Four answers of very different lengths; the question's length differs too, so batches need padding."""
    def num_examples(self): return 12
    def get_example(self, i):
        return {'messages': [user(f'What does it say?{"!" * (5 * i % 13)} {"abcd"[i % 4]}'), assistant(ANSWERS[i % 4])], 'choices': list(ANSWERS[i % 3:] + ANSWERS[:i % 3])}
    def evaluate(self, conversation, completion): return int(completion == completion_text(conversation))


@pytest.fixture(autouse=True)
def exact(fp32): torch.manual_seed(0)


def tiny():
    """A model whose predictions differ from token to token: fresh ones are uniform."""
    with torch.device('meta'): model = GPT(GPTConfig(sequence_len=256, vocab_size=TOK.get_vocab_size(), n_layer=2, n_head=2, n_kv_head=2, n_embd=32, window_pattern='SL'))
    model.to_empty(device='cpu')
    model.init_weights()
    with torch.no_grad():
        for p in model.parameters(): p += 0.1 * torch.randn_like(p)
    return model.eval()


def plain_losses(model, conversation):
    """The definition: log-softmax of the uncached logits, mean over the assistant's tokens, one candidate at a time."""
    found = []
    for choice in conversation['choices']:
        ids, mask = TOK.render_conversation({'messages': conversation['messages'][:-1] + [assistant(choice)]})
        with torch.inference_mode(): logp = model(torch.tensor([ids]))[0].log_softmax(-1)
        spoken = [t for t in range(1, len(ids)) if mask[t]]
        assert TOK.decode([ids[t] for t in spoken]) == choice + '<|assistant_end|>'
        found.append(-sum(logp[t - 1, ids[t]].item() for t in spoken) / len(spoken))
    return found


def test_mean_loss_is_the_definition_whatever_the_batch():
    model, task = tiny(), Sayings()
    rows = [TOK.render_conversation(a) for c in task for a in answers_to(c)]
    wanted = [loss for c in task for loss in plain_losses(model, c)]
    assert len({len(ids) for ids, _ in rows}) > 5 and max(wanted) - min(wanted) > 0.1
    for batch_tokens in (1, 100, 10**6):
        assert mean_losses(model, rows, batch_tokens) == pytest.approx(wanted, rel=1e-4)


def test_targets_are_the_assistants_tokens_shifted():
    assert targets_of([1, 5, 6, 7, 2], [0, 0, 1, 1, 0]) == [-1, 6, 7, -1]


def test_ranking_takes_the_lowest_mean_and_batching_changes_nothing():
    model, task = tiny(), Sayings()
    engine = Engine(model, TOK)
    records = evaluate_task_ranked(task, engine)
    for r, c in zip(records, task, strict=True):
        losses = plain_losses(model, c)
        assert r['completion'] == c['choices'][losses.index(min(losses))] and r['losses'] == pytest.approx(losses, rel=1e-3)
        assert r['correct'] == (r['completion'] == completion_text(c)) and r['choices'] == c['choices']
    for size in (1, 5): assert evaluate_task_ranked(task, engine, batch_size=size) == records
    alone = [evaluate_task(Sayings(start=i, stop=i + 1), engine)[0]['completion'] for i in range(12)]
    assert alone == [r['completion'] for r in records]


def test_mean_not_sum_and_order_of_choices_is_no_hint():
    """A model to which all tokens are equally likely has the same mean for every answer; a sum would prefer the shortest."""
    model = tiny()
    with torch.no_grad(): model.lm_head.weight.zero_()
    for r in evaluate_task_ranked(Sayings(), Engine(model, TOK)): assert max(r['losses']) - min(r['losses']) < 1e-3
    shuffled = [dict(c, choices=c['choices'][::-1]) for c in Sayings()]
    model = tiny()
    rank = lambda items: [c['choices'][(x := mean_losses(model, [TOK.render_conversation(a) for a in answers_to(c)])).index(min(x))] for c in items]
    assert rank(shuffled) == rank(Sayings())


def test_a_model_that_learns_the_answers_ranks_them_first():
    """The whole chain can reach 1.0; answers learned for other questions stay where guessing is."""
    model, task = tiny().train(), Sayings()
    rows = [TOK.render_conversation(c) for c in task]
    T = max(len(ids) for ids, _ in rows)
    x = torch.tensor([ids[:-1] + [0] * (T - len(ids)) for ids, _ in rows])
    y = torch.tensor([targets_of(*r) + [-1] * (T - len(r[0])) for r in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(200):
        loss = model(x, y)
        if loss < 0.05: break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert accuracy(evaluate_task(task, Engine(model.eval(), TOK))) == 1


def test_names_of_the_pydoc_tasks():
    kinds = {'pydoc': 'name', 'pydoc-pick': 'pick', 'pydoc-choice': 'choice', 'pydoc-qa': 'qa'}
    for name, kind in kinds.items():
        task = make_task(name, size=5)
        assert task.kind == kind and len(task) == 5 and TASKS[name].chance == (0 if kind == 'qa' else 0.25)
        assert ('choices' in task[0]) == (kind in ('name', 'pick')) and task.eval_type == ('categorical' if kind == 'choice' else 'generative')
    assert not any(c in task[0]['messages'][0]['content'] for task in [make_task('pydoc')] for c in task[0]['choices'])
    assert task_names(ChatEvalConfig().tasks) == ['spellingbee', 'simplespelling', 'arithmetic', 'arithmetic3', 'pydoc']


def test_names_of_groups():
    assert task_names('chatcore') == ['arc-easy', 'arc-challenge', 'mmlu', 'gsm8k', 'humaneval', 'spellingbee']
    assert not any(TASKS[n].hub for n in task_names('all')) and task_names('all,gsm8k')[-1] == 'gsm8k'


@pytest.mark.parametrize('name', ['arc-easy', 'arc-challenge', 'mmlu', 'gsm8k', 'humaneval'])
def test_public_benchmarks_from_files_copied_by_hand(name, shared_data, base_directory):
    """A machine without network: the hub's files lie in task_data/hub, as the README says. Marked by the same code as everything else."""
    for repo, config, split in TASK_DATA['arc' if name.startswith('arc') else name]:
        source = shared_data/'hub'/repo/config/split
        if source.exists(): shutil.copytree(source, hub_folder(repo, config, split), dirs_exist_ok=True)
    task = make_task(name, 'test', 6)
    assert len(task) == 6 and all(task.evaluate(task[i], completion_text(task[i])) == 1 for i in range(6)), 'the right answer is right'
    records = evaluate_task(task, Engine(tiny(), TOK, 'compute'), max_problems=6, max_tokens=4)
    assert [r['index'] for r in records] == list(range(6)) and all(r['correct'] in (0, 1) and r['question'] for r in records)


def test_a_random_model_is_near_chance_on_pydoc():
    """Ranked by an untrained model: the right name is not favoured by its place in the list, its length or the way it is rendered."""
    records = evaluate_task(PyDoc(200, 'test', kind='name'), Engine(tiny(), TOK))
    assert 0.12 < accuracy(records) < 0.38 and all('losses' in r for r in records)


def test_samples_of_every_task_reach_the_report(monkeypatch, base_directory):
    monkeypatch.setitem(TASKS, 'sayings', TaskSpec(lambda size, split: Sayings(), 0.25))
    model = tiny()
    save_checkpoint(init_run(run_dir('sft', 'd2'), {}, TOK), 7, model)
    result = chat_eval(ChatEvalConfig(tasks='sayings,arithmetic', max_problems=5, max_new_tokens=8))
    assert [s['task'] for s in result['samples']] == ['sayings'] * 2 + ['arithmetic'] * 2
    rows = {name: read_jsonl(run_dir('sft', 'd2')/f'eval_{name}.jsonl') for name in ('sayings', 'arithmetic')}
    assert [s['completion'] for s in result['samples']] == [r['completion'] for name in rows for r in rows[name][:2]]
    assert all(a in result['samples'][0]['prompt'] for a in ANSWERS)
    page = generate_report(base_directory).read_text()
    assert page.count('sft, sayings, ') == 2 and page.count('sft, arithmetic, ') == 2 and Arithmetic(5, 'test')[1]['messages'][0]['content'] in page


def test_what_was_marked_before_is_skipped(base_directory, monkeypatch, capsys):
    """Same weights and settings: one line, the same scores, and they are in the report again after others came between. Anything else is marked."""
    monkeypatch.setitem(TASKS, 'sayings', TaskSpec(lambda size, split: Sayings(), 0.25))
    run = init_run(run_dir('sft', 'd2'), {}, TOK)
    save_checkpoint(run, 7, tiny())
    ask = lambda **kw: chat_eval(ChatEvalConfig(**dict(tasks='sayings,arithmetic', max_problems=5, max_new_tokens=8) | kw))
    results = lambda: [r['tasks'] for r in read_jsonl(base_directory/'report'/'results.jsonl')]
    first = ask()
    capsys.readouterr()
    again, (out, err) = ask(), capsys.readouterr()
    assert again['skipped'] and {k: again[k] for k in first} == first and results() == [first['tasks']]
    assert out.count('\n') == 1 and 'marked before' in out and err == ''
    other = ask(tasks='arithmetic')
    assert 'skipped' not in other and ask()['skipped'] and results() == [first['tasks'], other['tasks'], first['tasks']]
    assert 'sayings' in generate_report(base_directory).read_text()
    for kw in (dict(max_problems=4), dict(max_new_tokens=None), dict(force=True)): assert 'skipped' not in ask(**kw)
    (run/'eval_sayings.jsonl').unlink()
    assert 'skipped' not in ask() and (run/'eval_sayings.jsonl').exists()
    model = tiny()
    torch.nn.init.normal_(model.lm_head.weight)
    save_checkpoint(run, 8, model)
    assert ask()['step'] == 8 and 'skipped' not in ask(step=7, max_problems=3) and ask(step=8)['skipped']


@pytest.mark.parametrize('kw', [dict(max_new_tokens=0), dict(max_new_tokens=-3), dict(max_problems=0), dict(batch_size=0)], ids=str)
def test_sizes_below_one_are_refused(kw):
    (name, value), = kw.items()
    with pytest.raises(UserError, match=f'^{name} {value} .*--{name.replace("_", "-")} 1'): chat_eval(ChatEvalConfig(source='base', **kw))


def test_samples_keep_tool_calls():
    """As the engine writes a tool call, so it is shown, once with its mark."""
    call = '<|python_start|>7*8<|python_end|><|output_start|>56<|output_end|>The answer is 56.'
    record = dict(index=0, question='What is 7*8?', answer=call, completion=call, correct=1, reward=1.0, tokens=9)
    assert samples_from('arithmetic', [record] * 3) == [dict(task='arithmetic', prompt='What is 7*8?\n', completion=call, correct=1)] * 2
    assert 'chance  25%' in score_line('pydoc', dict(accuracy=0.4, chance=0.25, n=200))


# --- several tries --------------------------------------------------------------------------------------------------

def test_pass_at_k_is_the_estimate_from_the_samples(monkeypatch, base_directory):
    """Every sample is in the records with its verdict; pass@k is computed from them without bias; the scores at temperature 0 are those without samples."""
    from itertools import combinations
    from nanochat.scripts import chat_rl
    from nanochat.tasks import humaneval
    assert chat_rl.pass_at_k is humaneval.pass_at_k, 'one estimator for both'
    class Lengths(Task):
        "Right is an answer of an even number of characters: a random model is right now and then."
        def num_examples(self): return 6
        def get_example(self, i): return {'messages': [user('Say ' + 'abcdef'[i]), assistant('ok')]}
        def evaluate(self, conversation, completion): return int(len(completion) % 2 == 0)
    monkeypatch.setitem(TASKS, 'lengths', TaskSpec(lambda size, split: Lengths(), 0.0, 8))
    monkeypatch.setitem(TASKS, 'sayings', TaskSpec(lambda size, split: Sayings(), 0.25))
    run = init_run(run_dir('sft', 'd2'), {}, TOK)
    save_checkpoint(run, 7, tiny())
    ask = lambda **kw: chat_eval(ChatEvalConfig(**dict(tasks='lengths,sayings', max_problems=6) | kw))
    result = ask(num_samples=5, temperature=0.9, pass_k='1,3,5')
    rows = read_jsonl(run/'eval_lengths.jsonl')
    assert all(len(r['samples']) == 5 and [s['correct'] for s in r['samples']] == [int(len(s['completion']) % 2 == 0) for s in r['samples']] for r in rows)
    for k in (1, 3, 5):
        draws = [list(combinations([s['correct'] for s in r['samples']], k)) for r in rows]
        assert result['tasks']['lengths'][f'pass@{k}'] == pytest.approx(sum(sum(map(any, d)) / len(d) for d in draws) / 6)
    assert 0 < result['tasks']['lengths']['pass@1'] < result['tasks']['lengths']['pass@5'] and len({s['completion'] for r in rows for s in r['samples']}) > 10
    assert not any(k.startswith('pass@') for k in result['tasks']['sayings']) and 'samples' not in read_jsonl(run/'eval_sayings.jsonl')[0]
    assert 'pass@3 ' in score_line('lengths', result['tasks']['lengths'])
    assert ask(num_samples=5, temperature=0.9, pass_k='5,1,3')['skipped'], 'the same question in other words'
    plain = ask()
    assert 'skipped' not in plain and plain['chat_core'] == result['chat_core']


def test_samples_do_not_depend_on_batches():
    engine, task = Engine(tiny(), TOK), Arithmetic(6, 'test')
    one = sample_task(task, engine, 4, max_tokens=6, batch_size=64)
    assert one == sample_task(task, engine, 4, max_tokens=6, batch_size=3) and [f['index'] for f in one] == list(range(6))
    assert one != sample_task(task, engine, 4, max_tokens=6, seed=1)
    assert pass_rates(one, [1, 4])['sampled_reward'] == 0 and ks_of('', 5) == [1, 2, 4]


@pytest.mark.parametrize('kw, sentence', [(dict(pass_k='4'), '--num-samples too'), (dict(num_samples=2, pass_k='4'), 'pass@4 needs as many answers'), (dict(num_samples=2, pass_k='two'), 'not a list of numbers'),
                                          (dict(num_samples=-1), 'negative'), (dict(num_samples=4, pass_k='²'), 'not a list of numbers'), (dict(temperature=0.0), '--temperature 1.0'), (dict(top_k=-1), 'negative')], ids=str)
def test_settings_of_sampling_are_checked(kw, sentence):
    with pytest.raises(UserError, match=sentence): chat_eval(ChatEvalConfig(**kw))


def test_records_hold_all_that_was_read_and_said():
    """The prompt is what the model was given, to the token."""
    for task in (Sayings(), PyDoc(3, 'test', kind='choice'), Arithmetic(3, 'test')):
        for r, c in zip(evaluate_task(task, Engine(tiny(), TOK), max_problems=3, max_tokens=4), task):
            assert TOK.render_for_completion(c) and r['prompt'] == TOK.decode(TOK.render_for_completion(c)) and r['answer'] == completion_text(c)
            assert {'completion', 'correct', 'reward', 'question'} <= set(r)


def test_records_of_letters_can_be_read():
    """The odds say which letter each belongs to."""
    from nanochat.scripts.records import record_text
    [r] = evaluate_task(PyDoc(1, 'test', kind='choice'), Engine(tiny(), TOK))
    assert r['letters'] == list('ABCD') and all(f'    {c}: {n}\n' in record_text(r | dict(task='pydoc-choice')) for c, n in zip('ABCD', r['odds'], strict=True))


@pytest.mark.parametrize('extra', [{'choices': ['yes', 'no']}, {'letters': ['y', 'n']}, {}], ids=['ranked', 'letters', 'written'])
def test_a_question_beyond_the_models_reach_is_a_sentence(extra):
    class Endless(Sayings):
        eval_type = 'categorical' if 'letters' in extra else 'generative'
        def get_example(self, i): return {'messages': [user('What does it say? ' * 300), assistant('yes')], **extra}
    with pytest.raises(UserError, match='tokens, and this model reads at most 2560'): evaluate_task(Endless(), Engine(tiny(), TOK))


def test_tasks_are_given_the_settings_they_take(monkeypatch):
    """HumanEval hears that code may run, the others are not bothered; and a task that cannot be marked here says so before any question."""
    seen = {}
    class Picky(Sayings):
        def check_ready(self): raise UserError('this machine cannot mark')
    monkeypatch.setitem(TASKS, 'free', TaskSpec(lambda size, split, **kw: seen.update(kw) or Sayings(), 0.0, settings=('i_understand',)))
    monkeypatch.setitem(TASKS, 'picky', TaskSpec(lambda size, split: Picky(), 0.0))
    ready_tasks(['free', 'arithmetic'], 3, i_understand=True, timeout=9)
    assert seen == {'i_understand': True}
    with pytest.raises(UserError, match='cannot mark'): ready_tasks(['arithmetic', 'picky'], 3)


def test_humaneval_is_judged_with_its_settings(shared_data, base_directory):
    """What the command line said reaches the sandbox; verdicts say why an answer failed."""
    from nanochat.execution import sandbox_status
    for where in TASK_DATA['humaneval']: shutil.copytree(shared_data/'hub'/'/'.join(where), hub_folder(*where))
    task = make_task('humaneval', size=2, i_understand=True, timeout=7.0)
    assert task.settings == dict(timeout=7.0, i_understand=True) and make_task('humaneval', size=2).settings['i_understand'] is False
    if not sandbox_status().strong: pytest.skip('generated code cannot be isolated here')
    good, bad = task.judge([task[0]] * 2, [completion_text(task[0]), 'def nothing(): pass'])
    assert good == dict(correct=1, reward=1.0) and bad['correct'] == 0 and bad['why']
