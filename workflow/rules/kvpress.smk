# The comparison with NVIDIA's kvpress, which has an environment of its own: no target of the run asks for it, one asks for
# its files by name.
os.environ.update(SDTP_KVPRESS_PYTHON=own_python("kvpress"))
KVPRESS_FOUND = own_python_found("SDTP_KVPRESS_PYTHON", "kvpress", "kvpress")
KNOWN_PRESSES = "SnapKVPress|ExpectedAttentionPress|KnormPress|StreamingLLMPress"


rule budgets:
    input:
        model="<model>",
        prompts="<test_data>",
    output:
        examples=ensure("<results>/budgets/ratio-{keep_ratio}.jsonl", non_empty=True),
        metrics="<results>/metrics/budgets-{keep_ratio}.json",
    log:
        "<logs>/budgets/{keep_ratio}.log",
    benchmark:
        "<benchmarks>/budgets-{keep_ratio}.tsv"
    conda:
        "../../envs/sdtp.yaml"
    threads: 1
    resources:
        gpu=0,
    params:
        settings=settings(*SCHEDULE),
        option="--data",
        code=code_hash("sdtp.pipeline.steps.budgets"),
    message:
        "Counting what a cache may hold, keep ratio {wildcards.keep_ratio}"
    shell:
        "sdtp --log {log} budgets --settings {params.settings:q} --model {input.model} {params.option} {input.prompts}"
        " --keep-ratio {wildcards.keep_ratio} --output {output.examples} --metrics {output.metrics}"


rule kvpress:
    input:
        model="<model>",
        examples="<results>/budgets/ratio-{keep_ratio}.jsonl",
        reference="<reference>",
        script="workflow/scripts/kvpress_evaluate.py",
        lock="envs/kvpress.lock",
    output:
        rows=ensure("<results>/evaluation/kvpress-{press}-{keep_ratio}.jsonl", non_empty=True),
    log:
        "<logs>/kvpress/{press}-{keep_ratio}.log",
    benchmark:
        "<benchmarks>/kvpress-{press}-{keep_ratio}.tsv"
    wildcard_constraints:
        press=KNOWN_PRESSES,
    conda:
        "../../envs/kvpress.yaml"
    threads: 1
    resources:
        gpu=1,
    params:
        found=KVPRESS_FOUND,
        dtype=config["model"]["dtype"],
        attention=config["model"]["attention"],
    message:
        "Evaluating kvpress' {wildcards.press}, keep ratio {wildcards.keep_ratio}"
    shell:
        "({params.found}; "
        'sdtp lease --gpus {resources.gpu} -- "$SDTP_KVPRESS_PYTHON" {input.script} --model {input.model}'
        " --dtype {params.dtype} --attention {params.attention} --examples {input.examples}"
        " --reference {input.reference} --press {wildcards.press} --keep-ratio {wildcards.keep_ratio}"
        " --output {output.rows}) 2>&1 | tee {log}"


# The prompts that methods are timed on, under their own budgets: other lengths evaluate nothing again.
use rule budgets as timed_budgets with:
    input:
        model="<model>",
        prompts="<text>",
    output:
        examples=ensure("<results>/budgets/timed-{keep_ratio}.jsonl", non_empty=True),
        metrics="<results>/metrics/timed-budgets-{keep_ratio}.json",
    log:
        "<logs>/timed-budgets/{keep_ratio}.log",
    benchmark:
        "<benchmarks>/timed-budgets-{keep_ratio}.tsv"
    wildcard_constraints:
        # LLMLingua-2 is timed at the suites'.
        keep_ratio=one_of([*KEEP_RATIOS, *map(str, config["suites"]["keep_ratios"])]),
    params:
        settings=settings(*SCHEDULE, "peers.prompt_tokens"),
        option="--text",
        code=code_hash("sdtp.pipeline.steps.budgets"),
    message:
        "Counting what a cache may hold where it is timed, keep ratio {wildcards.keep_ratio}"


# Alone on the machine, as a benchmark is.
rule kvpress_time:
    input:
        model="<model>",
        examples="<results>/budgets/timed-{keep_ratio}.jsonl",
        script="workflow/scripts/kvpress_time.py",
        evaluating="workflow/scripts/kvpress_evaluate.py",
        lock="envs/kvpress.lock",
    output:
        timings=ensure("<results>/timings/kvpress-{press}-{keep_ratio}.json", non_empty=True),
    log:
        "<logs>/kvpress-time/{press}-{keep_ratio}.log",
    benchmark:
        "<benchmarks>/kvpress-time-{press}-{keep_ratio}.tsv"
    wildcard_constraints:
        press=KNOWN_PRESSES,
    conda:
        "../../envs/kvpress.yaml"
    threads: ALL_CORES
    resources:
        gpu=1,
        timing=1,
    params:
        **{key: config["benchmark"][key] for key in ("new_tokens", "repeats", "warmup")},
        found=KVPRESS_FOUND,
        dtype=config["model"]["dtype"],
        attention=config["model"]["attention"],
        name=config["model"]["source"]["ref"],
    message:
        "Timing kvpress' {wildcards.press}, keep ratio {wildcards.keep_ratio}"
    shell:
        "({params.found}; "
        'sdtp lease --gpus {resources.gpu} -- "$SDTP_KVPRESS_PYTHON" {input.script} --model {input.model}'
        " --name {params.name:q} --dtype {params.dtype} --attention {params.attention} --examples {input.examples}"
        " --press {wildcards.press} --keep-ratio {wildcards.keep_ratio} --new-tokens {params.new_tokens}"
        " --repeats {params.repeats} --warmup {params.warmup} --output {output.timings}) 2>&1 | tee {log}"
