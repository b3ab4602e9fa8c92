rule data:
    input:
        local(TRAIN_FILES),
        model="<results>/model",
    output:
        data=directory("<results>/data"),
        metrics="<results>/metrics/data.json",
    log:
        "<logs>/data.log",
    benchmark:
        "<benchmarks>/data.tsv"
    retries: TRAIN_RETRIES
    conda:
        "../../envs/sdtp.yaml"
    threads: 1
    resources:
        gpu=0,
    params:
        settings=settings("seed", "data.max_tokens", "data.train", "data.malformed", "data.distractors"),
        code=code_hash("sdtp.pipeline.steps.data"),
    message:
        "Making and tokenising the examples to learn from"
    shell:
        "sdtp --log {log} data --settings {params.settings:q} --model {input.model} --output {output.data}"
        " --metrics {output.metrics}"


# Apart from what is learned from: another test trains nothing again.
rule test_data:
    input:
        local(TEST_FILES),
        model="<results>/model",
        # A corpus is split by its documents; of records, those that were learned from are left out.
        data=[] if config["data"]["test"]["source"]["kind"] == "package" else "<results>/data",
    output:
        data=directory("<results>/test-data"),
        metrics="<results>/metrics/test-data.json",
    log:
        "<logs>/test-data.log",
    benchmark:
        "<benchmarks>/test-data.tsv"
    retries: TEST_RETRIES
    conda:
        "../../envs/sdtp.yaml"
    threads: 1
    resources:
        gpu=0,
    params:
        settings=settings("seed", "data.max_tokens", "data.test", "data.malformed", "data.distractors"),
        code=code_hash("sdtp.pipeline.steps.test_data"),
    message:
        "Making and tokenising the test examples"
    shell:
        "sdtp --log {log} test-data --settings {params.settings:q} --model {input.model} --learned-from {input.data}"
        " --output {output.data} --metrics {output.metrics}"


# And other test examples time nothing again.
rule benchmark_text:
    input:
        local(TEST_FILES),
        model="<results>/model",
    output:
        text=ensure("<results>/benchmark-text.json", non_empty=True),
        metrics="<results>/metrics/benchmark-text.json",
    log:
        "<logs>/benchmark-text.log",
    benchmark:
        "<benchmarks>/benchmark-text.tsv"
    retries: TEST_RETRIES
    conda:
        "../../envs/sdtp.yaml"
    threads: 1
    resources:
        gpu=0,
    params:
        settings=settings("data.test.source", "data.malformed"),
        code=code_hash("sdtp.pipeline.steps.benchmark_text"),
    message:
        "Tokenising the text that benchmarks cut their prompts from"
    shell:
        "sdtp --log {log} benchmark-text --settings {params.settings:q} --model {input.model} --output {output.text}"
        " --metrics {output.metrics}"
