"""The offline tasks: well-formed conversations, honest splits, determinism, strict marking, and tool outputs that the real calculator gives."""
import json
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter

import pytest

from nanochat.common import UserError
from nanochat.execution import use_calculator
from nanochat.tasks import common, customjson, pydoc
from nanochat.tasks.arithmetic import Arithmetic
from nanochat.tasks.common import (Task, TaskMixture, TaskSequence, check_conversation, completion_text, final_number,
                                   load_hub, offline_words, render_mc, spoken_text)
from nanochat.tasks.customjson import CustomJSON, identity_conversations, identity_task
from nanochat.tasks.pydoc import PyDoc
from nanochat.tasks.spellingbee import SimpleSpelling, SpellingBee, letter_score

MAKERS = {
    'spellingbee': SpellingBee, 'simplespelling': SimpleSpelling,
    'arithmetic1': Arithmetic, 'arithmetic2': lambda *a, **k: Arithmetic(*a, level=2, **k), 'arithmetic3': lambda *a, **k: Arithmetic(*a, level=3, **k),
    'qa': lambda *a, **k: PyDoc(*a, kind='qa', **k), 'pick': lambda *a, **k: PyDoc(*a, kind='pick', **k), 'name': lambda *a, **k: PyDoc(*a, kind='name', **k), 'choice': lambda *a, **k: PyDoc(*a, kind='choice', **k),
}
every_task = pytest.mark.parametrize('name', MAKERS)
WEIRD = ['', ' ', '\0', 'nan', 'inf', '-', '####', 'The answer is', 'The answer is .', '#### 1e999', '9' * 10**6, 'The answer is ' + '9' * 10**6 + '.',
         '<|python_start|>' * 50_000, '<|output_start|>' + 'a ' * 10**6, '#### ' + ',' * 10**5, '١٢٣', '#### ١', '\ud800', 'a ' * 10**6, "'" * 99, 'A B C D', '{}', '%s']


def question(conversation):
    return conversation['messages'][0]['content']


@every_task
def test_ground_truth_is_right_and_well_formed(name):
    for split in ('train', 'test'):
        task = MAKERS[name](300, split)
        assert len(task) == 300
        for c in task:
            check_conversation(c)
            text = completion_text(c)
            assert task.evaluate(c, text) == 1 and task.reward(c, text) == 1.0, c
            assert task.evaluate(c, text + '<|assistant_end|>') == 1


@every_task
def test_another_examples_answer_is_wrong(name):
    task = MAKERS[name](200, 'test')
    for i in range(200):
        wrong = completion_text(task[(i + 1) % 200])
        if spoken_text(wrong) == spoken_text(completion_text(task[i])): continue
        assert task.evaluate(task[i], wrong) == 0 and 0 <= task.reward(task[i], wrong) < 1


@every_task
def test_splits_share_no_question(name):
    train, test = ({question(c) for c in MAKERS[name](2000, s)} for s in ('train', 'test'))
    assert not train & test


@every_task
def test_strange_completions_score_nothing_and_raise_nothing(name):
    task = MAKERS[name](5, 'test')
    t0 = time.perf_counter()
    for c in task:
        for text in [*WEIRD, None, 7, b'A', ['A']]:
            if isinstance(text, str): text.encode('utf8', 'surrogatepass')
            assert task.evaluate(c, text) == 0, text[:40]
            assert 0 <= task.reward(c, text) < 0.5
    assert time.perf_counter() - t0 < 5, 'marking must not take more than linear time in the completion'


@every_task
def test_hedging_does_not_pay(name):
    """A completion that lists many answers must not be marked right: RL would find it."""
    task = MAKERS[name](20, 'test')
    pool = [spoken_text(completion_text(c)) for c in MAKERS[name](300, 'test')]
    for c in task:
        right = spoken_text(completion_text(c))
        others = [p for p in pool if p != right][:8]
        assert task.evaluate(c, '\n'.join([right, *others])) == 0
        assert task.reward(c, '\n'.join([right, *others])) < 0.7


@pytest.mark.parametrize('name', ['spellingbee', 'arithmetic1', 'arithmetic2', 'arithmetic3'])
def test_tool_outputs_are_what_the_calculator_gives(name):
    for split in ('train', 'test'):
        for c in MAKERS[name](500, split):
            call, output, text = (p['text'] for p in c['messages'][-1]['content'])
            assert str(use_calculator(call)) == output
            assert str(final_number(text)) == output


