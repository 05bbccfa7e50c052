"""Exports for transformers, opened in a fresh process that knows nothing of nanochat: logits, generation, padding, chat templates, and what is refused."""
import dataclasses, importlib.util, json, os, pickle, random, re, subprocess, sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from nanochat import checkpoint_manager as cm
from nanochat.common import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.scripts import export_hf as eh
from nanochat.tokenizer import RustBPETokenizer
from warm_python import warm_python

needs_transformers = pytest.mark.skipif(importlib.util.find_spec('transformers') is None, reason='transformers is not installed')
PARTS_OFF = dict(value_embeds=False, smear=False, backout=False, layer_scalars=False)
PLAIN = PARTS_OFF | dict(qk_scale=1.0, window_pattern='L')
WORDS = ['how', 'many', 'is', 'twelve', '12*7', '84', 'the', 'answer', '?', '\n', 'naïve', '你好', '🙂', "it's", '   ', '{{ x }}', "don't", '<|', '%}', '10,000']
TEXTS = [' '.join(WORDS), '', ' ', 'a', 'def f(x):\n    return x**2\n', '\n\n\n  x', "I'll say: “quote” — and 1234567890"]


def random_model(seed=0, **options):
    """A model of ours in which every parameter matters."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**dict(sequence_len=256, vocab_size=300, n_layer=4, n_head=4, n_kv_head=2, n_embd=64) | options))
    model.to_empty(device='cpu')
    model.init_weights()
    for p in model.parameters(): p.data += 0.1 * torch.randn_like(p)
    return model.eval()


def conversations(count=40):
    """Random conversations in our form, some with a system message, some with tool calls, ending with a question."""
    rng = random.Random(7)
    say = lambda: ' '.join(rng.choices(WORDS, k=rng.randint(1, 6)))
    def answer():
        if rng.random() < 0.5: return say()
        parts = []
        for _ in range(rng.randint(1, 2)): parts += [{'type': 'text', 'text': say()}, {'type': 'python', 'text': say()}, {'type': 'python_output', 'text': say()}]
        return parts + [{'type': 'text', 'text': say()}]
    for _ in range(count):
        messages = [{'role': 'system', 'content': say()}] if rng.random() < 0.4 else []
        for _ in range(rng.randint(0, 3)): messages += [{'role': 'user', 'content': say()}, {'role': 'assistant', 'content': answer()}]
        yield messages + [{'role': 'user', 'content': say()}]


def as_openai(messages):
    """The same conversation with tool calls as the OpenAI protocol has them; text that follows an output is a message of its own."""
    out = []
    for m in messages:
        if not isinstance(m['content'], list):
            out.append(m)
            continue
        for p in m['content']:
            if p['type'] == 'text': out.append({'role': 'assistant', 'content': p['text']})
            elif p['type'] == 'python_output': out.append({'role': 'tool', 'content': p['text']})
            else: out[-1] = {**out[-1], 'tool_calls': [{'type': 'function', 'function': {'name': 'python', 'arguments': {'code': p['text']}}}]}
    return out


# What a user of an export does, in a process of its own: no nanochat, no network.
CHILD = r'''
import json, socket, sys
def no_network(*args): raise AssertionError(f'the network was asked for: {args}')
socket.socket.connect = socket.getaddrinfo = no_network
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging
logging.set_verbosity_error()
logging.disable_progress_bar()
torch.set_num_threads(1)
job = torch.load(sys.argv[1], weights_only=True)
GREEDY = dict(max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0)

def why(f):
    try: f()
    except Exception as e: return f'{type(e).__name__}: {e}'
    return 'nothing was refused'

def open_one(folder, x, prompt):
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    out = dict(type=type(model).__name__, dtype=str(model.dtype), eos=model.generation_config.eos_token_id)
    with torch.no_grad():
        out['logits'] = model(x).logits
        out['loss'] = float(model(x, labels=x).loss)
        first = model(x[:, :150], use_cache=True)
        chunks = [first.logits, model(x[:, 150:160], past_key_values=first.past_key_values).logits, model(x[:, 160:161], past_key_values=first.past_key_values).logits]
    out['chunks'] = torch.cat(chunks, dim=1)
    out['last'] = model(x, logits_to_keep=1).logits.detach()
    for name, options in dict(cached={}, uncached=dict(use_cache=False), beams=dict(num_beams=3), beams_uncached=dict(num_beams=3, use_cache=False)).items():
        out[name] = model.generate(prompt, **GREEDY | options)[0].tolist()
    short = prompt[0, 9:]
    batch = torch.stack([torch.cat([torch.zeros(9, dtype=torch.long), short]), prompt[0]])
    mask = torch.ones_like(batch)
    mask[0, :9] = 0
    out['padded'] = [r[-16:].tolist() for r in model.generate(batch, attention_mask=mask, **GREEDY)]
    out['alone'] = [model.generate(p[None], **GREEDY)[0, -16:].tolist() for p in (short, prompt[0])]
    with torch.no_grad(): out['padded_logits'] = float((model(batch, attention_mask=mask).logits[0, 9:] - model(short[None]).logits[0]).abs().max())
    out['samples'] = [r[-4:].tolist() for r in model.generate(prompt, do_sample=True, num_return_sequences=3, max_new_tokens=4, pad_token_id=0)]
    out['right'] = why(lambda: model.generate(batch.flip(1), attention_mask=mask.flip(1), **GREEDY))
    out['static'] = why(lambda: model.generate(prompt, cache_implementation='static', **GREEDY))
    out['embeds'] = why(lambda: model(inputs_embeds=torch.zeros(1, 3, model.config.hidden_size)))
    model.train()
    model(x, labels=x).loss.backward()
    out['gradients'] = all(p.grad is not None for p in model.parameters())
    out['names'] = sorted(n for n, _ in model.named_parameters())
    chat = lambda messages, prompt: list(tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False))
    out['texts'] = [tokenizer(t).input_ids for t in job['texts']]
    out['decoded'] = [tokenizer.decode(i) for i in out['texts']]
    out['inputs'] = sorted(tokenizer('a'))
    if tokenizer.chat_template:
        out['chats'] = [chat(c, True) for c in job['chats']]
        out['finished'] = [chat(c[:-1], False) for c in job['chats'] if len(c) > 2]
        out['openai'] = [chat(c, True) for c in job['openai']]
        out['disorder'] = [why(lambda: chat(c, True)) for c in job['disorder']]
        batch = tokenizer.apply_chat_template([job['chats'][0], job['chats'][1]], add_generation_prompt=True, padding=True, return_tensors='pt', return_dict=True)
        out['batch'] = [r[m.bool()].tolist() for r, m in zip(batch['input_ids'], batch['attention_mask'])]
        out['left'] = bool((batch['attention_mask'][:, -1] == 1).all())
    model.save_pretrained(folder + '-again')
    with torch.no_grad(): out['again'] = float((AutoModelForCausalLM.from_pretrained(folder + '-again', trust_remote_code=True).eval()(x).logits - out['logits']).abs().max())
    half = model.to(torch.bfloat16).eval()
    out['bf16'] = dict(tokens=half.generate(prompt, **GREEDY).shape[1], dtype=str(half(x).logits.dtype), off=float((half(x).logits - out['logits']).abs().mean()))
    return out

import transformers
native = hasattr(transformers, 'NanoChatForCausalLM')
result = {name: open_one(folder, job['x'], job['prompt']) for name, folder in job['folders'].items() if native or 'native' not in name}
result['nanochat'] = 'nanochat' in sys.modules
torch.save(result, sys.argv[2])
'''
DISORDER = [[{'role': 'user', 'content': 'a'}] * 2, [{'role': 'assistant', 'content': 'a'}], [{'role': 'user', 'content': 'a'}, {'role': 'system', 'content': 'b'}],
            [{'role': 'user', 'content': 'a'}, {'role': 'tool', 'content': 'b'}], [{'role': 'user', 'content': 'a'}, {'role': 'robot', 'content': 'b'}]]


@pytest.fixture(scope='module')
def tokenizer(): return RustBPETokenizer.train_from_iterator([' '.join(WORDS)] * 5 + TEXTS, 300)


@pytest.fixture(scope='module')
def exported(tmp_path_factory, tokenizer):
    """Exports of several models, the models, and the inputs that all are tried on."""
    place, saved = tmp_path_factory.mktemp('exports'), {k: os.environ.get(k) for k in ('NANOCHAT_BASE_DIR', 'NANOCHAT_DTYPE')}
    os.environ |= dict(NANOCHAT_BASE_DIR=str(place), NANOCHAT_DTYPE='float32')
    try:
        models = dict(full=random_model(), half=random_model(seed=1, n_layer=3, n_kv_head=4, layer_scalars=False, smear=False, rope_base=10_000), plain=random_model(seed=2, **PLAIN), plain_native=random_model(seed=2, **PLAIN | dict(rope_base=10_000)))
        folders = {}
        for name, model in models.items():
            cm.save_checkpoint(cm.init_run(cm.run_dir('sft', name), {}, tokenizer), 10, model, meta=dict(val_bpb=1.25))
            folders[name] = eh.export_hf(eh.ExportConfig(model_tag=name, native=name.endswith('native')))['folder']
        models['public'], folders['public'] = public_export(place, tokenizer)
    finally:
        for k, v in saved.items(): os.environ.pop(k) if v is None else os.environ.update({k: v})
    x = torch.randint(0, 300, (2, 200), generator=torch.Generator().manual_seed(1))
    return dict(place=place, models=models, folders=folders, x=x, prompt=x[:1, :24])


def public_export(place, tokenizer):
    """A checkpoint as the public project writes it, without value embeddings and smear, exported."""
    model, run = random_model(seed=3, value_embeds=False, smear=False, n_layer=3), place/'theirs'/'base_checkpoints'/'d3'
    run.mkdir(parents=True)
    torch.save({f'_orig_mod.{k}': v for k, v in model.state_dict().items()}, run/'model_000010.pt')
    shape = {k: v for k, v in dataclasses.asdict(model.config).items() if k.startswith(('n_', 'vocab', 'seq', 'window'))}
    (run/'meta_000010.json').write_text(json.dumps(dict(step=10, model_config=shape)))
    (place/'theirs'/'tokenizer').mkdir()
    with open(place/'theirs'/'tokenizer'/'tokenizer.pkl', 'wb') as f: pickle.dump(tokenizer.enc, f)
    return model, eh.export_hf(eh.ExportConfig(source='public', path=str(run), out=str(place/'from-public')))['folder']


@pytest.fixture(scope='module')
def opened(exported):
    """What a fresh process finds in each export."""
    chats, place = list(conversations()), exported['place']
    job = dict(folders=exported['folders'], x=exported['x'], prompt=exported['prompt'], texts=TEXTS, chats=chats, openai=[as_openai(c) for c in chats], disorder=DISORDER)
    torch.save(job, place/'job.pt')
    env = {k: v for k, v in os.environ.items() if not k.startswith(('HF_', 'TRANSFORMERS_'))} | dict(HF_HOME=str(place/'hf'), HF_HUB_OFFLINE='1', OMP_NUM_THREADS='1')
    done = subprocess.run([sys.executable, '-c', CHILD, str(place/'job.pt'), str(place/'result.pt')], cwd=place, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return Opened(torch.load(place/'result.pt', weights_only=True))


class Opened(dict):
    """Results by name; a native export that this version of transformers has no class for skips its test."""
    def __missing__(self, name): pytest.skip('this version of transformers has no NanoChat class')


CASES = ['full', 'half', 'plain', 'plain_native', 'public']
each = pytest.mark.parametrize('name', CASES)


@needs_transformers
@each
def test_same_logits(exported, opened, name):
    model, out, x = exported['models'][name], opened[name], exported['x']
    with torch.no_grad(): ours = model(x)
    torch.testing.assert_close(out['logits'], ours, rtol=0, atol=1e-5)
    torch.testing.assert_close(out['last'], ours[:, -1:], rtol=0, atol=1e-5)
    assert out['type'] == ('NanoChatForCausalLM' if name == 'plain_native' else 'NanochatForCausalLM') and out['dtype'] == 'torch.float32'
    assert abs(out['loss'] - model(x[:, :-1], x[:, 1:]).item()) < 1e-5 and out['gradients'] and out['again'] == 0


@needs_transformers
@each
def test_cache(exported, opened, name):
    """Read in parts, with a cache, the text gives the logits of the whole; greedy and beam search agree with and without it, and with ours."""
    out, prompt = opened[name], exported['prompt']
    torch.testing.assert_close(out['chunks'], out['logits'][:, :161], rtol=0, atol=1e-5)
    ours = prompt[0].tolist() + list(exported['models'][name].generate(prompt[0].tolist(), 16, temperature=0))
    assert out['cached'] == out['uncached'] == ours
    assert out['beams'] == out['beams_uncached']
    assert all(len(s) == 4 for s in out['samples'])


@needs_transformers
@each
def test_padding(opened, name):
    """Prompts padded on the left continue as they would alone."""
    out = opened[name]
    assert out['padded'] == out['alone'] and out['padded_logits'] < 1e-5


@needs_transformers
@each
def test_half_precision(opened, name):
    """In bfloat16 the model runs, cache and all, and its logits, near those of float32, are float32 (ours: transformers' class leaves them as they are)."""
    found = opened[name]['bf16']
    assert found['tokens'] == 40 and found['off'] < 0.1
    assert found['dtype'] == ('torch.bfloat16' if name == 'plain_native' else 'torch.float32')


@needs_transformers
def test_refusals_in_words(opened):
    out = opened['full']
    assert 'pad prompts on the left' in out['right']
    assert 'needs the default cache' in out['static'] and 'needs input_ids' in out['embeds']


@needs_transformers
@each
def test_tokenizer(opened, tokenizer, name):
    out = opened[name]
    for text, ids, decoded in zip(TEXTS, out['texts'], out['decoded']): assert ids == tokenizer.encode(text) and decoded == text
    assert out['inputs'] == ['attention_mask', 'input_ids']
    assert out['eos'] == [tokenizer.encode_special('<|assistant_end|>'), tokenizer.get_bos_token_id()]


@needs_transformers
@pytest.mark.parametrize('name', ['full', 'plain_native', 'public'])
def test_chat_template(opened, tokenizer, name):
    """The template's ids are those of `render_for_completion`, in our form of tool calls and in OpenAI's; of a finished conversation, those of `render_conversation`."""
    out, chats = opened[name], list(conversations())
    ours = [tokenizer.render_for_completion({'messages': c}) for c in chats]
    assert out['chats'] == ours and out['openai'] == ours
    assert out['finished'] == [tokenizer.render_conversation({'messages': c[:-1]}, None)[0] for c in chats if len(c) > 2]
    assert out['batch'] == ours[:2] and out['left']
    assert sum(isinstance(m['content'], list) for c in chats for m in c) > 10, 'too few tool calls to test anything'
    for why in out['disorder']: assert re.search('take turns|only the first|answers a tool call|roles are', why), why
    for c in DISORDER:
        with pytest.raises(UserError): tokenizer.render_for_completion({'messages': c})


@needs_transformers
def test_names_of_parameters_are_ours(exported, opened):
    """The usual export keeps the names of our checkpoints; nothing of nanochat was imported to read it."""
    assert opened['full']['names'] == sorted(n for n, _ in exported['models']['full'].named_parameters()) and opened['nanochat'] is False


@needs_transformers
def test_reference_of_the_public_project(shared_data, exported, tmp_path):
    """The directory that the public project wrote, exported, in the class that the export carries: its logits and its greedy text."""
    from nanochat.hf_modeling import NanochatConfig, NanochatForCausalLM
    source = shared_data/'reference'
    folder = Path(eh.export_hf(eh.ExportConfig(source='public', path=str(source/'base_checkpoints'/'d4'), out=str(tmp_path/'out')))['folder'])
    data, facts = torch.load(source/'reference.pt', weights_only=True), json.loads((source/'reference.json').read_text())
    model = NanochatForCausalLM(NanochatConfig(**json.loads((folder/'config.json').read_text()))).eval()
    model.load_state_dict(safetensors.torch.load_file(folder/'model.safetensors'))
    with torch.no_grad(): torch.testing.assert_close(model(data['x']).logits[:, ::7], data['logits'], rtol=1e-5, atol=1e-5)
    prompt = torch.tensor([facts['prompt']])
    assert model.generate(prompt, max_new_tokens=60, do_sample=False, eos_token_id=None, pad_token_id=0)[0].tolist() == facts['greedy']


# What needs no transformers.

def test_files(exported):
    for name, folder in exported['folders'].items():
        found = {p.name for p in Path(folder).iterdir()}
        want = {'config.json', 'generation_config.json', 'model.safetensors', 'tokenizer.json', 'tokenizer_config.json', 'README.md'}
        assert found == want | (set() if name == 'plain_native' else {'modeling_nanochat.py'})
        config, card = json.loads((Path(folder)/'config.json').read_text()), (Path(folder)/'README.md').read_text()
        assert config['vocab_size'] == 300 and ('auto_map' in config) == ('trust_remote_code=True' in card) == (name != 'plain_native')
        assert ('apply_chat_template' in card) == (name != 'public'), 'base models continue texts, others chat'
        assert card.startswith('---\nlibrary_name: transformers') and 'vLLM' in card and 'llama.cpp' in card
        rows = {len(t) for k, t in safetensors.torch.load_file(Path(folder)/'model.safetensors').items() if 'embed' in k or 'wte' in k or 'lm_head' in k}
        assert rows == {300}, 'the padding of the vocabulary was written'


def test_shipped_code_stands_alone(exported):
    """The file in the export imports PyTorch and transformers only, and carries no trace of the notebook."""
    import ast
    text = (Path(exported['folders']['full'])/'modeling_nanochat.py').read_text()
    modules = {a.name for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Import) for a in n.names} | {n.module for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ImportFrom)}
    assert {m.split('.')[0] for m in modules} == {'torch', 'transformers'} and 'AUTOGENERATED' not in text and '# %%' not in text


