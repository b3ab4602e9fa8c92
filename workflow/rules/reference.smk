rule reference:
    input:
        model="<model>",
        data="<test_data>",
    output:
        states=ensure("<reference>", non_empty=True),
        metrics="<results>/metrics/reference.json",
    log:
        "<logs>/reference.log",
    benchmark:
        "<benchmarks>/reference.tsv"
    conda:
        "../../envs/sdtp.yaml"
    threads: 1
    resources:
        gpu=1,
    params:
        settings=settings("model.dtype", "model.attention", "evaluation.batch_tokens"),
        code=code_hash("sdtp.pipeline.steps.reference"),
    message:
        "Storing what the unpruned model makes of the test examples"
    shell:
        "sdtp lease --gpus {resources.gpu} --"
        " sdtp --log {log} reference --settings {params.settings:q} --model {input.model} --data {input.data}"
        " --output {output.states} --metrics {output.metrics}"
