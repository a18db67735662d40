// SPDX-License-Identifier: Apache-2.0
// One drafted token at one row: what the rules of csrc/rules ask about it, swept for in double
// precision over a sub-tile at a time. A new sum is listed in dispatch.h; nothing else here knows a
// rule.
#pragma once

#include "leftover.h"

namespace specens {

// Of what earlier siblings have left of the target.
Judgement judge(const VerifyParams& params, RowLaws& laws, const Leftover& target,
                const Drafted& drafted);

// The rho of the rule `k_seq` for so many candidates, and its judgement.
double k_seq_ratio(const VerifyParams& params, RowLaws& laws, const Drafted& drafted,
                   int candidates);
Judgement k_seq_judgement(const RowLaws& laws, const Drafted& drafted, double ratio);

// Where the temperature is 0: whether the rule is asked, and whether about the draft's law.
bool is_asked_at_zero(RuleId rule);
bool needs_draft_at_zero(RuleId rule);

}  // namespace specens
