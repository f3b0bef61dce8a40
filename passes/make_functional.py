"""Step graphs in the operations of `models.portable`: pure, new state behind the logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from ..models import contiguous, portable
from ..models.memory import lists
from ..models.memory.places import SitePlaces
from .contiguous_state import Rewriter
from .graph_tools import aten
from .result import Declined, NotRewritten

ops = torch.ops.memcompile


class _Functional(Rewriter):
    """`make_functional`."""

    delta = False

    def rewrite(self, node: fx.Node) -> None:
        write = _WRITES.get(node.target)
        if write is not None:
            write(self, *node.args)
            return
        if node.target is aten.unsqueeze.default:
            return  # records as pages of one slot; a read takes them as they are
        read = _READS.get(node.target)
        if read is None:
            raise NotRewritten(
                "no engine without a host can be exported",
                [Declined(f"{node.target} reads pages by their tables", f"%{node}", "export")],
            )
        self.copied[node] = read(self, *node.args)

    def keep(self, node: fx.Node) -> fx.Node:
        # Reads are merged apart from any state, in an operation that no target has either.
        if node.target is ops.combine.default:
            return self.new("combine", *self.old(node.args))
        return super().keep(node)

    def old(self, value: Any) -> Any:
        """An argument of the step graph, as it stands in this one."""
        return fx.node.map_arg(
            value, lambda n: self.held(self.slots[n]) if n in self.slots else self.copied[n]
        )

    def new(self, name: str, *args: Any) -> fx.Node:
        return self.call(portable.operator(name), *args)

    def append(
        self, key: Any, value: Any, table: Any, position: Any, lengths: Any, keys: Any,
        values: Any, index: Any, fields: Any, record_table: Any = None,
    ) -> None:  # fmt: skip
        place, number = self.place(self.slot(table)), self.slot(table).site
        records = self.place(self.slot(record_table)) if record_table is not None else place
        written = [keys, values, *index]
        given = self.old((key, value, position, lengths, keys, values, [*index]))
        if self.sites[number].memory.account is not None:
            self.evicted(number)
            inside = self.call(contiguous.within_page, *given[2:4], place.size)
            given = (*given[:2], inside, *given[3:])
        made = self.new(
            "append_index",
            *given,
            *(fields, place.size, place.pinned, place.reach, records.pinned),
        )
        for old, new in zip(written, self.parts(made, len(written)), strict=True):
            slot = self.slot(old)
            self.state[slot.site, slot.name] = new
        self.new_keys = self.copied[key]

    def append_apart(
        self, key: Any, value: Any, table: Any, record_table: Any, position: Any, lengths: Any,
        keys: Any, values: Any, index: Any, fields: Any,
    ) -> None:  # fmt: skip
        self.append(
            *(key, value, table, position, lengths, keys, values, index, fields, record_table)
        )

    def fold(
        self, children: Any, child_table: Any, table: Any, position: Any, lengths: Any,
        index: Any, fields: Any, child_size: Any, ratio: Any,
    ) -> None:  # fmt: skip
        below, place = (self.place(self.slot(t)) for t in (child_table, table))
        made = self.new(
            "fold",
            self.new_keys,
            *self.old(([*children], position, lengths, [*index])),
            *(fields, child_size, ratio, below.pinned, place.pinned),
        )
        for old, new in zip(index, self.parts(made, len(index)), strict=True):
            slot = self.slot(old)
            self.state[slot.site, slot.name] = new

    def select(self, name: str) -> Callable[..., fx.Node]:
        def made(query: Any, index: Any, fields: Any, table: Any, *rest: Any) -> fx.Node:
            place = self.place(self.slot(table))
            if not place.grows:
                raise AssertionError(f"{name}: records of a whole table cannot take turns")
            return self.new(name, *self.old((query, [*index])), fields, *self.old(rest))

        return made

    def among(self, query: Any, index: Any, fields: Any, table: Any, *rest: Any) -> fx.Node:
        place = self.place(self.slot(table))
        candidates, *others = self.old(rest)
        return self.new(
            "score_select.among",
            *self.old((query, [*index])),
            *(fields, self.long(candidates), *others, place.pinned),
        )

    def attend(
        self, query: Any, keys: Any, values: Any, bias: Any, table: Any, pages: Any, exclude: Any,
        position: Any, lengths: Any, scale: Any, softcap: Any, window: Any, span: Any,
    ) -> fx.Node:  # fmt: skip
        place = self.place(self.slot(table))
        keys, values = (self.whole(x) for x in (keys, values))
        if bias is not None:
            bias = self.call(aten.squeeze.dims, self.whole(bias), [3])
        pages = None if pages is None else self.long(self.old(pages))
        return self.new(
            "attend",
            *(self.old(query), keys, values, bias, pages, exclude, *self.old((position, lengths))),
            *(scale, softcap, window, place.size, place.size // span, place.pinned),
        )

    def attend_page_lse(
        self, query: Any, keys: Any, values: Any, bias: Any, table: Any, pages: Any, exclude: Any,
        position: Any, lengths: Any, scale: Any, softcap: Any, window: Any, span: Any,
    ) -> fx.Node:  # fmt: skip
        if bias is not None or pages is not None or span != 1:
            raise AssertionError("attend.page_lse: expected a read of every page of keys")
        account = self.evicted(self.slot(table).site)
        given = self.old((query, keys, values))
        return self.new(
            "attend.page_lse",
            *(*given, account, *self.old((position, lengths)), scale, softcap, window),
            self.place(self.slot(table)).size,
        )

    def account(self, account: Any, *rest: Any) -> fx.Node:
        slot = self.slot(account)
        made = self.new("account", self.held(slot), *self.old(rest))
        self.state[slot.site, slot.name] = made
        return made  # stands for the pages that were read, which nothing is told of

    def whole(self, node: fx.Node) -> fx.Node:
        """A tensor of the state; records, which reads take as pages of one slot, as they are."""
        if node in self.slots:
            return self.held(self.slots[node])
        if node.target is not aten.unsqueeze.default:
            raise AssertionError(f"{node}: expected keys and values, or their records")
        return self.held(self.slot(node.args[0]))

    def summaries(
        self, query: Any, keys: Any, values: Any, table: Any, pages: Any, logits: Any,
        value_mean: Any, log_count: Any, *rest: Any,
    ) -> fx.Node:  # fmt: skip
        given = self.old((query, keys, values, pages, logits, value_mean, log_count))
        return self.new(
            "attend.summaries", *given, *self.old(rest), self.place(self.slot(table)).size
        )

    def lists_held(self, query: Any, table: Any, *rest: Any) -> fx.Node:
        # Of the table only its sequences and heads count.
        keys = self.held(self.slot(table))
        return self.call(lists.held, self.old(query), keys, *self.old(rest))

    def entering(
        self, query: Any, keys: Any, values: Any, table: Any, position: Any, lengths: Any,
        window: Any,
    ) -> fx.Node:  # fmt: skip
        place = self.place(self.slot(table))
        given = self.old((query, keys, values, position, lengths))
        return self.new("entering", *given, window, place.size, place.pinned)

    def state_step(
        self, query: Any, key: Any, value: Any, decay: Any, beta: Any, lengths: Any, state: Any,
        norm: Any,
    ) -> tuple[Any, ...]:  # fmt: skip
        if beta is not None and not self.delta:
            raise NotRewritten(
                "no portable engine can be exported",
                [
                    Declined(
                        "a delta rule needs its rows one after the other, for which standard "
                        "operations have no form; export aoti or onnx-ort, or a policy with "
                        "write='additive'",
                        "state_step",
                        "export",
                    )
                ],
            )
        written = [state] if norm is None else [state, norm]
        if beta is None:
            given = self.old((query, key, value, decay, lengths, state, norm))
            made = self.new("additive_state", *given)
        else:
            given = self.old((query, key, value, decay, beta, lengths, state))
            made = self.new("delta_state", *given)
        out, lse, *kept = self.parts(made, 2 + len(written))
        for old, new in zip(written, kept, strict=True):
            slot = self.slot(old)
            self.state[slot.site, slot.name] = new
        return out, lse

    def long(self, node: fx.Node) -> fx.Node:
        return self.call(aten.to.dtype, node, torch.int64)

    def output(self, node: fx.Node) -> None:
        (results,) = node.args
        logits = self.copied[results[0]]  # type: ignore[index]
        self.graph.output((logits, *self.state.values()))


_WRITES: Mapping[Any, Callable[..., None]] = {
    ops.append_index.default: _Functional.append,
    ops.append_index.record_table: _Functional.append_apart,
    ops.append_index.fold: _Functional.fold,
}
_READS: Mapping[Any, Callable[..., Any]] = {
    ops.score_select.default: lambda self, *args: self.select("score_select")(*args),
    ops.score_select.page_logits: lambda self, *args: self.select("score_select.page_logits")(
        *args
    ),
    ops.score_select.among: _Functional.among,
    ops.attend.default: _Functional.attend,
    ops.attend.summaries: _Functional.summaries,
    ops.attend.page_lse: _Functional.attend_page_lse,
    lists.account: _Functional.account,
    lists.held: _Functional.lists_held,
    lists.entering: _Functional.entering,
    ops.state_step.default: _Functional.state_step,
    ops.state_chunk.default: _Functional.state_step,
}


def make_functional(
    step: fx.GraphModule, sites: Sequence[SitePlaces], ragged: bool, delta: bool = False
) -> fx.GraphModule:
    """A step graph on contiguous state, in portable operations.

    Args:
        step: a graph of `remember.StepGraph`.
        sites: its sites, in order.
        ragged: whether it takes lengths; otherwise every row is valid.
        delta: the runtime has the delta rule as an operator, for which standard ones have no form.

    Returns:
        (tokens, position, lengths if ragged, state...) -> (logits, new state...), pure.

    Raises:
        NotRewritten: a memory that no portable operation covers; the reason is said.
    """
    rewriter = _Functional(step, sites, ragged)
    rewriter.delta = delta
    return rewriter.run()