@pytest.mark.parametrize('dtype, size', [('float32', 4), ('bfloat16', 2), ('float16', 2)])
def test_dtypes(exported, tmp_path, monkeypatch, dtype, size):
    monkeypatch.setenv('NANOCHAT_BASE_DIR', str(exported['place']))
    result = eh.export_hf(eh.ExportConfig(model_tag='full', dtype=dtype, out=str(tmp_path/'x')))
    tensors = safetensors.torch.load_file(tmp_path/'x'/'model.safetensors')
    assert sum(t.nbytes for t in tensors.values()) == size * result['parameters'] and json.loads((tmp_path/'x'/'config.json').read_text())['dtype'] == dtype


@pytest.mark.parametrize('options, named', [
    (dict(value_embeds=True), ['value_embeds']), (dict(smear=True), ['smear']), (dict(backout=True), ['backout']), (dict(layer_scalars=True), ['layer_scalars']),
    (dict(qk_scale=1.2), ['qk_scale']), (dict(window_pattern='SL'), ['window_pattern']), ({k: True for k in PARTS_OFF} | dict(qk_scale=1.2, window_pattern='SSSL'), [*PARTS_OFF, 'qk_scale', 'window_pattern']),
    ({}, []), (dict(window_pattern='SL', sequence_len=100), [])], ids=str)
