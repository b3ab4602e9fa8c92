rule data:
    input:
        local(DATA_FILES),
        model="<results>/model",
    output:
        data=directory("<results>/data"),
        metrics="<results>/metrics/data.json",
    log:
        "<logs>/data.log",
    benchmark:
        "<benchmarks>/data.tsv"
    retries: DATA_RETRIES
    conda:
        "../../envs/sdtp.yaml"
    threads: 1
    resources:
        gpu=0,
    params:
        settings=settings("seed", "data"),
        code=code_hash("sdtp.pipeline.steps.data"),
    message:
        "Making and tokenising the examples"
    shell:
        "sdtp --log {log} data --settings {params.settings:q} --model {input.model} --output {output.data}"
        " --metrics {output.metrics}"