@pytest.fixture(scope='module')
def elsewhere(tmp_path_factory):
    """What another interpreter, with other hashes and a base directory of its own, makes, asked backwards; and the modules it has then."""
    code = ("import json, sys; from nanochat.tasks.spellingbee import *; from nanochat.tasks.arithmetic import *; from nanochat.tasks.pydoc import *\n"
            "tasks = [SpellingBee(50), SimpleSpelling(50, 'test'), Arithmetic(50, level=3), PyDoc(50), PyDoc(50, 'test', kind='choice')]\n"
            "examples = [t[i] for t in reversed(tasks) for i in reversed(range(50))][::-1]\n"
            "print(json.dumps(dict(examples=examples, indexed=len(pydoc_index()), modules=list(sys.modules))))")
    env = {**os.environ, 'PYTHONHASHSEED': '123', 'NANOCHAT_BASE_DIR': str(tmp_path_factory.mktemp('elsewhere'))}
    return json.loads(subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True, check=True).stdout)


def test_every_process_makes_the_same_examples(elsewhere):
    """No salted hash, no dependence on what was asked before: another interpreter, asked backwards, agrees."""
    tasks = [SpellingBee(50), SimpleSpelling(50, 'test'), Arithmetic(50, level=3), PyDoc(50), PyDoc(50, 'test', kind='choice')]
    assert elsewhere['examples'] == [c for t in tasks for c in t]


def test_size_does_not_change_the_examples():
    assert SpellingBee(10)[7] == SpellingBee(10_000)[7] and Arithmetic(10)[3] == Arithmetic(99)[3]


def test_plain_questions_differ_only_in_their_quotes():
    quoted, plain = SpellingBee(50), SpellingBee(50, plain=1.0)
    assert [question(c).replace("'", '') for c in quoted] == [*map(question, plain)]
    assert [completion_text(c) for c in quoted] == [completion_text(c) for c in plain]


def test_words():
    words, train, test = offline_words(), set(offline_words('train')), set(offline_words('test'))
    assert len(words) >= 8000 and list(words) == sorted(set(words))
    assert not train & test and train | test == set(words) and .07 < len(test) / len(words) < .13
    assert all(w.isascii() and w.isalpha() and w.islower() and 3 <= len(w) <= 10 for w in words)
    for split in ('train', 'test'):
        asked = {question(c).split("'")[-2 if c['messages'][0]['content'].endswith(("'?", "'.")) else 1] for c in SimpleSpelling(300, split)}
        assert asked <= set(offline_words(split))


def test_a_damaged_cache_is_rebuilt(base_directory):
    calls = []
    build = lambda: calls.append(1) or ['made']
    assert common.cached_json('x', build) == common.cached_json('x', build) == ['made'] and len(calls) == 1
    (path,) = (base_directory/'task_data').iterdir()
    path.write_text('["torn')
    assert common.cached_json('x', build) == ['made'] and len(calls) == 2


def test_slices():
    whole = SpellingBee(20)
    for start, stop, step in [(0, None, 1), (3, None, 1), (0, 7, 2), (5, 19, 4), (20, None, 1), (25, 30, 1), (0, 999, 3)]:
        part = SpellingBee(20, start=start, stop=stop, step=step)
        expected = [whole[i] for i in range(20)[start:stop:step]]
        assert len(part) == len(expected) and list(part) == expected
    with pytest.raises(IndexError): SpellingBee(20, start=3)[17]
    for bad in ({'start': -1}, {'step': 0}, {'start': 5, 'stop': 2}):
        with pytest.raises(UserError): SpellingBee(20, **bad)


def test_mixture_and_sequence():
    a, b = Arithmetic(30), SimpleSpelling(20)
    mixture = TaskMixture([a, a, b], seed=5)
    assert list(mixture) == list(TaskMixture([a, a, b], seed=5)) != list(TaskMixture([a, a, b], seed=6))
    counts = Counter(map(question, mixture))
    assert counts == Counter([*map(question, a)] * 2 + [*map(question, b)])
    assert [*map(question, TaskSequence([a, b]))] == [*map(question, a), *map(question, b)]
    shares = [TaskMixture([a, b], start=r, step=4) for r in range(4)]
    assert sorted(q for s in shares for q in map(question, s)) == sorted(map(question, TaskMixture([a, b])))
    with pytest.raises(UserError): TaskMixture([])


def test_mixture_interleaves():
    kinds = ['Spell' in question(c) or 'spell' in question(c) or 'letters' in question(c) for c in TaskMixture([Arithmetic(500), SimpleSpelling(500)])]
    assert 400 < sum(x != y for x, y in zip(kinds, kinds[1:])) < 600


