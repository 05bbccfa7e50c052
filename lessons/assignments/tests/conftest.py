"""For `pytest lessons/assignments/tests`: grades the student notebooks of this checkout, with pytest's own messages.

`python -m nanochat.grade a1` does the same with points and hints, and does not read this file."""
import random, re

import pytest

from nanochat.grade import Nursery, Student, assignments_dir, code_cells, find_one, read_notebook


def pytest_configure(config): config.addinivalue_line('markers', 'points(n, exercise): what a test is worth, and in which exercise')


@pytest.fixture(scope='session')
def nursery():
    with Nursery() as n: yield n


@pytest.fixture(scope='module')
def student(request, nursery):
    name = re.search(r'test_(a\d)', request.path.name)[1]
    s = Student(code_cells(read_notebook(find_one(assignments_dir(), name))), nursery)
    yield s
    s.close()


@pytest.fixture
def rng(request):
    rng = random.Random(f'0/{request.node.originalname}')
    rng.grading = 0
    return rng
