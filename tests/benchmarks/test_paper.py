"""benchmarks/paper: commands that parse, published numbers that add up, a page that is current, rows made once."""

import json
import random
import shlex
import sys
from pathlib import Path

import pytest
import typer
from tiny_models import TEXT, save_tiny

import pairquant
from pairquant.cli import app
from pairquant.cli.method_options import number_or_word
from pairquant.evaluation.reasoning import Answers
from pairquant.evaluation.results import AnswerResults, Evaluation, ModelSpeed, SpeedResults, TaskResults
from pairquant.evaluation.speed import Speed, Workload
from pairquant.evaluation.tasks import Metric
from pairquant.spec.options import QuantConfig
from pairquant.spec.recipe import recipe_with
from pairquant.support.errors import ConfigError

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from paper import experiments, page, problems, reproduce, rows

BENCHMARKS = experiments.ROOT / "benchmarks"
COMMANDS = typer.main.get_command(app).commands
WORK = Path("work")


def case(table, model, recipe, **others):
    return experiments.Case(model, experiments.MODELS[model], recipe, WORK, **others)


def planned():
    """Every command of every table, model and recipe, once."""
    found = {}
    for table, experiment in experiments.EXPERIMENTS.items():
        for model in experiment.models:
            for recipe in experiment.recipes:
                for step in experiments.plan(experiment, case(table, model, recipe)):
                    found[step.command] = step
        found |= {script: None for script in experiment.scripts}
    return list(found)


def test_each_table_has_a_command():
    for name, experiment in experiments.EXPERIMENTS.items():
        assert experiment.steps or experiment.scripts, name
        assert bool(experiment.models) == bool(experiment.steps), name


def test_our_commands_parse_and_ask_for_what_exists():
    checked = set()
    for command in planned():
        if command[0] == "pairquant":
            given = COMMANDS[command[1]].make_context(command[1], list(command[2:])).params
            checked.add(command[1])
            if command[1] == "quantize":
                recipe = recipe_with(given["preset"], given["setting"] or ())
                group_size = int(given["group_size"])
                QuantConfig(
                    given["preset"], given["bits"], group_size, number_or_word(given["rotations"]), recipe=recipe
                )
    assert checked == {"quantize", "eval", "bench", "report"}


def test_benchmarks_that_are_called_exist_and_know_the_options():
    scripts = [command for command in planned() if command[0] == "python"]
    assert scripts
    for _, script, *options in scripts:
        text = (BENCHMARKS.parent / script).read_text()
        if "from experiment import" in text:  # some options are those of all experiments
            text += (BENCHMARKS / "experiment.py").read_text()
        for option in options:
            assert not option.startswith("--") or f'"{option}"' in text, f"{script} has no {option}"


def test_the_papers_recipe_is_the_papers():
    quantize = case("perplexity", "llama-3-8b", "paper").quantize()[0].command
    assert shlex.join(quantize) == (
        "pairquant quantize meta-llama/Meta-Llama-3-8B --output work/llama-3-8b-paper/model --group-size 128 --preset paper "
        "--samples 2048 --seq-len 2048 --calibration wikitext2 --calibration c4 --calibration redpajama --validation pileval"
    )
    large = shlex.join(case("perplexity", "llama-3-70b", "paper").quantize()[0].command)
    assert "--samples 1024" in large
    assert "--set training.batch=8 --set training.transform_rate=0.025" in large
    evaluated = experiments.perplexity(case("perplexity", "llama-2-7b", "original"))[0].command
    assert evaluated[:3] == ("pairquant", "eval", "meta-llama/Llama-2-7b-hf")
    assert evaluated[evaluated.index("--seq-len") + 1] == "4096"
    assert evaluated[evaluated.index("--bos") + 1] == "never"  # the convention of published perplexities


def test_other_calibration_text_replaces_all_of_the_papers():
    command = case("perplexity", "qwen3-4b-base", "paper", calibration=("a.txt", "b.txt")).quantize()[0].command
    assert "redpajama" not in command
    assert "pileval" not in command
    assert [command[i + 1] for i, part in enumerate(command) if part == "--calibration"] == ["a.txt", "b.txt"]


