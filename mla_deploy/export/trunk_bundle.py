"""A bundle whose graphs are all trunk: of a user's module, or of another exporter's graph."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx
import onnx_ir as ir

from mla_deploy.bundle import Stage
from mla_deploy.config import MlaConfig
from mla_deploy.export.assemble import Assembled, GraphForm
from mla_deploy.export.assemble_module import assemble_module
from mla_deploy.export.bind import bind_weights
from mla_deploy.export.joined import graph_bytes
from mla_deploy.export.lowered import Lowering, any_capacity
from mla_deploy.export.options import ExportOptions
from mla_deploy.export.pipeline import Progress, widest_row, write_weights
from mla_deploy.export.trace import Trace
from mla_deploy.export.weights import WeightLayout, WeightSource
from mla_deploy.rewrite import order
from mla_deploy.rewrite.ensures import require_latent_only


@dataclass(frozen=True)
class TrunkBundle:
    """What its two graphs are made of; `layout` learns their weights. `attentions`: how many."""

    trace: Trace
    config: MlaConfig
    options: ExportOptions
    attentions: int
    layout: WeightLayout = field(default_factory=WeightLayout)

    def assembled(self, lowering: Lowering) -> dict[str, Assembled]:
        """`prefill` and `decode`. Raises: REW-*."""
        form = GraphForm(
            config=self.config,
            cache=self.trace.form,
            dtype=self.options.dtype,
            cache_dtype=self.options.rows_dtype,
            all_logits=self.options.all_logits,
            layers_prefix="",
            builder=lowering.builder,
        )
        return {
            name: assemble_module(self.trace, form, rules, self.layout)
            for name, rules in lowering.graphs.items()
        }

    def require_fired(self, graphs: dict[str, Assembled]) -> None:
        """Attention is lowered where the latent is, and each cache once. Raises: REW-COUNT."""
        count, caches = self.attentions, {"lower_cache_update": len(self.trace.trunk_buffers)}
        prefill = {"lower_expanded_attention": count, **caches}
        decode = {"absorb_projections": count, "lower_latent_attention": count, **caches}
        order.require_counts(graphs["prefill"].counts, prefill)
        order.require_counts(graphs["decode"].counts, decode)

    def write(
        self, graphs: dict[str, Assembled], weights: WeightSource, stage: Stage, report: Progress
    ) -> dict[str, onnx.ModelProto]:
        """Weights and graphs, as they stand in the stage. Raises: CKPT-*, REW-EXPANDED."""
        write_weights(weights, self.layout, stage, report)
        protos = {}
        for name, graph in graphs.items():
            bind_weights(graph.model, self.layout, stage.path, stage.named("weights"))
            protos[name] = ir.to_proto(graph.model)
        checked = any_capacity(protos["decode"], self.options.capacity)
        require_latent_only(checked, self.config.num_heads, widest_row(self.trace))
        for name, proto in protos.items():
            stage.write_bytes(stage.named(f"{name}.onnx"), graph_bytes(proto))
        return protos
