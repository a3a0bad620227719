"""The READMEs: their commands, scripts, links, names and keys are those of the package."""

import ast
import os
import re
import shlex
import subprocess
from pathlib import Path

import hydra
import pytest
import yaml
from conftest import CONF, REPOSITORY
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper  # the sweeper of -m has no public name
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from mnist_cnn.config.architecture import Architecture, Block, Dense
from mnist_cnn.config.schema import validated
from mnist_cnn.config.settings import OWNED_TRAINER_KEYS
from mnist_cnn.runs.hydra_app import SCHEMAS, plain_job

PACKAGE = REPOSITORY / "mnist_cnn"
ROOMS = ["config", "runs", "pictures", "data", "models", "inference", "training", "search"]
VERBS = ["train", "evaluate", "predict", "export", "draw", "import", "sweep"]
READMES = {
    str(path.relative_to(REPOSITORY)): path.read_text()
    for path in (REPOSITORY / folder / "README.md" for folder in ("", "conf", "mnist_cnn", "scripts"))
    if path.is_file()
}
FRONT, SETTINGS, LAYOUT = READMES["README.md"], READMES["conf/README.md"], READMES["mnist_cnn/README.md"]
GROUPS = {path.name: path for path in CONF.iterdir() if path.is_dir() and path.name != "hydra"}
GROUPS["hydra/launcher"] = CONF / "hydra" / "launcher"


def fenced(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def inline(text: str) -> list[str]:
    """What stands in `backticks`, outside blocks."""
    outside = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return re.findall(r"`([^`\n]+)`", outside)


COMMANDS = [
    pytest.param(
        line, id=f"{name.removesuffix('README.md').rstrip('/') or 'front'}: {line.partition('  #')[0].strip()}"
    )
    for name, text in READMES.items()
    for block in fenced(text, "bash")
    for line in block.splitlines()
    if line.strip() and not line.startswith(("#", " ", "export "))
]


# --- commands ------------------------------------------------------------------------------------------------


@pytest.fixture
def own_folders(tmp_path, monkeypatch):
    """The folders of YAML files that the commands name: those that are written out in READMEs, and a study's."""
    monkeypatch.chdir(tmp_path)
    for block in fenced(SETTINGS, "yaml") + fenced(LAYOUT, "yaml"):
        path = Path(re.match(r"# (my_conf/\S+\.yaml)\n", block)[1])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block)
    best = Path("outputs/sweep/study/experiment/best.yaml")
    best.parent.mkdir(parents=True)
    best.write_text("# @package _global_\nseed: 2\n")
    return tmp_path


def check(name: str, words: list[str]) -> int:
    """Compose and check a command's run, or the first and the last job of its sweep; how many jobs it has."""
    overrides, flags = [], []
    for word in words:
        (flags if flags[-1:] == ["--config-dir"] or word.startswith("-") else overrides).append(word)
    if "--config-dir" in flags:
        folder = Path(flags[flags.index("--config-dir") + 1])
        assert folder.is_dir()
        overrides.append(f"hydra.searchpath=[file://{folder.absolute()}]")
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        jobs = [overrides]
        if "-m" in flags:
            overrides = [word for word in overrides if not word.startswith("multirun.resume=")]
            parsed = OverridesParser.create(GlobalHydra.instance().config_loader()).parse_overrides(overrides)
            jobs = BasicSweeper.split_arguments(parsed, None)[0]
        for job in jobs[:: max(1, len(jobs) - 1)]:
            config = hydra.compose(name, list(job), return_hydra_config=True)
            validated(SCHEMAS[name], plain_job(config))
    return len(jobs)


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_is_one_that_runs(own_folders, line):
    name, *words = shlex.split(re.sub(r"<(\w+)>", r"\1", line), comments=True)
    if name == "pip":
        extra = re.search(r"\[(.+)\]", words[-1])
        assert extra is None or f"\n{extra[1]} = [" in (REPOSITORY / "pyproject.toml").read_text()
    elif name.startswith("scripts/") and name not in ("scripts/train", "scripts/predict"):
        assert os.access(REPOSITORY / name, os.X_OK), name
    else:
        jobs = check(name.replace("scripts/", "mnist-").removeprefix("mnist-"), words)
        assert jobs == 9 or "all nine combinations" not in line