def test_native_names_what_stands_in_the_way(options, named):
    """Every option by itself and all at once; a window as long as the row is none."""
    model = random_model(**PLAIN | options)
    if not named: return eh.check_native(model.config, model.state_dict())
    with pytest.raises(UserError, match='Leave out --native') as e: eh.check_native(model.config, model.state_dict())
    flags = re.findall(r'--(?:no-)?([a-z-]+)', str(e.value).split('. Leave')[0])
    assert [f.replace('-', '_') for f in flags] == named


def test_parts_without_effect_are_not_in_the_way():
    model = random_model(**PLAIN | dict.fromkeys(PARTS_OFF, True))
    with torch.no_grad():
        for p in (model.smear_lambda, model.backout_lambda, model.x0_lambdas, *(e.weight for e in model.value_embeds.values())): p.zero_()
        model.resid_lambdas.fill_(1)
    assert eh.obstacles(model.config, model.state_dict()) == []
    names = eh.native_weights(eh.weights_of(model.state_dict(), model.config, torch.float32))
    assert set(names) == set(eh.native_weights(eh.weights_of(random_model(**PLAIN).state_dict(), model.config, torch.float32)))


def test_never_replaces_other_things(exported, tmp_path, monkeypatch):
    monkeypatch.setenv('NANOCHAT_BASE_DIR', str(exported['place']))
    work = tmp_path/'work'
    work.mkdir()
    (work/'thesis.txt').write_text('years of work')
    go = lambda **kw: eh.export_hf(eh.ExportConfig(**dict(model_tag='full', out=str(work)) | kw))
    with pytest.raises(UserError, match='something else than an earlier export'): go()
    with pytest.raises(UserError, match='is a file'): go(out=str(work/'thesis.txt'))
    assert [p.name for p in work.iterdir()] == ['thesis.txt']
    (work/'thesis.txt').unlink()
    go()
    (work/'old.txt').write_text('from an earlier export')
    go()
    assert not (work/'old.txt').exists() and (work/'config.json').exists()
    (work/'config.json').write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match='something else'): go()
    go(force=True)
    assert json.loads((work/'config.json').read_text())['model_type'] == 'nanochat_custom'


