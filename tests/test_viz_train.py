"""The living figures: a training run that a button stops, iso-FLOP fits, the cache, sampling, rollouts and slots, each against an independent reference."""
import asyncio, math, subprocess, sys, time
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip('ipywidgets', reason="the course's widgets are not installed: pip install 'nanochat[course]'")

from nanochat import viz_train as vt
from nanochat.checkpoint_manager import empty_model
from nanochat.common import UserError
from nanochat.engine import Draw, Engine, Scheduler
from nanochat.gpt import GPTConfig, window_sizes
from nanochat.inference import CachedGPT
from nanochat.scaling import gpt_config, model_size, plan_training
from nanochat.scripts.scaling_laws import Law, Point, synthetic_runs
from nanochat.tokenizer import RustBPETokenizer

TEXT = 'the cat sat on the mat and the dog sat on the log'
TOK = RustBPETokenizer.train_from_iterator([TEXT] * 40, 300)
IDS = torch.tensor([i for row in TOK.encode([TEXT] * 60, prepend='<|bos|>') for i in row])


@pytest.fixture(autouse=True)
def strict(monkeypatch): monkeypatch.setenv('NANOCHAT_STRICT_WIDGETS', '1')


def tiny(depth=1, width=32, length=64, pattern='L', vocab=None, kv=None):
    torch.manual_seed(0)
    heads = width // 16
    config = GPTConfig(sequence_len=length, vocab_size=vocab or TOK.get_vocab_size(), n_layer=depth, n_head=heads, n_kv_head=kv or heads, n_embd=width, window_pattern=pattern)
    return empty_model(config, torch.device('cpu'))


def training(steps=40, loader=None, **kwargs):
    model = tiny()
    plan = plan_training(model.config, device_batch_size=4, total_batch_size=256, num_iterations=steps)
    return vt.Training(model, model.setup_optimizer(**plan.optimizer_args()), loader or vt.random_rows(IDS, 4, 64), plan, **kwargs)


@pytest.fixture(scope='module')
def taught():
    """An engine whose model knows one sentence."""
    job = training(60)
    job.start().wait()
    return Engine(job.model.eval(), TOK, 'compute')


# A training run with a button -----------------------------------------------------------------------------------------

def press_at(live, step):
    """Press the button in the training thread, as a browser's message would, right after a step."""
    live.job.listeners.insert(0, lambda: live.button.click() if live.job.running and live.job.state.step == step else None)


def test_the_button_stops_within_a_step_and_goes_on():
    live = vt.live_training(training(), every=0)
    assert (live.button.description, live.button.disabled, live.error) == ('Start', False, None)
    press_at(live, 7)
    live.button.click()
    live.job.wait()
    assert live.job.state.step == 7 and not live.job.running and live.button.description == 'Go on'
    with torch.no_grad(): assert math.isfinite(live.job.model(*next(vt.random_rows(IDS, 2, 16))).item())  # the model is usable
    live.job.listeners.pop(0)
    live.button.click()
    assert live.job.wait() and live.job.finished
    assert live.button.disabled and live.button.description == 'Done: 40 steps' and live.error is None
    assert [r[0] for r in live.job.log.rows] == list(range(1, 41))


def test_a_click_from_another_thread_stops_a_long_run():
    """The run would take minutes; a click while it trains must end it."""
    live = vt.live_training(training(steps=100_000))
    live.start()
    while live.job.state.step < 3: time.sleep(.01)
    assert live.button.description == 'Stop' and live.job.running
    clicked_at = live.job.state.step
    live.button.click()
    assert live.button.description == 'Stopping'
    assert live.job.wait(60) and live.job.state.step <= clicked_at + 3
    assert live.button.description == 'Go on'


@pytest.mark.parametrize('stops', [(1,), (5, 6, 20)])
def test_stopping_changes_nothing(stops):
    whole, parts = training(25), training(25)
    whole.start().wait()
    parts.listeners.append(lambda: parts.stop() if parts.state.step in stops else None)
    runs = 0
    while not parts.finished:
        parts.start().wait()
        runs += 1
    assert runs == len(stops) + 1
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), parts.model.parameters()))
    assert [r[1] for r in whole.log.rows] == [r[1] for r in parts.log.rows]


