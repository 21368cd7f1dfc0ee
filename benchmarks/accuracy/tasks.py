# SPDX-License-Identifier: Apache-2.0
"""Tasks of lm-evaluation-harness, stock beside the split cache, item by item.

    pip install "vllm-kcache[accuracy]"
    python -m benchmarks.accuracy.tasks MODEL --tasks offline_ruler --length 4096 --limit 50
    python -m benchmarks.accuracy.tasks MODEL --tasks gsm8k bbh_cot_fewshot triviaqa --limit 200
        --settings '{"coverage": 0.97}' '{"top_n": 64}' --model-args '{"max_model_len": 8192}'

Stock and each setting run in processes of their own over the same documents, and the answers are
paired: metrics of both, mean difference with its standard error, and the share of answers that are
the same to the letter. Only tasks that generate are taken: selection works in decode steps, and a
task that compares likelihoods of given answers is all prefill, which is exact. One row for each
engine goes to benchmarks/results/lm_eval.jsonl.

The data are the harness's affair: its cache, or the network where HF_HUB_OFFLINE=0 allows it;
--include-path names a folder with further tasks. Six of RULER's tasks are made on the spot and need
no data: `offline_ruler` stands for them. So does `extraction`, of harness/: records of a long text
as JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import rows
from benchmarks.accuracy.settings import is_stock, parse_settings
from benchmarks.rows import RESULTS, ROOT, Rows, key_of
from vllm_kcache.config import KCacheConfig

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
OWN_TASKS = Path(__file__).parent / "harness"
# Those whose needles lie in essays, and the questions on texts, need data of the network.
OFFLINE_RULER = [
    "niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe",
]  # fmt: skip
# RULER has a metric for each length; this is its value at all lengths but the document's own.
OTHER_LENGTH = -1.0


def model_arguments(
    model: str, more: dict[str, Any], setting: dict[str, Any] | None
) -> dict[str, Any]:
    """Arguments of the harness's vLLM model.

    Args:
        model: folder or name.
        more: further arguments of `vllm.LLM` or of the harness's model.
        setting: see settings.py; None is stock.

    Raises:
        ValueError: `more` names what is chosen here.
    """
    own = {"pretrained", "kv_backend", "kcache_config"} & more.keys()
    if own:
        raise ValueError(f"--model-args names {', '.join(sorted(own))}, which this command sets")
    arguments = {"pretrained": model, "enforce_eager": False, **more}
    if setting is not None and is_stock(setting):
        arguments |= setting
    elif setting is not None:
        KCacheConfig.from_user(setting)
        arguments |= {"kv_backend": "kcache", "kcache_config": setting}
    return arguments


def evaluate(spec: dict[str, Any]) -> dict[str, Any]:
    """Run one engine; in the process of that engine.

    Args:
        spec: `model_args`, `tasks`, `length`, `limit`, `num_fewshot`, `chat`, `include_path`.

    Returns:
        `samples` by task, as the harness logs them, in short.

    Raises:
        SystemExit: a task does not generate.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    # What RULER makes its documents by.
    metadata = {"pretrained": spec["model_args"]["pretrained"], "max_seq_lengths": [spec["length"]]}
    folders = [str(OWN_TASKS), *([spec["include_path"]] if spec["include_path"] else [])]
    manager = TaskManager(include_path=folders, metadata=metadata)
    groups = {"offline_ruler": OFFLINE_RULER} if "offline_ruler" in spec["tasks"] else {}
    tasks = [leaf for name in spec["tasks"] for leaf in groups.get(name, [name])]
    # RULER's documents are drawn as they are loaded, here and once more below, and some from a
    # generator that goes on from the one to the other: each engine must draw the same.
    random.seed(0)
    _refuse_likelihoods(manager, tasks)
    results = simple_evaluate(
        model="vllm",
        model_args=spec["model_args"],
        tasks=tasks,
        num_fewshot=spec["num_fewshot"],
        limit=spec["limit"],
        batch_size="auto",
        apply_chat_template=spec["chat"],
        bootstrap_iters=0,
        log_samples=True,
        task_manager=manager,
    )
    samples = {task: [_shorten(s) for s in found] for task, found in results["samples"].items()}
    return {"samples": with_groups(samples, results.get("group_subtasks", {}) | groups)}


