"""The causes of runs that do not learn, one small function each, in one table.

A cause is a function ``(run) -> Finding | None`` that reads figures of the rows and settings by name, and
computes the value to try from them. :data:`CAUSES` has them in the order in which they are told: what makes
the others meaningless (no score is known) comes before what is left where nothing else is seen (the
population). A new cause is one function and its place in the table.
"""

import math
from collections.abc import Callable

import numpy as np

from experiments.run.evidence import Finding, Run, best, known, median, over, round_to, times

# The thresholds were set on digits (width 16, 40 generations) and CartPole; the figures of these runs stand
# beside them.

# A figure of fewer rows says nothing of learning; what all members share shows in the first.
FEW_ROWS = 10
# The share of members, pairs or completions that counts as most. CartPole at a sigma of 1e-6 ties in all
# pairs, at 0.1 in a third until it is learned; the accuracy of one digit ties in 0.91, of 128 in 0.09.
MOST = 0.5
# Scores that differ by less, in units of their mean, differ by what float32 rounds away.
ROUNDING = 1e-6
# Noise against weights, at the start. Digits learn from 7e-6 to 0.7, and not at 6.8 or 34; the presets have
# 0.2 to 2.
LOUD_NOISE, GOOD_NOISE, SILENT_NOISE = 3.0, 0.5, 1e-3
# Noise on nodes has the unit of what it is added to, which is about 1; the presets have 0.1 to 0.2.
LOUD_NODES, GOOD_NODES = 2.0, 0.2
# A step against the weights at the start. Digits: 0.05 is best, 0.5 reaches half, 1.7 and 50 learn nothing.
LONG_STEP, GOOD_STEP = 0.3, 0.05
# All steps together against the weights at the start. Digits: 2 where they learn, 0.09 and less where not.
SHORT_WAY = 0.2
# The law of alignment: cosine of estimate and gradient, sqrt(pairs / (pairs + weights)). Digits: 0.08 learns
# half, 0.04 and less nothing, 0.3 all.
LOW_COSINE, GOOD_COSINE = 0.1, 0.2
# No larger population is proposed for models of many weights, where no population is near GOOD_COSINE.
LARGEST_PROPOSED = 4096
# Weights of a narrow type that all updates together have changed, at most. Where a run learned it was all of
# them, many times over.
FEW_CHANGED = 0.01
# bfloat16 has 8 bits: neighbours of 1 are so far apart.
BFLOAT16_STEP = 2.0**-8


def rewards_late(run: Run) -> Finding | None:
    """Rewards that are given up for their time."""
    share = run.typical("late_rewards")
    if not share >= MOST:
        return None
    seen = f"{share:.0%} of the rewards took too long and were given up, in {run.span}"
    return run.finding("rewards late", seen, "reward_seconds", 4 * run.number("reward_seconds"))


def nothing_valid(run: Run) -> Finding | None:
    """No scores, from the first generation on or since the steps became too large."""
    missing = run.figure("unknown_rewards")
    if not known(missing).size:
        missing = run.figure("invalid") / run.number("population")
    bad = known(missing) >= MOST
    if bad.size < 1 or bad.mean() < 1 / 3 or not bad[-1]:
        return None
    share, since = float(known(missing)[bad].mean()), int(np.argmax(bad))
    what = "rewards are None" if run.driver == "reasoning" else "scores are not finite"
    seen = f"{share:.0%} of the {what} from generation {since} on"
    if since:
        seen = f"{seen}, after {since} generations that had scores"
        return run.finding("rate too large", seen, "learning_rate", smaller_rate(run))
    if run.driver == "reasoning":
        better = "exact" if run.setting("reward") is None else "None (that of the task)"
        return run.finding("nothing valid", seen, "reward", better)
    return run.finding("nothing valid", seen, "sigma", round_to(run.number("sigma") / 10))


def all_wrong(run: Run) -> Finding | None:
    """A reward that is never above 0 although right answers are given."""
    right = run.typical("exact_answers")
    if not (best(run.figure("reward_best")) <= 0 and right > 0):
        return None
    seen = (
        f"the reward takes all for wrong: in {run.span} none is above 0, but {right:.0%} of the completions "
        "give the right answer as a number or in words"
    )
    return run.finding("all taken for wrong", seen, "reward", "exact")


