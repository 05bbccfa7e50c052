"""Known wrong answers of assignment 6: for each exercise, what students do, the change to the master that does it, and a phrase of the hint they must read."""

WRONG = {
    1: [('bos before each turn', ("""add([special[f"<|{m['role']}_start|>"]], 0)""", """if m['role'] == 'user' and len(ids) > 1: add([special['<|bos|>']], 0)
        add([special[f"<|{m['role']}_start|>"]], 0)"""), 'at the very beginning'),
        ('learns everything', ("add(encode(m['content'] if learn else system + m['content']), learn)", "add(encode(m['content'] if learn else system + m['content']), 1)"), "not the user's text"),
        ('never learns to stop', ("""_end|>"]], learn)""", """_end|>"]], 0)"""), 'it would never stop'),
        ('learns the start mark', ("""_start|>"]], 0)""", """_start|>"]], learn)"""), 'its start mark is not'),
        ('system before every user', ("        system = ''\n    return", "    return"), 'and only there'),
        ('merges in place', ("            system = m['content'] + '\\n\\n'", "            system = m['content'] + '\\n\\n'\n            m['content'] = ''"), 'the messages themselves stay'),
        ('no empty line', ("m['content'] + '\\n\\n'", "m['content'] + '\\n'"), 'with an empty line between'),
        ('encodes the system alone', ("add(encode(m['content'] if learn else system + m['content']), learn)", "add((encode(system) if system and not learn else []) + encode(m['content']), learn)"), 'as one text to encode')],
    2: [('learns the output', ("int(part['type'] != 'python_output')", '1'), 'make up results'),
        ('learns text only', ("int(part['type'] != 'python_output')", "int(part['type'] == 'text')"), 'itself writes the call'),
        ('python marks for outputs', ("'python_output': 'output'", "'python_output': 'python'"), '<|output_start|> and <|output_end|>'),
        ('marks around text', ("marks = {'text': None,", "marks = {'text': 'output',"), 'plain text has no marks')],
    3: [('no shift', ('targets = [i if m else -1 for i, m in zip(ids[1:], mask[1:])]', 'targets = [i if m else -1 for i, m in zip(ids[:-1], mask[1:])]'), 'repeat what it reads'),
        ("the input's mask", ('zip(ids[1:], mask[1:])', 'zip(ids[1:], mask)'), 'not that of the input'),
        ('fills targets with pad', ('targets + [-1] * fill', 'targets + [pad] * fill'), 'nothing is learned there'),
        ('cuts to T ids', ('ids, mask = ids[:T + 1], mask[:T + 1]', 'ids, mask = ids[:T], mask[:T]'), 'one target would be lost'),
        ('does not cut', ('ids, mask = ids[:T + 1], mask[:T + 1]', 'ids, mask = ids, mask'), 'rows would differ in length')],
    4: [('log base 2', ('return -(chosen * counted).sum()', 'return -(chosen * counted).sum() / 0.6931'), 'in nats'),
        ('divides by B T', ('counted.sum().clamp(min=1)', 'counted.numel()'), 'not by B * T'),
        ('row by row', ('return -(chosen * counted).sum() / counted.sum().clamp(min=1)', 'return -((chosen * counted).sum(1) / counted.sum(1).clamp(min=1)).mean()'), 'not row by row'),
        ('-1 as an index', ('return -(chosen * counted).sum() / counted.sum().clamp(min=1)', 'chosen = logp.gather(-1, (targets % logits.shape[-1]).unsqueeze(-1)).squeeze(-1)\n    return -chosen.mean()'), 'is no index'),
        ('mean over nothing', ('counted.sum().clamp(min=1)', 'counted.sum()'), 'mean over nothing'),
        ('log of softmax', ('logits.log_softmax(dim=-1)', 'logits.softmax(dim=-1).log()'), 'use log_softmax')],
}
