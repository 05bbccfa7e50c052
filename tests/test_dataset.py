"""Corpora: what is read, how it is mixed and held out, what is recognised, and what is refused with which sentence."""
import json, os, shlex, shutil, subprocess, sys, tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings, strategies as st

from nanochat import dataset
from nanochat.common import UserError
from nanochat.dataset import (Documents, RepackageConfig, cut_document, open_corpus, prepare_corpus, repackage, shuffled, split_validation,
                              stdlib_documents, write_shard)


def texts_of(corpus):
    return list(corpus.documents('train')), list(corpus.documents('val'))


def write_jsonl(path, texts):
    path.write_text(''.join(json.dumps({'text': t}, ensure_ascii=False) + '\n' for t in texts), encoding='utf8')
    return path


@pytest.fixture
def stories(tmp_path):
    return write_jsonl(tmp_path/'stories.jsonl', [f'story {i}: ' + 'na ' * (i % 50) for i in range(400)])


def test_stdlib_corpus():
    corpus = prepare_corpus('stdlib', max_bytes=4_000_000)
    train, val = texts_of(corpus)
    assert 3_900_000 < corpus.nbytes('train') + corpus.nbytes('val') <= 4_000_000
    assert corpus.nbytes('train') == sum(len(t.encode()) for t in train)
    assert 0.01 < corpus.nbytes('val') / 4_000_000 < 0.04
    assert not set(train) & set(val) and len(set(train)) == len(train)
    assert sum('def ' in t for t in train) > 100


def test_stdlib_holds_sources_reference_and_compiled_docstrings():
    docs = list(stdlib_documents())
    assert any(t.startswith('math\n') and 'math.sqrt' in t for t in docs)
    assert any('Dedicated' in t or 'textwrap' in t for t in docs) and any('def dedent(' in t for t in docs)
    assert not any('site-packages' in f.parts or '__pycache__' in f.parts for f in dataset.stdlib_files())


def test_order_and_split_do_not_depend_on_names_or_dates(tmp_path, monkeypatch):
    made = []
    for k, names in enumerate((['a', 'b', 'c', 'd', 'e'], ['z', 'y', 'x', 'w', 'v'])):
        folder = tmp_path/f'{k}'; folder.mkdir()
        for i, n in enumerate(names): (folder/f'{n}.txt').write_text(f'text number {i} ' * 20)
        made.append(texts_of(prepare_corpus(folder)))
    assert made[0] == made[1]


def test_unchanged_source_is_recognised_and_changed_one_noticed(stories):
    first = prepare_corpus(stories)
    stamp = os.stat(first.path/'manifest.json').st_ino
    os.utime(stories, (1, 1))
    assert os.stat(prepare_corpus(stories).path/'manifest.json').st_ino == stamp
    assert os.stat(prepare_corpus(stories, force=True).path/'manifest.json').st_ino != stamp
    with open(stories, 'a') as f: f.write('{"text": "one more"}\n')
    changed = prepare_corpus(stories)
    assert changed.manifest['fingerprint'] != first.manifest['fingerprint']
    assert 'one more' in sum(texts_of(changed), [])


def test_other_settings_are_another_corpus(stories):
    everything = set(sum(texts_of(prepare_corpus(stories)), []))
    small = prepare_corpus(stories, max_bytes=5000)  # takes the place of the whole one
    assert 4000 < small.nbytes('train') + small.nbytes('val') <= 5000
    assert set(sum(texts_of(small), [])) < everything


