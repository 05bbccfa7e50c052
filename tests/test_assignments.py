"""The invariant of the assignments: every master scores all, every student copy nothing, and every known wrong answer reads the right hint."""
import ast, json, re, runpy
from pathlib import Path

import pytest

pytest.importorskip('torch')
from nanochat.grade import Limits, Nursery, _constants, assignment_names, assignments_dir, code_cells, find_one, grade_cells, read_notebook, source_of, strip_solutions, student_notebook

ROOT = assignments_dir()
NAMES = assignment_names()
each = pytest.mark.parametrize('name', NAMES)


@pytest.fixture(scope='module')
def nursery():
    with Nursery() as n: yield n


def master(name): return find_one(ROOT/'masters', name)
def constants(name): return _constants(ROOT/'tests'/f'test_{name}.py')
def text(name): return '\n'.join(source_of(c) for c in read_notebook(master(name)))


@each
def test_committed_copies_are_fresh(name):
    """If this fails, type: python -m nanochat.grade --make"""
    assert (ROOT/master(name).name).read_text(encoding='utf8') == student_notebook(master(name).read_text(encoding='utf8'))


@each
def test_copies_hold_no_solution(name):
    """No line of a solution that does not also stand outside of one."""
    copy = (ROOT/master(name).name).read_text(encoding='utf8')
    assert 'SOLUTION' not in copy and 'execution_count": null' in copy
    assert all(c['id'] for c in json.loads(copy)['cells'])
    assert strip_solutions(text(name)).count('raise NotImplementedError') >= len(constants(name)['EXERCISES'])


@each
def test_master_scores_all(name, nursery):
    grade = grade_cells(name, code_cells(read_notebook(master(name))), nursery)
    assert grade.points()[0] == grade.points()[1] > 0 and not grade.broken_cells, f'\n{grade}'


@each
def test_copy_scores_nothing(name, nursery):
    grade = grade_cells(name, code_cells(read_notebook(ROOT/master(name).name)), nursery)
    assert grade.points()[0] == 0 and {r.detail for r in grade.rows} == {'not written yet'} and not grade.broken_cells, f'\n{grade}'


@each
def test_doing_nothing_scores_nothing(name, nursery):
    """Functions that return None, and change nothing, must not pass a test that only looks for harm."""
    cells = [c.replace('raise NotImplementedError', 'return None') for c in code_cells(read_notebook(ROOT/master(name).name))]
    grade = grade_cells(name, cells, nursery)
    assert grade.points()[0] == 0, f'\n{grade}'


@each
def test_headings_and_marks_agree(name, nursery):
    """Each exercise opens with its points, difficulty, minutes and device, and the table at the top says the same."""
    exercises, source, module = constants(name)['EXERCISES'], text(name), ast.parse((ROOT/'tests'/f'test_{name}.py').read_text())
    worth = dict.fromkeys(exercises, 0)
    for f in module.body:
        if not isinstance(f, ast.FunctionDef) or not f.name.startswith('test_'): continue
        assert len((ast.get_docstring(f) or '').split()) >= 6, f'{f.name} has no hint'
        mark = next(d for d in f.decorator_list if 'points' in ast.unparse(d))
        worth[mark.keywords[0].value.value] += mark.args[0].value
    for n, title in exercises.items():
        heading = re.search(rf'^## {n}\. {re.escape(title)}\n\*\*(\d+) points? · difficulty ([1-5]) of 5 · (\d+) minutes · .+\*\*$', source, re.M)
        assert heading, f'no heading for exercise {n}, {title}'
        points, difficulty, minutes = heading.groups()
        assert int(points) == worth[n] and f'| {n}. {title} | {points} | {difficulty} of 5 | {minutes} |' in source, (n, worth[n])
    assert 3 <= len(exercises) <= 6 and set(worth) == set(exercises)


@each
def test_known_wrong_answers_read_their_hint(name, nursery):
    """At least three for each exercise; each loses points in its exercise, and the hint names what it did."""
    wrong, exercises = runpy.run_path(str(ROOT/'wrong'/f'{name}.py'))['WRONG'], constants(name)['EXERCISES']
    cells, faults = code_cells(read_notebook(master(name))), []
    assert set(wrong) == set(exercises) and all(len(w) >= 3 for w in wrong.values())
    for n, answers in wrong.items():
        for what, (old, new), phrase in answers:
            changed = [c.replace(old, new) for c in cells]
            if sum(a != b for a, b in zip(cells, changed)) != 1: faults.append(f'{n}. {what}: the change applies to {sum(a != b for a, b in zip(cells, changed))} cells'); continue
            grade = grade_cells(name, changed, nursery, Limits(call_seconds=20.0), only=n)
            hints = [r.hint for r in grade.rows if not r.passed]
            if not any(phrase in h for h in hints): faults.append(f'{n}. {what}: {phrase!r} is not said; instead {hints} {[r.detail for r in grade.rows if not r.passed]}')
    assert not faults, '\n' + '\n'.join(faults)
