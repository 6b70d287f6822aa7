"""How far ahead of the source's a sequence on the target starts."""

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from fleetlift.core.tenant.closure import Root, Rules
from fleetlift.core.tenant.derive import closure_of
from fleetlift.core.tenant.schema import Column, DatabaseSchema, ForeignKey, Table
from fleetlift.core.tenant.sequences import Ahead, SequenceState, ahead, has_given, staying

SOURCE = SequenceState(name="public.ids", last_value=1000, is_called=True)
FRESH = SequenceState(name="public.ids", last_value=1, is_called=False)


def test_the_target_leaves_a_gap_of_ids_to_the_source() -> None:
    """Counted in ids, whatever the step, upwards and downwards."""
    assert ahead(SOURCE, FRESH, 500) == Ahead(value=1500)
    assert ahead(replace(SOURCE, increment=5), FRESH, 500) == Ahead(value=3500)
    down = SequenceState(
        name="d", last_value=-10, is_called=True, increment=-2, minimum=-(1 << 62), maximum=-1
    )
    fresh = replace(down, last_value=-1, is_called=False)
    assert ahead(down, fresh, 100) == Ahead(value=-210)


def test_one_that_was_never_used_stays_fresh() -> None:
    """Without a gap there is nothing to set; with one its first value is the gap's end."""
    assert ahead(FRESH, FRESH, 0) == Ahead()
    assert ahead(FRESH, FRESH, 10) == Ahead(value=11)


def test_it_never_goes_back() -> None:
    """The target has given ids of its own: a second switch after a revert."""
    assert ahead(SOURCE, replace(FRESH, last_value=5000, is_called=True), 500) == Ahead()
    assert ahead(SOURCE, replace(FRESH, last_value=1500, is_called=True), 500) == Ahead()
    assert ahead(SOURCE, replace(FRESH, last_value=1500, is_called=False), 500) == Ahead(value=1500)


def test_the_column_bounds_it_too() -> None:
    """A bigint sequence over an integer column: half of what is left goes to the source, and that is said."""
    full = replace(SOURCE, last_value=(1 << 31) - 101, column_max=(1 << 31) - 1)
    found = ahead(full, FRESH, 1_000_000)
    assert found.value == (1 << 31) - 51
    assert "only 100 ids are left" in found.note


def test_a_cycling_one_is_set_and_its_danger_told() -> None:
    """It starts again at its end on either side."""
    found = ahead(replace(SOURCE, cycle=True), FRESH, 10)
    assert found.value == 1010 and "starts again at its end" in found.note


def test_who_stands_where_it_stood_has_given_nothing() -> None:
    """Anything else may have: it went on, it began again, somebody has set it, or nobody knows."""
    assert not has_given(SOURCE, 1000)
    assert has_given(SOURCE, 999)
    assert has_given(SOURCE, 1001)
    assert has_given(SOURCE, None)


def test_sequences_of_tables_that_stay_are_known() -> None:
    """One that also fills a table that comes, or none at all, may have given ids to the tenant."""

    def table(name: str, sequence: str, *references: ForeignKey) -> Table:
        columns = (
            Column(name="id", type="bigint", sequence=sequence),
            Column(name="customer_id", type="bigint"),
        )
        return Table(name=f"public.{name}", columns=columns, key=("id",), foreign_keys=references)

    owner = ForeignKey(name="fk", columns=("customer_id",), to="public.customers", to_columns=("id",))
    tables = (
        table("customers", "public.customers_id_seq"),
        table("device", "public.shared_seq", owner),
        table("invoice", "public.invoice_id_seq"),
        table("ticket", "public.shared_seq"),
    )
    rules = Rules(root=Root(table="public.customers", column="id", value="1"))
    closure = closure_of(DatabaseSchema(tables={one.name: one for one in tables}), rules)
    assert staying(closure) == {"public.invoice_id_seq"}


@given(
    last=st.integers(1, 3000),
    target=st.integers(1, 3000),
    step=st.sampled_from([-7, -1, 1, 3]),
    gap=st.integers(0, 5000),
    width=st.integers(0, 3000),
)
def test_it_stays_within_bounds_and_never_behind(
    last: int, target: int, step: int, gap: int, width: int
) -> None:
    """Never behind the source, never behind itself, never beyond what sequence and column can hold."""
    low, high = 1, 3000
    source = SequenceState(
        name="s",
        last_value=last,
        is_called=True,
        increment=step,
        minimum=low,
        maximum=high,
        column_max=max(last, width),
        column_min=min(last, width),
    )
    here = replace(source, last_value=target)
    found = ahead(source, here, gap)
    after = target if found.value is None else found.value
    direction = 1 if step > 0 else -1
    assert direction * after >= direction * target
    assert direction * after >= direction * last
    if found.value is not None:
        assert low <= found.value <= high
        assert min(last, width) <= found.value <= max(last, width)
