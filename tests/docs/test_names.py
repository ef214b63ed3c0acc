"""What pages name in `backticks` exists: groups, choices, settings, values, flags, files."""

from __future__ import annotations

import ast
import dataclasses
import enum
import re
import shlex
from collections.abc import Iterator
from functools import cache
from typing import Any, get_args, get_type_hints

import pytest

from spikingbrain_train.config.compose import groups
from spikingbrain_train.config.conversion import ConversionConfig
from spikingbrain_train.config.run import RunConfig
from tests.docs.pages import PAGES, ROOT, prose

ELSEWHERE = {
    "ATEN_CPU_CAPABILITY": "an environment variable of torch",
    "BASE": "a build argument of docker/",
    "BUDGET": "of make demo",
    "CLUSTER_ENV": "of scripts/slurm/launch.sh",
    "HEALTH_CHECK": "of scripts/slurm/launch.sh",
    "KERNELS": "a build argument of docker/",
    "MACA_SMALL_PAGESIZE_ENABLE": "of MetaX's runtime",
    "NCCL_ALGO": "an environment variable of NCCL",
    "NCCL_DEBUG": "an environment variable of NCCL",
    "ONEDNN_MAX_CPU_ISA": "an environment variable of oneDNN",
    "RANK_LOGS": "of scripts/slurm/launch.sh",
    "PYTEST_ARGS": "of make test",
    "PYTHON": "of make",
    "PYTORCH_CUDA_ALLOC_CONF": "of torch",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "an environment variable of torchrun",
    "SYSTEM_TORCH": "of scripts/setup_environment.sh",
    "USER_ID": "a build argument of docker/",
    "VENV": "of make",
    "iterations": "a variable of conf/pipeline/small.yaml",
    "name": "stands for a setting",
    "pretrained": "of lm-evaluation-harness",
    "trust_remote_code": "of transformers",
    "--batch": "of scancel",
    "--build-arg": "of docker",
    "--cpus-per-task": "of sbatch",
    "--enforce-eager": "of vLLM",
    "--gpus-per-node": "of sbatch",
    "--max-restarts": "of torchrun",
    "--model_args": "of lm-evaluation-harness",
    "--no-build-isolation": "of pip",
    "--nnodes": "of torchrun",
    "--nodes": "of sbatch",
    "--nproc-per-node": "of torchrun",
    "--prefix": "of torchfrtrace",
    "--rdzv-backend": "of torchrun",
    "--rdzv-conf": "of torchrun",
    "--shm-size": "of docker",
    "--signal": "of scancel",
    "--time": "of sbatch",
    "--wait": "of sbatch",
}
"""Names that are nobody's here: whose they are."""
_OPEN = re.compile(r"\.\.\.|<[^>]*>|\b[A-Z]\b")  # a value that the reader fills in
_FILES = (".py", ".md", ".yaml", ".json", ".jsonl", ".txt", ".sh", ".lock", ".png")


