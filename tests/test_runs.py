"""The run scripts: what they would do at full size, and all of it at toy size, with two processes where they use ranks, stopped and started again."""
import json, os, re, shlex, signal, socket, subprocess, sys, time
from pathlib import Path

import pytest
import yaml

from nanochat.common import parse_config
from nanochat.dataset import DatasetConfig
from nanochat.scaling import gpt_config, plan_training
from nanochat.scripts.chat_sft import ChatSFTConfig
from nanochat.scripts.mid_train import items_of, with_mixture
from nanochat.tasks.mixture import need_data
from test_command_lines import config_of
from warm_python import warm_python

ROOT = Path(__file__).resolve().parents[1]
RUNS = ['speedrun', 'miniseries', 'scaling_laws', 'runcpu']
pytestmark = pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs a Unix shell')


@pytest.fixture(scope='module')
def warm(): return warm_python()


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    """One base directory for all: the corpus and the tokenizer are made once."""
    return tmp_path_factory.mktemp('toys')/'base'


def run(warm, base, command, **env):
    """The finished process, output as text."""
    return subprocess.run(['bash', *shlex.split(command)], cwd=ROOT, env=warm.environ(NANOCHAT_BASE_DIR=str(base), **env), capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=400)


def good(done):
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def results(base, stage): return [r for r in map(json.loads, (base/'report'/'results.jsonl').read_text().splitlines()) if r['stage'] == stage]


# What would be done

def commands(text):
    """The commands of a dry run: (launcher's flags, module, arguments)."""
    found = []
    for line in text.splitlines():
        words = shlex.split(line) if re.match(r'  (python|torchrun) ', line) else []
        if not words: continue
        at = words.index('-m')
        args = words[at + 2:]
        found.append((words[:at], words[at + 1].removeprefix('nanochat.'), args[1:] if args[:1] == ['--'] else args))
    return found


@pytest.fixture(scope='module')
def dry(warm, tmp_path_factory):
    """The dry run of every script, in a base directory that is not to be made."""
    folder = tmp_path_factory.mktemp('dry')/'base'
    said = {name: good(run(warm, folder, f'runs/{name}.sh --dry-run')) for name in RUNS}
    assert not folder.exists(), 'a dry run wrote something'
    return said


@pytest.mark.parametrize('name', RUNS)
def test_every_command_of_a_dry_run_can_be_parsed(name, dry):
    """Each flag exists, with a value of its type, in the script that would get it."""
    seen = commands(dry[name])
    assert len(seen) >= 6
    for launcher, module, args in seen:
        if module.startswith('scripts.'): parse_config(config_of(module.removeprefix('scripts.')), args)
        elif module == 'dataset': parse_config(DatasetConfig, ['--source', *args])
        else: assert (module, args) in [('tasks.common', ['all']), ('core_eval', [])]
        if launcher[0] == 'torchrun': assert '--nproc-per-node=8' in launcher and module.startswith('scripts.')


def test_the_speedrun_is_the_one_of_the_design(dry):
    seen = [(m, ' '.join(a)) for _, m, a in commands(dry['speedrun'])]
    assert [m for m, _ in seen] == ['dataset', 'dataset', 'tasks.common', 'scripts.tok_train', 'scripts.tok_eval', 'dataset', 'core_eval', 'scripts.base_train', 'scripts.base_eval', 'scripts.chat_sft', 'scripts.chat_eval', 'scripts.report']
    assert [a for m, a in seen if m == 'dataset'] == ['climbmix --shards 8', 'climbmix --shards 170 --background', 'climbmix --shards 170']
    words = dict(seen)
    assert '--vocab-size 32768 --max-chars 2000000000' in words['scripts.tok_train'] and '--core full' in words['scripts.base_eval'] and '--tasks chatcore' in words['scripts.chat_eval']
    assert all(w in words['scripts.base_train'] for w in ('--depth 24', '--target-param-data-ratio 8', '--device-batch-size 16'))
    assert 'chat_web' in dry['speedrun'].splitlines()[-1] and words['scripts.base_train'].endswith('--fp8') and 'fp8 is used' in dry['speedrun']


