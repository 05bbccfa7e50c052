"""The first command of the README, at toy size: bad flags, Ctrl-C in the middle, going on, and finding everything done."""
import json, os, signal, subprocess, sys, time
from pathlib import Path

import pytest

from warm_python import warm_python

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ['bash', 'runs/quickstart.sh', '--minutes', '0.15', '--depth', '1', '--no-chat']


def environment(base):
    """This interpreter without an installation, one thread, and a base directory of the test's own."""
    return os.environ | dict(NANOCHAT_SKIP_INSTALL='1', NANOCHAT_BASE_DIR=str(base), OMP_NUM_THREADS='1',
                             PATH=f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}')


def run(args, base, **kwargs):
    """The finished process, output as text."""
    return subprocess.run(args, cwd=ROOT, env=environment(base), capture_output=True, text=True, stdin=subprocess.DEVNULL, **kwargs)


@pytest.mark.parametrize('flags, hint', [(['--depth', '0'], 'whole number from 1'), (['--depth', '2.5'], 'whole number'), (['--minutes', 'ten'], 'takes a number'),
                                         (['--minutes'], 'needs a number'), (['--fast'], '--fresh')])
def test_bad_flags_get_a_sentence_before_anything_happens(flags, hint, tmp_path):
    done = run(['bash', 'runs/quickstart.sh', *flags], tmp_path/'base')
    assert done.returncode == 2 and hint in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path/'base').exists()


def wait_for(path, process, seconds=120):
    """Until `path` exists, the process ends, or too long."""
    end = time.monotonic() + seconds
    while not path.exists() and process.poll() is None and time.monotonic() < end: time.sleep(.05)
    return path.exists()


# An evaluation of half a minute in two seconds: fewer tokens to count and to score.
PYTHON = '''#!/bin/sh
case $* in *base_eval*) set -- "$@" --eval-tokens 16384 --ngram-tokens 1000000 --max-per-task 40 ;; esac
exec {} "$@"
'''


@pytest.mark.slow
def test_the_whole_pipeline_with_an_interruption(tmp_path):
    base = tmp_path/'base'
    warm = warm_python()  # its twenty-five programs are forked from one that has imported everything
    (tmp_path/'bin').mkdir()
    (tmp_path/'bin'/'python').write_text(PYTHON.format(warm.python))
    (tmp_path/'bin'/'python').chmod(0o755)
    env = warm.environ(NANOCHAT_BASE_DIR=str(base), PATH=f'{tmp_path/"bin"}{os.pathsep}{warm.bin}{os.pathsep}{os.environ["PATH"]}')
    # Ctrl-C reaches the whole process group, as from a terminal.
    process = subprocess.Popen(SCRIPT, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    assert wait_for(base/'base_checkpoints'/'d1'/'metrics.jsonl', process), process.communicate()[0]
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and 'same command to go on' in output and 'Traceback' not in output
    assert not list(base.rglob('*.tmp'))

    again = lambda: subprocess.run(SCRIPT, cwd=ROOT, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=400)
    done = again()
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert 'already trained from this text' in done.stdout  # the tokenizer of the first start
    stages = [json.loads(line)['stage'] for line in (base/'report'/'results.jsonl').read_text().splitlines()]
    assert {'tok_train', 'tok_eval', 'base_train', 'base_eval', 'chat_sft', 'chat_eval', 'chat_rl'} <= set(stages)
    page = (base/'report'/'report.html').read_text()
    assert '<svg' in page and '5-gram' in page and 'arithmetic3' in page

    weights = {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in base.rglob('*.safetensors')}
    done = again()
    assert done.returncode == 0 and weights == {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in base.rglob('*.safetensors')}
