"""Tests of assignment 1, byte-pair encoding. Each is worth points and guards against one misunderstanding, which its docstring names."""
from collections import Counter
from itertools import pairwise

import pytest

from nanochat.grade import Counted

TITLE = 'Byte-pair encoding'
EXERCISES = {1: 'Count pairs', 2: 'Merge a pair', 3: 'Train', 4: 'Encode and decode', 5: 'Encode with few look-ups'}

SEEDS = 'the cat sat on the mat; the hat sat on the cat. '


def replaced(ids, pair, new):
    """The reference for merge: a greedy scan from the left, on a string with one character per id."""
    text, a, b = ''.join(map(chr, ids)), *map(chr, pair)
    out, i = [], 0
    while i < len(text):
        hit = text.startswith(a + b, i)
        out.append(new if hit else ord(text[i]))
        i += 1 + hit
    return out


def by_brute_force(data, merges):
    """The reference for encode: one pass over the whole text for each merge, in the order of learning."""
    ids = list(data)
    for pair, new in sorted(merges.items(), key=lambda item: item[1]): ids = replaced(ids, pair, new)
    return ids


def learned(data, n):
    """The reference for train."""
    ids, merges = list(data), {}
    for new in range(256, 256 + n):
        counts = Counter(pairwise(ids))
        if not counts or max(counts.values()) < 2: break
        best = min(counts, key=lambda p: (-counts[p], p))
        merges[best] = new
        ids = replaced(ids, best, new)
    return merges


def sentence(rng, n):
    """n bytes of random words, in which learned merges really apply."""
    return ' '.join(rng.choice(SEEDS.split()) for _ in range(n)).encode()[:n]


# 1. Count pairs
@pytest.mark.points(1, exercise=1)
def test_neighbours(student, rng):
    "A pair is two neighbours in their order: (1, 2) is not (2, 1), and 1, 2, 3 holds (1, 2) and (2, 3)."
    ids = [rng.randrange(4) for _ in range(50)]
    assert student.count_pairs([1, 2, 3, 1, 2]) == {(1, 2): 2, (2, 3): 1, (3, 1): 1}
    assert student.count_pairs(ids) == dict(Counter(pairwise(ids)))


@pytest.mark.points(1, exercise=1)
def test_overlapping_pairs(student):
    "Three equal ids in a row hold the pair twice. Do you jump over both halves of a pair once it is counted?"
    assert student.count_pairs([5, 5, 5]) == {(5, 5): 2}


@pytest.mark.points(1, exercise=1)
def test_short_texts(student):
    "A text of one id, or of none, has no pairs: is the last id taken together with something that is not there?"
    assert student.count_pairs([7]) == {} and student.count_pairs([]) == {} and student.count_pairs([7, 8]) == {(7, 8): 1}


# 2. Merge a pair
@pytest.mark.points(1, exercise=2)
def test_merges_everywhere(student, rng):
    "Every occurrence is replaced, the first and the last included, and everything else stays in place."
    assert student.merge([1, 2, 9, 1, 2, 1, 2], (1, 2), 300) == [300, 9, 300, 300]
    ids = [rng.randrange(3) for _ in range(60)]
    assert student.merge([3, *ids], (1, 0), 256) == replaced([3, *ids], (1, 0), 256)


@pytest.mark.points(1, exercise=2)
def test_merges_from_the_left(student):
    "In 5 5 5 the first two join and the third stays: an id that was used up cannot be half of the next pair."
    assert student.merge([5, 5, 5], (5, 5), 256) == [256, 5]
    assert student.merge([5, 5, 5, 5], (5, 5), 256) == [256, 256]


@pytest.mark.points(1, exercise=2)
def test_merge_leaves_its_input_alone(student):
    "merge returns a new list; the caller still needs the old one. Do you delete from the list you were given?"
    reply = student.request('merge', [1, 2, 3], (1, 2), 256, after=True)
    assert reply.value == [256, 3] and reply.after[0] == [1, 2, 3]


# 3. Train
@pytest.mark.points(2, exercise=3)
def test_train(student):
    "Count again after every merge: the second merge is chosen from the shortened text, where new pairs have appeared."
    data = SEEDS.encode() * 2
    assert student.train(data, 12) == learned(data, 12)


