"""Tasks of the hub, read through `huggingface_hub` from a hub on the loopback that serves the real data; all rows, not a sample, where that is quick."""
import json, os, subprocess, sys, threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hub_server import CONVERTED, Hub
from nanochat import dataset
from nanochat.common import UserError
from nanochat.execution import use_calculator
from nanochat.tasks import common
from nanochat.tasks.arc import ARC
from nanochat.tasks.common import (TaskMixture, TaskSequence, check_conversation, completion_text, english_words, final_number, hub_dataset,
                                   hub_folder, load_hub, offline_words, render_mc, split_of)
from nanochat.tasks.gsm8k import GSM8K, call_kind, calls, solution_parts
from nanochat.tasks.mmlu import MMLU
from nanochat.tasks.smoltalk import SmolTalk
from nanochat.tasks.spellingbee import COUNT_WEIGHTS, SimpleSpelling, SpellingBee
from warm_python import warm_python


@pytest.fixture
def online(monkeypatch):
    """This process may talk to the hub that HF_ENDPOINT names, and pauses between tries are short."""
    import huggingface_hub.constants as constants
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(dataset, 'WAIT', .01)
    monkeypatch.setenv('HF_HUB_OFFLINE', '0')
    for k in [k for k in os.environ if k.lower() in ('http_proxy', 'https_proxy', 'all_proxy')]: monkeypatch.delenv(k)


@pytest.fixture(scope='module')
def real_base(shared_data, tmp_path_factory):
    """A base directory into which this module's tasks are downloaded, once, from a hub that serves the real data."""
    with Hub() as hub:
        hub.add_folder(shared_data/'hub')
        yield tmp_path_factory.mktemp('real'), hub


@pytest.fixture
def real(real_base, online, monkeypatch):
    base, hub = real_base
    monkeypatch.setenv('NANOCHAT_BASE_DIR', str(base)); monkeypatch.setenv('HF_ENDPOINT', hub.url)
    return hub