def test_multiple_choice_rendering():
    text = render_mc('Which?', ['A', 'B'], ['one', 'two'])
    assert '- one=A\n- two=B\n' in text and text.endswith('Respond only with the letter of the correct answer.')
    with pytest.raises(ValueError): render_mc('Which?', ['A'], ['one', 'two'])


def test_choices_are_fair():
    task = PyDoc(1000, 'test', kind='choice')
    assert task.eval_type == 'categorical'
    letters = Counter(completion_text(c) for c in task)
    assert set(letters) == set('ABCD') and min(letters.values()) > 200
    names = {split: {n for n, _ in pydoc.choice_items(split)} for split in ('train', 'test')}
    assert not names['train'] & names['test']
    for c in task:
        head, *lines = question(c).split('\n')
        choices = [line[2:].rsplit('=', 1) for line in lines[:4]]
        assert c['letters'] == [letter for _, letter in choices] == list('ABCD')
        assert len({n for n, _ in choices}) == 4 and {n for n, _ in choices} <= names['test']
        echoing = [letter for n, letter in choices if pydoc.shares_word(n, head.split('does this: ')[1])]
        assert echoing == [completion_text(c)]


@pytest.mark.parametrize('kind', ['pick', 'name'])
def test_choices_to_rank(kind):
    task = PyDoc(400, 'test', kind=kind)
    places = Counter(c['choices'].index(completion_text(c)) for c in task)
    assert set(places) == set(range(4)) and min(places.values()) > 60
    for c in task:
        assert len(set(c['choices'])) == 4
        assert all((f'- {n}\n' in question(c)) == (kind == 'pick') for n in c['choices'])


def test_pydoc_never_imports(elsewhere):
    assert elsewhere['indexed'] > 2000 and not {'this', 'antigravity', 'turtle', 'tkinter', 'smtplib', 'idlelib'} & set(elsewhere['modules'])
    assert pydoc.documented('m', 'def f(:') == pydoc.documented('m', b'\0') == []


def test_reading_final_numbers():
    good = {'#### 3': 3, 'The answer is 3.': 3, 'so the answer is 1,234.': 1234, 'The answer is -7': -7, '#### 2.50': 2.5, 'x\n####3\n': 3, '#### 3.0': 3}
    assert {t: final_number(t) for t in good} == good
    bad = ['3', 'The answer is 3. No, 4.', '#### 3 apples', 'The answer is three.', '<|python_start|>The answer is 3.<|python_end|>', '#### --3', '#### 3-']
    assert [final_number(t) for t in bad] == [None] * len(bad)


def test_letter_score_is_graded_and_cannot_be_padded():
    assert letter_score('word', 'w o r d') == 1 and letter_score('word', 'w o r t') == .75
    assert letter_score('word', 'w o r d s') == .8 and letter_score('word', 'word') == 0
    assert letter_score('word', ' '.join('word' * 50)) < .1


def test_identity(tmp_path):
    chats = identity_conversations()
    assert 300 <= len(chats) == len(identity_task()) and chats == identity_conversations()
    for c in chats: check_conversation(c)
    assert any(len(c['messages']) > 4 for c in chats) and any('nanochat' in c['messages'][1]['content'] for c in chats)
    path = tmp_path/'identity.jsonl'
    path.write_text('\n'.join(json.dumps(c['messages'], ensure_ascii=False) for c in chats), encoding='utf8')
    assert list(CustomJSON(path)) == list(chats)
    assert len(CustomJSON(path, stop=10)) == 10


def test_identity_answers_what_people_type_first():
    """With and without capitals and final marks, each as a conversation of one turn, answered from the right intent."""
    answers = {}
    for c in identity_conversations():
        if len(c['messages']) == 2: answers.setdefault(c['messages'][0]['content'], set()).add(c['messages'][1]['content'])
    for intent, words in dict(hello='hi hello hey', thanks='thanks', bye='bye goodbye').items():
        for word in words.split():
            for typed in (word, word.capitalize(), word + '!', word.capitalize() + '!'): assert answers[typed] <= set(customjson.IDENTITY[intent][1]), typed
    for intent, said in dict(name='who are you', skills='what can you do', thanks='thank you').items():
        for typed in (said, said.capitalize(), said + '?!'[intent == 'thanks']): assert answers[typed] <= set(customjson.IDENTITY[intent][1]), typed


