"""Several forwards of one model abreast, for models that no memory holds whole.

Each stops where a layer begins. When all have come there, the layer's weights are read, each goes
on to the next one, and the weights are let go. So a layer is read once, however many forwards
there are, and what a forward holds between layers is its own: a stack of calls in a greenlet, which
serves every class, whatever its layers hand to one another. All run in one thread: with one each,
libraries below torch would keep tens of megabytes of scratch for every forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet

from mla_deploy.errors import InputError
from mla_deploy.source.layerwise import LayerwiseModel, Progress


@dataclass(eq=False)
class Lane:
    """One forward: of rows [B, S], whose logits `finished` gets. Without it, it ends at the head.

    `label` says to hooks whose forward runs.
    """

    ids_BS: torch.Tensor
    label: Any
    finished: Callable[[torch.Tensor], None] | None = None
    memo: dict[int, Any] = field(default_factory=dict)  # for hooks


# (group of lanes, name of the layer that they have just been through, with its weights there)
After = Callable[[int, str], None]


class Abreast:
    """Runs lanes through `model`. `running` is the lane whose forward runs."""

    def __init__(self, model: LayerwiseModel) -> None:
        self.running: Lane | None = None
        self._model = model
        self._runs: dict[int, _Run] = {}  # by the lane

    @torch.no_grad()
    def run(
        self, groups: Sequence[Sequence[Lane]], after: After, progress: Progress | None = None
    ) -> None:
        """Every lane to its end; in each layer one group after the other, `after` behind each."""
        hooks = [
            layer.register_forward_pre_hook(lambda *_, name=name: self._stop(name))
            for name, layer in self._model.layers.items()
        ]
        head = self._model.module.get_output_embeddings()
        if head is not None:
            hooks.append(head.register_forward_pre_hook(lambda *_: self._at_head()))
        runs = [[_Run(self._model, lane) for lane in group] for group in groups]
        every = [run for group in runs for run in group]
        self._runs = {id(run.lane): run for run in every}
        try:
            with self._model.trunk_loaded():
                for run in every:
                    self._resume(run)
                done, total = 0, len(self._model.layers)
                while any(not run.ended for run in every):
                    name = _common(every)
                    with self._model.layer_loaded(name):
                        for index, group in enumerate(runs):
                            for run in group:
                                if not run.ended:
                                    self._resume(run)
                            after(index, name)
                    done += 1
                    if progress is not None:
                        progress(min(done, total), total)
        finally:
            for hook in hooks:
                hook.remove()
            for run in every:
                run.cancel()
            self.running = None

    def _resume(self, run: _Run) -> None:
        self.running = run.lane
        run.resume()
        if run.logits is not None and run.lane.finished is not None:
            logits, run.logits = run.logits, None
            run.lane.finished(logits)

    def _stop(self, name: str) -> None:
        if self.running is not None:
            self._runs[id(self.running)].stop(name)

    def _at_head(self) -> None:
        if self.running is not None and self.running.finished is None:
            raise GreenletExit  # no error: whoever resumed the lane goes on


class _Run:
    """A lane's stack of calls, which others run beside."""

    def __init__(self, model: LayerwiseModel, lane: Lane) -> None:
        self.lane = lane
        self.at = ""  # the layer that it stands before
        self.logits: torch.Tensor | None = None
        self._model = model.module
        self._calls = greenlet(self._forward)

    @property
    def ended(self) -> bool:
        return bool(self._calls.dead)

    def resume(self) -> None:
        """On to the next layer, or to the end. Raises what the forward raises."""
        self._calls.switch()

    def stop(self, name: str) -> None:
        """Called within the forward: back to whom `resume` was called by."""
        self.at = name
        getcurrent().parent.switch()

    def cancel(self) -> None:
        """Leaves the forward wherever it stands."""
        if not self.ended:
            self._calls.throw(GreenletExit)

    def _forward(self) -> None:
        found: Any = self._model(input_ids=self.lane.ids_BS, use_cache=False)
        self.logits = found.logits.float()


def _common(runs: Sequence[_Run]) -> str:
    """The layer that every lane stands before. Raises: SRC-SEAM."""
    names = {run.at for run in runs if not run.ended}
    if len(names) != 1:
        raise InputError(
            "SRC-SEAM",
            f"the order of layers depends on the tokens: rows stand before {sorted(names)}",
            hint="this model class cannot be run layer by layer; please report it",
        )
    return names.pop()