def answers_cut(run: Run) -> Finding | None:
    """Completions that do not end by themselves."""
    ended = run.typical("ended")
    if not ended <= 1 - MOST:
        return None
    now = run.number("max_new_tokens")
    seen = (
        f"{1 - ended:.0%} of the completions are cut: they have {run.typical('length'):.3g} of at most "
        f"{now:g} tokens in the mean, and no end, in {run.span}"
    )
    # Where some end, twice the length gives most of them their end.
    better = times(now, 2 if ended > 0.1 else 4)
    return run.finding("answers cut", seen, "max_new_tokens", better)


def none_right(run: Run) -> Finding | None:
    """Answers that end, none of which is right."""
    if not best(run.figure("reward_best")) <= 0:
        return None
    seen = (
        f"no completion of {run.span} has a reward above 0 or gives the right answer, so that all members "
        "are equal"
    )
    if run.evolves:
        return run.finding("none right", seen, "fitness", "likelihood")
    return run.finding("none right", seen, "algorithm", "sft")


def ties(run: Run) -> Finding | None:
    """Pairs whose members score the same."""
    share = median(run.figure("identical_pairs") / (1 if run.driver == "reasoning" else run.pairs))
    # Where members differ in nothing, it is no spread, unless it is for want of noise.
    if not (share >= MOST and (run.noise < SILENT_NOISE or varies(run))):
        return None
    what = "write the same" if run.driver == "reasoning" else "score the same"
    seen = f"in {share:.0%} of the pairs both members {what}, in {run.span}"
    if run.driver == "reasoning" and run.on_nodes:
        # What size is usual differs from model to model; four times as much is a step of the probe.
        return run.finding("ties", seen, "sigma", round_to(4 * run.number("sigma")))
    if run.noise < SILENT_NOISE or run.driver == "reasoning":
        seen = f"{seen}: the noise is {run.noise:.2g} of the weights"
        return run.finding("ties", seen, "sigma", better_sigma(run))
    name = {"rl": "episodes", "supervised": "batch", "pretrain": "tokens"}.get(run.driver, "sigma")
    seen = f"{seen}, though the noise is {run.noise:.2g} of the weights: the score is too coarse"
    return run.finding("ties", seen, name, times(run.number(name), 16))


def no_spread(run: Run) -> Finding | None:
    """Scores that are the same for all members."""
    if not known(run.figure("fitness_std")).size or varies(run):
        return None
    score = run.typical("fitness_mean")
    seen = f"all members score the same, {score:.4g}, in {run.span}"
    if run.driver == "reasoning" and run.setting("fitness") in (None, "reward"):
        better = "exact" if run.setting("reward") is None else "None (that of the task)"
        return run.finding("no spread", seen, "reward", better)
    if run.setting("fitness") == "accuracy":
        return run.finding("no spread", seen, "fitness", "cross_entropy")
    # Noise of the size that still counts as usual, or else four times as much.
    factor = max(4.0, GOOD_NOISE / run.noise) if run.noise > 0 else 4.0
    return run.finding("no spread", seen, "sigma", round_to(run.number("sigma") * factor))


def lost_updates(run: Run) -> Finding | None:
    """Updates that the rounding of narrow weights takes away."""
    changed, steps = known(run.figure("changed_weights")), run.steps
    if len(changed) < 2 or not steps.size or changed.sum() >= FEW_CHANGED:
        return None
    kind = "int8" if run.setting("quantised") else run.setting("dtype")
    seen = (
        f"updates are lost in {kind}: those of {run.span} changed {changed.sum():.2%} of the weights, since "
        f"a step is {median(steps):.2g} of the weights and neighbours are {BFLOAT16_STEP:.2g} apart"
    )
    # With steps so long most weights reach a neighbour.
    better = larger_rate(run, BFLOAT16_STEP)
    return run.finding("updates lost", seen, "learning_rate", better)


def sigma_large(run: Run) -> Finding | None:
    """Noise that drowns the weights, or what comes out of layers."""
    sigma = run.number("sigma")
    if run.on_nodes and not run.typical("noise_norm") > 0:
        if not sigma > LOUD_NODES:
            return None
        seen = f"noise of {sigma:.3g} on outputs of layers, which are of size 1"
        return run.finding("sigma too large", seen, "sigma", GOOD_NODES)
    if not run.noise > LOUD_NOISE:
        return None
    seen = (
        f"noise drowns the weights: its norm is {median(run.figure('noise_norm')):.3g}, and that of the "
        f"weights {known(run.figure('weight_norm'))[0]:.3g} at the start"
    )
    return run.finding("sigma too large", seen, "sigma", better_sigma(run))


