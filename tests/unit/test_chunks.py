"""How rows are cut into chunks by key, what goes together, and what may travel in binary."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetlift.core.tenant.chunks import (
    Chunk,
    Rate,
    Split,
    TypeFacts,
    batches,
    chunks_of,
    left_s,
    literal,
    range_condition,
    split_query,
    steps_a_chunk,
    thinned,
    travels_binary,
)
from fleetlift.core.tenant.schema import Column, Table

TABLE = Table(
    name="public.alarm",
    columns=(Column(name="device id", type="bigint"), Column(name="no", type='public."Kind"')),
    key=("device id", "no"),
)


def splits_of(rows: int, every: int) -> tuple[Split, ...]:
    """What the split pass finds in a table with the keys 1 … `rows`."""
    return tuple(Split(key=(str(n),), count=n) for n in range(1, rows + 1) if n % every == 0 or n == rows)


@given(rows=st.integers(0, 200), every=st.integers(1, 30), thin=st.integers(1, 8), key=st.integers(-5, 205))
def test_every_key_is_in_exactly_one_chunk(rows: int, every: int, thin: int, key: int) -> None:
    """Also keys that nobody had seen when the table was cut; and the chunks' rows add up."""
    chunks = chunks_of("t", "owned", thinned(splits_of(rows, every), thin))
    holding = [
        chunk
        for chunk in chunks
        if (chunk.lower is None or key > int(chunk.lower[0]))
        and (chunk.upper is None or key <= int(chunk.upper[0]))
    ]
    assert len(holding) == 1
    assert sum(chunk.rows for chunk in chunks) == rows
    assert [chunk.number for chunk in chunks] == list(range(len(chunks)))
    assert all(chunk.rows <= every * thin for chunk in chunks)


@given(rows=st.lists(st.integers(0, 50), max_size=30), rows_max=st.integers(1, 60))
def test_small_chunks_go_together_in_order(rows: list[int], rows_max: int) -> None:
    """No chunk is left out or moved, and no transaction is larger than it must be."""
    chunks = [Chunk(table=f"t{n}", rows=count) for n, count in enumerate(rows)]
    found = batches(chunks, rows_max)
    assert [chunk for batch in found for chunk in batch] == chunks
    assert all(len(batch) == 1 or sum(c.rows for c in batch) <= rows_max for batch in found)
    assert all(sum(c.rows for c in (*a, b[0])) > rows_max for a, b in pairwise(found))


def test_bounds_are_compared_as_whole_rows_in_the_columns_types() -> None:
    """So that the key's index serves, and text never decides how numbers are ordered."""
    chunk = Chunk(table=TABLE.name, lower=("9", "it's"), upper=("10", "a\\b"))
    assert range_condition(chunk, TABLE, "c") == (
        "(c.\"device id\", c.\"no\") > ('9'::bigint, 'it''s'::public.\"Kind\") AND "
        '(c."device id", c."no") <= (\'10\'::bigint,  E\'a\\\\b\'::public."Kind")'
    )
    assert range_condition(Chunk(table=TABLE.name), TABLE, "c") == "TRUE"


def test_the_split_pass_asks_for_every_nth_key_and_the_last() -> None:
    """One pass, ordered by the source itself."""
    text = split_query(TABLE, "public.alarm AS c", "c", "mine", 100)
    assert "row_number() OVER w" in text and 'WINDOW w AS (ORDER BY c."device id", c."no")' in text
    assert "n % 100 = 0 OR next IS NULL" in text and "WHERE mine " in text


@pytest.mark.parametrize(
    ("counted", "of", "steps"),
    [(0, 1_000_000, 1), (500_000, 1_000_000, 1), (10_000, 1_000_000, 5), (10, 1_000_000, 20), (5, 0, 1)],
)
def test_chunks_are_larger_where_the_tenant_has_few_of_the_rows(counted: int, of: int, steps: int) -> None:
    """Each chunk reads past the others' rows in its range, or past the tenant's other rows."""
    assert steps_a_chunk(counted, of) == steps


def test_a_literal_is_right_whatever_the_server_thinks_of_backslashes() -> None:
    """A backslash makes it an escape string."""
    assert literal("o'k") == "'o''k'"
    assert literal("a\\'b").strip() == "E'a\\\\''b'"


TYPES = {
    one.oid: one
    for one in (
        TypeFacts(oid=23, name="int4", kind="b"),
        TypeFacts(oid=1007, name="_int4", kind="b", array=True, inner=(23,)),
        TypeFacts(oid=2205, name="regclass", kind="b"),
        TypeFacts(oid=2210, name="_regclass", kind="b", array=True, inner=(2205,)),
        TypeFacts(oid=1033, name="aclitem", kind="b", sends=False),
        TypeFacts(oid=20000, name="mood", kind="e"),
        TypeFacts(oid=20001, name="_mood", kind="b", array=True, inner=(20000,)),
        TypeFacts(oid=20002, name="moods", kind="d", inner=(20001,)),
        TypeFacts(oid=20003, name="pair", kind="c", inner=(23, 1007)),
        TypeFacts(oid=20004, name="mood_pair", kind="c", inner=(23, 20000)),
        TypeFacts(oid=20005, name="span", kind="r", inner=(20003,)),
        TypeFacts(oid=20006, name="odd_span", kind="r", inner=(20004,)),
        TypeFacts(oid=20007, name="spans", kind="m", inner=(20006,)),
        TypeFacts(oid=20008, name="positive", kind="d", inner=(23,)),
        TypeFacts(oid=20009, name="_positive", kind="b", array=True, inner=(20008,)),
    )
}


@pytest.mark.parametrize(
    ("name", "binary"),
    [
        ("int4", True),
        ("_int4", True),
        ("mood", True),
        ("pair", True),
        ("span", True),
        ("positive", True),
        ("regclass", False),
        ("_regclass", False),
        ("aclitem", False),
        ("_mood", False),
        ("moods", False),
        ("mood_pair", False),
        ("odd_span", False),
        ("spans", False),
        ("_positive", False),
    ],
)
def test_what_carries_oids_of_this_database_travels_as_text(name: str, binary: bool) -> None:
    """Arrays and composites of types that users make, and names of relations."""
    (oid,) = (one.oid for one in TYPES.values() if one.name == name)
    assert travels_binary(oid, TYPES) is binary


def test_an_unknown_type_travels_as_text() -> None:
    """Rather slow than wrong."""
    assert not travels_binary(99999, TYPES)


def test_the_rate_is_that_of_the_last_seconds() -> None:
    """A slow beginning is forgotten, and nothing is promised before anything is known."""
    rate = Rate(over_s=10)
    assert rate.a_second == 0.0
    for second in range(0, 100, 2):
        rate.add(second, 5.0 * second if second < 50 else 250 + 20.0 * (second - 50))
    assert rate.a_second == pytest.approx(20.0)
    assert left_s(100, 300, 20.0) == 10.0
    assert left_s(100, 300, 0.0) is None
    assert left_s(300, 300, 0.0) == 0.0
