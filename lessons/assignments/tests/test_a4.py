"""Tests of assignment 4, packing: against a plain simulation, with every read of a document counted."""
import json

import pytest

TITLE = 'Rows from documents'
EXERCISES = {1: 'The largest that fits', 2: 'Fill a row', 3: 'A stream with a buffer', 4: 'Stop and go on'}


def simulated(lengths, capacity, buffer_size):
    """The reference: all rows, document by document, with sorted lists."""
    coming, waiting, rows = list(enumerate(lengths)), [], []
    while coming or waiting:
        row, room = [], capacity
        while room:
            while coming and len(waiting) < buffer_size: waiting.append(coming.pop(0))
            if not waiting: break
            fitting = sorted((d for d in waiting if d[1] <= room), key=lambda d: (-d[1], d[0]))
            chosen = fitting[0] if fitting else sorted(waiting, key=lambda d: (d[1], d[0]))[0]
            waiting.remove(chosen)
            row.append((chosen[0], min(chosen[1], room)))
            room -= row[-1][1]
        if row: rows.append(row)
    return rows


class Disk:
    """Lengths behind a function that counts how it is asked."""
    def __init__(self, lengths): self.lengths, self.asked = lengths, []
    def __call__(self, i):
        self.asked.append(i)
        return self.lengths[i] if i < len(self.lengths) else None


def some(rng, n, most=14): return [rng.randint(1, most) for _ in range(n)]


# 1. The largest that fits
@pytest.mark.points(1, exercise=1)
def test_largest(student, rng):
    "The largest of those that fit: not the first that fits, and not the largest of all."
    assert student.best_fit([2, 5, 9, 3], 7) == 1
    for _ in range(5):
        waiting = rng.sample(range(1, 40), 8)
        fitting = [n for n in waiting if n <= 20]
        assert student.best_fit(waiting, 20) == (waiting.index(max(fitting)) if fitting else None)


@pytest.mark.points(1, exercise=1)
def test_exact_fit(student):
    "A document exactly as long as the room fits; one token more does not. With nothing that fits, or nothing waiting, the answer is None."
    assert student.best_fit([4, 6], 6) == 1 and student.best_fit([7, 8], 6) is None and student.best_fit([], 6) is None


@pytest.mark.points(1, exercise=1)
def test_first_of_equals(student):
    "Of equal lengths the first that came goes first. And index 0 is an answer: `if index` would take it for none."
    assert student.best_fit([6, 3, 6], 6) == 0 and student.best_fit([1, 5, 5, 5], 6) == 1


# 2. Fill a row
@pytest.mark.points(2, exercise=2)
def test_fill(student):
    "After each placement the room is smaller: look again for what fits now, among those that have not been placed."
    assert student.fill_row([4, 7, 3, 5], 10) == [(1, 7), (2, 3)] and student.fill_row([5, 5, 5], 10) == [(0, 5), (1, 5)]
    assert student.fill_row([4, 3], 10) == [(0, 4), (1, 3)] and student.fill_row([], 10) == []


@pytest.mark.points(2, exercise=2)
def test_crop(student, rng):
    "When nothing fits, the shortest is cropped to exactly the room that is left: it loses least, and the row is full."
    assert student.fill_row([4, 7, 8, 5], 10) == [(2, 8), (0, 2)] and student.fill_row([12, 30], 10) == [(0, 10)] and student.fill_row([30, 12, 12], 10) == [(1, 10)]
    for _ in range(5):
        waiting = some(rng, 9)
        assert student.fill_row(waiting, 20) == simulated(waiting, 20, 99)[0]


@pytest.mark.points(1, exercise=2)
def test_fill_leaves_waiting_alone(student):
    "The indices are those of the list you were given. If you remove from it while you place, they shift, and the caller's list is gone."
    reply = student.request('fill_row', [3, 4, 2, 1], 10, after=True)
    assert reply.after[0] == [3, 4, 2, 1] and reply.value == [(1, 4), (0, 3), (2, 2), (3, 1)]


