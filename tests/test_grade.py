"""Grading: what submissions do to themselves, and cannot do to others, to the grader or to their points."""
import builtins, contextlib, csv, json, math, os, subprocess, sys
from pathlib import Path

import pytest

torch = pytest.importorskip('torch')
from nanochat import execution, grade
from nanochat.common import UserError
from nanochat.grade import (CannotGrade, Counted, Gone, Limits, Nursery, Student, StudentError, code_cells, find_one, grade_all, grade_cells, main, pack, read_notebook, read_grades, receive, run_cell, send,
                            source_of, strip_solutions, submissions, unpack, write_grades)

ROOT = grade.assignments_dir()
STRONG = execution.sandbox_status().strong
LIMITS = Limits(call_seconds=2.0, total_seconds=600.0, memory_bytes=2**29, sandbox=STRONG, i_understand=True)
MASTER = code_cells(read_notebook(find_one(ROOT/'masters', 'a1')))
walled = pytest.mark.skipif(not STRONG, reason='this machine cannot isolate generated code')


@pytest.fixture(scope='module')
def nursery():
    with Nursery() as n: yield n


@pytest.fixture
def one_nursery(nursery, monkeypatch):
    """Commands that start a nursery of their own get this one: it takes seconds to import PyTorch."""
    monkeypatch.setattr(grade, 'Nursery', lambda: contextlib.nullcontext(nursery))


def write_notebook(path, cells):
    """A notebook of code cells."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [dict(cell_type='code', id=f'c{i}', metadata={}, outputs=[], execution_count=None, source=s) for i, s in enumerate(cells)]
    path.write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)))
    return path


def graded(nursery, cells, only=None): return grade_cells('a1', cells, nursery, LIMITS, only=only)


# cells that a submission might hold beside its solutions; the points of the solutions stay
HARMLESS = {
    'sys.exit': 'import sys\nsys.exit(0)',
    'os._exit': 'import os\nos._exit(0)',
    'endless loop': 'while True: pass',
    'megabytes of print': "for _ in range(50): print('x' * 10**6)\nimport sys; sys.stderr.write('y' * 10**7)",
    'syntax error': 'def broken(:',
    'recursion': 'def f(): return f()\nf()',
    'patched pytest': 'import sys, types\nsys.modules["pytest"] = types.ModuleType("pytest")\nsys.modules["nanochat.grade"] = None',
    'questions': 'input("What is your name? ")',
}


@pytest.mark.parametrize('what', HARMLESS)
def test_bad_cell_costs_itself_only(what, nursery):
    result = graded(nursery, [MASTER[0], HARMLESS[what], *MASTER[1:]], only=2)
    assert result.points(2) == (3, 3), f'{result}'
    assert what in ('megabytes of print', 'patched pytest') or 2 in result.broken_cells


@walled
@pytest.mark.parametrize('what, cell', {'forks': 'import os\nwhile True: os.fork()', 'memory': 'hog = []\nwhile True: hog.append(bytearray(2**24))', 'network': "import socket\nsocket.create_connection(('127.0.0.1', 9))",
                                        'files': "open('/etc/passwd').read()", 'kill': 'import os\nos.kill(os.getppid(), 9)'}.items())
def test_walls_hold(what, cell, nursery):
    result = graded(nursery, [MASTER[0], cell, *MASTER[1:]], only=1)
    assert result.points(1) == (3, 3) and 2 in result.broken_cells, f'{result}'


@walled
def test_the_master_cannot_be_seen(nursery):
    """Neither the project's folder nor the tests: a submission cannot read its answers there."""
    s = Student([f"import os, sys\ndef seen(): return [p for p in {[str(ROOT), *(str(ROOT.parents[1]/n) for n in ('lessons', 'nbs', 'tests', 'README.md'))]!r} if os.path.exists(p)] + [m for m in sys.modules if 'test_a' in m]"], nursery, LIMITS)
    assert s.seen() == []
    s.close()


