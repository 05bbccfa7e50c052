"""Checkpoints of the public nanochat, loaded by path: any depth and layout, older ones, damaged ones, and pickles that want to run code."""
import copyreg, dataclasses, importlib, json, os, pickle, pkgutil, shutil, struct, sys

import pytest
import tiktoken
import torch
import torch.nn.functional as F

import nanochat.scripts
from nanochat import checkpoint_manager as cm
from nanochat.common import UserError, parse_config
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import RustBPETokenizer, SPECIAL_TOKENS, SPLIT_PATTERN

TEXT = ['the quick brown fox jumps over the lazy dog, 12 times 7 is 84'] * 20
PUBLIC_FIELDS = ('sequence_len', 'vocab_size', 'n_layer', 'n_head', 'n_kv_head', 'n_embd', 'window_pattern')
SHAPES = {  # depth, query heads, key heads, head size
    'one layer': (1, 2, 2, 16), 'two layers': (2, 4, 1, 16), 'three layers, heads of 24': (3, 2, 1, 24), 'five layers, heads of 10': (5, 6, 3, 10), 'six layers, one head of 40': (6, 1, 1, 40)}


@pytest.fixture(scope='module')
def tokenizer(): return RustBPETokenizer.train_from_iterator(TEXT, 300)


@pytest.fixture(scope='module')
def ids(): return torch.randint(0, 290, (2, 150), generator=torch.Generator().manual_seed(5))


def random_model(vocab_size=300, shape='three layers, heads of 24', **options):
    """A model of ours whose every parameter matters, even those that begin at zero."""
    n_layer, n_head, n_kv_head, head_dim = SHAPES[shape]
    torch.manual_seed(3)
    model = GPT(GPTConfig(**dict(sequence_len=200, vocab_size=vocab_size, n_layer=n_layer, n_head=n_head, n_kv_head=n_kv_head, n_embd=n_head * head_dim) | options))
    model.to_empty(device='cpu')
    model.init_weights()
    for p in model.parameters(): p.data += 0.2 * torch.randn_like(p)
    return model.eval()


def write_pickle(folder, tokenizer):
    """The tokenizer as the public project writes it: a pickled tiktoken Encoding."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder/'tokenizer.pkl', 'wb') as f: pickle.dump(tokenizer.enc, f)


def write_public(folder, model, tokenizer, step=10, state=None, prefix='', **config):
    """A checkpoint directory as the public project writes it, optimizer shards and all."""
    folder.mkdir(parents=True, exist_ok=True)
    state = model.state_dict() if state is None else state
    torch.save({prefix + k: v for k, v in state.items()}, folder/f'model_{step:06d}.pt')
    for rank in range(2): torch.save({'state': {0: {'exp_avg': torch.zeros(2)}}, 'param_groups': []}, folder/f'optim_{step:06d}_rank{rank}.pt')
    shape = {k: v for k, v in dataclasses.asdict(model.config).items() if k in PUBLIC_FIELDS} | config
    (folder/f'meta_{step:06d}.json').write_text(json.dumps(dict(step=step, val_bpb=0.9, model_config={k: v for k, v in shape.items() if v is not None}, user_config={'depth': 3})))
    if tokenizer: write_pickle(folder.parent.parent/'tokenizer', tokenizer)
    return folder


def files(folder): return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob('*')}


# The reference: a directory that the public project wrote.

@pytest.mark.parametrize('form', ['directory', 'stage folder', 'stage folder and tag', 'weights file', 'one flat folder'])
def test_reference_by_path(shared_data, fp32, tmp_path, form):
    """Whatever form the path has: the reference's logits, loss, greedy text and token ids."""
    source = shared_data/'reference'
    data, facts = torch.load(source/'reference.pt', weights_only=True), json.loads((source/'reference.json').read_text())
    run, tag = source/'base_checkpoints'/'d4', None
    if form == 'stage folder': run = run.parent
    elif form == 'stage folder and tag': run, tag = run.parent, 'd4'
    elif form == 'weights file': run = run/'model_000010.pt'
    elif form == 'one flat folder':  # as a model repository on the hub is laid out
        for p in [*run.iterdir(), *(source/'tokenizer').iterdir()]: shutil.copy(p, tmp_path)
        run = tmp_path
    model, tokenizer, meta = cm.load_model('public', torch.device('cpu'), 'eval', tag, None, run)
    assert meta['step'] == 10 and not model.training and model.config == GPTConfig(**facts_config(source))
    with torch.no_grad(): logits = model(data['x'])
    torch.testing.assert_close(logits[:, ::7], data['logits'], rtol=1e-5, atol=1e-5)
    assert abs(model(data['x'], data['y']).item() - float(data['loss'])) < 1e-5
    for text, ids in facts['encodings'].items(): assert tokenizer.encode(text) == ids and tokenizer.decode(ids) == text
    assert tokenizer.render_conversation(facts['conversation']) == (facts['rendered_ids'], facts['rendered_mask'])
    assert tokenizer.render_for_completion(facts['conversation']) == facts['completion_ids']
    prompt = facts['prompt']
    assert prompt + list(model.generate(prompt, 20, temperature=0)) == facts['greedy'][:len(prompt) + 20]


