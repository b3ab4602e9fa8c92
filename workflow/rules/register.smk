rule register:
    input:
        model="<model>",
        data="<test_data>",
        pruner="<results>/pruner",
        latency="<results>/tables/latency.csv",
        quality="<results>/tables/quality.csv",
        benchmarks=expand("<results>/benchmark/ratio-{keep_ratio}.json", keep_ratio=KEEP_RATIOS),
    output:
        # No number of a version in it: what MLflow has is no result of the run's.
        registered="<results>/registered.json",
        metrics="<results>/metrics/register.json",
    log:
        "<logs>/register.log",
    benchmark:
        "<benchmarks>/register.tsv"
    conda:
        "../../envs/sdtp.yaml"
    threads: 1
    resources:
        gpu=0,
    params:
        settings=settings("model.dtype", "model.attention", "training.keep_ratio"),
        code=code_hash("sdtp.pipeline.steps.register"),
    message:
        "Registering the pruner"
    shell:
        "sdtp --log {log} register --settings {params.settings:q} --model {input.model} --data {input.data}"
        " --pruner {input.pruner} --latency {input.latency} --quality {input.quality}"
        " --benchmarks {input.benchmarks} --output {output.registered} --metrics {output.metrics}"
