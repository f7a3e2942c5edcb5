"""What an export may be asked for, checked before anything is read."""

from __future__ import annotations

from dataclasses import dataclass

from mla_deploy.config import MlaConfig
from mla_deploy.errors import InputError
from mla_deploy.export.lowered import require_form
from mla_deploy.export.weights import DTYPES
from mla_deploy.latent_store import EXPORTED_DTYPES, STATIC, LatentStore, rows_dtype, store_of
from mla_deploy.targets import DEFAULT_TARGET, buildable_target, check_dtype, find_target
from mla_deploy.weight_forms.fit import check_forms, fitted
from mla_deploy.weight_forms.form import WeightPlan, is_plan, parse_plan

DEFAULT_CAPACITY = 4096
CACHE_KINDS = ("in-place", "growing")
CACHE_LAYOUTS = ("fused", "split")


@dataclass(frozen=True)
class ExportOptions:
    """What a user may choose; every None is the library's default."""

    target: str
    dtype: str
    cache: str
    cache_layout: str
    cache_dtype: str
    capacity: int
    all_logits: bool
    in_place: bool
    weights: str | None  # None, "keep", or a plan of `weight_forms.form`
    calibrate: str | None = None  # a file of text that rounding is fitted to
    rotate_latent: bool = False
    cache_by_config: bool = False  # `cache_dtype` is that of config.json; nobody asked for it

    @property
    def plan(self) -> WeightPlan | None:
        """How weights are quantised."""
        if self.weights is None or not is_plan(self.weights):
            return None
        return fitted(find_target(self.target), parse_plan(self.weights))

    @property
    def store(self) -> LatentStore | None:
        """How latents are stored, when not as numbers of `cache_dtype`."""
        return store_of(self.cache_dtype)

    @property
    def rows_dtype(self) -> str:
        """The dtype of cached rows that are no codes."""
        return rows_dtype(self.cache_dtype, self.dtype)


def options_for(
    config: MlaConfig,
    *,
    target: str | None,
    dtype: str | None,
    weights: str | None,
    cache: str | None,
    cache_layout: str | None,
    cache_dtype: str | None,
    capacity: int | None,
    all_logits: bool,
    in_place: bool,
    calibrate: str | None,
    rotate_latent: bool = False,
) -> ExportOptions:
    """What is asked for, with defaults for a model of `config` in place of None.

    Raises: as `check_options`.
    """
    default = min(config.max_position_embeddings, DEFAULT_CAPACITY)
    row = buildable_target(target or DEFAULT_TARGET)
    stored = dtype or row.default_dtype
    own = config.latent_cache_dtype
    kept = cache_dtype or own or stored
    is_coded = store_of(kept) is not None
    chosen = ExportOptions(
        target=row.name,
        dtype=stored,
        cache=cache or "in-place",
        cache_layout=cache_layout or ("split" if is_coded else "fused"),
        cache_dtype=kept,
        capacity=default if capacity is None else capacity,
        all_logits=all_logits,
        in_place=in_place,
        weights=weights,
        calibrate=calibrate,
        rotate_latent=rotate_latent,
        cache_by_config=cache_dtype is None and own is not None,
    )
    check_options(chosen)
    return chosen


def check_options(chosen: ExportOptions) -> None:
    """Raises: InputError EXP-OPTION, EXP-CACHE, EXP-WEIGHT-FORM, TARGET-*."""
    row = find_target(chosen.target)
    check_dtype(row, chosen.dtype)
    if chosen.weights is not None and is_plan(chosen.weights):
        check_forms(row, parse_plan(chosen.weights))
    if chosen.calibrate is not None and chosen.plan is None and chosen.store is not STATIC:
        raise InputError(
            "EXP-OPTION",
            "a text to calibrate with is given, and no weights to quantise; wanted both",
            hint=f"add `--weights int4`, or for TensorRT `--cache-dtype {STATIC.name}`",
        )
    for name, found, known in (
        ("dtype", chosen.dtype, tuple(DTYPES)),
        ("cache", chosen.cache, CACHE_KINDS),
        ("cache_layout", chosen.cache_layout, CACHE_LAYOUTS),
        ("cache_dtype", chosen.cache_dtype, EXPORTED_DTYPES),
    ):
        if found not in known:
            raise InputError("EXP-OPTION", f"{name} is {found!r}; wanted one of {', '.join(known)}")
    if type(chosen.capacity) is not int or not 1 <= chosen.capacity <= 2**31:
        raise InputError("EXP-OPTION", f"capacity is {chosen.capacity!r}; wanted 1 to 2^31 tokens")
    _require_storable(chosen)
    require_form(chosen)


def _require_storable(options: ExportOptions) -> None:
    """Codes and scales are scattered in place, apart from the rope key."""
    wanted = {"cache": "in-place", "cache_layout": "split"}
    for name, value in wanted.items():
        if options.store is not None and getattr(options, name) != value:
            raise InputError(
                "EXP-CACHE",
                f"{name} is {getattr(options, name)}; a cache stored as {options.cache_dtype} is "
                f"{value}",
                hint="leave the option out, or store the cache as fp16",
            )
