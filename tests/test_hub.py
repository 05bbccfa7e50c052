"""Downloads from a hub on the loopback that misbehaves: what arrives is whole or is not there, and what was begun is continued."""
import contextlib, errno, hashlib, io, json, os, signal, subprocess, sys, threading, time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hub_server import CONVERTED, Hub
from nanochat import dataset
from nanochat.common import UserError
from nanochat.dataset import HUB, HubCorpus, HubManifest, download_corpus, hub_files, open_corpus, prepare_corpus
from nanochat.tasks import common as tasks

WEB = HUB['climbmix'].repo
LAST = HUB['climbmix'].shards - 1


def parquet(texts, row_group=64):
    """A parquet file as bytes; incompressible enough to have a middle."""
    out = io.BytesIO()
    pq.write_table(pa.table({'text': texts}), out, row_group_size=row_group, compression='none', use_dictionary=False)
    return out.getvalue()


def shard(i, n=400):
    return parquet([f'shard {i} document {k} ' + hashlib.sha256(f'{i}/{k}'.encode()).hexdigest() * 20 for k in range(n)])


SHARDS = {**{f'shard_{i:05d}.parquet': shard(i) for i in range(8)}, f'shard_{LAST:05d}.parquet': shard(LAST)}


def environment(hub, **more):
    """The environment for a process that talks to this hub and to nothing else."""
    keep = {k: v for k, v in os.environ.items() if k.lower() not in ('http_proxy', 'https_proxy', 'all_proxy', 'hf_hub_offline')}
    return {**keep, 'HF_ENDPOINT': hub.url, 'HF_HUB_DISABLE_TELEMETRY': '1', 'OMP_NUM_THREADS': '1', **more}


@pytest.fixture
def hub(monkeypatch):
    import huggingface_hub.constants as constants
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(dataset, 'WAIT', .01)
    for k in [k for k in os.environ if k.lower() in ('http_proxy', 'https_proxy', 'all_proxy')]: monkeypatch.delenv(k)
    with Hub() as server:
        monkeypatch.setenv('HF_ENDPOINT', server.url)
        server.add(WEB, SHARDS)
        yield server


def final_files(folder):
    """Everything that bears a final name, which must be one of the hub's files bit for bit."""
    found = sorted(p.name for p in Path(folder).glob('*.parquet'))
    for name in found: assert (Path(folder)/name).read_bytes() == SHARDS[name], f'{name} is not what the hub has'
    return found


def names(*numbers): return [f'shard_{i:05d}.parquet' for i in numbers]


def test_a_corpus_by_its_name(hub, base_directory):
    corpus = prepare_corpus('climbmix', shards=3)
    assert [p.name for p in corpus.shards('train')] == names(0, 1, 2) and [p.name for p in corpus.shards('val')] == names(LAST)
    assert corpus.rows('train') == 1200 and next(corpus.documents('val')).startswith(f'shard {LAST} document 0')
    assert corpus.nbytes('train') == sum(len(t.encode()) for t in corpus.documents('train')) and not corpus.damaged()
    assert open_corpus('climbmix').manifest == corpus.manifest and final_files(corpus.path) == names(0, 1, 2, LAST)
    assert len(corpus.manifest['commit']) == 40


def test_what_is_here_is_not_asked_for_again(hub):
    first = prepare_corpus('climbmix', shards=2)
    before = len(hub.requests)
    assert prepare_corpus('climbmix', shards=2).manifest == prepare_corpus('climbmix').manifest == first.manifest and len(hub.requests) == before
    more = prepare_corpus('climbmix', shards=5)
    assert [p for kind, p, _ in hub.requests[before:] if kind == 'bytes'] == names(2, 3, 4) or sorted(p for kind, p, _ in hub.requests[before:] if kind == 'bytes') == names(2, 3, 4)
    assert list(more.documents('train'))[:800] == list(first.documents('train')) and more.manifest['fingerprint'] == first.manifest['fingerprint']


@pytest.mark.parametrize('fault, requests', [
    ([('status', 500), ('status', 503)], ['', '', '']),
    ([('status', 429, '0')], ['', '']),
    ([('truncate', 200_000)], ['', 'bytes=200000-']),
    ([('short', 300_000), ('truncate', 100_000)], ['', 'bytes=300000-', 'bytes=400000-']),
    ([('corrupt', 12_345)], ['', '']),
    ([('truncate', 100_000), ('ignore_range',)], ['', 'bytes=100000-']),
    ([('long', 5000)], ['', '']),
], ids=lambda v: '+'.join(f[0] for f in v) if isinstance(v[0], tuple) else '')
def test_faults_are_survived(hub, base_directory, fault, requests):
    hub.faults[names(1)[0]] = list(fault)
    corpus = prepare_corpus('climbmix', shards=2)
    assert final_files(corpus.path) == names(0, 1, LAST) and hub.asked(names(1)[0]) == requests
    assert not list((corpus.path/'.download').glob('*.part'))
