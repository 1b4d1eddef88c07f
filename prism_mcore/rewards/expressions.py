r"""Are two written answers the same? Text is normalised, parsed whole or compared as text, and compared exactly.

`same("2 2/3", r"\frac83")`. math-verify's parser (latex2sympy) reads expressions; what it cannot read to the last
character is text, because half of an expression equals too much. The rules are in docs/add-a-reward.md.
"""

import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache
from typing import Any

SIGNS = {
    "\u2212": "-", "\u2013": "-", "\u2014": "-", "\u2010": "-", "\u2011": "-", "\u00d7": r"\times ",
    "\u22c5": r"\cdot ",
    "\u00b7": r"\cdot ", "\u00f7": "/", "\u2215": "/", "\u2044": "/", "\u03c0": r"\pi ", "\u221e": r"\infty ",
    "\u2264": r"\le ", "\u2265": r"\ge ", "\u2260": r"\ne ", "\u00b0": r"^\circ ", "\u00b1": r"\pm ",
    "\u222a": r"\cup ",
    "\u2229": r"\cap ", "\u2208": r"\in ", "\u2205": r"\emptyset ", "\u2032": "'", "\u2019": "'", "\u00a0": " ",
    "\u2009": " ", "\u202f": " ", "\u200b": "", "\u00bc": r"\frac{1}{4}", "\u00bd": r"\frac{1}{2}",
    "\u00be": r"\frac{3}{4}",
}  # fmt: skip
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ", "0123456789-+n")
ROW_END = "\1"  # stands for \\\\ of a matrix, which is no spacing
SPACES = ("~", r"\ ", r"\,", r"\;", r"\:", r"\>", r"\quad", r"\qquad")
SPACING = re.compile(r"\\[,;:!> ]|~|\\q?quad\b|\\(?:displaystyle|textstyle|limits|left|right|[bB]ig+[lr]?)(?![a-zA-Z])")
REWRITTEN = [
    (r"\\\$", " "),
    (r"^\\[(\[]|\\[)\]]$|\$", ""),
    (r"\\%", "%"),
    (r"\\[cdt]frac(?![a-z])", r"\\frac"),
    (r"\\frac\s*(\d)\s*(\d)(?!\d)|\\frac\s+(\w)\s*(\w)(?!\w)", r"\\frac{\1\3}{\2\4}"),
    (r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{"),
    (r"\\sqrt\s*(\d)(?!\d)", r"\\sqrt{\1}"),
    (r"\\leq(?:slant)?(?![a-z])", r"\\le "),
    (r"\\geq(?:slant)?(?![a-z])", r"\\ge "),
    (r"\\lbrace(?![a-z])", r"\\{"),
    (r"\\rbrace(?![a-z])", r"\\}"),
    (r"\\(?:mathrm|text|operatorname)\s*\{\s*([ei])\s*\}", r"\1"),
    (r"\^\s*\{?\s*\\circ\s*\}?", " degrees"),
    (r"(?<=\d)\s*[eE]\s*([-+]?\d+)(?![\d.])", r"\\times10^{\1}"),
]
TEXT = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mathsf|mbox|operatorname|rm|bf)\s*\*?\s*\{([^{}]*)\}"
)
GROUPED = re.compile(r"(?<![\d.,])\d{1,3}(?:(?:\{,\}|,)\d{3})+(?![\d,])|(?<![\d.,])\d{1,3}(?: \d{3})+(?![\d,])")
MIXED = re.compile(
    r"(?<![\d.}\w])(\d+)\s*\\frac\s*\{(\d+)\}\s*\{(\d+)\}"
    r"|(?<![\d.}/\w])(\d+)\s+(\d+)/(\d+)(?![\d.])"
)
NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
ASSIGNED = re.compile(r"\s*(?:[a-zA-Z]|\\[a-z]+)(?:_\{?\w+\}?)?(?:\([a-z](?:,\s*[a-z])*\))?\s*(?:=|\\in\b)\s*([^=<>]+)")
# Bare words that may follow a number as its unit; in \\text{} any word may.
_UNITS = """
    cm mm km m kg g mg lb lbs oz ft feet foot inch inches in mile miles yd yard yards mph hour hours hr hrs minute
    minutes min second seconds sec day days week weeks month months year years dollar dollars cent cents usd euro euros
    degree degrees deg radian radians rad unit units percent meter meters metre metres liter liters litre litres sq
    square cubic people students point points way ways times per"""
