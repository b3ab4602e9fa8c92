# The steps that lead to a pruner and its quality, as a module of ablation.smk and paper.smk: the rules are those of the
# run, the paths come from the module's `pathvars:`, and the settings from the variant that the paths name.
include: "common.smk"


wildcard_constraints:
    variant=one_of(VARIANTS),
    ablation=one_of(ABLATIONS),
    labels=one_of({labels_of(variant) for variant in VARIANTS}),
    shard=one_of(SHARDS),
    keep_ratio=one_of(KEEP_RATIOS),
    method="sdtp",


def configuration(wildcards):
    """The configuration of a variant, or of labels, which several may share: then what all have in common is in it, and
    what names the labels, but nothing else that may differ; a rule that asks for more fails."""
    if "variant" in wildcards.keys():
        return VARIANTS[wildcards.variant]
    if "ablation" in wildcards.keys():
        return PAPER_VARIANTS[wildcards.ablation]
    common = {key: value for key, value in config.items() if key not in schema.VARIED}
    return common | next(labels_part(variant) for variant in VARIANTS if labels_of(variant) == wildcards.labels)


include: "saliency.smk"
include: "train.smk"
include: "evaluate.smk"
