"""How much the voices of some turns speak for one speaker, or for several.

A two-covariance model: a speaker's voice is drawn around the mean of all voices, a turn's around
the speaker's, the further away the less clean speech it has. What a partition of turns into
speakers is worth is then a sum over its speakers in closed form, and short turns weigh as little as
they should, in every decision alike. Source: Brümmer & de Villiers, "The speaker partitioning
problem" (Odyssey 2010), with spheres for covariances; turns take the place of recordings, and
deviations depend on their length.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stream.clock import FRAME_RATE
from stream.tracks.settings import SpeakersSettings

Vector = NDArray[np.float64]
Piece = tuple[NDArray[np.float64] | float, NDArray[np.float64] | float]
NEVER = -np.inf


@dataclass(frozen=True, slots=True)
class TwoCovariance:
    """Spheres in ``dimensions`` dimensions; variances are of whole vectors, all dimensions summed.

    Attributes:
        between: Variance of speakers around the mean of all voices.
        within: Variance of a very long turn around its speaker.
        within_s: What that of a turn of one second has more; of two seconds half of it.
        dimensions: In which voices differ independently.
    """

    between: float
    within: float
    within_s: float
    dimensions: float

    @classmethod
    def of(cls, settings: SpeakersSettings) -> "TwoCovariance":
        """As in the settings."""
        return cls(settings.between, settings.within, settings.within_s, settings.dimensions)

    def precision(self, evidence: float) -> float:
        """What a turn with this many frames of clean speech weighs."""
        return 1.0 / (self.within + self.within_s * FRAME_RATE / evidence) if evidence else 0.0

    def worth(
        self, precision: NDArray[np.float64] | float, square: NDArray[np.float64] | float
    ) -> NDArray[np.float64]:
        """Log-evidence that some turns are one speaker's, but for what no partition changes.

        Args:
            precision: The turns', summed.
            square: Squared length of the sum of their vectors, each times its precision.
        """
        spread = 1.0 + self.between * np.asarray(precision)
        return self.dimensions / 2 * (self.between * np.asarray(square) / spread - np.log(spread))

    def ratio(
        self, one: Piece, other: Piece, product: NDArray[np.float64] | float
    ) -> NDArray[np.float64]:
        """Log-likelihood ratio of two pieces being one speaker's, or two speakers'.

        Args:
            one: Its precision, and the squared length of its sum.
            other: The same.
            product: Of the two sums.
        """
        both = self.worth(one[0] + other[0], one[1] + other[1] + 2 * product)
        return both - self.worth(*one) - self.worth(*other)


def agglomerate(
    model: TwoCovariance,
    totals: NDArray[np.float64],
    precisions: NDArray[np.float64],
    apart: NDArray[np.bool_],
    threshold: float,
) -> NDArray[np.int64]:
    """Joins what is most surely one speaker's, pair by pair, until nothing is.

    Args:
        model: What joining is worth.
        totals: [K, E] vectors, each times its precision.
        precisions: [K] what each weighs.
        apart: [K, K] symmetric; which two are never one.
        threshold: Log-likelihood ratio from which two are joined.

    Returns:
        [K] group of each; a group's number is that of its first member.
    """
    groups = np.arange(len(totals))
    if len(totals) < 2:
        return groups
    products = totals @ totals.T
    weights, apart = precisions.copy(), apart.copy()
    np.fill_diagonal(apart, val=True)
    pieces = (weights, products.diagonal())  # both follow what is joined
    columns = (weights[:, None], products.diagonal()[:, None])
    gains = np.where(apart, NEVER, model.ratio(columns, pieces, products))
    while True:
        first, second = sorted(divmod(int(gains.argmax()), len(gains)))
        if gains[first, second] < threshold:
            return groups
        groups[groups == second] = first
        products[first] += products[second]
        products[:, first] += products[:, second]
        weights[first] += weights[second]
        apart[first] |= apart[second]
        apart[:, first] = apart[first]
        apart[second] = apart[:, second] = True
        gains[second] = gains[:, second] = NEVER
        joined = (float(weights[first]), float(products[first, first]))
        ratios = model.ratio(pieces, joined, products[first])
        gains[first] = np.where(apart[first], NEVER, ratios)
        gains[:, first] = gains[first]


def value(
    model: TwoCovariance,
    totals: NDArray[np.float64],
    precisions: NDArray[np.float64],
    groups: NDArray[np.int64],
    threshold: float,
) -> float:
    """What a partition is worth: what `agglomerate` makes larger with every join.

    Args:
        model: What a speaker is worth.
        totals: [K, E] vectors, each times its precision.
        precisions: [K] what each weighs.
        groups: [K] whose each is.
        threshold: As for `agglomerate`.
    """
    members = (np.unique(groups)[:, None] == groups).astype(np.float64)
    squares = np.square(members @ totals).sum(1)
    return float((model.worth(members @ precisions, squares) + threshold).sum())