def test_the_first_commands_are_the_ones_that_a_newcomer_types(run, digit):
    lines = fenced(FRONT, "bash")[0].splitlines()
    first = [line.partition("#")[0].strip() for line in lines]
    assert first == ["scripts/predict images=photo.jpg", "scripts/train data=digits", "scripts/train", "scripts/test"]
    assert run("mnist-predict", f"images={digit}").status == 0
    ended = run("mnist-train", *first[1].split()[1:], "epochs=1", "plots=false")
    assert ended.status == 0, ended


@pytest.mark.parametrize("verb", ["mnist-evaluate", "mnist-predict"])
def test_a_run_is_evaluated_and_used_as_the_readme_has_it(run, trained, digit, verb):
    line = next(line for line in FRONT.splitlines() if line.startswith(verb))
    words = shlex.split(line.replace("outputs/train/<run>", str(trained)), comments=True)
    ended = run(*[f"images={digit.parent}" if word == "images=folder" else word for word in words])
    assert ended.status == 0, ended


def test_the_error_in_the_readme_is_the_one_that_comes(run):
    command, shown = re.search(r"\$ mnist-train (.*)\n\s+(error: .*)\n", FRONT).groups()
    assert run("mnist-train", command).err.strip() == shown


# --- Python --------------------------------------------------------------------------------------------------


def test_the_python_lines_run(trained, tmp_path, monkeypatch):
    import numpy as np

    monkeypatch.chdir(tmp_path)
    code = fenced(FRONT, "python")[0].replace("outputs/train/<run>", str(trained))
    names = {"images": np.full((4, 28, 28), 9, np.uint8)}
    exec(code.replace('"epochs=3"', '"epochs=1", "plots=false"'), names)
    assert names["run"].metrics["epochs"] == 1


def test_the_lightning_script_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(fenced(FRONT, "python")[1], names)
    assert names["trainer"].callback_metrics["test/accuracy"] > 0.8
    test = names["data"].test
    predicted = names["classifier"].predict(test.images)
    right = sum(label == str(int(expected)) for label, expected in zip(predicted, test.labels, strict=True))
    assert right / len(predicted) == pytest.approx(float(names["trainer"].callback_metrics["test/accuracy"]), abs=1e-6)


def test_what_the_readme_has_of_ones_own_runs_as_it_stands(run, tmp_path, monkeypatch, digit):
    section = LAYOUT[LAYOUT.index("## Of your own") :]
    for name, content in re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", section, flags=re.DOTALL):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "folder").symlink_to(digit.parent)
    export, *lines = fenced(section, "bash")[0].splitlines()
    assert export == "export PYTHONPATH=."
    for line in lines:
        ended = run(*shlex.split(line), *(["plots=false"] if "predict" not in line else []))
        assert ended.status == 0, ended
    assert len(lines) == 4


# --- words, links and names ----------------------------------------------------------------------------------


def test_the_front_page_is_short():
    text = re.sub(r"<!--.*?-->", "", FRONT)
    assert len([word for word in text.split() if re.search(r"\w", word)]) <= 1500


@pytest.mark.parametrize("name", READMES)
def test_every_link_leads_somewhere(name):
    text = READMES[name]
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if not target.startswith("http"):
            assert not path or (REPOSITORY / name).parent.joinpath(path).exists(), target
            assert path or anchor in slugs, target


@pytest.mark.parametrize("name", READMES)
def test_every_file_that_is_named_is_there(name):
    known = {"conf", "scripts", "mnist_cnn", "tests", *ROOMS}
    for word in inline(READMES[name]):
        path = word.split()[0]
        if re.fullmatch(r"[\w./-]+", path) and (path.endswith(".py") or ("/" in path and path.split("/")[0] in known)):
            places = [(REPOSITORY / name).parent, REPOSITORY, PACKAGE]
            assert any((place / path).exists() for place in places) or path == "data/", path