@pytest.mark.points(1, exercise=3)
def test_train_ties(student):
    "Among pairs of equal count the smallest wins. max() keeps the first it meets, which depends on the order of the text."
    data = b'zyzy-abab-'
    assert student.train(data, 3) == learned(data, 3)


@pytest.mark.points(1, exercise=3)
def test_train_numbers(student):
    "The first 256 ids are the bytes themselves; merges are numbered from 256 on, one after the other."
    assert list(student.train(SEEDS.encode(), 5).values()) == [256, 257, 258, 259, 260]


@pytest.mark.points(1, exercise=3)
def test_train_stops(student):
    "A pair that occurs once shortens nothing. Training ends when no pair occurs twice, however many merges were asked for."
    assert student.train(b'abcabc', 10) == learned(b'abcabc', 10) and student.train(b'', 3) == {}


# 4. Encode and decode
@pytest.mark.points(2, exercise=4)
def test_encode(student):
    "Apply the merge that was learned first, not the one that comes first in the text or occurs most often in it."
    merges = {(98, 99): 256, (97, 98): 257, (256, 100): 258, (257, 256): 259}
    for text in (b'abcd', b'ababcd', b'bcdab', b'aabbcc'): assert student.encode(text, merges) == by_brute_force(text, merges)


@pytest.mark.points(1, exercise=4)
def test_encode_until_nothing_is_left(student):
    "Merges build on merges: go on until no pair of the text is in the table, and stop there."
    merges = {(97, 97): 256, (256, 256): 257, (257, 257): 258}
    assert student.encode(b'a' * 15, merges) == by_brute_force(b'a' * 15, merges) and student.encode(b'xyz', merges) == [120, 121, 122]


@pytest.mark.points(2, exercise=4)
def test_decode(student, rng):
    "A token stands for the bytes of its two halves, which may be tokens themselves: unfold it down to bytes."
    data = SEEDS.encode()
    merges = learned(data, 20)
    text = sentence(rng, 60)
    assert student.decode(by_brute_force(text, merges), merges) == text.decode()


@pytest.mark.points(1, exercise=4)
def test_decode_half_a_character(student):
    "A token may end in the middle of a character. Join all bytes first, decode once, and let errors='replace' mark what is no UTF-8."
    merges = {(195, 182): 256}
    assert student.decode([104, 256, 195], merges) == 'hö\ufffd' and student.decode([195, 182], merges) == 'ö'


# 5. Encode with few look-ups
@pytest.mark.points(2, exercise=5)
def test_fast_agrees(student, rng):
    "The fast encoder gives exactly what the slow one gives. After a merge, are both new neighbours considered, and are outdated pairs passed over?"
    data = SEEDS.encode()
    merges = learned(data, 25)
    for n in (0, 1, 2, 40, 90):
        text = sentence(rng, n)
        assert student.encode_fast(text, merges) == by_brute_force(text, merges)
    rivals = {(98, 99): 256, (97, 98): 257, (99, 97): 258}
    for text in (b'abcab', b'bcabca'): assert student.encode_fast(text, rivals) == by_brute_force(text, rivals)


@pytest.mark.points(1, exercise=5)
def test_fast_from_the_left(student):
    "Of two places with the same rank the left one is merged first; put the position behind the rank in the heap's entries."
    merges = {(97, 97): 256, (97, 98): 257}
    assert student.encode_fast(b'aaab' * 3, merges) == by_brute_force(b'aaab' * 3, merges)


@pytest.mark.points(2, exercise=5)
def test_fast_looks_up_little(student, rng):
    "A merge changes two pairs. Look those two up and no others: about three look-ups per byte, not one pass per merge."
    data = SEEDS.encode()
    merges, text = learned(data, 25), sentence(rng, 600)
    reply = student.request('encode_fast', text, Counted(merges))
    assert reply.value == by_brute_force(text, merges)
    assert 0 < reply.asked <= 4 * len(text), f'{reply.asked} look-ups for {len(text)} bytes'
