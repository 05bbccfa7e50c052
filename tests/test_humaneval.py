"""HumanEval: every canonical solution passes in the sandbox; what is broken, silent, or ends early does not."""
import ast
import itertools
import os
import re
from pathlib import Path

import pytest

from nanochat.common import UserError
from nanochat.execution import execute_many, sandbox_status
from nanochat.tasks.humaneval import FIELDS, HumanEval, defines, extract_code, pass_at_k, program, read_rows

SHARED = Path(os.environ.get('NANOCHAT_SHARED_DATA', Path(__file__).parents[2]/'shared'/'data'))
HUB = SHARED/'hub'/'openai'/'openai_humaneval'/'openai_humaneval'/'test'


@pytest.fixture(scope='module')
def sandbox():
    status = sandbox_status()
    if not status.strong: pytest.skip(f'generated code cannot be isolated here: {status}')


@pytest.fixture(scope='module')
def task():
    if not HUB.exists(): pytest.skip('the HumanEval data is not here; set NANOCHAT_SHARED_DATA')
    return HumanEval(HUB, timeout=20)


ROW = dict(task_id='T/0', entry_point='twice', prompt='import math\n\ndef helper(x):\n    return x + x\n\n\ndef twice(x: int) -> int:\n    """ Twice x.\n    >>> twice(2)\n    4\n    """\n', canonical_solution='    return helper(x)\n',
           test='def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(0) == 0\n')


@pytest.fixture
def own(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq
    pq.write_table(pa.Table.from_pylist([ROW, dict(ROW, task_id='T/1')]), tmp_path/'0000.parquet')
    return HumanEval(tmp_path)


GOOD = ['    return helper(x)\n', '\n    return 2 * x', 'def twice(x): return 2 * x', 'def twice(x):\n    return helper(x)', 'def twice(x):\n    return int(math.ldexp(x, 1))', '```python\ndef twice(x):\n    return 2 * x\n```', '```\ndef twice(x):\n    return 2 * x\n```',
        'Here:\n\n```py\ndef twice (x):\n    return 2 * x\n```\nIt doubles.', '```python\ndef twice(x):\n    return 2 * x', '```python\n    return 2 * x\n```', 'First\n```bash\npip install x\n```\nthen\n```python\ndef twice(x):\n    return 2 * x\n```',
        '```python\nprint("example")\n```\n```python\ndef twice(x):\n    return 2 * x\n```', '```Python\r\ndef twice(x):\r\n    return 2 * x\r\n```', 'def twice(x):\n    return 2 * x\n\nif __name__ == "__main__":\n    print(twice(3))', 'def twice(x):\n    return 2 * x<|assistant_end|>garbage(',
        'class Doubler:\n    def go(self, x): return x + x\ndef twice(x):\n    return Doubler().go(x)', 'from functools import cache\n@cache\ndef twice(x):\n    return 2 * x', 'def twice(x):\n    """```not a fence```"""\n    return 2 * x']
BAD = ['', 'I do not know.', '    pass\n', 'def twice(x): return 4', 'def twice(x): pass', 'def other(x): return 2 * x', 'def twice(x):\n    return 2 * x\nimport sys; sys.exit(0)', 'import os\ndef twice(x): os._exit(0)', 'def twice(x): raise SystemExit',
       'def twice(x):\n    while True: pass', 'def twice(x): return 4\ndef check(f): pass', '```python\n```', '```python\ndef twice(x:\n```', 'def twice(x): return 2 * x + 1', '\0', '\ud800', None, 7, 'x' * 3_000_000, 'def twice(x): return [0] * 10**12', 'if 1:\n    import os\n    os._exit(0)']


def test_answers_in_every_form(sandbox, own):
    own.settings['timeout'] = 1.0
    marks = own.evaluate_many([own[0]] * len(GOOD + BAD), GOOD + BAD)
    assert [a for a, m in zip(GOOD, marks) if not m] == [] and [a for a, m in zip(BAD, marks[len(GOOD):]) if m] == []
    assert own.evaluate(own[1], GOOD[0]) == 1 and own.reward(own[1], BAD[3]) == 0.0


def test_extraction_prefers_the_function():
    two = '```python\na = 1\n```\n```python\ndef f(x): pass\n```'
    assert extract_code(two) == 'a = 1' and extract_code(two, 'f') == 'def f(x): pass' and extract_code(two, 'g') == 'a = 1'
    assert defines('x\ndef f (a): pass', 'f') and not defines('def ff(a): pass', 'f') and not defines('# def f(a)', 'f')


def test_the_program_keeps_helpers_and_real_tests():
    text = program(ROW, 'def twice(x): return 0')
    assert text.count('def twice') == 1 and 'def helper' in text and text.index('def check') > text.index('def twice') and text.endswith('check(twice)\n')
    assert program(ROW, '    return 0').count('def twice') == 1
    compile(text, 'x', 'exec')


def test_reading_says_what_is_wrong(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq
    with pytest.raises(UserError, match='does not hold HumanEval'): read_rows(tmp_path)
    (tmp_path/'x.parquet').write_text('not parquet')
    with pytest.raises(UserError, match='cannot read'): read_rows(tmp_path)
    pq.write_table(pa.table({'prompt': ['x']}), tmp_path/'x.parquet')
    with pytest.raises(UserError, match='does not hold HumanEval'): read_rows(tmp_path/'x.parquet')


def test_pass_at_k():
    for n in range(1, 7):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))
    for wrong in ((3, 4, 1), (3, 1, 4), (3, 1, 0), (3, -1, 1)):
        with pytest.raises(UserError): pass_at_k(*wrong)