def test_looking_changes_nothing():
    """Samples and held-out losses draw random numbers of their own; the training must not notice."""
    rows = next(vt.random_rows(IDS, 4, 64, seed=9))
    plain = training(20)
    looked = training(20, sample=lambda: str(torch.rand(1)), look_every=5)
    looked.validate = lambda: looked.model(*rows).item()
    for job in (plain, looked): job.start().wait()
    assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), looked.model.parameters()))
    assert [s for s, _ in looked.log.samples] == [1, 5, 10, 15, 20] == [s for s, _ in looked.log.marks] and looked.log.marks[-1][1] < looked.log.marks[0][1]


def test_errors_of_the_training_are_shown_and_raised(monkeypatch):
    monkeypatch.setenv('NANOCHAT_STRICT_WIDGETS', '0')
    live = vt.live_training(training(loader=iter([next(vt.random_rows(IDS, 4, 64))] * 2)), every=0)
    with pytest.raises(UserError, match='data ended'): live.run()
    assert isinstance(live.error, UserError) and 'data ended' in live.shown.data and live.button.description == 'Failed; try again'
    live.job.loader = vt.random_rows(IDS, 4, 64)
    live.run()
    assert live.job.finished and live.error is None and isinstance(live.shown.data, bytes)


def test_the_button_works_while_a_cell_awaits():
    """As a kernel does it: the click is another task of the loop in which the cell waits."""
    live = vt.live_training(training(steps=100_000))

    async def cell_and_click():
        async def click():
            while live.job.state.step < 3: await asyncio.sleep(.01)
            live.button.click()
        await asyncio.gather(live.watch(), click())

    asyncio.run(cell_and_click())
    assert 3 <= live.job.state.step < 100_000 and not live.job.running and live.button.description == 'Go on' and live.error is None
    asyncio.run(live.watch(seconds=.2))
    assert not live.job.running


def test_run_gives_up_after_its_seconds():
    live = vt.live_training(training(steps=100_000))
    live.run(seconds=.3)
    assert 0 < live.job.state.step < 100_000 and not live.job.running and live.button.description == 'Go on'


def test_an_interrupt_stops_gently(monkeypatch):
    live = vt.live_training(training(steps=100_000))
    wait, calls = live.job.wait, []

    def interrupted(seconds=None):
        calls.append(seconds)
        if len(calls) == 1: raise KeyboardInterrupt
        return wait(seconds)

    monkeypatch.setattr(live.job, 'wait', interrupted)
    live.run()
    assert not live.job.running and live.button.description in ('Go on', 'Start')


def test_starting_twice_trains_once():
    job = training(30)
    job.start()
    thread = job._thread
    assert job.start()._thread is thread
    job.wait()
    assert job.start()._thread is thread and len(job.log.rows) == 30


def test_odd_texts_can_be_drawn():
    log = vt.TrainLog(3, [(1, 2., .1, 10.), (2, 1., .1, 10.)], [(1, 2.)], [(1, 'a $x^ <b> \\frac \x00 é猫'), (2, '')])
    assert vt.picture(vt.training_figure(log)).data[:4] == b'\x89PNG'
    assert vt.picture(vt.training_figure(vt.TrainLog(10))).data[:4] == b'\x89PNG'


# Iso-FLOP -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('law', [Law(), Law(alpha=.34, beta=.28, A=90, B=50)])
def test_a_planted_law_is_found(law):
    fit, problems = vt.fit_points(synthetic_runs(law, noise=1e-4))
    assert not problems and abs(fit.params.exponent - law.exponents[0]) < .03 and fit.params.low < fit.params.exponent < fit.params.high


def test_budgets_without_a_valley_are_named_and_left_out():
    good = synthetic_runs(Law(), noise=0.)
    hill = [Point(1e17, n, 1e17 / 6 / n, 2 - .1 * math.log(n / 1e8)**2) for n in (1e7, 1e8, 1e9)]
    fit, problems = vt.fit_points(good + hill)
    assert len(fit.valleys) == 4 and len(problems) == 1 and 'no valley' in problems[0]
    assert vt.fit_points(hill)[0] is None