def rate_large(run: Run) -> Finding | None:
    """Steps that throw the weights about."""
    steps = run.steps
    if not steps.size or not median(steps) > LONG_STEP:
        return None
    seen = f"a step is {median(steps):.3g} times as long as the weights were at the start, in {run.span}"
    return run.finding("rate too large", seen, "learning_rate", smaller_rate(run))


def rate_small(run: Run) -> Finding | None:
    """Steps that lead nowhere."""
    steps, moved = run.steps, known(run.figure("weights_moved"))
    if len(run.rows) < FEW_ROWS or not steps.size or not steps.sum() < SHORT_WAY:
        return None
    seen = (
        f"all steps of {run.span} together are {steps.sum():.2g} of the norm of the weights, a step "
        f"{median(steps):.2g}"
    )
    if run.setting("model") == "egg" and moved.size:
        # A share of the weights moves by one unit, whatever the gradient.
        better = min(1.0, round_to(max(run.number("alpha") * 10, 0.3)))
        return run.finding("rate too small", seen, "alpha", better)
    return run.finding("rate too small", seen, "learning_rate", larger_rate(run, GOOD_STEP))


def sigma_small(run: Run) -> Finding | None:
    """Scores that differ by rounding alone."""
    spread = median(over(run.figure("fitness_std"), np.abs(run.figure("fitness_mean"))))
    if not (spread < ROUNDING and run.noise < SILENT_NOISE):
        return None
    seen = (
        f"scores differ by {spread:.1g} of their mean, which float32 rounds away: the noise is "
        f"{run.noise:.2g} of the weights"
    )
    return run.finding("sigma too small", seen, "sigma", better_sigma(run))


def population_small(run: Run) -> Finding | None:
    """Too few pairs for so many weights, by the law of alignment."""
    weights = run.typical("weights")
    if len(run.rows) < FEW_ROWS or not run.evolves or run.on_nodes or math.isnan(weights):
        return None
    pairs = run.pairs * run.noises
    cosine = math.sqrt(pairs / (pairs + weights))
    if not cosine < LOW_COSINE:
        return None
    now, wanted = int(2 * run.pairs), 2 * math.ceil(GOOD_COSINE**2 * weights / run.noises)
    better = min(wanted, max(LARGEST_PROPOSED, 4 * now))
    # Members of a stream are a part of them.
    group = run.number("group")
    better = int(math.ceil(better / group) * group) if group > 0 else better
    seen = (
        f"{pairs:g} pair{'s' * (pairs != 1)} for {weights:,.0f} weights: by the law of alignment "
        f"the cosine of the estimate and the gradient is about {cosine:.2g}"
    )
    return run.finding("population too small", seen, "population", better)


Cause = Callable[[Run], Finding | None]
# From what makes the rest meaningless to what is left.
CAUSES: tuple[Cause, ...] = (
    rewards_late,
    nothing_valid,
    all_wrong,
    answers_cut,
    none_right,
    sigma_large,
    lost_updates,
    rate_large,
    ties,
    no_spread,
    rate_small,
    sigma_small,
    population_small,
)


# ---------------------------------------------------------------- values


def varies(run: Run) -> bool:
    """Whether scores differ between members in most generations."""
    std = run.figure("fitness_std")
    size = np.maximum(np.abs(run.figure("fitness_mean")), 1e-30)
    return bool(median((std > 1e-7 * size).astype(float)) > 0)


def better_sigma(run: Run) -> float:
    """The sigma at which noise has the usual share of the weights."""
    sigma = run.number("sigma")
    if run.on_nodes:
        return GOOD_NODES
    return round_to(sigma * GOOD_NOISE / run.noise if run.noise > 0 else 10 * sigma)


def larger_rate(run: Run, step: float) -> float:
    """The rate at which steps have this length against the weights."""
    rate, now = run.number("learning_rate"), median(run.steps)
    return round_to(rate * step / now if now > 0 else 1000 * rate)


def smaller_rate(run: Run) -> float:
    """The rate at which the first steps are of the usual length, a third of this one at most."""
    rate, steps = run.number("learning_rate"), run.steps
    if steps.size and steps[0] > 0:
        return round_to(min(rate * GOOD_STEP / steps[0], rate / 3))
    # A step that is not finite has no length; those of Adam are as long as the rate, weight by weight.
    weights, norms = run.typical("weights"), known(run.figure("weight_norm"))
    if "adam" in str(run.setting("optimizer")) and weights > 0 and norms.size:
        return round_to(min(GOOD_STEP * norms[0] / math.sqrt(weights), rate / 3))
    return round_to(rate / 10)
