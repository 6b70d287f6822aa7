"""The audit log's chain: what it binds, and that no change of it goes unseen."""

import hashlib
import json
import math
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from fleetlift.core.chain import Link, broken, canonical, link, read_time, root, written
from fleetlift.core.migration import AuditEntry

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


def chained(texts: list[str], evidence: dict[str, Any] | None = None) -> list[Link]:
    links: list[Link] = []
    previous = root("move", "the plan")
    for number, text in enumerate(texts, 1):
        entry = AuditEntry(kind="wave_opened", text=text, evidence=evidence or {})
        links.append(link("move", previous, number, written(1_800_000_000 + number), entry))
        previous = links[-1].hash
    return links


def test_the_chain_is_what_its_description_says() -> None:
    """Whoever has the page alone can compute it: hashlib and json are enough."""

    def sha(data: bytes) -> str:
        return hashlib.sha256(data).hexdigest()

    def plain(value: object) -> bytes:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()

    [one] = chained(["größer"], {"n": 3, "share": 0.1, "tiny": 1e-7})
    start = sha(plain({"chain": "fleetlift audit 1", "migration": "move", "plan": sha(b"the plan")}))
    body = {
        "migration": "move",
        "number": 1,
        "at": "2027-01-15T08:00:01.000000Z",
        "actor": "controller",
        "kind": "wave_opened",
        "text": "größer",
        "evidence": {"n": 3, "share": 0.1, "tiny": 1e-7},
    }
    assert one.hash == sha(bytes.fromhex(start) + plain(body))


@given(st.dictionaries(st.text(), JSON, max_size=4))
def test_what_was_stored_gives_the_hash_that_was_stored(evidence: dict[str, Any]) -> None:
    """Also numbers that JSON has not, and texts of every kind: read back, the chain holds."""
    links = chained(["a", "b"], evidence)
    stored = [replace(one, evidence=json.loads(canonical(one.evidence))) for one in links]
    assert broken("move", "the plan", stored) == []


@given(st.lists(st.text(max_size=5), min_size=2, max_size=6, unique=True), st.data())
def test_an_entry_changed_left_out_put_in_or_moved_breaks_it(texts: list[str], data: st.DataObject) -> None:
    links = chained(texts)
    place = data.draw(st.integers(0, len(links) - 1))
    one = links[place]
    forged = data.draw(
        st.sampled_from(
            [
                [*links[:place], replace(one, text=one.text + "!"), *links[place + 1 :]],
                [*links[:place], replace(one, actor="ann"), *links[place + 1 :]],
                [*links[:place], replace(one, evidence={"n": 1}), *links[place + 1 :]],
                [*links[:place], replace(one, at=written(1_800_000_000.5)), *links[place + 1 :]],
                [*links[:place], replace(one, hash="0" * 64), *links[place + 1 :]],
                [*links[:place], replace(one, hash="no hash"), *links[place + 1 :]],
                [*links[:place], one, *links[place:]],
                [links[-1], *links[:-1]],
                links[1:],
            ]
        )
    )
    assert broken("move", "the plan", forged)


def test_a_chain_of_another_migration_or_plan_is_broken_from_its_root() -> None:
    links = chained(["a", "b"])
    assert broken("move", "the plan", links) == []
    assert len(broken("move", "another plan", links)) == 1
    assert len(broken("other", "the plan", links)) == 2


@given(st.floats(1e9, 4e9))
def test_moments_are_read_back_to_the_microsecond(at: float) -> None:
    assert written(read_time(written(at))) == written(at)
    assert math.isclose(read_time(written(at)), at, abs_tol=1e-6)
