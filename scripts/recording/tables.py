"""The READMEs' tables and the headers in conf/, from scripts/results/; scripts/tables is the command."""

import json
import re
import shutil
import sys
from pathlib import Path

from disturbances import studies
from recording import recipes, record_tables
from recording.record_tables import NOTHING

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "scripts" / "results"
RECIPES, CHAOS, SWEEP = RESULTS / "recipes.json", RESULTS / "chaos.json", RESULTS / "sweep.json"
BENCHMARK = RESULTS / "benchmark.json"
STUDY_PICTURE = RESULTS / "study.png"
FRONT, DETAILS = ROOT / "README.md", ROOT / "scripts" / "README.md"
PARTS = (  # of scripts/benchmark
    "tax",
    "dropout",
    "keras",
    "habit",
    "limits",
    "startup",
    "predict",
    "scale",
    "draw",
    "communication",
    "data_parallel",
    "cuda",
)


def recorded(file):
    return json.loads(file.read_text()) if file.exists() else {}


def write_json(file, content, indent=None):
    file.write_text(json.dumps(content, ensure_ascii=False, indent=indent) + "\n")


# --- recording -----------------------------------------------------------------------------------------------


def record(folder):
    """Add to scripts/results/ what is below a folder; what was measured again takes the place of what was there."""
    records = recorded(RECIPES)
    records["runs"].update(recipes.runs_in(folder, records["tutorials"]))
    if (folder / "retrain.json").exists():
        records["study"] = retrained_study(folder)
        shutil.copyfile(folder / "pictures" / "slice.png", STUDY_PICTURE)
    write_json(RECIPES, records, indent=1)
    record_tables.update(record_tables.collected(folder))
    for file in sorted(folder.glob("**/chaos.json")):
        write_json(CHAOS, json.loads(file.read_text()))
    for file in sorted(folder.glob("**/sweep.json")):
        write_json(SWEEP, {**recorded(SWEEP), **json.loads(file.read_text())})
    parts = {file.stem: json.loads(file.read_text()) for file in folder.glob("*.json") if file.stem in PARTS}
    if parts:
        write_json(BENCHMARK, {**recorded(BENCHMARK), **parts})


def retrained_study(folder):
    """The best trial of a study, and its test accuracy over seeds."""
    found = json.loads((folder / "retrain.json").read_text())
    first = next(iter(found["runs"].values()))
    about = {"mean": found["test/accuracy mean"], "sd": found["test/accuracy sd"], "seeds": len(found["runs"])}
    return {"trial": found["trial"], "again": found["again"], "val/accuracy": first["val/accuracy"], **about}


# --- texts ---------------------------------------------------------------------------------------------------


def chaos_text():
    if not (found := recorded(CHAOS)):
        return NOTHING
    seconds = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in found["undisturbed_seconds"].items())
    return (
        f"{found['table']}\n\nUndisturbed, the runs take: {seconds}; on {found['machine']}, one thread each, torch "
        f"{found['versions']['torch']}. The moments are of seed {found['seed']}."
    )


def sweep_text():
    if not (found := recorded(SWEEP)):
        return NOTHING
    return (
        f"{studies.tables(found)}\n\nscikit-learn's digits, `conv10`; on {found['machine']}, torch "
        f"{found['versions']['torch']}. The moments are of seed {found['seed']}."
    )


def study_text():
    if not (about := recorded(RECIPES).get("study")):
        return NOTHING
    return (
        f"The best is trial {about['trial']} ({100 * about['val/accuracy']:.2f} % of the validation digits), and "
        f"`retrain` gives it a test accuracy of {100 * about['mean']:.2f} ± {100 * about['sd']:.2f} % (mean ± sd of "
        f"{about['seeds']} seeds)."
    )


def benchmark_text(part):
    if not (found := recorded(BENCHMARK).get(part)):
        return NOTHING
    machine = ", ".join(f"{key} {value}" for key, value in found["machine"].items())
    return "\n".join([*found["table"], "", f"Measured on: {machine}."])


def sections():
    """The text of each section, by README and name."""
    runs, best = recorded(RECIPES), record_tables.recorded()
    fits = recorded(BENCHMARK).get("keras", {}).get("figures", [])
    return {
        FRONT: {
            "recipes": recipes.front_table(runs, fits),
            "records": "\n".join(record_tables.front_table(best)),
        },
        DETAILS: {
            "recipes": recipes.table(runs),
            **{part: benchmark_text(part) for part in PARTS},
            "chaos": chaos_text(),
            "sweep": sweep_text(),
            "study": study_text(),
            **record_tables.sections(best),
        },
    }


# --- files ---------------------------------------------------------------------------------------------------


def with_section(readme, name, text):
    """A README's text with this text between a section's marks, and whether the marks are there."""
    marks = rf"(<!-- {name}: written by scripts/tables -->\n).*?(<!-- end -->)"
    return re.subn(marks, lambda m: f"{m[1]}\n{text}\n\n{m[2]}", readme, flags=re.DOTALL)


def with_claim(yaml_text, claim):
    """A YAML's text with this line as the last of its header."""
    lines = [line for line in yaml_text.splitlines() if not line.startswith("# Measured:")]
    lines.insert(next(i for i, line in enumerate(lines) if not line.startswith("#")), claim)
    return "\n".join(lines) + "\n"


def claims():
    """The header line of each YAML that has one."""
    runs, best = recorded(RECIPES), record_tables.recorded()
    files = {}
    for name in runs["tutorials"]:
        for group in ("architecture", "experiment"):
            files[ROOT / "conf" / group / f"{name}.yaml"] = recipes.claim(runs, name)
    for name in record_tables.SEEDS:
        if claim := record_tables.claim(best, name):
            files[ROOT / "conf" / "experiment" / f"{name}.yaml"] = claim
    return files


def rendered():
    """Every file that has recorded figures as it should be, and a line for each section that it lacks."""
    files, missing = {}, []
    for readme, texts in sections().items():
        content = readme.read_text() if readme.exists() else ""
        for name, text in texts.items():
            content, found = with_section(content, name, text)
            if not found:
                place = readme.relative_to(ROOT)
                missing.append(
                    f"{place} has no <!-- {name}: written by scripts/tables --> … <!-- end --> around a table"
                )
        files[readme] = content
    files |= {file: with_claim(file.read_text(), claim) for file, claim in claims().items()}
    return files, missing


def main(arguments, usage):
    if arguments in (["--help"], ["-h"]):
        print(usage)
        return 0
    check = arguments == ["--check"]
    folders = [] if check else [Path(word) for word in arguments]
    if wrong := [str(folder) for folder in folders if not folder.is_dir()]:
        print(f"error: {wrong[0]} is no folder; see scripts/tables --help", file=sys.stderr)
        return 2
    for folder in folders:
        record(folder)
    files, missing = rendered()
    for line in missing:
        print(f"error: {line}", file=sys.stderr)
    if check:
        stale = [str(file.relative_to(ROOT)) for file, text in files.items() if file.read_text() != text]
        if stale:
            print(f"error: {', '.join(stale)}: not as recorded; run scripts/tables", file=sys.stderr)
        return int(bool(stale or missing))
    for file, text in files.items():
        if text:
            file.write_text(text)
    return int(bool(missing))
