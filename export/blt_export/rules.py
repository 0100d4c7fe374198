"""Fusions as rewrite rules of onnxscript, and a log of why a rule did not apply.

A rule is a class: `pattern` is the subgraph that it replaces, `check` refuses a match with a reason
(`MatchResult().fail(reason)`), `rewrite` builds the replacement. A rule that returns an existing value returns
`Identity` of it; `apply` removes the Identity.

Passes that no pattern can express record their reasons in `Skipped`, too. `blt export -v` shows them.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import IdentityEliminationPass
from onnxscript.rewriter import (
    RULE_NAME_TAG,
    MatchingTracer,
    MatchResult,
    MatchStatus,
    RewriteRule,
    RewriteRuleClassBase,
    RewriteRuleSet,
)

from .rewrite import op_name

log = logging.getLogger("blt_export")

__all__ = ["GRAPH", "MatchResult", "Rule", "Skipped", "apply"]

GRAPH = "blt_export.graph"
"""Key of `ir.Model.meta`: the name of the graph in log lines."""


_Base: Any = RewriteRuleClassBase
"""Untyped: the matcher passes values by the names of the pattern's variables, so each rule has other signatures."""


class Rule(_Base):
    """One fusion. Inner nodes of its pattern may have other users: a node is removed once it has none."""

    def __init__(self) -> None:
        super().__init__(remove_nodes=False)


class Skipped:
    """Why a rule was not applied: each reason once, with a count and the first node."""

    def __init__(self, rule: str) -> None:
        self._rule = rule
        self._count: Counter[str] = Counter()
        self._first: dict[str, ir.Node] = {}

    def add(self, node: ir.Node, reason: str) -> None:
        self._count[reason] += 1
        self._first.setdefault(reason, node)

    def log(self, model: ir.Model) -> None:
        """One line a reason, at the level DEBUG."""
        graph = model.meta.get(GRAPH, model.graph.name)
        for reason, count in self._count.items():
            node = self._first[reason]
            more = f" and {count - 1} more" if count > 1 else ""
            log.debug("%s: %s skips %s %s%s: %s", graph, self._rule, op_name(node), node.name, more, reason)


def apply(model: ir.Model, *rules: type[Rule]) -> int:
    """Apply the rules, one after the other, each over the whole graph. Returns how often they applied."""
    applied = 0
    for kind in rules:
        skipped = Skipped(kind.__name__)
        applied += RewriteRuleSet([_Recorded(kind(), skipped)]).apply_to_model(model)
        IdentityEliminationPass()(model)
        skipped.log(model)
    return applied


class _Recorded(RewriteRule):
    """A rule that records its failed matches while it is applied; `RewriteRuleSet` itself traces only dry runs."""

    def __init__(self, rule: Rule, skipped: Skipped) -> None:
        super().__init__(
            rule.pattern,
            rule.rewrite,
            rule.check,
            name=rule.name,
            remove_nodes=rule.remove_nodes,
            graph_pre_visitor=rule.setup,
            graph_post_visitor=rule.cleanup,
        )
        self._tracer = _Tracer(skipped)

    def match(self, *args: Any, **options: Any) -> Any:
        return super().match(*args, **{**options, "tracer": self._tracer})


class _Tracer(MatchingTracer):
    def __init__(self, skipped: Skipped) -> None:
        super().__init__()
        self._skipped = skipped

    def log(self, rule: Any, container: Any, node: ir.Node, match_result: MatchResult, status: MatchStatus) -> None:
        """Candidates are the nodes with the operator of the pattern's last one that the rule did not make itself."""
        own = rule.name in node.metadata_props.get(RULE_NAME_TAG, "").split(", ")
        if status is not MatchStatus.SUCCESS and match_result.nodes and not own:
            self._skipped.add(node, match_result.reason)
