"""Tests of assignment 6, conversations: renderings written out by hand, and PyTorch's cross entropy."""
import pytest
import torch
import torch.nn.functional as F

TITLE = 'Conversations'
EXERCISES = {1: 'Render a conversation', 2: 'Tool calls', 3: 'Rows and targets', 4: 'The masked loss'}
SPECIAL = {f'<|{name}|>': 1000 + i for i, name in enumerate('bos user_start user_end assistant_start assistant_end python_start python_end output_start output_end'.split())}
BOS, US, UE, AS, AE, PS, PE, OS, OE = range(1000, 1009)


def encode(text): return [ord(c) for c in text]
def pairs(text): return [sum(map(ord, text[i:i + 2])) for i in range(0, len(text), 2)]
def user(text): return dict(role='user', content=text)
def assistant(text): return dict(role='assistant', content=text)


CHAT = [user('ab'), assistant('cde'), user('f'), assistant('g')]
IDS = [BOS, US, *encode('ab'), UE, AS, *encode('cde'), AE, US, *encode('f'), UE, AS, *encode('g'), AE]
MASK = [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1]


def normal(rng, *shape):
    """Normal numbers that depend on the seed of the grading."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(rng.randrange(2**40)))


# 1. Render a conversation
@pytest.mark.points(2, exercise=1)
def test_ids(student):
    "One <|bos|> at the very beginning, then each turn between its own start and end marks; nothing between turns."
    assert list(student.render(CHAT, encode, SPECIAL)[0]) == IDS


@pytest.mark.points(1, exercise=1)
def test_mask_of_text(student):
    "Only what the assistant says is learned: not the user's text, and not <|bos|>. Ids and mask have one length."
    ids, mask = student.render(CHAT, encode, SPECIAL)
    assert len(ids) == len(mask) and [m for i, m in zip(ids, mask) if i < 1000] == [0, 0, 1, 1, 1, 0, 1] and mask[0] == 0


@pytest.mark.points(1, exercise=1)
def test_mask_of_marks(student):
    "The assistant's end mark is learned, or it would never stop; its start mark is not: the program writes that one. The user's marks are not learned either."
    ids, mask = student.render(CHAT, encode, SPECIAL)
    assert [m for i, m in zip(ids, mask) if i in (AS, AE)] == [0, 1, 0, 1] and not any(m for i, m in zip(ids, mask) if i in (US, UE))


@pytest.mark.points(2, exercise=1)
def test_system(student):
    "The system's text goes in front of the first user's, with an empty line between, as one text to encode, and only there; the messages themselves stay as they are."
    messages = [dict(role='system', content='S'), *CHAT]
    reply = student.request('render', messages, encode, SPECIAL, after=True)
    ids, mask = reply.value
    assert list(ids) == [BOS, US, *encode('S\n\nab'), *IDS[4:]] and list(mask) == [0] * 3 + MASK and reply.after[0] == messages
    assert list(student.render(messages, pairs, SPECIAL)[0])[2:5] == pairs('S\n\nab'), 'the system text was encoded by itself'


# 2. Tool calls
PARTS = [dict(type='text', text='is '), dict(type='python', text='6*7'), dict(type='python_output', text='42'), dict(type='text', text='so')]


@pytest.mark.points(2, exercise=2)
def test_parts(student):
    "A call stands between <|python_start|> and <|python_end|>, its output between <|output_start|> and <|output_end|>; plain text has no marks."
    assert list(student.render_parts(PARTS, encode, SPECIAL)[0]) == [*encode('is '), PS, *encode('6*7'), PE, OS, *encode('42'), OE, *encode('so')]


@pytest.mark.points(1, exercise=2)
def test_output_is_not_learned(student):
    "What the tool answered is not learned, its marks included: otherwise the model learns to make up results."
    ids, mask = student.render_parts(PARTS, encode, SPECIAL)
    at = list(ids).index(OS)
    assert len(mask) == len(ids) and list(mask[at:at + 4]) == [0, 0, 0, 0]


@pytest.mark.points(1, exercise=2)
def test_call_is_learned(student):
    "The model itself writes the call and both of its marks, and the text before and after: all of that is learned."
    ids, mask = student.render_parts(PARTS, encode, SPECIAL)
    assert list(mask[:8]) == [1] * 8 and list(mask[-2:]) == [1, 1]


# 3. Rows and targets
@pytest.mark.points(2, exercise=3)
def test_shift(student):
    "The target of position t is id t + 1; with inputs and targets alike, the model would learn to repeat what it reads."
    inputs, targets = student.to_row([9, 4, 5, 6, 7, 8], [1] * 6, 5, 0)
    assert list(inputs) == [9, 4, 5, 6, 7] and list(targets) == [4, 5, 6, 7, 8]


@pytest.mark.points(1, exercise=3)
def test_mask_belongs_to_targets(student):
    "The mask of a target decides, not that of the input at the same position: ask what is predicted, not what is read."
    assert list(student.to_row([9, 4, 5, 6, 7, 8], [0, 0, 1, 1, 0, 0], 5, 0)[1]) == [-1, 5, 6, -1, -1]


@pytest.mark.points(1, exercise=3)
def test_fill(student):
    "Short rows are filled to T positions: inputs with pad, targets with -1, so that nothing is learned there."
    assert tuple(map(list, student.to_row([9, 4, 5, 6], [0, 0, 1, 1], 5, 3))) == ([9, 4, 5, 3, 3], [-1, 5, 6, -1, -1])


@pytest.mark.points(1, exercise=3)
def test_cut(student):
    "Cut to T + 1 ids: with T ids only, one target would be lost and padded; with more, rows would differ in length."
    assert tuple(map(list, student.to_row(list(range(10, 20)), [1] * 10, 4, 0))) == ([10, 11, 12, 13], [11, 12, 13, 14])


# 4. The masked loss
def example(rng):
    """Logits and targets, half of them masked, one of each kind at least."""
    logits = 3 * normal(rng, 2, 5, 7)
    targets = torch.tensor([[-1, rng.randrange(7), -1, rng.randrange(7), 6], [-1, -1, -1, rng.randrange(6), -1]])
    return logits, targets


def reference(logits, targets): return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


def near(a, b, tolerance=1e-4):
    a = float(a)
    if not abs(a - float(b)) <= tolerance: raise AssertionError(f'{a:.5f} instead of {float(b):.5f}')
    return True


@pytest.mark.points(1, exercise=4)
def test_loss_of_all(student, rng):
    "The loss is minus the logarithm of the target's probability, in nats; the softmax runs over the vocabulary."
    logits, targets = normal(rng, 2, 3, 5), torch.tensor([[0, 1, 2], [3, 4, 0]])
    assert near(student.masked_loss(logits, targets), reference(logits, targets))


@pytest.mark.points(1, exercise=4)
def test_mean_over_counted(student, rng):
    "Divide by the number of positions that count, over the whole batch; not by B * T, and not row by row."
    logits, targets = example(rng)
    assert near(student.masked_loss(logits, targets), reference(logits, targets))


@pytest.mark.points(1, exercise=4)
def test_gradient_of_masked(student, rng):
    "A target of -1 is no index: positions without a target must not get any gradient, and the others that of cross entropy."
    logits, targets = example(rng)
    got = student.request('masked_loss', logits, targets, grad=[0]).grads[0]
    mine = logits.clone().requires_grad_()
    reference(mine, targets).backward()
    assert torch.allclose(got, mine.grad, atol=1e-5)


@pytest.mark.points(1, exercise=4)
def test_nothing_to_learn(student, rng):
    "A batch without targets has the loss 0: the mean over nothing would be nan."
    assert near(student.masked_loss(normal(rng, 1, 3, 4), torch.full((1, 3), -1)), 0)


@pytest.mark.points(1, exercise=4)
def test_large_logits(student):
    "exp(1000) is infinite, and log(0) too: use log_softmax instead of the logarithm of a softmax."
    logits = torch.tensor([[[1000.0, 0.0, -1000.0], [0.0, 500.0, 0.0]]])
    assert near(student.masked_loss(logits, torch.tensor([[0, 0]])), 250)
