"""Known wrong answers of assignment 4: for each exercise, what students do, the change to the master that does it, and a phrase of the hint they must read."""

BEST = 'return max(fitting, key=lambda i: (waiting[i], -i), default=None)'
REFILL = '''            while len(waiting) < buffer_size and not ended:
                length = read(n)
                if length is None: ended = True
                else: waiting[n], n = length, n + 1
'''
WRONG = {
    1: [('first fit', (BEST, 'return fitting[0] if fitting else None'), 'not the first that fits'),
        ('strictly smaller', ('if n <= room]', 'if n < room]'), 'exactly as long as the room'),
        ('last of equals', ('(waiting[i], -i)', '(waiting[i], i)'), 'the first that came goes first'),
        ('index 0 is none', (BEST, 'return max(fitting, key=lambda i: (waiting[i], -i), default=None) or None'), 'would take it for none')],
    2: [('the room stays', ('at = best_fit([left[i] for i in numbers], room)\n        i = min(left,', 'at = best_fit([left[i] for i in numbers], capacity)\n        i = min(left,'), 'look again for what fits'),
        ('crops the longest', ('i = min(left, key=lambda i: (left[i], i)) if', 'i = max(left, key=lambda i: (left[i], i)) if'), 'the shortest is cropped'),
        ('does not crop', ('        i = min(left, key=lambda i: (left[i], i)) if at is None else numbers[at]', '        if at is None: break\n        i = numbers[at]'), 'the shortest is cropped'),
        ('empties the list it was given', ('left, room, row = dict(enumerate(waiting)), capacity, []', 'left, room, row = dict(enumerate(waiting)), capacity, []\n    waiting.clear()'), "the caller's list is gone"),
        ('indices of what is left', ('row.append((i, min(left.pop(i), room)))', 'row.append((list(left).index(i), min(left.pop(i), room)))'), 'they shift')],
    3: [('forgets what was left over', ("        room, row = capacity, []\n        while room:\n            while", "        room, row = capacity, []\n        if rows: waiting.clear()\n        while room:\n            while"), 'wait for the next'),
        ('fills before each row only', ('        room, row = capacity, []\n        while room:\n' + REFILL, '        room, row = capacity, []\n' + REFILL.replace('\n    ', '\n')[4:] + '        while room:\n'), 'before each placement'),
        ('reads everything first', ('while len(waiting) < buffer_size and not ended:\n                length = read(n)', 'while (n < 400 or len(waiting) < buffer_size) and not ended:\n                length = read(n)'), 'none before it is needed'),
        ('asks beyond the end', ('if length is None: ended = True', 'if length is None:\n                    for _ in range(20): read(n)\n                    break'), 'asking again and again'),
        ('empty rows at the end', ('        if not row: break\n', ''), 'no empty rows')],
    4: [('forgets those that wait', ('return dict(next=self.next, waiting=list(self.waiting))', 'return dict(next=self.next, waiting=[])'), 'part of the state'),
        ('starts over and skips', ("state = state or dict(next=0, waiting=[])\n", "for i in range(state['next'] if state else 0): read(i)\n        state = state or dict(next=0, waiting=[])\n"), 'from the beginning'),
        ('fails at the end', ('if not self.waiting: break', "if not self.waiting: raise StopIteration"), 'does not fail'),
        ('state takes the buffer away', ('        return dict(next=self.next, waiting=list(self.waiting))', '        waiting = list(self.waiting)\n        self.waiting.clear()\n        return dict(next=self.next, waiting=waiting)'), 'leaves the packer as it was'),
        ('remembers all rows', ('return dict(next=self.next, waiting=list(self.waiting))', 'return dict(next=self.next, waiting=list(self.waiting), seen=list(range(self.next)))'), 'nor the state grow')],
}
