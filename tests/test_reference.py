"""The model against saved numbers of the public nanochat: logits, loss, gradients, cached decoding, greedy text, counts, optimizer steps (fp32)."""
import json
import zlib

import pytest
import torch

from nanochat.gpt import GPT, GPTConfig

TOL = dict(atol=1e-5, rtol=1e-5)


class Cache:
    """The least a key-value cache must offer to the model."""
    def __init__(self, config, B, length):
        shape = (config.n_layer, B, length, config.n_kv_head, config.n_embd // config.n_head)
        self.k_cache, self.v_cache = torch.zeros(shape), torch.zeros(shape)
        self.cache_seqlens, self.prev_embedding, self.n_layers = torch.zeros(B, dtype=torch.int32), None, config.n_layer

    def get_pos(self): return int(self.cache_seqlens[0])
    def get_layer_cache(self, i): return self.k_cache[i], self.v_cache[i]
    def advance(self, n): self.cache_seqlens += n


@pytest.fixture(scope='module')
def reference(shared_data):
    """Tensors and JSON of the reference, and its checkpoint."""
    folder = shared_data/'reference'
    data = torch.load(folder/'reference.pt', weights_only=True)
    run = folder/'base_checkpoints'/'d4'
    return dict(data, json=json.loads((folder/'reference.json').read_text()), config=json.loads((run/'meta_000010.json').read_text())['model_config'],
                state=torch.load(run/'model_000010.pt', weights_only=True))


@pytest.fixture
def model(reference, fp32):
    """The reference's checkpoint in our model, fp32."""
    model = GPT(GPTConfig(**reference['config']))
    model.to_empty(device='cpu')
    model.init_weights()
    model.load_state_dict(reference['state'])
    return model


def test_logits(model, reference):
    logits = model(reference['x'])
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits[:, ::7], reference['logits'], **TOL)


def test_loss_and_gradients(model, reference):
    loss = model(reference['x'], reference['y'])
    torch.testing.assert_close(loss, reference['loss'], **TOL)
    loss.backward()
    ours = {n: p.grad.norm() for n, p in model.named_parameters()}
    assert set(reference['grads']) <= set(ours)
    for name, norm in reference['grads'].items():
        torch.testing.assert_close(ours[name], norm.reshape(()), atol=1e-6, rtol=2e-5, msg=lambda m: f'{name}: {m}')
    torch.testing.assert_close(model.transformer.h[1].attn.c_q.weight.grad, reference['grad_c_q'], **TOL)


def test_loss_per_position(model, reference):
    loss = model(reference['x'], reference['y'], loss_reduction='none')
    torch.testing.assert_close(loss.flatten(), reference['loss_none'], **TOL)
    valid = (reference['y'] >= 0).sum()
    torch.testing.assert_close(model(reference['x'], reference['y'], loss_reduction='sum') / valid, reference['loss'], **TOL)


@torch.no_grad()
def test_cached_decoding(model, reference):
    x = reference['x']
    cache = Cache(model.config, 2, 256)
    logits = [model(x[:, :140], kv_cache=cache)[:, -1]]
    logits += [model(x[:, t:t + 1], kv_cache=cache)[:, -1] for t in range(140, 150)]
    torch.testing.assert_close(torch.stack(logits, 1), reference['cached'], **TOL)


def test_greedy(model, reference):
    prompt = reference['json']['prompt']
    assert prompt + list(model.generate(prompt, 60, temperature=0)) == reference['json']['greedy']


def test_counts(model, reference):
    assert model.estimate_flops() == reference['json']['flops_per_token']
    assert model.num_scaling_params() == reference['json']['scaling_params']


def test_optimizer(model, reference):
    pytest.importorskip('nanochat.optim', reason='nanochat.optim is not there yet')
    optimizer = model.setup_optimizer(unembedding_lr=0.008, embedding_lr=0.3, matrix_lr=0.02, weight_decay=0.1, scalar_lr=0.5)
    for step, norms in enumerate(reference['opt_norms']):
        for name, p in model.named_parameters():
            p.grad = 0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()) + step))
        optimizer.step()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.detach().norm(), norms[name].reshape(()), atol=1e-5, rtol=1e-5, msg=lambda m: f'step {step}, {name}: {m}')
    torch.testing.assert_close(model.transformer.h[2].mlp.c_fc.weight.detach(), reference['opt_c_fc'], **TOL)
    torch.testing.assert_close(model.lm_head.weight.detach()[:64], reference['opt_lm_head'], **TOL)
