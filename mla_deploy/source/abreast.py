"""Several forwards of one model abreast, for models that no memory holds whole.

Each stops where a layer begins. When all have come there, the layer's weights are read, each goes
on to the next one, and the weights are let go. So a layer is read once, however many forwards
there are, and what a forward holds between layers is its own: a stack of calls in a thread, which
serves every class, whatever its layers hand to one another. One thread runs at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

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
            raise _LaneEnds


class _LaneEnds(BaseException):
    """A forward is left; no error, and nothing of a model may catch it."""


class _Run:
    """A lane's thread, and the baton between it and the one that drives it."""

    def __init__(self, model: LayerwiseModel, lane: Lane) -> None:
        self.lane = lane
        self.at = ""  # the layer that it stands before
        self.ended = False
        self.logits: torch.Tensor | None = None
        self._model = model.module
        self._error: BaseException | None = None
        self._cancelled = False
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._forward, daemon=True)
        self._thread.start()

    def resume(self) -> None:
        """On to the next layer, or to the end. Raises what the forward raises."""
        self._go.release()
        self._stopped.acquire()
        if self._error is not None:
            raise self._error

    def stop(self, name: str) -> None:
        """Called in the thread."""
        self.at = name
        self._stopped.release()
        self._go.acquire()
        if self._cancelled:
            raise _LaneEnds

    def cancel(self) -> None:
        """Ends the thread wherever it stands."""
        if not self.ended:
            self._cancelled = True
            self._go.release()
        self._thread.join()

    def _forward(self) -> None:
        self._go.acquire()
        try:
            if not self._cancelled:
                with torch.no_grad():
                    found = self._model(input_ids=self.lane.ids_BS, use_cache=False)
                self.logits = found.logits.float()
        except _LaneEnds:
            pass
        except BaseException as error:  # raised again by the one that drives
            self._error = error
        finally:
            self.ended = True
            self._stopped.release()


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