def inline(page: str) -> list[str]:
    """The inline code of a page."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def words(code: str) -> list[str]:
    """Inline code as the shell would split it; code of another language, at blanks."""
    try:
        return shlex.split(code)
    except ValueError:
        return code.split()


@cache
def flags() -> set[str]:
    """Every flag that a parser of this project is given."""
    return {
        argument.value
        for folder in ("spikingbrain_train", "tools", "benchmarks", "scripts")
        for path in (ROOT / folder).rglob("*.py")
        if "add_argument" in (text := path.read_text())
        for call in ast.walk(ast.parse(text))
        if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "add_argument"
        for argument in call.args
        if isinstance(argument, ast.Constant) and str(argument.value).startswith("--")
    } | {"--help", "--cfg", "--resolve", "--hydra-help", "--config", "--multirun", "--submit", "--json"}


def field_type(schema: type, path: str) -> Any:
    """The type of a setting, None if there is none of that name."""
    first, _, rest = path.partition(".")
    found = get_type_hints(schema).get(first) if dataclasses.is_dataclass(schema) else None
    return field_type(found, rest) if rest and found is not None else found


def wrong_value(kind: Any, value: str) -> str | None:
    """Why no setting of a type takes a value; None where it does, or where that is not seen from here."""
    if _OPEN.search(value) or (value == "null" and type(None) in get_args(kind)):
        return None
    for option in get_args(kind) or (kind,):
        if isinstance(option, type) and issubclass(option, enum.Enum):
            return None if value in option.__members__ else f"choose one of {', '.join(option.__members__)}"
        if option is bool:
            return None if value in ("true", "false") else "write true or false"
        if option in (int, float):
            try:
                float(value)
            except ValueError:
                return "it takes a number"
    return None


def wrong_names(code: str) -> Iterator[str]:
    """What inline code names that does not exist."""
    for word in words(code):
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            if re.fullmatch(r"--[a-z][\w-]*", name) and name not in {*flags(), *ELSEWHERE}:
                yield f"there is no flag {name}"
            continue
        top, _, rest = name.partition(".")
        if not re.fullmatch(r"\w+(\.[a-z_]\w*)*", name) or name.endswith(_FILES) or name in ELSEWHERE:
            continue
        if equals and name in groups():
            choices = groups()[name]
            if not _OPEN.search(value) and value not in choices:
                yield f"there is no {word}; choose one of {', '.join(choices)}"
        elif equals or (rest and field_type(RunConfig, top) is not None):
            kind = next(
                (found for schema in (RunConfig, ConversionConfig) if (found := field_type(schema, name))),
                None,
            )
            if kind is None and not name.startswith("steps."):
                yield f"there is no setting {name}"
            elif equals and kind is not None and (reason := wrong_value(kind, value)):
                yield f"{word} is refused: {reason}"


@pytest.mark.parametrize("page", PAGES)
def test_settings_choices_and_flags_exist(page: str) -> None:
    wrong = [f"`{code}`: {reason}" for code in inline(page) for reason in wrong_names(code)]
    assert not wrong


def examples() -> Iterator[str]:
    """The command lines that every --help shows."""
    for path in sorted((ROOT / "spikingbrain_train").rglob("*command_line.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and "examples:\n" in node.value:
                lines = node.value.partition("examples:\n")[2].replace("\\\n", " ").splitlines()
                yield from (line.strip() for line in lines if line.startswith("  spikingbrain-"))


def test_the_examples_of_helps_name_what_exists() -> None:
    found = list(examples())
    assert len(found) > 30
    wrong = [
        f"{line}: {reason}"
        for line in found
        for reason in wrong_names(line)
        # NAME=FILE of texts, NAME=DIR of adapters and NAME=VALUE of pipelines have names of the user's.
        if not (line.startswith(("spikingbrain-bricks", "spikingbrain-pipeline")) or " --adapters " in line)
        or " no setting " not in reason
    ]
    assert not wrong


def test_all_that_is_somebody_elses_is_named() -> None:
    named = {word.partition("=")[0] for page in PAGES for code in inline(page) for word in words(code)}
    assert set(ELSEWHERE) <= named, f"no page names {', '.join(sorted(set(ELSEWHERE) - named))} any more"


@pytest.mark.parametrize(
    "code",
    [
        "parallel=tp3_pp5",
        "experiment=spikingbrain_8b_8k",
        "stage.distillation.wieght=0.3",
        "optimizer.rate",
        "precision=fp7",
        "parallel.sequence_parallel=yes",
        "optimizer.lr=fast",
        "precison=bf16",
        "tools/export.py --dtyp bfloat16",
    ],
)
def test_names_that_do_not_exist_are_found(code: str) -> None:
    assert list(wrong_names(code))


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/")])
def test_files_that_a_page_of_the_docs_names_exist(page: str) -> None:
    """From the root, from the package, or beside a file or folder that the page has named before."""
    folders, missing = [ROOT, ROOT / "spikingbrain_train"], []
    for path in re.findall(r"`([\w/.-]+(?:\.(?:py|sh|sbatch)|/))`", prose(page)):
        if found := next((folder / path for folder in folders if (folder / path).exists()), None):
            folders.append(found if found.is_dir() else found.parent)
        elif not path.startswith("my_package/"):
            missing.append(path)
    assert not missing
