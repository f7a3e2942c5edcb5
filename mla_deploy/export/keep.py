"""`--weights keep`: what has to hold so that weights go into a bundle in the form they have.

Float weights keep their dtype, values of eight bits and their scales stay apart; the graph widens
what it reads (`widen.py`), so the weight file is of the checkpoint's size. What no graph can read
so, and what a target has no dtype for, is refused by its name, from headers alone.
"""

from __future__ import annotations

from mla_deploy.checkpoint import Checkpoint, TensorSlice, WeightMap
from mla_deploy.checkpoint.slices import Place, StackedSlices
from mla_deploy.errors import InputError, quoted
from mla_deploy.export.in_place import DTYPES, SCALES, VALUES, commonest_dtype
from mla_deploy.targets import Target, check_stored

WAYS = ("keep",)
# Always made anew: absorbing needs its halves in float.
_ALWAYS_MADE = ".kv_b_proj.weight"


def kept_dtype(source: Checkpoint, asked: str | None) -> str:
    """The dtype of a bundle that keeps its weights: of the cache, and of what is not eight bits.

    Raises: InputError EXP-KEEP when another one is asked for.
    """
    found = commonest_dtype(source)
    if asked not in (None, found):
        raise InputError(
            "EXP-KEEP",
            f"dtype is {asked}, the checkpoint's weights are {found} and are to be kept so",
            hint="leave out one of --dtype and --weights",
        )
    return found


def require_keepable(weights: WeightMap, target: Target) -> None:
    """Refuse weights that could only be kept by widening them; no weight is read.

    Raises: InputError EXP-KEEP, TARGET-DTYPE.
    """
    checkpoint = weights.checkpoint
    seen = set()
    for name, place in weights.slices.items():
        for tensor in _tensors(place) if not name.endswith(_ALWAYS_MADE) else ():
            if tensor not in seen:
                seen.add(tensor)
                check_stored(target, _stored_as(checkpoint, tensor))


def _tensors(place: Place) -> tuple[str, ...]:
    parts = place.parts if isinstance(place, StackedSlices) else (place,)
    return tuple(part.tensor for part in parts if isinstance(part, TensorSlice))


def _stored_as(checkpoint: Checkpoint, tensor: str) -> str:
    """The name, among a target's dtypes, of the form that a weight has on disk.

    Raises: InputError EXP-KEEP, where no graph could read it in that form.
    """
    parts, scheme = checkpoint.parts(tensor), checkpoint.scheme(tensor)
    values = parts["values"].dtype
    if scheme is None:
        return DTYPES[values]
    scale = parts.get("scale")
    if values in VALUES and len(parts) == 2 and scale is not None and scale.dtype in SCALES:
        return VALUES[values]
    made_of = ", ".join(f"{role} {part.dtype}" for role, part in parts.items())
    raise InputError(
        "EXP-KEEP",
        f"{quoted(tensor)} cannot be kept: it is {scheme.bits} bits in the layout "
        f"{quoted(scheme.layout)} ({made_of}); wanted float weights, or values of 8 bits with "
        "scales in float",
        hint="leave --weights out: the weights are then stored in --dtype",
        tensor=tensor,
    )