def with_groups(
    samples: dict[str, list[dict[str, Any]]], groups: dict[str, list[str]]
) -> dict[str, list[dict[str, Any]]]:
    """Samples by task, and those of all tasks of a group together under the group's name."""

    def leaves(name: str) -> list[str]:
        if name in samples:
            return [name]
        return [leaf for part in groups.get(name, []) for leaf in leaves(part)]

    pooled = {
        group: [
            {**sample, "doc_id": f"{task} {sample['doc_id']}"}
            for task in leaves(group)
            for sample in samples[task]
        ]
        for group in groups
        if group not in samples
    }
    return {**samples, **{group: found for group, found in pooled.items() if found}}


def _refuse_likelihoods(manager: Any, tasks: list[str]) -> None:
    """Before the engine starts: loading the tasks is quick.

    Raises:
        SystemExit: a task does not generate.
    """

    def wrong_ones(loaded: dict[Any, Any]) -> list[str]:
        found = []
        for name, task in loaded.items():
            if isinstance(task, dict):  # a group
                found += wrong_ones(task)
            elif task.OUTPUT_TYPE != "generate_until":
                found.append(str(name))
        return found

    wrong = sorted(wrong_ones(manager.load_task_or_group(tasks)))
    if wrong:
        raise SystemExit(
            f"tasks {', '.join(wrong)} generate nothing: they are all prefill, which is exact"
        )


def _shorten(sample: dict[str, Any]) -> dict[str, Any]:
    """What pairing needs of a logged sample."""
    metrics = {name: float(sample[name]) for name in sample["metrics"]}
    return {
        "doc_id": sample["doc_id"],
        "prompt_hash": sample["prompt_hash"],
        "filter": sample["filter"],
        "answer": sample["resps"][0][0],
        "metrics": {
            name: value
            for name, value in metrics.items()
            if not (name.isdigit() and value == OTHER_LENGTH)
        },
    }


def paired(
    ours: dict[str, list[dict[str, Any]]], stock: dict[str, list[dict[str, Any]]]
) -> dict[str, Any]:
    """Figures of each task, under "metrics" by "metric,filter".

    Raises:
        RuntimeError: the documents or their prompts differ.
    """
    figures: dict[str, Any] = {}
    for task, found in ours.items():
        theirs = {(s["doc_id"], s["filter"], s["prompt_hash"]): s for s in stock[task]}
        mine = {(s["doc_id"], s["filter"], s["prompt_hash"]): s for s in found}
        if mine.keys() != theirs.keys():
            raise RuntimeError("stock and the split cache were not asked the same: no comparison")
        values: dict[str, list[tuple[float, float]]] = {}
        for key, sample in mine.items():
            for metric, value in sample["metrics"].items():
                pair = value, theirs[key]["metrics"][metric]
                values.setdefault(f"{metric},{sample['filter']}", []).append(pair)
        # By document, whatever the filters make of its answer.
        same = {s["doc_id"]: s["answer"] == theirs[key]["answer"] for key, s in mine.items()}
        figures[task] = {
            "items": len(same),
            "identical": sum(same.values()) / len(same),
            "metrics": {name: _compared(np.array(pairs)) for name, pairs in values.items()},
        }
    return figures


def _compared(both: np.ndarray) -> dict[str, float]:
    """Means of [documents, (ours, stock's)], and of the difference with its standard error."""
    change = both[:, 0] - both[:, 1]
    return {
        "value": float(both[:, 0].mean()),
        "stock_value": float(both[:, 1].mean()),
        "difference": float(change.mean()),
        "difference_error": float(change.std(ddof=1) / len(change) ** 0.5)
        if len(change) > 1
        else math.nan,
    }