# 3. A stream with a buffer
@pytest.mark.points(2, exercise=3)
def test_stream(student, rng):
    "Documents left over from one row wait for the next, in front of those read later. Every document is used once, under its own number."
    lengths = some(rng, 30)
    for buffer_size in (1, 4, 100): assert student.pack(Disk(lengths), 16, buffer_size, 999) == simulated(lengths, 16, buffer_size)


@pytest.mark.points(1, exercise=3)
def test_refill_before_each_placement(student):
    "Fill the buffer before each placement, not only before each row: the document that fits may have just come."
    assert student.pack(Disk([6, 5, 4, 3]), 10, 2, 1) == [[(0, 6), (2, 4)]]


@pytest.mark.points(1, exercise=3)
def test_reads_once(student, rng):
    "Read each document once and in order, and none before it is needed: for three rows only a few are."
    disk = Disk(some(rng, 500))
    rows = student.pack(disk, 16, 4, 3)
    placed = sum(map(len, rows))
    assert rows == simulated(disk.lengths, 16, 4)[:3] and disk.asked == list(range(len(disk.asked))), f'documents were read in the order {disk.asked[:12]}'
    assert len(disk.asked) <= placed + 4, f'{len(disk.asked)} reads for {placed} placements and a buffer of 4'


@pytest.mark.points(1, exercise=3)
def test_stream_ends(student):
    "The last row may be short, and after it nothing comes: no empty rows, no asking again and again for a document that is not there."
    disk = Disk([3, 3])
    assert student.pack(disk, 10, 4, 5) == [[(0, 3), (1, 3)]] and student.pack(Disk([]), 10, 4, 5) == []
    assert len(disk.asked) <= 5, f'{len(disk.asked)} reads of 2 documents'


# 4. Stop and go on
def rows_of(packer, n): return [packer.row() for _ in range(n)]


@pytest.mark.points(1, exercise=4)
def test_packer(student, rng):
    "Row by row the same as pack. After the last document row() goes on to return empty rows; it does not fail, and does not wait."
    lengths = some(rng, 20)
    rows = simulated(lengths, 16, 5)
    assert rows_of(student.Packer(Disk(lengths), 16, 5), len(rows) + 2) == rows + [[], []]


@pytest.mark.points(2, exercise=4)
def test_resume(student, rng):
    "Documents that wait in the buffer are part of the state, in the order in which they came: leave them out and they are never seen, or start over and some are seen twice."
    lengths = some(rng, 40)
    rows = simulated(lengths, 16, 6)
    for stop in (0, 1, 4, len(rows)):
        packer = student.Packer(Disk(lengths), 16, 6)
        assert rows_of(packer, stop) == rows[:stop]
        assert rows_of(student.Packer(Disk(lengths), 16, 6, json.loads(json.dumps(packer.state()))), len(rows) - stop + 1) == rows[stop:] + [[]]


@pytest.mark.points(1, exercise=4)
def test_state_between_rows(student, rng):
    "Taking a state, or going on from one, leaves the packer as it was: asked twice it says the same, and the next row is not affected."
    lengths = some(rng, 40)
    rows, packer = simulated(lengths, 16, 6), student.Packer(Disk(lengths), 16, 6)
    rows_of(packer, 2)
    state = packer.state()
    assert packer.state() == state and rows_of(packer, 3) == rows[2:5]
    assert rows_of(student.Packer(Disk(lengths), 16, 6, state), 2) == rows[2:4] and packer.row() == rows[5]


@pytest.mark.points(1, exercise=4)
def test_state_is_small(student, rng):
    "Going on must not read the corpus from the beginning, nor the state grow with the rows: the next number and those that wait are enough."
    lengths = some(rng, 400)
    rows, packer = simulated(lengths, 16, 4), student.Packer(Disk(lengths), 16, 4)
    rows_of(packer, 100)
    state, disk = packer.state(), Disk(lengths)
    assert student.Packer(disk, 16, 4, state).row() == rows[100]
    assert len(json.dumps(state)) < 200 and len(disk.asked) <= 4 + 4 + len(rows[100]), f'a state of {len(json.dumps(state))} characters, {len(disk.asked)} reads'
