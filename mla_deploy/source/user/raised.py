"""A user's module with its latent found: the same model, with a cache between the tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from mla_deploy.errors import InputError
from mla_deploy.source.user.attention import Operand, Site, attention_sites
from mla_deploy.source.user.factory import UserModule
from mla_deploy.source.user.graph import (
    ATEN,
    LogitsOf,
    UserGraph,
    Values,
    position_argument,
    trace_user_module,
)
from mla_deploy.source.user.latent import Latent, as_heads, latent_of, taken_rows
from mla_deploy.source.user.positions import placed_table, require_by_place, require_causal

# Where attention happens: (attention's index, query [B, H, S, E], latent [B, S, L], rope key
# [B, S, R]) -> out [B, H, S, V], the values' bias included.
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
# How far the raised model may be from the module: relative, on the logits.
_PROOF_ERROR = 1e-3
_PROOF_TOKENS = (5, 4, 1, 1)


@dataclass(frozen=True)
class RaisedModule:
    """A module's graph, its attentions, and what each of them caches."""

    source: UserModule
    graph: UserGraph
    sites: tuple[Site, ...]
    latents: tuple[Latent, ...]

    @property
    def vocab_size(self) -> int:
        return int(self.graph.axes(self.graph.logits)[2])

    def logits(
        self,
        ids_BS: torch.Tensor,
        positions_BS: torch.Tensor,
        attend: Attend,
        weight: Callable[[fx.Node], torch.Tensor] | None = None,
        kept: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Logits [B, S, vocab] of new tokens at `positions_BS`; or of those that `kept` leaves.

        `attend` keeps what was cached. `weight` gives the tensors of placeholders.
        """
        weight = weight or self.graph.weight
        run = _Run(self, ids_BS, positions_BS, weight, attend)
        node = self.graph.logits
        if kept is None:
            return run.of(node)
        if node.target is not ATEN.linear.default:
            return kept(run.of(node))
        # The widest product: of few tokens a row. Whole, for how many is not known here.
        hidden, *parameters = (run.of(value) for value in node.args if isinstance(value, fx.Node))
        return nn.functional.linear(kept(hidden), *parameters)

    def eager(self, cached: dict[int, torch.Tensor]) -> Attend:
        """Attention in PyTorch, expanded, over the rows [B, T, L + R] that `cached` collects."""

        def attend(
            index: int, query_BHSE: torch.Tensor, latent: torch.Tensor, rope_key: torch.Tensor
        ) -> torch.Tensor:
            found, scale = self.latents[index], self.scale(index)
            new_BSW = torch.cat((latent, rope_key), dim=-1)
            before = cached.get(index)
            rows_BTW = new_BSW if before is None else torch.cat((before, new_BSW), dim=1)
            cached[index] = rows_BTW
            w_HKL = found.w_kv_b.view(found.heads, found.nope + found.value, -1)
            made_BHTK = torch.einsum("btl,hkl->bhtk", rows_BTW[..., : w_HKL.shape[2]], w_HKL)
            rope_BHTR = rows_BTW[:, None, :, w_HKL.shape[2] :].expand(-1, found.heads, -1, -1)
            key_BHTE = torch.cat((made_BHTK[..., : found.nope], rope_BHTR), dim=-1)
            scores_BHST = query_BHSE @ key_BHTE.transpose(-1, -2) * scale
            new, total = scores_BHST.shape[-2:]
            future_ST = torch.ones(new, total, dtype=torch.bool).triu(1 + total - new)
            weights_BHST = scores_BHST.masked_fill(future_ST, -torch.inf).softmax(dim=-1)
            out_BHSV = weights_BHST @ made_BHTK[..., found.nope :]
            bias_HV = found.value_bias_HV
            return out_BHSV if bias_HV is None else out_BHSV + bias_HV[:, None]

        return attend

    def scale(self, index: int) -> float:
        """The factor on the scores of an attention; differences between products are folded."""
        return self.sites[index].scores[0].factor


def raise_module(source: UserModule) -> RaisedModule:
    """Trace the module, find every attention and its latent, and prove the result equal.

    The proof runs: random tokens in several calls against the module on all of them at once.
    Raises: InputError SRC-MODULE, SRC-NO-LATENT, SRC-RAISE.
    """
    graph = trace_user_module(source)
    sites = attention_sites(graph)
    for site in sites:
        require_causal(graph, site)
    require_by_place(graph)
    raised = RaisedModule(source, graph, sites, tuple(latent_of(graph, site) for site in sites))
    _prove(raised)
    return raised


def whole_logits(source: UserModule, ids_BS: torch.Tensor) -> torch.Tensor:
    """What the module itself says of whole rows, [B, S, vocab] fp32; nothing is cached."""
    name = position_argument(source)
    positions_BS = torch.arange(ids_BS.shape[1]).expand(ids_BS.shape[0], -1)
    logits: torch.Tensor = LogitsOf(source.module, name)(ids_BS, positions_BS)
    return logits.float()


def _prove(raised: RaisedModule) -> None:
    most = raised.graph.most_tokens
    generator = torch.Generator().manual_seed(0)
    tokens = sum(_PROOF_TOKENS) if most is None else min(most, sum(_PROOF_TOKENS))
    ids_BS = torch.randint(raised.vocab_size, (2, tokens), generator=generator)
    with torch.inference_mode():
        wanted = whole_logits(raised.source, ids_BS)
        cached: dict[int, torch.Tensor] = {}
        attend, found, start = raised.eager(cached), [], 0
        for count in _PROOF_TOKENS:
            part = ids_BS[:, start : start + count]
            if part.shape[1]:
                positions = torch.arange(start, start + part.shape[1]).expand(2, -1)
                found.append(raised.logits(part, positions, attend).float())
            start += count
        error = float((torch.cat(found, dim=1) - wanted).norm() / wanted.norm().clamp(min=1e-30))
    if not error <= _PROOF_ERROR:
        raise InputError(
            "SRC-RAISE",
            f"with its latent cached the model differs from the module: relative error {error:.3g},"
            f" wanted at most {_PROOF_ERROR:g}",
            hint="the module carries something from token to token beside attention (a sum or a "
            "shift over tokens, a position counted in another way)",
            error=error,
        )


class _Run:
    """One call of the raised model: every node by itself, but for tables and attentions."""

    def __init__(
        self,
        raised: RaisedModule,
        ids_BS: torch.Tensor,
        positions_BS: torch.Tensor,
        weight: Callable[[fx.Node], torch.Tensor],
        attend: Attend,
    ) -> None:
        graph = raised.graph
        self.raised = raised
        self.attend = attend
        self.sizes = (ids_BS.shape[0], ids_BS.shape[1])
        given: dict[fx.Node, Any] = {graph.ids: ids_BS}
        if graph.positions is not None:
            given[graph.positions] = positions_BS
        self.values = Values(graph, weight, sizes=self.sizes, given=given)
        positions = positions_BS.reshape(-1)
        self.tables = Values(graph, weight, sizes=(1, positions.shape[0]), positions=positions)
        self.site_of: Mapping[fx.Node, int] = {site.out: site.index for site in raised.sites}

    def of(self, wanted: fx.Node) -> torch.Tensor:
        for node in self._order(wanted):
            self.values.known[node] = self._computed(node)
        value: torch.Tensor = self.values.known[wanted]
        return value

    def _order(self, wanted: fx.Node) -> list[fx.Node]:
        """What `wanted` needs, attentions standing for all that lies between them and the cut."""
        found: set[fx.Node] = set()
        waiting = [wanted]
        while waiting:
            node = waiting.pop()
            if node not in found and node not in self.values.known:
                found.add(node)
                waiting.extend(self._parents(node))
        return [node for node in self.raised.graph.nodes if node in found]

    def _parents(self, node: fx.Node) -> list[fx.Node]:
        if node in self.site_of:
            index = self.site_of[node]
            queries = [score.query.node for score in self.raised.sites[index].scores]
            if self.raised.sites[index].seam:
                queries = [self.raised.sites[index].seam[0]]
            return [*queries, *self.raised.latents[index].rows]
        graph = self.raised.graph
        return [parent for parent in node.all_input_nodes if not graph.is_table(parent)]

    def _computed(self, node: fx.Node) -> Any:
        graph = self.raised.graph
        if node in self.site_of:
            return self._attended(self.site_of[node])
        tables = [parent for parent in node.all_input_nodes if graph.is_table(parent)]
        if not tables:
            return self.values.computed(node)
        before = {}
        for table in tables:
            value = self.tables.of(table)
            before[table] = placed_table(graph, table, node, value, self.sizes)
        # Only while this node is computed: another reader has the table in other axes.
        self.values.known.update(before)
        try:
            return self.values.computed(node)
        finally:
            for table in tables:
                del self.values.known[table]

    def _attended(self, index: int) -> torch.Tensor:
        raised, site = self.raised, self.raised.sites[index]
        latent = raised.latents[index]
        rows = [taken_rows(raised.graph, n, self.values.known[n]) for n in latent.rows]
        row_BSW = rows[0] if len(rows) == 1 else torch.cat(rows, dim=-1)
        out_BHSV = self.attend(
            index,
            self._query(site, latent),
            _picked(row_BSW, latent.latent),
            _picked(row_BSW, latent.rope_key),
        )
        if "X" in site.out_axes:
            return _from_heads(out_BHSV, site.out_axes.replace("X", "BH")).flatten(
                site.out_axes.index("X"), site.out_axes.index("X") + 1
            )
        return _from_heads(out_BHSV, site.out_axes)

    def _query(self, site: Site, latent: Latent) -> torch.Tensor:
        """Every product's query side by side, columns in the order of the latent form."""
        first = site.scores[0].factor
        parts = []
        for score in site.scores if not site.seam else ():
            value = as_heads(self._value(score.query), score.query.axes, "BHSE", self.sizes[0])
            factor = score.factor / first
            parts.append(value if factor == 1 else value * factor)
        if site.seam:
            parts.append(self.values.known[site.seam[0]])
        whole = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        whole = whole.expand(-1, latent.heads, -1, -1)
        query_BHSE = _picked(whole, latent.columns)
        if all(factor == 1 for factor in latent.factors):
            return query_BHSE
        return query_BHSE * torch.tensor(latent.factors)

    def _value(self, operand: Operand) -> torch.Tensor:
        value: torch.Tensor = self.values.known[operand.node]
        return value


def _picked(value: torch.Tensor, places: tuple[int, ...]) -> torch.Tensor:
    """Places of the last axis, as slices: as many as there are runs of neighbours."""
    if places == tuple(range(value.shape[-1])):
        return value
    runs: list[list[int]] = []
    for place in places:
        if runs and place == runs[-1][1]:
            runs[-1][1] += 1
        else:
            runs.append([place, place + 1])
    parts = [value[..., first:last] for first, last in runs] or [value[..., :0]]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _from_heads(out_BHSV: torch.Tensor, axes: str) -> torch.Tensor:
    """The result in the letters of `axes`; without a head axis there is one head."""
    if "H" not in axes:
        return out_BHSV[:, 0].permute(["BSV".index(letter) for letter in axes])
    return out_BHSV.permute(["BHSV".index(letter) for letter in axes])
