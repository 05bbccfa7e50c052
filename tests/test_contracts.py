"""The names that users of the public nanochat know: signatures with their defaults, state-dict keys, and a cache of theirs used as it is."""
import inspect, json, shutil, sys
from dataclasses import MISSING, fields

import pytest
import torch

from nanochat import engine, execution, flash_attention, gpt, loss_eval, optim, tokenizer
from nanochat.checkpoint_manager import load_model
from nanochat.dataloader import tokenizing_distributed_data_loader_bos_bestfit, tokenizing_distributed_data_loader_with_state_bos_bestfit
from nanochat.engine import Engine, KVCache
from nanochat.gpt import GPT, GPTConfig
from nanochat.tasks.common import Task
from nanochat.tokenizer import RustBPETokenizer, get_token_bytes, get_tokenizer

NONE = inspect.Parameter.empty  # no default: the argument must be given

SIGNATURES = {  # function: the arguments in their order, with their defaults
    GPT.__init__: dict(config=NONE, pad_vocab_size_to=64),
    GPT.forward: dict(idx=NONE, targets=None, kv_cache=None, loss_reduction='mean'),
    GPT.generate: dict(tokens=NONE, max_tokens=NONE, temperature=1.0, top_k=None, seed=42),
    GPT.setup_optimizer: dict(unembedding_lr=0.008, embedding_lr=0.3, matrix_lr=0.02, weight_decay=0.0, scalar_lr=0.5),
    GPT.get_device: {}, GPT.estimate_flops: {}, GPT.num_scaling_params: {}, GPT.init_weights: {},
    KVCache.__init__: dict.fromkeys(['batch_size', 'num_heads', 'seq_len', 'head_dim', 'num_layers', 'device', 'dtype'], NONE),
    KVCache.get_pos: {}, KVCache.reset: {}, KVCache.get_layer_cache: dict(layer_idx=NONE), KVCache.advance: dict(num_tokens=NONE), KVCache.prefill: dict(other=NONE),
    Engine.__init__: dict(model=NONE, tokenizer=NONE),
    Engine.generate: dict(tokens=NONE, num_samples=1, max_tokens=None, temperature=1.0, top_k=None, seed=42),
    engine.sample_next_token: dict(logits=NONE, rng=NONE, temperature=1.0, top_k=None),
    execution.use_calculator: dict(expr=NONE),
    RustBPETokenizer.train_from_iterator: dict(it=NONE, vocab_size=NONE),
    RustBPETokenizer.from_directory: dict(directory=NONE),
    RustBPETokenizer.from_pretrained: dict(tiktoken_name=NONE),
    RustBPETokenizer.encode: dict(text=NONE, prepend=None, append=None, num_threads=8),
    RustBPETokenizer.__call__: dict(text=NONE, prepend=None, append=None, num_threads=8),
    RustBPETokenizer.render_conversation: dict(conversation=NONE, max_tokens=2048),
    RustBPETokenizer.render_for_completion: dict(conversation=NONE),
    RustBPETokenizer.visualize_tokenization: dict(ids=NONE, mask=NONE),
    tokenizer.get_tokenizer: {}, tokenizer.get_token_bytes: dict(device='cpu'),
    optim.MuonAdamW.__init__: dict(param_groups=NONE),
    flash_attention.flash_attn.flash_attn_func: dict(q=NONE, k=NONE, v=NONE, causal=False, window_size=(-1, -1)),
    flash_attention.flash_attn.flash_attn_with_kvcache: dict(q=NONE, k_cache=NONE, v_cache=NONE, k=None, v=None, cache_seqlens=None, causal=False, window_size=(-1, -1)),
    loss_eval.evaluate_bpb: dict(model=NONE, batches=NONE, steps=NONE, token_bytes=NONE),
    Task.__init__: dict(start=0, stop=None, step=1),
    tokenizing_distributed_data_loader_with_state_bos_bestfit: dict(tokenizer=NONE, B=NONE, T=NONE, split=NONE),
    load_model: dict(source=NONE, device=NONE, phase=NONE, model_tag=None, step=None),
}


