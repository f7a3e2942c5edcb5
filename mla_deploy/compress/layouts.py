"""The layouts by name: what `--layout` and `--beside` take."""

from __future__ import annotations

from mla_deploy.compress.budget import Choice
from mla_deploy.compress.deepseek_layers import DeepseekLayers, family_for, written_settings
from mla_deploy.compress.latent_layers import LatentLayers
from mla_deploy.compress.plan import Form
from mla_deploy.compress.proof import Proof
from mla_deploy.compress.statistics import Progress
from mla_deploy.compress.survey import Survey, survey
from mla_deploy.compress.text import Rations
from mla_deploy.errors import InputError, quoted

LAYOUTS = ("own", "deepseek")


def check_layouts(layout: str, beside: str | None, budget: float | str | None) -> None:
    """Raises: InputError CMP-LAYOUT."""
    for name in (layout, beside):
        if name is not None and name not in LAYOUTS:
            raise InputError(
                "CMP-LAYOUT",
                f"layout {quoted(name)} is not known, wanted one of {', '.join(LAYOUTS)}",
            )
    if layout == beside:
        raise InputError(
            "CMP-LAYOUT",
            f"{quoted(layout)} is to be judged beside itself",
            hint="name another layout, or none",
        )
    if budget is not None and "deepseek" in (layout, beside):
        raise InputError(
            "CMP-LAYOUT",
            "a budget chooses among forms that the deepseek layout cannot hold: widths by layer, "
            "caches stored in few bits",
            hint="give --rank and --rope-dim; a DeepSeek cache is quantised by "
            "`mla-deploy export --cache-dtype`",
        )


class Layouts:
    """The layout that is written and the one judged beside it, if any."""

    def __init__(self, layout: str, beside: str | None, proof: Proof, *, asked: bool) -> None:
        """`asked`: for a rank."""
        self.names = (layout,) if beside is None else (layout, beside)
        self._proof, self._asked = proof, asked

    def check(self, form: Form) -> None:
        """Sizes that a layout cannot hold. Raises: InputError CMP-LAYOUT, CMP-RANK."""
        if "deepseek" in self.names:
            written = written_settings(form.usual, asked=self._asked)[1]
            family_for(self._proof.source, written.rank)

    def survey(self, choice: Choice, given: Rations, progress: Progress | None) -> Survey:
        """What has to be known of all layers first. Raises: as `survey.survey`."""
        if "deepseek" not in self.names or choice.form.method != "low-rank":
            return Survey(moments=choice.moments)
        return survey(self._proof, choice.form.usual, given, progress)

    def layers(self, form: Form, dtype: str, seen: Survey) -> tuple[LatentLayers, ...]:
        """In the order of `names`. Raises: InputError CMP-LAYOUT, CMP-RANK."""
        source, slots_F = self._proof.source, seen.slots_F
        return tuple(
            DeepseekLayers(source, form, dtype, asked=self._asked, slots_F=slots_F)
            if name == "deepseek"
            else LatentLayers(source, form, dtype)
            for name in self.names
        )