def test_the_layout_names_every_module():
    listing = re.search(r"(?:^ {4}.*\n)+", LAYOUT, flags=re.MULTILINE)[0]
    named, room = set(), ""
    for line in listing.splitlines():
        if found := re.match(r" {4}(?:(\w+)/)? +(\w+)  ", line):
            room = found[1] or room
            named.add(f"{room}/{found[2]}.py")
    files = {str(path.relative_to(PACKAGE)) for path in PACKAGE.glob("*/*.py") if path.name != "__init__.py"}
    assert named == {file for file in files if not file.startswith("conf/")}
    assert set(re.findall(r"\w+\.py", listing)) == {f"{verb}.py" for verb in VERBS}


def test_the_layout_names_functions_and_classes_that_are_there():
    sources = "\n".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    for word in inline(LAYOUT):
        if re.fullmatch(r"[A-Za-z_]+(\.[a-z_]+)*", word) and not re.fullmatch(r"mnist-.*|.*\.(py|toml|yaml)", word):
            assert re.search(rf"\b{word.split('.')[-1]}\b", sources), word


def test_a_folder_imports_only_from_folders_above_it():
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mnist_cnn."):
                other = node.module.split(".")[1]
                if room in ROOMS:
                    assert other in ROOMS[: ROOMS.index(room) + 1], f"{path} imports {node.module}"
                    assert {room, other} != {"data", "models"}, f"{path} imports {node.module}"
                else:
                    assert other in ROOMS or room == "__init__.py", f"{path} imports {node.module}"


def test_no_file_names_this_machine():
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    for file in files:
        if (REPOSITORY / file).is_file():
            assert not re.search(
                r"py[p]i[.]org|python[h]osted|/wor[k]/|/op[t]/", (REPOSITORY / file).read_text(errors="ignore")
            ), file


# --- groups and keys -----------------------------------------------------------------------------------------


def flat(value, prefix: str = "") -> dict:
    """The keys of a YAML with their values; what Hydra or a factory reads itself is left out."""
    keys = {}
    for key, each in value.items():
        if key in ("_target_", "_partial_", "defaults", "hydra") and prefix != "sampler." and prefix != "pruner.":
            continue
        keys |= flat(each, f"{prefix}{key}.") if isinstance(each, dict) and each else {f"{prefix}{key}": each}
    return keys


def option_keys(group: str, option: str) -> dict:
    content = yaml.safe_load((GROUPS[group] / f"{option}.yaml").read_text()) or {}
    return flat(content["hydra"]["launcher"] if group == "hydra/launcher" else content)


def chosen_option(group: str) -> str:
    """The option that a command has without being told."""
    defaults = yaml.safe_load((CONF / "train.yaml").read_text())["defaults"]
    return next(each[group] for each in defaults if isinstance(each, dict) and group in each)


SECTIONS = dict(re.findall(r"^#{2,3} `([\w/-]+)`\n(.*?)(?=^#{2,3} |\Z)", SETTINGS, flags=re.DOTALL | re.MULTILINE))


def tables(section: str) -> list[tuple[list[str], list[list[str]]]]:
    """Each table of a section: its header, and the cells of its rows."""
    found = re.findall(r"(?:^\|.*\n)+", SECTIONS[section], flags=re.MULTILINE)
    rows = [
        [[cell.strip() for cell in line.strip(" |").split(" | ")] for line in table.splitlines()] for table in found
    ]
    return [(table[0], table[2:]) for table in rows]


def value_of(cell: str):
    return yaml.safe_load(cell.strip("`"))


def documented(section: str) -> dict:
    """The keys of a section's table of keys, with their defaults."""
    header, rows = next(table for table in tables(section) if table[0][0] == "key")
    return {row[0].strip("`"): value_of(row[1]) if header[1] == "default" else None for row in rows}