def test_shape(task):
    assert len(task) == 164 and task.eval_type == 'generative' and len(HumanEval(HUB, stop=3)) == 3
    for c in task:
        assert [m['role'] for m in c['messages']] == ['user', 'assistant'] and set(FIELDS) < set(c)
        assert extract_code(c['messages'][-1]['content'], c['entry_point']).rstrip() == (c['prompt'] + c['canonical_solution']).strip('\n').rstrip()


def test_canonical_solutions_pass(sandbox, task):
    """All 164, as fenced answers; as bare bodies they run below, before the broken ones."""
    conversations = list(task)
    results = task.results(conversations, [c['messages'][-1]['content'] for c in conversations])
    assert [(c['task_id'], r.error) for c, r in zip(conversations, results) if not r.success] == []


# ---- mutations: each solution broken in several ways; only programs that compile count

def rewrite(c, change):
    """The whole function with its body changed by `change(list of statements)`."""
    tree = ast.parse(c['prompt'] + c['canonical_solution'])
    function = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == c['entry_point'])
    function.body = change(function.body)
    return ast.unparse(ast.fix_missing_locations(tree))


class Returns(ast.NodeTransformer):
    """Replaces what the function returns, not what functions inside it return."""
    def __init__(self, template): self.template = template
    def visit_FunctionDef(self, node): return node
    visit_Lambda = visit_FunctionDef
    def visit_Return(self, node):
        value = ast.parse(self.template, mode='eval').body
        for n in ast.walk(value):
            for field, child in ast.iter_fields(n):
                if isinstance(child, list) and any(isinstance(x, ast.Name) and x.id == 'VALUE' for x in child): setattr(n, field, [node.value or ast.Constant(None) if isinstance(x, ast.Name) and x.id == 'VALUE' else x for x in child])
        return ast.Return(value)


OFF = '''
def off_by_one(x):
    if isinstance(x, bool): return not x
    if isinstance(x, (int, float)): return x + 1
    if isinstance(x, str): return x + 'x'
    if isinstance(x, (list, tuple)): return x + type(x)([0])
    return [x]
'''
parsed = lambda text: lambda body: ast.parse(text).body
MUTATIONS = {
    'return None': lambda c: rewrite(c, lambda body: [Returns('None').visit(s) for s in body]),
    'off by one': lambda c: OFF + rewrite(c, lambda body: [Returns('off_by_one(VALUE)').visit(s) for s in body]),
    'empty body': lambda c: rewrite(c, parsed('pass')),
    'raise': lambda c: rewrite(c, parsed('raise ValueError')),
    'returns its argument': lambda c: rewrite(c, lambda body: ast.parse('return locals().popitem()[1] if locals() else None').body),
    'exit inside': lambda c: 'import sys\n' + rewrite(c, parsed('sys.exit(0)')),
    'hard exit inside': lambda c: 'import os\n' + rewrite(c, parsed('os._exit(0)')),
    'exit before the tests': lambda c: rewrite(c, lambda body: body) + '\nimport sys\nsys.exit(0)\n',
    'hard exit before the tests': lambda c: rewrite(c, lambda body: body) + '\nimport os\nos._exit(0)\n',
}
HARD = [name for name in MUTATIONS if name.startswith('hard')]    # these end the process, so they cannot share one
SOFT = [name for name in MUTATIONS if name not in HARD]
CONTROLS = {'bare body': lambda c: c['canonical_solution'], 'rewritten without a change': lambda c: rewrite(c, lambda body: body)}
EACH = '''
for name, text in %r.items():
    try: exec(compile(text, name, 'exec'), {'__name__': '__main__'})
    except BaseException: pass
    else: print('passed:', name, file=out)
'''


def test_mutated_solutions_fail(sandbox, task):
    """Every solution broken in every way that shares a process with others, each as the program that would be marked. The controls around them pass, so the failures are not those of the rewriting."""
    conversations, (first, last) = list(task), CONTROLS
    kinds = {first: CONTROLS[first]} | {name: MUTATIONS[name] for name in SOFT} | {last: CONTROLS[last]}
    batches = [{name: program(c, extract_code(change(c), c['entry_point'])) for name, change in kinds.items()} for c in conversations]
    results = execute_many(['import sys\nout = sys.stderr\n' + EACH % batch for batch in batches], timeout=60)
    assert {c['task_id']: said for c, r in zip(conversations, results) if (said := re.findall('passed: (.*)', r.stderr)) != [first, last]} == {}
    assert all(r.success for r in results)


def test_verdicts_on_mutated_solutions(sandbox, task):
    """A process of its own for every solution with a hard exit in one of its two places, and for every third with each other kind in turn: the mark itself is 0."""
    conversations = list(task)
    picks = [(c, HARD[i % 2]) for i, c in enumerate(conversations)] + [(c, SOFT[i % len(SOFT)]) for i, c in enumerate(conversations[::3])]
    marks = task.evaluate_many([c for c, _ in picks], [MUTATIONS[name](c) for c, name in picks])
    assert [(c['task_id'], name) for (c, name), m in zip(picks, marks) if m] == []
