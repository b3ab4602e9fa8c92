# Quality against measured speed and memory, of all methods: asked for by `snakemake tradeoff`, no part of the run.
# All methods of a keep ratio in one job, so that they run side by side; alone on the machine, as a benchmark.
rule time_methods:
    input:
        model="<results>/model",
        text="<text>",
        pruner="<results>/pruner" if any("pruner" in names.needs(method) for method in TIMED) else [],
        tuned="<results>/tuned/{keep_ratio}" if names.TUNED in TIMED else [],
    output:
        timings=expand("<results>/timings/{method}-{{keep_ratio}}.json", method=TIMED),
        metrics="<results>/metrics/time-methods-{keep_ratio}.json",
    log:
        "<logs>/time-methods/{keep_ratio}.log",
    benchmark:
        "<benchmarks>/time-methods-{keep_ratio}.tsv"
    wildcard_constraints:
        keep_ratio=one_of(KEEP_RATIOS),
    conda:
        "../../envs/sdtp.yaml"
    threads: ALL_CORES
    resources:
        gpu=1,
        timing=1,
    params:
        settings=timed_settings(TIMED),
        methods=TIMED,
        pruner=pruner_option,
        tuned=tuned_option,
        results=subpath(output.metrics, ancestor=2),
        code=code_hash("sdtp.pipeline.steps.time_methods"),
    message:
        "Timing methods side by side, keep ratio {wildcards.keep_ratio}"
    shell:
        "sdtp lease --gpus {resources.gpu} --"
        " sdtp --log {log} time-methods --settings {params.settings:q} --model {input.model} --text {input.text}"
        " {params.pruner} {params.tuned} --methods {params.methods} --keep-ratio {wildcards.keep_ratio}"
        " --output {params.results}/timings --metrics {output.metrics}"


if COMPRESSING:

    # Beside `time_methods`, which may be asked for the same ratio, and so under names of its own.
    use rule time_methods as time_compression with:
        input:
            model="<results>/model",
            text="<text>",
        output:
            timings=expand("<results>/timings/{method}-{{keep_ratio}}.json", method=COMPRESSING),
            metrics="<results>/metrics/time-compression-{keep_ratio}.json",
        log:
            "<logs>/time-compression/{keep_ratio}.log",
        benchmark:
            "<benchmarks>/time-compression-{keep_ratio}.tsv"
        wildcard_constraints:
            keep_ratio=re.escape(UNPRUNED_RATIO),
        params:
            settings=timed_settings(COMPRESSING),
            methods=COMPRESSING,
            pruner="",
            tuned="",
            results=subpath(output.metrics, ancestor=2),
            code=code_hash("sdtp.pipeline.steps.time_methods"),
        message:
            "Timing cache compression of whole prompts"


TRADEOFF_FIGURES = ["tradeoff", "tradeoff-memory"]
TRADEOFF_SUITES_FIGURES = ["tradeoff-suites", "tradeoff-suites-memory"]


rule tradeoff_tables:
    input:
        evaluations=tradeoff_evaluations,
        timings=timed_files,
    output:
        table=report(
            "<results>/tables/tradeoff.csv",
            caption="../report/tradeoff.rst",
            category="Trade-off",
        ),
        compression=(
            report(
                "<results>/tables/cache-compression.csv",
                caption="../report/cache-compression.rst",
                category="Trade-off",
            )
            if COMPRESSING
            else []
        ),
        svg=report(
            expand("<results>/figures/{figure}.svg", figure=TRADEOFF_FIGURES),
            caption="../report/tradeoff.rst",
            category="Trade-off",
        ),
        png=expand("<results>/figures/{figure}.png", figure=TRADEOFF_FIGURES),
        metrics="<results>/metrics/tradeoff.json",
    log:
        "<logs>/tradeoff.log",
    benchmark:
        "<benchmarks>/tradeoff.tsv"
    conda:
        "../../envs/sdtp.yaml"
    threads: 1
    resources:
        gpu=0,
    params:
        settings=settings(),
        suites="",
        compression=lambda wildcards, output: f"--compression {output.compression}" if COMPRESSING else "",
        results=subpath(output.metrics, ancestor=2),
        code=code_hash("sdtp.pipeline.steps.tradeoff"),
    message:
        "Setting quality beside speed and memory"
    shell:
        "sdtp --log {log} tradeoff --settings {params.settings:q} --evaluations {input.evaluations}"
        " --timings {input.timings} {params.suites} --table {output.table} {params.compression}"
        " --figures {params.results}/figures --metrics {output.metrics}"


# The same with the suites' scores, which take long: for the page of the paper, which has them anyway.
use rule tradeoff_tables as tradeoff_suites with:
    input:
        evaluations=tradeoff_evaluations,
        timings=timed_files,
        suites=expand("<results>/tables/{suite}.csv", suite=SUITES),
    output:
        table=report(
            "<results>/tables/tradeoff-suites.csv",
            caption="../report/tradeoff.rst",
            category="Trade-off",
        ),
        svg=report(
            expand("<results>/figures/{figure}.svg", figure=TRADEOFF_SUITES_FIGURES),
            caption="../report/tradeoff.rst",
            category="Trade-off",
        ),
        png=expand("<results>/figures/{figure}.png", figure=TRADEOFF_SUITES_FIGURES),
        metrics="<results>/metrics/tradeoff-suites.json",
    log:
        "<logs>/tradeoff-suites.log",
    benchmark:
        "<benchmarks>/tradeoff-suites.tsv"
    params:
        settings=settings(),
        suites=lambda wildcards, input: f"--suites {input.suites}",
        compression="",
        results=subpath(output.metrics, ancestor=2),
        code=code_hash("sdtp.pipeline.steps.tradeoff"),
    message:
        "Setting quality, suites among it, beside speed and memory"


# The target of `snakemake tradeoff`.
rule tradeoff:
    input:
        "<results>/checked.json",
        rules.tradeoff_tables.output,
