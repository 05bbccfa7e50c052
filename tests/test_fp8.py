"""fp8 layers: rounding against hand-decoded bits, the three products, edges, which layers, and trainings with the real `torch._scaled_mm`."""
import dataclasses, json, math, os, shutil

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat import fp8
from nanochat.checkpoint_manager import build_model, load_checkpoint, run_config, run_dir, step_dir
from nanochat.common import UserError, read_jsonl
from nanochat.fp8 import E4M3, E5M2, Fp8Linear, convert_to_fp8, disable_fp8, fp8_candidates, fp8_linear, product, qualifies, quantise, supports_fp8
from nanochat.gpt import GPT, GPTConfig, Linear
from nanochat.scaling import plan_training
from nanochat.scripts import base_train as bt
from nanochat.train import NonFiniteLoss, TrainState, accumulate, train_step

os.environ['NANOCHAT_FP8_CPU'] = '1'
ABLE, WHY = supports_fp8('cpu')
del os.environ['NANOCHAT_FP8_CPU']
real = pytest.mark.skipif(not ABLE, reason=WHY)
GPU, WHY_NOT = supports_fp8('cuda') if torch.cuda.is_available() else (False, 'there is no GPU')

CPU = torch.device('cpu')
SMALL = GPTConfig(sequence_len=64, vocab_size=128, n_layer=2, n_head=2, n_kv_head=2, n_embd=128, window_pattern='L')
TINY = dict(depth=1, head_dim=64, aspect_ratio=128, sequence_len=64, device_batch_size=4, total_batch_size=256, eval_tokens=512)


def small(config=SMALL, seed=0, converted=False):
    """A model whose last matrices are not zero, so that every layer has a gradient."""
    torch.manual_seed(seed)
    model = GPT(config)
    model.to_empty(device='cpu').init_weights()
    for b in model.transformer.h:
        for layer in (b.attn.c_proj, b.mlp.c_proj): nn.init.normal_(layer.weight, std=.05)
    if converted: assert convert_to_fp8(model)
    return model


def error(found, exact): return float((found.float() - exact.float()).norm() / exact.float().norm())


