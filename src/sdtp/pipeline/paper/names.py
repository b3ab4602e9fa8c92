"""The tables and figures of the paper by name; imports nothing, since the Snakefile reads it."""

# File name, without suffix -> title, in the paper's order.
PARTS = {
    "figure-1": "Figure 1: the saliency map of one prompt",
    "figure-2": "Figure 2: how few tokens are salient, over the layers",
    "table-1": "Table 1: long-context tasks",
    "table-2": "Table 2: arithmetic, time and memory",
    "table-3": "Table 3: multiple-choice tasks",
    "table-4": "Table 4: without the ranking loss",
    "table-5": "Table 5: without the ranking and the value loss",
    "table-6": "Table 6: cache compression on top of pruning",
    "figure-4": "Figure 4: one stage, before each of the first layers",
    "figure-5": "Figure 5: how many stages",
}
# The ablations of Tables 4 and 5: variants of the run itself, beside those of the configuration's `variants`.
ABLATIONS: dict[str, dict[str, dict[str, dict[str, float]]]] = {
    "without-rank": {"training": {"weights": {"rank": 0.0}}},
    "without-rank-and-mse": {"training": {"weights": {"rank": 0.0, "mse": 0.0}}},
}