@pytest.mark.parametrize('damage', ['missing', 'changed', 'manifest'])
def test_damaged_corpus_is_made_again(stories, damage):
    corpus = prepare_corpus(stories)
    before, shard = texts_of(corpus), corpus.shards('train')[0]
    if damage == 'missing': shard.unlink()
    if damage == 'changed':
        raw = bytearray(shard.read_bytes()); raw[len(raw) // 2] ^= 255; shard.write_bytes(raw)
    if damage == 'manifest': (corpus.path/'manifest.json').write_text('{"torn')
    assert texts_of(prepare_corpus(stories)) == before and not open_corpus(stories).damaged()


@pytest.mark.parametrize('kind', ['whole', 'part', 'repackaged', 'stdlib'])
def test_a_lost_shard_names_the_command_that_brings_it_back(stories, tmp_path, monkeypatch, kind):
    source = shutil.copy(stories, tmp_path/'my stories.jsonl').name
    (tmp_path/'elsewhere').mkdir()
    monkeypatch.chdir(tmp_path)
    if kind == 'repackaged': corpus = repackage(RepackageConfig(source, out='mine', seed=3, row_group=16, shard_bytes=9000))
    elif kind == 'stdlib': corpus = prepare_corpus('stdlib', max_bytes=200_000)
    else: corpus = prepare_corpus(source, **(dict(max_bytes=5000, val_fraction=0.1) if kind == 'part' else {}))
    before = texts_of(corpus)
    corpus.shards('train')[0].unlink()
    monkeypatch.chdir(tmp_path/'elsewhere')
    with pytest.raises(UserError, match='lacks .*; run: python -m nanochat.dataset ') as e: open_corpus('my_stories' if kind in ('whole', 'part') else corpus.name)
    monkeypatch.setattr(sys, 'argv', shlex.split(str(e.value).split('run: python -m ')[1]))
    dataset.main()
    assert texts_of(open_corpus(corpus.name)) == before


def test_validation_is_what_the_manifest_says_not_what_is_on_disk(stories):
    corpus = prepare_corpus(stories)
    before = texts_of(corpus)
    shutil.copy(corpus.shards('train')[0], corpus.path/'zz_extra.parquet')
    assert texts_of(open_corpus(stories)) == before
    corpus.shards('train')[0].unlink()
    with pytest.raises(UserError, match='lacks train_00000.parquet; run: python -m nanochat.dataset'): open_corpus(stories)


def test_all_formats_and_scripts(tmp_path):
    folder = tmp_path/'mine'; (folder/'deep').mkdir(parents=True); (folder/'.hidden').mkdir()
    (folder/'a.txt').write_text('Ελληνικά'); (folder/'deep'/'b.MD').write_text('\ufeff日本語'); (folder/'.hidden'/'c.txt').write_text('secret')
    write_jsonl(folder/'c.jsonl', ['العربية', 'emoji 🙂', 'Ελληνικά'])
    pq.write_table(pa.table({'id': [1, 2], 'text': ['हिन्दी', None]}), folder/'d.parquet')
    (folder/'picture.png').write_bytes(b'\x89PNG\xff')
    corpus = prepare_corpus(folder, val_fraction=0.2)
    assert sorted(''.join(t) for t in [sum(texts_of(corpus), [])] for t in t) == sorted(['Ελληνικά', '日本語', 'العربية', 'emoji 🙂', 'हिन्दी'])


@pytest.mark.parametrize('text', ['\n'.join(f'line {i}' for i in range(3000)), 'x' * 5000, 'ab', 'a\n', '日本' * 100, '\n\n a b \n\n'])
def test_one_document_is_split_inside(tmp_path, text):
    (tmp_path/'novel.txt').write_text(text)
    if len(text.strip()) < 2:
        with pytest.raises(UserError, match='nothing to hold out'): prepare_corpus(tmp_path/'novel.txt')
        return
    (head,), (tail,) = texts_of(prepare_corpus(tmp_path/'novel.txt'))
    assert head + tail == text and head.strip() and tail.strip()
    if len(text) > 1000: assert 0.03 < len(tail) / len(text) < 0.07
    if 'line' in text: assert head.endswith('\n')


def test_part_of_a_document_too_large_is_not_blank(tmp_path):
    (tmp_path/'novel.txt').write_text('\n' * 500 + 'it was a dark night ' * 100)
    corpus = prepare_corpus(tmp_path/'novel.txt', max_bytes=300)
    assert ''.join(sum(texts_of(corpus), [])) == ('it was a dark night ' * 100)[:300]
    assert dataset.first_bytes(['  one two'], 7) == ['  one t']  # what holds something stays byte for byte


def test_few_large_documents_lose_a_tail_not_a_document():
    docs = ['a' * 10_000, 'b' * 9_000, 'c' * 8_000]
    train, val = split_validation(docs, 0.02)
    assert len(train) == 3 and len(val) == 1 and train[0] + val[0] == docs[0] and len(val[0]) < 1000


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text(alphabet='ab \n日', min_size=1, max_size=60).filter(str.strip), min_size=1, max_size=12, unique=True), st.floats(0.001, 0.999))
def test_split_of_anything_has_two_sides_and_loses_nothing(docs, fraction):
    try: train, val = split_validation(docs, fraction)
    except UserError: assert all(len(d.strip()) < 2 for d in docs)
    else:
        assert train and val and all(t.strip() for t in train + val)
        assert sorted(''.join(train + val)) == sorted(''.join(docs))


