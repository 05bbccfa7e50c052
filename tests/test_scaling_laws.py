"""The fit of the scaling law, held against laws that were planted; and reading finished runs."""
import json, math

import numpy as np
import pytest

from nanochat.common import UserError
from nanochat.scripts.scaling_laws import (Law, Point, ScalingLawsConfig, bootstrap, by_budget, draw_isoflop, draw_miniseries, finished_runs, fit_isoflop, fit_power,
                                           fit_valley, fit_what_is_there, leftovers, miniseries_rows, points_of, scaling_laws, synthetic_runs)

WORLDS = [Law(), Law(alpha=.34, beta=.28, A=90, B=50), Law(alpha=.25, beta=.37, A=15, B=200)]


def parabolas(a=0.5, scale=20.0, budgets=(1e18, 3e18, 1e19), sizes=5, noise=0.0, seed=0):
    """Exact parabolas in ln N whose bottoms lie on N = scale * C^a."""
    rng = np.random.default_rng(seed)
    return [Point(C, N, C / 6 / N, 1 + .04 * math.log(N / (scale * C**a)) ** 2 + noise * rng.standard_normal()) for C in budgets for N in scale * C**a * np.geomspace(.3, 3, sizes)]


@pytest.mark.parametrize('a', [.3, .5, .73])
def test_exact_parabolas_are_recovered_exactly(a):
    fit = fit_isoflop(parabolas(a))
    assert fit.params.exponent == pytest.approx(a, abs=1e-9) and fit.tokens.exponent == pytest.approx(1 - a, abs=1e-9)
    assert fit.params(7e18) == pytest.approx(20 * 7e18**a, rel=1e-6) and fit.noise < 1e-9
    assert all(v.inside and v.curvature == pytest.approx(.04) and v.loss == pytest.approx(1) for v in fit.valleys)
    assert fit.ratio(1e18) == pytest.approx(1e18 / 6 / (20 * 1e18**a) ** 2, rel=1e-6)


@pytest.mark.parametrize('law', WORLDS, ids=lambda w: f'a={w.exponents[0]:.2f}')
def test_planted_exponents_lie_within_the_error_bars(law):
    """A 95% interval holds the truth in about 95 of 100 tables, for parameters and for tokens."""
    fits = [fit_isoflop(synthetic_runs(law, seed=s), repeats=300) for s in range(50)]
    for which, true in zip(('params', 'tokens'), law.exponents):
        laws = [getattr(f, which) for f in fits]
        assert np.mean([p.low <= true <= p.high for p in laws]) >= .8
        spread = np.std([p.exponent for p in laws])
        assert .5 < np.mean([p.error for p in laws]) / spread < 1.6, 'the error bar is not the size of the error'
        assert abs(np.mean([p.exponent for p in laws]) - true) < .02


def test_the_noise_is_measured_and_widens_the_bars():
    quiet, loud = (fit_isoflop(synthetic_runs(noise=n, seed=3)) for n in (.001, .004))
    assert .0005 < quiet.noise < .002 and .002 < loud.noise < .008 and loud.params.error > 2 * quiet.params.error
    assert quiet.kept == 1.0


def test_the_formula_of_the_best_size_is_the_minimum():
    for law in WORLDS:
        N = np.geomspace(1e5, 1e12, 20001)
        assert N[law(N, 1e19 / 6 / N).argmin()] == pytest.approx(law.best_params(1e19), rel=2e-3) and sum(law.exponents) == pytest.approx(1)


def test_three_models_per_budget_have_no_error_bar():
    fit = fit_isoflop(parabolas(sizes=3))
    assert fit.params.exponent == pytest.approx(.5) and fit.params.error is None and fit.noise is None and '+-' not in str(fit.params)


def test_noise_deeper_than_the_valleys_is_said():
    rng = np.random.default_rng(0)
    points = [Point(C, N, C / 6 / N, 1 + 1e-6 * math.log(N / 1e8) ** 2 + .05 * e) for C in (1e18, 1e19) for N, e in zip(np.geomspace(2e7, 5e8, 5), (1, -1, .9, -1, 1))]
    try: fit = fit_isoflop(points, repeats=200)
    except UserError: return
    assert fit.kept < 1 or fit.params.error > .1


def test_the_same_seed_gives_the_same_bars_and_the_order_of_runs_does_not_matter():
    points = synthetic_runs()
    shuffled = [points[i] for i in np.random.default_rng(1).permutation(len(points))]
    assert fit_isoflop(points) == fit_isoflop(shuffled) and fit_isoflop(points, seed=1).params.error != fit_isoflop(points).params.error


def test_budgets_need_not_be_hit_exactly():
    points = [Point(p.flops * f, p.params, p.tokens * f, p.loss) for p, f in zip(parabolas(), np.resize([.97, 1.0, 1.04], 15))]
    assert [len(g) for g in by_budget(points)] == [5, 5, 5] and fit_isoflop(points).params.exponent == pytest.approx(.5, abs=.02)


def test_bottoms_beyond_the_models_tried_are_marked():
    assert not any(v.inside for v in fit_isoflop([p for p in parabolas(sizes=9) if p.params > 1.3 * 20 * p.flops**.5]).valleys)


def test_the_bootstrap_is_a_refit_of_each_table():
    """The matrix product gives what fitting each table by itself would."""
    valleys = [fit_valley(g) for g in by_budget(synthetic_runs(sizes=5, noise=.001))]
    rest = leftovers(valleys)
    sizes, tokens = bootstrap(valleys, rest, 3, seed=5)
    rng = np.random.default_rng(5)
    for i, v in enumerate(valleys):
        tables = v.at([p.params for p in v.points]) + rng.choice(rest, (3, 5))
        again = [fit_valley([Point(p.flops, p.params, p.tokens, x) for p, x in zip(v.points, losses)]) for losses in tables]
        assert sizes[:, i] == pytest.approx([a.params for a in again]) and tokens[:, i] == pytest.approx([a.tokens for a in again])


