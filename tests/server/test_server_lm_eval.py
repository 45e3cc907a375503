"""EleutherAI's lm-eval measures the model through our server, offline."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.smollm2

TASKS = Path(__file__).parent / "lm_eval_tasks"
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
