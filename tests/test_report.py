"""The report card: a pure function of metrics, safe against hostile text, whole after a crash, and readable in a browser."""
import html.parser, json, math, os, re, shutil, subprocess, sys

import pytest

from nanochat.common import append_jsonl
from nanochat.report import (Plot, Series, build_report, generate_report, load_stages, log_result, merge_steps,
                             nice_ticks, render_html, render_markdown, svg, thin, total_seconds)

HOSTILE = '</pre><script>alert(1)</script><img src=x onerror=alert(2)>|`*\x00\x1b[31m\u2028\ud800 "\'&amp; ```\n# not a heading\n| a | b |'


class Tags(html.parser.HTMLParser):
    """Collects tags, attributes and text, and checks that everything opened is closed in order."""
    VOID = {'meta'}

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], [], []
        self.feed(page)
        assert not self.open, f'never closed: {self.open}'

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [k for k, _ in attrs]
        if tag not in self.VOID: self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [k for k, _ in attrs]

    def handle_endtag(self, tag): assert self.open.pop() == tag
    def handle_data(self, data): self.text.append(data)


def training_run(base, folder, tag, steps=100, **extra):
    """Metrics as the training loop writes them."""
    for step in range(steps):
        row = dict(step=step, tokens=step*4096, loss=2 + 6*math.exp(-step/20), lr=0.02, tok_per_sec=9000., seconds=2.0*step, **extra)
        if step % 25 == 0: row['val_bpb'] = 1.1 + math.exp(-step/30)
        append_jsonl(base/folder/tag/'metrics.jsonl', row)
    (base/folder/tag/'config.json').write_text(json.dumps(dict(depth=4)))
    (base/folder/tag/'environment.json').write_text(json.dumps(dict(cpu='Some CPU', cores=2, torch='2.13.0')))


def whole_pipeline(base, tag='d4'):
    """Results and metrics of every stage but mid_train."""
    log_result('tok_train', dict(vocab_size=4096, seconds=10.), base)
    training_run(base, 'base_checkpoints', tag)
    log_result('base_train', dict(tag=tag, depth=4, seconds=200.), base)
    log_result('base_eval', dict(tag=tag, val_bpb=1.125, ngram_bpb=1.4375, seconds=20., samples=[dict(prompt='def f', completion=HOSTILE)]), base)
    training_run(base, 'chatsft_checkpoints', tag)
    log_result('chat_sft', dict(tag=tag, seconds=100.), base)
    for step in range(30): append_jsonl(base/'chatrl_checkpoints'/tag/'metrics.jsonl', dict(step=step, reward=.4 + step/100, seconds=1.*step) | (dict(eval_reward=.5 + step/100) if step % 29 == 0 else {}))
    log_result('chat_rl', dict(model_tag=tag, seconds=30., reward_before=.25, reward_after=.8125), base)
    for source, acc in (('sft', .5), ('rl', .75)):
        log_result('chat_eval', dict(source=source, seconds=15., tasks={'arithmetic': dict(accuracy=acc, chance=0., n=64), 'pydoc': dict(accuracy=.5, chance=.25, n=64)}), base)


def test_everything_is_in_both_files(tmp_path):
    whole_pipeline(tmp_path)
    path = generate_report(tmp_path, price_per_hour=3.6)
    page, text = path.read_text(), (tmp_path/'report'/'report.md').read_text()
    for word in ('1.125', '1.438', '75.0%', '25.0%', '50.0%', 'Some CPU', 'mid_train has not run', '6m30s', '0.39', '0.8125', '75.0% ± 5.4'):
        assert word in page, word
        assert word.replace('_', r'\_') in text, word
    tags = Tags(page)
    assert tags.tags.count('svg') == 4 + 4 + 1 + 1   # loss, bpb, rate, speed twice; reward; scores
    assert sum('▁' in line or '█' in line for line in text.splitlines()) == 10   # the reward plot has two curves


def test_page_asks_for_nothing_outside(tmp_path):
    whole_pipeline(tmp_path)
    page = generate_report(tmp_path).read_text()
    tags = Tags(page)
    assert not {'script', 'link', 'img', 'iframe', 'object', 'image', 'use'} & set(tags.tags)
    assert not {'src', 'href', 'xlink:href', 'srcset', 'action'} & set(tags.attributes)
    style = re.search(r'<style>(.*?)</style>', page, re.S)[1]
    assert 'url(' not in style and '@import' not in style
    assert len(page) < 200_000


