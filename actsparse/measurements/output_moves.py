"""By how much of their size the outputs of each site's layers move."""

from collections.abc import Iterable

import torch


class OutputMoves:
    """Means over tokens of ‖what the outputs of a site's layers move by‖ / ‖outputs‖, for several ways to move them."""

    def __init__(self) -> None:
        self._squares: dict[str, torch.Tensor] = {}
        self._sums: dict[str, torch.Tensor] = {}
        self._tokens: dict[str, int] = {}

    def add(self, site: str, whole: torch.Tensor, moves: Iterable[torch.Tensor]) -> None:
        """
        Take in the outputs of one of a site's layers on one batch.

        :param site: The site.
        :param whole: The outputs without biases, [..., tokens, out_features].
        :param moves: What they move by, each time in the same way as for the site's other layers.
        """
        found = torch.stack([y.float().square().sum(-1).flatten().double().cpu() for y in (whole, *moves)])
        self._squares[site] = self._squares[site] + found if site in self._squares else found

    def end_batch(self) -> None:
        """Sum up a batch that has gone through all layers."""
        for site, (whole, *moved) in self._squares.items():
            ratios = (torch.stack(moved) / whole.clamp(min=1e-30)).sqrt().sum(1)
            self._sums[site] = self._sums[site] + ratios if site in self._sums else ratios
            self._tokens[site] = self._tokens.get(site, 0) + len(whole)
        self._squares.clear()

    def means(self, site: str, ways: int) -> list[float]:
        """
        Give what was found.

        :param site: The site.
        :param ways: In how many ways its outputs were moved.
        :return: One mean for each; 0 for a site that no token reached, as an expert.
        """
        return (self._sums[site] / self._tokens[site]).tolist() if site in self._sums else [0.0] * ways