@pytest.mark.parametrize('function', SIGNATURES, ids=lambda f: f.__qualname__)
def test_signature(function):
    """Arguments have the public names, order and defaults; what follows them is ours and optional."""
    have = {k: p for k, p in inspect.signature(function).parameters.items() if k not in ('self', 'cls')}
    want = SIGNATURES[function]
    assert list(have)[:len(want)] == list(want)
    for name, default in want.items():
        if default is not NONE: assert have[name].default == default, name
        assert have[name].kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD), name
    for name in list(have)[len(want):]: assert have[name].default is not NONE or have[name].kind in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL), f'{name} is required'


def test_names_without_a_signature():
    for name in 'decode encode_special get_bos_token_id get_vocab_size get_special_tokens id_to_token decode_single_token_bytes save'.split():
        assert callable(getattr(RustBPETokenizer, name)), name
    for name in 'num_examples get_example evaluate reward eval_type'.split(): assert hasattr(Task, name), name
    roles = ('bos', 'user_start', 'user_end', 'assistant_start', 'assistant_end', 'python_start', 'python_end', 'output_start', 'output_end')
    assert list(tokenizer.SPECIAL_TOKENS) == [f'<|{r}|>' for r in roles]
    assert r'\p{N}{1,2}' in tokenizer.SPLIT_PATTERN and issubclass(optim.MuonAdamW, torch.optim.Optimizer)
    assert callable(tokenizing_distributed_data_loader_bos_bestfit) and callable(Engine.generate_batch)


def test_config():
    """The dataclass with the public fields, in their order, with their defaults."""
    want = dict(sequence_len=2048, vocab_size=32768, n_layer=12, n_head=6, n_kv_head=6, n_embd=768, window_pattern='SSSL')
    assert [(f.name, f.default) for f in fields(GPTConfig)][:7] == list(want.items())
    assert all(f.default is not MISSING for f in fields(GPTConfig))


def test_state_dict_keys_and_construction():
    """Built on the meta device, given memory, initialised; the keys are the public ones and no others."""
    config = GPTConfig(sequence_len=64, vocab_size=300, n_layer=3, n_head=2, n_kv_head=1, n_embd=32, window_pattern='SL')
    with torch.device('meta'): model = GPT(config, pad_vocab_size_to=64)
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device='cpu')
    model.init_weights()
    layer = [f'attn.{n}' for n in ('c_q', 'c_k', 'c_v', 'c_proj')] + ['mlp.c_fc', 'mlp.c_proj']
    want = {f'transformer.h.{i}.{n}.weight' for i in range(3) for n in layer} | {f'transformer.h.{i}.attn.ve_gate.weight' for i in (0, 2)} | {f'value_embeds.{i}.weight' for i in (0, 2)}
    want |= {'transformer.wte.weight', 'lm_head.weight', 'resid_lambdas', 'x0_lambdas', 'smear_gate.weight', 'smear_lambda', 'backout_lambda'}
    assert set(model.state_dict()) == want
    assert model.lm_head.weight.shape == (320, 32) and model.get_device() == torch.device('cpu')
    x = torch.randint(0, 300, (2, 9))
    logits = model(x)
    assert logits.shape == (2, 9, 300) and logits.dtype == torch.float32
    assert model(x, x).ndim == 0 and model(x, x, loss_reduction='none').numel() == 18
    ids = list(model.generate([1, 2, 3], 4, temperature=0))
    assert len(ids) == 4 and all(type(i) is int for i in ids)
    assert isinstance(model.num_scaling_params(), dict) and isinstance(model.estimate_flops(), int)