def place(rows, *where, parts=1):
    """Rows as parquet files where a download would have put them."""
    folder = hub_folder(*where); folder.mkdir(parents=True)
    size = -(-len(rows) // parts)
    for i in range(parts): pq.write_table(pa.Table.from_pylist(rows[i * size:(i + 1) * size]), folder/f'{i:04d}.parquet')
    return folder


# The loader ---------------------------------------------------------------------------------------------------------

def table(rows):
    out = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue().to_pybytes()


def test_loader(online, monkeypatch, base_directory):
    rows = [{'n': i, 'nested': {'text': [str(i)]}} for i in range(2500)]
    with Hub() as hub:
        monkeypatch.setenv('HF_ENDPOINT', hub.url)
        hub.add('a/b', {'all/train/0000.parquet': table(rows[:1200]), 'all/train/0001.parquet': table(rows[1200:]), 'all/test/0000.parquet': table(rows[:3])}, CONVERTED)
        hub.add('a/b', {'README.md': b'# numbers'})
        hub.faults['all/train/0001.parquet'] = [('truncate', 300), ('status', 500), ('corrupt', 200)]
        found = hub_dataset('a/b', 'all', 'train')
        assert len(found) == 2500 and [found[i] for i in (0, 1199, 1200, 2499)] == [rows[i] for i in (0, 1199, 1200, 2499)] and list(found) == rows
        assert sorted(p.name for p in hub_folder('a/b', 'all', 'train').glob('[!.]*')) == ['0000.parquet', '0001.parquet'], 'and none of the other split'
        asked = len(hub.requests)
        assert load_hub('a/b', 'all', 'train') == rows and len(hub.requests) == asked, 'what is here is not asked for again'
        with pytest.raises(IndexError): found[2500]
        with pytest.raises(UserError, match="a/b .all, validation. is not on this machine. Dataset.*no parquet file for configuration 'all', split 'validation'"): hub_dataset('a/b', 'all', 'validation')
        hub.add('c/d', {'README.md': b'', 'data/train-00000-of-00002.parquet': table(rows[:5]), 'data/train-00001-of-00002.parquet': table(rows[5:9]), 'data/test-00000-of-00001.parquet': table(rows[:1])})
        assert load_hub('c/d', 'default', 'train') == rows[:9], 'without the copy of the hub, its own files do'
    monkeypatch.setenv('HF_ENDPOINT', 'http://127.0.0.1:9')
    assert load_hub('a/b', 'all', 'train') == rows
    with pytest.raises(UserError, match=r'a/b .all, test. is not on this machine. .*could not be downloaded: ConnectError.*Or copy its parquet files to .*task_data/hub/a/b/all/test'): hub_dataset('a/b', 'all', 'test')


def test_a_split_is_complete_or_absent(online, monkeypatch, base_directory):
    with Hub() as hub:
        monkeypatch.setenv('HF_ENDPOINT', hub.url)
        hub.add('a/b', {f'all/train/{i:04d}.parquet': table([{'n': i}] * 99) for i in range(3)}, CONVERTED)
        hub.faults['all/train/0001.parquet'] = ('status', 500)
        with pytest.raises(UserError, match='0001.parquet could not be downloaded: the hub answered 500'): hub_dataset('a/b', 'all', 'train')
        assert not hub_folder('a/b', 'all', 'train').exists()
        hub.faults.clear(); hub.requests.clear()
        assert len(hub_dataset('a/b', 'all', 'train')) == 297 and [r[1] for r in hub.requests if r[0] == 'bytes'] == ['all/train/0001.parquet']


def test_ranks_that_start_together_download_once(online, monkeypatch, base_directory):
    with Hub() as hub:
        monkeypatch.setenv('HF_ENDPOINT', hub.url)
        hub.add('a/b', {f'all/train/{i:04d}.parquet': table([{'n': i}] * 99) for i in range(3)}, CONVERTED)
        hub.faults['all/train/0001.parquet'] = [('slow', 2000)]
        found = []
        ranks = [threading.Thread(target=lambda: found.append(load_hub('a/b', 'all', 'train'))) for _ in range(4)]
        for r in ranks: r.start()
        for r in ranks: r.join()
        assert [len(f) for f in found] == [297] * 4 and Counter(r[1] for r in hub.requests if r[0] == 'bytes') == {f'all/train/{i:04d}.parquet': 1 for i in range(3)}


def test_rows_follow_their_files(base_directory):
    folder = place([{'n': 1}], 'a/b', 'c', 'train')
    assert load_hub('a/b', 'c', 'train') == [{'n': 1}]
    pq.write_table(pa.table({'n': [7, 8]}), folder/'0000.parquet')
    assert load_hub('a/b', 'c', 'train') == [{'n': 7}, {'n': 8}], 'other files, other rows'
    (folder/'0000.parquet').write_bytes(b'PAR1 torn')
    with pytest.raises(UserError, match='not readable as parquet.*remove the folder, and it will be downloaded again'): hub_dataset('a/b', 'c', 'train')
    (folder/'0000.parquet').unlink()
    with pytest.raises(UserError, match='holds no parquet file; remove the folder'): hub_dataset('a/b', 'c', 'train')


def test_offline_every_task_says_what_to_do(base_directory):
    for make in (GSM8K, MMLU, ARC, SmolTalk):
        with pytest.raises(UserError, match='is not on this machine.*HF_HUB_OFFLINE forbids it; type: unset HF_HUB_OFFLINE. Or copy its parquet files to'): make()
    for args, sentence in (([], 'name the data to download: all, or some of: gsm8k'), (['gsm9k'], "there is no task data 'gsm9k'; use all, or some of: gsm8k, mmlu"), (['words'], 'the word list must be downloaded, and HF_HUB_OFFLINE forbids it')):
        done = subprocess.run([warm_python().python, '-m', 'nanochat.tasks.common', *args], env=warm_python().environ(HF_HUB_OFFLINE='1'), capture_output=True, text=True)
        assert done.returncode == 2 and sentence in done.stderr and 'Traceback' not in done.stderr
    assert not (base_directory/'task_data').exists()


@pytest.mark.parametrize('make, sentence', [
    (lambda: GSM8K('easy'), "GSM8K has no subset 'easy'; use main or socratic"), (lambda: GSM8K(split='dev'), "no split 'dev'; use train or test"),
    (lambda: MMLU('anatomy'), "MMLU has no subset 'anatomy'"), (lambda: MMLU(split='train'), "no split 'train'; use one of: auxiliary_train"),
    (lambda: ARC('ARC'), "no subset 'ARC'; use ARC-Easy or ARC-Challenge"), (lambda: ARC(split='dev'), "no split 'dev'"),
    (lambda: SmolTalk('dev'), "no split 'dev'"), (lambda: SmolTalk(subset='big'), "no subset 'big'")])
def test_wrong_names(make, sentence):
    with pytest.raises(UserError, match=sentence): make()


# GSM8K --------------------------------------------------------------------------------------------------------------

def test_every_gsm8k_solution_is_parts_whose_calls_the_calculator_reproduces(real):
    counts = {}
    for split, n in (('train', 7473), ('test', 1319)):
        task = GSM8K(split=split)
        assert len(task) == n
        kinds = counts[split] = Counter()
        for row, c in zip((task.rows[int(i)] for i in task.order), task):
            parts = check_conversation(c)['messages'][-1]['content']
            spelled = ''.join({'text': '{}', 'python': '<<{}', 'python_output': '={}>>'}[p['type']].format(p['text']) for p in parts)
            assert spelled == row['answer'] and '<<' not in ''.join(p['text'] for p in parts), 'nothing is lost, no mark is left'
            for call, output in zip(*[[p['text'] for p in parts if p['type'] == k] for k in ('python', 'python_output')]): kinds[call_kind(call, output)] += 1
            kinds['none'] += len(parts) == 1
            assert task.evaluate(c, completion_text(c)) == 1 and parts[-1]['text'].splitlines()[-1].startswith('#### ')
    assert counts['train'] == {'same': 23049, 'same value': 667, 'none': 95}
    assert counts['test'] == {'same': 4126, 'same value': 155, 'no number': 1, 'none': 18}


def test_gsm8k_marks_strictly(real):
    task = GSM8K(split='test')
    assert task.eval_type == 'generative'
    answers = [final_number(completion_text(c)) for c in task]
    assert None not in answers and max(answers) > 10**6 and min(answers) < 0
    c = next(c for c in task if '#### 1,450,000' in completion_text(c))
    for right in ('#### 1450000', 'So\n#### 1,450,000', '#### 1450000.0', '#### 1,450,000.<|assistant_end|>', 'The answer is 1450000.'): assert task.evaluate(c, right) == task.reward(c, right) == 1, right
    for wrong in ('', '1450000', '#### 1', '#### 1,450,001', '#### 1450000 or 3', '1450000 ####', '<|python_start|>1<|python_end|><|output_start|>#### 1450000<|output_end|>', None): assert task.evaluate(c, wrong) == 0, wrong


@pytest.mark.parametrize('solution, kinds', [
    ('plain text\n#### 3', 't'), ('<<1+1=2>>2\n#### 2', 'pot'), ('a <<1+1=2>><<2+2=4>>4\n#### 4', 'tpopot'), ('<<2+2=4>>', 'po'),
    ('if a = b << c then <<1=1>>', 'tpo'), ('<<1+1>> has no result\n#### 2', 't')])
def test_solutions_of_odd_shapes(solution, kinds):
    parts = solution_parts(solution)
    assert [p['type'] for p in parts] == [dict(t='text', p='python', o='python_output')[k] for k in kinds]
    check_conversation({'messages': [common.user('?'), common.assistant(parts)]})


def test_results_are_read_and_never_learned(real, shared_data):
    """Rendered, the mask covers what the assistant writes and calls, and leaves out what the calculator says."""
    from nanochat.tokenizer import RustBPETokenizer
    tokenizer = RustBPETokenizer.from_directory(shared_data/'reference'/'tokenizer')
    for c in GSM8K(split='train', stop=60):
        ids, mask = tokenizer.render_conversation(c, max_tokens=4096)
        learned = tokenizer.decode([t for t, m in zip(ids, mask) if m])
        written = ''.join('' if p['type'] == 'python_output' else p['text'] if p['type'] == 'text' else f"<|python_start|>{p['text']}<|python_end|>" for p in c['messages'][-1]['content'])
        assert learned == written + '<|assistant_end|>'
        assert tokenizer.decode(ids).startswith('<|bos|><|user_start|>' + c['messages'][0]['content'])


# MMLU, ARC ----------------------------------------------------------------------------------------------------------

def all_choice_tasks():
    yield from (MMLU(split=s) for s in ('dev', 'validation', 'test', 'auxiliary_train'))
    yield from (ARC(subset, s) for subset in ('ARC-Easy', 'ARC-Challenge') for s in ('validation', 'test'))


def test_multiple_choice(real):
    sizes, letters = [], Counter()
    for task in all_choice_tasks():
        sizes.append(len(task))
        for i, c in enumerate(task):
            row = task.rows[int(task.order[i])]
            right = completion_text(c)
            choices = row['choices'] if isinstance(task, MMLU) else row['choices']['text']
            assert c['letters'] == list('ABCDE'[:len(choices)]) and c['messages'][0]['content'] == render_mc(row['question'], c['letters'], choices)
            key = row['answer'] if isinstance(task, MMLU) else row['choices']['label'].index(row['answerKey'])
            assert c['letters'].index(right) == key
            if i < 200:
                check_conversation(c)
                assert [task.evaluate(c, x) for x in c['letters']] == [int(x == right) for x in c['letters']] and task.evaluate(c, right + ' ' + right) == task.evaluate(c, '') == 0
            letters[right] += 1
        assert task.eval_type == 'categorical'
    assert sizes == [285, 1531, 2000, 8315, 570, 2376, 299, 1172]
    assert all(.2 < letters[x] / sum(letters.values()) < .3 for x in 'ABCD'), 'no letter is the safe one'


def test_mmlu_rendering_and_names(real):
    task = MMLU()
    c = next(c for c in task if c['messages'][0]['content'].startswith('Multiple Choice question: The constellation ... is a bright W-shaped'))
    assert c['messages'][0]['content'] == ('Multiple Choice question: The constellation ... is a bright W-shaped constellation in the northern sky.\n- Centaurus=A\n- Cygnus=B\n'
                                           '- Cassiopeia=C\n- Cepheus=D\n\nRespond only with the letter of the correct answer.')
    assert c['subject'] == 'astronomy' and completion_text(c) == 'C'
    assert MMLU('auxiliary_train', 'train')[5] == MMLU('all', 'auxiliary_train')[5]


def test_numbered_choices_become_letters(base_directory):
    place([dict(id='x', question='q', choices=dict(text=['one', 'two', 'three', 'four'], label=list('1234')), answerKey='4')], 'allenai/ai2_arc', 'ARC-Easy', 'test')
    (c,) = ARC()
    assert c['letters'] == list('ABCD') and completion_text(c) == 'D' and '- four=D' in c['messages'][0]['content']


# SmolTalk -----------------------------------------------------------------------------------------------------------

def test_smoltalk(real):
    for split, n in (('train', 8000), ('test', 800)):
        task = SmolTalk(split)
        assert len(task) == n
        for c in task:
            roles = [m['role'] for m in c['messages']]
            assert roles[roles[0] == 'system':] == ['user', 'assistant'] * (len(roles) // 2) and all(isinstance(m['content'], str) for m in c['messages'])
    with pytest.raises(NotImplementedError): task.evaluate(task[0], 'x')


@pytest.mark.parametrize('roles', ['au', 'uu', 'ua' + 's', 'usa', 's', 'uaa', 'ssua'])
def test_turns_that_do_not_alternate_are_refused(base_directory, roles):
    names = dict(u='user', a='assistant', s='system')
    place([{'messages': [{'role': names[r], 'content': 'x'} for r in roles]}], 'HuggingFaceTB/smol-smoltalk', 'default', 'train')
    with pytest.raises(UserError, match=r'row 0 of SmolTalk .train.'): SmolTalk()[0]


# Slices, shuffles, mixtures -----------------------------------------------------------------------------------------

def test_order_is_shuffled_and_the_same_everywhere(real):
    task = GSM8K(split='test')
    assert [int(i) for i in task.order[:5]] == [int(i) for i in np.random.default_rng(42).permutation(1319)[:5]]
    assert sorted(map(int, task.order)) == list(range(1319)) and sum(abs(int(x) - i) for i, x in enumerate(task.order)) > 1319 * 300
    subjects = Counter(c['subject'] for c in MMLU(split='validation', stop=300))
    assert len(subjects) > 40, 'a slice is a sample of all subjects'
    code = "from nanochat.tasks.gsm8k import GSM8K; t = GSM8K(split='test'); print([t[i]['messages'][0]['content'][:20] for i in (0, 7, 1318)])"
    done = subprocess.run([sys.executable, '-c', code], env={**os.environ, 'PYTHONHASHSEED': '7', 'HF_HUB_OFFLINE': '1'}, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str([task[i]['messages'][0]['content'][:20] for i in (0, 7, 1318)])


def test_slices(real):
    whole = [*ARC('ARC-Challenge', 'validation')]
    for start, stop, step in [(0, 10, 1), (5, None, 7), (290, 500, 2), (299, None, 1), (0, None, 8)]:
        part = ARC('ARC-Challenge', 'validation', start=start, stop=stop, step=step)
        assert [*part] == whole[start:stop:step] and len(part) == len(whole[start:stop:step])
    ranks = [ARC('ARC-Challenge', 'validation', start=r, step=3) for r in range(3)]
    assert sorted(c['id'] for t in ranks for c in t) == sorted(c['id'] for c in whole), 'three ranks see every question once'


def test_mixtures_and_sequences(real):
    parts = [GSM8K(split='test', stop=50), GSM8K(split='test', stop=50), ARC(split='validation', stop=30), SimpleSpelling(20)]
    whole, mixture = TaskSequence(parts), TaskMixture(parts)
    assert [*whole] == [c for t in parts for c in t]
    key = lambda c: json.dumps(c, sort_keys=True)
    assert len(mixture) == 150 and sorted(map(key, mixture)) == sorted(map(key, whole)) and [*mixture] != [*whole]
    assert [*TaskMixture(parts)] == [*mixture] != [*TaskMixture(parts, seed=1)]
    assert [*TaskMixture(parts, start=10, stop=90, step=4)] == [*mixture][10:90:4]
    assert TaskMixture([TaskSequence(parts[:2]), parts[2]])[3] in [*parts[0], *parts[2]]


def test_rows_are_not_held_in_memory(real):
    """Eight ranks with 460,000 conversations each must not hold them eight times."""
    before = pa.total_allocated_bytes()
    task = SmolTalk()
    task[17]
    assert pa.total_allocated_bytes() - before < 1_000_000 < sum(f.stat().st_size for f in task.rows.files)


# Words --------------------------------------------------------------------------------------------------------------

def test_real_words(shared_data, base_directory):
    assert english_words() is None and SpellingBee(5).words is offline_words('train')
    (base_directory/'task_data').mkdir(exist_ok=True)
    (base_directory/'task_data'/'words_alpha.zip').symlink_to(shared_data/'words_alpha.zip')
    words = english_words()
    assert 369_000 < len(words) <= 370_099 and 'strawberry' in words and 'whale' in words and all(len(w) > 2 for w in words)
    train, test = english_words('train'), english_words('test')
    assert len(train) + len(test) == len(words) and .09 < len(test) / len(words) < .11 and all(split_of('word:' + w) == 'test' for w in test)
    task, counts = SpellingBee(1000, 'test'), Counter()
    assert task.words is test and SpellingBee(9, words='offline').words is offline_words('train')
    asked = set()
    for c in task:
        call, output, text = (p['text'] for p in check_conversation(c)['messages'][-1]['content'])
        assert str(use_calculator(call)) == output and task.evaluate(c, completion_text(c)) == 1
        counts[min(int(output), 3)] += 1; asked.add(call.split("'")[1])
    assert asked <= set(test) and len(asked) > 950
    assert all(abs(counts[n] / 1000 - share) < .06 for n, share in enumerate(COUNT_WEIGHTS))
    assert task[3] == SpellingBee(50, 'test')[3] and SimpleSpelling(5, 'test')[1]['messages'][1]['content'].replace(' ', '') in test


class WordServer(BaseHTTPRequestHandler):
    bodies = []
    def do_GET(self):
        body = self.bodies.pop(0)
        self.send_response(500 if body is None else 200); self.end_headers(); self.wfile.write(body or b'')
    def log_message(self, *a): pass


def test_words_are_downloaded_when_asked_for(online, monkeypatch, base_directory):
    server = HTTPServer(('127.0.0.1', 0), WordServer)
    threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=.02), daemon=True).start()
    monkeypatch.setenv('NANOCHAT_WORDS_URL', f'http://127.0.0.1:{server.server_port}/words_alpha.txt')
    made = [a + b + c + d for a in 'bdfghklmnp' for b in 'aeiou' for c in 'mnrst' for d in 'aeiouk']
    WordServer.bodies[:] = [b'<html>not words</html>', None, '\r\n'.join(['a', 'Zoo', *made]).encode()]
    with pytest.raises(UserError, match='holds only 0 words|holds only 1 words'): english_words(download=True)
    assert not (base_directory/'task_data').exists() or not list((base_directory/'task_data').iterdir())
    assert english_words(download=True) == tuple(sorted(made)) and not WordServer.bodies, 'after one try that failed'
    assert english_words('train', download=True) and SpellingBee(3, words='real').words == english_words('train')
    with pytest.raises(UserError, match="there are no words 'klingon'"): SpellingBee(3, words='klingon')
    server.shutdown()


def test_everything_at_once(real):
    code = 'from nanochat.tasks.common import fetch_task_data; fetch_task_data(["gsm8k", "humaneval"])'
    done = subprocess.run([warm_python().python, '-c', code], env=warm_python().environ(), capture_output=True, text=True)
    assert done.returncode == 0 and 'gsm8k: 7473 rows' in done.stdout and 'humaneval: 164 rows' in done.stdout, done.stderr