def test_isoflop_explorer_grows():
    points, pictures = [], set()
    board = vt.isoflop_explorer(points)
    for p in synthetic_runs(Law(), budgets=(1e18, 1e19), sizes=4):
        points.append(p)
        board.redraw()
        assert board.error is None
        pictures.add(board.shown.data)
    for choice in vt.LEAVE_OUT:
        board.set(leave_out=choice)
        assert board.error is None
    assert len(pictures) == 8


def test_trials_spend_their_budget():
    ids = vt.byte_ids([TEXT] * 40)
    held = next(vt.random_rows(ids, 64, 64, seed=1))
    points = list(vt.isoflop_trials(ids, held, [2e8], per_budget=3))
    assert [p.name for p in points] == ['1 x 8', '1 x 12', '1 x 16'] and [p.params for p in points] == sorted(p.params for p in points)
    for p, (d, w) in zip(points, vt.SIZES):
        assert abs(p.flops / 2e8 - 1) < .1 and p.flops == model_size(vt.small_config(d, w)).flops_per_token * p.tokens
    assert min(p.loss for p in points) < 5 < math.log2(256)


def test_the_paper_law_by_hand():
    best = vt.best_depth(4.64e18)
    sizes = {d: model_size(gpt_config(d)) for d in range(4, 61)}
    by_hand = min(sizes, key=lambda d: abs(math.log(4.64e18 / sizes[d].flops_per_token / sizes[d].scaling / 10.5)))
    assert best['depth'] == by_hand
    board = vt.paper_explorer()
    for flops in vt.REAL_BUDGETS: assert board.set(flops=flops).error is None


# Cache ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('pattern, kv', [('L', 2), ('SL', 1), ('SSSL', 2)])
def test_held_and_seen_by_brute_force(pattern, kv):
    config = tiny(depth=4, length=512, pattern=pattern, kv=kv).config
    layers = vt.cache_layers(config, 512)
    for (window, _), l in zip(window_sizes(config), layers):
        memory = {}
        for p in range(400):
            seen = set(range(max(0, p - window), p))            # a position sees itself and the `window` before it
            assert set(l.seen(p)) == seen <= set(l.held(p)) == set(memory.values())
            memory[p % l.places] = p
    assert vt.cache_bytes(layers, 400)['filled'] == sum(len(l.held(400)) for l in layers) * 2 * kv * 16 * 2


def test_the_real_ring_holds_what_is_said():
    model = tiny(depth=2, length=512, pattern='SL').eval()
    layers = vt.cache_layers(model.config, 512)
    with torch.inference_mode():
        runner = CachedGPT(model)
        ring, roomy = runner.slots(1, 512), runner.new_cache(1, 512, 512)
        for cache in (ring, roomy): cache.rows = 1
        for n, token in enumerate((IDS[:260] % model.config.vocab_size).tolist(), 1):
            for cache in (ring, roomy): runner.step(torch.tensor([token]), cache, n)
        for i, l in enumerate(layers):
            assert l.places == ring.rings[i]
            for p in l.held(260): assert torch.equal(ring.by_slot(i)[:, 0, :, p % ring.rings[i]], roomy.by_slot(i)[:, 0, :, p])
    assert len(layers[0].held(260)) == layers[0].places < 260 == len(layers[1].held(260))


def test_cache_filler_follows_every_control():
    filler, pictures = vt.cache_filler(gpt_config(4, 512, 512), prompt=40), set()
    for moved in (dict(read=1), dict(read=512), dict(windows='L'), dict(kv_heads=1), dict(rings=False), dict(read=300)):
        assert filler.set(**moved).error is None
        pictures.add(filler.shown.data)
    assert len(pictures) >= 5
    grid = vt.cache_grid(vt.cache_layers(gpt_config(4, 512, 512, window_pattern='SL'), 512), 512, 40, 300)
    assert grid[0][0] == 3 and grid[1][0] == 11 and grid[0][299] == 12 and grid[0][300] == 0


