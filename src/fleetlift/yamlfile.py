"""YAML files that people write: a tree of nodes with their places in, structs or every mistake out.

The YAML is read as a tree of nodes with their places (`yaml.compose`), never as Python objects, so that
each complaint can name a line and nothing in a file can be constructed. Plans and scenarios are read so.
"""

# `return self._wrong(...)` notes a problem and gives the None that stands for "could not be read".
# mypy: disable-error-code="func-returns-value"

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Final, TypeVar

import msgspec
import yaml

from fleetlift.core.errors import BadInput
from fleetlift.core.gates import did_you_mean
from fleetlift.core.units import parse_duration

MAX_BYTES: Final = 256 * 1024
_DEPTH_MAX: Final = 16
_TOLD_MAX: Final = 100  # problems in the text of one error
_OPENING: Final = (
    yaml.FlowSequenceStartToken,
    yaml.FlowMappingStartToken,
    yaml.BlockSequenceStartToken,
    yaml.BlockMappingStartToken,
)
_CLOSING: Final = (yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken, yaml.BlockEndToken)

T = TypeVar("T")


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """One mistake of a file. `line` and `column` count from 1; `key` is the way to the place."""

    line: int
    column: int
    key: str
    text: str


class BadFile(BadInput):
    """A file that cannot be used; `problems` holds every mistake, in the file's order."""

    def __init__(self, file: str, problems: Collection[Problem]) -> None:
        self.file = file
        self.problems = tuple(sorted(problems, key=lambda p: (p.line, p.column)))
        lines = [
            f"{file}:{p.line}:{p.column}: {p.key + ': ' if p.key else ''}{p.text}"
            for p in self.problems[:_TOLD_MAX]
        ]
        if len(self.problems) > _TOLD_MAX:
            lines.append(f"{file}: and {len(self.problems) - _TOLD_MAX} more")
        super().__init__("\n".join(lines))


def read_text(path: Path, what: str) -> str:
    """The text of a small file, such as `a plan`. Raises BadInput."""
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1).decode()
    except OSError as exc:
        raise BadInput(f"{path}: the {what} cannot be read: {exc.strerror or exc}") from exc
    except UnicodeDecodeError as exc:
        raise BadInput(f"{path}: a {what} is UTF-8 text, and byte {exc.start} of this file is not") from exc


def compose(text: str, file: str, *, what: str, shown_in: str, bad: type[BadFile] = BadFile) -> yaml.Node:
    """The tree of a file's nodes. `what` it is (`plan`), and which page shows one. Raises `bad`."""

    def broken(text: str, mark: yaml.Mark | None = None) -> BadFile:
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        return bad(file, [Problem(line=line, column=column, key="", text=text)])

    if len(text.encode(errors="replace")) > MAX_BYTES:
        raise broken(f"a {what} has at most {MAX_BYTES // 1024} KiB")
    try:
        depth = 0
        for token in yaml.scan(text, Loader=yaml.SafeLoader):
            depth += isinstance(token, _OPENING) - isinstance(token, _CLOSING)
            if depth > _DEPTH_MAX:
                raise broken("lists or mappings are nested too deeply", token.start_mark)
            # A reference can make a file of one line as large as the world, or a loop.
            if isinstance(token, yaml.AliasToken):
                raise broken(f"references (*name) are not used in a {what}: write it out", token.start_mark)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as exc:
        said = " ".join(part for part in (exc.context, exc.problem) if part)
        raise broken(f"this is not YAML: {said}", exc.problem_mark or exc.context_mark) from exc
    except (yaml.YAMLError, ValueError, OverflowError) as exc:
        raise broken(f"this is not YAML: {str(exc).splitlines()[0] if str(exc) else exc}") from exc
    if root is None:
        raise broken(f"the {what} is empty; {shown_in} shows one")
    return root


