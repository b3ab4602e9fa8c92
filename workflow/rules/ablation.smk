# Each of `variants` has a pruner and an evaluation of its own, made by the rules of the run under other paths. Two
# modules, not one a variant: so the rules' names are fixed, and a profile can give them threads and memory.
if VARIANTS:

    module variant:
        pathvars:
            results=f"{RESULTS}/variants/{{variant}}",
            logs=f"{LOGS}/variants/{{variant}}",
            benchmarks=f"{RESULTS}/variants/{{variant}}/resources",
        snakefile:
            "variant.smk"
        config:
            config

    # Variants with the same saliency share it: its folder is named by what it is made from, so that a change of one
    # variant takes nothing from the others.
    module labels:
        pathvars:
            results=f"{RESULTS}/ablation/labels/{{labels}}",
            logs=f"{LOGS}/ablation/labels/{{labels}}",
            benchmarks=f"{RESULTS}/ablation/labels/{{labels}}/resources",
        snakefile:
            "variant.smk"
        config:
            config

    use rule saliency from labels as variant_saliency

    use rule saliency_index from labels as variant_saliency_index

    use rule train from variant as variant_train with:
        input:
            model="<model>",
            data="<data>",
            index=variant_index,
            shards=variant_shards,

    use rule evaluate from variant as variant_evaluate

    rule ablation_table:
        input:
            data="<test_data>",
            references=evaluations(REFERENCES),
            variants=expand(
                "<results>/variants/{variant}/evaluation/sdtp-{keep_ratio}.jsonl",
                variant=VARIANTS,
                keep_ratio=KEEP_RATIOS,
            ),
            training=expand("<results>/variants/{variant}/metrics/train.json", variant=VARIANTS),
        output:
            table=report(
                "<results>/ablation/ablation.csv",
                caption="../report/ablation.rst",
                category="Ablation",
            ),
            targets=report(
                "<results>/ablation/targets.csv",
                caption="../report/targets.rst",
                category="Ablation",
            ),
            page="<results>/ablation/ablation.md",
            svg=report(
                "<results>/ablation/ablation.svg",
                caption="../report/ablation.rst",
                category="Ablation",
            ),
            png="<results>/ablation/ablation.png",
            metrics="<results>/metrics/ablation.json",
        log:
            "<logs>/ablation.log",
        benchmark:
            "<benchmarks>/ablation.tsv"
        conda:
            "../../envs/sdtp.yaml"
        threads: 1
        resources:
            gpu=0,
        params:
            settings=settings("run", "pruning.keep_ratios", "evaluation.methods", "evaluation.seeds"),
            variants=list(VARIANTS),
            code=code_hash("sdtp.pipeline.steps.ablation"),
        message:
            "Comparing the variants"
        shell:
            "sdtp --log {log} ablation --settings {params.settings:q} --data {input.data}"
            " --references {input.references} --variants {params.variants} --evaluations {input.variants}"
            " --training {input.training} --table {output.table} --targets {output.targets} --page {output.page}"
            " --figure {output.svg} --metrics {output.metrics}"


# The target of `snakemake ablation`.
rule ablation:
    input:
        ablation_files,
