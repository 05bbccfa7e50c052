"""Downloads from a hub on the loopback that misbehaves: what arrives is whole or is not there, and what was begun is continued."""
import errno, hashlib, io, os, random, signal, subprocess, sys, threading, time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hub_server import Hub
from nanochat import dataset
from nanochat.common import UserError
from nanochat.dataset import HUB, DatasetConfig, HubCorpus, download_corpus, open_corpus, prepare, prepare_corpus
from warm_python import warm_python

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
    keep = {k: v for k, v in warm_python().environ().items() if k.lower() not in ('http_proxy', 'https_proxy', 'all_proxy', 'hf_hub_offline')}
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
    assert sorted(p for kind, p, _ in hub.requests[before:] if kind == 'bytes') == names(2, 3, 4)
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


def test_a_broken_connection_is_continued_not_begun_anew(hub):
    hub.faults[names(0)[0]] = [('reset', 150_000), ('reset', 120_000)]
    corpus = prepare_corpus('climbmix', shards=1)
    starts = [int(r.removeprefix('bytes=').rstrip('-') or 0) for r in hub.asked(names(0)[0])]
    assert starts[0] == 0 < starts[1] <= 150_000 and starts[1] < starts[2] and final_files(corpus.path) == names(0, LAST)


def test_a_silent_server_counts_as_dead(hub, monkeypatch):
    monkeypatch.setattr(dataset, 'READ_TIMEOUT', .5)
    hub.faults[names(0)[0]] = [('stall', 100_000, 3)]
    corpus = prepare_corpus('climbmix', shards=1)
    assert hub.asked(names(0)[0])[1].startswith('bytes=') and final_files(corpus.path) == names(0, LAST)