def test_copies_and_blanks_are_left_out():
    assert sorted(shuffled(['a', 'b', 'a', ' \n', ''])) == ['a', 'b']


def test_shards_and_random_access(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, 'SHARD_BYTES', 3000)
    corpus = prepare_corpus(write_jsonl(tmp_path/'many.jsonl', [f'{i} ' * 20 for i in range(1000)]))
    assert len(corpus.shards('train')) > 5
    docs, reader = list(corpus.documents('train')), corpus.reader('train')
    assert len(docs) == len(reader) == corpus.rows('train')
    order = [(i * 7919) % len(docs) for i in range(len(docs))]
    assert [reader[i] for i in order] == [docs[i] for i in order]
    with pytest.raises(IndexError): reader[len(docs)]


def test_row_groups_of_any_size(tmp_path):
    with pq.ParquetWriter(tmp_path/'odd.parquet', pa.schema([('text', pa.string())])) as w:
        for start, n in ((0, 3), (3, 1), (4, 10), (14, 2)): w.write_table(pa.table({'text': [str(i) for i in range(start, start + n)]}))
    d = Documents([tmp_path/'odd.parquet'], [16], keep=1)
    assert [d[i] for i in (15, 0, 3, 4, 13, 14)] == ['15', '0', '3', '4', '13', '14'] and list(d) == [str(i) for i in range(16)]


def bad_sources(p):
    (p/'latin.txt').write_bytes(b'abc caf\xe9 abc')
    yield p/'latin.txt', r'latin.txt is not valid UTF-8: byte 7 is 0xe9.*--errors replace'
    (p/'latin.jsonl').write_bytes(b'{"text": "ok"}\n{"text": "caf\xe9"}\n')
    yield p/'latin.jsonl', 'latin.jsonl is not valid UTF-8: byte 28 is 0xe9'
    (p/'notext.jsonl').write_text('{"text": "ok"}\n{"body": 1, "id": 2}\n')
    yield p/'notext.jsonl', "line 2 of notext.jsonl has no text.*found body, id"
    (p/'list.jsonl').write_text('["text"]\n')
    yield p/'list.jsonl', 'line 1 of list.jsonl has no text.*found list'
    (p/'torn.jsonl').write_text('{"text": "ok"}\n{"text": "o')
    yield p/'torn.jsonl', 'line 2 of torn.jsonl is not JSON'
    (p/'surrogate.jsonl').write_text('{"text": "a\\ud800b"}\n')
    yield p/'surrogate.jsonl', 'line 1 of surrogate.jsonl holds a lone surrogate'
    (p/'number.jsonl').write_text('{"text": "ok", "id": ' + '7' * 5000 + '}\n')
    yield p/'number.jsonl', 'line 1 of number.jsonl is JSON that cannot be read: .*digits'
    (p/'deep.jsonl').write_text('{"text": "ok", "tree": ' + '[' * 100_000 + ']' * 100_000 + '}\n')
    yield p/'deep.jsonl', 'line 1 of deep.jsonl is JSON that cannot be read: .*recursion'
    pq.write_table(pa.table({'content': ['a']}), p/'other.parquet')
    yield p/'other.parquet', "other.parquet has no string column 'text' .it has: content"
    pq.write_table(pa.table({'text': [1]}), p/'numbers.parquet')
    yield p/'numbers.parquet', "no string column 'text'"
    (p/'fake.parquet').write_bytes(b'PAR1 not really')
    yield p/'fake.parquet', 'fake.parquet is not a readable parquet file'
    (p/'empty.txt').write_text(' \n\n')
    yield p/'empty.txt', 'holds no text'
    (p/'empty.jsonl').write_text('')
    yield p/'empty.jsonl', 'holds no text'
    (p/'folder').mkdir()
    yield p/'folder', 'holds no .txt, .md, .jsonl, .parquet file'
    (p/'book.pdf').write_bytes(b'%PDF')
    yield p/'book.pdf', 'book.pdf is of a kind that cannot be read'
    yield p/'nowhere', 'there is no file or folder .*nowhere'
    yield 'climbmix', 'climbmix.*must be downloaded, and HF_HUB_OFFLINE forbids it; type: unset HF_HUB_OFFLINE'


