"""`lora eval`: the same rows for base and adapter, numbers that equal their definitions, the same bytes every time."""

import json
import math
import random

import pytest
import sacrebleu
import torch

from lora_cli.errors import ExitCode, UserError
from lora_cli.run.evaluate import evaluate
from lora_cli.run.open import open_model
from lora_cli.screen import Screen
from tests import on_disk, tiny

METRICS = ["loss", "perplexity", "choice_accuracy", "exact_match", "bleu", "chrf"]
MEASURED = {"metrics": METRICS, "max_new_tokens": 6, "batch_size": 3}


@pytest.fixture
def data(tmp_path):
    """Held-out rows with two labels; the training rows are elsewhere, as they may be after training."""
    draw = random.Random(5)
    made = [
        {
            "text": "".join(draw.choices("abc def", k=draw.randint(3, 30))),
            "label": draw.choice(["good", "bad"]),
        }
        for _ in range(7)
    ]
    held_out = on_disk.rows(
        tmp_path / "test.jsonl", *made, {"text": "one", "label": "good"}, {"text": "", "label": "bad"}
    )
    return {**on_disk.PLAIN, "train": "gone.jsonl", "eval": str(held_out)}


@pytest.fixture
def base(tmp_path):
    return on_disk.model(tmp_path / "base")


@pytest.fixture
def run(tmp_path, base, data):
    return on_disk.adapter(tmp_path / "run", base, 1, data, eval=MEASURED)


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def exact_log_p(model, prompt: str, answer: str) -> float:
    """Sum of log p of the answer's tokens in float64; the tiny tokenizer has a token a byte."""
    tokenizer = tiny.tokenizer()
    before, ids = tokenizer.encode(prompt), tokenizer.encode(prompt + answer)
    with torch.no_grad():
        log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(log_p[at - 1, ids[at]].item() for at in range(len(before), len(ids)))


