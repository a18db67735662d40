# SPDX-License-Identifier: Apache-2.0
"""Numbers as JSON has them. Needs no torch."""

import math
from typing import Any


def finite(value: Any) -> Any:
    """The value with None for every NaN or infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
