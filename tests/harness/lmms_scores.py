"""What lmms-eval itself makes of answers, run in its own environment: cases as JSON on stdin, one figure for each on stdout.

A case: the file of a task's own code and its function that scores, the document, the answer; or, without a file, an answer and a target
for its `exact_match`.
"""

import copy
import importlib.util
import json
import sys
from functools import cache
from pathlib import Path

import lmms_eval
from lmms_eval.api.metrics import exact_match_hf_evaluate


@cache
def module(name: str):
    spec = importlib.util.spec_from_file_location(name.replace("/", "_"), Path(lmms_eval.__file__).parent / f"tasks/{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def score(case) -> float:
    if case["module"] is None:
        options = {"ignore_case": True, "ignore_punctuation": True}
        return float(exact_match_hf_evaluate([case["answer"]], [case["target"]], **options)["exact_match"])
    found = getattr(module(case["module"]), case["function"])(copy.deepcopy(case["document"]), [case["answer"]])
    first = next(iter(found.values()))
    if "bbox" in first if isinstance(first, dict) else False:
        return module(case["module"]).compute_iou(first["bbox"], first["pred"])
    return float(first["score"] if isinstance(first, dict) else first)


print(json.dumps([score(case) for case in json.load(sys.stdin)]))