def test_bad_input_is_a_sentence_and_writes_nothing(tmp_path, base_directory):
    for source, sentence in bad_sources(tmp_path):
        with pytest.raises(UserError, match=sentence): prepare_corpus(source)
    assert not (base_directory/'corpora').exists()


def test_errors_replace_reads_what_strict_refuses(tmp_path):
    (tmp_path/'latin.txt').write_bytes(b'abc caf\xe9 abc\n' * 50)
    (tmp_path/'s.jsonl').write_text('{"text": "a\\ud800b, some text"}\n')
    train, val = texts_of(prepare_corpus(tmp_path, errors='replace'))
    assert 'caf\ufffd' in ''.join(train + val) and 'a?b' in ''.join(train + val)


@pytest.mark.skipif(os.name == 'nt' or os.geteuid() == 0, reason='root can read everything')
def test_unreadable_file(stories):
    stories.chmod(0)
    with pytest.raises(UserError, match='cannot read .*stories.jsonl: Permission denied'): prepare_corpus(stories)


def test_file_that_vanishes_or_fails(stories, monkeypatch):
    def fails(path): raise PermissionError(13, 'Permission denied')
    monkeypatch.setattr(dataset, 'sha256_file', fails)
    with pytest.raises(UserError, match='cannot read .*stories.jsonl: Permission denied'): prepare_corpus(stories)


def test_full_disk(stories, base_directory, monkeypatch):
    usage = shutil.disk_usage(base_directory)
    monkeypatch.setattr(shutil, 'disk_usage', lambda p: usage._replace(free=100))
    with pytest.raises(UserError, match='of disk and only 100 B are free'): prepare_corpus(stories)
    assert not list(base_directory.rglob('*.parquet'))


def test_more_than_memory_is_refused_before_reading(stories, monkeypatch):
    monkeypatch.setattr(dataset, 'environment', lambda device: dict(ram_bytes=10_000))
    with pytest.raises(UserError, match='holds .* too much to be shuffled in 10 kB of memory; .*: python -m nanochat.dataset repackage .*stories.jsonl --out NAME'): prepare_corpus(stories)


def test_crash_while_writing_leaves_the_old_corpus(stories, monkeypatch):
    before = texts_of(prepare_corpus(stories))
    monkeypatch.setattr(dataset, 'write_shard', lambda path, texts: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt): prepare_corpus(stories, force=True)
    assert texts_of(open_corpus(stories)) == before and not list(open_corpus(stories).path.parent.glob('.*tmp'))


@pytest.mark.parametrize('kwargs, sentence', [(dict(max_bytes=0), 'max_bytes 0'), (dict(val_fraction=0.0), 'val_fraction 0.0'), (dict(val_fraction=1.5), 'between 0 and 1'), (dict(errors='guess'), "errors 'guess'")])
def test_bad_settings(stories, kwargs, sentence):
    with pytest.raises(UserError, match=sentence): prepare_corpus(stories, **kwargs)


def test_a_corpus_is_found_by_name_path_and_last_part(tmp_path, monkeypatch):
    for place in ('a', 'b'):
        (tmp_path/place/'texts').mkdir(parents=True)
        for i in range(9): (tmp_path/place/'texts'/f'{i}.txt').write_text(f'{place} says {i} ' * 20)
        (tmp_path/place/'texts'/'manifest.json').write_text('{}')  # the folder's own; it is none of ours
    first = prepare_corpus(tmp_path/'a'/'texts')
    monkeypatch.chdir(tmp_path)
    for name in (first.name, tmp_path/'a'/'texts', 'a/texts', './a/../a/texts', 'texts'): assert open_corpus(name).path == first.path, name
    monkeypatch.chdir(tmp_path/'b')  # here 'texts' is another folder
    with pytest.raises(UserError, match='no corpus'): open_corpus('texts')
    second = prepare_corpus('texts')
    assert open_corpus('texts').path == second.path != first.path
    monkeypatch.chdir(tmp_path)      # and here it could be either
    with pytest.raises(UserError, match='no corpus'): open_corpus('texts')
    with pytest.raises(UserError, match='no corpus'): open_corpus('tex')


