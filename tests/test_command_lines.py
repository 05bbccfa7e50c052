"""Every script from the command line: help, flags after torchrun's `--`, and one clear sentence with exit code 2 for everything a person can get wrong."""
import builtins, dataclasses, errno, importlib, pkgutil, re, shutil, sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import nanochat.common, nanochat.scripts
from nanochat.scripts import base_train
from nanochat.tokenizer import RustBPETokenizer

SCRIPTS = sorted(m.name for m in pkgutil.iter_modules(nanochat.scripts.__path__))
SIZE = '--device cpu --depth 1 --head-dim 32 --aspect-ratio 32 --sequence-len 64 --device-batch-size 4 --total-batch-size 256 --eval-tokens 256 --num-iterations 2'.split()

CHATS = '--device cpu --spelling-bee 0 --simple-spelling 0 --arithmetic 40 --arithmetic-stories 0 --pydoc 0 --pydoc-choice 0 --pydoc-name 0 --pydoc-pick 0 --identity 0'.split()


class Ran(SimpleNamespace):
    "What a command left: exit code, standard output and error."


def run(capsys, script, *args):
    """A script's `main` in this process, with these command-line words."""
    module, old, code = importlib.import_module(f'nanochat.scripts.{script}'), sys.argv, 0
    sys.argv = [f'{script}.py', *map(str, args)]
    capsys.readouterr()
    try: module.main()
    except SystemExit as e: code = e.code
    finally: sys.argv = old
    out, err = capsys.readouterr()
    return Ran(code=code or 0, out=out, err=err)


def config_of(script):
    """The dataclass that a script's command line fills: the one it hands to `cli`."""
    module, seen = importlib.import_module(f'nanochat.scripts.{script}'), []
    real, module.cli = module.cli, lambda cls, fn, **settings: seen.append(cls)
    try: module.main()
    finally: module.cli = real
    return seen[0]


# Help

def test_the_scripts_of_the_issue_are_there():
    assert set('tok_train tok_eval base_train base_eval mid_train chat_sft chat_rl chat_eval chat_cli train_bench'.split()) <= set(SCRIPTS)


@pytest.mark.parametrize('dashes', [[], ['--']], ids=['plain', 'torchrun'])
@pytest.mark.parametrize('script', SCRIPTS)
def test_help_names_every_setting(script, dashes, capsys):
    done = run(capsys, script, *dashes, '--help')
    assert done.code == 0
    words, fields = set(re.findall(r'--[\w-]+|(?<=\s)[A-Z_\[\]]+', done.out)), dataclasses.fields(config_of(script))
    for f in fields:
        flag = '--' + f.name.replace('_', '-')
        assert flag in words or f.name.upper() in done.out, f'{flag} is not in the help of {script}'
    explained = [f.name for f in fields if re.search(rf'--{f.name.replace("_", "-")}\b.*\n?.*[a-z]{{3}}', done.out)]
    assert len(fields) >= 2 and len(explained) >= .7 * len(fields), 'settings without a trailing comment'


@pytest.mark.parametrize('script', SCRIPTS)
def test_config_is_a_dataclass_that_a_notebook_can_make(script):
    cls = config_of(script)
    assert dataclasses.is_dataclass(cls) and cls.__doc__ and not cls.__doc__.startswith(cls.__name__ + '('), 'no docstring'
    assert cls() == cls()  # everything has a default


@pytest.mark.parametrize('script', SCRIPTS)
def test_unknown_flags_and_unknown_toml_names(script, tmp_path, capsys):
    assert run(capsys, script, '--no-such-flag', '1').code == 2
    (tmp_path/'c.toml').write_text('no_such_setting = 1\n')
    done = run(capsys, script, '--config', tmp_path/'c.toml')
    assert done.code == 2 and 'no_such_setting, which this stage does not have' in done.err and done.err.count('\n') == 1


# Bad input. Each is refused before work begins: one sentence, exit code 2, and not a file written.

