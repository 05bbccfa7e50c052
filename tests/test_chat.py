"""From tokens to messages and back: typed parts, whole characters, old turns that leave first, limits to the token."""
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from nanochat.chat import Answer, Sampling, progress_line, prompt_ids, reply, trimmed_note, with_answer, with_question, without_last
from nanochat.common import UserError
from nanochat.demo import bubbles

sys.path.insert(0, str(Path(__file__).parent))
from chat_actor import Parrot, make_tokenizer

TEXTS = ['plain', 'naïve café', '你好，世界', 'مرحبا بالعالم', '🦜🦜🏳️‍🌈 done', 'def f(x):\n\treturn x', '']


@pytest.fixture(scope='module')
def tok(): return make_tokenizer()


def ids_of(tok, *pieces): return [i for p in pieces for i in ([tok.encode_special(p)] if p.startswith('<|') else tok.encode(p))]


@pytest.mark.parametrize('text', TEXTS)
def test_pieces_joined_are_the_text(tok, text):
    answer = Answer(tok)
    pieces = [answer.push(i).piece[1] for i in ids_of(tok, text, '<|assistant_end|>')]
    assert ''.join(pieces) == text and answer.done
    assert '\ufffd' not in ''.join(pieces)
    assert answer.parts == ([{'type': 'text', 'text': text}] if text else [])


@pytest.mark.parametrize('before', TEXTS)
def test_tool_calls_become_parts_and_render_back(tok, before):
    """What the model wrote, put back into the conversation, is the same ids."""
    ids = ids_of(tok, before, '<|python_start|>', "'你好'.count('好')", '<|python_end|>', '<|output_start|>', '1', '<|output_end|>', 'So 1.', '<|assistant_end|>')
    answer = Answer(tok)
    for i in ids: answer.push(i)
    assert [p['type'] for p in answer.parts] == ['text'] * bool(before) + ['python', 'python_output', 'text']
    talk = with_answer(with_question([], 'q'), answer)
    assert tok.render_conversation({'messages': talk})[0][-len(ids):] == ids
    more = with_question(talk, 'next')
    assert tok.render_for_completion({'messages': more})[:len(tok.render_conversation({'messages': talk})[0])] == tok.render_conversation({'messages': talk})[0]


def test_marks_in_any_order_never_fail(tok):
    """An untrained model may say anything; the parts hold what was said, and rendering them back works."""
    import random
    rng, marks = random.Random(0), [tok.encode_special(t) for t in tok.get_special_tokens() if t not in ('<|bos|>', '<|assistant_end|>')]
    for _ in range(200):
        answer = Answer(tok)
        for _ in range(40): answer.push(rng.choice(marks) if rng.random() < .3 else rng.randrange(256))
        talk = with_answer(with_question([], 'q'), answer.finish())
        tok.render_conversation({'messages': talk})
        bubbles(talk)
        assert not answer.done and answer.tokens == 40


def test_old_turns_go_first_and_the_system_message_stays(tok):
    talk = [{'role': 'system', 'content': 'SYSTEM'}]
    for n in range(20): talk += [{'role': 'user', 'content': f'question {n} '}, {'role': 'assistant', 'content': f'answer {n}'}]
    talk.append({'role': 'user', 'content': 'last'})
    whole = len(tok.render_for_completion({'messages': talk}))
    assert prompt_ids(tok, talk, whole + 64) == (tok.render_for_completion({'messages': talk}), 0)
    seen = set()
    for limit in [*range(100, whole + 64, 7), whole + 63, whole + 64]:
        ids, dropped = prompt_ids(tok, talk, limit)
        text = tok.decode(ids)
        assert len(ids) + min(64, limit//2) <= limit and dropped % 2 == 0 and 'SYSTEM' in text and 'last' in text
        assert text.count('question') == 20 - dropped//2
        seen.add(dropped)
    assert {0, 2} < seen
    with pytest.raises(UserError, match='shorten'): prompt_ids(tok, talk, 20)
    with pytest.raises(UserError, match='nothing to answer'): prompt_ids(tok, [], 20)


def quadratic(tok, messages, limit, reserve=64):
    """`prompt_ids` in the plain way: render, drop a pair, render again."""
    head, turns = (messages[:1], messages[1:]) if messages and messages[0]['role'] == 'system' else ([], messages)
    reserve = min(reserve, limit // 2)
    for dropped in range(0, len(turns), 2):
        ids = tok.render_for_completion({'messages': head + turns[dropped:]})
        if len(ids) + reserve <= limit: return ids, dropped
    if not turns: raise UserError('there is nothing to answer; add a user message')
    raise UserError(f'this message takes {len(ids)} tokens, and the model reads at most {limit - reserve}; please shorten it')


def outcome(fn, *args):
    try: return fn(*args)
    except UserError as e: return str(e)


TOK = make_tokenizer()
SAYINGS = st.lists(st.sampled_from(['the quick ', 'x', '\n', '\n\n', ' ', '===', '.\n\n', '🦜', '7', '\r\n', '\t ']), max_size=8).map(''.join)
PARTS = st.lists(st.builds(dict, type=st.sampled_from(['text', 'python', 'python_output']), text=SAYINGS), max_size=3)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(SAYINGS, SAYINGS | PARTS), max_size=9), SAYINGS | st.none(), SAYINGS | st.none(), st.integers(1, 200), st.integers(1, 64), st.integers(0, 30))
def test_trimming_is_that_of_the_plain_way(pairs, last, system, limit, reserve, wrong):
    """Ids, dropped turns and errors are those of rendering again and again, for well-formed and malformed conversations."""
    talk = [{'role': r, 'content': c} for pair in pairs for r, c in zip(('user', 'assistant'), pair)]
    if last is not None: talk.append({'role': 'user', 'content': last})
    if wrong < len(talk) and wrong % 5 == 0: talk[wrong]['role'] = 'user'
    if system is not None: talk.insert(0, {'role': 'system', 'content': system})
    assert outcome(prompt_ids, TOK, talk, limit, reserve) == outcome(quadratic, TOK, talk, limit, reserve)