def test_same_files_same_bytes(tmp_path):
    whole_pipeline(tmp_path)
    both = lambda: [(tmp_path/'report'/f'report.{e}').read_bytes() for e in ('html', 'md') if generate_report(tmp_path)]
    assert both() == both()
    copy = tmp_path.with_name('copy')
    shutil.copytree(tmp_path, copy, ignore=shutil.ignore_patterns('report.*'))
    for seed in ('1', '2'):  # another process, another hash seed
        subprocess.run([sys.executable, '-c', f'from nanochat.report import generate_report; generate_report({str(copy)!r})'], check=True, env={**os.environ, 'PYTHONHASHSEED': seed})
        assert (copy/'report'/'report.html').read_bytes() == (tmp_path/'report'/'report.html').read_bytes()


def test_empty_base_says_what_is_missing(base_directory):
    path = generate_report()
    assert path == base_directory/'report'/'report.html'
    text = (base_directory/'report'/'report.md').read_text()
    for stage in ('tok_train', 'tok_eval', 'base_train', 'base_eval', 'mid_train', 'chat_sft', 'chat_rl', 'chat_eval'):
        assert stage.replace('_', r'\_') + ' has not run' in text
    Tags(path.read_text())


@pytest.mark.parametrize('text', [HOSTILE, '{{ 7*7 }}{% raw %}', '"><svg onload=alert(1)>', '\udcff' * 3, ''])
def test_hostile_text_stays_text(text):
    """Everywhere a string can come from outside: samples, keys, tags, task names, environment."""
    row = {text: text, 'samples': [text, dict(prompt=text, completion=text)], 'nested': {text: {text: text}}, 'tag': text, 'source': text, 'tasks': {text: {'accuracy': .5}}}
    from nanochat.report import Stage, STAGES
    stages = {s: Stage(s, [dict(row, time=text)], [dict(step=0, loss=1., seconds=0.)], {text: text}, {text: text}) for s in STAGES}
    report = build_report(stages, 1.)
    report.sections[0].plots.append(Plot(text, [Series(text, [0, 1], [1., 2.])], {text: 1.5}))
    page = render_html(report)
    page.encode('utf8')
    tags = Tags(page)
    assert not {'script', 'img', 'details onload'} & set(tags.tags) and not any(a.startswith('on') for a in tags.attributes)
    assert '49' not in re.findall(r'<td>([^<]*)</td>', page)
    markdown = render_markdown(report)
    markdown.encode('utf8')
    outside = '\n'.join(line for line in markdown.splitlines() if not line.startswith('    '))
    assert '<' not in outside and '# not a heading' not in [line.strip() for line in outside.splitlines()]


def test_torn_and_stray_lines(tmp_path):
    whole_pipeline(tmp_path)
    before = generate_report(tmp_path).read_text()
    for path in (tmp_path/'report'/'results.jsonl', tmp_path/'base_checkpoints'/'d4'/'metrics.jsonl'):
        with open(path, 'ab') as f: f.write(b'[1, 2]\nnull\n"step"\n{"stage": "unknown", "step": "x"}\n\xff\xfe garbage\n{"stage": "base_train", "step": 3, "lo')
    (tmp_path/'base_checkpoints'/'d4'/'config.json').write_text('{"depth": ')
    (tmp_path/'base_checkpoints'/'d4'/'environment.json').write_text('[]')
    after = generate_report(tmp_path).read_text()
    assert before.count('<svg') == after.count('<svg') and '1.125' in after


@pytest.mark.parametrize('cut', range(0, 400, 23))
def test_results_cut_anywhere(tmp_path, cut):
    """A kill may leave any prefix of the file."""
    log_result('tok_train', dict(vocab_size=4096), tmp_path)
    log_result('base_eval', dict(val_bpb=1.5, samples=['a\nb']), tmp_path)
    path = tmp_path/'report'/'results.jsonl'
    path.write_bytes(path.read_bytes()[:cut])
    log_result('chat_rl', dict(seconds=3.), tmp_path)
    assert load_stages(tmp_path)['chat_rl'].seconds == 3
    Tags(generate_report(tmp_path).read_text())


def test_resumed_run_draws_each_step_once():
    rows = [dict(step=s, loss=9.) for s in range(5)] + [dict(step=s, loss=1.) for s in range(3, 8)]
    merged = merge_steps(rows)
    assert [r['step'] for r in merged] == list(range(8)) and [r['loss'] for r in merged] == [9.]*3 + [1.]*5