@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A folder of texts, and a base directory with their corpus, a tokenizer and a model of one layer, all made by the commands."""
    text, home = tmp_path_factory.mktemp('mine'), tmp_path_factory.mktemp('trained')
    for i in range(60): (text/f'{i}.txt').write_text(f'Story {i}. ' + ' '.join(f'The {a} cat saw {b} dogs.' for a in ('old', 'red', 'shy') for b in range(i, i + 5)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('NANOCHAT_BASE_DIR', str(home)), patch.setenv('NANOCHAT_DTYPE', 'float32')
        for script, args in (('tok_train', ['--vocab-size', '300']), ('base_train', SIZE)):
            patch.setattr(sys, 'argv', [script, '--corpus', str(text), *args])
            importlib.import_module(f'nanochat.scripts.{script}').main()
    return text, home


@pytest.fixture
def mine(trained): return trained[0]


@pytest.fixture
def home(trained, base_directory, fp32):
    """This test's own copy of that base directory."""
    shutil.copytree(trained[1], base_directory, dirs_exist_ok=True)
    return base_directory


def files(folder): return {p.relative_to(folder): (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob('*')}


def refused(capsys, home, words, script, *args):
    """The command's sentence, after checking that it is all there is (but for the progress of reading) and that nothing was written."""
    before = files(home)
    done = run(capsys, script, *args)
    assert done.code == 2, (done.code, done.err)
    *progress, sentence = done.err.splitlines()
    assert sentence.startswith('error: ') and done.out == '' and all(' B/s' in line for line in progress), (done.out, done.err)
    assert re.search(words, sentence), sentence
    assert files(home) == before, 'something was written'
    return sentence


@pytest.mark.parametrize('words, script, args', [
    ('depth 0 is too small; give --depth 1 or more', 'base_train', ['--depth', '0']),
    ('depth -3 is too small', 'base_train', ['--depth=-3']),
    ("preset 'toaster' is unknown; use one of: tiny-cpu, laptop", 'base_train', ['--preset', 'toaster']),
    ('vocab_size 264 is too small: 256 bytes and 9 special tokens need 265; try --vocab-size 4096', 'tok_train', ['--vocab-size', '264']),
    ('vocab_size 0 ', 'tok_train', ['--vocab-size', '0']),
    ('device_batch_size must|batch sizes must be at least 1', 'base_train', ['--depth', '1', '--device-batch-size', '0']),
    ('sequence.* at least 1', 'base_train', ['--depth', '1', '--sequence-len', '0']),
    ("window_pattern 'SXL'", 'base_train', ['--depth', '1', '--window-pattern', 'SXL']),
    ('n_embd 16 is too small', 'base_train', ['--depth', '1', '--head-dim', '16', '--aspect-ratio', '16']),
    ('lr_scale nan must be positive', 'base_train', ['--depth', '1', '--lr-scale', 'nan']),
    ('lr_scale -1 must be positive', 'base_train', ['--depth', '1', '--lr-scale=-1']),
    ('weight_decay nan must be 0 or more', 'base_train', ['--depth', '1', '--weight-decay', 'nan']),
    ('nan minutes is too short', 'base_train', ['--depth', '1', '--minutes', 'nan']),
    ('target_flops nan must be positive', 'base_train', ['--depth', '1', '--target-flops', 'nan']),
    ('n_head 1 is not a multiple of n_kv_head 3', 'base_train', ['--depth', '1', '--n-kv-head', '3']),
    ('layers, heads, vocabulary and sequence length must be at least 1', 'base_train', ['--depth', '1', '--n-kv-head', '0']),
    ('of disk and only', 'base_train', ['--depth', '60', '--aspect-ratio', '6400', '--num-iterations', '1', '--corpus', 'MINE']),
    ('--ngram-tokens 0', 'base_eval', ['--corpus', 'MINE', '--ngram-tokens=-1']),
    ('ngram_order must be at least 1', 'base_eval', ['--corpus', 'MINE', '--ngram-order', '0']),
    ('the corpus has no name', 'tok_train', ['--corpus', '']),
    ("window_pattern 'X' may only contain S and L", 'train_bench', ['--window-pattern', 'X']),
    ('vocabulary and sequence length must be at least 1', 'train_bench', ['--vocab-size', '0']),
    ('total_batch_size 0 is too small', 'base_train', ['--depth', '1', '--total-batch-size', '0']),
    ('target_param_data_ratio 0.0 must be positive', 'base_train', ['--depth', '1', '--target-param-data-ratio', '0']),
    ("recipe 'best' is unknown", 'base_train', ['--depth', '1', '--recipe', 'best']),
    ("corpus 'nowhere'", 'base_train', ['--depth', '1', '--corpus', 'nowhere']),
    ("device 'tpu' is not available", 'base_train', ['--device', 'tpu']),
    ("cannot name a run", 'base_train', ['--depth', '1', '--model-tag', '../up', '--corpus', 'MINE']),
    ('no run.* to resume', 'base_train', ['--depth', '7', '--resume']),
    ('no checkpoint of step 99', 'base_eval', ['--step', '99', '--corpus', 'MINE']),
    ("no stage 'best'", 'base_eval', ['--source', 'best', '--corpus', 'MINE']),
    ('no sft model|there is no', 'chat_cli', ['--prompt', 'hi']),
    ('chat_sft', 'chat_eval', []),
    ('chat_sft', 'chat_rl', []),
    ('task', 'chat_eval', ['--tasks', 'juggling', '--source', 'base']),
    ('max_new_tokens 0 is too small', 'chat_eval', ['--source', 'base', '--max-new-tokens', '0']),
    ('num_iterations 0', 'base_train', ['--depth', '1', '--num-iterations', '0']),
    ('num_iterations 0', 'chat_sft', ['--num-iterations', '0', *CHATS]),
    ('does not divide total_batch_size 100', 'chat_sft', ['--num-iterations', '1', '--total-batch-size', '100', *CHATS]),
    ('cannot write to .*0.txt/tok: Not a directory', 'tok_train', ['--corpus', 'MINE', '--vocab-size', '290', '--out', 'MINE/0.txt/tok']),
    ('cannot write to .*0.txt: a file', 'tok_train', ['--corpus', 'MINE', '--vocab-size', '290', '--out', 'MINE/0.txt']),
    ('temperature nan', 'chat_rl', ['--source', 'base', '--temperature', 'nan']),
    ('max_new_tokens 0 ', 'chat_rl', ['--source', 'base', '--max-new-tokens', '0']),
    ('matrix_lr -1 .*from 0 up', 'chat_rl', ['--source', 'base', '--matrix-lr=-1']),
    ('embedding_lr nan', 'chat_rl', ['--source', 'base', '--embedding-lr', 'nan']),
    ('save_every -1 ', 'chat_rl', ['--source', 'base', '--save-every=-1']),
    ('no tokenizer at', 'tok_eval', ['--directory', 'MINE']),
])
def test_a_wrong_value_is_one_sentence(home, mine, capsys, words, script, args):
    refused(capsys, home, words, script, *[a.replace('MINE', str(mine)) for a in args])


@pytest.mark.parametrize('script', ['mid_train', 'chat_sft'])
@pytest.mark.parametrize('words, args', [
    ('num_iterations 0 ', ['--num-iterations', '0']), ('epochs 0 ', ['--epochs', '0']), ('epochs nan ', ['--epochs', 'nan']), ('epochs -1 ', ['--epochs=-1']),
    ('minutes nan ', ['--minutes', 'nan']), ('rate -1 ', ['--rate=-1']), ('rate inf ', ['--rate', 'inf']), ('warmdown_ratio 2 .*takes 0 to 1', ['--warmdown-ratio', '2']),
    ('warmdown_ratio -0.1 ', ['--warmdown-ratio=-0.1']), ('device_batch_size 0 ', ['--device-batch-size', '0']), ('total_batch_size 0 ', ['--total-batch-size', '0']),
    ('device_batch_size 3 x seq_len 64 does not divide total_batch_size 256; use --device-batch-size 2 or 4', ['--device-batch-size', '3', '--total-batch-size', '256']),
    ('arithmetic -1 .*takes 0 or more', ['--arithmetic=-1']), ('identity -1 ', ['--identity=-1']), ('cannot read the conversations in nowhere.jsonl', ['--custom', 'nowhere.jsonl'])])
def test_tuning_refuses_before_it_builds_the_mixture(home, capsys, monkeypatch, script, words, args):
    """With the default mixture, which takes seconds and writes a cache of words."""
    monkeypatch.setattr('nanochat.scripts.mid_train.make_parts', lambda *a: pytest.fail('the mixture was built'))
    refused(capsys, home, words, script, '--device', 'cpu', *args)


@pytest.mark.parametrize('rows, row, batch', [(24, 64, 1024), (7, 64, 4096), (3, 50, 4096), (64, 64, 256), (5, 48, 7000)])
def test_suggested_batches_are_commands_that_work(home, mine, capsys, rows, row, batch):
    """Every flag that the refusal names is taken as it is printed; what follows 'or' too."""
    args = ['--device', 'cpu', '--depth', 1, '--head-dim', 32, '--aspect-ratio', 32, '--sequence-len', row, '--corpus', mine, '--model-tag', 'new',
            '--device-batch-size', rows, '--total-batch-size', batch, '--num-iterations', 1, '--eval-tokens', row, '--eval-every', -1]
    sentence = refused(capsys, home, 'does not divide', 'base_train', *args)
    flag, values = re.search(r'use (--[a-z-]+) ([\d or]+)$', sentence.strip()).groups()
    for value in values.split(' or '):
        cfg = nanochat.common.parse_config(base_train.BaseTrainConfig, [str(a) for a in args + [flag, value]])  # the later flag wins
        config = base_train.gpt_config(cfg.depth, 300, cfg.sequence_len, head_dim=32, aspect_ratio=32)
        plan = base_train.make_plan(cfg, config, 1)
        assert plan.total_batch_size == plan.grad_accum_steps * cfg.device_batch_size * cfg.sequence_len
    assert run(capsys, 'base_train', *args, flag, value).code == 0


def bad_corpora(p):
    """(what it is, words of the sentence) of texts that cannot be trained on."""
    (p/'empty').mkdir()
    yield p/'empty', 'holds no .txt'
    (p/'blank.txt').write_text(' \n\n \t')
    yield p/'blank.txt', 'holds no text'
    (p/'latin.txt').write_bytes(b'caf\xe9 au lait')
    yield p/'latin.txt', 'latin.txt is not valid UTF-8: byte 3 is 0xe9.*--errors replace'
    (p/'page.html').write_text('<p>text')
    yield p/'page.html', 'of a kind that cannot be read'
    yield p/'nowhere.txt', 'there is no file or folder'
    (p/'torn.jsonl').write_text('{"text": "a"}\n{"te')
    yield p/'torn.jsonl', 'line 2 of torn.jsonl is not JSON'


def test_texts_that_cannot_be_read(base_directory, tmp_path, capsys):
    for path, words in bad_corpora(tmp_path): refused(capsys, base_directory, words, 'tok_train', '--corpus', path)


def test_a_file_without_permission(base_directory, tmp_path, capsys, monkeypatch):
    """Tests may run as root, who can read everything: the system's refusal is put in its place."""
    (tmp_path/'secret.txt').write_text('hidden words ' * 50)
    real = builtins.open
    def denied(path, *a, **k):
        if Path(str(path)).name == 'secret.txt': raise PermissionError(errno.EACCES, 'Permission denied', str(path))
        return real(path, *a, **k)
    monkeypatch.setattr(builtins, 'open', denied), monkeypatch.setattr('io.open', denied)
    refused(capsys, base_directory, 'cannot read .*secret.txt: Permission denied', 'tok_train', '--corpus', tmp_path/'secret.txt')


@pytest.mark.parametrize('text', ['The cat sat on the mat. ' * 200, 'Once upon a time.\n\nThere was a bear. ' * 40, '\u4f60\u597d\u4e16\u754c' * 300])
def test_one_document_only_and_longer_than_the_row(base_directory, fp32, tmp_path, capsys, text):
    """One document is enough: it is split inside, and it is much longer than a row."""
    (tmp_path/'one.txt').write_text(text, encoding='utf8')
    assert run(capsys, 'tok_train', '--corpus', tmp_path/'one.txt', '--vocab-size', 280).code == 0
    done = run(capsys, 'base_train', '--corpus', tmp_path/'one.txt', *SIZE)
    assert done.code == 0 and 'bits per byte on held-out text' in done.out


def test_one_document_too_short_to_split(base_directory, fp32, tmp_path, capsys):
    """A few characters either train or are refused in a sentence; they never hang and never show a traceback."""
    (tmp_path/'one.txt').write_text('Hi')
    first = run(capsys, 'tok_train', '--corpus', tmp_path/'one.txt', '--vocab-size', 280)
    last = first if first.code else run(capsys, 'base_train', '--corpus', tmp_path/'one.txt', *SIZE)
    assert last.code == 0 or last.code == 2 and last.err.splitlines()[-1].startswith('error: ')


@pytest.mark.parametrize('script, args', [('tok_train', ['--corpus', 'MINE', '--vocab-size', '290']), ('base_train', ['--corpus', 'MINE', '--model-tag', 'new', *SIZE]),
                                          ('chat_sft', ['--num-iterations', '1', *CHATS])])
def test_full_disk(home, mine, capsys, monkeypatch, script, args):
    """Too little space for what would be written is said before anything is."""
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, 'disk_usage', lambda p: real(p)._replace(free=1000))
    if script == 'tok_train': shutil.rmtree(home/'corpora')
    refused(capsys, home, 'of disk and only 1 kB are free; free some space or set NANOCHAT_BASE_DIR', script, *[a.replace('MINE', str(mine)) for a in args])