def test_cache_attributes():
    cache = KVCache(2, 1, 16, 8, 3, 'cpu', torch.float32)
    assert cache.k_cache.shape == cache.v_cache.shape == (3, 2, 16, 1, 8) and cache.cache_seqlens.tolist() == [0, 0]
    assert cache.get_pos() == 0 and cache.prev_embedding is None and [t.shape for t in cache.get_layer_cache(1)] == [(2, 16, 1, 8)] * 2
    cache.advance(3)
    assert cache.get_pos() == 3
    cache.reset()
    assert cache.get_pos() == 0


# A cache directory of the public project, used as it is: NANOCHAT_BASE_DIR points at it and nothing else is done.

@pytest.fixture
def public(shared_data, base_directory, fp32):
    """The base directory holds what the public project wrote, and nothing of ours."""
    for name in ('base_checkpoints', 'tokenizer'): shutil.copytree(shared_data/'reference'/name, base_directory/name)
    files = sorted(p.relative_to(base_directory).as_posix() for p in base_directory.rglob('*') if p.is_file())
    assert files == ['base_checkpoints/d4/meta_000010.json', 'base_checkpoints/d4/model_000010.pt', 'tokenizer/token_bytes.pt', 'tokenizer/tokenizer.pkl']
    return json.loads((shared_data/'reference'/'reference.json').read_text())


def test_public_tokenizer(public, base_directory):
    tok = get_tokenizer()
    assert tok.get_vocab_size() == 512 and tok.get_bos_token_id() == tok.encode_special('<|bos|>')
    for text, ids in public['encodings'].items(): assert tok.encode(text) == ids and tok.decode(ids) == text
    assert tok.render_for_completion(public['conversation']) == public['completion_ids']
    saved = torch.load(base_directory/'tokenizer'/'token_bytes.pt', weights_only=True)
    assert get_token_bytes('cpu').tolist() == saved.tolist()
    (base_directory/'tokenizer'/'token_bytes.pt').unlink()
    assert get_token_bytes('cpu').tolist() == saved.tolist()


@pytest.mark.parametrize('tag, step', [(None, None), ('d4', None), ('d4', 10)])
def test_public_model_loads_and_speaks(public, tag, step):
    """`load_model` with the public arguments, then the engine, give the public project's greedy tokens; nothing is written."""
    model, tok, meta = load_model('base', torch.device('cpu'), phase='eval', model_tag=tag, step=step)
    assert meta['step'] == 10 and not model.training and meta['model_config']['n_layer'] == 4
    prompt, new = public['prompt'], public['greedy'][len(public['prompt']):]
    ends = {tok.encode_special('<|assistant_end|>'), tok.get_bos_token_id()}
    whole = next((i for i, t in enumerate(new) if t in ends), len(new))
    results, masks = Engine(model, tok).generate_batch(prompt, num_samples=2, max_tokens=len(new), temperature=0)
    assert results == [prompt + new[:whole]] * 2 and masks[0][:len(prompt)] == [0] * len(prompt)
    assert list(model.generate(prompt, 5, temperature=0)) == new[:5]


def test_public_model_in_other_stages(public, base_directory):
    """The public names of the later stages' folders are ours too."""
    for source, folder in (('sft', 'chatsft_checkpoints'), ('rl', 'chatrl_checkpoints'), ('mid', 'mid_checkpoints')):
        shutil.copytree(base_directory/'base_checkpoints', base_directory/folder)
        model, _, meta = load_model(source, torch.device('cpu'), phase='train')
        assert meta['step'] == 10 and model.training


def test_public_model_on_the_command_line(public, base_directory, monkeypatch, capsys):
    """`python -m nanochat.scripts.chat_cli --source base --prompt ...` on a public cache answers, and leaves it as it was."""
    from nanochat.scripts import chat_cli
    before = {p: p.stat().st_mtime_ns for p in base_directory.rglob('*') if p.is_file()}
    monkeypatch.setattr(sys, 'argv', ['chat_cli', '--source', 'base', '--prompt', 'Hi', '--max-tokens', '8', '--temperature', '0', '--device', 'cpu'])
    chat_cli.main()
    assert capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in base_directory.rglob('*') if p.is_file()} == before
