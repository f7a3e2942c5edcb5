"""What weights are stored as: one description, for ONNX Runtime and for TensorRT alike.

A `WeightForm` is how one weight is quantised: along its last axis, in blocks that share a scale.
A `WeightPlan` gives each role of a weight its form. A plan is spelled as the option `--weights`:

    int4 | int8 | fp8                    the usual plan of that name
    int4:block=128,asymmetric            another block, zero points beside the scales
    int4:head=int8,embedding=int4        a role on its own
    int4:experts=keep                    a role left in float
    int4:kv_a=int8,o=int8                of the linear layers, some on their own
    int4:mixed                           those that lose most, kv_a and down, in int8:block=64

`q`, `kv_a`, `o` and `down` are linear layers too, and take what `linear` takes unless they are
named: projections of queries, of the latent and rope key, of what heads give, and out of an MLP.

int4 keeps the embedding in int8: it reads one row a token, so four bits save no time there, and
they were seen to cost a third as much as all linear layers together (models/tiny-deepseek-v3:
mean KL 0.009 beside 0.024). int8 has blocks of 32, as q8_0 has: on a CPU the inputs of a product
are rounded by the same blocks, which a small model feels (SmolLM2-135M in MLA form: mean KL 0.0085
with blocks of 64, 0.0054 with 32, for 1.08 of the time of a step of m4).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mla_deploy.errors import InputError, quoted

LINEAR_ROLES = ("q", "kv_a", "o", "down")  # parts of `linear`
# What of int4 is int8 if it is mixed: the latent meets every head, and an MLP's last product has
# the widest inputs (docs/size.md).
_MIXED, _MIXED_BLOCK = ("kv_a", "down"), 64
ROLES = ("linear", *LINEAR_ROLES, "kv_b", "experts", "head", "embedding")
KINDS = ("int4", "int8", "fp8")
BLOCKS = (32, 64, 128)
PER_CHANNEL = 0
_KEEP = "keep"
_BITS = {"int4": 4, "int8": 8, "fp8": 8}
_USUAL_BLOCK = {"int4": 32, "int8": 32, "fp8": 128}


@dataclass(frozen=True)
class WeightForm:
    """`block` values of the last axis share one scale; PER_CHANNEL: all of a row do."""

    kind: str  # one of KINDS
    block: int
    symmetric: bool = True

    @property
    def bits(self) -> int:
        return _BITS[self.kind]

    @property
    def is_float(self) -> bool:
        return self.kind == "fp8"

    def width(self, columns: int) -> int:
        """Values that share a scale, in a weight of so many columns."""
        return columns if self.block == PER_CHANNEL else self.block

    def blocks(self, columns: int) -> int:
        """Scales of one row; a last block may be shorter than the others."""
        return -(-columns // self.width(columns))

    @property
    def spelling(self) -> str:
        words = [f"block={self.block or 'channel'}", *([] if self.symmetric else ["asymmetric"])]
        return f"{self.kind}:{','.join(words)}"


@dataclass(frozen=True)
class WeightPlan:
    """The form of each role; a role that is not there stays in float."""

    forms: Mapping[str, WeightForm]
    spelling: str

    def form(self, role: str) -> WeightForm | None:
        return self.forms.get(role)

    @property
    def kinds(self) -> tuple[str, ...]:
        """What the plan stores weights as, each once."""
        return tuple(dict.fromkeys(form.kind for form in self.forms.values()))

    @property
    def kind(self) -> str:
        """That of the linear layers, which gates go by; the coarsest where they are in float."""
        linear = self.forms.get("linear")
        return linear.kind if linear is not None else min(self.kinds, key=KINDS.index)

    @classmethod
    def from_dict(cls, section: Mapping[str, Any]) -> WeightPlan:
        """What `to_dict` told; the manifest's own check has seen to its shape."""
        told = {role: str(text) for role, text in section["roles"].items()}
        for role in LINEAR_ROLES:
            told.setdefault(role, told.get("linear", _KEEP))
        forms = {role: _parse_form(text) for role, text in told.items() if text != _KEEP}
        return cls(forms, str(section["plan"]))

    def to_dict(self) -> dict[str, Any]:
        """As the manifest tells it: a part of `linear` where its form is another."""
        roles = {
            role: self.forms[role].spelling if role in self.forms else _KEEP
            for role in ROLES
            if role in self.forms or role in LINEAR_ROLES
            if role not in LINEAR_ROLES or self.form(role) != self.form("linear")
        }
        return {"plan": self.spelling, "kind": self.kind, "roles": roles}


def is_plan(spelling: str) -> bool:
    """Whether `--weights` names a plan, and not a file or `keep`."""
    return spelling.partition(":")[0] in KINDS


def parse_plan(spelling: str) -> WeightPlan:
    """Raises: InputError EXP-WEIGHT-FORM, which says what there is."""
    kind, _, rest = spelling.partition(":")
    if kind not in KINDS:
        raise _unknown(spelling, f"{quoted(kind)} is no form")
    base = WeightForm(kind, _USUAL_BLOCK[kind])
    roles: dict[str, WeightForm | None] = {}
    mixed: dict[str, WeightForm | None] = {}
    for word in filter(None, rest.split(",")):
        name, equals, value = word.partition("=")
        if name == "block" and value in map(str, BLOCKS):
            base = replace(base, block=int(value))
        elif word == "block=channel":
            base = replace(base, block=PER_CHANNEL)
        elif word == "asymmetric" and kind != "fp8":
            base = replace(base, symmetric=False)
        elif word == "mixed" and kind == "int4":
            mixed = dict.fromkeys(_MIXED, WeightForm("int8", _MIXED_BLOCK))
        elif name in ROLES and equals and value in (*KINDS, _KEEP):
            roles[name] = None if value == _KEEP else WeightForm(value, _USUAL_BLOCK[value])
        else:
            raise _unknown(spelling, f"{quoted(word)} is not known")
    forms: dict[str, WeightForm | None] = dict.fromkeys(ROLES, base)
    if kind == "int4":
        forms["embedding"] = WeightForm("int8", base.block or _USUAL_BLOCK["int8"])
    forms.update(dict.fromkeys(LINEAR_ROLES, roles.get("linear", base)))
    forms.update({**mixed, **roles})
    kept = {role: form for role, form in forms.items() if form is not None}
    if not kept:
        raise _unknown(spelling, "it leaves every weight in float")
    return WeightPlan(kept, spelling)


def _parse_form(spelling: str) -> WeightForm:
    """What `WeightForm.spelling` told."""
    kind, _, rest = spelling.partition(":")
    words = rest.split(",")
    block = words[0].removeprefix("block=")
    if kind not in KINDS or not (block.isdigit() or block == "channel"):
        raise _unknown(spelling, "it is no form of one role")
    size = PER_CHANNEL if block == "channel" else int(block)
    return WeightForm(kind, size, symmetric="asymmetric" not in words)


def _unknown(spelling: str, why: str) -> InputError:
    return InputError(
        "EXP-WEIGHT-FORM",
        f"weights are {quoted(spelling)}: {why}; wanted {', '.join(KINDS)}, and after a colon any "
        f"of block={'|'.join(map(str, BLOCKS))}|channel, asymmetric, mixed (of int4), and "
        f"ROLE=KIND|keep with a role of {', '.join(ROLES)}",
        hint="for example `--weights int4:asymmetric,mixed` or `--weights int8:block=128`",
        weights=spelling,
    )
