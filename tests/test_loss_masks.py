"""What fine-tuning learns, token by token, against conversations that were marked by hand: a dropped mask would look like a normal loss curve."""
import dataclasses
import json

import pytest
import torch

from nanochat.dataloader import chat_data_loader
from nanochat.tasks.common import assistant, user
from nanochat.tasks.customjson import ConversationList
from nanochat.tokenizer import RustBPETokenizer

# Every entry is a piece of the rendered conversation and whether it is learned. Written by hand from the format's description, not by any code.
NO, YES = 0, 1
MERGED = {'messages': [{'role': 'system', 'content': 'Be brief.'}, user('What is 12*7?'),
                       assistant([{'type': 'text', 'text': 'Let me see. '}, {'type': 'python', 'text': '12*7'}, {'type': 'python_output', 'text': '84'}, {'type': 'text', 'text': 'It is 84.'}]),
                       user('And 2+2?'), assistant('4')]}
MERGED_MARKED = [
    ('<|bos|>', NO), ('<|user_start|>', NO), ('Be brief.\n\nWhat is 12*7?', NO), ('<|user_end|>', NO),
    ('<|assistant_start|>', NO), ('Let me see. ', YES), ('<|python_start|>', YES), ('12*7', YES), ('<|python_end|>', YES),
    ('<|output_start|>', NO), ('84', NO), ('<|output_end|>', NO), ('It is 84.', YES), ('<|assistant_end|>', YES),
    ('<|user_start|>', NO), ('And 2+2?', NO), ('<|user_end|>', NO), ('<|assistant_start|>', NO), ('4', YES), ('<|assistant_end|>', YES)]
PLAIN = {'messages': [user('Hi!'), assistant('Hello, you.')]}
PLAIN_MARKED = [('<|bos|>', NO), ('<|user_start|>', NO), ('Hi!', NO), ('<|user_end|>', NO), ('<|assistant_start|>', NO), ('Hello, you.', YES), ('<|assistant_end|>', YES)]
TWO_CALLS = {'messages': [user('Twice'), assistant([{'type': 'python', 'text': '1+1'}, {'type': 'python_output', 'text': '2'}, {'type': 'python', 'text': '2+2'}, {'type': 'python_output', 'text': '4'}])]}
TWO_CALLS_MARKED = [
    ('<|bos|>', NO), ('<|user_start|>', NO), ('Twice', NO), ('<|user_end|>', NO), ('<|assistant_start|>', NO),
    ('<|python_start|>', YES), ('1+1', YES), ('<|python_end|>', YES), ('<|output_start|>', NO), ('2', NO), ('<|output_end|>', NO),
    ('<|python_start|>', YES), ('2+2', YES), ('<|python_end|>', YES), ('<|output_start|>', NO), ('4', NO), ('<|output_end|>', NO), ('<|assistant_end|>', YES)]
PAIRS = [(MERGED, MERGED_MARKED), (PLAIN, PLAIN_MARKED), (TWO_CALLS, TWO_CALLS_MARKED)]

# The same, character by character: with a tokenizer of single bytes each character is a token, and what is learned stands below it.
LETTERS = RustBPETokenizer.train_from_iterator(['x'], 265)
WORDS = RustBPETokenizer.train_from_iterator(['Let me see. It is. What is it? Hello, you. Be brief. Let me see it. It is brief. Twice'] * 3, 300)
SHORT = {'<|bos|>': '⊢', '<|user_start|>': '{', '<|user_end|>': '}', '<|assistant_start|>': '[', '<|assistant_end|>': ']', '<|python_start|>': '«', '<|python_end|>': '»', '<|output_start|>': '‹', '<|output_end|>': '›'}
BY_LETTER = [
    ('⊢{Be brief.  What is 12*7?}[Let me see. «12*7»‹84›It is 84.]{And 2+2?}[4]',
     '                            ^^^^^^^^^^^^^^^^^^    ^^^^^^^^^^           ^^', MERGED),
    ('⊢{Hi!}[Hello, you.]',
     '       ^^^^^^^^^^^^', PLAIN),
    ('⊢{Twice}[«1+1»‹2›«2+2»‹4›]',
     '         ^^^^^   ^^^^^   ^', TWO_CALLS)]


def hand_marked(tok, marked):
    """Ids and masks of hand-marked pieces."""
    ids, mask = [], []
    for text, learned in marked:
        piece = [tok.encode_special(text)] if text.startswith('<|') else tok.encode(text)
        ids, mask = ids + piece, mask + [learned] * len(piece)
    return ids, mask


def check_rendering(tok):
    """Raise AssertionError unless every hand-marked conversation is rendered as it was marked, whole and cut at every length."""
    for conversation, marked in PAIRS:
        ids, mask = hand_marked(tok, marked)
        assert tok.render_conversation(conversation) == (ids, mask)
        for n in range(1, len(ids) + 2): assert tok.render_conversation(conversation, max_tokens=n) == (ids[:n], mask[:n])


@pytest.mark.parametrize('tok', [LETTERS, WORDS], ids=['bytes', 'merges'])
def test_rendering_is_what_was_marked_by_hand(tok):
    check_rendering(tok)


@pytest.mark.parametrize('text, marks, conversation', BY_LETTER, ids=['merged', 'plain', 'two calls'])
def test_every_single_token(text, marks, conversation):
    ids, mask = LETTERS.render_conversation(conversation)
    shown = ''.join(SHORT.get(t) or t.replace('\n', ' ') for t in map(LETTERS.id_to_token, ids))
    assert shown == text and [m == '^' for m in marks.ljust(len(text))] == [bool(m) for m in mask]