def test_a_speedrun_without_fp8(warm, tmp_path):
    """bf16 for those who ask, and a sentence for what is neither."""
    said = good(run(warm, tmp_path/'base', 'runs/speedrun.sh --dry-run --precision bf16'))
    assert '--fp8' not in said and 'fp8 is' not in said
    done = run(warm, tmp_path/'base', 'runs/speedrun.sh --dry-run --precision fp4')
    assert done.returncode == 2 and "--precision takes fp8 or bf16, not 'fp4'" in done.stderr


def test_the_series_are_those_of_the_design(dry):
    tags = lambda name: [a[a.index('--model-tag') + 1] for _, m, a in commands(dry[name]) if m == 'scripts.base_train']
    assert tags('miniseries') == [f'mini_d{d}' for d in range(12, 27, 2)]
    assert tags('scaling_laws') == [f'iso_{c}_d{d}' for c in ('1e18', '2.15e18', '4.64e18', '1e19') for d in range(10, 21, 2)]


def test_the_numbers_of_a_plan_are_the_packages(dry):
    plan = plan_training(gpt_config(24), device_batch_size=16, world_size=8, target_param_data_ratio=8)
    row = next(line for line in dry['speedrun'].splitlines() if line.startswith('  d24'))
    assert f'{plan.num_iterations:,}' in row and f'{plan.flops:.2e}' in row
    for words in ('memory per device', 'TFLOP/s', 'per hour', 'in all', 'of disk', 'shards of climbmix', 'about 2'): assert words in dry['speedrun'], words
    rows = [line.split() for line in dry['scaling_laws'].splitlines() if re.match(r' +d\d+ ', line)]
    assert len(rows) == 24
    for (depth, *_, steps), budget in zip([(int(r[0][1:]), r[6]) for r in rows], [c for c in (1e18, 2.15e18, 4.64e18, 1e19) for _ in range(6)]):
        p = plan_training(gpt_config(depth), device_batch_size=16, world_size=8, target_flops=budget)
        assert abs(int(steps.replace(',', '')) / p.num_iterations - 1) < .01 and abs(p.flops / budget - 1) < .01
    narrated = [line for name, words in (('miniseries', 'Depth'), ('scaling_laws', 'Budget')) for line in dry[name].splitlines() if re.match(rf'\x1b\[1m\d+ +{words}', line)]
    assert len(narrated) == 8 + 24 and all(re.search(r'tokens, about .*(min|h), \$', line) for line in narrated)


@pytest.mark.parametrize('corpus', ['climbmix', 'fineweb-edu'])
def test_a_laptop_fine_tunes_without_the_hub_after_its_corpora(warm, corpus, tmp_path, monkeypatch):
    """Nothing but the corpus is fetched, so nothing else may be wanted an hour later."""
    said = good(run(warm, tmp_path/'base', f'runs/runcpu.sh --dry-run --corpus {corpus}'))
    seen = {m: a for _, m, a in commands(said)}
    assert seen['dataset'] == [corpus, '--shards', '8'] and f'8 shards of {corpus}: about' in said and f'Corpus: {corpus}  (about' in said
    monkeypatch.setenv('NANOCHAT_BASE_DIR', str(tmp_path/'base'))
    items = items_of(with_mixture(parse_config(ChatSFTConfig, seen['scripts.chat_sft']), corpus))
    need_data(items)
    assert [i.name for i in items][-1] == 'identity-hub'


def test_a_toy_reads_what_it_prepares(warm, tmp_path):
    seen = commands(good(run(warm, tmp_path/'base', 'runs/runcpu.sh --dry-run --toy --corpus climbmix')))
    assert {a[a.index('--corpus') + 1] for _, _, a in seen if '--corpus' in a} == {'stdlib'} and seen[0][2][0] == 'stdlib' and not any('--mixture' in a for _, _, a in seen)