def test_numbers_of_both_columns_equal_their_definitions(run):
    report = evaluate(run, None, [], Screen())
    found = lines(run / "predictions.jsonl")
    assert report["rows"] == len(found) == 9
    opened = open_model([run])
    opened.language.model.double()
    for column, active in (("base", None), ("adapter", "run")):
        opened.use(active)
        nats = tokens = right = 0.0
        for line in found:
            log_p = {c: exact_log_p(opened.language.model, line["prompt"], c) for c in (" bad", " good")}
            assert line[column]["log_probabilities"] == pytest.approx(log_p, abs=1e-3)
            right += max(log_p, key=lambda c: log_p[c]) == line["answer"]
            row_nats = -exact_log_p(opened.language.model, line["prompt"], line["answer"] + "<|im_end|>")
            row_tokens = len(line["answer"]) + 1
            assert line[column]["loss"] == pytest.approx(row_nats / row_tokens, abs=1e-4)
            nats, tokens = nats + row_nats, tokens + row_tokens
        numbers = report[column]
        assert numbers["choice_accuracy"] == right / 9
        assert numbers["loss"] == pytest.approx(nats / tokens, abs=1e-4)
        assert numbers["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
        texts, references = (
            [line[column]["text"].strip() for line in found],
            [line["answer"] for line in found],
        )
        assert numbers["bleu"] == sacrebleu.corpus_bleu(texts, [references]).score
        assert numbers["chrf"] == sacrebleu.corpus_chrf(texts, [references]).score
        assert (
            numbers["exact_match"] == sum(t == r.strip() for t, r in zip(texts, references, strict=True)) / 9
        )
        low, high = numbers["choice_accuracy_interval"]
        assert low < numbers["choice_accuracy"] < high
    assert report["base"] != report["adapter"]


def test_the_base_column_is_the_model_without_adapter_to_the_bit(run, base, tmp_path):
    beside = evaluate(run, None, [], Screen())
    alone = evaluate(base, run / "recipe.yaml", [], Screen(), output=tmp_path / "alone.jsonl")
    assert alone["base"] == beside["base"]
    assert "adapter" not in alone
    without = [{k: v for k, v in line.items() if k != "adapter"} for line in lines(run / "predictions.jsonl")]
    assert lines(tmp_path / "alone.jsonl") == without


def test_twice_gives_the_same_bytes(run, tmp_path):
    first = evaluate(run, None, [], Screen(), output=tmp_path / "first.jsonl")
    state = torch.get_rng_state()
    torch.randn(3)
    second = evaluate(run / "adapter", None, [], Screen(), output=tmp_path / "second.jsonl")
    assert (tmp_path / "first.jsonl").read_bytes() == (tmp_path / "second.jsonl").read_bytes()
    assert (first["base"], first["adapter"]) == (second["base"], second["adapter"])
    torch.set_rng_state(state)


def test_a_batch_of_another_size_gives_the_same_answers(run, tmp_path):
    evaluate(run, None, [], Screen(), output=tmp_path / "a.jsonl")
    evaluate(run, None, ["eval.batch_size=1"], Screen(), output=tmp_path / "b.jsonl")
    assert lines(tmp_path / "a.jsonl") == lines(tmp_path / "b.jsonl")


def test_max_rows_takes_the_first_and_says_so(run, capsys):
    evaluate(run, None, [], Screen())
    everything = lines(run / "predictions.jsonl")
    report = evaluate(run, None, ["eval.max_rows=4", "eval.metrics=[choice_accuracy]"], Screen())
    assert report["rows"] == 4
    picked = [line["adapter"]["choice"] for line in lines(run / "predictions.jsonl")]
    assert picked == [line["adapter"]["choice"] for line in everything[:4]]
    shown = capsys.readouterr()
    assert "on 4 rows" in shown.err
    assert "95 % intervals" in shown.err
    assert shown.out == ""


def test_several_right_answers_count_for_every_metric(tmp_path, base):
    held_out = on_disk.rows(
        tmp_path / "refs.jsonl", {"text": "x", "right": ["a b", "c d e"]}, {"text": "y", "right": ["b"]}
    )
    data = {**on_disk.PLAIN, "train": "gone.jsonl", "eval": str(held_out)}
    wanted = {
        "metrics": ["exact_match", "bleu", "choice_accuracy"],
        "references": "right",
        "max_new_tokens": 3,
    }
    wanted["choices"] = ["a b", "c d e", "b"]
    run = on_disk.adapter(tmp_path / "run", base, 1, data, eval=wanted)
    report = evaluate(run, None, [], Screen())
    found = lines(run / "predictions.jsonl")
    assert [line["references"] for line in found] == [["a b", "c d e"], ["b"]]
    texts = [line["adapter"]["text"].strip() for line in found]
    expected = sacrebleu.corpus_bleu(texts, [["a b", "b"], ["c d e", None]])
    assert report["adapter"]["bleu"] == expected.score
    assert all(line["base"]["right"] == (line["base"]["choice"] in line["references"]) for line in found)


def test_texts_without_questions_have_a_loss(tmp_path, base):
    texts = ["hello there", "general", "k e"]
    held_out = on_disk.rows(tmp_path / "texts.jsonl", *({"text": text} for text in texts))
    data = {"train": "gone.jsonl", "eval": str(held_out)}
    run = on_disk.adapter(tmp_path / "run", base, 1, data)
    report = evaluate(run, None, [], Screen())
    exact = tiny.model().double()
    nats = -sum(exact_log_p(exact, text[:1], text[1:] + "<|im_end|>") for text in texts)
    assert report["base"]["loss"] == pytest.approx(nats / sum(map(len, texts)), abs=1e-4)
    assert all(math.isfinite(line["adapter"]["loss"]) for line in lines(run / "predictions.jsonl"))
    with pytest.raises(UserError) as caught:
        evaluate(run, None, ["eval.metrics=[bleu]"], Screen())
    assert caught.value.code == ExitCode.DATA


def test_chats_are_measured_behind_their_template(tmp_path, base):
    chats = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in (("sum?", "4"), ("why", "so"), ("who", "4"))
    ]
    data = {"train": "gone.jsonl", "eval": str(on_disk.rows(tmp_path / "chats.jsonl", *chats))}
    run = on_disk.adapter(tmp_path / "run", base, 1, data, eval={"metrics": ["choice_accuracy"]})
    evaluate(run, None, [], Screen())
    exact = tiny.model().double()
    for line, chat in zip(lines(run / "predictions.jsonl"), chats, strict=True):
        prompt = tiny.tokenizer().apply_chat_template(
            chat["messages"][:1], tokenize=False, add_generation_prompt=True
        )
        assert line["prompt"] == prompt
        expected = {choice: exact_log_p(exact, prompt, choice) for choice in ("4", "so")}
        assert line["base"]["log_probabilities"] == pytest.approx(expected, abs=1e-4)