def randn(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def decoded(exponent, fraction, bias, infinity):
    """All finite numbers of a format, from the layout of its bits."""
    found = []
    for code in range(256):
        e, f = code >> fraction & 2**exponent - 1, code & 2**fraction - 1
        if e == 2**exponent - 1 and (infinity or f == 2**fraction - 1): continue
        value = 2.0**(1 - bias) * f / 2**fraction if e == 0 else 2.0**(e - bias) * (1 + f / 2**fraction)
        found.append(-value if code >> 7 else value)
    return torch.tensor(found, dtype=torch.float64)


def gradients(fn, x, w, g):
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = fn(x, w)
    return y.detach(), *torch.autograd.grad(y, (x, w), g)


# --- numbers ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('dtype, layout', [(E4M3, (4, 3, 7, False)), (E5M2, (5, 2, 15, True))])
@pytest.mark.parametrize('size', [1e-20, 1e-7, .02, 1., 1e6, 1e30])
def test_rounds_to_the_nearest_number_of_the_format(dtype, layout, size):
    """Every entry, for tensors of every size, and the largest exactly."""
    numbers, x = decoded(*layout), randn(2000) * size
    q, scale = quantise(x, dtype)
    assert scale.dtype == torch.float32 and scale.dim() == 0 and q.dtype == dtype
    steps = x / scale
    off = (q.double() - steps.double()).abs()
    nearest = (numbers[:, None] - steps.double()).abs().amin(0)
    torch.testing.assert_close(off, nearest, rtol=0, atol=0)
    i = x.abs().argmax()
    assert abs(q[i].float()) == numbers.max() == torch.finfo(dtype).max
    torch.testing.assert_close(q[i].float() * scale, x[i])


def test_error_does_not_depend_on_the_size():
    """A scale for each tensor; without it 1e-7 is nothing in E4M3."""
    assert not (randn(1000) * 1e-7).to(E4M3).float().any()
    for dtype, most in ((E4M3, .03), (E5M2, .06)):
        found = []
        for size in (1e-12, 1e-7, 1., 1e9):
            q, scale = quantise(randn(1000) * size, dtype)
            found.append(error(q.float() * scale, randn(1000) * size))
        assert max(found) < most and max(found) - min(found) < .003


def test_the_whole_range_of_fp32_has_a_finite_scale():
    for dtype in (E4M3, E5M2):
        for value in (0., 1e-45, 1e-38, 1e-31, 3.4e38):
            q, scale = quantise(torch.tensor([value, -value]), dtype)
            assert scale.isfinite() and scale > 0 and q.float().isfinite().all() and (1 / scale).isfinite()


@real
@pytest.mark.parametrize('a_dtype', [E4M3, E5M2])
@pytest.mark.parametrize('out', [torch.bfloat16, torch.float32])
def test_a_product_is_that_of_the_rounded_matrices(a_dtype, out):
    """Nothing is lost beside the rounding of the inputs and of the result; neither matrix has to lie in memory as the kernel wants it."""
    for a, b in ((randn(48, 64), randn(32, 64, seed=1)), (randn(64, 48).t(), randn(64, 32, seed=1).t())):
        a, b = quantise(a * 1e-5, a_dtype), quantise(b * 300, E4M3)
        exact = (a[0].double() * a[1]) @ (b[0].double() * b[1]).t()
        assert error(product(a, b, out), exact) < (3e-3 if out == torch.bfloat16 else 1e-6)


@real
@pytest.mark.parametrize('size', [1e-9, 1., 1e4])
def test_output_and_gradients_against_fp32(size):
    x, w, g = randn(4, 32, 256), randn(384, 256, seed=1) * .03, randn(4, 32, 384, seed=2) * size
    exact = gradients(F.linear, x, w, g)
    found = gradients(fp8_linear, x.bfloat16(), w, g.bfloat16())
    assert [t.dtype for t in found] == [torch.bfloat16, torch.bfloat16, torch.float32] and [t.shape for t in found] == [t.shape for t in exact]
    errors = [error(a, b) for a, b in zip(found, exact)]
    assert .02 < errors[0] < .045 and all(.04 < e < .07 for e in errors[1:]), errors  # two roundings of 2.6%; one of 5.3% and one of 2.6%


@real
def test_the_weights_gradient_is_never_rounded_to_16_bits():
    """It is added up over micro-steps: nothing is lost but the rounding of the two factors."""
    x, w, g = randn(32, 256).bfloat16(), randn(128, 256, seed=1), randn(32, 128, seed=2).bfloat16()
    found = gradients(fp8_linear, x, w, g)[2]
    (a, sa), (b, sb) = quantise(g, E5M2), quantise(x, E4M3)
    assert error(found, (a.double() * sa).t() @ (b.double() * sb)) < 1e-5


@real
def test_gradients_that_lie_oddly_in_memory():
    """A sum's gradient is one number seen everywhere; a transposed output's has its rows as columns."""
    x, w = randn(32, 128), randn(256, 128, seed=1)
    for fn in (lambda y: y.sum(), lambda y: (y.t() * randn(256, 32)).sum()):
        grads = []
        for linear in (F.linear, fp8_linear):
            a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
            grads.append(torch.autograd.grad(fn(linear(a, b)), (a, b)))
        assert all(error(a, b) < .08 for a, b in zip(*reversed(grads)))


@real
def test_frozen_weights_and_inputs():
    x, w = randn(32, 128), randn(256, 128, seed=1)
    for i in range(2):
        inputs = [x.clone(), w.clone()]
        inputs[i].requires_grad_()
        fp8_linear(*inputs).sum().backward()
        assert inputs[i].grad is not None and inputs[1 - i].grad is None


# --- the edges --------------------------------------------------------------------------------------------------------

@real
def test_zeros_give_zeros():
    x, w, g = randn(16, 128), randn(128, 128, seed=1), randn(16, 128, seed=2)
    for zero in range(3):
        inputs = [x, w, g]
        inputs[zero] = torch.zeros_like(inputs[zero])
        found, exact = gradients(fp8_linear, *inputs), gradients(F.linear, *inputs)
        for a, b in zip(found, exact): assert a.isfinite().all() and a.any() == b.any()


@real
@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_so(bad):
    """In whatever it enters; the cast alone may turn infinity into 448."""
    for i, affected in enumerate([(0, 2), (0, 1), (1, 2)]):  # of x, w, g in y, dx, dw
        inputs = [randn(16, 128), randn(128, 128, seed=1), randn(16, 128, seed=2)]
        inputs[i].view(-1)[37] = bad
        found = gradients(fp8_linear, *inputs)
        for k, t in enumerate(found): assert t.isfinite().any() == (k not in affected)


@real
@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_the_training_loop_stops_with_its_weights_as_they_were(bad):
    model = small(converted=True)
    optimizer = model.setup_optimizer()
    with torch.no_grad(): model.transformer.h[1].mlp.c_fc.weight[3, 4] = bad
    before = {k: v.clone() for k, v in model.state_dict().items()}
    ids = torch.randint(128, (1, 65), generator=torch.Generator().manual_seed(0))
    plan = plan_training(SMALL, device_batch_size=1, total_batch_size=64, num_iterations=3)
    with pytest.raises(NonFiniteLoss): train_step(model, optimizer, iter([(ids[:, :-1], ids[:, 1:])]), plan, TrainState())
    assert all(torch.equal(v, before[k]) or k.endswith('1.mlp.c_fc.weight') for k, v in model.state_dict().items())


# --- the layers -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('n_in, n_out, yes', [(128, 128, True), (768, 3072, True), (3072, 768, True), (112, 1024, False), (1024, 112, False), (136, 128, False), (128, 136, False), (144, 160, True), (12, 6, False)])
def test_which_layers_qualify(n_in, n_out, yes):
    assert qualifies(Linear(n_in, n_out)) == yes and not qualifies(nn.Linear(n_in, n_out))


def test_the_blocks_matrices_and_not_the_head():
    model = GPT(dataclasses.replace(SMALL, vocab_size=1024))  # on the meta device
    names = {n for n, m in model.named_modules() if any(m is c for c in fp8_candidates(model))}
    assert names == {f'transformer.h.{i}.{n}' for i in range(2) for n in ('attn.c_q', 'attn.c_k', 'attn.c_v', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj')}
    assert convert_to_fp8(model) == 12 == convert_to_fp8(model) and type(model.lm_head) is type(model.smear_gate) is Linear
    assert len(fp8_candidates(GPT(dataclasses.replace(SMALL, n_embd=256, n_head=4, n_kv_head=1)))) == 2 * 4, 'keys and values of one head of 64 are too narrow'
    assert convert_to_fp8(GPT(dataclasses.replace(SMALL, n_embd=96))) == 0


@real
def test_conversion_changes_nothing_but_the_arithmetic():
    model, plain = small(), small()
    optimizer = model.setup_optimizer()
    ids, flops = [[id(p) for p in g['params']] for g in optimizer.param_groups], model.estimate_flops()
    convert_to_fp8(model)
    assert list(model.state_dict()) == list(plain.state_dict()) and model.estimate_flops() == flops
    assert [[id(p) for p in g['params']] for g in model.setup_optimizer().param_groups] == ids
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(model.state_dict().values(), plain.state_dict().values()))
    small(seed=1).load_state_dict(model.state_dict()), model.load_state_dict(small(seed=1).state_dict())


@real
def test_every_layer_is_called_in_training():
    """On a CPU the model has hand-written paths that read weights without calling their layers."""
    model, seen = small(converted=True), []
    for name, m in model.named_modules():
        if type(m) is Fp8Linear: m.register_forward_hook(lambda *_, name=name: seen.append(name))
    ids = torch.randint(128, (2, 65), generator=torch.Generator().manual_seed(0))
    rough, plain = model(ids[:, :-1], ids[:, 1:]), small()(ids[:, :-1], ids[:, 1:])
    rough.backward()
    assert len(seen) == len(set(seen)) == 12 and rough != plain and abs(rough - plain) < .02 * plain
    assert all(p.grad.isfinite().all() and p.grad.any() for n, p in model.named_parameters() if n.startswith('transformer.h') and 've_gate' not in n)


@real
def test_disabled_is_the_plain_model_and_then_fp8_again():
    model, plain = small(converted=True), small()
    ids = torch.randint(128, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        rough, exact = model(ids), plain(ids)
        with disable_fp8(model): assert torch.equal(model(ids), exact)
        assert torch.equal(model(ids), rough) and .003 < error(rough, exact) < .1
        with pytest.raises(ZeroDivisionError), disable_fp8(model): 1 / 0
        assert torch.equal(model(ids), rough)
        with disable_fp8(plain): assert torch.equal(plain(ids), exact)


@real
def test_rows_that_do_not_divide_are_multiplied_as_usual():
    layer, x = Linear(128, 256), randn(3, 5, 128)
    exact = layer(x)
    layer.__class__ = Fp8Linear
    assert torch.equal(layer(x), exact) and not torch.equal(layer(x[:, :, None].expand(3, 5, 16, 128)), exact[:, :, None].expand(3, 5, 16, 256))
    layer(x).sum().backward()
    assert layer.weight.grad.shape == (256, 128)


def test_nothing_waits_for_the_device():
    """On the meta device there are shapes but no numbers: reading one, as `.item()` does, would raise."""
    layer = Fp8Linear(128, 256).to('meta')
    x = torch.empty(32, 128, device='meta', requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == (32, 256) and x.grad.shape == x.shape and layer.weight.grad.shape == (256, 128)


@real
def test_compiles_whole_and_not_again():
    """One graph, forward and backward; a pause without fp8 between two calls compiles nothing anew afterwards."""
    layer = Linear(128, 256)
    holder = nn.Sequential(layer)
    assert convert_to_fp8(holder) == 1
    torch._dynamo.reset()
    compiled = torch.compile(holder, fullgraph=True, backend='aot_eager', dynamic=False)
    x = randn(32, 128)
    for n in range(2):
        with torch._dynamo.config.patch(error_on_recompile=n > 0):
            found = trained(compiled, layer, x)
        exact = trained(holder, layer, x)
        assert all(error(a, b) < 1e-6 for a, b in zip(found, exact))
        with disable_fp8(holder): assert torch.equal(holder(x), F.linear(x, layer.weight))


def trained(fn, layer, x):
    layer.weight.grad, x = None, x.clone().requires_grad_()
    y = fn(x)
    y.square().sum().backward()
    return y.detach(), x.grad, layer.weight.grad


# --- trainings --------------------------------------------------------------------------------------------------------

def batches(n):
    """Walks over an alphabet of 97 by a step to be guessed from the first letters."""
    rng = torch.Generator().manual_seed(1)
    for _ in range(n):
        start, step = (torch.randint(1, m, (8, 1), generator=rng) for m in (97, 5))
        rows = (start + step * torch.arange(33)) % 97
        yield rows[:, :-1], rows[:, 1:]


def curve(model, steps=40, share=4096):
    """The losses; gradients are as small as one micro-batch's in a step of many, which the optimizer does not mind."""
    optimizer, losses = model.setup_optimizer(), []
    for x, y in batches(steps):
        loss = model(x, y)
        (loss / share).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses)


@real
def test_the_loss_follows_that_of_the_plain_model():
    plain, rough = curve(small()), curve(small(converted=True))
    assert rough[-5:].mean() < .5 * rough[0] and (plain - rough).abs().mean() < .1 and abs(plain[-10:].mean() - rough[-10:].mean()) < .05
    assert not torch.equal(plain, rough)


@real
def test_micro_steps_add_up():
    """Each micro-batch has scales of its own, and the gradients are added in fp32."""
    model, (one, two) = small(converted=True), batches(2)
    alone = []
    for batch in (one, two):
        model.zero_grad()
        accumulate(model, [batch], 512)
        alone.append({n: p.grad.clone() for n, p in model.named_parameters()})
    model.zero_grad()
    accumulate(model, [one, two], 512)
    for n, p in model.named_parameters(): torch.testing.assert_close(p.grad, alone[0][n] + alone[1][n])


@pytest.fixture
def home(prepared, base_directory, monkeypatch):
    """This test's own base directory with corpus and tokenizer, where a CPU may imitate fp8."""
    shutil.copytree(prepared, base_directory, dirs_exist_ok=True)
    monkeypatch.setenv('NANOCHAT_FP8_CPU', '1')
    return base_directory


def settings(**changed): return bt.BaseTrainConfig(**TINY | dict(fp8=True, num_iterations=6, eval_every=-1, save_every=3) | changed)


@real
def test_a_run_in_fp8_is_recorded_saved_and_continued_exactly(home):
    result, run = bt.base_train(settings()), run_dir('base', 'd1')
    found = load_checkpoint(run, 6)
    assert result['fp8'] is run_config(run)['fp8'] is found.meta['fp8'] is True
    model, tokenizer, _ = build_model(run, 6, CPU, 'base')
    assert not any(type(m) is Fp8Linear for m in model.modules())
    bpb = bt.validation_bpb(model, tokenizer, bt.open_corpus('stdlib'), B=4, T=64, tokens=512, ranks=bt.Ranks())
    assert bpb == result['val_bpb'], 'evaluated as it is served: without fp8'
    shutil.rmtree(step_dir(run, 6))
    (run/'result.json').unlink()
    assert bt.base_train(bt.BaseTrainConfig(model_tag='d1', resume=True, eval_every=-1, eval_tokens=512))['val_bpb'] == result['val_bpb']
    again = load_checkpoint(run, 6)
    assert again.meta['fp8'] and all(torch.equal(v, again.model_state[k]) for k, v in found.model_state.items())


@real
def test_fp8_and_plain_runs_are_two_runs(home):
    plain = bt.base_train(settings(fp8=False))
    with pytest.raises(UserError, match='fp8 False there, True here'): bt.base_train(settings())
    path = run_dir('base', 'd1')/'config.json'
    config = json.loads(path.read_text())
    assert 'fp8' not in plain and config.pop('fp8') is False
    path.write_text(json.dumps(config))  # begun before there was fp8
    assert bt.base_train(settings(fp8=False))['skipped'] and bt.base_train(bt.BaseTrainConfig(model_tag='d1', resume=True))['skipped']
    rough = bt.base_train(settings(model_tag='eight'))
    losses = [[r['loss'] for r in read_jsonl(run_dir('base', tag)/'metrics.jsonl') if 'loss' in r] for tag in ('d1', 'eight')]
    assert rough['fp8'] and all(abs(a - b) < .05 for a, b in zip(*losses)) and losses[0] != losses[1]


def test_refused_before_work_begins(home, monkeypatch):
    monkeypatch.delenv('NANOCHAT_FP8_CPU')
    with pytest.raises(UserError, match='--fp8 cannot be used here: a CPU only imitates fp8.*NANOCHAT_FP8_CPU=1'): bt.base_train(settings())
    monkeypatch.setattr(bt, 'supports_fp8', lambda device: (True, ''))
    with pytest.raises(UserError, match='multiple of 16 tokens.*device_batch_size 1 x sequence_len 72'): bt.base_train(settings(device_batch_size=1, sequence_len=72, total_batch_size=144))
    with pytest.raises(UserError, match='no layer of a model of width 64'): bt.base_train(settings(aspect_ratio=64))
    assert not run_dir('base', 'd1').exists()


@real
def test_a_run_begun_in_fp8_is_not_continued_without(home, monkeypatch):
    bt.base_train(settings(num_iterations=2))
    monkeypatch.delenv('NANOCHAT_FP8_CPU')
    with pytest.raises(UserError, match='and --resume: the run was begun with it'): bt.base_train(bt.BaseTrainConfig(model_tag='d1', resume=True))


@pytest.mark.parametrize('capability, hip, able, why', [((9, 0), None, True, ''), ((8, 9), None, True, ''), ((10, 0), None, True, ''), ((8, 6), None, False, 'compute capability 8.6'), ((7, 5), None, False, 'Hopper'), ((9, 4), '6.2', False, 'AMD')])
def test_which_gpus(capability, hip, able, why, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'A card')
    monkeypatch.setattr(torch.version, 'hip', hip)
    found, words = supports_fp8('cuda')
    assert found == able and why in words and bool(words) != able
    assert supports_fp8('mps') == (False, 'a device of type mps cannot multiply fp8')


def test_a_pytorch_without_the_product(monkeypatch):
    monkeypatch.setenv('NANOCHAT_FP8_CPU', '1')
    def missing(*args): raise NotImplementedError
    monkeypatch.setattr(fp8, 'product', missing)
    assert not supports_fp8('cpu')[0] and 'no fp8 product for CPUs' in supports_fp8('cpu')[1]


# --- a GPU ------------------------------------------------------------------------------------------------------------

@pytest.mark.skipif(not GPU, reason=WHY_NOT)
@pytest.mark.parametrize('compiled', [False, True])
def test_on_a_gpu(compiled):
    x, w, g = (t.cuda() for t in (randn(4, 64, 256), randn(384, 256, seed=1) * .03, randn(4, 64, 384, seed=2) * 1e-6))
    fn = torch.compile(fp8_linear, fullgraph=True) if compiled else fp8_linear
    errors = [error(a, b) for a, b in zip(gradients(fn, x.bfloat16(), w, g.bfloat16()), gradients(F.linear, x, w, g))]
    assert errors[0] < .045 and max(errors) < .07
    for bad in (math.nan, math.inf):
        x[0, 0, 0] = bad
        assert not fn(x.bfloat16(), w).isfinite().any()