# Sampling -------------------------------------------------------------------------------------------------------------

SETTINGS = [Draw(1.0), Draw(.3), Draw(1.7, 5), Draw(1.2, None, .7), Draw(.8, 12, .9), Draw(0.)]

@pytest.mark.parametrize('draw', SETTINGS)
def test_odds_are_those_of_the_textbook(taught, draw):
    """Softmax of logits over temperature, the best k, then the fewest that reach p: written again from scratch."""
    logits = vt.next_logits(taught, TOK.encode('the cat sat', prepend='<|bos|>'))
    order = logits.argsort(descending=True).tolist()
    if draw.temperature == 0: expected = {order[0]: 1.0}
    else:
        kept = order[:draw.top_k or len(order)]
        weights = [math.exp((logits[t].item() - logits[kept[0]].item()) / draw.temperature) for t in kept]
        shares, mass, chosen = [w / sum(weights) for w in weights], 0., {}
        for t, s in zip(kept, shares):
            if mass >= (draw.top_p or 1): break
            chosen[t], mass = s, mass + s
        expected = {t: s / sum(chosen.values()) for t, s in chosen.items()}
    odds = vt.odds_of(logits, draw)
    assert abs(odds.sum().item() - 1) < 1e-4
    assert max(abs(odds[t].item() - expected.get(t, 0.)) for t in range(len(odds))) < 2e-3


def test_the_engine_draws_with_these_odds(taught):
    prompt, n = TOK.encode('the', prepend='<|bos|>'), 1500
    odds = vt.odds_of(vt.next_logits(taught, prompt), Draw(2.0, 6))
    answers = taught.generate_many([prompt], num_samples=n, max_tokens=1, temperature=2.0, top_k=6, seed=3, keep_end=True)[0][0]
    drawn = [a[len(prompt)] for a in answers]
    for t in odds.topk(6).indices.tolist():
        p = odds[t].item()
        assert abs(drawn.count(t) / n - p) < 4.5 * math.sqrt(p * (1 - p) / n) + 1e-3


def test_sampling_explorer(taught):
    knife, pictures = vt.sampling_explorer(taught, TEXT), set()
    for moved in (dict(position=1), dict(position=8), dict(temperature=2.0), dict(top_k=3), dict(top_p=.3), dict(temperature=0.0)):
        assert knife.set(**moved).error is None
        pictures.add(knife.shown.data)
    assert len(pictures) >= 5
    table = vt.sampling_table(vt.next_logits(taught, TOK.encode('the cat', prepend='<|bos|>')), TOK, Draw(1.0, 2), show=5)
    assert [t.plain for t in table] == sorted((t.plain for t in table), reverse=True) and sum(t.odds > 0 for t in table) == 2
    assert vt.token_text(TOK, TOK.encode_special('<|bos|>')) == '<|bos|>' and '\n' not in vt.token_text(TOK, 10)


# Rollouts -------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def policy(): return vt.half_taught(40)


def test_sums_mark_only_the_sum():
    task = vt.Sums()
    assert len(task) == 100 and task[37]['messages'][1]['content'] == '10'
    assert [task.evaluate(task[37], s) for s in ('10', ' 10<|assistant_end|>', '1', '100', '10 ', '', 'ten')] == [1, 1, 0, 0, 1, 0, 0]


def test_rollouts_page(policy):
    text, rollouts, start = vt.ask_question(policy.engine, vt.Sums(), 12, num_samples=16, max_tokens=6)
    page = vt.rollouts_html(text, rollouts, policy.tokenizer, start)
    assert text == '1+2' and page.count('<tr>') == 17 and abs(sum(r.advantage for r in rollouts)) < 1e-5
    assert f'mean reward {sum(r.reward for r in rollouts) / 16:.2f}' in page
    assert page.count('<span') == sum(len(r.ids) - start for r in rollouts)


