"""lm-evaluation-harness runs tasks of its own making on an engine, without a network."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from eval_case import CHECKPOINT, SMALL, byte_tokenizer, silently_dense, with_program
from lm_eval.api.instance import Instance

from memcompile.compiler.cli import main
from memcompile.compiler.harness import MemcompileLM
from memcompile.evaluation.lm_eval import EngineLM
from memcompile.evaluation.protocol import ReadTooMuch
from memcompile.models.networks import bytes_llama, induction, recall

ARGUMENTS = {"path": str(CHECKPOINT), "kernels": "off"}
SCOUT = {**ARGUMENTS, "policy": "scout", **SMALL}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")


@pytest.fixture(scope="module")
def scout() -> MemcompileLM:
    return MemcompileLM(**SCOUT)


@pytest.fixture(scope="module")
def dense() -> MemcompileLM:
    return MemcompileLM(**ARGUMENTS)


PROMPTS = [recall.recall_prompt(400, recall.HELD_OUT_SEEDS + 70 + i, depth=i / 3) for i in range(4)]


def documents(**options: Any) -> dict[str, Any]:
    import datasets

    rows = [
        {
            "prompt": prompt.prompt.decode(),
            "answer": (answer := prompt.answer.decode().strip()),
            "choices": ["0000", answer],
        }
        for prompt in PROMPTS
    ]
    return {"test": datasets.Dataset.from_list(rows)}


def task(name: str, output: str, metric: str, **more: Any) -> dict[str, Any]:
    return {
        "task": name,
        "custom_dataset": documents,
        "test_split": "test",
        "output_type": output,
        "doc_to_text": "{{prompt}}",
        "target_delimiter": "",
        "metric_list": [{"metric": metric}],
        **more,
    }


def test_its_three_kinds_of_requests_are_answered(scout: MemcompileLM) -> None:
    tasks = [
        task(
            "written",
            "generate_until",
            "exact_match",
            doc_to_target="{{answer}}",
            generation_kwargs={"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
        ),
        task("chosen", "multiple_choice", "acc", doc_to_choice="{{choices}}", doc_to_target=1),
        task(
            "loss",
            "loglikelihood_rolling",
            "bits_per_byte",
            doc_to_text="",
            doc_to_target="{{prompt}}",
        ),
    ]
    found = lm_eval.simple_evaluate(model=scout, tasks=tasks, bootstrap_iters=0)["results"]
    assert found["written"]["exact_match,none"] == 1.0
    assert found["chosen"]["acc,none"] == 1.0
    assert 1.0 < found["loss"]["bits_per_byte,none"] < 3.0
    assert 0 < scout.counts.pages_read <= scout.counts.pages_allowed < scout.counts.pages_dense


def ask(model: EngineLM, kind: str, *arguments: Any) -> Any:
    return getattr(model, kind)([Instance(kind, {}, arguments, 0)])[0]


def direct(text: bytes, first: int) -> tuple[float, bool]:
    """Log-likelihood of the bytes of `text` from `first` on by the network itself."""
    network = bytes_llama.load(CHECKPOINT, torch.bfloat16)
    tokens = torch.tensor([[*text]])
    with torch.no_grad():
        logits = network(tokens)[0, first - 1 : -1].float()
    right = tokens[0, first:]
    chosen = logits.log_softmax(-1).gather(-1, right[:, None])
    return float(chosen.sum()), bool((logits.argmax(-1) == right).all())


def test_likelihoods_are_the_model_s_own(dense: MemcompileLM) -> None:
    text = PROMPTS[0].prompt + PROMPTS[0].answer
    context, continuation = text[:300].decode().rstrip(), text[300:].decode()
    context, continuation = text[: len(context)].decode(), text[len(context) :].decode()
    total, greedy = ask(dense, "loglikelihood", context, continuation)
    wanted, best = direct(text, len(context))
    # Both run in bfloat16, in other orders of summation.
    step = torch.finfo(torch.bfloat16).eps
    assert abs(total - wanted) < step * abs(wanted) and greedy is best is False
    prompt, answer = PROMPTS[1].prompt.decode(), PROMPTS[1].answer.decode().strip()
    assert ask(dense, "loglikelihood", prompt, answer)[1] is True
    whole = ask(dense, "loglikelihood_rolling", text.decode())
    wanted = direct(b"\n" + text, 1)[0]
    assert abs(whole - wanted) < step * abs(wanted)


def test_choices_of_one_context_read_it_once(scout: MemcompileLM) -> None:
    calls: list[int] = []
    prefill = scout._engine.prefill
    scout._engine.prefill = lambda tokens: calls.append(tokens.shape[1]) or prefill(tokens)  # type: ignore[method-assign, assignment, func-returns-value]
    try:
        prompt = PROMPTS[2].prompt.decode()
        requests = [Instance("loglikelihood", {}, (prompt, f"{n}000"), n) for n in range(3)]
        apart = [ask(scout, "loglikelihood", *request.args) for request in requests]
        assert len(calls) == 1 and scout.loglikelihood(requests) == apart
        assert len(calls) == 1
    finally:
        del scout._engine.prefill


def test_requests_with_nothing_to_skip_are_told_of_once(
    scout: MemcompileLM, caplog: pytest.LogCaptureFixture
) -> None:
    fresh = EngineLM(scout.contender, scout.tokens)
    ask(fresh, "loglikelihood", PROMPTS[0].prompt.decode(), "0000")
    assert "nothing about the policy" not in caplog.text
    for _ in range(2):
        ask(fresh, "loglikelihood", "x = ", "0000")
    assert caplog.text.count("such requests say nothing about the policy") == 1


def test_contexts_that_are_too_long_lose_their_beginning(
    dense: MemcompileLM, caplog: pytest.LogCaptureFixture
) -> None:
    short = EngineLM(dense.contender, dense.tokens, max_length=24)
    text = "x" * 100 + "y" * 20
    assert ask(short, "loglikelihood", text, "abcd") == ask(
        dense, "loglikelihood", "y" * 20, "abcd"
    )
    assert "cut to its last 20" in caplog.text
    long = ask(short, "loglikelihood_rolling", "abc" * 20)
    assert long < 0
    with pytest.raises(ValueError, match="does not fit into max_length=24"):
        ask(short, "loglikelihood", "a", "b" * 24)
    with pytest.raises(ValueError, match="leaves no room"):
        ask(short, "generate_until", "a", {"max_gen_toks": 24})


def test_generation_stops_where_it_is_told(dense: MemcompileLM) -> None:
    prompt, answer = PROMPTS[3].prompt.decode(), PROMPTS[3].answer.decode()
    free = ask(dense, "generate_until", prompt, {"max_gen_toks": 6})
    assert free.startswith(answer) and len(free) == 6
    digit = answer[2]
    cut = ask(dense, "generate_until", prompt, {"until": digit, "max_gen_toks": 6})
    assert cut == answer[: answer.index(digit)]
    ends = EngineLM(dense.contender, dense.tokens, end=ord("\n"))
    assert ask(ends, "generate_until", prompt, {"max_gen_toks": 6}) == answer.strip()
    assert ends.eot_token_id == ends.prefix_token_id == ord("\n")
    for sampling in ({"do_sample": True}, {"temperature": 0.7}):
        with pytest.raises(ValueError, match="greedy here"):
            ask(dense, "generate_until", prompt, sampling)


def test_a_cheat_is_found_here_too(scout: MemcompileLM, tmp_path: Path) -> None:
    cheat = EngineLM(with_program(scout.contender, silently_dense), byte_tokenizer(tmp_path))
    with pytest.raises(ReadTooMuch, match="'scout' read"):
        ask(cheat, "loglikelihood", PROMPTS[0].prompt.decode(), "1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 64}, "fields of a policy; give policy=NAME"),
        ({"policy": "scuot"}, "scuot"),
        ({"max_length": 1}, "max_length is 1"),
        ({"path": "nowhere"}, "nowhere: there is no such"),
    ],
)
def test_model_args_that_make_no_sense_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        MemcompileLM(**{**ARGUMENTS, **change})


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no tokenizer.json, which lm_eval's tasks need"):
        MemcompileLM(str(induction.save(tmp_path / "induction")), kernels="off")


@pytest.mark.long
def test_the_harness_s_own_command_line_finds_the_model(tmp_path: Path) -> None:
    assert main([str(CHECKPOINT), "--out", str(tmp_path / "engine"), "--kernels", "off"]) == 0
    rows = [{"prompt": p.prompt.decode(), "answer": p.answer.decode().strip()} for p in PROMPTS]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "local.yaml").write_text(
        "task: local\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path}/rows.json}}}}\n"
        "test_split: test\noutput_type: generate_until\n"
        'doc_to_text: "{{prompt}}"\ndoc_to_target: "{{answer}}"\ntarget_delimiter: ""\n'
        'generation_kwargs: {until: ["\\n"], max_gen_toks: 8, do_sample: false}\n'
        "metric_list: [{metric: exact_match}]\n"
    )
    command = [sys.executable, "-m", "memcompile.compiler.harness", "--model", "memcompile"]
    command += ["--model_args", f"path={tmp_path}/engine,kernels=off", "--tasks", "local"]
    command += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = (tmp_path / "out").rglob("results*.json")
    assert json.loads(found.read_text())["results"]["local"]["exact_match,none"] == 1.0


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    """datasets draws progress bars otherwise."""
    import datasets

    datasets.disable_progress_bars()
    yield