def test_apple_s_gpu_is_not_missing(warm, tmp_path):
    assert 'missing' not in good(run(warm, tmp_path/'base', 'runs/runcpu.sh --dry-run', NANOCHAT_DEVICE='mps'))


# What is refused

@pytest.mark.parametrize('command, hint', [
    ('runs/speedrun.sh --fast', 'unknown flag --fast; there are --dry-run, --toy, and with a value: --gpus --price --depth'), ('runs/speedrun.sh --depth', '--depth needs a value'),
    ('runs/speedrun.sh --depth 2.5', '--depth takes a whole number'), ('runs/speedrun.sh --gpus none', '--gpus takes a whole number'), ('runs/runcpu.sh --hours soon', '--hours takes a number'),
    ('runs/speedrun.sh --price cheap', '--price takes dollars'), ('runs/scaling_laws.sh --budgets much', '--budgets takes FLOPs'), ('runs/miniseries.sh --depths "12 x"', 'takes a whole number from 1'),
    ('runs/cluster/torchrun.sh --nodes 2 --rank 2 --head here runs/speedrun.sh', '--rank 2 is not one of 2 machines; they count from 0 to 1'),
    ('runs/cluster/torchrun.sh --nodes 2 --rank 0 runs/speedrun.sh', '--head is missing'), ('runs/cluster/torchrun.sh --nodes 2 --rank 0 --head here', 'name the script to run')])
def test_bad_flags_get_a_sentence_before_anything_happens(warm, command, hint, tmp_path):
    done = run(warm, tmp_path/'base', command)
    assert done.returncode == 2 and hint in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert not (tmp_path/'base').exists() and not done.stdout


def smi(folder, text):
    """An `nvidia-smi` that says this."""
    folder.mkdir()
    (folder/'nvidia-smi').write_text(f'#!/bin/sh\ncat <<"X"\n{text}\nX\n')
    (folder/'nvidia-smi').chmod(0o755)
    return folder


@pytest.mark.parametrize('gpus, hint', [('', 'this run wants 8 GPUs and this machine has none; rent them, or type: bash runs/speedrun.sh --toy'),
                                        ('NVIDIA H100 80GB HBM3, 81559, 9.0', 'wants 8 GPUs and this machine has 1; type: bash runs/speedrun.sh --gpus 1, or'),
                                        ('\n'.join(['NVIDIA GeForce RTX 4090, 24564, 8.9'] * 8), 'd24 with 16 rows needs about')])
def test_what_lacks_is_said_before_any_work(warm, gpus, hint, tmp_path):
    tools = smi(tmp_path/'bin', gpus)
    env = dict(PATH=f'{warm.bin}{os.pathsep}{tools}{os.pathsep}{os.environ["PATH"]}')
    done = run(warm, tmp_path/'base', 'runs/speedrun.sh', **env)
    assert done.returncode == 2 and hint in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert 'memory per device' in done.stdout and not (tmp_path/'base').exists()