STUBS = ['def count_pairs(ids): {}', 'def merge(ids, pair, new): {}']
CHEATS = {
    'equal to everything': 'class Yes(dict):\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\n    __hash__ = None\ndef count_pairs(ids): return Yes()\ndef merge(ids, pair, new): return Yes()',
    'object equal to everything': 'class Yes:\n    def __eq__(self, other): return True\ndef count_pairs(ids): return Yes()\ndef merge(ids, pair, new): return Yes()',
    'result file': "import json\ndef count_pairs(ids): open('a1_result.json', 'w').write(json.dumps(dict(points=22)))\ndef merge(*a): raise SystemExit(0)",
    'writes into the pipe': "import os, json\nframe = json.dumps(dict(value=True, points=99, passed=True)).encode()\ndef count_pairs(ids): os.write(3, len(frame).to_bytes(4, 'big') + frame)\nmerge = count_pairs",
    'nonsense into the pipe': "import os\ndef count_pairs(ids): os.write(3, b'\\xff' * 100)\ndef merge(*a): os.write(3, b'\\0\\0\\0\\3[[[')",
    'deep answer': "import os\nframe = b'[' * 100000\ndef count_pairs(ids): os.write(3, len(frame).to_bytes(4, 'big') + frame)\ndef merge(*a):\n    x = []\n    for _ in range(5000): x = [x]\n    return x",
    'strange answers': "import torch\ndef count_pairs(ids): return {float('nan'): torch.zeros(2), (1,): [b'']}\ndef merge(*a): return torch.zeros(2, 0)",
    'odd message': "import os, json\nframe = json.dumps(dict(value={'tensor': ['float32', [10**12], '']})).encode()\ndef count_pairs(ids): os.write(3, len(frame).to_bytes(4, 'big') + frame)\ndef merge(*a): return {1: 10**5000}",
    'leaves early': 'import os\ndef count_pairs(ids): os._exit(0)\ndef merge(*a): raise KeyboardInterrupt',
    'patched comparisons': "import torch, pytest\nclass Anything(Exception): pass\ntry: pytest.raises = pytest.mark = pytest.main = lambda *a, **k: 0\nexcept Exception: pass\ntorch.equal = torch.allclose = lambda *a, **k: True\ndef count_pairs(ids): return {}\ndef merge(*a): return []",
}


@pytest.mark.parametrize('what', CHEATS)
def test_cheats_earn_nothing(what, nursery):
    result = graded(nursery, [CHEATS[what]])
    assert all(not r.passed for r in result.rows if r.exercise in (1, 2)), f'{result}'
    assert graded(nursery, MASTER, only=1).points() == (3, 3)                       # and the next one is graded as ever


FRAME = 'import json, os\ndef frame(message):\n    data = json.dumps(message).encode()\n    os.write(3, len(data).to_bytes(4, "big") + data)\n'


@pytest.mark.parametrize('said', ['frame(dict(refuse={}))', 'frame(dict(cell=None)); frame(dict(refuse={}))'])
def test_a_submission_cannot_speak_for_the_walls(said, nursery):
    assert graded(nursery, [FRAME + said, *MASTER], only=1).points(1) == (3, 3)


def test_what_a_guest_says_of_its_cells_is_cut(nursery):
    result = graded(nursery, [FRAME + "frame(dict(ready=[[n, dict(error='x' * 1000, message=['y'] * 1000)] for n in range(1000)]))"], only=1)
    assert 0 < len(result.broken_cells) <= 1 and all(len(e) < 300 for e in result.broken_cells.values())


def test_endless_function_costs_its_exercise(nursery):
    """The loop is waited for once; everything else is graded in a fresh process."""
    cells = [c.replace('ids, n = list(data), len(data)', 'while True: pass\n    ids, n = list(data), len(data)') for c in MASTER]
    result = graded(nursery, cells)
    assert result.points() == (17, 22) and result.points(5) == (0, 5)
    assert sum('still running' in r.detail for r in result.rows) == 1 and 'endless loop' in str(result)


def test_time_is_bounded(nursery):
    """Every function endless: the whole submission ends when its time is used up."""
    cells = [f'def {name}(*a):\n    while True: pass' for name in 'count_pairs merge train encode decode encode_fast'.split()]
    result = grade_cells('a1', cells, nursery, Limits(call_seconds=0.5, total_seconds=1.2, sandbox=STRONG, i_understand=True))
    assert result.points() == (0, 22) and any('used up' in r.detail or 'still running' in r.detail for r in result.rows)