@pytest.mark.parametrize('points, hint', [(parabolas()[:2], 'a parabola needs three sizes'), (parabolas()[:5], 'needs two budgets or more'), ([], 'needs two budgets or more'),
                                          ([Point(p.flops, p.params, p.tokens, 2 - p.loss) for p in parabolas()], 'no valley')])
def test_too_little_is_refused_with_a_sentence(points, hint):
    with pytest.raises(UserError, match=hint): fit_isoflop(points)


def test_a_power_law_by_hand():
    law = fit_power([1e2, 1e4], [1e3, 1e9], np.array([[1e3, 1e9], [1e3, 1e5], [1e3, 1e7]]))
    assert law.exponent == pytest.approx(3) and law(1e3) == pytest.approx(1e6) and law.error == pytest.approx(np.std([3, 1, 2], ddof=1)) and law.low < 1.2 and law.high > 2.8


def test_figures_can_be_drawn():
    rows = [dict(depth=d, flops=10.0**d, val_bpb=1 / d, core=None if d == 3 else .1 * d) for d in (1, 2, 3)]
    assert len(draw_isoflop(fit_isoflop(parabolas())).axes) == 3
    assert len(draw_miniseries(rows).axes) == 2 and len(draw_miniseries([dict(r, core=None) for r in rows]).axes) == 1


# --- finished runs ----------------------------------------------------------------------------------------------------

def log(base, **row):
    (base/'report').mkdir(exist_ok=True)
    with open(base/'report'/'results.jsonl', 'a') as f: f.write(json.dumps(row) + '\n')


def trained(base, tag, depth, C, N, loss):
    """What `base_train` leaves of a run, as far as it is read."""
    run = base/'base_checkpoints'/tag
    run.mkdir(parents=True, exist_ok=True)
    (run/'config.json').write_text(json.dumps(dict(plan=dict(scaling_params=N), model_config=dict(n_embd=64 * depth))))
    log(base, stage='base_train', tag=tag, depth=depth, flops=C, tokens=C / 6 / N, val_bpb=loss, seconds=3600, tok_per_sec=1000)


def test_from_results_to_the_law(tmp_path, capsys):
    for i, p in enumerate(parabolas(noise=1e-4)): trained(tmp_path, f'iso_{p.flops:g}_d{10 + i % 5}', 10 + i % 5, p.flops, p.params, p.loss)
    trained(tmp_path, 'iso_1e+18_d10', 10, 1e18, parabolas()[0].params, parabolas()[0].loss)  # trained again: the newest counts
    trained(tmp_path, 'other', 12, 1e18, 1e8, 9.0)
    log(tmp_path, stage='base_eval', tag='other', source='base', core='full', core_complete=True, core_metric=.2)
    assert len(finished_runs('iso_', tmp_path)) == 15 and points_of(finished_runs('iso_', tmp_path))[0].params == parabolas()[0].params
    found = scaling_laws(ScalingLawsConfig(base=str(tmp_path), miniseries='other'))
    assert found['isoflop']['fit']['params']['exponent'] == pytest.approx(.5, abs=.02) and found['miniseries'][0]['core'] == .2
    assert json.loads((tmp_path/'report'/'scaling_laws.json').read_text())['isoflop']['runs'] == 15
    assert all('<svg' in (tmp_path/'report'/f'{name}.svg').read_text() for name in ('scaling_laws', 'miniseries'))
    assert 'best N ~ C^a, a = 0.5' in capsys.readouterr().out


@pytest.mark.parametrize('loss, hint', [(lambda N: N / 1e9, 'below the smallest model'), (lambda N: 1e9 / N, 'above the largest model'), (lambda N: -math.log(N / 2e8) ** 2, 'no valley')])
def test_a_budget_without_a_bottom_is_left_out_and_named(loss, hint):
    fit, remarks = fit_what_is_there(parabolas() + [Point(1e20, N, 1e20 / 6 / N, loss(N)) for N in (1e8, 2e8, 3e8)])
    assert fit == fit_isoflop(parabolas()) and len(remarks) == 1 and '1e+20' in remarks[0] and hint in remarks[0]
    assert fit_what_is_there(parabolas()[:6])[0] is None


def test_core_of_a_partial_evaluation_is_not_shown(tmp_path):
    trained(tmp_path, 'mini_d1', 1, 1e9, 1e4, 3.0)
    for row in (dict(core='mini', core_complete=True, core_metric=.9), dict(core='full', core_complete=False, core_metric=.8)): log(tmp_path, stage='base_eval', tag='mini_d1', source='base', **row)
    assert miniseries_rows('mini_', tmp_path)[0]['core'] is None


@pytest.mark.parametrize('cfg, hint', [(dict(), 'bash runs/scaling_laws.sh'), (dict(base='nowhere'), 'there is no directory nowhere'), (dict(repeats=1), '--repeats 100')])
def test_nothing_to_fit_is_a_sentence(cfg, hint):
    with pytest.raises(UserError, match=hint): scaling_laws(ScalingLawsConfig(**cfg))


def test_a_run_without_settings_is_named(tmp_path):
    log(tmp_path, stage='base_train', tag='iso_x', depth=1, flops=1e9, tokens=10, val_bpb=1.0)
    with pytest.raises(UserError, match='iso_x has no settings'): scaling_laws(ScalingLawsConfig(base=str(tmp_path)))
