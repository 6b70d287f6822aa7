"""Every process of a running migration is struck, one at a time, and nothing breaks."""

from pathlib import Path

import msgspec
import pytest

from fleetlift.core.errors import BadInput
from fleetlift.load.faults import ENGINES, FAULTS, WORKERS
from fleetlift.load.soak import Options, Soak, chosen
from fleetlift.migrate.runner import STEPS
from fleetlift.testing import scratch_directory

DOZEN = (
    "nats",
    "telemetry",
    "controller@committed",
    "state",
    "postgres",
    "legacy",
    "auth",
    "device",
    "controller",
    "api",
    "controller@told",
    "serve",
)


@pytest.mark.timeout(1000)
async def test_a_dozen_strikes_lose_nothing_double_nothing_and_stop_no_migration() -> None:
    """After each strike telemetry of every device and a new command come through again; in the end every
    acknowledged message is stored once, every command has one final state and was executed at most once."""
    with scratch_directory() as directory:
        soak = Soak(
            Options(
                for_s=900,  # at most: it ends with the last strike
                seed=20,
                devices=6,
                strikes=DOZEN,
                bake="1s",
                pause_s=(0.1, 1.0),
                command_expires_s=8,
            ),
            Path(directory),
        )
        verdict = await soak.run()
        said = msgspec.json.format(msgspec.json.encode(verdict)).decode()
        assert verdict.good, said
        assert verdict.strikes == len(DOZEN), said
        assert verdict.migrations >= 1, said
        assert verdict.ledger.messages_acknowledged > 500, said
        assert verdict.ledger.commands_executed > 20, said


def test_the_faults_cover_every_process_and_every_step_of_the_engine() -> None:
    """The table names each process that runs, and each step at which a controller can die."""
    processes = {*ENGINES, *WORKERS, "serve", "legacy", "device"}
    assert processes <= set(FAULTS)
    assert {f"hang-{name}" for name in processes - {"serve"}} <= set(FAULTS)
    assert {f"controller@{step}" for step in STEPS} <= set(FAULTS)


def test_faults_are_chosen_by_name_or_group() -> None:
    assert chosen(()) == tuple(FAULTS)
    assert chosen(("nats", "step")) == ("nats", *(f"controller@{step}" for step in STEPS))
    with pytest.raises(BadInput, match="fault 'nat'"):
        chosen(("nat",))
