# Many requests on one device and on several, and the longest prompt that fits: asked for by `snakemake serving`, no part of
# the run. Alone on the machine, as a benchmark.
rule throughput:
    input:
        model="<results>/model",
        text="<text>",
        pruner="<results>/pruner",
    output:
        timings=ensure("<results>/throughput/{placement}.json", non_empty=True),
        metrics="<results>/metrics/throughput-{placement}.json",
    log:
        "<logs>/throughput/{placement}.log",
    benchmark:
        "<benchmarks>/throughput-{placement}.tsv"
    wildcard_constraints:
        placement=one_of(config["serving"]["placements"]),
    conda:
        "../../envs/sdtp.yaml"
    threads: ALL_CORES
    resources:
        gpu=placement_gpus,
        timing=1,
    params:
        settings=settings(
            "model.source",
            "model.dtype",
            "model.attention",
            *SCHEDULE,
            "pruning.keep_ratios",
            "benchmark.repeats",
            "benchmark.warmup",
            *(f"serving.{key}" for key in ("prompt_tokens", "new_tokens", "batch_sizes", "requests")),
        ),
        code=code_hash("sdtp.pipeline.steps.throughput"),
    message:
        "Timing many requests, placement {wildcards.placement}"
    shell:
        "sdtp lease --gpus {resources.gpu} --"
        " sdtp --log {log} throughput --settings {params.settings:q} --model {input.model} --text {input.text}"
        " --pruner {input.pruner} --placement {wildcards.placement} --output {output.timings}"
        " --metrics {output.metrics}"


rule longest_prompt:
    input:
        model="<results>/model",
        text="<text>",
        pruner="<results>/pruner",
    output:
        found=ensure("<results>/longest-prompt.json", non_empty=True),
        metrics="<results>/metrics/longest-prompt.json",
    log:
        "<logs>/longest-prompt.log",
    benchmark:
        "<benchmarks>/longest-prompt.tsv"
    conda:
        "../../envs/sdtp.yaml"
    threads: ALL_CORES
    resources:
        gpu=1,
        timing=1,
    params:
        settings=settings(
            "model.source",
            "model.dtype",
            "model.attention",
            *SCHEDULE,
            "pruning.keep_ratios",
            *(f"serving.{key}" for key in ("new_tokens", "memory_limit", "length_step")),
        ),
        code=code_hash("sdtp.pipeline.steps.longest_prompt"),
    message:
        "Looking for the longest prompt that fits"
    shell:
        "sdtp lease --gpus {resources.gpu} --"
        " sdtp --log {log} longest-prompt --settings {params.settings:q} --model {input.model} --text {input.text}"
        " --pruner {input.pruner} --output {output.found} --metrics {output.metrics}"


rule serving_tables:
    input:
        throughput=expand("<results>/throughput/{placement}.json", placement=config["serving"]["placements"]),
        longest="<results>/longest-prompt.json",
    output:
        throughput=report("<results>/tables/throughput.csv", caption="../report/throughput.rst", category="Serving"),
        longest=report(
            "<results>/tables/longest-prompt.csv", caption="../report/longest-prompt.rst", category="Serving"
        ),
        svg=report("<results>/figures/serving.svg", caption="../report/throughput.rst", category="Serving"),
        png="<results>/figures/serving.png",
        metrics="<results>/metrics/serving-tables.json",
    log:
        "<logs>/serving-tables.log",
    benchmark:
        "<benchmarks>/serving-tables.tsv"
    conda:
        "../../envs/sdtp.yaml"
    threads: 1
    resources:
        gpu=0,
    params:
        settings=settings(),
        code=code_hash("sdtp.pipeline.steps.serving_tables"),
    message:
        "Gathering throughput and longest prompts"
    shell:
        "sdtp --log {log} serving-tables --settings {params.settings:q} --throughput {input.throughput}"
        " --longest {input.longest} --throughput-table {output.throughput} --longest-table {output.longest}"
        " --figure {output.svg} --metrics {output.metrics}"


# The target of `snakemake serving`.
rule serving:
    input:
        "<results>/checked.json",
        rules.serving_tables.output,