@pytest.mark.parametrize("verb", VERBS)
def test_each_key_of_a_command_is_in_its_table_with_its_default(verb):
    keys = flat(yaml.safe_load((CONF / f"{verb}.yaml").read_text()))
    assert documented(f"mnist-{verb}") == {key: "required" if each == "???" else each for key, each in keys.items()}


@pytest.mark.parametrize("group", ["data", "accelerator", "trainer"])
def test_each_key_of_a_group_is_in_its_table_with_its_default(group):
    keys = option_keys(group, chosen_option(group))
    assert documented(group) == {f"{group}.{key}": each for key, each in keys.items()}
    for path in GROUPS[group].glob("*.yaml"):
        assert option_keys(group, path.stem).keys() <= keys.keys()


def test_each_key_of_an_architecture_is_in_its_table_with_its_default():
    assert documented("architecture").keys() == {f"architecture.{key}" for key in Architecture.model_fields}
    rows = next(rows for header, rows in tables("architecture") if header[0] == "part of")
    shown = [(row[0], row[1].strip("`"), value_of(row[2])) for row in rows]
    assert shown == [
        (part, key, "required" if field.is_required() else field.default)
        for part, schema in (("block", Block), ("dense", Dense))
        for key, field in schema.model_fields.items()
    ]


@pytest.mark.parametrize("group", sorted(GROUPS))
def test_each_option_of_a_group_is_in_its_table(group):
    assert group in SECTIONS
    options = [path.stem for path in GROUPS[group].glob("*.yaml")]
    if group in ("accelerator", "trainer"):  # their options have the same keys, or there is one
        assert all(f"`{option}`" in SECTIONS[group] for option in options)
        return
    header, rows = next(table for table in tables(group) if table[0][0] == "option")
    shown = {option: row for row in rows for option in re.findall(r"`(\w+)`", row[0])}
    assert sorted(shown) == sorted(options)
    if header[1] != "keys with their defaults":
        return
    for option, row in shown.items():
        given = {
            key: value_of(each) for key, each in (code.split("=", 1) for code in re.findall(r"`(\w[^`]*=.*?)`", row[1]))
        }
        keys = {key: each for key, each in option_keys(group, option).items() if (group, key) != ("data", "name")}
        if row[1] not in ("see below", "as `mnist`"):
            assert given == keys, option


def test_each_flag_that_a_run_owns_is_there_with_what_to_use():
    rows = next(rows for header, rows in tables("trainer") if header[0] == "flag")
    shown = [flag for row in rows for flag in re.findall(r"`(\w+)`", row[0])]
    assert sorted(shown) == sorted(OWNED_TRAINER_KEYS)


@pytest.fixture(scope="module")
def keys() -> set[str]:
    """Every key of every command and option, and what stands before a dot in one."""
    keys = {*GROUPS, "data._target_"}
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        for verb in VERBS:
            keys |= flat(OmegaConf.to_container(hydra.compose(verb))).keys()
    for group in GROUPS.keys() - {"hydra/launcher", "experiment", "sweep"}:
        for path in GROUPS[group].glob("*.yaml"):
            package = f"logger.{path.stem}" if group == "logger" else group
            keys |= {f"{package}.{key}" for key in option_keys(group, path.stem)}
    return keys | {".".join(key.split(".")[:length]) for key in keys for length in range(1, 1 + key.count("."))}


@pytest.mark.parametrize("name", READMES)
def test_no_key_is_named_that_is_not_there(keys, name):
    text = re.sub(r"^\| option \| keys with.*\n(?:\|.*\n)+", "", READMES[name], flags=re.MULTILINE)
    for word in inline(text):
        key, equals, _ = word.split()[-1].strip("'").partition("=")
        known_head = key.split(".")[0] in keys and not re.search(r"\.(py|yaml|md|csv|json|html|db)$", key)
        if key.startswith("hydra") or "$(" in word or not re.fullmatch(r"[a-z_]+(\.[a-z_]+)*", key):
            continue
        if equals or ("." in key and known_head):
            assert key in keys, word
