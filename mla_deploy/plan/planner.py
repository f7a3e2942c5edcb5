"""One device's plan: bytes, what fits, bounds of speed, and the same beside other attentions."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from mla_deploy.cache_plan import ITEM_BYTES
from mla_deploy.config import MlaConfig
from mla_deploy.latent_store import rows_dtype, store_of
from mla_deploy.plan import memory, work
from mla_deploy.plan.fit import MOST_ROWS, most
from mla_deploy.plan.models import PlannedModel
from mla_deploy.plan.report import GIB, DevicePlan, ModelFacts, Question, RivalRow
from mla_deploy.plan.rivals import RIVALS, Rival
from mla_deploy.plan.row import Row
from mla_deploy.plan.tensors import Tensor, stored_bytes


@dataclass(frozen=True)
class Planner:
    """One device's plan."""

    row: Row
    config: MlaConfig
    tensors: tuple[Tensor, ...]
    asked: Question
    reserve_gib: float | None

    def plan(self) -> DevicePlan:
        device, target, model = self.row.device, self.row.device.row, self._model()
        batch, context = self.asked.batch, self.asked.context
        needed = memory.needed(model, target, batch, context)
        usable = self._usable_bytes()

        def fits(rows: int, tokens: int) -> bool:
            return memory.needed(model, target, rows, tokens).total_bytes <= usable

        host = memory.build_bytes(model, target)
        rest = needed.total_bytes - needed.cache_bytes
        return DevicePlan(
            device=device,
            dtype=self.row.dtype,
            cache_dtype=self.row.cache_dtype,
            usable_bytes=usable,
            memory=needed,
            longest_context=most(
                self.config.max_position_embeddings, lambda tokens: fits(batch, tokens)
            ),
            biggest_batch=most(MOST_ROWS, lambda rows: fits(rows, context)),
            build_host_bytes=host,
            build_fits=None if host is None or not device.is_unified else host <= usable,
            decode=self._bound(work.decode_work(model, batch, context)),
            prefill=self._bound(work.prefill_work(model, batch, context)),
            rivals={
                name: self._rival(model, rival, usable - rest, needed.cache_bytes)
                for name, rival in RIVALS.items()
            },
            notes=self.row.notes,
        )

    def _model(self) -> work.Model:
        row = self.row
        stored = stored_bytes(
            self.tensors, self.config, row.device.row, dtype=row.dtype, plan=row.weights
        )
        itemsize = ITEM_BYTES[rows_dtype(row.cache_dtype, row.dtype)]
        return work.Model(self.config, self.tensors, stored, itemsize, store_of(row.cache_dtype))

    def _usable_bytes(self) -> int:
        device = self.row.device
        reserved = device.reserved_gib if self.reserve_gib is None else self.reserve_gib
        return max(0, round((device.memory_gib - reserved) * GIB))

    def _bound(self, of: work.Work) -> work.Bound | None:
        device = self.row.device
        return work.bound(of, device.bandwidth_gb_s, device.tflops.get(self.row.dtype))

    def _rival(self, model: work.Model, rival: Rival, room: int, latent_bytes: int) -> RivalRow:
        """Its cache holds numbers of the same width; all else is taken to be the same."""
        batch, context = self.asked.batch, self.asked.context

        def held(tokens: int) -> int:
            item = model.itemsize
            return rival.cache_bytes(self.config, batch=batch, capacity=tokens, itemsize=item)

        return RivalRow(
            cache_bytes=held(context),
            ratio=held(context) / latent_bytes,
            longest_context=most(
                self.config.max_position_embeddings, lambda tokens: held(tokens) <= room
            ),
            decode=self._bound(work.decode_work(model, batch, context, rival)),
        )


def model_facts(model: PlannedModel, tensors: tuple[Tensor, ...]) -> ModelFacts:
    """The model, as far as the report tells it."""
    config = model.config
    by_part: Counter[str] = Counter()
    for tensor in tensors:
        by_part[tensor.part] += tensor.elements
    active = work.active_parameters(config, tensors)
    return ModelFacts(
        name=model.name,
        model_type=config.model_type,
        architecture=config.architecture,
        parameters=sum(by_part.values()),
        active_parameters=active,
        parameters_by_part=dict(by_part),
        max_position_embeddings=config.max_position_embeddings,
    )
