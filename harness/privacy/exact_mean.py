"""A repair of prv-accountant 0.2.0: the mean of the privacy loss at large sampling probabilities."""

import math


def install() -> None:
    """Make prv-accountant integrate the mean piecewise around where the loss of a subsampled Gaussian begins.

    Its losses begin at log(1 - q). The library's quadrature has break points at +-.1, +-.01, ... only, so from q = .1 on the
    mass between log(1 - q) and -.1 sits at the end of one long interval and is missed; the accountant then refuses with
    "Discrete mean differs from continuous mean significantly" (q=.1, sigma=.42, T=4). More break points give the same
    integral where it worked, and the right one where it did not.
    """
    import prv_accountant.accountant as library

    if library.PrivacyRandomVariableTruncated.__module__ == __name__:
        return

    class Truncated(library.PrivacyRandomVariableTruncated):
        def mean(self) -> float:
            from scipy import integrate

            points = _points(self.t_min, self.t_max, getattr(self.prv, "p", 0.0))
            total = 0.0
            for left, right in zip(points[:-1], points[1:], strict=True):
                integral, _ = integrate.quad(self.cdf, left, right, limit=500)
                total += right * self.cdf(right) - left * self.cdf(left) - integral
            return total

    Truncated.__module__ = __name__
    library.PrivacyRandomVariableTruncated = Truncated


def _points(low: float, high: float, q: float) -> list[float]:
    """Break points in (low, high): powers of ten around 0, and around the smallest loss log(1 - q)."""
    powers = [10.0**k for k in range(-5, 3)]
    found = {sign * p for p in powers for sign in (-1, 1)}
    if 0 < q < 1:
        start = math.log1p(-q)
        # never at the start itself, where the library's formula takes the logarithm of zero
        found |= {start * (1 - fraction) for fraction in (1e-9, 1e-4, 1e-3, 1e-2, 0.1, 0.3, 0.6)}
    return [low, *sorted(p for p in found if low < p < high), high]