def test_trimming_reads_each_turn_a_few_times_only(tok, monkeypatch):
    """499 messages of 64 characters, with a long system message: what is encoded is a small multiple of the conversation, not 250 times."""
    for length, limit in ((0, 256), (0, 4096), (6000, 8000), (6000, 6700)):
        talk = [{'role': 'system', 'content': 'be kind ' * (length // 8)}] + [{'role': ('user', 'assistant')[i % 2], 'content': 'héé ' * 16} for i in range(499)]
        read, ids = 0, type(tok)._ids
        def counted(self, text):
            nonlocal read
            read += len(text)
            return ids(self, text)
        with monkeypatch.context() as m:
            m.setattr(type(tok), '_ids', counted)
            _, dropped = prompt_ids(tok, talk, limit)
        assert dropped > 300 and read < 6 * sum(len(m['content']) for m in talk), (length, limit, read)


def test_reply_never_exceeds_the_context(tok):
    asked = {}
    class Spy(Parrot):
        def generate(self, tokens, max_tokens=None, **kw):
            asked.update(n=len(tokens), max_tokens=max_tokens, **kw)
            return super().generate(tokens, max_tokens, **kw)
    engine = Spy(tok, delay=0, repeat=1)
    engine.model.config.sequence_len = 100
    list(reply(engine, with_question([], 'fox'), Sampling(max_tokens=10_000, top_k=0, temperature=0)))
    assert asked['n'] + asked['max_tokens'] == 100 and asked['top_k'] is None and asked['temperature'] == 0


def test_conversation_functions():
    talk = with_question([], 'a', ' be kind ')
    assert talk[0] == {'role': 'system', 'content': 'be kind'}
    assert [m['content'] for m in with_question(talk + [{'role': 'assistant', 'content': 'x'}], 'b', 'be brief')] == ['be brief', 'a', 'x', 'b']
    assert without_last([]) == ([], '') and without_last(talk) == (talk[:1], 'a')


def talk_of(tok, turns, last='last'):
    """A conversation of `turns` pairs with a question at the end."""
    talk = []
    for n in range(turns): talk += [{'role': 'user', 'content': f'question {n} '}, {'role': 'assistant', 'content': f'answer {n}'}]
    return [*talk, {'role': 'user', 'content': last}]


@pytest.mark.parametrize('spare, dropped', [(1, 0), (0, 0), (-1, 2)])
def test_the_context_to_the_token(tok, spare, dropped):
    """With room for exactly the conversation and the reserve everything stays; with one token less the oldest pair goes."""
    talk = talk_of(tok, 5)
    whole = len(tok.render_for_completion({'messages': talk}))
    ids, gone = prompt_ids(tok, talk, limit=whole + 64 + spare)
    assert gone == dropped and (len(ids) == whole) == (dropped == 0)


@pytest.mark.parametrize('spare', [1, 0, -1])
def test_one_message_to_the_token(tok, spare):
    """A message alone that leaves exactly the reserve is read; one token more is a sentence with both numbers."""
    limit = 200
    shortest = len(tok.render_for_completion({'messages': [{'role': 'user', 'content': ''}]}))
    text = 'z' * (limit - 64 - shortest - spare)
    assert len(tok.encode(text)) == len(text)
    talk = talk_of(tok, 3, text)
    if spare >= 0:
        ids, dropped = prompt_ids(tok, talk, limit)
        assert len(ids) == limit - 64 - spare and dropped == 6
    else:
        with pytest.raises(UserError, match=f'takes {limit - 63} tokens.* at most {limit - 64}'): prompt_ids(tok, talk, limit)


def test_an_answer_may_fill_the_context_and_no_more(tok):
    engine = Parrot(tok, delay=0, limit=150)
    *_, answer = reply(engine, with_question([], 'fox'), Sampling(max_tokens=10_000))
    assert answer.prompt_tokens + answer.tokens == 150 and not answer.done
    assert progress_line(answer).endswith('context 150/150')
    for n in (1, 2, 149 - answer.prompt_tokens):
        *_, answer = reply(engine, with_question([], 'fox'), Sampling(max_tokens=n))
        assert answer.tokens == n


def test_what_the_reader_is_told(tok):
    answer = Answer(tok)
    answer.push(tok.encode('a')[0])
    assert progress_line(answer, 1) == '1 token' and trimmed_note(answer) == ''
    for i in tok.encode('zzzz'): answer.push(i)
    answer.prompt_tokens, answer.dropped, answer.limit = 40, 4, 1024
    assert progress_line(answer, 2) == '5 tokens · 2 tokens/s · context 45/1024'
    assert trimmed_note(answer).startswith('4 earlier turns no longer fit into the 1,024 tokens')


def test_settings_reach_the_engine(tok):
    seen = {}
    class Spy(Parrot):
        def generate(self, tokens, **settings):
            seen.update(settings)
            yield [tok.encode_special('<|assistant_end|>')], [1]
    list(reply(Spy(tok), with_question([], 'fox'), Sampling(0.7, 0, 9, 33, 0.8)))
    assert seen == dict(temperature=0.7, top_k=None, seed=9, max_tokens=33, top_p=0.8)
