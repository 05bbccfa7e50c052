"""Every stage with two processes, as torchrun starts them: each ends well, and one of the two speaks and writes."""
import json, os, subprocess

import pytest

from warm_python import warm_python

SIZE = '--depth 1 --head-dim 32 --aspect-ratio 32 --sequence-len 64 --device-batch-size 2 --total-batch-size 256 --eval-tokens 256 --num-iterations 2'
CHATS = ('--spelling-bee 0 --simple-spelling 0 --arithmetic 40 --arithmetic-stories 0 --pydoc 0 --pydoc-choice 0 --pydoc-name 0 --pydoc-pick 0 '
         '--identity 0 --num-iterations 2 --eval-size 2 --chatcore-every 2 --chatcore-max-problems 3 --chatcore-tasks arithmetic')
STAGES = [
    ('tok_train', '--corpus TEXT --vocab-size 300'), ('tok_eval', '--corpus TEXT'), ('base_train', f'--corpus TEXT {SIZE}'),
    ('base_eval', '--corpus TEXT --eval-tokens 256 --device-batch-size 2'), ('mid_train', CHATS), ('chat_sft', CHATS),
    ('chat_rl', '--task arithmetic --num-iterations 1 --examples-per-step 2 --num-samples 2 --eval-problems 2 --eval-samples 2 --max-new-tokens 8 --device-batch-size 4'),
    ('chat_eval', '--tasks arithmetic --max-problems 4 --max-new-tokens 8 --num-samples 2')]

# Two children per stage, forked from one process that has imported everything; the environment is what torchrun sets.
DRIVER = r'''
import importlib, json, os, signal, socket, sys, traceback
stages, out = json.loads(sys.argv[1]), sys.argv[2]
modules = {s: importlib.import_module(f'nanochat.scripts.{s}') for s, _ in stages}
import pyarrow, safetensors.torch, torch.distributed, tyro  # what the stages import late

def child(rank, port, stage, args):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    for fd, name in ((1, 'out'), (2, 'err')): os.dup2(os.open(f'{out}/{stage}.{rank}.{name}', os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
    sys.argv, code = [stage, '--', *args], 0
    signal.alarm(90)  # ranks that wait for each other
    try: modules[stage].main()
    except SystemExit as e: code = e.code or 0
    except BaseException: traceback.print_exc(); code = 1
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)

codes = {}
for stage, args in stages:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    pids = [os.fork() or child(rank, port, stage, args.split()) for rank in range(2)]
    codes[stage] = [os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) for p in pids]
    if any(codes[stage]): break
print(json.dumps(codes))
'''


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
@pytest.mark.slow
def test_every_stage_with_two_processes(base_directory, tmp_path, fp32):
    (tmp_path/'text').mkdir()
    for i in range(60): (tmp_path/'text'/f'{i}.txt').write_text(f'Story {i}. The old cat saw {i} dogs and the red cat saw {i} mice. What a day it was, number {i}.')
    stages = [(name, args.replace('TEXT', str(tmp_path/'text'))) for name, args in STAGES]
    env = warm_python().environ(NANOCHAT_DEVICE='cpu')
    done = subprocess.run([warm_python().python, '-c', DRIVER, json.dumps(stages), str(tmp_path)], capture_output=True, text=True, env=env, timeout=400)
    assert done.returncode == 0, done.stderr
    said = lambda stage, rank, stream='out': (tmp_path/f'{stage}.{rank}.{stream}').read_text()
    for stage, codes in json.loads(done.stdout).items():
        assert codes == [0, 0], f'{stage}: {codes}\n' + ''.join(said(stage, r, 'err')[-2000:] for r in range(2))
        assert said(stage, 0) and not said(stage, 1), f'{stage}: the second process prints too'
    rows = [json.loads(line) for line in (base_directory/'report'/'results.jsonl').read_text().splitlines()]
    assert sorted(r['stage'] for r in rows if r['stage'] != 'tok_eval') == sorted(s for s, _ in STAGES if s != 'tok_eval'), 'each result once'
    steps = [json.loads(line)['step'] for line in (base_directory/'base_checkpoints'/'d1'/'metrics.jsonl').read_text().splitlines() if 'lr' in line]
    assert steps == [1, 2]
