# The paper's tables and figures, each as CSV and figure and on one page: no target of the run asks for them, `snakemake
# paper` does. The ablations of Tables 4 and 5 are variants of the run itself: they share its saliency, and train and
# evaluate pruners of their own below the paper's folder.
module ablation_run:
    pathvars:
        results=f"{RESULTS}/paper/variants/{{ablation}}",
        logs=f"{LOGS}/paper/variants/{{ablation}}",
        benchmarks=f"{RESULTS}/paper/variants/{{ablation}}/resources",
    snakefile:
        "variant.smk"
    config:
        config


use rule train from ablation_run as paper_train with:
    input:
        model="<model>",
        data="<data>",
        index=f"{RESULTS}/saliency/index.json",
        shards=expand(f"{RESULTS}/saliency/shard-{{shard}}.safetensors", shard=SHARDS),


use rule evaluate from ablation_run as paper_evaluate


rule paper:
    input:
        unpack(paper_inputs),
        checked="<results>/checked.json",
        model="<model>",
        data="<data>",
        index="<results>/saliency/index.json",
        shards=expand("<results>/saliency/shard-{shard}.safetensors", shard=SHARDS),
        latency="<results>/tables/latency.csv",
        unpruned=f"<results>/evaluation/unpruned-{UNPRUNED_RATIO}.jsonl",
        full=expand("<results>/evaluation/sdtp-{keep_ratio}.jsonl", keep_ratio=KEEP_RATIOS),
        variants=expand(
            "<results>/paper/variants/{ablation}/evaluation/sdtp-{keep_ratio}.jsonl",
            ablation=ABLATIONS,
            keep_ratio=KEEP_RATIOS,
        ),
        training=[
            "<results>/metrics/train.json",
            *expand("<results>/paper/variants/{ablation}/metrics/train.json", ablation=ABLATIONS),
        ],
    output:
        html=report("<results>/paper/paper.html", caption="../report/paper.rst", category="Paper"),
        markdown="<results>/paper/paper.md",
        tables=expand("<results>/paper/{part}.csv", part=PARTS),
        svg=report(
            expand("<results>/paper/{part}.svg", part=PARTS),
            caption="../report/paper.rst",
            category="Paper",
        ),
        png=expand("<results>/paper/{part}.png", part=PARTS),
        metrics="<results>/metrics/paper.json",
    log:
        "<logs>/paper.log",
    benchmark:
        "<benchmarks>/paper.tsv"
    conda:
        "../../envs/sdtp.yaml"
    threads: 1
    resources:
        gpu=0,
    params:
        settings=settings(*(key for key in config if key not in ("variants", "tracking"))),
        results=subpath(input.latency, ancestor=2),
        options=paper_options,
        code=code_hash("sdtp.pipeline.steps.paper"),
    message:
        "Putting the paper's tables and figures together"
    shell:
        "sdtp --log {log} paper --settings {params.settings:q} --model {input.model} --data {input.data}"
        " --saliency {input.index} --latency {input.latency} --unpruned {input.unpruned} --full {input.full}"
        " --variants {input.variants} --training {input.training} {params.options} --output {params.results}/paper --metrics {output.metrics}"