def test_forgetting_is_the_loss_on_general_text_without_end_tokens(run, tmp_path, capsys):
    texts = ["the sea is calm", "x", "z" * 700]
    (tmp_path / "general.txt").write_text("\n\n".join(texts))
    report = evaluate(run, None, [f"eval.forgetting={tmp_path}/general.txt", "eval.metrics=[loss]"], Screen())
    pieces = [texts[0], "z" * 512, "z" * 188]  # one token a byte; a single one is not predicted
    assert report["general_tokens"] == sum(len(piece) - 1 for piece in pieces)
    opened = open_model([run])
    opened.language.model.double()
    for column, active in (("base", None), ("adapter", "run")):
        opened.use(active)
        nats = -sum(exact_log_p(opened.language.model, piece[:1], piece[1:]) for piece in pieces)
        assert report[column]["general_loss"] == pytest.approx(nats / report["general_tokens"], abs=1e-4)
    assert report["forgetting"] == report["adapter"]["general_loss"] - report["base"]["general_loss"]
    assert "forgetting: loss on general text" in capsys.readouterr().err


def test_general_text_may_be_rows_and_max_rows_holds_for_it(run, tmp_path):
    text = on_disk.rows(tmp_path / "general.jsonl", {"text": "one"}, {"text": "three"}, {"text": "seven"})
    wanted = [f"eval.forgetting={text}", "eval.metrics=[loss]"]
    assert evaluate(run, None, wanted, Screen())["general_tokens"] == 10
    assert evaluate(run, None, [*wanted, "eval.max_rows=2"], Screen())["general_tokens"] == 6


def test_the_base_can_be_left_out(run):
    both = evaluate(run, None, [], Screen())
    only = evaluate(run, None, [], Screen(), adapter_only=True)
    assert only["adapter"] == both["adapter"]
    assert "base" not in only
    assert all("base" not in line and "adapter" in line for line in lines(run / "predictions.jsonl"))


@pytest.mark.parametrize(
    ("overrides", "what", "where"),
    [
        (["eval.choices=[' good', ' ugly']"], "' bad' is not among the choices", "test.jsonl:"),
        (["data.eval=null"], "names no held-out rows", "data.eval"),
        (["eval.forgetting=nowhere.txt"], "no such file", "nowhere.txt"),
        (["eval.forgetting=recipes/data/chat.jsonl"], "'text'", "chat.jsonl:1"),
        (["data.format={prompt: '{text}', completion: ' {label}'}"], "the prompt is empty", "test.jsonl:9"),
        (["eval.max_new_tokens=600"], "do not fit", "max_new_tokens"),
        (["eval.max_rows=1"], "1 different", "eval.choices"),
    ],
)
def test_what_cannot_be_measured_is_said(run, overrides, what, where):
    with pytest.raises(UserError, match=what) as caught:
        evaluate(run, None, overrides, Screen())
    assert where in caught.value.where
    assert not (run / "predictions.jsonl").exists()


def test_a_model_or_a_foreign_adapter_needs_a_recipe(base, run, tmp_path):
    (run / "adapter" / "recipe.yaml").unlink()
    for path in (base, run):
        with pytest.raises(UserError, match="says what to measure") as caught:
            evaluate(path, None, [], Screen())
        assert "--recipe" in caught.value.fix


def test_a_plain_model_gets_no_file_into_its_folder(base, run):
    before = sorted(base.iterdir())
    report = evaluate(base, run / "recipe.yaml", ["eval.metrics=[loss]"], Screen())
    assert report["predictions"] is None
    assert sorted(base.iterdir()) == before


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_that_peft_wrote_has_the_loss_that_peft_computes(tmp_path, base, run):
    from peft import LoraConfig, get_peft_model

    made = get_peft_model(tiny.model(), LoraConfig(r=3, lora_alpha=9, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.copy_(
                    torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.3
                )
    made.peft_config["default"].base_model_name_or_path = str(base)
    made.save_pretrained(tmp_path / "theirs")
    report = evaluate(tmp_path / "theirs", run / "recipe.yaml", ["eval.metrics=[loss]"], Screen())
    found = lines(tmp_path / "theirs" / "predictions.jsonl")
    exact = made.double().eval()
    nats = -sum(exact_log_p(exact, line["prompt"], line["answer"] + "<|im_end|>") for line in found)
    assert report["adapter"]["loss"] == pytest.approx(nats / report["trained_tokens"], abs=1e-4)
    assert abs(report["adapter"]["loss"] - report["base"]["loss"]) > 1e-3
