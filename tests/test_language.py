"""Nothing assumes English: the stages of the pipeline on German and Chinese text, made by the grammar of lesson 1b."""
import json, math, re
from pathlib import Path

import pytest

from nanochat.dataset import prepare_corpus
from nanochat.tokenizer import RustBPETokenizer, StreamDecoder

LESSON = Path(__file__).resolve().parents[1]/'lessons'/'01b_another_language.ipynb'


@pytest.fixture(scope='module')
def grammar():
    """The lesson's own cells that make text: those that begin with `# grammar`."""
    import random
    names = dict(random=random)
    for c in json.loads(LESSON.read_text(encoding='utf8'))['cells']:
        if c['cell_type'] == 'code' and ''.join(c['source']).startswith('# grammar'): exec(''.join(c['source']), names)
    return names


def in_words(number, n): return {number(i): i for i in range(n)}


def test_numbers_have_one_name_each(grammar):
    for number in (grammar['german_number'], grammar['chinese_number']): assert len(in_words(number, 1000)) == 1000
    assert grammar['german_number'](121) == 'einhunderteinundzwanzig' and grammar['chinese_number'](219) == '二百一十九'


def test_what_the_grammar_says_is_true(grammar):
    """Sums, stories, dates and prices are right; otherwise a model could not learn them."""
    import random
    rng = random.Random(3)
    german, chinese = in_words(grammar['german_number'], 1000), in_words(grammar['chinese_number'], 1000) | {'两': 2}
    for _ in range(300):
        a, b, c = (german[w] for w in re.fullmatch(r'(\w+) plus (\w+) ist (\w+)\.', grammar['german_sum'](rng).lower()).groups())
        assert a + b == c
        a, b, c = (german[w] for w in re.findall(r'\w+', grammar['german_story'](rng)) if w in german)
        assert c in (a + b, a - b) and c >= 2
        each, n, all_ = re.search(r'kostet (\S+) Euro, (\w+) Kilo kosten (\S+) Euro', grammar['german_price'](rng)).groups()
        assert round(float(each.replace(',', '.')) * german[n], 2) == float(all_.replace(',', '.'))
        a, b, c = (chinese[w] for w in re.fullmatch('(.+)加(.+)等于(.+)。', grammar['chinese_sum'](rng)).groups())
        assert a + b == c
        a, b, c = (chinese[w] for w in re.findall('[两一二三四五六七八九十百零]+(?=[个本张支把块])', grammar['chinese_story'](rng)))
        assert c in (a + b, a - b) and c >= 2
        first, then = re.findall('星期(.)', grammar['chinese_calendar'](rng))
        assert '一二三四五六日一'['一二三四五六日'.index(first) + 1] == then


@pytest.mark.parametrize('language', ['Deutsch', '中文'])
def test_pipeline(language, grammar, tmp_path, base_directory):
    """Folder to corpus to tokenizer to model, under a name in that language; the text comes back and the loss falls."""
    from nanochat.scripts.base_train import BaseTrainConfig, base_train
    from nanochat.scripts.tok_train import TokTrainConfig, tok_train
    documents = grammar['written'](language, 150)
    folder = tmp_path/f'texte {language}'
    folder.mkdir()
    (folder/f'{language}.jsonl').write_text('\n'.join(json.dumps({'text': t}, ensure_ascii=False) for t in documents[:75]), encoding='utf8')
    for i, t in enumerate(documents[75:]): (folder/f'{i}.txt').write_text(t, encoding='utf8')
    corpus = prepare_corpus(folder, val_fraction=.1)
    assert sorted([*corpus.documents('train'), *corpus.documents('val')]) == sorted(documents)

    made = tok_train(TokTrainConfig(corpus=str(folder), vocab_size=500))
    tok = RustBPETokenizer.from_directory(base_directory/'tokenizer')
    assert made['bytes_per_token'] > 1.8
    for text in documents:
        ids, stream = tok.encode(text), StreamDecoder(tok)
        assert tok.decode(ids) == text == ''.join(map(stream.push, ids)) + stream.flush()
        assert tok.hf.encode(text, add_special_tokens=False).ids == ids
    chat = {'messages': [{'role': 'user', 'content': documents[0][:40]}, {'role': 'assistant', 'content': documents[1][:40]}]}
    ids, mask = tok.render_conversation(chat)
    learned = tok.decode([i for i, m in zip(ids, mask) if m])
    assert learned == documents[1][:40] + '<|assistant_end|>'

    result = base_train(BaseTrainConfig(depth=1, corpus=str(folder), num_iterations=25, sequence_len=64, device_batch_size=8, total_batch_size=512,
                                        eval_tokens=2048, eval_every=-1, save_every=-1))
    assert result['val_bpb'] < .8 * math.log2(tok.get_vocab_size()) / made['bytes_per_token']


@pytest.mark.parametrize('text', ['Straße', 'l\u2019été', '١٢٣', '४२', 'e\u0301', '🇩🇪👩‍🔬', 'שלום', '\u200b\ufeff', '𝔘', 'नमस्ते', '１２３'])
def test_every_script_comes_back(text, grammar):
    tok = RustBPETokenizer.train_from_iterator(grammar['written']('中文', 5), 300)
    assert tok.decode(tok.encode(text)) == text
