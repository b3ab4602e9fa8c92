rule saliency:
    input:
        model="<model>",
        data="<data>",
    output:
        shard=ensure("<results>/saliency/shard-{shard}.safetensors", non_empty=True),
        metrics="<results>/metrics/saliency-{shard}.json",
    log:
        "<logs>/saliency/{shard}.log",
    benchmark:
        "<benchmarks>/saliency-{shard}.tsv"
    conda:
        "../../envs/sdtp.yaml"
    threads: 1
    resources:
        gpu=1,
    params:
        settings=settings(
            "model.dtype",
            "model.attention",
            "pruning.start",
            "pruning.step",
            "saliency.reduction",
            "saliency.target",
            "saliency.batch_tokens",
            "saliency.gradient_checkpointing",
        ),
        shards=len(SHARDS),
        checkpoints=saliency_checkpoints,
        code=code_hash("sdtp.pipeline.steps.saliency"),
    message:
        "Stage 1: saliency of the examples, shard {wildcards.shard} of {params.shards}"
    shell:
        "sdtp lease --gpus {resources.gpu} --"
        " sdtp --log {log} saliency --settings {params.settings:q} --model {input.model} --data {input.data}"
        " --shard {wildcards.shard} --shards {params.shards} --checkpoints {params.checkpoints} --code {params.code}"
        " --output {output.shard} --metrics {output.metrics}"


rule saliency_index:
    input:
        data="<data>",
        shards=expand("<results>/saliency/shard-{shard}.safetensors", shard=SHARDS),
    output:
        index=ensure("<results>/saliency/index.json", non_empty=True),
        metrics="<results>/metrics/saliency-index.json",
    log:
        "<logs>/saliency-index.log",
    benchmark:
        "<benchmarks>/saliency-index.tsv"
    conda:
        "../../envs/sdtp.yaml"
    threads: 1
    resources:
        gpu=0,
    params:
        settings=settings(),
        code=code_hash("sdtp.pipeline.steps.saliency_index"),
    message:
        "Indexing the saliency shards"
    shell:
        "sdtp --log {log} saliency-index --settings {params.settings:q} --data {input.data}"
        " --shards {input.shards} --output {output.index} --metrics {output.metrics}"