UNITS = frozenset(_UNITS.split())
_KNOWN = "sin cos tan cot sec csc log ln exp sqrt pi arcsin arccos arctan lim max min gcd lcm mod inf infty"
KNOWN = frozenset(_KNOWN.split())  # that are no words
FEWEST_DIGITS = 6  # of a decimal that stands for a number which has no end


def same(gold: str, answer: str) -> bool:
    """Is the answer the gold one, as a text, a number, an expression, a list, an interval or a set of those?"""
    gold, answer = tidy(gold), tidy(answer)
    if not gold or not answer:
        return False
    return compact(gold) == compact(answer) or _alike(gold, answer)


def tidy(text: str) -> str:
    """One way to write what can be written in several: signs, digits, spaces, thousands, fonts, mixed numbers."""
    text = text.replace("\\\\", ROW_END)
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ]+", lambda m: "^{" + m[0].translate(SUPERSCRIPTS) + "}", text)
    text = re.sub(r"√\s*(\w+|\([^()]*\)|\{[^{}]*\})", lambda m: r"\sqrt{" + m[1].strip("(){}") + "}", text)
    text = "".join(SIGNS.get(sign, sign) for sign in text)
    text = "".join(SIGNS.get(sign, sign) for sign in unicodedata.normalize("NFKC", text)).strip(" \n\t*")
    dollars = " dollars" if text.endswith(r"\$") else ""
    for pattern, replacement in REWRITTEN:
        text = re.sub(pattern, replacement, text)
    text = SPACING.sub(lambda m: " " if m[0] in SPACES else "", text + dollars)
    if not re.search(r"[(\[{]\s*-?\d{1,3},\d{3}", text.replace("{,}", "")):  # (1,234) is a pair
        text = GROUPED.sub(lambda m: re.sub(r"\{,\}|,| ", "", m[0]), text)
    text = MIXED.sub(lambda m: "({}+\\frac{{{}}}{{{}}})".format(*(m.groups()[:3] if m[1] else m.groups()[3:])), text)
    return re.sub(r"\s+", " ", text.replace(ROW_END, r"\\")).strip().rstrip(".").rstrip()


def compact(text: str) -> str:
    """For comparing as text: without fonts, spaces, braces around one character; the case of words does not count."""
    plain = re.sub(r"\{(\w)\}", r"\1", re.sub(r"\s+", "", TEXT.sub(r"\1", text)))
    return plain.casefold() if is_word(text) else plain


def is_word(text: str) -> bool:
    """Letters alone, at least two, that are no function's or constant's name: no product of variables."""
    plain = TEXT.sub(r"\1", text).strip()
    return bool(re.fullmatch(r"[^\W\d_]{2,}(?:[ '-][^\W\d_]+)*", plain)) and plain.casefold() not in KNOWN


def _alike(gold: str, answer: str) -> bool:
    if is_word(gold) or is_word(answer):
        return False
    (gold, gold_unit), (answer, answer_unit) = _without_unit(gold), _without_unit(answer)
    if gold_unit and answer_unit and gold_unit != answer_unit:
        return False
    if (one := ASSIGNED.fullmatch(answer)) and not re.search(r"=|\\in\b", gold):
        answer = one[1].strip()
    if (one := ASSIGNED.fullmatch(gold)) and not re.search(r"=|\\in\b", answer):
        gold = one[1].strip()
    if compact(gold) == compact(answer):
        return True
    golds, answers = _elements(gold), _elements(answer)
    if golds is not None and answers is not None:
        return _same_elements(golds, answers)
    if golds is not None or answers is not None:
        return False
    percent = gold_unit == "percent", answer_unit == "percent"
    scales = (1,) if percent[0] == percent[1] else (1, 100)  # 50% is 50 of a hundred, or a half
    return any(_same_expression(gold, answer, *(scale if is_one else 1 for is_one in percent)) for scale in scales)