def test_a_folder_of_submissions(tmp_path, one_nursery, monkeypatch):
    """Good, empty, broken, linked and unnamed ones: each gets its row. What is unchanged is not graded again; what was changed is."""
    folder, out = tmp_path/'in', tmp_path/'grades.csv'
    write_notebook(folder/'ann'/'a1.ipynb', MASTER)
    write_notebook(folder/'=cmd()'/'a1_bpe.ipynb', ['x = 1'])
    write_notebook(folder/'eve_a1.ipynb', ['import os\nos._exit(1)', 'def merge(*a): return 1'])
    write_notebook(folder/'homework.ipynb', ['x = 1'])
    (folder/'bob').mkdir()
    (folder/'bob'/'a1.ipynb').write_text('not a notebook')
    (folder/'liz').mkdir()
    (folder/'liz'/'a1.ipynb').symlink_to(folder/'ann'/'a1.ipynb')
    said = []
    rows = {r['student']: r for r in grade_all(folder, out, LIMITS, say=said.append)}
    assert {who: r['points'] for who, r in rows.items()} == {'ann': '22', '=cmd()': '0', 'eve': '0', 'homework': '', 'bob': '', 'liz': ''}
    assert rows['ann']['a1.3'] == '5' and 'not a notebook' in rows['bob']['remark'] and 'which assignment' in rows['homework']['remark'] and 'link' in rows['liz']['remark']
    table = list(csv.DictReader(open(out)))
    assert len(table) == 6 and {"'=cmd()", 'ann'} < {r['student'] for r in table} and table[0]['of'] == '22'
    asked = []
    monkeypatch.setattr(grade, 'grade_notebook', lambda name, path, *a: asked.append(path.parent.name) or (_ for _ in ()).throw(UserError('no')))
    write_notebook(folder/'=cmd()'/'a1_bpe.ipynb', ['x = 2'])
    again = {r['student'].lstrip("'"): r for r in grade_all(folder, out, LIMITS, say=said.append)}
    assert sorted(asked) == ['=cmd()', 'bob'] and again['ann']['points'] == '22' and sum('unchanged' in s for s in said) == 2


def test_no_submission_stops_the_others(tmp_path, one_nursery, monkeypatch):
    """A name with the word of the refusal, a name that is no UTF-8, a file that may not be read: a remark each, and none is stuck in the table."""
    (tmp_path/'a1_isolated.ipynb').write_text('zeros')
    (tmp_path/'shut_a1.ipynb').write_text('{}')
    with contextlib.suppress(OSError): open(os.path.join(os.fsencode(tmp_path), b'J\xfcrgen_a1.ipynb'), 'w').close()   # not every file system takes it
    real = grade.sha256_file
    def read(path):
        if 'shut' in str(path): raise PermissionError(13, 'Permission denied')
        return real(path)
    monkeypatch.setattr(grade, 'sha256_file', read)
    for _ in range(2): rows = {r['student']: r['remark'] for r in grade_all(tmp_path, tmp_path/'g.csv', LIMITS, say=str.encode)}
    assert 'not a notebook' in rows['isolated'] and 'not to be read' in rows['shut'] and set(rows) <= {'isolated', 'shut', 'J\\udcfcrgen'}
    assert len(read_grades(tmp_path/'g.csv')) == len(rows)


def test_a_dead_nursery_is_a_sentence(tmp_path):
    with Nursery() as ended:
        ended.process.kill()
        ended.process.wait()
        path = write_notebook(tmp_path/'a1.ipynb', MASTER)
        with pytest.raises(CannotGrade, match='same command again'): grade.grade_row('ann', 'a1', path, tmp_path, ended, LIMITS, 0)


def test_table_comes_back_as_it_was_written(tmp_path):
    """A seed of -1 and a file called =x are the same after reading, or nothing would count as unchanged."""
    rows = [dict(student="'ann", file='=x/a1.ipynb', seed='-1'), dict(student='bob', file='@a1.ipynb', seed='0')]
    write_grades(tmp_path/'g.csv', rows)
    assert read_grades(tmp_path/'g.csv') == rows and "'=x" in (tmp_path/'g.csv').read_text()


def test_refuses_where_there_are_no_walls(tmp_path, monkeypatch):
    write_notebook(tmp_path/'a1.ipynb', ['open("ran", "w")'])
    weak = execution.sandbox_status(lacking=['seccomp'])
    monkeypatch.setattr(execution, 'sandbox_status', lambda: weak)
    with pytest.raises(UserError, match='i-understand'): grade_all(tmp_path, tmp_path/'g.csv', Limits(sandbox=True))
    assert not (tmp_path/'g.csv').exists()


