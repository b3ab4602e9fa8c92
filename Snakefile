# The workflow lives in workflow/Snakefile; this file lets `snakemake` be called in the repository's root.
include: "workflow/Snakefile"


# An include restores the default target from before it, so that without this rule nothing at all would run.
rule default:
    default_target: True
    input:
        rules.all.input,
