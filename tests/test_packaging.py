"""What an installation holds: the right modules, the right requirements, and nothing that only a notebook needs."""
import configparser, re, subprocess, tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT/'pyproject.toml').read_text())['project']
EXTRAS = PROJECT['optional-dependencies']


def pulled_in(extra):
    """Names of all distributions that `pip install nanochat[extra]` would install, as far as they are installed here."""
    found, todo = set(), [Requirement(r) for r in EXTRAS[extra]]
    while todo:
        r = todo.pop()
        name = canonicalize_name(r.name)
        if name == 'nanochat':
            for e in r.extras: todo += map(Requirement, EXTRAS[e])
            continue
        if (name, *sorted(r.extras)) in found: continue
        found.add((name, *sorted(r.extras)))
        try: needs = requires(name) or []
        except PackageNotFoundError: continue
        todo += [n for n in map(Requirement, needs) if n.marker is None or any(n.marker.evaluate({'extra': e}) for e in r.extras or [''])]
    return {f[0] for f in found}


NOTEBOOK = {'jupyter', 'jupyterlab', 'notebook', 'jupyter-core', 'jupyter-client', 'ipython', 'ipykernel', 'ipywidgets', 'nbclient', 'nbformat', 'nbdev', 'fastcore', 'execnb', 'ghapi'}
WEB = {'gradio', 'gradio-client', 'fastapi', 'uvicorn', 'starlette'}


def test_training_needs_no_notebook_and_no_web_server():
    names = pulled_in('train')
    assert {'torch', 'numpy', 'tiktoken', 'rustbpe', 'pyarrow', 'tyro', 'safetensors'} <= names
    assert names & (NOTEBOOK | WEB | {'pytest', 'hypothesis'}) == set()


def test_the_other_extras_bring_what_they_are_for():
    assert WEB <= pulled_in('serve') and not pulled_in('serve') & {'nbdev', 'jupyterlab', 'ipykernel'}
    assert {'nbdev', 'pytest', 'hypothesis', 'nbclient'} <= pulled_in('dev')
    assert {'jupyterlab', 'ipywidgets'} <= {canonicalize_name(Requirement(r).name) for r in EXTRAS['course']}
    assert set(EXTRAS) == {'train', 'serve', 'course', 'dev', 'gpu'} and PROJECT['dependencies'] == []


def test_settings_agree():
    ini = configparser.ConfigParser()
    ini.read(ROOT/'settings.ini')
    d = ini['DEFAULT']
    init = re.search(r"__version__ = ['\"](.+?)['\"]", (ROOT/'nanochat'/'__init__.py').read_text())[1]
    assert d['version'] == init and d['lib_path'] == 'nanochat' and d['nbs_path'] == 'nbs' and d['license'] == 'mit'
    assert 'nbdev==2.4.14' in EXTRAS['dev'] and 'MIT License' in (ROOT/'LICENSE').read_text() and PROJECT['license'] == {'text': 'MIT'}
    assert d['min_python'] in PROJECT['requires-python']


def test_every_folder_of_modules_is_a_package():
    """An installation takes packages: every module must lie in one, and no notebook may."""
    find_packages = pytest.importorskip('setuptools').find_packages
    include = tomllib.loads((ROOT/'pyproject.toml').read_text())['tool']['setuptools']['packages']['find']['include']
    packages = find_packages(str(ROOT), include=include)
    folders = {'.'.join(p.parent.relative_to(ROOT).parts) for p in (ROOT/'nanochat').rglob('*.py')}
    assert folders == set(packages) and {'nanochat.scripts', 'nanochat.tasks'} <= folders
    assert not list((ROOT/'nanochat').rglob('*.ipynb'))


def test_imports_point_up():
    """A module imports only rooms above it in the reading order (16_chat before 16_server); scripts may import all, tasks only rooms, `common` and each other."""
    order = {p.stem[3:]: p.stem for p in (ROOT/'nbs').glob('*.ipynb') if re.match(r'\d\d_', p.stem)}
    for path in (ROOT/'nanochat').glob('*.py'):
        if path.stem not in order: continue
        for name in re.findall(r'^(?:from \.(\w+)|\s*from nanochat\.(\w+)) import', path.read_text(), re.M):
            other = name[0] or name[1]
            assert other in order and order[other] < order[path.stem], f'{path.stem} imports {other}, which comes later'
    for path in (ROOT/'nanochat'/'tasks').glob('*.py'): assert 'scripts' not in re.findall(r'^from \.+(\w+)', path.read_text(), re.M)


@pytest.mark.parametrize('script', sorted((ROOT/'runs').glob('*.sh')), ids=lambda p: p.name)
def test_shell_scripts_parse(script):
    assert subprocess.run(['bash', '-n', str(script)]).returncode == 0


@pytest.mark.parametrize('args, words', [(['--minutes'], 'needs a number'), (['--minutes', 'six'], "takes a number, not 'six'"), (['--depth', '0'], 'whole number from 1'),
                                         (['--depth', '2.5'], 'whole number'), (['--faster'], 'unknown flag --faster')])
def test_quickstart_refuses_before_it_installs(args, words, tmp_path):
    env = dict(PATH='/usr/bin:/bin', HOME=str(tmp_path), NANOCHAT_VENV=str(tmp_path/'venv'))
    done = subprocess.run(['bash', str(ROOT/'runs'/'quickstart.sh'), *args], capture_output=True, text=True, env=env)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count('\n') == 1 and not list(tmp_path.iterdir())


def test_quickstart_explains_itself(tmp_path):
    done = subprocess.run(['bash', str(ROOT/'runs'/'quickstart.sh'), '--help'], capture_output=True, text=True)
    assert done.returncode == 0 and all(flag in done.stdout for flag in ('--minutes N', '--depth D', '--no-chat', '--fresh'))
