# LLMLingua-2 on the prompts of a suite, in an environment of its own, where `paper.llmlingua` names its weights: only
# `snakemake paper` asks for it.
os.environ.update(SDTP_LLMLINGUA_PYTHON=own_python("llmlingua"))
LLMLINGUA_FOUND = own_python_found("SDTP_LLMLINGUA_PYTHON", "LLMLingua-2", "llmlingua")


# As many tokens of each prompt as a layer sees of it under the trained pruner's schedule, on average.
rule suite_budgets:
    input:
        model="<model>",
        examples="<results>/suites/{suite}/examples.jsonl",
    output:
        examples=ensure("<results>/budgets/{suite}-{keep_ratio}.jsonl", non_empty=True),
        metrics="<results>/metrics/budgets-{suite}-{keep_ratio}.json",
    log:
        "<logs>/budgets/{suite}-{keep_ratio}.log",
    benchmark:
        "<benchmarks>/budgets-{suite}-{keep_ratio}.tsv"
    wildcard_constraints:
        keep_ratio=one_of(map(str, config["suites"]["keep_ratios"])),
    conda:
        "../../envs/sdtp.yaml"
    threads: 1
    resources:
        gpu=0,
    params:
        settings=settings(*SCHEDULE),
        code=code_hash("sdtp.pipeline.steps.budgets"),
    message:
        "Counting what LLMLingua-2 may keep of {wildcards.suite}, keep ratio {wildcards.keep_ratio}"
    shell:
        "sdtp --log {log} budgets --settings {params.settings:q} --model {input.model} --suite {input.examples}"
        " --keep-ratio {wildcards.keep_ratio} --output {output.examples} --metrics {output.metrics}"


rule llmlingua:
    input:
        model="<model>",
        examples="<results>/budgets/{suite}-{keep_ratio}.jsonl",
        script="workflow/scripts/llmlingua_compress.py",
        lock="envs/llmlingua.lock",
    output:
        examples=ensure("<results>/llmlingua/{suite}/examples-{keep_ratio}.jsonl", non_empty=True),
    log:
        "<logs>/llmlingua/{suite}-{keep_ratio}.log",
    benchmark:
        "<benchmarks>/llmlingua-{suite}-{keep_ratio}.tsv"
    wildcard_constraints:
        keep_ratio=one_of(map(str, config["suites"]["keep_ratios"])),
    conda:
        "../../envs/llmlingua.yaml"
    threads: 1
    resources:
        gpu=1,
    params:
        found=LLMLINGUA_FOUND,
        weights=config["paper"]["llmlingua"],
    message:
        "Shortening the prompts of {wildcards.suite} with LLMLingua-2, keep ratio {wildcards.keep_ratio}"
    shell:
        "({params.found}; "
        'sdtp lease --gpus {resources.gpu} -- "$SDTP_LLMLINGUA_PYTHON" {input.script} --weights {params.weights:q}'
        " --model {input.model} --examples {input.examples} --output {output.examples}) 2>&1 | tee {log}"


# Alone on the machine, as a benchmark is, and so is what the model makes of its prompts.
rule llmlingua_time:
    input:
        model="<model>",
        examples="<results>/budgets/timed-{keep_ratio}.jsonl",
        script="workflow/scripts/llmlingua_time.py",
        compressing="workflow/scripts/llmlingua_compress.py",
        lock="envs/llmlingua.lock",
    output:
        timings=ensure("<results>/llmlingua/shortened-{keep_ratio}.json", non_empty=True),
    log:
        "<logs>/llmlingua-time/{keep_ratio}.log",
    benchmark:
        "<benchmarks>/llmlingua-time-{keep_ratio}.tsv"
    wildcard_constraints:
        keep_ratio=one_of(map(str, config["suites"]["keep_ratios"])),
    conda:
        "../../envs/llmlingua.yaml"
    threads: ALL_CORES
    resources:
        gpu=1,
        timing=1,
    params:
        **{key: config["benchmark"][key] for key in ("repeats", "warmup")},
        found=LLMLINGUA_FOUND,
        weights=config["paper"]["llmlingua"],
    message:
        "Timing LLMLingua-2, keep ratio {wildcards.keep_ratio}"
    shell:
        "({params.found}; "
        'sdtp lease --gpus {resources.gpu} -- "$SDTP_LLMLINGUA_PYTHON" {input.script} --weights {params.weights:q}'
        " --model {input.model} --examples {input.examples} --keep-ratio {wildcards.keep_ratio}"
        " --repeats {params.repeats} --warmup {params.warmup} --output {output.timings}) 2>&1 | tee {log}"


