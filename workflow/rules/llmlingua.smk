# LLMLingua-2 on the prompts of a suite, in an environment of its own, where `paper.llmlingua` names its weights: only
# `snakemake paper` asks for it.
os.environ.update(SDTP_LLMLINGUA_PYTHON=own_python("llmlingua"))
LLMLINGUA_FOUND = own_python_found("SDTP_LLMLINGUA_PYTHON", "LLMLingua-2", "llmlingua")


rule llmlingua:
    input:
        model="<model>",
        examples="<results>/suites/{suite}/examples.jsonl",
        # It may keep as much of each prompt as the trained pruner did.
        like="<results>/suites/{suite}/predictions/sdtp-{keep_ratio}.jsonl",
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
        sinks=config["pruning"]["sinks"],
        local=config["pruning"]["local"],
        min_local=config["pruning"]["min_local"],
    message:
        "Shortening the prompts of {wildcards.suite} with LLMLingua-2, keep ratio {wildcards.keep_ratio}"
    shell:
        "({params.found}; "
        'sdtp lease --gpus {resources.gpu} -- "$SDTP_LLMLINGUA_PYTHON" {input.script} --weights {params.weights:q}'
        " --model {input.model} --examples {input.examples} --like {input.like} --sinks {params.sinks}"
        " --local {params.local} --min-local {params.min_local} --output {output.examples}) 2>&1 | tee {log}"


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
