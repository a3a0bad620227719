"""The records' tables and pictures, from results/records.json, which scripts/tables makes of outputs/records."""

import json
import statistics
from pathlib import Path

from scipy.stats import t

RESULTS = Path(__file__).resolve().parents[1] / "results"
RECORDS = RESULTS / "records.json"
SEEDS = {  # how many of each recipe, in the README's order
    "speed_99": 20,
    "speed_99_gpu": 10,
    "speed_99_5": 20,
    "speed_99_7": 10,
    "speed_99_7_gpu": 10,
    "record_single": 10,
    "record_ensemble": 5,
}
# Test digits, counted from 0, of which raters dispute the label.
DISPUTED = [947, 1621, 1901, 2130, 2462, 2597, 2654, 3520, 3558, 5937, 6651, 6783, 8527, 9679, 9729]
CURVES, MISSED = RESULTS / "records_curves.png", RESULTS / "records_missed.png"
NOTHING = "Not recorded yet."


def recorded():
    return json.loads(RECORDS.read_text()) if RECORDS.exists() else {}


def collected(folder):
    """What scripts/records has written in a folder, by recipe: runs and ablation by seed, temperature and curves."""
    found = {}
    for file in folder.glob("*/calibration.json"):
        place = file.parent
        runs = {path.stem.removeprefix("seed_"): json.loads(path.read_text()) for path in place.glob("seed_*.json")}
        found[place.name] = {"calibration": json.loads(file.read_text()), "runs": in_order(runs)}
    for place in sorted(folder.glob("*/ablation/*")):
        runs = {path.stem.removeprefix("seed_"): json.loads(path.read_text()) for path in place.glob("seed_*.json")}
        keys = ("accuracy", "accuracy_tta_1", "accuracy_tta_5", "error")
        about = {key: {name: run[name] for name in keys if name in run} for key, run in in_order(runs).items()}
        found.setdefault(place.parents[1].name, {}).setdefault("ablation", {})[place.name] = about
    return found


def in_order(runs):
    return {key: runs[key] for key in sorted(runs, key=int)}


def update(found):
    """Record what was found; a recipe's parts that are not among it stay as they are."""
    records = recorded()
    for name, parts in found.items():
        records[name] = {**records.get(name, {}), **parts}
    if records:
        RECORDS.write_text(json.dumps(records, ensure_ascii=False, indent=1) + "\n")


def percents(runs, key):
    return [100 * run[key] for run in runs.values() if key in run]


def mean_sd(values):
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


def interval(values):
    """The 95 % interval of the mean by Student's t."""
    if len(values) < 2:
        return "–"
    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values) - half:.3f} to {statistics.mean(values) + half:.3f}"


def median(runs, *keys):
    return statistics.median(sum(run[key] for key in keys) for run in runs.values())


def seconds_of(runs):
    return f"{median(runs, 'train_seconds'):.2f} + {median(runs, 'test_seconds'):.2f}"


def in_yardsticks(runs):
    """The time in B, each run by what B was just after it."""
    each = [(r["train_seconds"] + r["test_seconds"]) / r["yardstick"] for r in runs.values() if "yardstick" in r]
    return f"{statistics.median(each):.2f}" if each else "–"


def claim(records, name):
    """The header line of a recipe's YAML."""
    if not records.get(name, {}).get("runs"):
        return ""
    runs = records[name]["runs"]
    seconds = median(runs, "train_seconds", "test_seconds")
    run = next(iter(runs.values()))
    return (
        f"# Measured: test accuracy {mean_sd(percents(runs, 'accuracy'))} % (mean ± sd of {len(runs)}) "
        f"in {seconds:.2f} s (median) on {run['machine']}, {run['precision']}; scripts/tables."
    )