def test_without_packages_a_dry_run_says_how_to_get_them(warm, tmp_path):
    folder = tmp_path/'bin'
    folder.mkdir()
    (folder/'python').write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # this interpreter, without its site-packages
    (folder/'python').chmod(0o755)
    env = {**os.environ, 'PATH': f'{folder}{os.pathsep}{os.environ["PATH"]}', 'NANOCHAT_VENV': str(tmp_path/'none'), 'NANOCHAT_BASE_DIR': str(tmp_path/'base')}
    done = subprocess.run(['bash', 'runs/speedrun.sh', '--dry-run'], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "pip install -e '.[train]'" in done.stderr and not (tmp_path/'none').exists()


def test_help_is_the_head_of_the_script(warm, tmp_path):
    for name in RUNS:
        text = good(run(warm, tmp_path, f'runs/{name}.sh --help'))
        assert '--dry-run' in text and '--toy' in text and 'Restartable' in text and 'set -euo' not in text


@pytest.mark.parametrize('path', sorted((ROOT/'runs').rglob('*.sh')), ids=lambda p: p.name)
def test_syntax(path): good(subprocess.run(['bash', '-n', str(path)], capture_output=True, text=True))


# What is typed at full size: the real scripts, with commands that only write down how they were called

RECORDER = r"""#!/bin/bash
case "$*" in
    "-c "*execution*) exit ${NO_SANDBOX:-0} ;;
    "-c "*) exit 0 ;;
    *"doctor plan "*) while [ "$1" != --out ]; do shift; done; cp "$TOLD" "$2"; exit ;;
esac
{ printf '  %s ' "${0##*/}"; printf '%q ' "$@"; echo; } >>"$LOG"
[[ "$*" != *"$FAIL"* ]] || exit 7
"""


def recorded(tmp_path, command, **env):
    """The finished script and the commands it gave, when `python` and `torchrun` are recorders."""
    (tmp_path/'bin').mkdir(exist_ok=True)
    for name in ('python', 'torchrun'):
        (tmp_path/'bin'/name).write_text(RECORDER)
        (tmp_path/'bin'/name).chmod(0o755)
    (tmp_path/'told').write_text(''.join(f'rows{d}\t16\n' for d in range(10, 27)) + 'shards\t203\nprice\t24.0\nfp8\t--fp8\nall\t2 h, $50\n')
    (tmp_path/'log').write_text('')
    env = os.environ | dict(PATH=f'{tmp_path/"bin"}{os.pathsep}{os.environ["PATH"]}', TOLD=str(tmp_path/'told'), LOG=str(tmp_path/'log'), FAIL='nothing fails', NANOCHAT_BASE_DIR=str(tmp_path/'base')) | env
    done = subprocess.run(['bash', *shlex.split(command)], cwd=ROOT, env=env, capture_output=True, text=True)
    return done, commands((tmp_path/'log').read_text())


@pytest.mark.parametrize('name', RUNS)
def test_a_run_types_what_its_dry_run_prints(name, dry, tmp_path):
    done, typed = recorded(tmp_path, f'runs/{name}.sh')
    good(done)
    assert [m for _, m, _ in typed] == [m for _, m, _ in commands(dry[name])]
    if name == 'speedrun': assert next(a for _, m, a in typed if m == 'scripts.base_train')[-1] == '--fp8', 'given where the plan allows it'
    assert 'The plan said: 2 h, $50.' in done.stdout


def test_a_stage_that_fails_ends_the_run_with_its_code(tmp_path):
    done, typed = recorded(tmp_path, 'runs/speedrun.sh', FAIL='base_eval')
    assert done.returncode == 7 and typed[-1][1] == 'scripts.base_eval' and 'Fine-tuning' not in done.stdout


def test_a_tokenizer_that_is_there_is_kept_though_more_shards_have_come(tmp_path):
    (tmp_path/'base'/'tokenizer').mkdir(parents=True)
    (tmp_path/'base'/'tokenizer'/'tok_train.json').write_text('{"corpus": "climbmix", "vocab_size": 32768, "seconds": 1}')
    assert 'scripts.tok_train' not in [m for _, m, _ in recorded(tmp_path, 'runs/speedrun.sh')[1]]
    (tmp_path/'base'/'tokenizer'/'tok_train.json').write_text('{"corpus": "stdlib", "vocab_size": 32768, "seconds": 1}')
    assert 'scripts.tok_train' in [m for _, m, _ in recorded(tmp_path, 'runs/speedrun.sh')[1]]


def test_no_sandbox_is_said_before_the_first_stage(tmp_path):
    done, typed = recorded(tmp_path, 'runs/speedrun.sh', NO_SANDBOX='1')
    assert done.returncode == 2 and typed == [] and '--questions arc-easy,arc-challenge,mmlu,gsm8k,spellingbee' in done.stderr
    done, typed = recorded(tmp_path, 'runs/speedrun.sh --questions arc-easy,gsm8k', NO_SANDBOX='1')
    assert '--tasks arc-easy,gsm8k' in ' '.join(next(a for _, m, a in typed if m == 'scripts.chat_eval')), done.stderr


def test_the_last_line_can_be_typed_in_a_new_shell(tmp_path):
    """The packages are in an environment that only the script has entered, and the chat's are not among them."""
    tools, venv = tmp_path/'tools', tmp_path/'my venv'
    for folder, text in ((tools, '#!/bin/sh\nexit 1\n'), (venv/'bin', RECORDER.replace('in\n', 'in\n    *gradio*) exit 1 ;;\n', 1))):
        folder.mkdir(parents=True)
        (folder/'python').write_text(text)
        (folder/'python').chmod(0o755)
    (venv/'bin'/'activate').write_text(f'PATH="{venv}/bin:$PATH"')
    (tmp_path/'told').touch()
    env = os.environ | dict(PATH=f'{tools}{os.pathsep}{os.environ["PATH"]}', NANOCHAT_VENV=str(venv), TOLD=str(tmp_path/'told'), LOG=str(tmp_path/'log'), NANOCHAT_BASE_DIR=str(tmp_path/'base'))
    said = good(subprocess.run(['bash', 'runs/runcpu.sh', '--dry-run'], cwd=ROOT, env=env, capture_output=True, text=True)).splitlines()[-1]
    enter = f'. {tmp_path}/my\\ venv/bin/activate && '
    assert f"browser: {enter}pip install -e '.[serve]' && python -m nanochat.scripts.chat_web --source rl --model-tag d6 " in said and f'terminal: {enter}python -m nanochat.scripts.chat_cli' in said
    assert 'browser: python -m nanochat.scripts.chat_web' in recorded(tmp_path, 'runs/runcpu.sh')[0].stdout


def test_own_texts_on_a_laptop(tmp_path):
    _, typed = recorded(tmp_path, 'runs/runcpu.sh --corpus "my texts" --hours 1 --tag mine')
    assert [a for _, m, a in typed if m == 'dataset'] == [['my texts']] and all('mine' in a for _, m, a in typed if m.startswith('scripts.chat'))
    assert ('38.40' in next(a for _, m, a in typed if m == 'scripts.base_train')), 'minutes of an hour'


# All of it, at toy size

def wait_for(condition, process, seconds=200):
    """Until the condition holds; fails if the process ends before, or it takes too long."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
        time.sleep(.02)


def begin(warm, base, command, **env):
    """A process group of its own, as from a terminal."""
    return subprocess.Popen(['bash', *shlex.split(command)], cwd=ROOT, env=warm.environ(NANOCHAT_BASE_DIR=str(base), **env), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def lines(path): return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.slow
def test_speedrun_stopped_by_ctrl_c_and_typed_again(warm, base):
    long = dict(NANOCHAT_TOY_STEPS='60')
    process = begin(warm, base, 'runs/speedrun.sh --toy', **long)
    wait_for(lambda: lines(base/'base_checkpoints'/'d1'/'metrics.jsonl') >= 3, process)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 130 and 'type the same command to go on from here' in output, output
    made = (base/'tokenizer'/'tokenizer.json').stat().st_mtime_ns

    text = good(run(warm, base, 'runs/speedrun.sh --toy', **long))
    assert re.search(r'd1: going on after step \d+ of 60', text), 'two ranks leave a checkpoint when they are asked to stop'
    assert 'a tokenizer of 512 ids from stdlib is there' in text and (base/'tokenizer'/'tokenizer.json').stat().st_mtime_ns == made
    trained, = results(base, 'base_train')
    plan = plan_training(gpt_config(1, 512, 64, head_dim=32, aspect_ratio=32, window_pattern='L'), device_batch_size=4, world_size=2, total_batch_size=1024, num_iterations=60)
    assert (trained['num_iterations'], trained['tokens'], trained['flops']) == (60, plan.tokens, plan.flops)
    row = next(line.split() for line in text.splitlines() if line.startswith('   d1'))
    assert row[6] == '60' and row[9] == f'{plan.flops:.2e}', 'the plan that was printed is what was trained'
    assert {len(results(base, s)) for s in ('base_eval', 'chat_sft', 'chat_eval')} == {1} and (base/'report'/'report.html').exists()
    assert json.loads((base/'base_checkpoints'/'d1'/'environment.json').read_text())['world_size'] == 2


@pytest.mark.slow
def test_runcpu_killed_and_typed_again(warm, base):
    long, run_folder = dict(NANOCHAT_TOY_STEPS='60'), base/'base_checkpoints'/'cpu_d1'
    process = begin(warm, base, 'runs/runcpu.sh --toy', **long)
    wait_for(lambda: (run_folder/'step_000012').exists(), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert not (run_folder/'result.json').exists()
    text = good(run(warm, base, 'runs/runcpu.sh --toy', **long))
    assert re.search(r'cpu_d1: going on after step (12|24|36|48) of 60', text)
    assert results(base, 'chat_rl') and [r['source'] for r in results(base, 'chat_eval') if r['model_tag'] == 'cpu_d1'] == ['sft', 'rl']


@pytest.mark.slow
def test_miniseries(warm, base):
    assert 'mini_d2' in good(run(warm, base, 'runs/miniseries.sh --toy'))
    mine = [r for r in results(base, 'base_train') if r['tag'].startswith('mini_')]
    assert [(r['tag'], r['num_iterations']) for r in mine] == [('mini_d1', 8), ('mini_d2', 8)]
    drawn = json.loads((base/'report'/'scaling_laws.json').read_text())['miniseries']
    assert [r['depth'] for r in drawn] == [1, 2] and '<svg' in (base/'report'/'miniseries.svg').read_text()


@pytest.mark.slow
def test_scaling_laws_and_their_repetition(warm, base):
    text = good(run(warm, base, 'runs/scaling_laws.sh --toy'))
    mine = [r for r in results(base, 'base_train') if r['tag'].startswith('iso_')]
    assert [r['tag'] for r in mine] == [f'iso_{c}_d{d}' for c in ('2e9', '6e9') for d in (1, 2, 3)]
    assert all(abs(r['flops'] - float(r['tag'].split('_')[1])) <= .51 * r['flops'] / r['num_iterations'] for r in mine), 'not within half a step of the budget'
    assert json.loads((base/'report'/'scaling_laws.json').read_text())['isoflop']['runs'] == 6 and ('best N ~ C^a' in text or 'an exponent needs two budgets' in text)
    again = good(run(warm, base, 'runs/scaling_laws.sh --toy'))
    assert again.count(' is there') == 7 and len([r for r in results(base, 'base_train') if r['tag'].startswith('iso_')]) == 6


# Several machines

def free_port():
    """The first of twelve free ports in a row, below those that the kernel hands out to others: each launch takes the next one."""
    import random
    while True:
        first = random.randrange(20000, 30000)
        try:
            for port in range(first, first + 12):
                with socket.socket() as s: s.bind(('127.0.0.1', port))
            return first
        except OSError: continue


STUBS = dict(
    # sbatch runs a copy of the script from another folder, on the first node, with what SLURM sets.
    sbatch='''n=1; while case $1 in --nodes=*) n=${1#*=} ;; -*) ;; *) false ;; esac; do shift; done
cp "$1" "$SPOOL/slurm_script"; shift
SLURM_SUBMIT_DIR=$PWD SLURM_JOB_ID=$JOB SLURM_JOB_NUM_NODES=$n SLURM_JOB_NODELIST="node[1-$n]" SLURM_GPUS_ON_NODE=1 exec bash "$SPOOL/slurm_script" "$@"''',
    # srun runs a command once per node, the last one first; it fails if one fails.
    srun='''while case $1 in --nodes=*) n=${1#*=} ;; -*) ;; *) false ;; esac; do shift; done
for i in $(seq $((n - 1)) -1 0); do SLURM_NODEID=$i "$@" & pids="$pids $!"; done
for p in $pids; do wait $p || exit 1; done''',
    scontrol='''[ "$*" = "show hostnames node[1-2]" ] && printf '127.0.0.1\\n127.0.0.1\\n' ''')


@pytest.mark.slow
def test_slurm_on_two_nodes(warm, base, tmp_path):
    """The job script as sbatch would run it: two machines meet, train together, and only the first does what needs one process."""
    (tmp_path/'bin').mkdir()
    for name, text in STUBS.items():
        (tmp_path/'bin'/name).write_text(f'#!/bin/bash\n{text}\n')
        (tmp_path/'bin'/name).chmod(0o755)
    env = dict(PATH=f'{warm.bin}{os.pathsep}{tmp_path/"bin"}{os.pathsep}{os.environ["PATH"]}', SPOOL=str(tmp_path), JOB=str(free_port()), NANOCHAT_WAIT_MINUTES='3')
    sbatch = str(tmp_path/'bin'/'sbatch')
    text = good(run(warm, base, f'{sbatch} --nodes=2 runs/cluster/slurm.sh runs/speedrun.sh --toy --tag nodes', **env))
    assert text.count('Pretraining: a model') == 1 and text.count('report.html') == 1, 'the second machine repeats what the first does'
    assert json.loads((base/'base_checkpoints'/'nodes'/'environment.json').read_text())['world_size'] == 2
    assert [r['num_iterations'] for r in results(base, 'base_train') if r['tag'] == 'nodes'] == [30]
    head = (ROOT/'runs'/'cluster'/'slurm.sh').read_text()
    assert re.search(r'^#SBATCH --ntasks-per-node=1$', head, re.M) and re.search(r'^#SBATCH --gpus-per-node=8$', head, re.M)


@pytest.mark.slow
def test_skypilot_on_two_nodes(warm, base, tmp_path):
    """The YAML's run section with SkyPilot's variables, on a training that is complete: all of it is found done."""
    task = yaml.safe_load((ROOT/'runs'/'cluster'/'sky.yaml').read_text())
    assert task['num_nodes'] == 2 and task['resources']['accelerators'] == 'H100:8' and task['envs']['NANOCHAT_BASE_DIR'] in task['volumes'] and set(task) <= {
        'name', 'num_nodes', 'resources', 'workdir', 'volumes', 'envs', 'setup', 'run'}
    for section in ('setup', 'run'): good(subprocess.run(['bash', '-n', '-c', task[section]], capture_output=True, text=True))
    for name in ('runs', 'nanochat', 'pyproject.toml'): (tmp_path/name).symlink_to(ROOT/name)
    (tmp_path/'.venv'/'bin').mkdir(parents=True)
    (tmp_path/'.venv'/'bin'/'activate').touch()
    env = {k: str(v) for k, v in task['envs'].items()} | warm.environ(NANOCHAT_BASE_DIR=str(base), SCRIPT='runs/speedrun.sh --toy --tag nodes', PORT=str(free_port()), SKYPILOT_NUM_NODES='2',
        SKYPILOT_NUM_GPUS_PER_NODE='1', SKYPILOT_NODE_IPS='127.0.0.1\n127.0.0.1', NANOCHAT_WAIT_MINUTES='3')
    done = [subprocess.Popen(['bash', '-c', task['run']], cwd=tmp_path, env=env | dict(SKYPILOT_NODE_RANK=str(r)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for r in (1, 0)]
    said = [p.communicate(timeout=300)[0] for p in done]
    assert [p.returncode for p in done] == [0, 0], said
    assert any('nodes is complete with these settings' in text for text in said)


def test_a_machine_whose_disk_is_not_shared_says_so(warm, base, tmp_path):
    """The second machine finds the first one's port open, and not the note in the base directory."""
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        listener.listen()
        port = listener.getsockname()[1]
        done = run(warm, tmp_path/'other', f'runs/cluster/torchrun.sh --nodes 2 --rank 1 --head 127.0.0.1 --port {port - 1} --gpus 1 runs/speedrun.sh --toy')
    assert done.returncode == 2 and 'set NANOCHAT_BASE_DIR to a folder that all machines share' in done.stderr, done.stderr
