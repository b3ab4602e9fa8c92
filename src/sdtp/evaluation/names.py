"""What the compared methods are called and what each is made from; imports nothing, since the Snakefile reads it."""

from __future__ import annotations

# Scorers that are not learned.
BASELINES = ("random", "recent", "hiddennorm", "lastquery")
# What compresses a cache after prefill.
RULES = ("snapkv", "h2o")
# Peers that are no scorer of a schedule's stages: they keep as much as a schedule does in ways of their own.
PEERS = ("gemfilter", "fastkv", *RULES)
# What the trained pruner does: at all of its stages, and at every second one.
LEARNED = ("sdtp", "sdtp-half")
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
        Some of `schedule` (of stages and how much each keeps), `pruner` (the trained one), `seed` (of random choices),
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
