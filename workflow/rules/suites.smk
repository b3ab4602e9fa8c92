# Suites of long-context tasks with generated answers: no target of the run asks for them, `snakemake suites` does.
rule ruler_data:
    input:
        model="<model>",
        files=RULER_FILES,
    output:
        examples=ensure("<results>/suites/ruler/examples.jsonl", non_empty=True),
        metrics="<results>/metrics/ruler-data.json",
    log:
        "<logs>/ruler-data.log",
    benchmark:
        "<benchmarks>/ruler-data.tsv"
    conda:
        "../../envs/sdtp.yaml"
    threads: 1
    resources:
        gpu=0,
    params:
        settings=settings("seed", *(f"suites.ruler.{key}" for key in config["suites"]["ruler"])),
        code=code_hash("sdtp.pipeline.steps.ruler_data"),
    message:
        "Writing the prompts of the RULER-style tasks"
    shell:
        "sdtp --log {log} ruler-data --settings {params.settings:q} --model {input.model} --output {output.examples}"
        " --metrics {output.metrics}"


rule longbench_data:
    input:
        model="<model>",
        files=LONGBENCH_FILES,
    output:
        examples=ensure("<results>/suites/longbench/examples.jsonl", non_empty=True),
        metrics="<results>/metrics/longbench-data.json",
    log:
        "<logs>/longbench-data.log",
    benchmark:
        "<benchmarks>/longbench-data.tsv"
    retries: LONGBENCH_RETRIES
    conda:
        "../../envs/sdtp.yaml"
    threads: 1
    resources:
        gpu=0,
    params:
        settings=settings("seed", *(f"suites.longbench.{key}" for key in config["suites"]["longbench"])),
        code=code_hash("sdtp.pipeline.steps.longbench_data"),
    message:
        "Writing the prompts of LongBench"
    shell:
        "sdtp --log {log} longbench-data --settings {params.settings:q} --model {input.model} --output {output.examples}"
        " --metrics {output.metrics}"


rule predict:
    input:
        model="<model>",
        examples="<results>/suites/{suite}/examples.jsonl",
        pruner=evaluated_pruner,
    output:
        rows=ensure("<results>/suites/{suite}/predictions/{method}-{keep_ratio}.jsonl", non_empty=True),
        metrics="<results>/metrics/predict-{suite}-{method}-{keep_ratio}.json",
    log:
        "<logs>/predict/{suite}/{method}-{keep_ratio}.log",
    benchmark:
        "<benchmarks>/predict-{suite}-{method}-{keep_ratio}.tsv"
    wildcard_constraints:
        keep_ratio=one_of([*map(str, config["suites"]["keep_ratios"]), UNPRUNED_RATIO]),
    conda:
        "../../envs/sdtp.yaml"
    threads: 1
    resources:
        gpu=1,
    params:
        settings=predict_settings,
        pruner=pruner_option,
        checkpoint=prediction_checkpoint,
        code=code_hash("sdtp.pipeline.steps.predict"),
    message:
        "Answering {wildcards.suite}, {wildcards.method}, keep ratio {wildcards.keep_ratio}"
    shell:
        "sdtp lease --gpus {resources.gpu} --"
        " sdtp --log {log} predict --settings {params.settings:q} --suite {wildcards.suite} --model {input.model}"
        " --examples {input.examples} {params.pruner} --method {wildcards.method} --keep-ratio {wildcards.keep_ratio}"
        " --checkpoint {params.checkpoint} --code {params.code} --output {output.rows} --metrics {output.metrics}"


rule score:
    input:
        predictions="<results>/suites/{suite}/predictions/{method}-{keep_ratio}.jsonl",
    output:
        scores=ensure("<results>/suites/{suite}/scores/{method}-{keep_ratio}.jsonl", non_empty=True),
        metrics="<results>/metrics/score-{suite}-{method}-{keep_ratio}.json",
    log:
        "<logs>/score/{suite}/{method}-{keep_ratio}.log",
    benchmark:
        "<benchmarks>/score-{suite}-{method}-{keep_ratio}.tsv"
    wildcard_constraints:
        keep_ratio=one_of([*map(str, config["suites"]["keep_ratios"]), UNPRUNED_RATIO]),
    conda:
        "../../envs/sdtp.yaml"
    threads: 1
    resources:
        gpu=0,
    params:
        code=code_hash("sdtp.pipeline.steps.score"),
    message:
        "Scoring {wildcards.suite}, {wildcards.method}, keep ratio {wildcards.keep_ratio}"
    shell:
        "sdtp --log {log} score --predictions {input.predictions} --output {output.scores} --metrics {output.metrics}"


rule ruler_table:
    input:
        scores=scores("ruler"),
    output:
        table=report("<results>/tables/ruler.csv", caption="../report/suites.rst", category="Suites"),
        svg=report(
            expand("<results>/figures/{figure}.svg", figure=SUITE_FIGURES["ruler"]),
            caption="../report/suites.rst",
            category="Suites",
        ),
        png=expand("<results>/figures/{figure}.png", figure=SUITE_FIGURES["ruler"]),
        metrics="<results>/metrics/suite-table-ruler.json",
    log:
        "<logs>/suite-table/ruler.log",
    benchmark:
        "<benchmarks>/suite-table-ruler.tsv"
    conda:
        "../../envs/sdtp.yaml"
    threads: 1
    resources:
        gpu=0,
    params:
        settings=settings("suites.methods", "suites.keep_ratios"),
        suite="ruler",
        heat_map=heat_map_option,
        code=code_hash("sdtp.pipeline.steps.suite_table"),
    message:
        "Gathering the scores of {params.suite}"
    shell:
        "sdtp --log {log} suite-table --settings {params.settings:q} --suite {params.suite} --scores {input.scores}"
        " --table {output.table} --figure {output.svg[0]} {params.heat_map} --metrics {output.metrics}"


use rule ruler_table as longbench_table with:
    input:
        scores=scores("longbench"),
    output:
        table=report("<results>/tables/longbench.csv", caption="../report/suites.rst", category="Suites"),
        svg=report(
            expand("<results>/figures/{figure}.svg", figure=SUITE_FIGURES["longbench"]),
            caption="../report/suites.rst",
            category="Suites",
        ),
        png=expand("<results>/figures/{figure}.png", figure=SUITE_FIGURES["longbench"]),
        metrics="<results>/metrics/suite-table-longbench.json",
    log:
        "<logs>/suite-table/longbench.log",
    benchmark:
        "<benchmarks>/suite-table-longbench.tsv"
    params:
        settings=settings("suites.methods", "suites.keep_ratios"),
        suite="longbench",
        heat_map=heat_map_option,
        code=code_hash("sdtp.pipeline.steps.suite_table"),


# The target of `snakemake suites`.
rule suites:
    input:
        suite_files,