def _without_unit(text: str) -> tuple[str, str]:
    """(what is measured, its unit in the singular, or "")."""
    text = re.sub(r"^dollars ", "", text) if text.startswith("dollars ") else text
    if text.endswith("%"):
        return text[:-1].strip(), "percent"
    fonted = re.fullmatch(
        r"(.*[\d)}.])\s*\\(?:text|mathrm|textrm|mbox|rm)\s*\{\s*([^{}\d]+?)\s*\}(?:\^\{?([23])\}?)?", text
    )
    bare = re.fullmatch(r"(.*[\d)}.])\s*([a-zA-Z]+(?:[ .][a-zA-Z]+)*[ .]?)(?:\^\{?([23])\}?)?", text)
    for match, any_word in ((fonted, True), (bare, False)):
        if match and (any_word or all(word.strip(".").casefold() in UNITS for word in match[2].split())):
            words = [re.sub(r"s$", "", word.strip(".").casefold()) for word in match[2].split()]
            return match[1].strip(), " ".join(words) + (match[3] or "")
    return text, ""


# --- lists, tuples, sets, intervals -----------------------------------------------------------------------------------


def _elements(text: str) -> tuple[str, str, list[str]] | None:
    """(opening bracket, closing one, parts) of a list, tuple, set, interval or union of them; None of one thing."""
    if r"\cup" in text:
        return "u", "u", [part.strip() for part in text.split(r"\cup")]
    text = re.sub(r",?\s*(?:\\text\s*\{\s*)?\b(?:and|or)\b(?:\s*\})?\s*", ", ", text)
    if r"\pm" in text and text.count(r"\pm") == 1:
        return "", "", [text.replace(r"\pm", sign).strip().removeprefix("+").strip() for sign in ("+", "-")]
    opening, closing, inside = "", "", text
    if text.startswith(r"\{") and text.endswith(r"\}"):
        opening, closing, inside = "{", "}", text[2:-2]
    elif text[:1] in ("(", "[") and text[-1:] in (")", "]") and _closes_at_the_end(text):
        opening, closing, inside = text[0], text[-1], text[1:-1]
    parts = _split(inside)
    if len(parts) == 1 and opening not in ("{",):
        return None
    return opening, closing, parts


def _closes_at_the_end(text: str) -> bool:
    depth = 0
    for place, sign in enumerate(text):
        depth += (sign in "([") - (sign in ")]")
        if depth == 0:
            return place == len(text) - 1
    return False


def _split(text: str) -> list[str]:
    """At commas and semicolons outside brackets."""
    parts, depth, start = [], 0, 0
    for place, sign in enumerate(text):
        depth += (sign in "([{") - (sign in ")]}")
        if sign in ",;" and depth == 0:
            parts.append(text[start:place].strip())
            start = place + 1
    return [part for part in [*parts, text[start:].strip()] if part]


def _same_elements(gold: tuple[str, str, list[str]], answer: tuple[str, str, list[str]]) -> bool:
    """In order between round or square brackets, which must be the same; in any order otherwise."""
    if len(gold[2]) != len(answer[2]):
        return False
    ordered = [each for each in (gold, answer) if each[0] and each[0] in "(["]
    if len(ordered) == 2 and gold[:2] != answer[:2]:
        return False
    if ordered:
        return all(same(one, other) for one, other in zip(gold[2], answer[2], strict=True))
    left = list(answer[2])
    for one in gold[2]:
        found = next((place for place, other in enumerate(left) if same(one, other)), None)
        if found is None:
            return False
        del left[found]
    return True


# --- one expression ---------------------------------------------------------------------------------------------------


def _same_expression(gold: str, answer: str, gold_scale: int = 1, answer_scale: int = 1) -> bool:
    import sympy

    left, right = parsed(gold), parsed(answer)
    if left is None or right is None:
        return False
    if not (isinstance(left, sympy.Expr) and isinstance(right, sympy.Expr)):
        return _verified(left, right)
    left, right = left / gold_scale, right / answer_scale
    if left.free_symbols or right.free_symbols:
        return left.free_symbols == right.free_symbols and (_is_zero(left - right) or _verified(left, right))
    if left.has(sympy.oo, sympy.zoo, sympy.nan) or right.has(sympy.oo, sympy.zoo, sympy.nan):
        return bool(left == right)
    return _is_zero(left - right) or _rounded(gold, left, right) or _rounded(answer, right, left)