def test_missing_corpus_names_the_command():
    with pytest.raises(UserError, match='run: python -m nanochat.dataset stdlib'): open_corpus('stdlib')
    with pytest.raises(UserError, match="unknown split 'test'"): dataset.Corpus('x', None, dict(shards=[])).shards('test')


def test_command_line(stories, base_directory):
    run = lambda *a: subprocess.run([sys.executable, '-m', 'nanochat.dataset', *a], capture_output=True, text=True)
    ok = run(str(stories), '--max-bytes', '3000')
    assert ok.returncode == 0, ok.stderr
    assert 'stories' in ok.stdout and list(base_directory.glob('corpora/stories-*/manifest.json'))
    bad = run('--source', str(stories) + 'x')
    assert bad.returncode == 2 and bad.stderr.startswith('error: there is no file or folder') and 'Traceback' not in bad.stderr


def test_real_web_shards(shared_data):
    corpus = prepare_corpus(shared_data/'hub'/'karpathy'/'climbmix-400b-shuffle', max_bytes=2_000_000)
    assert corpus.rows('train') > 100 and corpus.rows('val') > 0 and corpus.nbytes('train') < 2_000_000


# Repackaging --------------------------------------------------------------------------------------------------------

def shas(corpus): return [(s['file'], s['split'], s['sha256']) for s in corpus.manifest['shards']]


def test_repackaged_shards_have_the_hubs_shape(stories):
    corpus = repackage(RepackageConfig(str(stories), 'mine', shard_bytes=8000, row_group=16, val_fraction=.1))
    entries = corpus.manifest['shards']
    assert [s['file'] for s in entries] == [f'shard_{i:05d}.parquet' for i in range(len(entries))] and [s['split'] for s in entries] == ['train'] * (len(entries) - 1) + ['val']
    train, val = texts_of(corpus)
    assert sorted(train + val) == sorted(dataset.read_documents(stories)) and train != sorted(train)
    sizes = [s['bytes'] for s in entries[:-1]]
    assert max(sizes) < 8300 and min(sizes) > .7 * max(sizes) and .07 < entries[-1]['bytes'] / sum(s['bytes'] for s in entries) < .13
    f = pq.ParquetFile(corpus.shards('train')[0])
    assert f.schema_arrow.names == ['text'] and f.metadata.row_group(0).num_rows == 16
    assert open_corpus('mine').manifest == corpus.manifest and not corpus.damaged()


def test_repackaging_does_not_depend_on_memory_names_or_order_but_on_the_seed(tmp_path):
    texts = [f'text {i} ' + 'x' * (i % 300) for i in range(3000)]
    for k, (order, cuts) in enumerate(((texts, 3), (texts[::-1], 7))):
        (tmp_path/str(k)).mkdir()
        for c in range(cuts): write_jsonl(tmp_path/str(k)/f'{"ab"[k]}{c}.jsonl', order[c::cuts])
    make = lambda k, **how: repackage(RepackageConfig(str(tmp_path/str(k)), 'mine', shard_bytes=100_000, force=True, **how))
    first = shas(make(0))
    assert shas(make(1)) == first and shas(make(0, memory=1_000_000)) == first and len(first) > 4
    assert [s[2] for s in shas(make(0, seed=1))] != [s[2] for s in first]
    few = dataset.Buckets(tmp_path/'b', 500, 10_000)  # far more buckets than a source of this size gets
    for t in texts: few.add(dataset.document_key(t, b'nanochat 0 '), t)
    few.flush()
    assert list(few) == sum(texts_of(make(0)), [])


def test_repackaging_any_source_and_leaving_copies_out(tmp_path):
    folder = tmp_path/'mixed'; folder.mkdir()
    (folder/'a.txt').write_text('Ελληνικά κείμενα'); (folder/'copy.md').write_text('Ελληνικά κείμενα'); (folder/'blank.txt').write_text(' \n')
    (folder/'b.jsonl').write_text('{"body": "日本語", "n": 1}\n')
    pq.write_table(pa.table({'n': [1, 2], 'body': ['हिन्दी', None]}), folder/'c.parquet')
    corpus = repackage(RepackageConfig(str(folder), 'mixed', column='body', val_fraction=.3))
    assert sorted(sum(texts_of(corpus), [])) == sorted(['Ελληνικά κείμενα', '日本語', 'हिन्दी']) and corpus.rows('val') >= 1 <= corpus.rows('train')


