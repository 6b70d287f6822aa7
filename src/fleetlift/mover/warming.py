"""The step `warm: caches`: the target reads into its memory what the source has in its own."""

from fleetlift.mover.move import Move
from fleetlift.tenant.warm import WarmProgress, warm


async def warm_caches(move: Move, at: int) -> str:
    def tell(shown: WarmProgress) -> None:
        move.tell(f"reading {shown.relation}: {shown.blocks:,} of {shown.blocks_total:,} blocks")

    report = await warm(move.source_url, move.target_url, await move.closure(), progress=tell)
    move.kill("caches-warmed")
    move.tell("warmed", warmed_blocks=report.blocks, warmed_bytes=report.bytes)
    return (
        f"{report.blocks:,} blocks of {len(report.relations)} tables and indexes are in memory, "
        f"{report.brought:,} of them brought; hits {report.hit_share_before:.0%} before, "
        f"{report.hit_share_after:.0%} now"
    )