def facts_config(source): return json.loads((source/'base_checkpoints'/'d4'/'meta_000010.json').read_text())['model_config']


# Other shapes and ways of storing.

@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('prefix', ['', '_orig_mod.'])
def test_any_shape(fp32, tmp_path, monkeypatch, tokenizer, ids, shape, prefix):
    model = random_model(shape=shape)
    run = write_public(tmp_path/'base_checkpoints'/f'd{model.config.n_layer}', model, tokenizer, prefix=prefix)
    before = files(tmp_path)
    monkeypatch.setenv('NANOCHAT_DEVICE', 'cpu')
    loaded, tok, meta = cm.load_model(source='public', path=str(run))
    assert torch.equal(loaded(ids), model(ids)) and meta['step'] == 10 and loaded.config == model.config
    assert tok.fingerprint() == tokenizer.fingerprint() and files(tmp_path) == before, 'loading wrote into the directory'


def test_bf16_tensors(fp32, tmp_path, tokenizer, ids):
    """The public project stores embeddings in bf16; all in bf16 loads, too. Values are kept exactly."""
    model = random_model()
    state = {k: v.bfloat16() for k, v in model.state_dict().items()}
    loaded, _, _ = cm.load_model('public', 'cpu', path=write_public(tmp_path/'a'/'d3', model, tokenizer, state=state))
    model.load_state_dict(state)
    assert torch.equal(loaded(ids), model(ids))


def test_bf16_compute(monkeypatch, tmp_path, tokenizer, ids):
    monkeypatch.setenv('NANOCHAT_DTYPE', 'bfloat16')
    model = random_model()
    loaded, _, _ = cm.load_model('public', 'cpu', path=write_public(tmp_path/'a'/'d3', model, tokenizer))
    assert loaded.transformer.wte.weight.dtype == torch.bfloat16 and torch.equal(loaded(ids), model(ids))


@pytest.mark.parametrize('rows', [300, 320, 384, 512])
def test_any_padding_of_the_vocabulary(fp32, tmp_path, tokenizer, ids, rows):
    """Rows beyond the vocabulary never matter, however many there are."""
    model = random_model()
    fit = lambda t: torch.cat([t[:300], torch.randn(rows - 300, t.shape[1])])
    state = {k: fit(v) if len(v) == 320 else v for k, v in model.state_dict().items()}
    loaded, _, _ = cm.load_model('public', 'cpu', path=write_public(tmp_path/'a'/'d3', model, tokenizer, state=state))
    assert torch.equal(loaded(ids), model(ids)) and loaded(ids).shape[-1] == 300


@pytest.mark.parametrize('drop, off', [
    (['value_embeds.', 'attn.ve_gate'], ['value_embeds']), (['value_embeds.'], ['value_embeds']), (['smear_'], ['smear']), (['smear_gate'], ['smear']), (['backout'], ['backout']),
    (['resid_lambdas', 'x0_lambdas'], ['layer_scalars']), (['smear_', 'backout'], ['smear', 'backout']), (['x0_lambdas'], []), (['resid_lambdas'], []),
    (['value_embeds.', 'attn.ve_gate', 'smear_', 'backout', 'resid_lambdas', 'x0_lambdas'], ['value_embeds', 'smear', 'backout', 'layer_scalars'])], ids=str)