def test_a_failed_export_leaves_the_earlier_one(exported, tmp_path, monkeypatch):
    monkeypatch.setenv('NANOCHAT_BASE_DIR', str(exported['place']))
    go = lambda: eh.export_hf(eh.ExportConfig(model_tag='full', out=str(tmp_path/'x')))
    go()
    before = {p.name: p.read_bytes() for p in (tmp_path/'x').iterdir()}
    def fail(path, state):
        path.write_bytes(b'half')
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(eh, 'write_weights', fail)
    with pytest.raises(UserError, match='disk is full'): go()
    assert {p.name: p.read_bytes() for p in (tmp_path/'x').iterdir()} == before and [p.name for p in tmp_path.iterdir()] == ['x']


def test_wrong_settings(exported, monkeypatch):
    monkeypatch.setenv('NANOCHAT_BASE_DIR', str(exported['place']))
    with pytest.raises(UserError, match='int8 is not one of float32'): eh.export_hf(eh.ExportConfig(model_tag='full', dtype='int8'))
    with pytest.raises(UserError, match='run python -m nanochat.scripts.chat_rl'): eh.export_hf(eh.ExportConfig(source='rl'))
    with pytest.raises(UserError, match='--path'): eh.export_hf(eh.ExportConfig(source='public'))
    with pytest.raises(UserError, match='no checkpoint of step 11'): eh.export_hf(eh.ExportConfig(model_tag='full', step=11))


