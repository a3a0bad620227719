"""The tutorials' recipes: their recorded runs over seeds, beside Keras's and the tutorials' own figures."""

import json
import statistics

import yaml

PRECISIONS = {"32-true": "", "bf16-mixed": " bfloat16"}
FREE = ("experiment", "seed", "plots", "data.root", "accelerator.precision")  # overrides that change no recipe


def runs_in(folder, names):
    """Finished runs below a folder that used one of these recipes as it is, by recipe and seed."""
    runs = {}
    for file in sorted(folder.glob("**/metrics.json")):
        run = yaml.safe_load((file.parent / "config.yaml").read_text())
        about, name = run["run"], run["run"]["choices"].get("experiment")
        changed = [word for word in about["overrides"] if word.partition("=")[0] not in FREE]
        if name in names and not changed:
            name += PRECISIONS[run["accelerator"]["precision"]]
            kept = {key: about[key] for key in ("started", "git_commit", "machine", "versions")}
            runs[f"{name} seed {run['seed']}"] = {"metrics": json.loads(file.read_text()), **kept}
    return runs


def runs_of(records, name):
    return [run for key, run in records["runs"].items() if key.rpartition(" seed ")[0] == name]


def accuracies(records, name):
    return [100 * run["metrics"]["test/accuracy"] for run in runs_of(records, name)]


def mean_sd(values):
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}" if len(values) > 1 else "–"


def keras_accuracy(tutorial):
    return f"{tutorial['keras']['mean']:.2f} ± {tutorial['keras']['sd']:.2f}" if tutorial["keras"] else "–"


def claim(records, name):
    """The header line of a recipe's YAML."""
    values = accuracies(records, name)
    return f"# Measured: test accuracy {mean_sd(values)} % (mean ± sd of {len(values)} seeds; scripts/tables)."


def front_table(records, fits):
    """The table of README.md; `fits` are the rows of scripts/benchmark keras, each with a recipe's seconds."""
    heads = ["recipe", "parameters", "test accuracy, %", "in bfloat16, %", "Keras, %"]
    heads += ["fit, s", "in bfloat16, s", "of Keras's time"]
    lines = [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
    by_recipe = {row["recipe"].strip("`"): row for row in fits}
    for name, tutorial in records["tutorials"].items():
        cells = [f"`{name}`", f"{runs_of(records, name)[0]['metrics']['parameters']:,}"]
        cells += [mean_sd(accuracies(records, name)), mean_sd(accuracies(records, f"{name} bfloat16"))]
        cells += [keras_accuracy(tutorial), *fit_cells(by_recipe.get(name))]
        lines.append(f"| {' | '.join(cells)} |")
    seeds = sorted({len(accuracies(records, name)) for name in records["tutorials"]})
    machine = runs_of(records, next(iter(records["tutorials"])))[0]
    note = (
        f"Mean ± standard deviation of {'–'.join(map(str, seeds))} seeds (Keras: 4) on the 10,000 test digits; "
        f"{machine['machine']}. The last column: the time of an epoch divided by Keras's, in float32 and in bfloat16."
    )
    return "\n".join([*lines, "", note])


def fit_cells(row):
    """Seconds of a fit in float32 and in bfloat16, and what part of Keras's time an epoch takes."""
    if row is None:
        return ["–", "–", "–"]
    precisions = ("float32", "bfloat16")
    seconds = [sum(row["seconds"][each][: row["fit"]]) if each in row["seconds"] else None for each in precisions]
    parts = [row["ratios"].get(f"{each} / keras") for each in precisions]
    shown = [f"{part['median']:.2f}" for part in parts if part]
    return [*(f"{value:.1f}" if value else "–" for value in seconds), ", ".join(shown) or "–"]


def table(records):
    """The table of scripts/README.md, with each tutorial's name and the figure that it prints."""
    heads = ["recipe", "tutorial", "parameters", "test accuracy, %", "in bfloat16, %"]
    heads += ["Keras on TensorFlow, %", "the tutorial prints"]
    lines = [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
    for name, tutorial in records["tutorials"].items():
        cells = [f"`{name}`", tutorial["title"], f"{runs_of(records, name)[0]['metrics']['parameters']:,}"]
        cells += [mean_sd(accuracies(records, name)), mean_sd(accuracies(records, f"{name} bfloat16"))]
        cells += [keras_accuracy(tutorial), tutorial["prints"] or "–"]
        lines.append(f"| {' | '.join(cells)} |")
    machine = next(iter(records["runs"].values()))
    note = f"On {machine['machine']}, torch {machine['versions']['torch']}. {records['about']}"
    return "\n".join([*lines, "", note])
