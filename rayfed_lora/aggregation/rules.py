"""The one table of aggregation rules; each rule's own file names its paper."""

from __future__ import annotations

from rayfed_lora.aggregation import (
    alternate,
    correct,
    factor_average,
    freeze_a,
    product_svd,
    residual,
    share_a,
    stacking,
    zero_pad,
)
from rayfed_lora.aggregation.rule import Rule

RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        factor_average.RULE,
        product_svd.RULE,
        stacking.RULE,
        residual.RULE,
        freeze_a.RULE,
        alternate.RULE,
        zero_pad.RULE,
        share_a.RULE,
        correct.RULE,
    )
}
