"""The language that selects devices: `attributes.hardware >= 3 and connected`.

    condition  := all-of ("or" all-of)*
    all-of     := test ("and" test)*
    test       := "not" test | "(" condition ")" | "exists" "(" field ")" | comparison | field
    comparison := operand ("==" | "!=" | "<" | "<=" | ">" | ">=") operand
                | operand ["not"] "in" "[" literal ("," literal)* "]"
                | operand ["not"] "like" text-with-*
    field      := "id" | "tenant" | "connected" | ("attributes" | "connection" | "shadow") ("." name)+
    literal    := number | version such as 1.4.2 | "text" | 'text' | true | false

A comparison with an absent field is false, `!=` too: a device is never selected for what is not known of
it (`not exists(attributes.x)` asks for that). A field alone is true when its value is `true`. Numbers
compare as numbers and texts as texts, except that two texts which both look like versions, or a number and
such a text, compare part by part: "1.10.0" is after 1.9, and an attribute kept as "3" equals 3.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Literal, TypeAlias, cast

import msgspec

from fleetlift.core.errors import BadInput

MAX_LENGTH = 4096  # characters
MAX_DEPTH = 32  # parentheses and `not` within each other

Scalar: TypeAlias = str | int | float | bool
Operator: TypeAlias = Literal["==", "!=", "<", "<=", ">", ">="]


class Field(msgspec.Struct, frozen=True):
    path: tuple[str, ...]

    @property
    def name(self) -> str:
        return ".".join(self.path)


class Constant(msgspec.Struct, frozen=True):
    value: Scalar
    text: str  # as written: a number may have to be read as a version ("1.10" is not 1.1)


Operand: TypeAlias = Field | Constant


class Compare(msgspec.Struct, frozen=True):
    operator: Operator
    left: Operand
    right: Operand


class OneOf(msgspec.Struct, frozen=True):
    operand: Operand
    values: tuple[Constant, ...]


class Like(msgspec.Struct, frozen=True):
    operand: Operand
    pattern: str


class Exists(msgspec.Struct, frozen=True):
    field: Field


class IsTrue(msgspec.Struct, frozen=True):
    operand: Operand


class Not(msgspec.Struct, frozen=True):
    part: "Expression"


class AllOf(msgspec.Struct, frozen=True):
    parts: tuple["Expression", ...]


class AnyOf(msgspec.Struct, frozen=True):
    parts: tuple["Expression", ...]


Expression: TypeAlias = Compare | OneOf | Like | Exists | IsTrue | Not | AllOf | AnyOf

EVERYTHING: Expression = AllOf(())


def parse(text: str) -> Expression:
    """The expression that `text` writes. BadInput names the column (from 1) and what was expected there."""
    if len(text) > MAX_LENGTH:
        raise BadInput(
            f"condition of {len(text)} characters: at most {MAX_LENGTH} are read; use an attribute or a tag"
        )
    parser = _Parser(text)
    expression = parser.any_of(0)
    parser.must_end()
    return expression


def evaluate(expression: Expression, record: Mapping[str, object]) -> bool:
    """Whether a device is selected.

    `record` holds what is known of it: `id`, `tenant`, `attributes` (an object), `connected`, and where
    available `connection` and `shadow` (objects). What is missing is absent, not an error.
    """
    match expression:
        case AllOf(parts):
            return all(evaluate(part, record) for part in parts)
        case AnyOf(parts):
            return any(evaluate(part, record) for part in parts)
        case Not(part):
            return not evaluate(part, record)
        case Exists(field):
            return _value(field, record) is not None
        case IsTrue(operand):
            return _value(operand, record) is True
        case OneOf(operand, values):
            found = _value(operand, record)
            return found is not None and any(
                _compare("==", found, operand, value.value, value) for value in values
            )
        case Like(operand, pattern):
            found = _value(operand, record)
            return isinstance(found, str) and _like(pattern, found)
        case Compare(operator, left, right):
            a, b = _value(left, record), _value(right, record)
            if a is None or b is None:
                return False
            return _compare(operator, a, left, b, right)


def fields_used(expression: Expression) -> frozenset[str]:
    """Dotted names of every field the expression reads, as in `connected`, `attributes.hardware`."""
    return frozenset(field.name for field in _fields(expression))


def attributes_used(expression: Expression) -> frozenset[str]:
    """Dotted names of the attributes the expression reads, with their prefix: `attributes.hardware`."""
    return frozenset(name for name in fields_used(expression) if name.startswith("attributes."))


# -- evaluation ----------------------------------------------------------------------------------------


def _value(operand: Operand, record: Mapping[str, object]) -> object | None:
    """What the operand stands for; None when the device has no such field (JSON null counts as absent)."""
    if isinstance(operand, Constant):
        return operand.value
    here: object = record
    for name in operand.path:
        if not isinstance(here, Mapping):
            return None
        here = here.get(name)
    return here


def _compare(operator: Operator, a: object, left: Operand, b: object, right: Operand) -> bool:
    order = _order(a, left, b, right)
    if order is None:  # not comparable: present, and different
        return operator == "!="
    match operator:
        case "==":
            return order == 0
        case "!=":
            return order != 0
        case "<":
            return order < 0
        case "<=":
            return order <= 0
        case ">":
            return order > 0
        case ">=":
            return order >= 0


def _order(a: object, left: Operand, b: object, right: Operand) -> int | None:
    """Negative, 0 or positive as `a` is before, equal to or after `b`; None when they do not compare."""
    if isinstance(a, bool) or isinstance(b, bool):
        return (a > b) - (a < b) if isinstance(a, bool) and isinstance(b, bool) else None
    if isinstance(a, int | float) and isinstance(b, int | float):
        return (a > b) - (a < b)
    if isinstance(a, int | float | str) and isinstance(b, int | float | str):
        v, w = _version(a, left), _version(b, right)
        if v is not None and w is not None:
            return (v > w) - (v < w)
        if isinstance(a, str) and isinstance(b, str):
            return (a > b) - (a < b)
    return None


_VERSION = re.compile(r"[vV]?(\d{1,18}(?:\.\d{1,18}){0,7})(?:[-+~](\w[\w.+~-]{0,64}))?")


def _version(value: int | float | str, operand: Operand) -> tuple[tuple[int, ...], bool, str] | None:
    """A sortable form: 1.2 equals 1.2.0, and 1.2.0-rc1 comes before 1.2.0. None: not a version."""
    text = operand.text if isinstance(operand, Constant) else str(value)
    if (found := _VERSION.fullmatch(text)) is None:
        return None
    numbers = [int(part) for part in found[1].split(".")]
    while len(numbers) > 1 and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers), found[2] is None, found[2] or ""


def _like(pattern: str, text: str) -> bool:
    """Glob match with `*` only: each part at its first place, by searches that are linear in the text.

    A regex could take exponentially long, and a walk sign by sign len(pattern) × len(text) steps: minutes,
    with patterns of callers on documents of devices.
    """
    first, *rest = pattern.split("*")
    if not rest:
        return text == pattern
    *inner, last = rest
    if len(text) < len(first) + len(last) or not text.startswith(first) or not text.endswith(last):
        return False
    at, end = len(first), len(text) - len(last)
    for part in inner:
        found = text.find(part, at, end)
        if found < 0:
            return False
        at = found + len(part)
    return True


def _fields(expression: Expression) -> Iterator[Field]:
    match expression:
        case AllOf(parts) | AnyOf(parts):
            for part in parts:
                yield from _fields(part)
        case Not(part):
            yield from _fields(part)
        case Exists(field):
            yield field
        case IsTrue(operand) | OneOf(operand, _) | Like(operand, _):
            if isinstance(operand, Field):
                yield operand
        case Compare(_, left, right):
            yield from (operand for operand in (left, right) if isinstance(operand, Field))


# -- parsing -------------------------------------------------------------------------------------------

_TOKEN = re.compile(
    r"""\s*(?:
        (?P<number>-?\d+(?:\.\d+)*(?:[eE][+-]?\d+)?(?![\w.]))
      | (?P<text>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')
      | (?P<name>[A-Za-z_][\w-]*)
      | (?P<sign>==|!=|<=|>=|<|>|[()\[\],.=])
      | (?P<end>\Z)
    )""",
    re.VERBOSE,
)
_OPERATORS = frozenset(("==", "!=", "<", "<=", ">", ">="))
_PLAIN = ("id", "tenant", "connected")
_ROOTS = ("attributes", "connection", "shadow")
_RESERVED = frozenset(("and", "or", "not", "in", "like", "exists", "true", "false"))


class _Token(msgspec.Struct, frozen=True):
    kind: str
    text: str
    column: int


class _Parser:
    def __init__(self, source: str) -> None:
        self.source = source
        self.at = 0
        self.next = self._read()

    def _read(self) -> _Token:
        found = _TOKEN.match(self.source, self.at)
        if found is None:
            start = self.at + len(self.source[self.at :]) - len(self.source[self.at :].lstrip())
            sign = self.source[start]
            if sign in "\"'":
                raise self._bad(start + 1, "a text that is not closed: expected the same quote at its end")
            raise self._bad(start + 1, f"{sign!r} is not expected here")
        kind = cast(str, found.lastgroup)
        self.at = found.end()
        return _Token(kind, found[kind], found.start(kind) + 1)

    def _take(self) -> _Token:
        taken, self.next = self.next, self._read()
        return taken

    def _bad(self, column: int, what: str) -> BadInput:
        return BadInput(f"condition, column {column}: {what}")

    def _expected(self, what: str) -> BadInput:
        found = "the end" if self.next.kind == "end" else repr(self.next.text)
        return self._bad(self.next.column, f"expected {what}, found {found}")

    def _word(self, *words: str) -> bool:
        return self.next.kind == "name" and self.next.text in words

    def _sign(self, *signs: str) -> bool:
        return self.next.kind == "sign" and self.next.text in signs

    def must_end(self) -> None:
        if self.next.kind != "end":
            raise self._expected("'and', 'or' or the end")

    def any_of(self, depth: int) -> Expression:
        parts = [self._all_of(depth)]
        while self._word("or"):
            self._take()
            parts.append(self._all_of(depth))
        return parts[0] if len(parts) == 1 else AnyOf(tuple(parts))

    def _all_of(self, depth: int) -> Expression:
        parts = [self._test(depth)]
        while self._word("and"):
            self._take()
            parts.append(self._test(depth))
        return parts[0] if len(parts) == 1 else AllOf(tuple(parts))

    def _test(self, depth: int) -> Expression:
        if depth > MAX_DEPTH:
            raise self._bad(
                self.next.column, f"more than {MAX_DEPTH} levels within each other: write it flatter"
            )
        if self._word("not"):
            self._take()
            return Not(self._test(depth + 1))
        if self._sign("("):
            self._take()
            inside = self.any_of(depth + 1)
            self._close(")")
            return inside
        if self._word("exists"):
            self._take()
            if not self._sign("("):
                raise self._expected("'(' after exists")
            self._take()
            field = self._field()
            self._close(")")
            return Exists(field)
        return self._comparison()

    def _close(self, sign: str) -> None:
        if not self._sign(sign):
            raise self._expected(f"'{sign}'")
        self._take()

    def _comparison(self) -> Expression:
        left = self._operand()
        if self.next.kind == "sign" and self.next.text in _OPERATORS:
            operator = cast(Operator, self._take().text)
            return Compare(operator, left, self._operand())
        if self._sign("="):
            raise self._bad(self.next.column, "'=' does not compare: use '=='")
        if self._word("not"):
            self._take()
            if not self._word("in", "like"):
                raise self._expected("'in' or 'like' after 'not'")
            return Not(self._membership(left))
        if self._word("in", "like"):
            return self._membership(left)
        if isinstance(left, Constant) and not isinstance(left.value, bool):
            raise self._expected("a comparison such as '==' or '>='")
        return IsTrue(left)

    def _membership(self, left: Operand) -> Expression:
        if self._take().text == "like":
            if self.next.kind != "text":
                raise self._expected('a text such as "seat-*"')
            return Like(left, cast(str, self._constant().value))
        if not self._sign("[", "("):
            raise self._expected('a list such as ["a", "b"]')
        closing = "]" if self._take().text == "[" else ")"
        values = [self._constant()]
        while self._sign(","):
            self._take()
            values.append(self._constant())
        self._close(closing)
        return OneOf(left, tuple(values))

    def _operand(self) -> Operand:
        if self.next.kind == "name" and not self._word("true", "false"):
            return self._field()
        return self._constant("a field or a value")

    def _constant(self, what: str = 'a value such as 3, 1.4.2, "text" or true') -> Constant:
        if self._word("true", "false"):
            text = self._take().text
            return Constant(text == "true", text)
        if self.next.kind == "text":
            text = re.sub(r"\\(.)", r"\1", self._take().text[1:-1])
            return Constant(text, text)
        if self.next.kind == "number":
            text = self._take().text
            if text.count(".") > 1:
                return Constant(text, text)
            return Constant(float(text) if set(text) & set(".eE") else int(text), text)
        if self.next.kind == "name":
            raise self._bad(
                self.next.column, f'expected {what}, found {self.next.text}: write a text as "text"'
            )
        raise self._expected(what)

    def _field(self) -> Field:
        known = ", ".join((*_PLAIN, *(f"{root}.…" for root in _ROOTS)))
        if self.next.kind != "name" or self.next.text in _RESERVED:
            raise self._expected(f"a field ({known})")
        first = self._take()
        if first.text in _PLAIN:
            if self._sign("."):
                raise self._bad(self.next.column, f"'{first.text}' has no parts: leave out the '.'")
            return Field((first.text,))
        if first.text not in _ROOTS:
            raise self._bad(
                first.column,
                f'{first.text!r} is not a field; expected {known}. A text is written as "{first.text}"',
            )
        path = [first.text]
        while self._sign("."):
            self._take()
            if self.next.kind == "text":
                path.append(cast(str, self._constant().value))
            elif self.next.kind in ("name", "number") and "." not in self.next.text:
                path.append(self._take().text)
            else:
                raise self._expected("a name after '.'")
        if len(path) == 1:
            raise self._expected(f"'.' and a name after '{first.text}'")
        return Field(tuple(path))