def _is_zero(difference: Any) -> bool:
    import sympy

    difference = sympy.sympify(difference)
    if difference.is_Rational:
        return difference == 0
    if not difference.free_symbols:
        value = difference.evalf(30, maxn=3000)
        if value.is_comparable and abs(value) > 0 and value._prec > 1:
            return False
    return sympy.simplify(difference) == 0


def _rounded(text: str, decimal: Any, exact: Any) -> bool:
    """Is one a decimal of six digits or more and the other, which no decimal is, rounded to its places?"""
    match = re.fullmatch(r"[-+]?(\d*)\.(\d+)", text.strip())
    if not match or len((match[1] + match[2]).lstrip("0")) < FEWEST_DIGITS or _is_decimal(exact):
        return False
    distance = abs(decimal - exact).evalf(30)
    return bool(distance.is_comparable and distance * 2 * 10 ** len(match[2]) <= 1)


def _is_decimal(value: Any) -> bool:
    """Has it a last digit?"""
    if not value.is_Rational:
        return False
    rest = int(value.q)
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1


def _verified(gold: Any, answer: Any) -> bool:
    from math_verify import verify

    return bool(verify([gold], [answer], float_rounding=15, timeout_seconds=None))


@lru_cache(maxsize=4096)
def parsed(text: str) -> Any:
    """The sympy expression that all of a tidied text says, decimals as fractions; None where it is text."""
    import sympy

    plain = TEXT.sub(r"\1", text).replace(" degrees", "").strip()
    if NUMBER.fullmatch(plain):
        return sympy.Rational(plain)
    if re.search(r"%|\d\s*_|[.,;:!?']$|\\[lc]?dots|\?|[-+*/^=<>_&\\]$", plain.removesuffix("!")):
        return None
    try:
        expression = _reader()(_bracketed(plain))
    except Exception:  # whatever the parser, or sympy on what it found, does not take
        return None
    if isinstance(expression, sympy.Expr):
        names = {sympy.Symbol("e"): sympy.E, sympy.Symbol("i"): sympy.I, sympy.Symbol("pi"): sympy.pi}
        expression = (
            sympy.nsimplify(expression.subs(names), rational=True)
            if expression.has(sympy.Float)
            else expression.subs(names)
        )
    return expression


def _bracketed(text: str) -> str:
    """`sqrt(2)`, `\\sqrt(2)` and `a/b` as LaTeX has them."""
    text = re.sub(r"(?<!\\)\b(sqrt|sin|cos|tan|log|ln|exp|pi)\b", r"\\\1", text)
    text = re.sub(r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    return text.replace("**", "^").replace("*", r"\cdot ")


@lru_cache(maxsize=1)
def _reader() -> Callable[[str], Any]:
    """latex2sympy, but that what it leaves unread is an error: it stops where its grammar does."""
    from antlr4 import Token
    from antlr4.error.ErrorListener import ErrorListener
    from latex2sympy2_extended import latex2sympy2

    class Strict(ErrorListener):
        def syntaxError(self, recognizer: Any, symbol: Any, line: int, column: int, message: str, error: Any) -> None:
            raise ValueError(message)

    class Whole(latex2sympy2._Latex2Sympy):
        def create_parser(self, latex_str: str) -> Any:
            parser = super().create_parser(latex_str)
            parser.getTokenStream().tokenSource.removeErrorListeners()
            parser.getTokenStream().tokenSource.addErrorListener(Strict())
            math = parser.math

            def whole() -> Any:
                found = math()
                if parser.getCurrentToken().type != Token.EOF:
                    raise ValueError(f"{latex_str!r} goes on after {found.getText()!r}")
                return found

            parser.math = whole
            return parser

    def read(text: str) -> Any:
        return Whole(is_real=None).parse(text)

    return read
