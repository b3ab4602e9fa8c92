# Timings need a quiet machine: each job takes every core and the one `timing` there is, so nothing runs beside it.
rule benchmark:
    input:
        model="<results>/model",
        text="<text>",
        pruner="<results>/pruner",
    output:
        timings=ensure("<results>/benchmark/ratio-{keep_ratio}.json", non_empty=True),
        metrics="<results>/metrics/benchmark-{keep_ratio}.json",
    log:
        "<logs>/benchmark/{keep_ratio}.log",
    benchmark:
        "<benchmarks>/benchmark-{keep_ratio}.tsv"
    conda:
        "../../envs/sdtp.yaml"
    threads: ALL_CORES
    resources:
        gpu=1,
        timing=1,
    params:
        settings=settings("model.source", "model.dtype", "model.attention", *SCHEDULE, "benchmark"),
        code=code_hash("sdtp.pipeline.steps.benchmark"),
    message:
        "Timing prefill and decoding, keep ratio {wildcards.keep_ratio}"
    shell:
        "sdtp lease --gpus {resources.gpu} --"
        " sdtp --log {log} benchmark --settings {params.settings:q} --model {input.model} --text {input.text}"
        " --pruner {input.pruner} --keep-ratio {wildcards.keep_ratio} --output {output.timings}"
        " --metrics {output.metrics}"