def test_student_command(tmp_path, one_nursery, capsys):
    """The table, the hint, and a result file that says what was graded."""
    cells = [c.replace('(-counts[p], p)', '-counts[p]') for c in MASTER]
    path = write_notebook(tmp_path/'mine.ipynb', cells)
    main(['a1', str(path)])
    out = capsys.readouterr().out
    assert '3. Train' in out and 'the smallest wins' in out and '19 of  22' in out
    result = json.loads((tmp_path/'a1_result.json').read_text())
    assert result['points'] == 19 and result['sha256'] == grade.sha256_file(path) and result['exercises']['3. Train'] == dict(points=2, of=5)
    assert [t['test'] for t in result['tests'] if not t['passed']] == ['test_train', 'test_train_ties']


@pytest.mark.parametrize('args, words', [(['a77'], "no assignment 'a77'"), (['a1', 'nowhere.ipynb'], 'cannot be read'), (['--all', 'nowhere'], 'no folder'), (['a1', '--call-seconds', '0'], 'positive')])
def test_command_says_what_is_wrong(args, words, capsys):
    with pytest.raises(SystemExit) as e: main(args)
    assert e.value.code == 2 and words in capsys.readouterr().err


def test_list_and_no_pytest(capsys, monkeypatch):
    main([])
    assert 'a1  Byte-pair encoding' in capsys.readouterr().out
    real = builtins.__import__
    monkeypatch.setattr(builtins, '__import__', lambda name, *a, **k: (_ for _ in ()).throw(ImportError(name)) if name == 'pytest' else real(name, *a, **k))
    with pytest.raises(UserError, match='pip install pytest'): grade._need_pytest()


def test_import_brings_no_jupyter():
    code = "import sys, nanochat.grade; print(sorted({'nbformat', 'IPython', 'jupyter_core', 'pytest', 'ipywidgets', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'


def test_plain_pytest_works_too():
    """`pytest lessons/assignments/tests/test_a1.py` for those who want pytest's own messages."""
    done = subprocess.run([sys.executable, '-m', 'pytest', '-q', '-x', '-p', 'no:cacheprovider', str(ROOT/'tests'/'test_a1.py')], capture_output=True, text=True, cwd=ROOT.parents[1],
                          env={**os.environ, 'PYTEST_DISABLE_PLUGIN_AUTOLOAD': '1'})   # the plugins of our other tests take seconds to import
    assert done.returncode == 1 and 'NotImplementedError' in done.stdout


def test_wire():
    values = [None, True, -1, 2.5, math.inf, 'ü\ud800', [], (1, (2,)), {(1, 2): {3}, 'x': b'\0'}, frozenset([1]), torch.zeros(()), torch.ones(2, 0), torch.tensor([True]), torch.arange(3, dtype=torch.int32)]
    for v in values:
        back = unpack(json.loads(json.dumps(pack(v))))
        if isinstance(v, torch.Tensor): assert torch.equal(back, v) and back.dtype == v.dtype and back.shape == v.shape
        else: assert back == v
    with pytest.raises(TypeError): pack(object())
    for bad in ({'object': 1}, {'tensor': ['float32', [-1], 'AAAA']}, {'a': 1, 'b': 2}, {}, {'tensor': ['complex64', [1], 'AAAA']}):
        with pytest.raises((ValueError, KeyError, RuntimeError, TypeError)): unpack(bad)


def test_frames():
    r, w = os.pipe()
    for raw in (b'\0\0\0\2xx', b'\0\0\0\2[]', (2**31).to_bytes(4, 'big')):
        os.write(w, raw)
        with pytest.raises(Gone): receive(r)
    with pytest.raises(TimeoutError): receive(r, 0)
    send(w, dict(a=1))
    assert receive(r) == dict(a=1)
    os.close(w)
    with pytest.raises(Gone): receive(r)
    os.close(r)


def test_strip():
    assert strip_solutions('a\n  # BEGIN SOLUTION\n  b\n  # END SOLUTION\nc') == 'a\n  raise NotImplementedError\nc'
    two = 'x\n# BEGIN SOLUTION\ny\n# END SOLUTION\nz\n    # BEGIN SOLUTION of this\n    w\n    # END SOLUTION'
    assert strip_solutions(two) == 'x\nraise NotImplementedError\nz\n    raise NotImplementedError'
    for bad in ('# BEGIN SOLUTION\nx', 'x\n# END SOLUTION'):
        with pytest.raises(ValueError): strip_solutions(bad)