def test_latest_result_and_its_run_count(tmp_path):
    for tag, loss in (('d4', 3.), ('d6', 2.)):
        append_jsonl(tmp_path/'base_checkpoints'/tag/'metrics.jsonl', dict(step=0, loss=loss))
        log_result('base_train', dict(tag=tag), tmp_path)
    os.utime(tmp_path/'base_checkpoints'/'d4'/'metrics.jsonl')  # newer on disk, but not the one the result names
    stage = load_stages(tmp_path)['base_train']
    assert stage.result['tag'] == 'd6' and stage.metrics[0]['loss'] == 2.


def test_a_run_without_metrics_borrows_none(tmp_path):
    append_jsonl(tmp_path/'base_checkpoints'/'old'/'metrics.jsonl', dict(step=0, loss=3., seconds=500.))
    log_result('base_train', dict(tag='new'), tmp_path)
    stage = load_stages(tmp_path)['base_train']
    assert stage.metrics == [] and not stage.seconds


def test_score_of_another_run_says_so(tmp_path):
    """Evaluations of an older run must not pass for the new one's."""
    log_result('base_train', dict(tag='d6'), tmp_path)
    for source, tag in (('sft', 'd4'), ('rl', 'd6')): log_result('chat_eval', dict(source=source, model_tag=tag, tasks=dict(a=.5)), tmp_path)
    assert build_report(load_stages(tmp_path)).sections[0].tables[0].header == ['task', 'chance', 'after sft (d4)', 'after rl', 'questions']


def test_unfinished_stage_shows_its_curve(tmp_path):
    training_run(tmp_path, 'base_checkpoints', 'd4', steps=10)
    report = build_report(load_stages(tmp_path))
    section = next(s for s in report.sections if s.title == 'Pretraining')
    assert section.plots and 'has not finished' in section.notes[0]


def test_non_finite_and_odd_values(tmp_path):
    run = tmp_path/'base_checkpoints'/'d4'
    for step, loss in enumerate([8., float('nan'), None, 'x', True, [1], float('inf'), 7.]): append_jsonl(run/'metrics.jsonl', dict(step=step, loss=loss))
    log_result('base_eval', dict(val_bpb=None, ngram_bpb='?', samples=None), tmp_path)
    log_result('chat_eval', dict(source=None, tasks=None, seconds='?'), tmp_path)
    log_result('chat_eval', dict(source='sft', tasks=[dict(task='a', accuracy=None), 3]), tmp_path)
    stages = load_stages(tmp_path)
    curve = build_report(stages).sections[3].plots[0].curves[0]
    assert list(curve.y) == [8., 7.]
    Tags(generate_report(tmp_path).read_text())


def test_core_has_its_table_and_figure(tmp_path):
    """One row per task beside GPT-2; 'CORE' only for all tasks; an unknown GPU has no MFU of zero."""
    whole_pipeline(tmp_path)
    core = dict(core='full', core_complete=True, core_metric=.1234, core_accuracy=dict(copa=.61), core_centered=dict(copa=.22), core_reference={'gpt2': dict(copa=.24, CORE=.114), 'gpt2-xl': dict(CORE=.257)})
    log_result('base_eval', dict(tag='d4', val_bpb=1.1, **core), tmp_path)
    log_result('base_train', dict(tag='d4', mfu=None), tmp_path)
    generate_report(tmp_path)
    text = (tmp_path/'report'/'report.md').read_text()
    assert '| CORE | 0.1234 | gpt2 0.114, gpt2-xl 0.257 |' in text and '| copa | 61.0% | 0.220 | 0.240 | – |' in text and '| CORE |  | 0.1234 | 0.114 | 0.257 |' in text
    assert '| mfu | n/a |' in text and 'core accuracy' not in text
    log_result('base_eval', dict(tag='d4', val_bpb=1.1, **core | dict(core_complete=False)), tmp_path)
    generate_report(tmp_path)
    assert '| CORE (some tasks) | 0.1234 |' in (tmp_path/'report'/'report.md').read_text()


def test_time_counts_every_evaluation(tmp_path):
    whole_pipeline(tmp_path)
    assert total_seconds(load_stages(tmp_path)) == 10 + 200 + 20 + 100 + 30 + 2*15


def test_svg_stays_inside_its_box():
    for y in ([1.], [0., 0.], [-5., 5.], [1e-9, 2e-9], [1e12, 3e12], list(range(5000))):
        drawing = svg(Plot('p', [Series('s', list(range(len(y))), y)], {'r': y[0]}))
        points = [tuple(map(float, p.split(','))) for p in re.search(r'points="([^"]*)"', drawing)[1].split()]
        assert points and all(0 <= a <= 480 and 0 <= b <= 250 for a, b in points)
        assert len(drawing) < 12_000


