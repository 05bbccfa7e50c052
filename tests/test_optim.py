"""The optimizer: agreement with saved numbers, with torch and with SVD-based naive versions; exact state; layout for sharding."""
import io, zlib

import pytest
import torch

import nanochat.optim as optim
from nanochat.optim import MuonAdamW, StackLayout, adamw_rows, adamw_state, adamw_step, muon_step, polar_express, stack_padded


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- the public project's numbers -------------------------------------------------------------------------------------

RATES = dict(unembedding_lr=0.008, embedding_lr=0.3, matrix_lr=0.02, weight_decay=0.1, scalar_lr=0.5)


def groups_by_table(params, width, *, unembedding_lr, embedding_lr, matrix_lr, weight_decay, scalar_lr):
    """The group table of the public project, from state-dict keys alone, independent of `GPT.setup_optimizer`."""
    scale = (width / 768) ** -0.5
    pick = lambda *starts: [p for n, p in params.items() if n.startswith(starts)]
    adamw = lambda ps, lr, betas, wd: dict(kind='adamw', params=ps, lr=lr, betas=betas, eps=1e-10, weight_decay=wd)
    groups = [adamw(pick('lm_head'), unembedding_lr * scale, (0.8, 0.96), 0.01),
              adamw(pick('transformer.wte'), embedding_lr * scale, (0.8, 0.995), 0.001),
              adamw(pick('value_embeds'), embedding_lr * scale * 0.5, (0.8, 0.995), 0.01),
              adamw(pick('resid_lambdas'), scalar_lr * 0.01, (0.8, 0.95), 0.05),
              adamw(pick('x0_lambdas'), scalar_lr, (0.96, 0.95), 0.0),
              adamw(pick('smear', 'backout'), 0.2, (0.8, 0.95), 0.0)]
    matrices = pick('transformer.h.')
    for shape in sorted({p.shape for p in matrices}):
        groups.append(dict(kind='muon', params=[p for p in matrices if p.shape == shape], lr=matrix_lr, momentum=0.95,
                           ns_steps=5, beta2=0.9, weight_decay=weight_decay))
    return groups


def four_steps(params, optimizer, reference):
    for s in range(4):
        for n, p in params.items():
            p.grad = 0.01 * gaussian(*p.shape, seed=zlib.crc32(n.encode()) + s)
        optimizer.step()
        for n, norm in reference['opt_norms'][s].items():
            assert params[n].norm().item() == pytest.approx(float(norm), rel=2e-5, abs=1e-6), f'{n} after step {s + 1}'
    torch.testing.assert_close(params['transformer.h.2.mlp.c_fc.weight'].data, reference['opt_c_fc'], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(params['lm_head.weight'].data[:64], reference['opt_lm_head'], atol=1e-5, rtol=1e-5)


@pytest.fixture
def reference(shared_data, fp32):
    folder = shared_data/'reference'
    weights = torch.load(folder/'base_checkpoints'/'d4'/'model_000010.pt', weights_only=True)
    return torch.load(folder/'reference.pt', weights_only=True), weights


def test_four_steps_equal_the_public_project(reference):
    numbers, weights = reference
    params = {n: torch.nn.Parameter(w) for n, w in weights.items()}
    four_steps(params, MuonAdamW(groups_by_table(params, 64, **RATES)), numbers)
