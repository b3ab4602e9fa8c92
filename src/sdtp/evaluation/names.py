"""What the compared methods are called and what each is made from; imports nothing, since the Snakefile reads it."""

from __future__ import annotations

# Scorers that are not learned.
BASELINES = ("random", "recent", "hiddennorm", "lastquery")
# What compresses a cache after prefill.
RULES = ("snapkv", "h2o")
# Peers that are no scorer of a schedule's stages: they keep as much as a schedule does in ways of their own.
PEERS = ("gemfilter", "fastkv", *RULES)
# What the trained pruner does: at all of its stages, at every second one, and leaving the shares that it was tuned to.
TUNED = "sdtp-tuned"
LEARNED = ("sdtp", "sdtp-half", TUNED)
# Held-out examples that tuning needs. Half of them choose; of the others the sign-flip test of 95% needs six to say
# anything, since of five it is never below 2 / 2^5.
LEAST_REPORTED = 6
LEAST_TO_TUNE = 2 * LEAST_REPORTED
# A rule on top of what another method leaves; `unpruned+h2o` compresses the whole prompt's cache.
COMPRESSED = tuple(f"{base}+{rule}" for base in ("unpruned", "sdtp") for rule in RULES)
METHODS = ("unpruned", *LEARNED, *BASELINES, "oracle", *PEERS, *COMPRESSED)
# The tasks of the paper's Table 3 (all 5-shot) under their names in lm-eval 0.4.13.
PAPER_TASKS = ("copa", "piqa", "winogrande", "mathqa", "boolq", "cb", "wic", "wsc")
# Methods that choose at random, and so are run once per seed.
SEEDED = ("random",)


def parts(method: str) -> tuple[str, str | None]:
    """What prunes, and the rule that compresses the cache after it or None: `sdtp+h2o` is of sdtp and h2o."""
    base, _, rule = method.partition("+")
    return base, rule or None


def needs(method: str) -> frozenset[str]:
    """What a method is made from beside the model: whatever is not in it changes nothing.

    Returns:
        Some of `schedule` (of stages and how much each keeps), `pruner` (the trained one; for `sdtp-tuned` the one that
        was tuned for the keep ratio, whose stages the schedule's have to be), `seed` (of random choices),
        `labels` (how saliency is taken), `layer` (where a peer selects), `cache_keep` (the share of the cache kept).

    Raises:
        ValueError: an unknown name.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not known: {', '.join(METHODS)} are accepted")
    base, rule = parts(method)
    found = set() if rule is None else {"cache_keep"}
    if base != "unpruned":
        found.add("schedule")
    if base in LEARNED:
        found.add("pruner")
    if base in SEEDED:
        found.add("seed")
    if base == "oracle":
        found.add("labels")
    if base in ("gemfilter", "fastkv"):
        found.add("layer")
    return frozenset(found)


def half(stages: int) -> range:
    """Of so many stages those that `sdtp-half` prunes at, 0-based: every second one."""
    return range(0, stages, 2)


def compresses(method: str) -> bool:
    """Whether it drops cache entries after a prefill that still had them: the first new token is the prefill's."""
    base, rule = parts(method)
    return rule is not None or base in RULES or base.startswith("kvpress-")


def unpruned_ratio(method: str) -> bool:
    """Whether it stands at keep ratio 1.0: no stage removes a token."""
    return parts(method)[0] == "unpruned"
