"""Deliberately wrong graphs: the proof that the validator can say no.

`write_mutant` makes one fault in a good bundle and publishes it again with a right manifest and
right hashes, so that nothing but the numbers can tell.
"""

from mla_deploy.validate.mutants import attention, blocks, caching, positions, routing
from mla_deploy.validate.mutants.mutant import Mutant
from mla_deploy.validate.mutants.publish import write_mutant

MUTANTS: tuple[Mutant, ...] = (
    *attention.MUTANTS,
    *positions.MUTANTS,
    *caching.MUTANTS,
    *blocks.MUTANTS,
    *routing.MUTANTS,
)

__all__ = ["MUTANTS", "Mutant", "write_mutant"]
