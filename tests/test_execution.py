"""The calculator: right where it answers, silent where it should not, fast whatever it is given."""
import random
import string
import time
import warnings

import pytest

from nanochat.execution import MAX_BITS, MAX_CHARS, use_calculator


@pytest.mark.parametrize('text, value', [
    ('12*7', 84), ('1,000', 1000), ('1,234,567 + 1', 1234568), (' 2 + 2 ', 4), ('-3', -3), ('+3', 3), ('--3', 3), ('2-(-3)', 5),
    ('7/2', 3.5), ('6/2', 3.0), ('7//2', 3), ('-7//2', -4), ('17 % 5', 2), ('2**10', 1024), ('2**-1', 0.5), ('2**3**2', 512), ('(1+2)*3', 9),
    ('0.1+0.2', 0.1 + 0.2), ('.5*2', 1.0), ('3.', 3.0), ('9**99', 9**99), ('4**0.5', 2.0),
    ("'strawberry'.count('r')", 3), ('"strawberry".count("r")', 3), (" 'strawberry'.count('r')", 3), ("'banana'.count('an')", 2),
    ("'Zürich'.count('ü')", 1), ('"don\'t".count("t")', 1), ("'abc'.count('z')", 0), ("2 * 'banana'.count('a')", 6),
])
def test_values(text, value):
    result = use_calculator(text)
    assert result == value and type(result) is type(value)


ATTACKS = [
    # powers and sizes that would eat the machine
    '9**9**9', '9**9**9**9', '2**2**2**2**2**2', '9**-9**9**9', '(-9)**(9**9)', '10**400', '2**1100', '9**99**9', '(9**300)**300', '2**99999999',
    '*'.join(['9**99'] * 60), '9' * 499, '9' * 10_000, '1' * 499 + '**9', '9.9**999', '1.0/0', '0**-1', '1%0', '1//0', '(-8)**0.5', '9**300*1.5*9**300',
    "'1'*10**9", "10**9*'1'", "'a'.count('a'*10**9)", "('a'*10**9).count('a')", "'a'.count('a')**9**9**9", "'%999999999d'%1", "'{:999999999}'.format(1)",
    # nesting
    '(' * 400, '(' * 250 + '1' + ')' * 249, '(' * 5000 + '1' + ')' * 5000, '[' * 400, '-' * 10_000 + '1', '((((1', '1+' * 300, '~' * 90 + '1', '{' * 90,
    # names, attributes, calls
    'x', 'True', 'None', 'inf', 'nan', '1j', 'abs(-1)', 'print(1)', 'exit()', 'open("/etc/passwd")', '__import__("os").system("id")', 'eval("1")',
    '().__class__.__base__.__subclasses__()', "''.__class__", "'a'.__class__", "'a'.__len__()", "'a'.upper()", "'a'.count", "'a'.count.__self__", "'a'.count('a').real",
    "'a'.count('a', 0)", "'a'.count(*'a')", "'a'.count(sub='a')", "'a'.count(1)", "'a'.count(('a','b'))", "'a'.count('a')('b')", "'a'.count('a').__class__", '(1).real', '1 .real', '1(2)', '(1)(2)',
    # other syntax
    'lambda: 1', '(lambda: 1)()', '[1]', '[x for x in (1,2)]', '{1: 2}', '{1}', '(1,)', '()', '1,', '1 if 1 else 2', '1 and 2', 'not 1', '1 < 2', '1 == 1', '1 is 1', '1 | 2', '1 & 1', '1 ^ 2', '1 << 9', '1 >> 1', '1 @ 2',
    'x := 1', '(x:=1)', 'x = 1', 'import os', 'del x', 'yield', 'await x', 'assert 0', '1; 2', '1\n2', '1 # 2', '1 \\\n+1', "f'{1}'", "f'{9**9**9}'", "b'a'.count(b'a')", "rb'a'", "'a' 'b'", "'a'", '"', "'", "'''a'''.count('a')", '...', '*1', '**1',
    # number forms and unicode
    '0x10', '0b1', '0o7', '1e9', '1e999', '1_000', '012', '1__0', '１+１', '٣+٤', '²', '½', '1\u00a0+1', '1\u200b+1', '−1', '1×2', '1\x00', '\x00', '1\x00+1', "'a\x00'.count('a')", "'\\x61'.count('a')", "'\ud800'.count('a')+x", '\ud800',
    # nothing at all
    '', ' ', '   ', '\n', '.', '()', '+', '*', '1+', ')', '1)', '))((', '1..2', '1 2', '%', '//',
]


@pytest.mark.parametrize('text', ATTACKS, ids=range(len(ATTACKS)))
def test_attacks_give_none(text):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert use_calculator(text) is None


def test_attacks_are_cheap():
    """No timeout guards the calculator, so its time must be bounded by the text's length. Measured: well under a millisecond each."""
    start = time.process_time()
    for text in ATTACKS: use_calculator(text)
    assert time.process_time() - start < 2


@pytest.mark.parametrize('value', [None, 1, 1.5, b'1+1', ['1'], {'a': 1}, object()])
def test_what_is_not_text_gives_none(value):
    assert use_calculator(value) is None


def test_bounds_are_exact():
    assert use_calculator(f'2**{MAX_BITS - 1}') == 2**(MAX_BITS - 1)
    assert use_calculator(f'2**{MAX_BITS}') is None
    assert use_calculator('1' + '+1' * ((MAX_CHARS - 1) // 2)) == (MAX_CHARS + 1) // 2
    assert use_calculator(' ' * MAX_CHARS + '1') is None


def test_random_noise_never_raises():
    rng = random.Random(0)
    alphabet = "0123456789+-*/%(). ,'\"" + 'count' + string.printable
    for _ in range(20_000):
        result = use_calculator(''.join(rng.choices(alphabet, k=rng.randrange(1, 24))))
        assert result is None or type(result) in (int, float)


def test_agrees_with_python_on_honest_arithmetic():
    rng = random.Random(1)

    def expression(depth):
        if depth == 0: return rng.choice([str(rng.randrange(1000)), f'{rng.uniform(0, 99):.3f}'])
        a, b = expression(depth - 1), expression(rng.randrange(depth))
        return rng.choice(['{}+{}', '({} - {})', '{}*{}', '{}/{}', '{}//{}', '{}%{}', '-({})*{}']).format(a, b)

    for _ in range(3000):
        text = expression(rng.randrange(1, 5))
        try: expected = eval(text)
        except ZeroDivisionError: expected = None
        assert use_calculator(text) == expected
