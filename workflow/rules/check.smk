# Only the model says how many layers and positions it has, and its tokenizer how many tokens the benchmark's text: that
# is made here as step `benchmark_text` makes it. No rule takes this file as input, so that other benchmark lengths train
# nothing again (`ancient` would hide a rule's own changes and train again after a refusal); the check comes first by its
# priority, and alone by taking every core. On a cluster it may run beside others, for seconds.
rule check:
    input:
        local(TEST_FILES),
        model="<results>/model",
    output:
        checked=ensure("<results>/checked.json", non_empty=True),
        metrics="<results>/metrics/check.json",
    log:
        "<logs>/check.log",
    benchmark:
        "<benchmarks>/check.tsv"
    priority: 1
    retries: TEST_RETRIES
    conda:
        "../../envs/sdtp.yaml"
    threads: ALL_CORES
    resources:
        gpu=0,
    params:
        settings=settings(
            "data.max_tokens",
            "data.malformed",
            "data.test.source",
            "pruning.start",
            "pruning.step",
            "generation.max_new_tokens",
            "benchmark.prompt_tokens",
            "benchmark.new_tokens",
        ),
        code=code_hash("sdtp.pipeline.steps.check"),
    message:
        "Checking the settings against the model and the benchmark's text"
    shell:
        "sdtp --log {log} check --settings {params.settings:q} --model {input.model} --output {output.checked}"
        " --metrics {output.metrics}"