def test_token_colours():
    good, bad, forced, neutral = (vt.coloured_token('<b>', a, c) for a, c in ((.5, True), (-.5, True), (.5, False), (0., True)))
    assert '76,120,221' in good and '224,121,43' in bad and '116,122,132' in forced and '116,122,132' in neutral and '<b>' not in good


def test_rollouts_explorer(policy):
    look = vt.rollouts_explorer({'a': policy.engine, 'b': policy.engine}, vt.Sums(), questions=[0, 99], num_samples=4, max_tokens=6)
    for moved in (dict(question=99), dict(model='b'), dict(temperature=.1), dict(seed=3)): assert look.set(**moved).error is None
    assert '9+9' in look.shown.data


def test_improving_improves():
    """Reward only: no sum is ever shown, and more of the sampled answers become right."""
    policy = vt.half_taught(80)
    lines = list(vt.improving(policy, vt.Sums(), updates=30, rate=.4))
    early, late = (sum(l['reward'] for l in part) / 8 for part in (lines[:8], lines[-8:]))
    assert late > early and not policy.model.training and all(l['tokens'] > 0 for l in lines)
    assert vt.picture(vt.reward_figure(lines, .1, .2)).data[:4] == b'\x89PNG' and vt.picture(vt.reward_figure([])).data[:4] == b'\x89PNG'


# Slots ----------------------------------------------------------------------------------------------------------------

def ticket(i, submitted, started=None, first=None, finished=None):
    return SimpleNamespace(id=i, submitted=submitted, started=started, first_token=first, finished=finished, tokens=[0], finish_reason='stop' if finished else None)


def test_spans_by_hand():
    spans = vt.slot_spans([ticket(4, 11), ticket(3, 10, 12, 12.5, 15), ticket(1, 10, 10, 11, 14), ticket(2, 10, 10.5, 11.5, 12), ticket(5, 11, 14)])
    assert [(s.request, s.slot) for s in spans] == [(1, 0), (2, 1), (3, 1), (5, 0), (4, None)]
    assert vt.slots_at(spans, 0.) == {'waiting': 2, 'reading': 1, 'writing': 0, 'done': 0}
    assert vt.slots_at(spans, 2.2) == {'waiting': 2, 'reading': 1, 'writing': 1, 'done': 1}
    assert vt.slots_at(spans, 9.) == {'waiting': 1, 'reading': 1, 'writing': 0, 'done': 3}


def test_a_real_burst_never_overfills(taught):
    with Scheduler(Engine(taught.model, TOK), slots=3) as scheduler:
        tickets = vt.burst(scheduler, [TOK.encode('the', prepend='<|bos|>')] * 10, [5, 30, 9, 20, 14, 3, 25, 8, 12, 17], temperature=1.0)
        timeline = vt.watch_slots(tickets, 3, every=.02)
    spans = vt.slot_spans(tickets)
    assert all(s.finished is not None and s.submitted <= s.started <= s.first_token <= s.finished for s in spans)
    assert {s.slot for s in spans} == {0, 1, 2}
    for a in spans:
        assert sum(b.started <= a.started < b.finished for b in spans) <= 3
        assert not any(b is not a and b.slot == a.slot and a.started < b.finished and b.started < a.finished for b in spans)
    for share in (0., .3, 1.): assert timeline.set(time=share * timeline.controls['time'].max).error is None


def test_waiting_and_empty_can_be_drawn():
    for tickets in ([], [ticket(1, 0.)], [ticket(1, 0., 0.)]): assert vt.slots_explorer(tickets, 2).error is None


# The module -----------------------------------------------------------------------------------------------------------

def test_imports_without_ipywidgets():
    """Functions work without the course's packages; a widget says what to install."""
    code = '''
import sys
sys.modules['ipywidgets'] = None
from nanochat import viz_train as vt
from nanochat.common import UserError
from nanochat.scaling import gpt_config
vt.cache_bytes(vt.cache_layers(gpt_config(2, 512, 512), 512), 10)
try: vt.cache_filler(gpt_config(2, 512, 512))
except UserError as e: print(e)
'''
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0 and 'pip install' in done.stdout, done.stderr
