"""Known wrong answers of assignment 1: for each exercise, what students do, the change to the master that does it, and a phrase of the hint they must read.

A change is (old, new), made in the source of the master."""

WRONG = {
    1: [('jumps over a pair it has counted', ('return dict(Counter(pairwise(ids)))', '''counts, i = {}, 0
    while i + 1 < len(ids):
        pair = ids[i], ids[i + 1]
        counts[pair] = counts.get(pair, 0) + 1
        i += 2 if pair[0] == pair[1] else 1
    return counts'''), 'jump over both halves'),
        ('forgets the order within a pair', ('return dict(Counter(pairwise(ids)))', 'return dict(Counter(tuple(sorted(p)) for p in pairwise(ids)))'), '(1, 2) is not (2, 1)'),
        ('wraps around at the end', ('return dict(Counter(pairwise(ids)))', 'return dict(Counter((ids[i - 1], ids[i]) for i in range(len(ids))))'), 'something that is not there')],
    2: [('works in the list it was given', ('out, i = [], 0', '''i = 0
    while i + 1 < len(ids):
        if (ids[i], ids[i + 1]) == pair: ids[i:i + 2] = [new]
        i += 1
    return ids
    out, i = [], 0'''), 'delete from the list'),
        ('forgets the last id', ('while i < len(ids):\n        if i + 1 < len(ids) and', 'while i < len(ids) - 1:\n        if'), 'the last included'),
        ('uses an id twice', ('out.append(new)\n            i += 2', 'out.append(new)\n            i += 1 if pair[0] == pair[1] and i + 2 < len(ids) and ids[i + 2] == pair[0] else 2'), 'cannot be half of the next pair'),
        ('merges either order', ('(ids[i], ids[i + 1]) == pair', 'set((ids[i], ids[i + 1])) == set(pair)'), 'everything else stays in place')],
    3: [('counts once, before the first merge', ('counts = count_pairs(ids)\n', 'counts = {p: n for p, n in count_pairs(list(data)).items() if p not in merges}\n'), 'Count again after every merge'),
        ('leaves ties to chance', ('min(counts, key=lambda p: (-counts[p], p))', 'max(counts, key=counts.get)'), 'the smallest wins'),
        ('numbers merges from 0', ('merges[pair] = new', 'merges[pair] = new - 256'), 'numbered from 256'),
        ('never stops early', ('if not counts or max(counts.values()) < 2: break', 'if not counts: break'), 'when no pair occurs twice')],
    4: [('takes the first pair in the text', ("pair = min(pairwise(ids), key=lambda p: merges.get(p, float('inf')))", 'pair = next((p for p in pairwise(ids) if p in merges), (-1, -1))'), 'learned first'),
        ('one pass only', ('    ids = list(data)\n    while len(ids) > 1:', '    ids = list(data)\n    for _ in range(min(1, len(ids) - 1)):'), 'until no pair'),
        ('decodes token by token', ("return b''.join(token[i] for i in ids).decode('utf8', errors='replace')", "return ''.join(token[i].decode('utf8', errors='replace') for i in ids)"), 'Join all bytes first'),
        ('does not unfold tokens of tokens', ('token[new] = token[a] + token[b]', 'token[new] = bytes([a % 256]) + bytes([b % 256])'), 'unfold it down to bytes')],
    5: [('the slow way again', ('ids, n = list(data), len(data)', 'return encode(data, merges)\n    ids, n = list(data), len(data)'), 'Look those two up and no others'),
        ('forgets the left neighbour', ('push(left[i])\n        push(i)', 'push(i)'), 'both new neighbours'),
        ('keeps outdated pairs', ('if ids[i] != a or j >= n or ids[j] != b: continue', 'if ids[i] is None or j >= n: continue'), 'outdated pairs'),
        ('takes equal ranks from the right', ('''(new, i, ids[i], ids[right[i]]))

    for i in range(n): push(i)
    while heap:
        new, i, a, b = heapq.heappop(heap)
''', '''(new, -i, ids[i], ids[right[i]]))

    for i in range(n): push(i)
    while heap:
        new, i, a, b = heapq.heappop(heap)
        i = -i
'''), 'the left one is merged first')],
}