def test_repackaging_recognises_what_it_made(stories):
    first = repackage(RepackageConfig(str(stories), 'mine'))
    stamp = os.stat(first.path/'manifest.json').st_ino
    repackage(RepackageConfig(str(stories), 'mine', memory=2_000_000))
    assert os.stat(first.path/'manifest.json').st_ino == stamp
    assert repackage(RepackageConfig(str(stories), 'mine', seed=3)).manifest['seed'] == 3


def test_repackaging_takes_bounded_memory(tmp_path):
    """Thirty megabytes of text with two to work in: what Python holds at its worst stays far below the text."""
    for k in range(6): pq.write_table(pa.table({'text': [f'{k} {i} ' + os.urandom(1000).hex() for i in range(2500)]}), tmp_path/f'{k}.parquet', row_group_size=200)
    tracemalloc.start()
    corpus = repackage(RepackageConfig(str(tmp_path), 'big', memory=2_000_000, shard_bytes=2_000_000, row_group=100))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert corpus.nbytes('train') + corpus.nbytes('val') > 30_000_000 and peak < 12_000_000, f'{peak:,}'


@pytest.mark.parametrize('change, sentence', [
    (dict(out='climbmix'), "'climbmix' cannot be the name of a new corpus"), (dict(out='../x'), 'cannot be the name'), (dict(out=''), 'cannot be the name'),
    (dict(memory=10), 'memory 10 is too small; leave out --memory'), (dict(row_group=0), 'leave out --row-group'), (dict(val_fraction=0.), 'val_fraction 0.0'),
    (dict(column='body'), "line 1 of stories.jsonl has no text: expected an object with a string field 'body', found text"),
    (dict(source='nowhere.txt'), "there is no file or folder 'nowhere.txt'")])
def test_repackaging_what_cannot_be(stories, base_directory, change, sentence):
    with pytest.raises(UserError, match=sentence): repackage(RepackageConfig(**{**dict(source=str(stories), out='mine'), **change}))
    assert not list(base_directory.rglob('*.parquet')) and not list(base_directory.rglob('.buckets'))


def test_repackaging_one_document_or_torn_files(tmp_path):
    (tmp_path/'one.txt').write_text('only one')
    with pytest.raises(UserError, match='holds 1 different documents, too few to hold one out'): repackage(RepackageConfig(str(tmp_path/'one.txt'), 'mine'))
    (tmp_path/'torn.parquet').write_bytes(b'PAR1 torn')
    with pytest.raises(UserError, match='torn.parquet is not a readable parquet file'): repackage(RepackageConfig(str(tmp_path), 'mine'))


def test_repackaging_that_fails_leaves_the_old_corpus(stories, monkeypatch):
    before = shas(repackage(RepackageConfig(str(stories), 'mine')))
    monkeypatch.setattr(dataset, 'write_shard', lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt): repackage(RepackageConfig(str(stories), 'mine', force=True))
    assert shas(open_corpus('mine')) == before and not [p for p in open_corpus('mine').path.parent.iterdir() if p.name.startswith('.')]


def test_repackaging_the_real_shards(shared_data, base_directory):
    done = subprocess.run([sys.executable, '-m', 'nanochat.dataset', 'repackage', str(shared_data/'hub'/'karpathy'/'climbmix-400b-shuffle'), '--out', 'web', '--shard-bytes', '4000000'], capture_output=True, text=True)
    assert done.returncode == 0 and 'web val:' in done.stdout, done.stderr
    corpus = open_corpus('web')
    assert corpus.rows('train') + corpus.rows('val') == 3092 and 4 <= len(corpus.shards('train')) <= 5 and corpus.rows('val') > 20


def test_a_torn_manifest_is_a_sentence(tmp_path, monkeypatch):
    """And preparing the corpus again replaces it."""
    monkeypatch.setenv('NANOCHAT_BASE_DIR', str(tmp_path/'base'))
    (tmp_path/'poems.txt').write_text('a rose is a rose\n' * 50)
    corpus = prepare_corpus(tmp_path/'poems.txt')
    (corpus.path/'manifest.json').write_text('{"name": "poe')
    with pytest.raises(UserError, match='manifest.json .* is damaged .*; remove .* and run: python -m nanochat.dataset'): open_corpus(corpus.name)
    assert prepare_corpus(tmp_path/'poems.txt').documents('train')
    assert open_corpus(corpus.name).manifest == corpus.manifest
