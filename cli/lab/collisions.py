"""How many SPIs collide when SAs move to a gateway: arithmetic, and a simulation beside it. Pure.

n SAs move, one after the other, to a gateway that serves m; inbound SPIs are uniform in a range of r values
and unique at each gateway. An SA whose SPI is taken gets a free one instead (UPDATE_SPI), so each arrival
adds exactly one name to the gateway's.

From one gateway. The n SPIs are distinct, so the (k+1)-th is uniform in the r - k values that the k before it
did not have. Of these values m are taken at the new gateway, always: a miss takes one value out of the
possible ones and adds no obstacle for those to come; a hit takes one obstacle out (nobody else comes with
that SPI), and the free SPI drawn instead adds one. So

    E = m * sum(1 / (r - k), k = 0..n-1)         P(none) = product(1 - m / (r - k), k = 0..n-1)
    E ~ n m / r                                  P(none) ~ exp(-n m / r)

each with a relative error of n / r at most.

From many gateways. The n SPIs are independent, and may be equal to each other. The (k+1)-th meets m + k
names:

    E = sum((m + k) / r, k = 0..n-1) = n m / r + n (n - 1) / (2 r)
    P(none) = product(1 - (m + k) / r, k = 0..n-1) ~ exp(-E)

The MN's own SPIs (outbound at the gateway) can only collide among MNs that share an address: for a NAT with k
MNs at the gateway and one that comes, n = 1 and m = k. IKE SPIs have r = 2^64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

from ikectx.errors import UsageError

RANGE = 0xCFFFFFFF - 0xC0000000 + 1
"""charon's ESP SPIs, charon.spi_min to charon.spi_max: 2^28."""
_EXACT = 10_000_000
"""Sums longer than that are done by integrals."""
_DRAWS = 3_000_000
"""A simulation draws about so many SPIs at most."""


@dataclass(frozen=True, slots=True)
class Collisions:
    """The expected collisions. `one`, `any_one`: from one gateway; `many`, `any_many`: from as many as there
    are SAs.

    `one`, `many`: expected number of SAs that need another SPI; `approximate`: n m / r. `any_*`: probability
    that at least one does.
    """

    moved: int
    serving: int
    spis: int
    approximate: float
    one: float
    any_one: float
    many: float
    any_many: float


@dataclass(frozen=True, slots=True)
class Simulated:
    """Means of `runs` simulated moves; `*_error`: standard errors of the means."""

    runs: int
    seed: int
    one: float
    one_error: float
    many: float
    many_error: float


def expected(moved: int, serving: int, spis: int = RANGE) -> Collisions:
    """Both formulas of this module's docstring. Errors: UsageError if the SAs do not fit the range."""
    if moved < 0 or serving < 0 or spis < 1:
        raise UsageError("numbers of SAs are not negative, and a range has a value at least")
    if moved + serving > spis:
        raise UsageError(f"{moved} + {serving} SAs do not fit in {spis} SPIs")
    if moved <= _EXACT:
        one = serving * math.fsum(1 / (spis - k) for k in range(moved))
        none_one = _product(serving, spis, moved, falling=True)
        none_many = _product(serving, spis, moved, falling=False)
    else:
        one = serving * (math.log(spis) - math.log(spis - moved)) if moved < spis else float(serving)
        none_one = math.exp(-one)
        none_many = math.exp(-(moved * serving + moved * (moved - 1) / 2) / spis)
    return Collisions(
        moved,
        serving,
        spis,
        moved * serving / spis,
        one,
        1 - none_one,
        moved * serving / spis + moved * (moved - 1) / (2 * spis),
        1 - none_many,
    )


def _product(serving: int, spis: int, moved: int, *, falling: bool) -> float:
    """P(none), by logarithms: the factors are close to 1."""
    total = 0.0
    for k in range(moved):
        taken = serving / (spis - k) if falling else (serving + k) / spis
        if taken >= 1:
            return 0.0
        total += math.log1p(-taken)
    return math.exp(total)


def simulate(
    moved: int, serving: int, spis: int = RANGE, *, seed: int = 1, runs: int = 0
) -> Simulated | None:
    """The same by simulation: SAs with random SPIs move, and those that collide get free ones.

    `runs` 0: as many as some seconds allow, 2 at least; None if even those take longer.
    """
    expected(moved, serving, spis)  # checks the numbers
    if not runs and moved + serving > _DRAWS:
        return None
    runs = runs or max(2, min(2000, _DRAWS // max(moved + serving, 1)))
    dice = Random(seed)  # noqa: S311  not for keys
    counts = [[_run(dice, moved, serving, spis, distinct) for _ in range(runs)] for distinct in (True, False)]
    (one, one_error), (many, many_error) = map(_mean, counts)
    return Simulated(runs, seed, one, one_error, many, many_error)


def _run(dice: Random, moved: int, serving: int, spis: int, distinct: bool) -> int:
    taken = set(_sample(dice, spis, serving))
    arrivals = _sample(dice, spis, moved) if distinct else [dice.randrange(spis) for _ in range(moved)]
    collided = 0
    for spi in arrivals:
        name = spi
        if name in taken:
            collided += 1
            while name in taken:
                name = dice.randrange(spis)
        taken.add(name)
    return collided


def _sample(dice: Random, spis: int, count: int) -> list[int]:
    return dice.sample(range(spis), count)


def _mean(counts: list[int]) -> tuple[float, float]:
    mean = sum(counts) / len(counts)
    if len(counts) < 2:
        return mean, 0.0
    spread = sum((count - mean) ** 2 for count in counts) / (len(counts) - 1)
    return mean, math.sqrt(spread / len(counts))


def rows(found: Collisions, chance: Simulated | None = None) -> list[tuple[str, ...]]:
    """A table: what, from one gateway, from many."""

    def number(value: float) -> str:
        return f"{value:.4g}"

    table: list[tuple[str, ...]] = [
        ("SAs that need another SPI, expected", number(found.one), number(found.many)),
        ("the same, n m / r", number(found.approximate), number(found.approximate)),
        ("probability of at least one", number(found.any_one), number(found.any_many)),
    ]
    if chance is not None:
        table.append(
            (
                f"simulated, mean of {chance.runs} runs",
                f"{number(chance.one)} ± {number(chance.one_error)}",
                f"{number(chance.many)} ± {number(chance.many_error)}",
            )
        )
    return table


def line(moved: int, serving: int, spis: int = RANGE) -> str:
    """One line for a dry run."""
    found = expected(moved, serving, spis)
    return (
        f"SPI collisions to expect, with {serving} SAs there as here: {found.one:.3g} of {moved} moved "
        f"({spis} SPIs; at least one with probability {found.any_one:.3g})"
    )