def test_older_checkpoints_lack_newer_parts(fp32, tmp_path, tokenizer, ids, drop, off):
    """What a file lacks is switched off: the same logits as with the parameters at the values that do nothing."""
    model = random_model()
    gone = lambda k: any(d in k for d in drop)
    state = {k: v.clone() for k, v in model.state_dict().items() if not gone(k)}
    loaded, _, meta = cm.load_model('public', 'cpu', path=write_public(tmp_path/'a'/'d3', model, tokenizer, state=state))
    assert [p for p in cm.PARTS if not getattr(loaded.config, p)] == off
    with torch.no_grad():
        for k, p in model.named_parameters():
            if k == 'resid_lambdas' and gone(k): p.fill_(1)
            elif gone(k): p.zero_()
        if 'smear' in off: model.smear_lambda.zero_()
        torch.testing.assert_close(loaded(ids), model(ids), rtol=1e-5, atol=1e-5)


def first_nanochat(state, ids, n_layer, n_head, n_kv_head):
    """The public model of autumn 2025, written down once more: logits of ids (B, T)."""
    rms = lambda x: x / (x.pow(2).mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()
    B, T = ids.shape
    x = rms(state['transformer.wte.weight'][ids])
    D = x.shape[-1] // n_head
    angle = torch.arange(T)[:, None] * 10_000 ** -(torch.arange(0, D, 2) / D)
    turn = lambda t: torch.cat([t[..., :D // 2] * angle.cos() + t[..., D // 2:] * angle.sin(), t[..., D // 2:] * angle.cos() - t[..., :D // 2] * angle.sin()], -1)
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    for i in range(n_layer):
        w = lambda name: state[f'transformer.h.{i}.{name}.weight']
        heads = lambda name: (rms(x) @ w(f'attn.{name}').T).view(B, T, -1, D).transpose(1, 2)
        k, v = (t.repeat_interleave(n_head // n_kv_head, dim=1) for t in (rms(turn(heads('c_k'))), heads('c_v')))
        weights = (rms(turn(heads('c_q'))) @ k.transpose(-1, -2) / D**0.5).masked_fill(future, -torch.inf).softmax(-1)
        x = x + (weights @ v).transpose(1, 2).reshape(B, T, -1) @ w('attn.c_proj').T
        x = x + F.relu(rms(x) @ w('mlp.c_fc').T).square() @ w('mlp.c_proj').T
    return 15 * torch.tanh(rms(x) @ state['lm_head.weight'].T / 15)


@torch.no_grad()
def test_first_models_keep_their_own_constants(fp32, tmp_path, tokenizer, ids):
    """Files without any newer part and without a window pattern: rotary base 10,000 and unscaled queries and keys, which no file states."""
    model = random_model(**dict.fromkeys(cm.PARTS, False))
    state = {k: v[:300] if len(v) == 320 else v for k, v in model.state_dict().items()}
    loaded, _, _ = cm.load_model('public', 'cpu', path=write_public(tmp_path/'a'/'d3', model, tokenizer, state=state, window_pattern=None))
    torch.testing.assert_close(loaded(ids), first_nanochat(state, ids, 3, 2, 1), rtol=1e-4, atol=1e-4)
    stated = write_public(tmp_path/'b'/'d3', model, tokenizer, state=state, window_pattern='L', qk_scale=1.0, rope_base=10_000)
    assert torch.equal(cm.load_model('public', 'cpu', path=stated)[0](ids), loaded(ids))


def test_another_arithmetic_is_refused(tmp_path, tokenizer):
    """Gates of 32 channels belong to a version that computes something else; unknown settings to somebody's fork."""
    model = random_model(shape='two layers')
    wide = {k: torch.randn(len(v), 32) if 've_gate' in k else v for k, v in model.state_dict().items()}
    with pytest.raises(UserError, match='32 channels'): cm.load_model('public', 'cpu', path=write_public(tmp_path/'a'/'d2', model, tokenizer, state=wide))
    with pytest.raises(UserError, match='does not know: mixture=8'): cm.load_model('public', 'cpu', path=write_public(tmp_path/'b'/'d2', model, tokenizer, mixture=8))


def test_engine_and_training_go_on_from_it(fp32, tmp_path, tokenizer, ids):
    """A public model is a model like any other: the engine's cache agrees with the plain forward, and an optimizer step changes it."""
    run = write_public(tmp_path/'a'/'d3', random_model(), tokenizer)
    model, tok, _ = cm.load_model('public', 'cpu', 'train', path=run)
    prompt = ids[0, :30].tolist()
    plain = list(model.generate(prompt, 8, temperature=0))
    stop = {tok.encode_special('<|assistant_end|>'), tok.get_bos_token_id()}
    until = next((i for i, t in enumerate(plain) if t in stop), len(plain))
    assert Engine(model, tok).generate_batch(prompt, max_tokens=8, temperature=0)[0][0] == prompt + plain[:until]
    optimizer, before = model.setup_optimizer(), model.lm_head.weight.detach().clone()
    model(ids, ids).backward()
    optimizer.step()
    assert model.training and not torch.equal(before, model.lm_head.weight)


def test_newest_and_named_steps(fp32, tmp_path, tokenizer):
    model = random_model(shape='one layer')
    run = tmp_path/'base_checkpoints'/'d1'
    for step in (5, 20): write_public(run, model, tokenizer, step=step)
    (run/'model_000099_backup.pt').write_bytes(b'')
    (run/'model_000100.pt').write_bytes(b'')  # still being copied: no meta yet
    step_of = lambda **kw: cm.load_model('public', 'cpu', path=kw.pop('path', run), **kw)[2]['step']
    assert step_of() == 20 and step_of(step=5) == 5 and step_of(path=run/'model_000005.pt') == 5
    with pytest.raises(UserError, match='no checkpoint of step 7; it has 5, 20'): step_of(step=7)


def test_own_runs_load_by_path_too(fp32, tmp_path, tokenizer, ids):
    model = random_model(shape='one layer')
    run = cm.init_run(tmp_path/'elsewhere'/'mine', {}, tokenizer)
    step = cm.save_checkpoint(run, 3, model)
    for path in (run, step, run.parent): assert torch.equal(cm.load_model('public', 'cpu', path=path)[0](ids), model(ids))


# Wrong directories and damaged files: a sentence each.

@pytest.mark.parametrize('make, says', [
    (lambda d: None, 'nothing at .*--path'),
    (lambda d: d.mkdir(), 'no model_.*meta_'),
    (lambda d: (d.mkdir(), (d/'model_000010.pt').write_bytes(b'x')), 'model_000010.pt without meta_000010.json'),
], ids=['missing', 'empty', 'no meta'])
def test_wrong_directories(tmp_path, make, says):
    make(tmp_path/'run')
    with pytest.raises(UserError, match=says): cm.load_model('public', 'cpu', path=tmp_path/'run')


def test_wrong_arguments(tmp_path, tokenizer):
    run = write_public(tmp_path/'base_checkpoints'/'d1', random_model(shape='one layer'), tokenizer)
    with pytest.raises(UserError, match='needs --path'): cm.load_model('public', 'cpu')
    with pytest.raises(UserError, match='--path belongs to --source public'): cm.load_model('base', 'cpu', path=run)
    with pytest.raises(UserError, match="no run 'd9'; it holds d1"): cm.load_model('public', 'cpu', model_tag='d9', path=run.parent)
    with pytest.raises(UserError, match='several stages.*base_checkpoints'): cm.load_model('public', 'cpu', path=tmp_path)
    with pytest.raises(UserError, match="no stage 'publik'"): cm.load_model('publik', 'cpu')


def test_missing_or_wrong_tokenizer(tmp_path, tokenizer):
    model = random_model(shape='one layer')
    run = write_public(tmp_path/'base_checkpoints'/'d1', model, None)
    with pytest.raises(UserError, match='d1 has no tokenizer beside it; copy the tokenizer folder'): cm.load_model('public', 'cpu', path=run)
    write_pickle(tmp_path/'tokenizer', RustBPETokenizer.train_from_iterator([' '.join(map(str, range(3000)))], 400))
    with pytest.raises(UserError, match='not the tokenizer it was trained with'): cm.load_model('public', 'cpu', path=run)


@pytest.mark.parametrize('keep', [0, 1, 100, 0.5, 0.99])
def test_truncated_weights(tmp_path, tokenizer, keep):
    run = write_public(tmp_path/'a'/'d1', random_model(shape='one layer'), tokenizer)
    data = (run/'model_000010.pt').read_bytes()
    (run/'model_000010.pt').write_bytes(data[:keep if keep > 0.999 or not keep else int(len(data) * keep)])
    with pytest.raises(UserError, match=r'model_000010\.pt'): cm.load_model('public', 'cpu', path=run)


@pytest.mark.parametrize('text', ['', '{"step": 10, "mod', '[]', '{}', '{"model_config": {}}', '{"model_config": 3}'])
def test_damaged_meta(tmp_path, tokenizer, text):
    run = write_public(tmp_path/'a'/'d1', random_model(shape='one layer'), tokenizer)
    (run/'meta_000010.json').write_text(text)
    with pytest.raises(UserError, match=r'meta_000010\.json'): cm.load_model('public', 'cpu', path=run)


@pytest.mark.parametrize('state', [[1, 2], {}, {'a': 1}, {'model': {'lm_head.weight': torch.zeros(2)}}], ids=str)
def test_files_that_are_no_weights(tmp_path, tokenizer, state):
    run = write_public(tmp_path/'a'/'d1', random_model(shape='one layer'), tokenizer)
    torch.save(state, run/'model_000010.pt')
    with pytest.raises(UserError, match='table of named tensors'): cm.load_model('public', 'cpu', path=run)


def test_missing_tensor_is_named(tmp_path, tokenizer):
    model = random_model(shape='one layer')
    state = {k: v for k, v in model.state_dict().items() if 'c_fc' not in k}
    with pytest.raises(UserError, match='mlp.c_fc.weight is absent there'): cm.load_model('public', 'cpu', path=write_public(tmp_path/'a'/'d1', model, tokenizer, state=state))


# Pickles that want to run code. Each one would create the file `owned`, if anything of it were executed.

class Call:
    """Pickles as a call of any function."""
    def __init__(self, function, *args): self.call = function, args
    def __reduce__(self): return self.call


def short(text): return b'\x8c' + bytes([len(text)]) + text.encode()  # SHORT_BINUNICODE


def by_hand(owned):
    """Pickles written opcode by opcode, by name."""
    shell = f'touch {owned}'
    stack_global = b'\x80\x04' + short('os') + short('system') + b'\x93'
    arg = b'(' + short(shell) + b't'
    copyreg_ext = b'\x80\x02\x82\x01' + b'(' + b'X' + struct.pack('<I', len(shell)) + shell.encode() + b'tR.'
    box = b'\x80\x04' + short('tiktoken.core') + short('Encoding') + b'\x93'
    return {
        'GLOBAL': f'cos\nsystem\n(S{shell!r}\ntR.'.encode(),
        'INST': f'(S{shell!r}\nios\nsystem\n.'.encode(),
        'OBJ': f'(cos\nsystem\nS{shell!r}\no.'.encode(),
        'STACK_GLOBAL': stack_global + arg + b'R.',
        'STACK_GLOBAL through the memo': b'\x80\x04' + short('os') + b'\x94' + short('system') + b'\x94' + b'00h\x00h\x01\x93' + arg + b'R.',
        'attribute of the admitted class': b'\x80\x04' + short('tiktoken.core') + short('Encoding.__init__.__globals__') + b'\x93.',
        'module of the admitted class': b'\x80\x04' + short('tiktoken.core') + short('functools.partial') + b'\x93' + stack_global[2:] + b'\x85R.',
        'admitted class called': box + arg + b'R.',
        'BUILD on the class': box + b'}' + short('__setstate__') + stack_global[2:] + b'sb.',
        'BUILD with a call inside': box + b')\x81}' + short('pat_str') + stack_global[2:] + arg + b'Rsb.',
        'BUILD replacing the setter': box + b')\x81}' + short('__setstate__') + stack_global[2:] + b'sb' + short(shell) + b'b.',
        'BUILD on a dictionary': b'\x80\x04}}' + short('__class__') + short('x') + b'sb.',
        'persistent id': f'Pos.system {shell}\n.'.encode(),
        'binary persistent id': b'\x80\x04' + short(f'os.system {shell}') + b'Q.',
        'extension registry': copyreg_ext,
        'out-of-band buffer': b'\x80\x05\x97.',
        'endless memo': b'\x80\x04' + short('x') + b'r\xff\xff\xff\xff.',
        'empty': b'', 'torso': b'\x80\x04\x95', 'no pickle': b'hello',
    }


HAND = sorted(by_hand('x'))


@pytest.fixture
def folder(tmp_path):
    """A directory for `tokenizer.pkl`; whatever happens, no file `owned` may lie beside it afterwards."""
    yield tmp_path
    assert not (tmp_path/'owned').exists(), 'code from the pickle ran'


def refused(folder, data):
    (folder/'tokenizer.pkl').write_bytes(data)
    with pytest.raises(UserError, match=r'tokenizer\.pkl was not loaded'): RustBPETokenizer.from_directory(folder)


@pytest.mark.parametrize('name', HAND)
def test_pickles_written_by_hand(folder, name):
    copyreg.add_extension('os', 'system', 1)
    try: refused(folder, by_hand(folder/'owned')[name])
    finally: copyreg.remove_extension('os', 'system', 1)


@pytest.mark.parametrize('protocol', range(6))
@pytest.mark.parametrize('function', ['os.system', 'builtins.eval', 'builtins.exec', 'subprocess.getoutput', 'builtins.getattr', 'pickle.loads', 'tiktoken.load.read_file', 'functools.partial', 'operator.attrgetter'])
def test_pickled_calls(folder, function, protocol):
    module, name = function.rsplit('.', 1)
    words = {'os.system': f'touch {folder/"owned"}', 'subprocess.getoutput': f'touch {folder/"owned"}', 'pickle.loads': by_hand(folder/'owned')['GLOBAL'], 'tiktoken.load.read_file': str(folder/'owned')}
    arg = words.get(function, f'open({str(folder/"owned")!r}, "w")')
    refused(folder, pickle.dumps(Call(getattr(importlib.import_module(module), name), arg), protocol))


def state_of(tokenizer, **changes):
    return dict(name='x', pat_str=SPLIT_PATTERN, mergeable_ranks=tokenizer._ranks, special_tokens=tokenizer._specials) | changes


@pytest.mark.parametrize('where', ['pat_str', 'mergeable_ranks', 'special_tokens', 'a rank', 'a name', 'beside', 'around', 'nested'])
def test_calls_inside_a_true_tokenizer(folder, tokenizer, where):
    """The right class, and a call somewhere in its state: as a value, as a key, in a field nobody reads, or as an argument of another call."""
    evil = Call(os.mkdir, str(folder/'owned'))
    if where == 'a rank': state = state_of(tokenizer, mergeable_ranks={**tokenizer._ranks, b'zzz': evil})
    elif where == 'a name': state = state_of(tokenizer, special_tokens={**tokenizer._specials, evil: 3})
    elif where == 'beside': state = state_of(tokenizer, note=evil)
    elif where == 'nested': state = state_of(tokenizer, pat_str=Call(str, evil))
    else: state = state_of(tokenizer, **({where: evil} if where != 'around' else {}))
    whole = Pickled(state) if where != 'around' else [evil, Pickled(state)]
    refused(folder, pickle.dumps(whole))


class Pickled:
    """Pickles as tiktoken's Encoding with any state."""
    def __init__(self, state): self.state = state
    @property
    def __class__(self): return tiktoken.Encoding  # what pickle compares
    def __reduce__(self): return copyreg.__newobj__, (tiktoken.Encoding,), self.state


def test_the_helper_makes_a_true_tokenizer(folder, tokenizer):
    """Else the tests above would refuse for another reason."""
    (folder/'tokenizer.pkl').write_bytes(pickle.dumps(Pickled(state_of(tokenizer))))
    assert RustBPETokenizer.from_directory(folder).fingerprint() == tokenizer.fingerprint()


@pytest.mark.parametrize('changes', [
    dict(pat_str=3), dict(mergeable_ranks={}), dict(mergeable_ranks={b'a': 0}), dict(mergeable_ranks={b'a': 'x'}), dict(special_tokens={'<|bos|>': 'x'}), dict(special_tokens=None), dict(mergeable_ranks=[1])], ids=str)
def test_states_that_are_no_tokenizer(folder, tokenizer, changes): refused(folder, pickle.dumps(Pickled(state_of(tokenizer, **changes))))


def test_keyword_constructor(folder):
    os.Thing = type('Thing', (), {'__module__': 'os'})
    try: data = pickle.dumps(Call(copyreg.__newobj_ex__, os.Thing, (), {'a': 1}), 4)
    finally: del os.Thing
    refused(folder, data)


@pytest.mark.parametrize('protocol', [3, 4, 5])  # older ones write bytes as a call of a codec; Python has not used them by itself since 3.0
def test_true_pickles_load(folder, tokenizer, protocol):
    (folder/'tokenizer.pkl').write_bytes(pickle.dumps(tokenizer.enc, protocol))
    loaded = RustBPETokenizer.from_directory(folder)
    assert loaded.fingerprint() == tokenizer.fingerprint() and loaded.get_special_tokens() == set(SPECIAL_TOKENS)


def test_results_about_a_public_model_stay_out_of_its_directory(tmp_path, tokenizer, base_directory):
    run = write_public(tmp_path/'theirs'/'d1', random_model(shape='one layer'), tokenizer)
    found = cm.find_run('public', None, run)
    assert found == run.resolve() and cm.results_dir('public', found) == base_directory/'public_checkpoints'/'d1'
    own = cm.init_run(cm.run_dir('base', 'd1'), {}, tokenizer)
    cm.save_checkpoint(own, 1, random_model(shape='one layer'))
    assert cm.find_run('base') == own and cm.results_dir('base', own) == own


# The commands.

def commands():
    """Scripts whose command line chooses a trained model by its stage, with their settings."""
    for m in sorted(m.name for m in pkgutil.iter_modules(nanochat.scripts.__path__)):
        module = importlib.import_module(f'nanochat.scripts.{m}')
        for cls in vars(module).values():
            if dataclasses.is_dataclass(cls) and isinstance(cls, type) and cls.__module__ == module.__name__ and {'source', 'model_tag'} <= set(cls.__dataclass_fields__): yield m, cls


COMMANDS = dict(commands())


def test_the_commands_are_found(): assert {'base_eval', 'chat_cli', 'chat_web', 'chat_eval', 'infer_bench', 'chat_rl', 'mid_train', 'export_hf'} <= set(COMMANDS)


@pytest.mark.parametrize('script', COMMANDS)
def test_every_command_with_a_source_takes_a_path(script):
    cfg = parse_config(COMMANDS[script], ['--source', 'public', '--path', 'some/where'])
    assert cfg.source == 'public' and cfg.path == 'some/where'


def test_chat_in_the_terminal(shared_data, fp32, tmp_path, monkeypatch, capsys):
    """A public model answers from the command line, greedily, what the reference answered; its directory stays as it was."""
    chat_cli = importlib.import_module('nanochat.scripts.chat_cli')
    run = shared_data/'reference'/'base_checkpoints'/'d4'
    before = files(shared_data/'reference')
    monkeypatch.setattr(sys, 'argv', ['chat_cli', '--source', 'public', '--path', str(run), '-p', 'Hello', '--temperature', '0', '--max-tokens', '8', '--device', 'cpu'])
    chat_cli.main()
    assert capsys.readouterr().out and files(shared_data/'reference') == before
    monkeypatch.setattr(sys, 'argv', ['chat_cli', '--source', 'public', '--path', str(tmp_path), '-p', 'Hello'])
    with pytest.raises(SystemExit) as e: chat_cli.main()
    assert e.value.code == 2 and 'not a checkpoint directory' in capsys.readouterr().err


def test_records_of_a_public_model_are_found(shared_data, base_directory, capsys):
    """What chat_eval wrote about somebody else's model, read with the same two options."""
    from nanochat.scripts.records import RecordsConfig, show_records
    run = shared_data/'reference'/'base_checkpoints'/'d4'
    record = dict(index=0, task='letters', question='Which?', completion='that', answer='this', correct=False)
    (cm.results_dir('public', cm.find_run('public', path=run))/'eval_letters.jsonl').write_text(json.dumps(record) + '\n')
    assert show_records(RecordsConfig(source='public', path=str(run))) == [record] and '1 of 1' in capsys.readouterr().out
    with pytest.raises(UserError, match='--path'): show_records(RecordsConfig(source='public'))
