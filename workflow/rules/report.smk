rule tables:
    input:
        data="<test_data>",
        benchmarks=expand("<results>/benchmark/ratio-{keep_ratio}.json", keep_ratio=KEEP_RATIOS),
        evaluations=evaluations(METHODS),
    output:
        latency=report(
            "<results>/tables/latency.csv",
            caption="../report/latency.rst",
            category="Tables",
        ),
        quality=report(
            "<results>/tables/quality.csv",
            caption="../report/quality.rst",
            category="Tables",
        ),
        comparisons=report(
            "<results>/tables/comparisons.csv",
            caption="../report/comparisons.rst",
            category="Tables",
        ),
        targets=report(
            "<results>/tables/targets.csv",
            caption="../report/targets.rst",
            category="Tables",
        ),
        metrics="<results>/metrics/tables.json",
    log:
        "<logs>/tables.log",
    benchmark:
        "<benchmarks>/tables.tsv"
    conda:
        "../../envs/sdtp.yaml"
    threads: 1
    resources:
        gpu=0,
    params:
        settings=settings("run", "pruning.keep_ratios", "evaluation.methods", "evaluation.seeds"),
        code=code_hash("sdtp.pipeline.steps.tables"),
    message:
        "Gathering the tables"
    shell:
        "sdtp --log {log} tables --settings {params.settings:q} --data {input.data} --benchmarks {input.benchmarks}"
        " --evaluations {input.evaluations} --latency {output.latency} --quality {output.quality}"
        " --comparisons {output.comparisons} --targets {output.targets} --metrics {output.metrics}"


rule figures:
    input:
        model="<results>/model",
        data="<data>",
        test_data="<test_data>",
        index="<results>/saliency/index.json",
        shards=expand("<results>/saliency/shard-{shard}.safetensors", shard=SHARDS),
        history="<results>/training/history.csv",
        generations=expand("<results>/generations/ratio-{keep_ratio}.jsonl", keep_ratio=KEEP_RATIOS),
        latency="<results>/tables/latency.csv",
        quality="<results>/tables/quality.csv",
    output:
        # One by one, not as a folder: then a figure that is deleted is drawn again.
        svg=report(
            expand("<results>/figures/{figure}.svg", figure=FIGURES),
            caption="../report/figures.rst",
            category="Figures",
        ),
        png=expand("<results>/figures/{figure}.png", figure=FIGURES),
        sparsity=report(
            "<results>/tables/sparsity.csv",
            caption="../report/observations.rst",
            category="Tables",
        ),
        foresight=report(
            "<results>/tables/foresight.csv",
            caption="../report/observations.rst",
            category="Tables",
        ),
    log:
        "<logs>/figures.log",
    benchmark:
        "<benchmarks>/figures.tsv"
    conda:
        "../../envs/sdtp.yaml"
    threads: 1
    resources:
        gpu=0,
    params:
        settings=settings(),
        results=subpath(input.latency, ancestor=2),
        code=code_hash("sdtp.pipeline.steps.figures"),
    message:
        "Drawing the figures"
    shell:
        "sdtp --log {log} figures --settings {params.settings:q} --model {input.model} --data {input.data}"
        " --test-data {input.test_data}"
        " --saliency {input.index} --history {input.history} --generations {input.generations}"
        " --latency {input.latency} --quality {input.quality} --sparsity {output.sparsity}"
        " --foresight {output.foresight} --output {params.results}/figures"


rule report:
    input:
        model="<results>/model",
        data="<data>",
        test_data="<test_data>",
        index="<results>/saliency/index.json",
        pruner="<results>/pruner",
        history="<results>/training/history.csv",
        generations=expand("<results>/generations/ratio-{keep_ratio}.jsonl", keep_ratio=KEEP_RATIOS),
        latency="<results>/tables/latency.csv",
        quality="<results>/tables/quality.csv",
        comparisons="<results>/tables/comparisons.csv",
        benchmarks=expand("<results>/benchmark/ratio-{keep_ratio}.json", keep_ratio=KEEP_RATIOS),
        figures=rules.figures.output.svg,
    output:
        html=report("<results>/report.html", caption="../report/report.rst", category="Report"),
        metrics="<results>/metrics/report.json",
    log:
        "<logs>/report.log",
    benchmark:
        "<benchmarks>/report.tsv"
    conda:
        "../../envs/sdtp.yaml"
    threads: 1
    resources:
        gpu=0,
    params:
        settings=settings(*(key for key in config if key not in OF_OTHER_TARGETS)),
        results=subpath(input.latency, ancestor=2),
        code=code_hash("sdtp.pipeline.steps.report"),
    message:
        "Writing the report"
    shell:
        "sdtp --log {log} report --settings {params.settings:q} --model {input.model} --data {input.data}"
        " --test-data {input.test_data}"
        " --saliency {input.index} --pruner {input.pruner} --history {input.history} --generations {input.generations}"
        " --latency {input.latency} --quality {input.quality} --comparisons {input.comparisons}"
        " --benchmarks {input.benchmarks} --figures {params.results}/figures --output {output.html} --metrics {output.metrics}"