def test_command_line_without_transformers(exported, tmp_path):
    """The export itself needs no transformers: in this process, importing it fails."""
    code = "import sys; assert 'transformers' not in sys.modules; sys.modules['transformers'] = None; from nanochat.scripts import export_hf; export_hf.main()"
    args = ['--source', 'public', '--path', str(exported['place']/'theirs'/'base_checkpoints'/'d3'), '--out', str(tmp_path/'x')]
    done = subprocess.run([warm_python().python, '-c', code, *args], env=warm_python().environ(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "trust_remote_code=True" in done.stdout and (tmp_path/'x'/'modeling_nanochat.py').exists()
    assert (tmp_path/'x'/'model.safetensors').read_bytes() == (Path(exported['folders']['public'])/'model.safetensors').read_bytes()


def test_tokenizer_without_chat_tokens():
    """A model on an encoding of OpenAI's has no chat: no template, and one token begins, ends and pads."""
    import tiktoken
    gpt2 = tiktoken.Encoding('x', pat_str=r'\w+|\W', mergeable_ranks={bytes([b]): b for b in range(256)}, special_tokens={'<|endoftext|>': 256})
    tokenizer = RustBPETokenizer(gpt2, '<|endoftext|>')
    config = json.loads(eh.tokenizer_files(tokenizer, 64)['tokenizer_config.json'])
    assert 'chat_template' not in config and config['pad_token'] == '<|endoftext|>' and set(eh.special_token_ids(tokenizer).values()) == {256}
    assert 'apply_chat_template' not in eh.model_card(GPTConfig(), 1, {}, 'x', False, False)