def run_engine(spec: dict[str, Any]) -> dict[str, Any]:
    """`evaluate` in a fresh process; its output is shown as it comes.

    Raises:
        SystemExit: it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "spec.json"), Path(folder, "result.json")
        source.write_text(json.dumps(spec))
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.accuracy.tasks", "--measure", source, target],
            cwd=ROOT,
            env={**ENVIRONMENT, **os.environ},
            check=False,
        )
        if done.returncode != 0:
            raise SystemExit(f"the engine failed ({done.returncode})")
        return json.loads(target.read_text())


def run(options: argparse.Namespace, command: str) -> list[dict[str, Any]]:
    """Stock, then each setting; returns the rows."""
    spec = {
        "tasks": options.tasks,
        "length": options.length,
        "limit": options.limit,
        "num_fewshot": options.num_fewshot,
        "chat": options.chat,
        "include_path": options.include_path and str(options.include_path.resolve()),
    }
    model = str(Path(options.model).resolve()) if Path(options.model).exists() else options.model
    engines = [None, *options.settings]
    arguments = [model_arguments(model, options.model_args, setting) for setting in engines]
    found, table = [], Rows(options.results)
    stock: dict[str, Any] = {}
    for setting, model_args in zip(engines, arguments, strict=True):
        result = run_engine({**spec, "model_args": model_args})
        stock = stock or result
        of_stock = setting is not None and is_stock(setting)
        row = {
            "kind": "lm_eval",
            **rows.environment(command),
            "model": Path(options.model).name,
            "asked": options.tasks,
            **{name: spec[name] for name in ("length", "limit", "num_fewshot", "chat")},
            "model_args": {**options.model_args, **(setting if of_stock else {})},
            "kcache": None if of_stock else setting,
            "tasks": paired(result["samples"], stock["samples"]),
        }
        row["key"] = key_of(row)
        table.add(row)
        found.append(row)
        print(describe(row), flush=True)
    return found


def describe(row: dict[str, Any]) -> str:
    """A few lines for people."""
    dtype = row["model_args"].get("kv_cache_dtype")
    stock = f"stock, {dtype} cache" if dtype else "stock"
    lines = [stock if row["kcache"] is None else json.dumps(row["kcache"])]
    for task, figures in row["tasks"].items():
        for name, metric in figures["metrics"].items():
            lines.append(
                f"  {task} {name}: {metric['value']:.4f}, stock {metric['stock_value']:.4f} "
                f"({metric['difference']:+.4f} ±{metric['difference_error']:.4f}), "
                f"{figures['identical']:.1%} of {figures['items']} answers the same"
            )
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line; `settings` is a list of dicts, `model_args` a dict."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy.tasks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="folder or name of a Hugging Face model")
    parser.add_argument("--tasks", nargs="+", required=True, help="names of the harness's tasks")
    parser.add_argument("--length", type=int, default=4096, help="tokens of RULER's documents")
    parser.add_argument("--settings", nargs="+", default=["{}"], metavar="JSON")
    parser.add_argument("--model-args", default="{}", metavar="JSON", help="arguments of vllm.LLM")
    parser.add_argument("--limit", type=int, help="documents of each task; all unless given")
    parser.add_argument("--num-fewshot", type=int, help="the task's own number unless given")
    parser.add_argument("--chat", action="store_true", help="apply the model's chat template")
    parser.add_argument("--include-path", type=Path, help="folder with further tasks")
    parser.add_argument("--results", type=Path, default=RESULTS / "lm_eval.jsonl")
    options = parser.parse_args(arguments)
    try:
        options.settings = parse_settings(options.settings)
        options.model_args = json.loads(options.model_args)
        model_arguments(options.model, options.model_args, None)
    except (ValueError, AttributeError, TypeError) as error:
        parser.error(str(error))
    return options


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["--measure"]:
        result = evaluate(json.loads(Path(given[1]).read_text()))
        Path(given[2]).write_text(json.dumps(result, default=str))
        return
    run(parse(given), shlex.join(["python", "-m", "benchmarks.accuracy.tasks", *given]))


if __name__ == "__main__":
    main()
