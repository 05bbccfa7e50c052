"""Ctrl-C, as a real SIGINT to a real process: exit code 130, one line, nothing half-written, and the same command goes on."""
import json, re, signal, shutil, subprocess, time

import pytest

from nanochat.checkpoint_manager import list_checkpoints, load_checkpoint, run_dir
from nanochat.common import read_jsonl
from nanochat.dataset import open_corpus
from nanochat.tokenizer import get_tokenizer
from warm_python import warm_python

SIZE = '--device cpu --depth 1 --head-dim 32 --aspect-ratio 32 --sequence-len 128 --device-batch-size 2 --total-batch-size 256 --eval-tokens 256 --num-iterations 2'.split()
CHATS = ('--device cpu --spelling-bee 0 --simple-spelling 40 --arithmetic 0 --arithmetic-stories 0 --pydoc 0 --pydoc-choice 0 --pydoc-name 0 --pydoc-pick 0 --identity 0 '
         '--eval-size 4').split()


def command(module, args, **env):
    """A program, forked from a process that has imported everything."""
    return dict(args=[warm_python().python, '-m', f'nanochat.{module}', *map(str, args)], env=warm_python().environ(**env))


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A base directory with a corpus, a tokenizer, a base model and a fine-tuned one, all tiny."""
    text, home = tmp_path_factory.mktemp('mine'), tmp_path_factory.mktemp('trained')
    for i in range(60): (text/f'{i}.txt').write_text(f'Story {i}. ' + ' '.join(f'The {a} cat saw {b} dogs.' for a in ('old', 'red', 'shy') for b in range(i, i + 5)))
    for script, args in (('tok_train', ['--corpus', str(text), '--vocab-size', '300']), ('base_train', ['--corpus', str(text), *SIZE]), ('chat_sft', ['--num-iterations', '2', *CHATS])):
        subprocess.run(**command(f'scripts.{script}', args, NANOCHAT_BASE_DIR=str(home), NANOCHAT_DTYPE='float32'), check=True, capture_output=True)
    return home


@pytest.fixture
def home(trained, base_directory, fp32):
    """This test's own copy of that base directory."""
    shutil.copytree(trained, base_directory, dirs_exist_ok=True)
    return base_directory


@pytest.fixture
def long_text(tmp_path):
    """Documents that take a second or more to read, in one file."""
    path = tmp_path/'long.jsonl'
    path.write_text('\n'.join(json.dumps(dict(text=f'Paragraph {i} of {i * 7919 % 10007} words, none of them {i * 31}. ' * 8)) for i in range(40_000)))
    return path


def interrupted(module, args, begun):
    """Start a command, press Ctrl-C once `begun()` is true, and check how it ends. Returns all it printed."""
    child = subprocess.Popen(**command(module, args), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while not begun() and child.poll() is None and time.monotonic() < end: time.sleep(.005)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 130 and 'Traceback' not in err, (child.returncode, out, err)
    assert err.splitlines()[-1] == 'stopped; what was finished is saved' and err.count('stopped') == 1
    return out + err


def leftovers(folder): return [p for p in folder.rglob('*') if re.search(r'\.tmp\b|\.old\b', p.name)]


def test_dataset(base_directory, long_text):
    corpora = base_directory/'corpora'
    interrupted('dataset', [long_text], lambda: corpora.exists() and any(corpora.iterdir()))
    assert leftovers(base_directory) == [] and list(corpora.iterdir()) == [], 'part of a corpus is left'
    subprocess.run(**command('dataset', [long_text]), check=True, capture_output=True)
    assert open_corpus(str(long_text)).rows('train') > 10


def test_tok_train(base_directory, long_text):
    """The corpus is whole and stays; of the tokenizer there is nothing."""
    args = ['--corpus', long_text, '--vocab-size', '3000']
    interrupted('scripts.tok_train', args, lambda: list((base_directory/'corpora').glob('long-*/manifest.json')))
    assert leftovers(base_directory) == [] and not (base_directory/'tokenizer').exists() and open_corpus(str(long_text)).rows('train') > 10
    assert read_jsonl(base_directory/'report'/'results.jsonl') == []
    subprocess.run(**command('scripts.tok_train', args), check=True, capture_output=True)
    assert get_tokenizer().get_vocab_size() > 300


@pytest.mark.parametrize('script, phase, args', [
    ('mid_train', 'mid', CHATS), ('chat_sft', 'sft', ['--out-tag', 'new', *CHATS]),
    ('chat_rl', 'rl', '--device cpu --task simplespelling --examples-per-step 1 --num-samples 2 --max-new-tokens 4 --eval-problems 2 --eval-samples 2 --train-size 50'.split())])
def test_tuning(home, script, phase, args):
    """The step in hand is finished and saved, and a second start goes on from there."""
    run = run_dir(phase, 'new' if '--out-tag' in args else 'd1')
    steps = lambda: [r['step'] for r in read_jsonl(run/'metrics.jsonl') if 'lr' in r]
    args = [*args, '--num-iterations', 100_000, '--save-every', 50_000]
    interrupted(f'scripts.{script}', args, lambda: len(steps()) >= 3)
    first = list_checkpoints(run)
    assert len(first) == 1 and first[0] == steps()[-1] == load_checkpoint(run).meta['step'] >= 3 and leftovers(home) == []
    said = interrupted(f'scripts.{script}', args, lambda: steps()[-1] >= first[0] + 2)
    assert f'going on after step {first[0]} of 100000' in said and list_checkpoints(run)[-1] == steps()[-1] > first[0]
    assert steps() == list(range(1, steps()[-1] + 1)), 'a step is missing or came twice'
    assert not (run/'result.json').exists()