def test_published_numbers_name_their_source_and_known_rows():
    for name, table in page.PUBLISHED["tables"].items():
        assert set(table) == {"of", "source", "rows"}
        assert name in experiments.EXPERIMENTS
        assert table["source"] in page.PUBLISHED["sources"]
        for row in table["rows"]:
            assert row.get("model", "llama-3-8b") in experiments.MODELS
            assert row.get("recipe", "paper") in experiments.EXPERIMENTS[name].recipes or "recipe" not in row
            assert row["values"]
            assert all(type(value) in (int, float) and value > 0 for value in row["values"].values())
            assert "model" not in row or set(row["values"]) <= set(page.METHODS)
    for source in page.PUBLISHED["sources"].values():
        assert set(source) == {"title", "url", "note"}


@pytest.mark.parametrize("averages", page.PUBLISHED["averages"], ids=lambda averages: averages["of"])
def test_published_numbers_have_the_published_averages(averages):
    for method, average in averages["values"].items():
        rows_of = [row for table in averages["tables"] for row in page.PUBLISHED["tables"][table]["rows"]]
        values = [row["values"][method] for row in rows_of]
        assert abs(sum(values) / len(values) - average) <= 0.0501, method


def test_the_page_is_current():
    assert page.PAGE.read_text() == page.render(), "run: python benchmarks/paper/reproduce.py page"


def test_the_page_shows_rows_once_they_are_there(tmp_path):
    for file in (BENCHMARKS / "results").glob("*.json*"):
        (tmp_path / file.name).symlink_to(file)
    assert page.render(tmp_path).count("7.1234") == 0
    row = rows.key(case("perplexity", "llama-3-8b", "best")) | {"numbers": {"C4": 7.1234}}
    rows.append("perplexity", row, tmp_path)
    line = next(line for line in page.render(tmp_path).splitlines() if line.startswith("| llama-3-8b | C4 |"))
    assert line == "| llama-3-8b | C4 | 7.10 |  |  | 7.27 |  |  |  | 7.12 |"


def test_a_finding_is_judged_by_the_numbers_shown():
    assert page.verdict(7.27, 7.41, 2) == "yes: 7.27 < 7.41"
    assert page.verdict(7.41, 7.27, 2) == "**no**: 7.41 > 7.27"
    assert page.verdict(7.271, 7.272, 2) == "equal: 7.27"
    assert page.verdict(None, 7.41, 2) == ""


@pytest.fixture
def fake(tmp_path):
    """Stands in for the commands: writes what each of them would."""
    done = []

    def run(command):
        done.append(command)
        if command[1] == "quantize":
            made = Path(command[command.index("--output") + 1]) / "config.json"
            made.parent.mkdir()  # as `pairquant quantize`, which refuses a directory that is there
        else:
            made = Path(command[command.index("--json") + 1])
        texts = {experiments.WIKITEXT2: {"tokens": 9, "perplexity": 5.7}, "c4-test": {"tokens": 9, "perplexity": 7.3}}
        made.write_text(json.dumps({"model": "m", "texts": texts, "device": "test", "versions": {"torch": "2"}}))

    return run, done


def test_a_row_is_made_once_and_finished_commands_are_not_repeated(fake, tmp_path, capsys):
    run, done = fake
    wanted = experiments.Case("qwen3-4b-base", experiments.MODELS["qwen3-4b-base"], "fast", tmp_path / "work")
    reproduce.run_case("perplexity", wanted, False, tmp_path, run)
    assert [command[1] for command in done] == ["quantize", "eval"]
    (row,) = rows.read("perplexity", tmp_path)
    assert row["numbers"] == {"WikiText2": 5.7, "C4": 7.3}
    assert row["device"] == "test"
    assert row["commands"][0].startswith("pairquant quantize Qwen/Qwen3-4B-Base --output WORK/qwen3-4b-base-fast/model")

    reproduce.run_case("perplexity", wanted, False, tmp_path, run)
    assert len(done) == 2
    assert "the row exists" in capsys.readouterr().out
    assert len(rows.read("perplexity", tmp_path)) == 1

    other = experiments.Case(wanted.name, wanted.model, "fast", wanted.work, ("a.txt",))
    reproduce.run_case("perplexity", other, False, tmp_path, run)
    assert len(done) == 4, "another text makes another model"
    assert "--calibration a.txt" in " ".join(done[2])
    assert rows.find("perplexity", "qwen3-4b-base", "fast", tmp_path) == row


def test_a_stored_row_tells_nothing_of_the_machine(fake, tmp_path):
    wanted = experiments.Case("mine", experiments.Model("/home/me/mine", 2048, "auto"), "best", tmp_path / "work")
    reproduce.run_case("perplexity", wanted, False, tmp_path, fake[0])
    (row,) = rows.read("perplexity", tmp_path)
    assert row["commands"][0].startswith("pairquant quantize MODEL --output WORK/mine-best/model --group-size auto")
    assert "/home/me" not in json.dumps(row)
    assert str(tmp_path) not in json.dumps(row)