def test_missing_tokenizer_corpus_and_model(base_directory, capsys):
    for words, script in (('no tokenizer at .*run python -m nanochat.scripts.tok_train', 'base_train'), ('no tokenizer at .*tok_train', 'tok_eval'),
                          ('nanochat.scripts.base_train', 'mid_train'), ('nanochat.scripts.base_train', 'chat_sft'), ('nanochat.scripts.chat_sft', 'chat_rl'),
                          ('nanochat.scripts.chat_sft', 'chat_eval'), ('nanochat.scripts.chat_sft', 'chat_cli')):
        refused(capsys, base_directory, words, script, *(['--depth', '1'] if script == 'base_train' else []))


def test_tokenizer_that_is_not_the_checkpoints(home, mine, capsys):
    RustBPETokenizer.train_from_iterator(['other words entirely ' * 30], 290).save(home/'tokenizer')
    refused(capsys, home, 'tokenizer.*--fresh.*--model-tag', 'base_train', '--corpus', mine, *SIZE)
    RustBPETokenizer.train_from_iterator([p.read_text() for p in mine.iterdir()], 400).save(home/'base_checkpoints'/'d1'/'tokenizer')
    refused(capsys, home, 'not the tokenizer it was trained with', 'chat_cli', '--source', 'base', '--prompt', 'hi', '--device', 'cpu')


