rule model:
    input:
        local(MODEL_FILES),
    output:
        model=directory("<results>/model"),
        metrics="<results>/metrics/model.json",
    log:
        "<logs>/model.log",
    benchmark:
        "<benchmarks>/model.tsv"
    retries: MODEL_RETRIES
    conda:
        "../../envs/sdtp.yaml"
    threads: 1
    resources:
        gpu=0,
    params:
        settings=settings("model.source", "model.trust_remote_code"),
        code=code_hash("sdtp.pipeline.steps.model"),
    message:
        "Preparing the model"
    shell:
        "sdtp --log {log} model --settings {params.settings:q} --output {output.model} --metrics {output.metrics}"
