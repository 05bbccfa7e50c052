"""Shared by all tests: one compute thread, a base directory of their own, and the real data where it is present."""
import os
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('GRADIO_ANALYTICS_ENABLED', 'False')
os.environ.setdefault('NANOCHAT_NATIVE', str(Path(tempfile.gettempdir())/f'nanochat-tests-{os.getuid()}'))  # compiled once for all of them

SHARED = Path(os.environ.get('NANOCHAT_SHARED_DATA', Path(__file__).resolve().parents[2]/'shared'/'data'))


@pytest.fixture(autouse=True)
def base_directory(tmp_path_factory, monkeypatch):
    """Every test gets an empty base directory: nothing leaks in from the user's own runs, or out to them."""
    path = tmp_path_factory.mktemp('base')
    monkeypatch.setenv('NANOCHAT_BASE_DIR', str(path))
    return path


@pytest.fixture
def fp32(monkeypatch):
    """Compute in float32, as the reference numbers were."""
    monkeypatch.setenv('NANOCHAT_DTYPE', 'float32')


@pytest.fixture(scope='session')
def prepared(tmp_path_factory):
    """A base directory with a small corpus and its tokenizer, to be copied."""
    from nanochat.dataset import prepare_corpus
    from nanochat.tokenizer import RustBPETokenizer
    folder, old = tmp_path_factory.mktemp('prepared'), os.environ.get('NANOCHAT_BASE_DIR')
    os.environ['NANOCHAT_BASE_DIR'] = str(folder)
    corpus = prepare_corpus('stdlib', max_bytes=200_000, val_fraction=.1)
    RustBPETokenizer.train_from_iterator(corpus.documents('train'), 320).save(folder/'tokenizer')
    if old is None: del os.environ['NANOCHAT_BASE_DIR']
    else: os.environ['NANOCHAT_BASE_DIR'] = old
    return folder


@pytest.fixture(scope='session')
def shared_data():
    """The folder of real data, or a skip that says why."""
    if not SHARED.exists(): pytest.skip(f'no real data at {SHARED}; set NANOCHAT_SHARED_DATA to the folder that holds it')
    return SHARED


# The longest first: with two workers the short ones then fill up the end.
LONGEST = ('test_quickstart', 'test_lessons_browser', 'test_lessons', 'test_runs', 'test_sandbox', 'test_train', 'test_demo', 'test_server_load', 'test_assignments', 'test_grade',
           'test_core_eval', 'test_native', 'test_site', 'test_viz_train', 'test_server', 'test_chat_cli', 'test_flash_attention', 'test_infer_bench')


def pytest_collection_modifyitems(items):
    """Files that take long go first."""
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))