@pytest.mark.parametrize('lo, hi', [(0, 1), (2.3, 8.31), (-4, 9), (1e-7, 3e-7), (0, 1e9), (5, 5.0001)])
def test_ticks_are_inside_and_few(lo, hi):
    ticks = nice_ticks(lo, hi)
    assert 2 <= len(ticks) <= 8 and all(lo - 1e-6*abs(hi) <= t <= hi*(1 + 1e-6) for t in ticks)


def test_thin_keeps_the_level():
    s = thin(Series('s', list(range(100_000)), [float(i % 2) for i in range(100_000)]))
    assert len(s.x) == 240 and all(abs(v - .5) < .01 for v in s.y[:-1])


def test_atomic(tmp_path, monkeypatch):
    """A crash while writing leaves the old report whole and no temporary file."""
    import nanochat.common as common
    old = generate_report(tmp_path).read_bytes()
    whole_pipeline(tmp_path)
    monkeypatch.setattr(common.os, 'replace', lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt): generate_report(tmp_path)
    monkeypatch.undo()
    assert (tmp_path/'report'/'report.html').read_bytes() == old
    assert not [p for p in (tmp_path/'report').iterdir() if p.suffix == '.tmp']


def test_script(tmp_path):
    """`python -m nanochat.scripts.report` writes both files and says where."""
    whole_pipeline(tmp_path)
    out = subprocess.run([sys.executable, '-m', 'nanochat.scripts.report', '--price-per-hour', '3.6'], capture_output=True, text=True, env={**os.environ, 'NANOCHAT_BASE_DIR': str(tmp_path)})
    assert out.returncode == 0, out.stderr
    assert 'report.html' in out.stdout and '0.39' in (tmp_path/'report'/'report.md').read_text()


def test_in_a_real_browser(tmp_path):
    """Chromium: no request beside the file itself, nothing wider than a phone, no error in the console."""
    sync_api = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
    chromium = next((p for p in map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome')) if p), None)
    if not chromium: pytest.skip('no Chromium on this machine')
    whole_pipeline(tmp_path)
    path, requests, console = generate_report(tmp_path), [], []
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=['--no-sandbox'])
        page = browser.new_page(viewport=dict(width=375, height=700))
        page.on('request', lambda r: requests.append(r.url))
        page.on('console', lambda m: console.append(m.text))
        page.on('pageerror', lambda e: console.append(str(e)))
        page.goto(path.as_uri())
        width = page.evaluate('document.documentElement.scrollWidth')
        boxes = page.evaluate("[...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().left).filter(x => x < 0).length")
        alerts = page.evaluate("document.querySelectorAll('script, img').length")
        browser.close()
    assert requests == [path.as_uri()] and not console and width <= 375 and boxes == 0 and alerts == 0


def test_of_a_real_run(base_directory, tmp_path, capsys):
    """Tokenizer, pretraining and evaluation at toy size, then the report of it: the keys the stages write are the keys it reads."""
    from nanochat.scripts.base_eval import BaseEvalConfig, base_eval
    from nanochat.scripts.base_train import BaseTrainConfig, base_train
    from nanochat.scripts.report import ReportConfig, report
    from nanochat.scripts.tok_train import TokTrainConfig, tok_train
    text = tmp_path/'text'
    text.mkdir()
    for n in range(30): (text/f'{n}.txt').write_text(' '.join(f'line {i*n} of {n} says that {i} and {n} make {i + n}.' for i in range(40)))
    tok_train(TokTrainConfig(corpus=str(text), vocab_size=300))
    trained = base_train(BaseTrainConfig(corpus=str(text), depth=1, head_dim=16, aspect_ratio=32, sequence_len=64, num_iterations=12, device_batch_size=2, total_batch_size=128,
                                         eval_tokens=512, device='cpu'))
    evaluated = base_eval(BaseEvalConfig(corpus=str(text), eval_tokens=512, ngram_tokens=5000, device='cpu'))
    path = report(ReportConfig(price_per_hour=1.))
    page, stages = path.read_text(), load_stages(base_directory)
    Tags(page)
    assert page.count('<figure>') == 4 and f'{evaluated["val_bpb"]:.3f}' in page and f'5-gram: {evaluated["ngram_bpb"]:.3f}' in page
    assert len(stages['base_train'].metrics) == 12 and stages['base_train'].seconds == pytest.approx(trained['seconds'], abs=.01)
    assert stages['base_train'].environment['torch'] and 'nanochat · d1' in page and 'Missing: chat_sft has not run' in page
    assert str(tmp_path) not in page
