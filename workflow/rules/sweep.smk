# Where to prune, and how often: the paper's Fig. 4 and 5. One pruner with a stage at every layer that is tried serves
# both; they share the cell they have in common. No target of the run asks for them.


rule sweep_train:
    input:
        model="<model>",
        data="<data>",
    output:
        pruner=directory("<results>/sweep/pruner"),
        metrics="<results>/metrics/sweep-train.json",
    log:
        "<logs>/sweep-train.log",
    benchmark:
        "<benchmarks>/sweep-train.tsv"
    conda:
        "../../envs/sdtp.yaml"
    threads: GPU_SHARE
    resources:
        gpu=1,
    params:
        settings=settings("seed", "model.dtype", "model.attention", *SCHEDULE, *SWEEP_TRAINING),
        code=code_hash("sdtp.pipeline.steps.sweep_train"),
    message:
        "Fitting scorers at every layer that the sweeps prune at"
    shell:
        "sdtp lease --gpus {resources.gpu} --"
        " sdtp --log {log} sweep-train --settings {params.settings:q} --model {input.model} --data {input.data}"
        " --output {output.pruner} --metrics {output.metrics}"


rule sweep_evaluate:
    input:
        model="<model>",
        data="<test_data>",
        reference="<reference>",
        pruner="<results>/sweep/pruner",
    output:
        rows=ensure("<results>/sweep/evaluation/layers-{layers}-ratio-{ratio}.jsonl", non_empty=True),
        metrics="<results>/metrics/sweep-evaluate-{layers}-{ratio}.json",
    log:
        "<logs>/sweep-evaluate/{layers}-{ratio}.log",
    benchmark:
        "<benchmarks>/sweep-evaluate-{layers}-{ratio}.tsv"
    wildcard_constraints:
        layers=r"\d+(-\d+)*",
        ratio=one_of(sorted({ratio for _, ratio in POSITIONS + COUNTS})),
    conda:
        "../../envs/sdtp.yaml"
    threads: 1
    resources:
        gpu=1,
    params:
        settings=settings("model.dtype", "model.attention", "evaluation.batch_tokens", "sweep.examples"),
        layers=swept_stages,
        code=code_hash("sdtp.pipeline.steps.sweep_evaluate"),
    message:
        "Evaluating stages at layers {wildcards.layers}, keep ratio {wildcards.ratio}"
    shell:
        "sdtp lease --gpus {resources.gpu} --"
        " sdtp --log {log} sweep-evaluate --settings {params.settings:q} --model {input.model} --data {input.data}"
        " --reference {input.reference} --pruner {input.pruner} --layers {params.layers} --keep-ratio {wildcards.ratio}"
        " --output {output.rows} --metrics {output.metrics}"


rule sweep_table:
    input:
        data="<test_data>",
        # The run's own: the unpruned model is not evaluated again.
        unpruned=f"<results>/evaluation/unpruned-{UNPRUNED_RATIO}.jsonl",
        evaluations=swept(POSITIONS + COUNTS),
    output:
        positions=report(
            "<results>/tables/stage-position.csv", caption="../report/stage-position.rst", category="Sweeps"
        ),
        counts=report("<results>/tables/stage-count.csv", caption="../report/stage-count.rst", category="Sweeps"),
        position_svg=report(
            "<results>/figures/stage-position.svg",
            caption="../report/stage-position.rst",
            category="Sweeps",
        ),
        count_svg=report("<results>/figures/stage-count.svg", caption="../report/stage-count.rst", category="Sweeps"),
        png=["<results>/figures/stage-position.png", "<results>/figures/stage-count.png"],
        metrics="<results>/metrics/sweep-table.json",
    log:
        "<logs>/sweep-table.log",
    benchmark:
        "<benchmarks>/sweep-table.tsv"
    conda:
        "../../envs/sdtp.yaml"
    threads: 1
    resources:
        gpu=0,
    params:
        settings=settings("pruning.start", "pruning.step", *(f"sweep.{key}" for key in config["sweep"])),
        code=code_hash("sdtp.pipeline.steps.sweep_table"),
    message:
        "Comparing where and how often to prune"
    shell:
        "sdtp --log {log} sweep-table --settings {params.settings:q} --data {input.data}"
        " --unpruned {input.unpruned} --evaluations {input.evaluations}"
        " --position {output.positions} --position-figure {output.position_svg}"
        " --count {output.counts} --count-figure {output.count_svg} --metrics {output.metrics}"


# The target of `snakemake sweep`.
rule sweep:
    input:
        "<results>/checked.json",
        rules.sweep_table.output.positions,
        rules.sweep_table.output.counts,
        rules.sweep_table.output.position_svg,
        rules.sweep_table.output.count_svg,
        rules.sweep_table.output.png,
