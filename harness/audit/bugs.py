"""Known ways to get differential privacy wrong: what is planted, and what the audit must say of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from dpft.harness.audit import plant_clipping, plant_leaks, plant_noise, plant_sampling
from dpft.harness.audit.batch_checks import FAR, UNLIKE
from dpft.harness.audit.noise_checks import REPEATED
from dpft.harness.audit.patches import unchecked


@dataclass(frozen=True)
class Bug:
    """wrong: a context in which the code has the bug; rings: the violation that must be found; changes: of the spec;
    method: in which it is planted."""

    name: str
    about: str
    rings: str
    wrong: Callable[[], contextlib.AbstractContextManager]
    changes: dict[str, Any] = field(default_factory=dict)
    method: str = "dp-adam"

    @contextlib.contextmanager
    def plant(self) -> Iterator[None]:
        """The code has the bug, and nothing but the audit looks for it."""
        with unchecked(), self.wrong():
            yield


SMALL, TAIL = "noise too small", "noise has not the tail of a Gaussian"
UNEVEN, BARE = "noise depends on the step or the batch", "an empty batch is released without its noise"
RATE, POISSON, TWICE = (
    "sampling rate is not the certified one",
    "sampling is not Poisson",
    "an example is in a batch twice",
)
STEPS, BATCHES = "steps taken are not the planned ones", "batches that are not booked"
RELEASES, OTHERS = "releases that are not booked", "other examples are trained than were sampled"
UNDECLARED, KEY = "releases booked are not the declared ones", "noise is not drawn from its own key"
BANDS: dict[str, Any] = {"sampler": "cyclic", "bands": 2}
TIGHT: dict[str, Any] = {"sampler": "truncated", "truncated_batch_size": 9}
LEAK, BUFFERS = "weights do not follow from the releases", "buffers do not follow from the releases"

WHOLE_USERS = {"unit": "user", "group_size": 4}
SAMPLED_ROWS = {**WHOLE_USERS, "user_sampling": "els"}

_noise, _clipping, _sampling, _leaks = plant_noise, plant_clipping, plant_sampling, plant_leaks
BUGS = (
    Bug("noise-over-batch", "sigma C / B is added to the sum", SMALL, _noise.noise_over_batch),
    Bug("noise-root-two", "noise of half the variance", SMALL, _noise.half_the_variance),
    Bug(
        "unscaled-strategy",
        "correlated noise of a strategy that is not normalised",
        SMALL,
        _noise.unscaled_strategy,
        BANDS,
    ),
    Bug(
        "uncorrelated",
        "independent noise, booked as correlated (no leak, but wrong)",
        REPEATED,
        _noise.uncorrelated,
        BANDS,
    ),
    Bug("microbatch-noise", "noise by microbatch, the last one forgotten", SMALL, _noise.noise_per_microbatch),
    Bug("second-release", "two noisy sums of one batch, booked once", SMALL, _noise.second_release),
    Bug("vectors-without-noise", "biases and norms are released as they are", SMALL, _noise.weights_only),
    Bug(
        "noiseless-selection",
        "rows are chosen by a release without noise (sparta)",
        SMALL,
        _noise.noiseless_selection,
        method="sparta",
    ),
    Bug(
        "untouched-bare",
        "rows that nobody touched get no noise (dp-adafest)",
        SMALL,
        _noise.untouched_rows_bare,
        method="dp-adafest",
    ),
    Bug("empty-batch", "an empty batch is released without noise", BARE, _noise.none_without_examples),
    Bug("noise-clamped-3", "noise is clamped at 3 sigma", TAIL, lambda: _noise.clamped(3.0)),
    Bug("noise-clamped-4", "noise is clamped at 4 sigma", TAIL, lambda: _noise.clamped(4.0)),
    Bug(
        "noise-after-releases",
        "the size of noise follows past releases, booked constant",
        UNEVEN,
        _noise.after_releases,
    ),
    Bug("realised-size", "divided by the realised batch size", UNEVEN, _noise.realised_size),
    Bug(
        "noise-of-directions",
        "noise from the seed of the first direction (dp-zo)",
        KEY,
        _noise.from_directions,
        method="dp-zo",
    ),
    Bug("noise-every-step", "the same noise in every step", REPEATED, lambda: _noise.reseeded(False)),
    Bug("noise-every-tensor", "the same noise in every tensor", REPEATED, lambda: _noise.reseeded(True)),
    Bug("bias-every-step", "one bias has the same noise in every step", REPEATED, _noise.constant_bias),
    Bug("bias-reused", "the noise of one bias is that of another, too", REPEATED, _noise.reused_bias),
    Bug("no-clip", "nothing is clipped", FAR, _clipping.no_clip),
    Bug("late-clip", "only gradients above 10 C are clipped", FAR, _clipping.late_clip),
    Bug("norm-squared", "the squared norm is compared with C = 0.1", FAR, _clipping.squared_norms, {"clip_norm": 0.1}),
    Bug(
        "norm-squared-2", "the squared norm is compared with C = 2", UNLIKE, _clipping.squared_norms, {"clip_norm": 2.0}
    ),
    Bug(
        "off-centre",
        "a count of 1 or 0 with the noise of 1/2 or -1/2",
        FAR,
        _clipping.off_centre,
        {"clipping": "quantile"},
    ),
    Bug(
        "scalars-apart",
        "each of K numbers is clipped to C, charged once (dp-zo)",
        FAR,
        _clipping.scalars_by_themselves,
        method="dp-zo",
    ),
    Bug("median-clip", "clipped to min(C, median of the norms)", UNLIKE, _clipping.median_clip),
    Bug("clip-after-sum", "the sum of a microbatch is clipped", FAR, _clipping.clip_after_sum),
    Bug("layer-clip", "every layer is clipped to C", FAR, _clipping.layer_clip, {"clip_groups": "layer"}),
    Bug("rows-of-users", "each example of a user is clipped by itself", FAR, _clipping.rows_of_users, WHOLE_USERS),
    Bug("bf16-norms", "norms are rounded to bfloat16", FAR, _clipping.half_precision_norms),
    Bug("double-rate", "q is twice what is booked", RATE, _sampling.doubled_rate),
    Bug("shuffled", "shuffled epochs, booked as Poisson", POISSON, _sampling.shuffled),
    Bug("fixed-size", "batches of fixed size, booked as Poisson", POISSON, _sampling.fixed_size),
    Bug("cyclic", "groups that take turns, booked as Poisson", POISSON, _sampling.cyclic),
    Bug("uncut", "batches that are booked as cut are whole", POISSON, _sampling.uncut, TIGHT),
    Bug("users-as-examples", "users are booked as single examples", FAR, _sampling.users_as_examples, SAMPLED_ROWS),
    Bug("with-replacement", "batches drawn with replacement", TWICE, _sampling.with_replacement),
    Bug("capped", "batches are cut at 1.1 times the expected size", OTHERS, _sampling.capped),
    Bug("half-booked", "every other step is left out of the ledger", RELEASES, _sampling.half_booked),
    Bug(
        "moving-shares",
        "shares of the noise follow releases, booked as drawn",
        UNDECLARED,
        _sampling.moving_shares,
        {"clipping": "quantile"},
    ),
    Bug("second-batch", "a second query on a fresh batch, booked as on the first", BATCHES, _sampling.second_batch),
    Bug("early-stop", "the run ends when the clean loss falls", STEPS, _sampling.early_stop),
    Bug(
        "best-checkpoint",
        "the weights of the least training loss are put back at the end",
        LEAK,
        _leaks.best_checkpoint,
    ),
    Bug("membership-buffer", "a buffer counts who was in the batches", BUFFERS, _leaks.membership_buffer),
    Bug("kept-losses", "the loss keeps what it saw, and updates follow it", LEAK, _leaks.kept_losses),
    Bug(
        "kept-rows",
        "the closure of a count keeps its rows, and updates follow them",
        LEAK,
        _leaks.kept_rows,
        {"clipping": "quantile"},
    ),
    Bug(
        "untouched-dropped",
        "rows that nobody touched are left out (dp-adafest)",
        LEAK,
        _leaks.untouched_rows_dropped,
        method="dp-adafest",
    ),
    Bug("clean-mask", "a mask chosen from clean gradients", LEAK, _leaks.mask),
    Bug("clean-decoder", "a decoder that sees clean gradients", LEAK, _leaks.clean_decoder),
    Bug(
        "clean-projection",
        "a projection chosen from clean gradients (dp-grape)",
        LEAK,
        _leaks.clean_projection,
        {"refresh": 1},
        "dp-grape",
    ),
)