def accuracy_table(records):
    lines = [
        "| recipe | runs | test accuracy, % | 95 % interval of the mean | lowest–highest | without 15 disputed digits "
        "| parameters | epochs | seconds: training + scoring | in B | 10⁹ multiply-adds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, runs in of_runs(records):
        run, values = next(iter(runs.values())), percents(runs, "accuracy")
        networks = f" in {run['members']}" if run["members"] > 1 else ""
        adds = median(runs, "training_multiply_adds", "scoring_multiply_adds") / 1e9
        cells = [f"`{name}`", len(runs), mean_sd(values), interval(values), f"{min(values):.2f}–{max(values):.2f}"]
        cells += [mean_sd(percents(runs, "accuracy_undisputed")), f"{run['parameters']:,}{networks}"]
        cells += [
            run["epochs"],
            seconds_of(runs),
            in_yardsticks(runs),
            f"{adds:,.0f}",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def of_runs(records):
    """The recipes that have runs, in the README's order, and those runs."""
    names = [name for name in SEEDS if name in records] + sorted(records.keys() - set(SEEDS))
    return [(name, records[name]["runs"]) for name in names if records[name].get("runs")]


def calibration_table(records):
    lines = [
        "| recipe | temperature | negative log-likelihood, before → after "
        "| expected calibration error, before → after |",
        "| --- | --- | --- | --- |",
    ]
    for name, runs in of_runs(records):
        cells = [
            f"{statistics.mean(run[key] for run in runs.values()):.4f} → "
            f"{statistics.mean(run[f'calibrated_{key}'] for run in runs.values()):.4f}"
            for key in ("loss", "calibration_error")
        ]
        found = next(iter(runs.values()))["temperature"]
        lines.append(f"| `{name}` | {found:.3f} | {' | '.join(cells)} |")
    return lines


def ablation_table(records):
    lines = ["| recipe | changed | runs | validation accuracy, % | difference |", "| --- | --- | --- | --- | --- |"]
    for name, parts in records.items():
        if "all" not in parts.get("ablation", {}):
            continue
        whole = parts["ablation"]["all"]
        rows = {part: percents(runs, "accuracy") for part, runs in parts["ablation"].items()}
        for title, key in {"without test-time augmentation": "tta_1", "with tta=5": "tta_5"}.items():
            if (scores := percents(whole, f"accuracy_{key}")) not in ([], rows["all"]):
                rows[title] = scores
        first = statistics.mean(rows["all"])
        for part, values in sorted(rows.items(), key=lambda row: row[0] != "all"):
            failed = len(parts["ablation"].get(part, whole)) - len(values)
            shown = [mean_sd(values), f"{statistics.mean(values) - first:+.3f}"] if values else ["–", "–"]
            shown[0] += f" ({failed} diverged)" if failed else ""
            title = "–" if part == "all" else part
            lines.append(
                f"| `{name}` | {title} | {len(values) + failed} | {shown[0]} | {shown[1] if title != '–' else ''} |"
            )
    return lines


def conditions_table(records):
    """What the recipes' clocks depend on."""
    heads = ["recipe", "precision", "machine", "threads"]
    heads += ["matrix products in this precision, 10⁹ operations a second", "torch"]
    lines = [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
    for name, runs in of_runs(records):
        run, rates = next(iter(runs.values())), [run["product_rate"] for run in runs.values() if "product_rate" in run]
        rate = f"{statistics.median(rates):,.0f}" if rates else "not measured"
        cells = [run["precision"], run["machine"], run["threads"], rate, run["versions"]["torch"]]
        lines.append(f"| `{name}` | {' | '.join(map(str, cells))} |")
    return lines


def front_table(records):
    """The table of README.md."""
    lines = [
        "| recipe | runs | test accuracy, % | lowest–highest | parameters | epochs | seconds: training + scoring |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, runs in of_runs(records):
        run, values = next(iter(runs.values())), percents(runs, "accuracy")
        networks = f" in {run['members']}" if run["members"] > 1 else ""
        cells = [f"`{name}`", len(runs), mean_sd(values), f"{min(values):.2f}–{max(values):.2f}"]
        cells += [f"{run['parameters']:,}{networks}", run["epochs"], seconds_of(runs)]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def sections(records):
    """The text of each section of scripts/README.md."""
    if not of_runs(records):
        return dict.fromkeys(("records", "calibration", "conditions", "ablations"), NOTHING)
    pictures = {CURVES: "Validation accuracy by epoch", MISSED: "The test digits that the record misses most often"}
    shown = [f"![{text}](results/{path.name})" for path, text in pictures.items() if path.exists()]
    ablated = any("ablation" in parts for parts in records.values())
    return {
        "records": "\n\n".join(["\n".join(accuracy_table(records)), *shown]),
        "calibration": "\n".join(calibration_table(records)),
        "conditions": "\n".join(conditions_table(records)),
        "ablations": "\n".join(ablation_table(records)) if ablated else NOTHING,
    }


def draw():
    """The validation curves of all recipes, and the test digits that the best of them misses most often."""
    import os

    from matplotlib.figure import Figure

    from mnist_cnn.data.datasets import load
    from mnist_cnn.inference.plots import INK, image_grid

    records = recorded()
    figure = Figure(figsize=(7, 4))
    axes = figure.add_axes((0.11, 0.13, 0.86, 0.8))
    for name, _ in of_runs(records):
        curves = records[name]["calibration"]["curves"]
        curves = [row for row in curves if len(row) == len(curves[0])]  # an ensemble's may be of several recipes
        means = [100 * statistics.mean(values) for values in zip(*curves, strict=True)]
        axes.plot(range(1, len(means) + 1), means, marker="o", markersize=3, label=name)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="epoch", ylabel="validation accuracy, %", ylim=(97.5, 100), title="Learning curves of the records")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(CURVES, dpi=90)

    name, runs = max(of_runs(records), key=lambda each: statistics.mean(percents(each[1], "accuracy")))
    counts = {}
    for run in runs.values():
        for index in run["incorrect"]:
            counts[index] = counts.get(index, 0) + 1
    often = sorted(counts, key=lambda index: (-counts[index], index))[:30]
    test = load("mnist", os.environ.get("MNIST_CNN_DATA", "data"))[1]
    labels = [
        f"{index}{' *' if index in DISPUTED else ''}\n{int(test.labels[index])}, {counts[index]} of {len(runs)}"
        for index in often
    ]
    title = f"Test digits that {name} misses: index (* disputed), label, how many of its runs"
    image_grid(title, [test.images[index, 0].numpy() for index in often], labels, 10, MISSED, **INK)
    return 0
