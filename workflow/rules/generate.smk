rule generate:
    input:
        model="<results>/model",
        data="<test_data>",
        pruner="<results>/pruner",
    output:
        generations=ensure("<results>/generations/ratio-{keep_ratio}.jsonl", non_empty=True),
        metrics="<results>/metrics/generate-{keep_ratio}.json",
    log:
        "<logs>/generate/{keep_ratio}.log",
    benchmark:
        "<benchmarks>/generate-{keep_ratio}.tsv"
    conda:
        "../../envs/sdtp.yaml"
    threads: 1
    resources:
        gpu=1,
    params:
        settings=settings("model.dtype", "model.attention", *SCHEDULE, "generation"),
        code=code_hash("sdtp.pipeline.steps.generate"),
    message:
        "Generating from pruned prompts, keep ratio {wildcards.keep_ratio}"
    shell:
        "sdtp lease --gpus {resources.gpu} --"
        " sdtp --log {log} generate --settings {params.settings:q} --model {input.model} --data {input.data}"
        " --pruner {input.pruner} --keep-ratio {wildcards.keep_ratio} --output {output.generations}"
        " --metrics {output.metrics}"
