rule evaluate:
    input:
        model="<model>",
        data="<test_data>",
        reference="<reference>",
        pruner=evaluated_pruner,
    output:
        rows=ensure("<results>/evaluation/{method}-{keep_ratio}.jsonl", non_empty=True),
        metrics="<results>/metrics/evaluate-{method}-{keep_ratio}.json",
    log:
        "<logs>/evaluate/{method}-{keep_ratio}.log",
    benchmark:
        "<benchmarks>/evaluate-{method}-{keep_ratio}.tsv"
    conda:
        "../../envs/sdtp.yaml"
    threads: 1
    resources:
        gpu=1,
    params:
        settings=evaluate_settings,
        pruner=pruner_option,
        code=code_hash("sdtp.pipeline.steps.evaluate"),
    message:
        "Evaluating {wildcards.method}, keep ratio {wildcards.keep_ratio}"
    shell:
        "sdtp lease --gpus {resources.gpu} --"
        " sdtp --log {log} evaluate --settings {params.settings:q} --model {input.model} --data {input.data}"
        " --reference {input.reference} {params.pruner} --method {wildcards.method}"
        " --keep-ratio {wildcards.keep_ratio} --output {output.rows} --metrics {output.metrics}"