def test_calls(nursery):
    """Objects that stay, functions that ask back, counts, gradients, and the arguments afterwards."""
    cells = ['import torch', 'class Box:\n    def __init__(self, x): self.x = x\n    def add(self, n): self.x += n; return self.x', 'def twice(f): return f(1) + f(2)', 'def fail(f):\n    try: f()\n    except RuntimeError as e: return str(e)',
             'def change(x): x.append(1); return len(x)', 'def look(d): return d[1] + d.get(2, 0) + (3 in d)', 'def square(x): return (x @ x).sum()', 'def gen():\n    yield 1\n    yield 2']
    s = Student(cells, nursery, LIMITS)
    box = s.Box(3)
    assert box.add(4) == 7 and box.get('x') == 7 and box.kind == 'Box' and s.gen() == [1, 2]
    asked = []
    assert s.twice(lambda x: asked.append(x) or 10 * x) == 30 and asked == [1, 2]
    assert 'ZeroDivisionError' in s.fail(lambda: 1 / 0)
    assert s.request('change', [5], after=True).after == [[5, 1]]
    assert s.request('look', Counted({1: 5, 3: 0})).asked == 3
    reply = s.request('square', torch.eye(3), grad=[0])
    assert reply.products == 1 and reply.flops == 54 and torch.equal(reply.grads[0], torch.full((3, 3), 2.0))
    with pytest.raises(StudentError) as e: s.nothing()
    assert e.value.kind == 'missing'
    s.close()


def test_magics_are_left_out_and_python_is_not():
    """A line that continues a division, or stands in a string, is the student's."""
    ns = {}
    source = "%matplotlib inline\nx = ('%d apples'\n     % 3)\nif x:\n    !echo it's (\ns = '''\n!important\n'''\ndef f(): return x, s"
    assert run_cell(1, source, ns) is None and ns['f']() == ('3 apples', '\n!important\n')
    assert run_cell(2, 'y = (\n%time', ns)['error'] == 'SyntaxError'
    assert code_cells([dict(cell_type='code', source=s) for s in (source, '%%time\nx', '# Try it')]) == [source, '', '']


@pytest.mark.parametrize('copy', [dict, dict.copy, lambda d: {**d}, lambda d: {k: v for k, v in d.items()}, lambda d: list(d.values()), lambda d: [d[k] for k in d]])
def test_a_copy_costs_its_entries(copy):
    d = Counted({i: i for i in range(9)})
    assert len(copy(d)) == 9 == d.asked
    pack(d)
    assert d.asked == 9, 'sending it is no look-up'


def test_only_numbered_tests_are_assignments(tmp_path, monkeypatch):
    (tmp_path/'tests').mkdir()
    for name in ('test_a10.py', 'test_a2.py', 'test_arrays.py', 'test_a1_old.py', 'test_a1.py'): (tmp_path/'tests'/name).touch()
    monkeypatch.setenv('NANOCHAT_ASSIGNMENTS', str(tmp_path))
    assert grade.assignment_names() == ['a1', 'a2', 'a10']


def test_seed_redraws_inputs(nursery):
    """With another seed the same tests draw other inputs; the master passes them too."""
    for seed in (1, 2): assert grade_cells('a1', MASTER, nursery, LIMITS, seed=seed).points() == (22, 22)


def test_submission_names(tmp_path):
    for name in ('ann/a1_bpe.ipynb', 'bob_a2.ipynb', 'A3-carl.ipynb', 'x/y/a4.ipynb', 'data1.ipynb', 'ann/.ipynb_checkpoints/a1.ipynb', 'a12.ipynb'): write_notebook(tmp_path/name, [])
    found = {(who, name) for who, name, _ in submissions(tmp_path)}
    assert found == {('ann', 'a1'), ('bob', 'a2'), ('carl', 'a3'), ('x/y', 'a4'), ('data1', ''), ('a12', '')}


def test_ctrl_c_ends_the_grading(tmp_path):
    """Not this submission's remark, with the next one to follow."""
    (tmp_path/'test_interrupted.py').write_text('import pytest\n@pytest.mark.points(1, exercise=1)\ndef test_it(student): raise KeyboardInterrupt')
    with pytest.raises(KeyboardInterrupt): grade.run_tests(tmp_path/'test_interrupted.py', None)