def test_a_dry_run_prints_the_commands_and_runs_none(capsys):
    reproduce.main(["perplexity", "--model", "llama-3-8b", "--recipe", "paper", "--dry-run"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines] == [["$", "pairquant", "quantize"], ["$", "pairquant", "eval"]]
    assert "--output paper-runs/llama-3-8b-paper/model" in lines[0]


def test_a_directory_is_a_model(tmp_path, capsys):
    reproduce.main(["zero-shot", "--model", str(tmp_path), "--recipe", "fast", "--work", str(tmp_path), "--dry-run"])
    assert f"pairquant quantize {tmp_path} --output {tmp_path}/{tmp_path.name}-fast/model" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["perplexty"], "table is 'perplexty', allowed: perplexity, .*did you mean 'perplexity'"),
        (["perplexity", "--model", "llama-3-8"], "model is 'llama-3-8', allowed: .*did you mean 'llama-3-8b'"),
        (["perplexity", "--model", "all", "--recipe", "fats"], "recipe is 'fats', allowed: .*did you mean 'fast'"),
        (["loss-curves", "--model", "llama-3-8b"], "Leave out --model"),
        (["perplexity", "--recipe", "fast"], "Leave them out, or name a --model"),
        (["mmlu-pro"], "no rows in 'mmlu-pro', allowed: all, r1-distill-llama-8b"),
    ],
)
def test_what_does_not_exist_is_refused_with_what_does(arguments, expected):
    with pytest.raises(SystemExit, match=f"error: .*{expected}"):
        reproduce.main([*arguments, "--dry-run"])


def test_numbers_of_a_real_evaluation(tmp_path):
    model = save_tiny(tmp_path / "model")
    found = pairquant.evaluate(model, texts=[str(TEXT)], seq_len=32, max_tokens=64, gsm8k=None, device="cpu")
    quality = Evaluation.from_dict(found).texts[str(TEXT)]
    result = Evaluation(model="m", texts={experiments.WIKITEXT2: quality})
    assert experiments.numbers([result]) == {"WikiText2": quality.perplexity}


def test_numbers_are_percent_and_means_over_seeds():
    def answered(accuracy):
        answers = Answers(10, 5, accuracy, (0, 1), 1.0, 9.0, [])
        return Evaluation(model="m", texts={}, answers={"w/aime-24.jsonl": AnswerResults(answers, None, None)})

    assert experiments.numbers([answered(0.5), answered(0.7)]) == {"AIME-24": pytest.approx(60)}
    tasks = TaskResults({"arc_easy": {"acc": Metric(0.25, None, None)}})
    assert experiments.numbers([Evaluation(model="m", texts={}, tasks=tasks)]) == {"ARC-E": 25}
    speed = ModelSpeed(name="m", dtype="float32", rows=[Speed(1, 90.0, 9.5, 0.1)])
    benched = SpeedResults(model=speed, workload=Workload(), engine="transformers", device="a CPU")
    assert experiments.numbers([benched]) == {"tokens/s": 9.5}


def test_choices_are_shuffled_and_the_letter_stays_with_the_right_one():
    gpqa = {"Question": "Q?", "Correct Answer": "yes"} | {f"Incorrect Answer {n}": f"no {n}" for n in (1, 2, 3)}
    made = problems.problems("gpqa-diamond", [gpqa] * 20)
    assert len({problem["answer"] for problem in made}) > 1
    for problem in made:
        assert f"{problem['answer']}) yes" in problem["problem"].splitlines()
    assert made == problems.problems("gpqa-diamond", [gpqa] * 20)
    mmlu = problems.problem("mmlu-pro", {"question": "Q?", "options": ["a", "b", "c"], "answer": "C"}, random.Random(1))
    assert f"{mmlu['answer']}) c" in mmlu["problem"].splitlines()


def test_both_years_of_aime_become_problems():
    assert problems.problems("aime-24", [{"Problem": "P", "Answer": 70}]) == [{"problem": "P", "answer": "70"}]
    assert problems.problems("aime-25", [{"problem": "P", "answer": "70"}]) == [{"problem": "P", "answer": "70"}]


def test_models_must_be_there():
    with pytest.raises(ConfigError, match="a directory, a .gguf file, or"):
        experiments.model_named("nowhere/at-all")
