# Where to prune, from held-out examples, at the FLOPs of a keep ratio: the pruner of method `sdtp-tuned`, made where
# that is asked for.
rule tune:
    input:
        model="<model>",
        data="<data>",
        pruner="<results>/pruner",
    output:
        pruner=directory("<results>/tuned/{keep_ratio}"),
        metrics="<results>/metrics/tune-{keep_ratio}.json",
    log:
        "<logs>/tune/{keep_ratio}.log",
    benchmark:
        "<benchmarks>/tune-{keep_ratio}.tsv"
    wildcard_constraints:
        keep_ratio=one_of(TUNED_RATIOS),
    conda:
        "../../envs/sdtp.yaml"
    threads: GPU_SHARE
    resources:
        gpu=1,
    params:
        settings=settings("model.dtype", "model.attention", *SCHEDULE),
        checkpoint=tuning_checkpoint,
        code=code_hash("sdtp.pipeline.steps.tune"),
    message:
        "Tuning where to prune, at the FLOPs of keep ratio {wildcards.keep_ratio}"
    shell:
        "sdtp lease --gpus {resources.gpu} --"
        " sdtp --log {log} tune --settings {params.settings:q} --model {input.model} --data {input.data}"
        " --pruner {input.pruner} --keep-ratio {wildcards.keep_ratio} --checkpoint {params.checkpoint}"
        " --output {output.pruner} --metrics {output.metrics}"
