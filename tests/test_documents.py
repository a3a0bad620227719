"""The README's commands do what they say, and its figures are the recorded ones."""

import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import REPOSITORY, TUTORIALS

README = (REPOSITORY / "README.md").read_text()
COMMANDS = [
    line.partition("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    for line in block.splitlines()
    if line.startswith("mnist-") or line.startswith("scripts/train")
]


def test_the_first_commands_are_the_ones_that_a_newcomer_types():
    first = re.search(r"```bash\n(.*?)```", README, flags=re.DOTALL)[1].splitlines()
    assert [line.partition("#")[0].strip() for line in first] == [
        "scripts/train data=digits",
        "scripts/train",
        "scripts/test",
    ]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_readme_runs(run, trained, swept, digit, tmp_path, command):
    """On scikit-learn's digits, for one epoch, from a finished run's folder."""
    name, *words = shlex.split(command.replace("scripts/train", "mnist-train"))
    words = [word.replace("outputs/train/<run>", str(trained)) for word in words]
    words = [f"images={digit.parent}" if word == "images=folder" else word for word in words]
    if "outputs/sweep/<study>" in command:
        shutil.copytree(swept, tmp_path / "study")
        words = [word.replace("outputs/sweep/<study>", "study") for word in words]
    elif name == "mnist-sweep":
        words = [word for word in words if not word.startswith(("trials=", "workers=", "epochs="))]
        words += ["trials=1", "data=digits", "epochs=1"]
    if name == "mnist-train" and not any(word.startswith("resume=") for word in words):
        words = [word for word in words if not word.startswith(("data=", "epochs=", "seed=", "experiment=conv"))]
        words += [
            *(["experiment=conv10"] if "experiment=conv" in command else []),
            "data=digits",
            "epochs=1",
            "plots=false",
        ]
    words = ["probabilities=[3,40]" if word.startswith("probabilities=") else word for word in words]
    ended = run(name, *words)
    assert ended.status == 0, ended


def test_the_search_space_of_the_readme_is_one(run, tmp_path):
    (tmp_path / "own" / "sweep").mkdir(parents=True)
    (tmp_path / "own" / "sweep" / "mine.yaml").write_text(re.search(r"```yaml\n(.*?)```", README, flags=re.DOTALL)[1])
    ended = run("mnist-sweep", "--config-dir", "own", "sweep=mine", "trials=1", "data=digits", "epochs=1")
    assert ended.status == 0, ended


def test_the_python_lines_of_the_readme_run(trained, tmp_path, monkeypatch):
    import numpy as np

    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", README, flags=re.DOTALL)[1].replace("outputs/train/<run>", str(trained))
    names = {"images": np.full((4, 28, 28), 9, np.uint8)}
    exec(code, names)
    assert names["metrics"]["epochs"] == 3


def test_the_error_in_the_readme_is_the_one_that_comes(run):
    command, shown = re.search(r"\$ mnist-train (.*)\n\s+(error: .*)\n", README).groups()
    assert run("mnist-train", command).err.strip() == shown


def test_the_tables_are_the_recorded_figures():
    subprocess.run([sys.executable, REPOSITORY / "scripts" / "results", "--check"], check=True)


def test_each_recipe_is_recorded_on_five_seeds_and_as_good_as_keras():
    """Each mean above Keras's own, or within two standard errors of the difference below it."""
    records = json.loads((REPOSITORY / "scripts" / "results.json").read_text())
    for name in TUTORIALS:
        ours = [100 * records["runs"][f"{name} seed {seed}"]["metrics"]["test/accuracy"] for seed in range(1, 6)]
        mean = sum(ours) / 5
        variance = sum((value - mean) ** 2 for value in ours) / 4
        keras = records["tutorials"][name]["keras"]
        assert mean >= keras["mean"] - 2 * (variance / 5 + keras["sd"] ** 2 / 4) ** 0.5, name


def test_no_file_names_this_machine():
    files = subprocess.run(
        ["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.split()
    for file in files:
        assert not re.search(
            r"py[p]i[.]org|python[h]osted|/wor[k]/|/op[t]/", (REPOSITORY / file).read_text(errors="ignore")
        ), file
