# SPDX-License-Identifier: Apache-2.0
"""The launches that every op begins with: thresholds where the law has filters, then the sweep."""

from . import cutoffs, stats
from .launch import LawArguments, Proposal, Workspace


def sweep(law: LawArguments, proposal: Proposal | None, work: Workspace, batch: int) -> None:
    """Fill the workspace: one launch for most laws."""
    rows, tiles = batch * law.rows, law.sub_tiles // law.width.value
    members, by_member = law.members.value, law.by_member.value
    drafts = proposal is not None and (
        proposal.logits is not None or proposal.proposers is not None
    )
    filtered = law.filtered.value
    alone = members if filtered and by_member else int(law.plausible.value)
    fields = alone + (drafts and filtered)
    if fields > 0:
        cutoffs.member_cutoffs[(rows, fields)](
            law, proposal, work, alone, drafts and filtered, num_warps=cutoffs.WARPS
        )
    separate = int(proposal is not None and proposal.logits is not None)
    if law.kind.value == "product":
        if filtered and not by_member:
            cutoffs.target_cutoffs[(rows,)](law, work, num_warps=cutoffs.TARGET_WARPS)
        grid = (rows, tiles, 1 + separate)
        stats.product_stats[grid](law, proposal, work, num_warps=stats.WARPS)
        return
    grid = (rows, tiles, members + separate)
    stats.mixture_stats[grid](law, proposal, work, num_warps=stats.WARPS)
    if law.kind.value == "warped":
        if filtered:
            cutoffs.target_cutoffs[(rows,)](law, work, num_warps=cutoffs.TARGET_WARPS)
        narrow = law.sub_tiles // law.narrow.value
        stats.warped_stats[(rows, narrow)](law, work, num_warps=stats.NARROW_WARPS)
