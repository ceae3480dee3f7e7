"""dvc.yaml says what the code says: a change of code reruns the stages that import it, and no others."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grimp
import pytest
import yaml

from flows.parameters import DEFAULTS
from tests.flows.project import ROOT

GRAPH: Mapping[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
STEPS = {"baseline": "evaluation", "benchmark_base": "benchmark"}
MODULES = {name: f"tasks.{STEPS.get(name, name)}" for name in GRAPH}
SUBPROCESS = dict.fromkeys(("benchmark", "benchmark_base"), ("headwise.harness.run",))
"""What a stage runs in another environment."""
OF_THE_BENCHMARK = {"shards", "benchmarks", "benchmark_files"}
OF_THE_GRAPH = {
    "attention": {"shards"},
    "images": {"photographs"},
    "rah_lora": {"head_changes"},
    "zerotuning": {"steering_changes"},
    "masks": {"mask_weights", "shards"},
    **dict.fromkeys(("benchmark", "benchmark_base"), OF_THE_BENCHMARK),
}
"""What a stage depends on although its code does not read it from params.yaml."""
SETTINGS = {"images", "masks", "attention", "scores", "selection", "calibration", "profile", "rah_lora", "zerotuning", "evaluation"}


@pytest.fixture(scope="module")
def imports() -> grimp.ImportGraph:
    return grimp.build_graph("headwise", "tasks", cache_dir=None)


@pytest.mark.parametrize("name", GRAPH)
def test_a_stage_depends_on_exactly_the_code_that_it_imports(name: str, imports: grimp.ImportGraph) -> None:
    own = {MODULES[name], *SUBPROCESS.get(name, ())}
    needed = {_file(module) for module in own.union(*map(imports.find_upstream_modules, own))}
    deps = [dep for dep in GRAPH[name]["deps"] if dep.startswith(("headwise/", "tasks/"))]
    deps += [DEFAULTS.as_params()["source"]] if name == "images" else []
    given = {file for dep in deps for file in _python_files(ROOT / dep)}
    without_code = {file for file in given if file.name == "__init__.py"}
    assert _names(needed - given) == [], "add to dvc.yaml"
    assert _names(given - needed - without_code) == [], "remove from dvc.yaml"


@pytest.mark.parametrize("name", GRAPH)
def test_a_stage_is_given_the_parameters_that_its_code_reads(name: str) -> None:
    source = (ROOT / f"{MODULES[name].replace('.', '/')}.py").read_text(encoding="utf-8")
    read = {section for section in (*SETTINGS, "shards") if f'read_settings("{section}"' in source}
    assert {param.partition(".")[0] for param in GRAPH[name]["params"]} == read | OF_THE_GRAPH.get(name, set())


def test_a_stage_that_asks_a_model_is_given_the_form_of_its_prompts() -> None:
    for name, stage in GRAPH.items():
        fields = {param for param in stage["params"] if param.startswith("attention.")}
        assert not fields or {"attention.model", "attention.dtype", "attention.chat_template"} <= fields, name


def test_every_stage_runs_a_module_of_that_name_and_is_described() -> None:
    for name, stage in GRAPH.items():
        assert stage["cmd"].startswith(f"python -m {MODULES[name]}") and stage["desc"]
        importlib.import_module(MODULES[name])


def test_outputs_are_the_contracted_folders() -> None:
    assert {out for stage in GRAPH.values() for out in stage["outs"]} == {
        "data/images",
        "data/masks/shard=0${item.shard}",
        "data/attention/shard=0${item.shard}",
        "data/scores",
        "data/selections/${item.arm}",
        "data/profile",
        "data/gains/${item.arm}",
        "data/adapters/${item.arm}",
        "data/evaluations/${item.arm}",
        "data/evaluations/base",
        "data/benchmarks/${item.name}/${item.arm}/shard=0${item.shard}",
        "data/benchmarks/${item.name}/base/shard=0${item.shard}",
    }


def test_every_stage_that_loads_a_model_depends_on_its_weights_and_on_the_libraries() -> None:
    calibrating = {"calibration", "profile", "rah_lora", "head_gains", "zerotuning"}
    asking = {"attention", *calibrating, "evaluation", "baseline", "benchmark", "benchmark_base"}
    assert {name for name, stage in GRAPH.items() if "${weights}" in stage["deps"]} == asking
    assert {name for name, stage in GRAPH.items() if "mask_weights" in stage["params"]} == {"masks"}
    assert {name for name, stage in GRAPH.items() if "requirements.lock" in stage["deps"]} == asking | {"masks"}


def test_templates_are_data_that_a_run_depends_on() -> None:
    for name in ("images", "benchmark", "benchmark_base"):
        assert {"headwise/benchmarks", "headwise/benchmarks/texts.toml"} & set(GRAPH[name]["deps"])


def _file(module: str) -> Path:
    path = ROOT / Path(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _python_files(path: Path) -> list[Path]:
    """Files of data beside the code, which it reads as it is imported, are none."""
    return [file for file in ([path] if path.is_file() else sorted(path.rglob("*"))) if file.suffix == ".py"]


def _names(files: set[Path]) -> list[str]:
    return sorted(str(file.relative_to(ROOT)) for file in files)