def test_checkpoint_of_another_shape(home, mine, capsys):
    args = ['--corpus', mine, *SIZE, '--model-tag', 'd1']
    refused(capsys, home, 'depth 1 there, 2 here.*--model-tag', 'base_train', *args, '--depth', '2')
    refused(capsys, home, 'sequence_len 64 there, 32 here', 'base_train', *args, '--sequence-len', '32')
    meta = next((home/'base_checkpoints'/'d1').glob('step_*/meta.json'))
    meta.write_text(meta.read_text().replace('"n_embd": 32', '"n_embd": 64'))
    refused(capsys, home, 'is \\(.*\\) there and \\(.*\\) here', 'base_eval', '--corpus', mine, '--device', 'cpu')


@pytest.mark.parametrize('gib, preset', [(5, 't4-16g'), (11.6, 'rtx-12g'), (14.7, 't4-16g'), (23.6, 'rtx-24g'), (79.1, 'a100-80g')])
def test_a_gpu_chooses_its_preset(monkeypatch, gib, preset):
    """By the memory the driver shows, which is less than what the card is sold with."""
    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda d: SimpleNamespace(total_memory=int(gib * 2**30)))
    assert base_train.default_preset(torch.device('cuda')) == preset and base_train.default_preset(torch.device('cpu')) == 'tiny-cpu'


