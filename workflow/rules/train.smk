rule train:
    input:
        model="<model>",
        data="<data>",
        index="<results>/saliency/index.json",
        shards=expand("<results>/saliency/shard-{shard}.safetensors", shard=SHARDS),
    output:
        pruner=directory("<results>/pruner"),
        history=ensure("<results>/training/history.csv", non_empty=True),
        metrics="<results>/metrics/train.json",
    log:
        "<logs>/train.log",
    benchmark:
        "<benchmarks>/train.tsv"
    conda:
        "../../envs/sdtp.yaml"
    threads: training_threads
    resources:
        gpu=training_gpus,
    params:
        settings=settings("seed", "model.dtype", "model.attention", *SCHEDULE, *TRAINING),
        checkpoints=training_checkpoints,
        launcher=training_launcher,
        code=code_hash("sdtp.pipeline.steps.train"),
    message:
        "Stage 2: training the pruner"
    shell:
        "sdtp lease --gpus {resources.gpu} -- {params.launcher}"
        "sdtp --log {log} train --settings {params.settings:q} --model {input.model} --data {input.data}"
        " --saliency {input.index} --checkpoints {params.checkpoints} --code {params.code}"
        " --processes {resources.gpu} --output {output.pruner}"
        " --history {output.history} --metrics {output.metrics}"