def expected_targets(x, known):
    """Targets of one row of inputs, from the hand-marked conversations in it: `known` maps ids to masks. Padding is BOS after BOS."""
    bos, y, t = LETTERS.get_bos_token_id(), [-1] * len(x), 0
    while t < len(x):
        end = next((i for i in range(t + 1, len(x)) if x[i] == bos), len(x))
        piece = tuple(x[t:end])
        fits = [ids for ids in known if ids[:len(piece)] == piece and (len(ids) == len(piece) or (end == len(x) and len(ids) == len(piece) + 1))]  # a row's last token is a target only
        assert fits or set(piece) == {bos}, 'something that is no conversation'
        for i, (token, learned) in enumerate(zip(fits[0], known[fits[0]]) if fits else ()):
            if learned and i: y[t + i - 1] = token
        t = end
    return y


def check_batches(loader, tok, T, batches=6):
    """Raise AssertionError unless every target of the loader's batches is the one that the hand marks say, and -1 where they say nothing."""
    known = {tuple(ids[:T + 1]): mask[:T + 1] for ids, mask in (hand_marked(tok, marked) for _, marked in PAIRS)}
    learned = 0
    for _, (x, y, _) in zip(range(batches), loader):
        for xs, ys in zip(x.tolist(), y.tolist()): assert ys == expected_targets(xs, known)
        learned += int((y >= 0).sum())
    assert learned, 'nothing was learned at all'


@pytest.mark.parametrize('T', [200, 90, 72, 40, 19])
def test_packed_batches_carry_exactly_these_masks(T):
    """Rows with several conversations, with one, and rows that cut one short."""
    task = ConversationList([c for c, _ in PAIRS] * 3)
    check_batches(chat_data_loader(LETTERS, task, 3, T, seed=T), LETTERS, T)


def sft_loader(tok, monkeypatch, base, **settings):
    """The loader that the fine-tuning stage itself trains from, on the hand-marked conversations given as a file."""
    from nanochat.checkpoint_manager import init_run, run_dir, save_checkpoint
    from nanochat.gpt import GPT, GPTConfig
    from nanochat.scripts import chat_sft as sft, mid_train as mt
    (base/'marked.jsonl').write_text(''.join(json.dumps(c['messages']) + '\n' for c, _ in PAIRS))
    config = GPTConfig(sequence_len=96, vocab_size=tok.get_vocab_size(), n_layer=1, n_head=1, n_kv_head=1, n_embd=32, window_pattern='L')
    with torch.device('meta'): model = GPT(config)
    model.to_empty(device='cpu')
    model.init_weights()
    save_checkpoint(init_run(run_dir('base', 'd1'), {}, tok), 1, model, model.setup_optimizer(), dict(model_config=dataclasses.asdict(config), device_batch_size=2))
    jobs = []
    monkeypatch.setattr(mt, 'run_job', lambda job, *a, **k: jobs.append(job) or 1 / 0)
    with pytest.raises(ZeroDivisionError): sft.chat_sft(sft.ChatSFTConfig(mixture=f"{base/'marked.jsonl'}*4", num_iterations=3, device='cpu', **settings))
    return jobs[0].loader(None)


def test_fine_tuning_trains_on_exactly_these_masks(monkeypatch, tmp_path):
    check_batches(sft_loader(LETTERS, monkeypatch, tmp_path), LETTERS, 96)


# --- the checks themselves: each must fail when the mask is wrong ---------------------------------------------------------

def dropped(ids, mask): return ids, [1] * len(ids)
def with_outputs(ids, mask):
    """Learns what the calculator says: inventing results instead of asking for them."""
    start, end = (LETTERS.encode_special(f'<|output_{w}|>') for w in ('start', 'end'))
    inside, out = False, []
    for t, m in zip(ids, mask):
        inside = inside or t == start
        out.append(1 if inside else m)
        if t == end: inside = False
    return ids, out
def late(ids, mask): return ids, [0, *mask[:-1]]
def early(ids, mask): return ids, [*mask[1:], 0]
def without_the_end(ids, mask): return ids, [m and t != LETTERS.encode_special('<|assistant_end|>') for t, m in zip(ids, mask)]
def swapped(ids, mask): return ids, [1 - m for m in mask]


@pytest.mark.parametrize('wrong', [dropped, with_outputs, late, early, without_the_end, swapped])
def test_a_wrong_mask_is_noticed(wrong, monkeypatch, tmp_path):
    render = RustBPETokenizer.render_conversation
    monkeypatch.setattr(RustBPETokenizer, 'render_conversation', lambda self, c, max_tokens=2048: wrong(*render(self, c, max_tokens)))
    with pytest.raises(AssertionError): check_rendering(LETTERS)
    with pytest.raises(AssertionError): check_batches(chat_data_loader(LETTERS, ConversationList([c for c, _ in PAIRS]), 2, 90), LETTERS, 90)
    with pytest.raises(AssertionError): check_batches(sft_loader(LETTERS, monkeypatch, tmp_path), LETTERS, 96)


def test_a_stage_that_trains_on_everything_is_noticed(monkeypatch, tmp_path):
    """The mask dropped where the stage is defined, not where it is made: `loss_on='all'` is mid-training's."""
    from nanochat.scripts import chat_sft as sft
    monkeypatch.setattr(sft, 'SFT', dataclasses.replace(sft.SFT, loss_on='all'))
    with pytest.raises(AssertionError): check_batches(sft_loader(LETTERS, monkeypatch, tmp_path), LETTERS, 96)
    with pytest.raises(AssertionError): check_batches(chat_data_loader(LETTERS, ConversationList([c for c, _ in PAIRS]), 2, 90, loss_on='all'), LETTERS, 90)
