# Multiple-choice tasks of lm-evaluation-harness: no target of the run asks for them, `snakemake harness` does.
rule multiple_choice_data:
    input:
        files=HARNESS_FILES,
    output:
        tasks=directory("<results>/harness/tasks"),
        metrics="<results>/metrics/multiple-choice-data.json",
    log:
        "<logs>/multiple-choice-data.log",
    benchmark:
        "<benchmarks>/multiple-choice-data.tsv"
    conda:
        "../../envs/sdtp.yaml"
    threads: 1
    resources:
        gpu=0,
    params:
        settings=settings("seed", *(f"harness.local.{key}" for key in HARNESS["local"])),
        tasks=OWN_TASKS,
        code=code_hash("sdtp.pipeline.steps.multiple_choice_data"),
    message:
        "Writing multiple-choice questions"
    shell:
        "sdtp --log {log} multiple-choice-data --settings {params.settings:q} --tasks {params.tasks}"
        " --output {output.tasks} --metrics {output.metrics}"


rule harness_answers:
    input:
        INCLUDED,
        model="<model>",
        pruner=evaluated_pruner,
        tasks=own_tasks,
    output:
        rows=ensure("<results>/harness/{method}-{keep_ratio}.jsonl", non_empty=True),
        results="<results>/harness/{method}-{keep_ratio}.json",
        metrics="<results>/metrics/harness-{method}-{keep_ratio}.json",
    log:
        "<logs>/harness/{method}-{keep_ratio}.log",
    benchmark:
        "<benchmarks>/harness-{method}-{keep_ratio}.tsv"
    wildcard_constraints:
        keep_ratio=one_of([*map(str, HARNESS["keep_ratios"]), UNPRUNED_RATIO]),
    retries: HARNESS_RETRIES
    conda:
        "../../envs/sdtp.yaml"
    threads: 1
    resources:
        gpu=1,
    params:
        settings=harness_settings,
        pruner=pruner_option,
        tasks=task_folders,
        checkpoint=harness_checkpoint,
        code=code_hash("sdtp.pipeline.steps.harness"),
    message:
        "Answering multiple-choice questions, {wildcards.method}, keep ratio {wildcards.keep_ratio}"
    shell:
        "sdtp lease --gpus {resources.gpu} --"
        " sdtp --log {log} harness --settings {params.settings:q} --model {input.model} {params.tasks} {params.pruner}"
        " --method {wildcards.method} --keep-ratio {wildcards.keep_ratio} --checkpoint {params.checkpoint}"
        " --code {params.code} --output {output.rows} --results {output.results} --metrics {output.metrics}"


rule harness_table:
    input:
        scores=harness_cells,
    output:
        table=report("<results>/tables/harness.csv", caption="../report/harness.rst", category="Suites"),
        svg=report("<results>/figures/harness.svg", caption="../report/harness.rst", category="Suites"),
        png="<results>/figures/harness.png",
        metrics="<results>/metrics/harness-table.json",
    log:
        "<logs>/harness-table.log",
    benchmark:
        "<benchmarks>/harness-table.tsv"
    conda:
        "../../envs/sdtp.yaml"
    threads: 1
    resources:
        gpu=0,
    params:
        settings=settings("harness.methods", "harness.keep_ratios"),
        code=code_hash("sdtp.pipeline.steps.harness_table"),
    message:
        "Gathering the answers to multiple-choice questions"
    shell:
        "sdtp --log {log} harness-table --settings {params.settings:q} --scores {input.scores} --table {output.table}"
        " --figure {output.svg} --metrics {output.metrics}"


# The target of `snakemake harness`.
rule harness:
    input:
        rules.harness_table.output,
