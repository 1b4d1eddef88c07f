"""Right answers in every usual form are right; what only looks like one is not; one changed digit or letter is seen."""

import random
import time
from fractions import Fraction

import pytest
from tiny.answers import CHOICE, MATH, STATED

from prism_mcore.rewards.choice import chosen_letter
from prism_mcore.rewards.math import mathematics

PAIRS = [
    (gold, answer, right)
    for gold, sides in MATH.items()
    for right, side in zip((True, False), sides, strict=True)
    for answer in side
]


def verdict(gold, answer):
    return bool(mathematics({"answer": gold}, f"<think>so</think>\\boxed{{{answer}}}")["correct"])


def test_there_are_four_hundred_pairs_and_half_are_wrong():
    wrong = sum(not right for *_, right in PAIRS)
    assert len(PAIRS) + len(STATED) + len(CHOICE) >= 400 and wrong >= 0.45 * len(PAIRS)
    assert len(set(PAIRS)) == len(PAIRS)


@pytest.mark.parametrize("gold", MATH)
def test_what_stands_in_the_box(gold):
    assert [(answer, right) for g, answer, right in PAIRS if g == gold and verdict(gold, answer) != right] == []
    assert verdict(gold, gold)


@pytest.mark.parametrize("text", STATED)
def test_which_answer_a_text_settles_on(text):
    gold, right = STATED[text]
    assert bool(mathematics({"answer": gold}, f"<think>so</think>{text}")["correct"]) == right


@pytest.mark.parametrize("text", CHOICE)
def test_which_letter_a_text_settles_on(text):
    assert chosen_letter(text) == CHOICE[text]


def renderings(value: Fraction) -> list[str]:
    """The ways in which people write a number."""
    p, q = value.numerator, value.denominator
    sign, n = ("-" if p < 0 else ""), abs(p)
    forms = [rf"{sign}\frac{{{n}}}{{{q}}}", f"{sign}{n}/{q}", rf"{sign}\dfrac{{{n}}}{{{q}}}", rf"\frac{{{p}}}{{{q}}}"]
    if q == 1:
        forms = [str(p), f"{p:,}", f"{p:,}".replace(",", "{,}"), f"{p:,}".replace(",", r"\,"), f"{p}.0", f"$ {p} $"]
        forms += [
            str(p).translate({ord(sign): 0xFEE0 + ord(sign) for sign in "0123456789"}),
            rf"{p}\text{{ apples}}",
            f"x={p}",
        ]
    elif n > q:
        forms += [rf"{sign}{n // q}\frac{{{n % q}}}{{{q}}}", f"{sign}{n // q} {n % q}/{q}"]
    return forms


def test_a_number_equals_itself_in_every_rendering_and_no_other_number():
    rng = random.Random(0)
    for _ in range(60):
        value = Fraction(rng.randint(-99999, 99999), rng.choice([1, 1, 3, 7, 8, 12]))
        near = value + Fraction(rng.choice([-1, 1]), rng.choice([1, value.denominator]))
        gold = rng.choice(renderings(value))
        assert [form for form in renderings(value) if not verdict(gold, form)] == [], gold
        assert [form for form in renderings(near) if verdict(gold, form)] == [], gold


def test_one_changed_digit_or_letter_is_another_answer():
    rng = random.Random(1)
    golds = [
        "31415.92653",
        "123456789123456789",
        r"\frac{1234}{5677}",
        "abacus",
        "north-east",
        r"17\sqrt{19}",
        "x^2+17x+4",
    ]
    for gold in golds:
        for place in [place for place, sign in enumerate(gold) if sign.isalnum()]:
            if gold[place].isalpha() and "\\" in gold:
                continue  # of a command's name
            pool = "0123456789" if gold[place].isdigit() else "abcdefghijklmnopqrstuvwxyz"
            other = rng.choice([sign for sign in pool if sign != gold[place]])
            assert not verdict(gold, gold[:place] + other + gold[place + 1 :]), (gold, place, other)


# What is left of an answer where a bracket, a unit or an operator is all there is.
ODD = [
    "%",
    "=",
    r"\pm",
    "x=",
    r"\{\}",
    "{}",
    "()",
    "[]",
    "(",
    "$",
    r"\cup",
    r"1\cup",
    ",",
    " ; ",
    r"\text{}",
    r"\text{cm}",
]
ODD += [
    r"5\%%",
    "dollars",
    r"\$",
    "''",
    "_",
    "^",
    r"\frac",
    r"\frac{}{}",
    "|",
    "0/0",
    "1/0",
    r"\infty",
    r"\sqrt{}",
    "!",
]
ODD += [r"\begin{pmatrix}", "x=%", r"\{,\}", "**", r"\\", "nan", "zoo", "None", "1 and", "or", r"\le", "x>", "1.234567"]


@pytest.mark.parametrize("gold", ["7", "1, 2", "x+1", "2+3i", "(1, 2)", r"50\%", "[0, 1)", "x>3"])
def test_odd_answers_are_wrong_and_raise_nothing(gold):
    """A grader that raises masks the response instead of calling it wrong."""
    assert [answer for answer in ODD if verdict(gold, answer)] == []


@pytest.mark.parametrize("text", ["answer is ", "\\boxed{", "{", "(", "$", "1,", "or ", "\\frac", "\\text{"])
def test_an_answer_is_looked_for_in_linear_time(text):
    """Where a model repeats itself for thousands of tokens; what takes seconds would be masked instead of wrong."""
    begun = time.process_time()
    assert not mathematics({"answer": "7"}, text * 5000)["correct"]
    assert not verdict("7", text * 300)
    assert time.process_time() - begun < 5.0


def test_words_after_a_number_are_read_once():
    """What a model of no skill writes: the pattern of units once tried every way to cut the letters, 2^60 of them."""
    begun = time.monotonic()
    assert not verdict("7", "7 " + "lowercase letters " * 4 + "+")
    assert verdict("7", "7 square feet")
    assert time.monotonic() - begun < 5