class NodeReader:
    """Reads nodes into values and collects what is wrong; None stands for what could not be read."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []

    # -- values ----------------------------------------------------------------------------------------

    def _checked(self, parse: Callable[[str], T]) -> Callable[[yaml.Node, str], T | None]:
        """A reader of texts that `parse` understands; its BadInput becomes a problem of the place."""

        def read(node: yaml.Node, key: str) -> T | None:
            text = self._text(node, key, "a text")
            if text is None:
                return None
            try:
                return parse(text)
            except BadInput as exc:
                return self._wrong(node, key, str(exc))

        return read

    def _duration(self, node: yaml.Node, key: str) -> float | None:
        return self._checked(parse_duration)(node, key)

    def _positive(self, node: yaml.Node, key: str) -> float | None:
        seconds = self._duration(node, key)
        if seconds == 0:
            return self._wrong(node, key, "expected a duration above 0")
        return seconds

    def _bool(self, node: yaml.Node, key: str) -> bool | None:
        if isinstance(node, yaml.ScalarNode) and node.tag.endswith(":bool"):
            return str(node.value).lower() in ("true", "yes", "on")
        return self._wrong(node, key, "expected true or false")

    def _count(self, node: yaml.Node, key: str) -> int | None:
        if isinstance(node, yaml.ScalarNode) and re.fullmatch(r"[0-9]{1,9}", node.value):
            return int(node.value)
        return self._wrong(node, key, "expected a whole number")

    def _one_of(self, known: tuple[str, ...]) -> Callable[[yaml.Node, str], str | None]:
        def read(node: yaml.Node, key: str) -> str | None:
            text = self._text(node, key, f"one of: {', '.join(known)}")
            if text is not None and text not in known:
                return self._wrong(
                    node, key, f"{text!r}{did_you_mean(text, known)}; expected: {', '.join(known)}"
                )
            return text

        return read

    def _text(self, node: yaml.Node, key: str, expected: str) -> str | None:
        if isinstance(node, yaml.ScalarNode) and not node.tag.endswith(":null"):
            return str(node.value)
        return self._wrong(node, key, f"expected {expected}")

    # -- shapes ----------------------------------------------------------------------------------------

    def _mapping(self, node: yaml.Node, key: str, expected: str) -> dict[str, yaml.Node] | None:
        if not isinstance(node, yaml.MappingNode):
            return self._wrong(node, key, f"expected {expected}")
        found: dict[str, yaml.Node] = {}
        for name, value in _pairs(node):
            if not isinstance(name, yaml.ScalarNode):
                self._wrong(name, key, "keys are plain words")
            elif name.value in found:
                self._wrong(name, join(key, name.value), "is there twice")
            else:
                found[str(name.value)] = value
        return found

    def _list(self, node: yaml.Node, key: str, expected: str, most: int) -> list[yaml.Node] | None:
        if not isinstance(node, yaml.SequenceNode):
            return self._wrong(node, key, f"expected {expected}")
        if len(node.value) > most:
            return self._wrong(node, key, f"has {len(node.value)} entries; at most {most} are read")
        return list(node.value)

    def _known(
        self, node: yaml.Node, parts: Mapping[str, yaml.Node], known: tuple[str, ...], key: str
    ) -> None:
        assert isinstance(node, yaml.MappingNode)
        for name, _ in _pairs(node):
            if isinstance(name, yaml.ScalarNode) and name.value in parts and name.value not in known:
                self._wrong(
                    name,
                    join(key, str(name.value)),
                    f"is not a key here{did_you_mean(str(name.value), known)}; known: {', '.join(known)}",
                )

    def _needed(
        self, node: yaml.Node, parts: Mapping[str, yaml.Node], needed: tuple[str, ...], key: str
    ) -> None:
        complained_of = {problem.key for problem in self.problems}
        for name in needed:
            # A key that looks like a misspelt one is complained of already, with the right spelling.
            others = (other for other in parts if join(key, other) in complained_of)
            misspelt = any(repr(name) in did_you_mean(other, needed) for other in others)
            if name not in parts and not misspelt:
                self._wrong(node, join(key, name), "is missing")

    def _get(
        self,
        parts: Mapping[str, yaml.Node],
        name: str,
        read: Callable[[yaml.Node, str], T | None],
        default: T | None = None,
        *,
        at: str = "",
    ) -> T | None:
        return read(parts[name], join(at, name)) if name in parts else default

    def _wrong(self, node: yaml.Node, key: str, text: str) -> None:
        mark = node.start_mark
        self.problems.append(
            Problem(
                line=mark.line + 1 if mark else 1,
                column=mark.column + 1 if mark else 1,
                key=_short(key, 200),
                text=_short(text, 1000),
            )
        )


def _pairs(node: yaml.MappingNode) -> Iterator[tuple[yaml.Node, yaml.Node]]:
    yield from node.value


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[:most] + " …"


def join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name