rule time_shortened:
    input:
        model="<model>",
        shortened="<results>/llmlingua/shortened-{keep_ratio}.json",
    output:
        timings=ensure("<results>/llmlingua/speed-{keep_ratio}.json", non_empty=True),
        metrics="<results>/metrics/time-shortened-{keep_ratio}.json",
    log:
        "<logs>/time-shortened/{keep_ratio}.log",
    benchmark:
        "<benchmarks>/time-shortened-{keep_ratio}.tsv"
    wildcard_constraints:
        keep_ratio=one_of(map(str, config["suites"]["keep_ratios"])),
    conda:
        "../../envs/sdtp.yaml"
    threads: ALL_CORES
    resources:
        gpu=1,
        timing=1,
    params:
        settings=settings(
            "model.source",
            "model.dtype",
            "model.attention",
            "benchmark.new_tokens",
            "benchmark.repeats",
            "benchmark.warmup",
        ),
        code=code_hash("sdtp.pipeline.steps.time_shortened"),
    message:
        "Timing what LLMLingua-2 left of prompts, keep ratio {wildcards.keep_ratio}"
    shell:
        "sdtp lease --gpus {resources.gpu} --"
        " sdtp --log {log} time-shortened --settings {params.settings:q} --model {input.model}"
        " --shortened {input.shortened} --output {output.timings} --metrics {output.metrics}"


rule llmlingua_predict:
    input:
        model="<model>",
        examples="<results>/llmlingua/{suite}/examples-{keep_ratio}.jsonl",
    output:
        rows=ensure("<results>/llmlingua/{suite}/predictions-{keep_ratio}.jsonl", non_empty=True),
        metrics="<results>/metrics/llmlingua-predict-{suite}-{keep_ratio}.json",
    log:
        "<logs>/llmlingua-predict/{suite}-{keep_ratio}.log",
    benchmark:
        "<benchmarks>/llmlingua-predict-{suite}-{keep_ratio}.tsv"
    wildcard_constraints:
        keep_ratio=one_of(map(str, config["suites"]["keep_ratios"])),
    conda:
        "../../envs/sdtp.yaml"
    threads: 1
    resources:
        gpu=1,
    params:
        settings=settings("model.dtype", "model.attention", "suites.batch_tokens"),
        checkpoint=llmlingua_checkpoint,
        unpruned=UNPRUNED_RATIO,
        code=code_hash("sdtp.pipeline.steps.predict"),
    message:
        "Answering what LLMLingua-2 left of {wildcards.suite}, keep ratio {wildcards.keep_ratio}"
    shell:
        "sdtp lease --gpus {resources.gpu} --"
        " sdtp --log {log} predict --settings {params.settings:q} --suite {wildcards.suite} --model {input.model}"
        " --examples {input.examples} --method unpruned --keep-ratio {params.unpruned}"
        " --checkpoint {params.checkpoint} --code {params.code} --output {output.rows} --metrics {output.metrics}"


rule llmlingua_score:
    input:
        predictions="<results>/llmlingua/{suite}/predictions-{keep_ratio}.jsonl",
    output:
        scores=ensure("<results>/llmlingua/{suite}/scores-{keep_ratio}.jsonl", non_empty=True),
        metrics="<results>/metrics/llmlingua-score-{suite}-{keep_ratio}.json",
    log:
        "<logs>/llmlingua-score/{suite}-{keep_ratio}.log",
    benchmark:
        "<benchmarks>/llmlingua-score-{suite}-{keep_ratio}.tsv"
    wildcard_constraints:
        keep_ratio=one_of(map(str, config["suites"]["keep_ratios"])),
    conda:
        "../../envs/sdtp.yaml"
    threads: 1
    resources:
        gpu=0,
    params:
        settings=settings(),
        code=code_hash("sdtp.pipeline.steps.score"),
    message:
        "Scoring what LLMLingua-2 left of {wildcards.suite}, keep ratio {wildcards.keep_ratio}"
    shell:
        "sdtp --log {log} score --settings {params.settings:q} --predictions {input.predictions}"
        " --output {output.scores} --metrics {output.metrics}"
