"""
Make lm-evaluation-harness tasks of TruthfulQA's CSV file, to be run without the hub.

    python examples/truthfulqa/make_tasks.py TruthfulQA.csv tasks
    actsparse tasks DIR --tasks truthfulqa_mc1_local,truthfulqa_mc2_local --include tasks

The prompts, targets and metrics are those of the harness's own truthfulqa_mc1 and truthfulqa_mc2, of which these are
variants with other data; DIR is a folder that `actsparse sparsify` wrote.
"""

import csv
import json
import sys
from pathlib import Path

import lm_eval
import yaml

SCORE_MC2 = '''\
"""The share of probability that goes to true answers: the harness's own measure for truthfulqa_mc2."""

import numpy as np


def process_results_mc2(doc, results):
    probabilities = np.exp([likelihood for likelihood, _ in results])
    is_true = np.array(doc["mc2_targets"]["labels"]) == 1
    return {"acc": probabilities[is_true].sum() / probabilities.sum()}
'''


def read_answers(text: str) -> list[str]:
    """
    Split a cell of answers.

    :param text: Answers between semicolons.
    :return: The answers.
    """
    return [answer.strip() for answer in text.split(";") if answer.strip()]


def make_choices(true: list[str], false: list[str]) -> dict[str, list]:
    """
    Put true answers before false ones, as the harness expects them.

    :param true: True answers.
    :param false: False answers.
    :return: The choices and their labels.
    """
    return {"choices": true + false, "labels": [1] * len(true) + [0] * len(false)}


def main() -> None:
    """Read the CSV file and write the tasks."""
    source, folder = Path(sys.argv[1]), Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    with source.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    lines = []
    for row in rows:
        false = read_answers(row["Incorrect Answers"])
        targets = {
            "mc1_targets": make_choices([row["Best Answer"].strip()], false),
            "mc2_targets": make_choices(read_answers(row["Correct Answers"]), false),
        }
        lines.append(json.dumps({"question": row["Question"], **targets}))
    data = folder / "truthfulqa.jsonl"
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "score_mc2.py").write_text(SCORE_MC2)
    official = Path(lm_eval.__file__).parent / "tasks" / "truthfulqa" / "truthfulqa_mc1.yaml"
    for number in (1, 2):
        task = {
            "include": str(official),
            "task": f"truthfulqa_mc{number}_local",
            "tag": "truthfulqa_local",
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {"validation": str(data.resolve())}},
            "doc_to_choice": f"{{{{mc{number}_targets.choices}}}}",
        }
        text = yaml.safe_dump(task, sort_keys=False)
        if number == 2:
            text += "process_results: !function score_mc2.process_results_mc2\n"
        (folder / f"truthfulqa_mc{number}_local.yaml").write_text(text)
    print(f"{len(rows)} questions; tasks truthfulqa_mc1_local and truthfulqa_mc2_local in {folder}")


if __name__ == "__main__":
    main()