def test_identity_reads_well():
    """No capital after a comma or colon but I's; answers short; no way to type a question that belongs to two intents."""
    owners = {}
    for intent, (questions, answers) in customjson.IDENTITY.items():
        assert 2 <= len(answers) == len(set(answers)) <= 3 and all(len(a) <= 80 and a[-1] in '.!?' for a in answers)
        for q in questions: owners.setdefault(q.lower().strip('.!?'), set()).add(intent)
    assert all(len(intents) == 1 for intents in owners.values())
    for c in identity_conversations():
        for m in c['messages'][::2]: assert not re.search(r'[,:] (?!I\b)[A-Z]', m['content']) and m['content'].strip() == m['content'] != ''
    assert len({c['messages'][0]['content'] for c in identity_conversations()}) > 400


@pytest.mark.parametrize('line', ['{"role": "user"', '[]', '"hello"', '[1]', '{"messages": null}', '[{"role": "user", "content": "x"}]', '[{"role": "user", "content": 1}, {"role": "assistant", "content": "x"}]',
                                  '[{"role": "assistant", "content": "x"}, {"role": "user", "content": "x"}]', '[' * 100_000])
def test_bad_lines_are_named(tmp_path, line):
    path = tmp_path/'mine.jsonl'
    path.write_text('[{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]\n' + line + '\n')
    with pytest.raises(UserError, match='line 2'): CustomJSON(path)


def test_a_wrong_turn_is_counted_from_the_first_message():
    """With a system message before the turns and without, like the messages about content."""
    talk = [common.user('a'), common.user('b')]
    with pytest.raises(UserError, match='message 1 should'): check_conversation({'messages': talk})
    with pytest.raises(UserError, match='message 2 should'): check_conversation({'messages': [{'role': 'system', 'content': 'Be brief.'}, *talk]})


def test_the_download_explains_itself(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['common', '--help'])
    common.main()
    said = capsys.readouterr().out
    assert all(name in said for name in ('all', *common.TASK_DATA))


def test_bad_files(tmp_path):
    (tmp_path/'latin').write_bytes(b'\xff\xfe\xe9')
    (tmp_path/'empty').write_text('\n\n')
    for name in ('latin', 'empty', 'missing'):
        with pytest.raises(UserError, match=name): CustomJSON(tmp_path/name)


def test_user_errors():
    for make in (lambda: SpellingBee(0), lambda: Arithmetic(5, 'dev'), lambda: Arithmetic(5, level=9), lambda: PyDoc(5, kind='essay'), lambda: load_hub('openai/gsm8k', 'main', 'test'), lambda: offline_words('validation')):
        with pytest.raises(UserError): make()


@every_task
def test_examples_are_cheap(name):
    """Counted by ratio: an example must cost far less than the ten milliseconds a training step takes."""
    task = MAKERS[name](10_000, 'test')
    task[0]
    t0 = time.process_time()
    for i in random.Random(0).sample(range(10_000), 200): task[i]
    assert (time.process_time() - t0) / 200 < 0.01


def test_base_task_asks_for_its_methods():
    with pytest.raises(NotImplementedError): len(Task())
    with pytest.raises(NotImplementedError): identity_task().evaluate(identity_task()[0], 'x')


def test_calls_and_questions_are_cut_into_the_same_tokens():
    """Copying is learnable only if word and numbers have the same tokens in the question and in the call."""
    tokenizer = pytest.importorskip('nanochat.tokenizer')
    from nanochat.tasks.common import stdlib_files
    texts = [p.read_text(encoding='utf8', errors='ignore') for _, p in stdlib_files()[::20]]
    tok = tokenizer.RustBPETokenizer.train_from_iterator(texts, 1024)
    for task in (SpellingBee(100), Arithmetic(100), Arithmetic(100, level=2)):
        for c in task:
            call = tok.encode(c['messages'][1]['content'][0]['text'])
            asked = tok.encode(question(c))
            pieces = Counter(t for t in call if tok.decode([t]).strip().isalnum() and tok.decode([t]) != 'count')
            if isinstance(task, SpellingBee): pieces -= Counter(tok.encode('count'))
            missing = pieces - Counter(asked)
            assert not missing, (question(c), [tok.decode([t]) for t in missing])


@every_task
def test_rendering_trains_on_what_the_assistant_wrote(name):
    """Masked-in tokens are the answer, its tool call and the end mark; questions and tool outputs are masked out."""
    from nanochat.tokenizer import RustBPETokenizer
    tok = RustBPETokenizer.train_from_iterator(['some words to learn from, again and again'] * 9, 300)
    for c in MAKERS[name](20):
        ids, mask = tok.render_conversation(c)
        trained = tok.decode([i for i, m in zip(ids, mask) if m])
        assert spoken_text(trained) == spoken_text(completion_text(c)) and question(c) not in trained
        content = c['messages'][-1]['content']
        if isinstance(content, list): assert content[0]['text'] in trained and '<|output_start|>' not in trained
