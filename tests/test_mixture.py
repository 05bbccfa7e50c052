"""What fine-tuning trains on: every part in its size, and the same parts, other items, held out."""
import dataclasses

import pytest

from nanochat.common import UserError
from nanochat.scripts import chat_sft as sft, mid_train as mt
from nanochat.tasks.common import completion_text
from nanochat.tasks.customjson import identity_conversations

NONE = dict(dict.fromkeys(mt.SIZES, 0), identity=0)
HEADS = {'spelling_bee': ".count('", 'simple_spelling': 'e', 'arithmetic': '<|python_start|>', 'arithmetic_stories': '<|python_start|>'}  # in some answer of the part


def asked(task): return [c['messages'][-2]['content'] for c in task]


def test_the_sizes_that_were_chosen():
    wanted = dict(spelling_bee=12000, simple_spelling=6000, arithmetic=6000, arithmetic_stories=300, pydoc_name=8000, pydoc_pick=4000, pydoc_choice=0, pydoc=1500)
    for config in (sft.ChatSFTConfig(), mt.MidTrainConfig()):
        assert {name: getattr(config, name) for name in mt.SIZES} == wanted and config.identity == 2
        assert not set(mt.SIZES) & set(mt.INCIDENTAL)  # another mixture is another run
    assert len(mt.mixture(mt.TuneConfig())) == sum(wanted.values()) + 2 * len(identity_conversations())


@pytest.mark.parametrize('name', mt.SIZES)
def test_every_part_is_trained_and_watched(name):
    """One part alone: its size counts, its held-out items are of its kind and none of them is trained on."""
    cfg = mt.TuneConfig(**NONE | {name: 60}, eval_size=20)
    train, test = mt.mixture(cfg), mt.held_out(cfg)
    assert len(train) == 60 and len(test) == 20 and not set(asked(train)) & set(asked(test))
    form = lambda c: (type(c['messages'][-1]['content']), 'choices' in c, 'letters' in c, len(c['messages']))
    assert {form(c) for c in train} == {form(c) for c in test} and len({form(c) for c in train}) == 1
    assert all(HEADS.get(name, '') in ''.join(map(completion_text, t)) for t in (train, test))
    assert ('choices' in train[0], 'letters' in train[0]) == (name in ('pydoc_name', 'pydoc_pick'), name == 'pydoc_choice')
    assert (' has ' in asked(train)[0]) == (name == 'arithmetic_stories')


def test_validation_covers_what_is_trained_and_nothing_else():
    sizes = {name: 7 + n for n, name in enumerate(mt.SIZES)}
    cfg = mt.TuneConfig(**sizes, identity=0, eval_size=5)
    assert len(mt.mixture(cfg)) == sum(sizes.values()) and len(mt.held_out(cfg)) == 5 * len(sizes)
    assert len(mt.held_out(dataclasses.replace(cfg, pydoc_choice=0, arithmetic=0))) == 5 * (len(sizes) - 2)
    of = lambda tasks: {(t.__class__, getattr(t, 'kind', None), getattr(t, 'level', None)) for t in tasks}
    assert of(mt.watched_parts(mt.items_of(cfg), 5)) == of(mt.make_parts(mt.items_of(cfg))) and {t.split for t in mt.watched_parts(mt.items_of(cfg), 5)} == {'test'}


def test_some_are_asked_without_quotes():
    counted = asked(mt.mixture(mt.TuneConfig(**NONE | dict(spelling_bee=400))))
    assert 80 < sum("'" not in q for q in counted) < 170


def test_identity_is_repeated_and_the_order_is_the_seeds():
    cfg = mt.TuneConfig(**NONE | dict(identity=3, arithmetic=50))
    once = asked(mt.mixture(cfg))
    assert len(once) == 50 + 3 * len(identity_conversations()) and once == asked(mt.mixture(cfg))
    other = asked(mt.mixture(dataclasses.replace(cfg, seed=1)))
    assert other != once and sorted(other) == sorted(once)


def test_empty_and_negative_sizes_are_refused():
    with pytest.raises(UserError, match='mixture is empty'): mt.mixture(mt.TuneConfig(**NONE))
    with pytest.raises(UserError, match='--pydoc-name 0'): mt.mixture(mt.TuneConfig(**NONE | dict(pydoc_name=-5)))


def test_the_shuffle_is_pinned():
    """The order of a mixture is the shuffle of all (task, index) pairs by the seed, in every process, and takes four bytes per conversation."""
    import random
    from nanochat.tasks.arithmetic import Arithmetic
    from nanochat.tasks.common import TaskMixture
    from nanochat.tasks.spellingbee import SimpleSpelling
    tasks = [Arithmetic(9), SimpleSpelling(5), Arithmetic(9), SimpleSpelling(5, start=2)]
    pairs = [(t, i) for t, task in enumerate(tasks) for i in range(len(task))]
    random.Random(7).shuffle(pairs)
    mixture = TaskMixture(tasks, seed=7)
    assert [*mixture] == [tasks[t][i] for t, i in pairs] and mixture.order.nbytes == 4 * len(pairs)
    assert TaskMixture([Arithmetic(6)], seed=42).order.tolist() == [3, 1, 2, 4, 0, 5], 'as on the day it was written'