def test_progress_does_not_use_up_the_tries(hub):
    """A line that breaks twenty times but moves forward each time gets there."""
    size = len(SHARDS[names(0)[0]])
    hub.faults[names(0)[0]] = [('truncate', size // 25)] * 20
    assert final_files(prepare_corpus('climbmix', shards=1).path) == names(0, LAST) and len(hub.asked(names(0)[0])) == 21


@pytest.mark.parametrize('fault, sentence', [
    (('corrupt', 777), r'shard_00002.parquet could not be downloaded: its bytes do not have the hash that the hub announced .6 tries'),
    (('status', 500), r'shard_00002.parquet could not be downloaded: the hub answered 500 .6 tries.; check the connection and run the same command: what is here is kept'),
    (('short', 0), 'the connection ended after 0 of'),
    (('status', 403), 'does not give shard_00002.parquet to just anyone .it answered 403.*hf auth login'),
    (('status', 404), 'the hub has no shard_00002.parquet .it answered 404'),
])
def test_what_cannot_be_had_is_a_sentence_and_the_rest_is_kept(hub, base_directory, fault, sentence):
    hub.faults[names(2)[0]] = fault
    with pytest.raises(UserError, match=sentence): prepare_corpus('climbmix', shards=3)
    folder = base_directory/'corpora'/'climbmix'
    assert names(2)[0] not in final_files(folder)
    if fault != ('status', 403) and fault != ('status', 404): assert final_files(folder) == names(0, 1, LAST)  # one bad file did not stop the others
    hub.faults.clear()
    before = len([1 for r in hub.requests if r[0] == 'bytes'])
    assert final_files(prepare_corpus('climbmix', shards=3).path) == names(0, 1, 2, LAST)
    assert len([1 for r in hub.requests if r[0] == 'bytes']) - before <= 3


def test_shards_that_came_early_wait_for_the_gap_to_close(hub, base_directory):
    """The corpus is what came in order; a later shard is remembered, not shown and not fetched again."""
    hub.faults[names(1)[0]] = ('status', 500)
    with pytest.raises(UserError): prepare_corpus('climbmix', shards=4)
    assert [p.name for p in open_corpus('climbmix').shards('train')] == names(0) and final_files(base_directory/'corpora'/'climbmix') == names(0, 2, 3, LAST)
    hub.faults.clear(); hub.requests.clear()
    assert [p.name for p in prepare_corpus('climbmix', shards=4).shards('train')] == names(0, 1, 2, 3)
    assert [r[1] for r in hub.requests if r[0] == 'bytes'] == names(1)


def test_trouble_with_the_listing(hub, base_directory, monkeypatch):
    hub.faults['*'] = [('status', 500), ('status', 502)]
    assert prepare_corpus('climbmix', shards=1).rows('train') == 400
    hub.add(HUB['fineweb-edu'].repo, {'shard_00000.parquet': SHARDS['shard_00000.parquet']})
    with pytest.raises(UserError, match='has no shard_01822.parquet.*complete mirror'): prepare_corpus('fineweb-edu', shards=1)
    monkeypatch.setitem(HUB, 'nobody', HubCorpus('nobody/nothing', 3))
    with pytest.raises(UserError, match="the hub has no dataset 'nobody/nothing'"): prepare_corpus('nobody', shards=1)
    monkeypatch.setenv('HF_ENDPOINT', 'http://127.0.0.1:9')  # no one listens there
    with pytest.raises(UserError, match="dataset 'nobody/nothing' could not be downloaded: ConnectError.*3 tries.; check the connection"): prepare_corpus('nobody', shards=1)
    assert not (base_directory/'corpora'/'nobody').exists() and not (base_directory/'corpora'/'fineweb-edu').exists()


def test_bad_requests(hub):
    for kwargs, sentence in ((dict(shards=LAST + 1), 'has 1 to 6542 for training; the last one is always validation'), (dict(max_bytes=1000), 'instead of max_bytes give a number of shards')):
        with pytest.raises(UserError, match=sentence): prepare_corpus('climbmix', **kwargs)
    with pytest.raises(UserError, match='0 workers download nothing'): download_corpus('climbmix', 2, workers=0)
    with pytest.raises(UserError, match='only a corpus of the hub has a number of shards'): prepare_corpus('stdlib', shards=3)
    for more, sentence in ((dict(shards=0), '0 shards are not to be had'), (dict(max_bytes=1000), 'instead of max_bytes'), (dict(errors='guess'), "errors 'guess' is unknown")):
        for background in (False, True):
            with pytest.raises(UserError, match=sentence): prepare(DatasetConfig('climbmix', background=background, **more))
    with pytest.raises(UserError, match='--force .* cannot run in the background'): prepare(DatasetConfig('climbmix', background=True, force=True))
    assert not hub.requests


def test_what_ended_a_download_is_what_is_said(hub):
    hub.faults[names(0)[0]], hub.faults[names(1)[0]] = ('status', 500), ('status', 403)  # the first alone would not have
    with pytest.raises(UserError, match='does not give shard_00001.parquet to just anyone'): download_corpus('climbmix', 3, workers=1)


def test_a_shard_that_is_no_parquet_or_has_no_text(hub):
    hub.add(WEB, {**SHARDS, 'shard_00000.parquet': b'PAR1 nothing else'})
    with pytest.raises(UserError, match='shard_00000.parquet is not a readable parquet file'): prepare_corpus('climbmix', shards=1)
    out = io.BytesIO(); pq.write_table(pa.table({'content': ['x']}), out)
    hub.add(HUB['fineweb-edu'].repo, {'shard_00000.parquet': out.getvalue(), 'shard_01822.parquet': SHARDS['shard_00001.parquet']})
    with pytest.raises(UserError, match="shard_00000.parquet has no column 'text' .it has: content"): prepare_corpus('fineweb-edu', shards=1)


def test_the_commit_is_pinned(hub):
    """The data moves on at the hub; a corpus that was begun is finished from the version that it was begun with."""
    begun = prepare_corpus('climbmix', shards=1)
    hub.add(WEB, {k: shard(999) for k in SHARDS})
    more = prepare_corpus('climbmix', shards=2)
    assert more.manifest['commit'] == begun.manifest['commit'] and final_files(more.path) == names(0, 1, LAST)


def test_force_replaces_what_is_damaged_and_nothing_else(hub):
    corpus = prepare_corpus('climbmix', shards=3)
    raw = bytearray(SHARDS[names(1)[0]]); raw[5000] ^= 1
    corpus.shards('train')[1].write_bytes(raw)
    assert prepare_corpus('climbmix', shards=3).damaged() == names(1)  # sizes agree: only hashing shows it
    hub.requests.clear()
    assert not prepare_corpus('climbmix', shards=3, force=True).damaged() and [r[1] for r in hub.requests if r[0] == 'bytes'] == names(1)
    corpus.shards('train')[0].unlink()
    with pytest.raises(UserError, match='lacks shard_00000.parquet; run: python -m nanochat.dataset climbmix'): open_corpus('climbmix')
    assert final_files(prepare_corpus('climbmix').path) == names(0, 1, 2, LAST)


def test_a_lost_manifest_is_made_again_from_what_is_there(hub):
    corpus = prepare_corpus('climbmix', shards=2)
    (corpus.path/'manifest.json').write_text('{"torn')
    hub.requests.clear()
    assert prepare_corpus('climbmix', shards=2).manifest == corpus.manifest and not [r for r in hub.requests if r[0] == 'bytes']


@pytest.mark.parametrize('seed', range(4))
def test_any_series_of_faults_ends_well(hub, monkeypatch, seed):
    """Up to four faults for each file, drawn at random: the corpus is the hub's, bit for bit, and nothing else lies about."""
    monkeypatch.setattr(dataset, 'READ_TIMEOUT', .4)
    rng = random.Random(seed)
    kinds = [lambda: ('status', rng.choice([408, 429, 500, 502, 503, 504])), lambda: ('truncate', rng.randrange(400_000)), lambda: ('short', rng.randrange(1, 500_000)), lambda: ('corrupt', rng.randrange(500_000)),
             lambda: ('long', rng.randrange(1, 9999)), lambda: ('ignore_range',), lambda: ('reset', rng.randrange(300_000)), lambda: ('stall', rng.randrange(300_000), .8), lambda: ('slow', 4_000_000)]
    hub.faults.update({n: [rng.choice(kinds)() for _ in range(rng.randrange(5))] for n in SHARDS})
    hub.faults['*'] = [('status', 503)]
    corpus = prepare_corpus('climbmix', shards=6)
    assert final_files(corpus.path) == names(*range(6), LAST) and not corpus.damaged() and not list(corpus.path.glob('.download/*.part'))


def test_files_come_at_the_same_time(hub):
    together, most, lock = [0], [0], threading.Lock()
    fetch = dataset.receive
    def watched(*args):
        with lock: together[0] += 1; most[0] = max(most[0], together[0])
        time.sleep(.1)
        try: return fetch(*args)
        finally:
            with lock: together[0] -= 1
    with pytest.MonkeyPatch.context() as m:
        m.setattr(dataset, 'receive', watched)
        download_corpus('climbmix', 7, workers=4)
    assert most[0] == 4


def test_training_goes_on_exactly_while_shards_come_in(hub, shared_data):
    """A loader resumed after the corpus has grown gives the very batches that it would have given."""
    import torch
    from nanochat.dataloader import tokenizing_distributed_data_loader_with_state_bos_bestfit as loader
    from nanochat.tokenizer import RustBPETokenizer
    tokenizer = RustBPETokenizer.from_directory(shared_data/'reference'/'tokenizer')
    batches = lambda state=None: loader(tokenizer, 2, 256, 'train', corpus='climbmix', buffer_size=100, resume_state_dict=state)
    prepare_corpus('climbmix', shards=3)
    first = batches()
    for _ in range(10): *_, state = next(first)
    expected = [next(first)[0] for _ in range(10)]
    prepare_corpus('climbmix', shards=6)
    resumed = batches(state)
    assert all(torch.equal(next(resumed)[0], x) for x in expected)


# Disks that fill up -------------------------------------------------------------------------------------------------

@pytest.fixture
def small_disk(tmp_path, monkeypatch):
    """A disk of 1 MB as base directory, where this machine lets us make one."""
    place = tmp_path/'disk'; place.mkdir()
    done = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', str(place)], capture_output=True, text=True) if sys.platform == 'linux' else None
    if not done or done.returncode: pytest.skip('a small disk cannot be mounted here: ' + (done.stderr.strip() if done else sys.platform))
    monkeypatch.setenv('NANOCHAT_BASE_DIR', str(place))
    yield place
    subprocess.run(['umount', '-l', str(place)], check=True)  # lazily: a thread may still be closing its file


def test_a_disk_too_small_is_said_before_anything_is_fetched(hub, small_disk):
    with pytest.raises(UserError, match='this needs .* of disk and only .* are free'): prepare_corpus('climbmix', shards=3)
    assert not [r for r in hub.requests if r[0] == 'bytes']


def test_a_disk_that_fills_up(hub, small_disk, monkeypatch):
    monkeypatch.setattr(dataset, 'require_space', lambda *a: None)  # the others took the space after we looked
    with pytest.raises(UserError, match='cannot write shard_.*: the disk is full; free some space.*run the same command: what is here is kept'): prepare_corpus('climbmix', shards=3)
    final_files(small_disk/'corpora'/'climbmix')


def test_no_space_left_in_mid_file(hub, base_directory, monkeypatch):
    """The same without a small disk: writing fails after 100 kB, as it does when the disk is full."""
    real = open
    class Full(io.FileIO):
        def write(self, data):
            if self.tell() + len(data) > 100_000: raise OSError(errno.ENOSPC, 'No space left on device')
            return super().write(data)
    monkeypatch.setattr(dataset, 'open', lambda p, mode='r', *a, **k: Full(p, mode) if str(p).endswith('.part') and mode in ('ab', 'wb') else real(p, mode, *a, **k), raising=False)
    with pytest.raises(UserError, match='the disk is full'): prepare_corpus('climbmix', shards=2)
    assert final_files(base_directory/'corpora'/'climbmix') == []
    monkeypatch.delattr(dataset, 'open')
    hub.requests.clear()
    assert final_files(prepare_corpus('climbmix', shards=2).path) == names(0, 1, LAST)
    assert any(r for kind, p, r in hub.requests if kind == 'bytes'), 'what was written before the disk was full is not fetched again'


# Processes ----------------------------------------------------------------------------------------------------------

def command(*args, **env): return dict(args=[warm_python().python, '-m', 'nanochat.dataset', *args], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition, seconds=40):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'this did not happen in time'
        time.sleep(.05)


def test_kill_and_resume_and_two_at_once(hub, base_directory):
    """A process is killed in the middle of a file; then two at once go on, and between them fetch every byte once."""
    folder, env = base_directory/'corpora'/'climbmix', environment(hub, NANOCHAT_BASE_DIR=str(base_directory))
    hub.faults[names(1)[0]] = [('slow', 40_000)]
    victim = subprocess.Popen(**command('climbmix', '--shards', '2', **env))
    wait_for(lambda: any(p.stat().st_size > 10_000 for p in folder.glob('.download/shard_00001*.part')) and (folder/names(LAST)[0]).exists() and (folder/names(0)[0]).exists())
    victim.send_signal(signal.SIGKILL); victim.communicate()
    assert victim.returncode == -signal.SIGKILL and names(1)[0] not in final_files(folder)
    (part,) = folder.glob('.download/shard_00001*.part')
    arrived, hub.requests[:] = part.stat().st_size, []
    pair = [subprocess.Popen(**command('climbmix', '--shards', n, **env)) for n in ('2', '4')]
    for p in pair:
        out, err = p.communicate(timeout=60)
        assert p.returncode == 0, err
        assert 'climbmix val: 400 documents' in out
    fetched = [(p, r) for kind, p, r in hub.requests if kind == 'bytes']
    assert sorted(p for p, _ in fetched) == names(1, 2, 3) and dict(fetched)[names(1)[0]] == f'bytes={arrived}-'
    assert final_files(folder) == names(0, 1, 2, 3, LAST) and not list(folder.glob('.download/*.part'))


@pytest.mark.skipif(os.name == 'nt', reason='signals')
def test_ctrl_c_ends_at_once_and_keeps_what_came(hub, base_directory):
    hub.faults[names(LAST)[0]] = ('slow', 20_000)
    p = subprocess.Popen(**command('climbmix', '--shards', '1', **environment(hub, NANOCHAT_BASE_DIR=str(base_directory))))
    parts = lambda: [f.stat().st_size for f in base_directory.glob('corpora/climbmix/.download/*.part')]
    wait_for(lambda: any(parts()))
    began = time.monotonic()
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=20)
    assert p.returncode == 130 and 'stopped; what was finished is saved' in err and 'Traceback' not in err and time.monotonic() - began < 10  # the file would have taken longer
    assert any(parts()) and names(LAST)[0] not in final_files(base_directory/'corpora'/'climbmix')


def test_in_the_background(hub, base_directory):
    env = environment(hub, NANOCHAT_BASE_DIR=str(base_directory))
    started = subprocess.run(**{**command('climbmix', '--shards', '3', '--background', **env), 'stdout': None, 'stderr': None}, capture_output=True)
    assert started.returncode == 0, started.stderr
    assert 'tail -f' in started.stdout and 'download.log' in started.stdout and 'python -m nanochat.dataset climbmix --shards 3' in started.stdout
    wait_for(lambda: (base_directory/'corpora'/'climbmix'/'manifest.json').exists() and len(open_corpus('climbmix').shards('train')) == 3)
    log = base_directory/'corpora'/'climbmix'/'download.log'
    wait_for(lambda: 'climbmix train: 1200 documents' in log.read_text())
    assert 'downloading climbmix' in log.read_text() and 'ETA' in log.read_text() and 'Traceback' not in log.read_text()


def test_offline_says_what_to_type(base_directory):
    done = subprocess.run([warm_python().python, '-m', 'nanochat.dataset', 'climbmix', '--background'], env=warm_python().environ(HF_HUB_OFFLINE='1'), capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.strip().endswith('HF_HUB_OFFLINE forbids it; type: unset HF_HUB_OFFLINE') and 'Traceback' not in done.stderr
    with pytest.raises(UserError, match="no corpus 'climbmix' yet; run: python -m nanochat.dataset climbmix"): open_corpus('climbmix')
    assert not (base_directory/'corpora').exists()