@pytest.mark.parametrize('name, peak', [
    ('NVIDIA H100 80GB HBM3', 989e12), ('NVIDIA H100 PCIe', 756e12), ('NVIDIA H200', 989e12), ('NVIDIA H200 NVL', 836e12), ('NVIDIA B200', 2.25e15), ('NVIDIA A100-SXM4-80GB', 312e12),
    ('NVIDIA L40S', 362e12), ('NVIDIA L40', 181e12), ('NVIDIA L4', 121e12), ('NVIDIA A10G', 70e12), ('NVIDIA GeForce RTX 5090', 209.5e12), ('NVIDIA GeForce RTX 4090', 165e12),
    ('NVIDIA GeForce RTX 3090', 71e12), ('NVIDIA GeForce RTX 3060', 25.5e12), ('Tesla T4', 65e12),
    ('NVIDIA GeForce RTX 3060 Ti', None), ('NVIDIA GeForce RTX 4070 SUPER', None), ('NVIDIA GeForce RTX 4090 Laptop GPU', None), ('NVIDIA T400 4GB', None), ('NVIDIA RTX A4000', None), ('Toaster', None)])
def test_peak_rate_by_the_name_of_the_gpu(monkeypatch, name, peak):
    from nanochat.train import peak_flops
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda d: name)
    found = peak_flops(torch.device('cuda'))
    assert found is None if peak is None else abs(found / peak - 1) < .01
