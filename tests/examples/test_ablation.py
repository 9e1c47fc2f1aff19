"""The comparison of methods on factworld: statistics, the file, fairness, the safe facts."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irqlora_jax.adapters import METHODS as ADAPTERS
from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.config import TrainConfig
from irqlora_jax.evaluate.choices import Question
from irqlora_jax.model.llama import Llama
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.runs.state import make_optimizer, make_state
from irqlora_jax.train.step import train_step
from tests.examples.scripts import scripts
from tests.models import WORLD, tiny_llama

pytestmark = pytest.mark.usefixtures("optimizer_promotion")


@pytest.fixture(scope="module")
def modules():
    with scripts(
        WORLD, "adapters", "ablation", "comparison", "draws", "pretrain", "world"
    ) as found:
        yield found


@pytest.fixture(scope="module")
def ablation(modules):
    return modules["ablation"]


@pytest.fixture(scope="module")
def comparison(modules):
    return modules["comparison"]


def settings(comparison, **changed):
    fields = {"base": "small", "bases": 1, "steps": 8, "rates": (1e-3, 2e-3)}
    fields |= {"tuning_seeds": 2, "questions": 128}
    return comparison.Settings(**(fields | changed))


def figures(accuracy: float, validation: float = 0.5) -> dict:
    subjects = {"people": accuracy, "places": accuracy}
    scores = {"accuracy": accuracy, "by_subject": subjects, "recall": 0.1, "bits_per_fact": 1.0}
    return {
        **{"entropy": 3.0, "error": 0.01, "seconds": 1.0},
        "validation": scores | {"accuracy": validation},
        "test": scores | {"loss": 2.0},
    }


# ---------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.7062), (2, 4.3027), (4, 2.7764), (9, 2.2622), (29, 2.0452)]
)
def test_quantiles_of_student(comparison, freedom, quantile):
    """Against a printed table."""
    assert comparison.student(freedom) == pytest.approx(quantile, abs=2e-3)


def test_difference_is_paired_by_seed(comparison):
    ours, theirs = {0: 5.0, 1: 7.0, 2: 9.0, 7: 99.0}, {2: 8.0, 1: 8.0, 0: 4.5, 3: -99.0}
    pair = comparison.difference(ours, theirs)  # 0.5, -1, 1
    assert (pair.pairs, pair.wins) == (3, 2)
    assert pair.mean == pytest.approx(1 / 6)
    deviation = np.std([0.5, -1.0, 1.0], ddof=1)
    assert pair.half == pytest.approx(4.3027 * deviation / math.sqrt(3), rel=1e-3)
    assert pair.verdict == "undecided"
    assert comparison.Difference(-2.0, 1.0, 0, 3).verdict == "worse"
    assert comparison.Difference(2.0, math.nan, 1, 1).verdict == "undecided"


def test_rate_is_chosen_by_validation_alone(comparison):
    """Mean over the tuning seeds; the test, other seeds and half-tried rates have no say."""
    results = {}
    for rate, seeds in ((1e-3, (0.5, 0.7)), (2e-3, (0.6, 0.6)), (4e-3, (0.9,))):
        for seed, validation in enumerate(seeds):
            run = comparison.Run("qlora", "nf3", seed, rate)
            results[run] = figures(accuracy=rate * 100, validation=validation)
    results[comparison.Run("qlora", "nf3", 2, 2e-3)] = figures(0.9, validation=1.0)
    results[comparison.Run("icq", "nf3", 0, 2e-3)] = figures(0.9, validation=1.0)
    chosen = settings(comparison)
    assert comparison.chosen_rate(results, chosen, "qlora", "nf3") == 1e-3  # the lower of equals
    assert comparison.chosen_rate(results, chosen, "qlora", "nf4") is None


# ------------------------------------------------------------------------------------ the file


def test_file_survives_a_kill_in_the_middle_of_a_line(comparison, tmp_path):
    file, chosen = tmp_path / "new" / "results.jsonl", settings(comparison)
    assert comparison.resume(file, chosen) == {}
    runs = [comparison.Run("plain", "nf3", 0, None), comparison.Run("qlora", "nf3", 0, 1e-3)]
    comparison.runs_file.append(file, runs[0], figures(0.5))
    whole = file.read_bytes()
    for torn in ('{"method": "ql', json.dumps({"method": "qlora"})):
        file.write_bytes(whole + torn.encode())
        assert list(comparison.read(file)[1]) == runs[:1]
        assert comparison.resume(file, chosen) == {runs[0]: figures(0.5)}
        assert file.read_bytes() == whole
    comparison.runs_file.append(file, runs[1], figures(0.6))
    assert comparison.read(file) == (chosen, {runs[0]: figures(0.5), runs[1]: figures(0.6)})
    file.write_bytes(b'{"sett')
    assert comparison.resume(file, chosen) == {}


def test_file_of_other_settings_is_refused(comparison, tmp_path):
    file = tmp_path / "results.jsonl"
    comparison.resume(file, settings(comparison))
    with pytest.raises(ValueError, match=r"steps = 8, not 9: expected the same"):
        comparison.resume(file, settings(comparison, steps=9))
    with file.open("a") as out:
        out.write("{}\n")
    with pytest.raises(ValueError, match="line 2 is not a run"):
        comparison.read(file)


def test_report_of_an_unfinished_file(comparison):
    """One seed, one rate, no reference: there is less to say, and that is no error."""
    results = {comparison.Run("plain", "nf3", 0, None): figures(0.4)}
    assert "| nf3 | plain | 1 | - | - | 40.0 |" in comparison.markdown(
        settings(comparison), results
    )
    for seed in (0, 1):
        for place, method in enumerate(("qlora", "icq")):
            run = comparison.Run(method, "nf3", seed, 1e-3)
            results[run] = figures(0.5 + 0.1 * seed + 0.02 * place)
    text = comparison.markdown(settings(comparison), results)
    assert "| nf3 | icq | 2 | - | (0.001) | 57.0 ± 7.1 | +2.00 [+2.00, +2.00] | 2/2 |" in text
    assert "Order, nf3: icq 57.0, qlora 55.0, plain 40.0." in text
    assert "| nf3 | icq - qlora | +2.00 [+2.00, +2.00] | better |" in text


def test_plot(comparison, tmp_path):
    pytest.importorskip("matplotlib")
    results = {
        comparison.Run(method, format, seed, 1e-3): figures(0.5 + place / 10 + seed / 20)
        for format in ("nf3", "int2")
        for place, method in enumerate(("icq", "qlora"))
        for seed in (0, 1)
    }
    comparison.plot(settings(comparison), results, tmp_path / "plot.svg")
    assert "icq" in (tmp_path / "plot.svg").read_text()


# ------------------------------------------------------------------------------------ fairness


def test_plan_tries_all_rates_on_the_first_seeds(ablation, comparison):
    chosen, results = settings(comparison), {}
    names, formats = ["full", "full+lora", "plain", "qlora"], ["nf4", "nf3"]
    methods = {name: ablation.METHODS[name] for name in names}
    for run in ablation.plan(chosen, methods, formats, 3, results):
        assert run not in results
        results[run] = figures(0.5, validation=0.7 if run.rate == 2e-3 else 0.5)
    counts = {(m, s): 0 for m in methods for s in range(3)}
    for run in results:
        counts[run.method, run.seed] += 1
        assert (run.format == "none") == run.method.startswith("full")
    # One for each format, where there are formats; one for each rate, where rates are tried.
    assert [counts["full", s] for s in range(3)] == [1, 1, 1]
    assert [counts["full+lora", s] for s in range(3)] == [2, 2, 1]
    assert [counts["plain", s] for s in range(3)] == [2, 2, 2]
    assert [counts["qlora", s] for s in range(3)] == [4, 4, 2]
    assert {run.rate for run in results if run.seed == 2} == {None, 2e-3}


def test_entities_are_disjoint(ablation, modules):
    tokenizer = ablation.hf.load_tokenizer(WORLD / "base-small")
    data = ablation.load_data(tokenizer)

    def entities(items):
        prompts = [i.prompt if isinstance(i, Question) else tuple(i.tokens.tolist()) for i in items]
        return {prompt[6:8] for prompt in prompts}

    train, validation, test = map(entities, (data.train, data.validation, data.test))
    assert not train & validation and not train & test and not validation & test
    assert not entities(data.loss) & (train | validation)
    assert len(data.validation) + len(data.test) == 4096
    assert abs(len(data.validation) / 4096 - 1 / 3) < 0.02


def test_each_method_differs_in_what_its_name_says(ablation):
    """Each row but for one thing is another; those of the paper are there in this version."""
    methods = ablation.METHODS
    for method in methods.values():  # the library knows all fields and their values
        QuantConfig(**({"format": "nf3"} | dict(method.quant)))
        AdapterConfig(**dict(method.adapter or {}))
    assert methods["icq"].quant == methods["ir-qlora"].quant != methods["qlora"].quant
    assert methods["iec"].adapter == methods["ir-qlora"].adapter != methods["qlora"].adapter
    assert (methods["u1"].frozen, methods["u2"].frozen) == (("beta2",), ("beta1",))


def test_adapters_have_about_equal_numbers_of_parameters(modules):
    """Only QA-HiRA cannot: its matrix shrinks by whole factors."""
    base, config = modules["ablation"].hf.load_base(WORLD / "base-small", None)
    counts = {}
    for name, method in modules["adapters"].METHODS.items():
        if method.adapter is not None:
            model = Llama(config, adapter=method.adapter_config())
            new = jax.eval_shape(lambda: model.init_adapters(jax.random.key(0), None, base))  # noqa: B023
            counts[name] = sum(leaf.size for leaf in jax.tree.leaves(new))
    assert counts["qlora"] == 40_960
    assert counts.pop("qahira") == 53_248
    assert all(abs(count / 40_960 - 1) < 0.08 for count in counts.values()), counts
    assert {
        method.adapter["method"]
        for method in modules["adapters"].METHODS.values()
        if method.adapter
    } == set(ADAPTERS)


def test_lora_plus_speeds_up_what_the_method_names(ablation, tiny):
    config, base, batches = tiny
    method = ablation.Method({}, {"method": "lora"}, lora_plus_ratio=16.0)
    model = Llama(config, adapter=method.adapter_config())
    adapters = model.init_adapters(jax.random.key(0))
    trained, speeds = ablation.masks(adapters, method, method.adapter_config())
    assert (leaves(trained, "lora_A") == 1).all() and (leaves(trained, "lora_B") == 1).all()
    assert (leaves(speeds, "lora_A") == 1).all() and (leaves(speeds, "lora_B") == 16).all()
    # At the first step Adam moves every element by the rate, whatever the gradient.
    train = TrainConfig(steps=1, batch_size=4, compute_dtype="float32", remat=False)
    first = {name: each[:1] for name, each in batches.items()}
    given = (base, adapters, first, jnp.float32(1e-3), trained, speeds)
    moved, _ = ablation.finetune(*given, model=model, config=train)
    np.testing.assert_allclose(leaves(moved, "lora_B"), 16e-3, rtol=1e-3)


@pytest.fixture(scope="module")
def tiny(modules):
    """A model of one layer, a base for it, and batches of 5 steps."""
    config = tiny_llama(num_hidden_layers=1)
    base = modules["pretrain"].initial_base(jax.random.key(0), config)
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, config.vocab_size, (5, 4, 6), np.int32))
    return config, base, {"tokens": tokens, "targets": jnp.ones(tokens.shape, bool)}


def tuned(ablation, tiny, method: str, frozen: tuple[str, ...]):
    config, base, batches = tiny
    model = Llama(config, adapter=AdapterConfig(method=method, rank=4, alpha=8.0))
    adapters = model.init_adapters(jax.random.key(1))
    own = ablation.Method({}, {"method": method}, frozen)
    trained, speeds = ablation.masks(adapters, own, model.adapter)
    train = TrainConfig(steps=5, batch_size=4, compute_dtype="float32", remat=False)
    return ablation.finetune(
        *(base, adapters, batches, jnp.float32(1e-2), trained, speeds), model=model, config=train
    )


def leaves(adapters, name: str) -> np.ndarray:
    found = jax.tree_util.tree_leaves_with_path(adapters)
    return np.array([np.abs(leaf).max() for path, leaf in found if path[-1].key == name])


def test_frozen_scalars_have_no_effect(ablation, tiny):
    """U1 alone trains beta1; with both frozen, IEC is LoRA, in the norm that clips too."""
    (lora, lora_losses), (none, none_losses), (u1, _) = (
        tuned(ablation, tiny, *how)
        for how in (("lora", ()), ("iec", ("beta1", "beta2")), ("iec", ("beta2",)))
    )
    assert (leaves(u1, "beta2") == 0).all() and (leaves(u1, "beta1") > 0).all()
    assert (leaves(none, "beta1") == 0).all() and (leaves(none, "beta2") == 0).all()
    np.testing.assert_allclose(none_losses, lora_losses, rtol=1e-5)
    for name in ("lora_A", "lora_B"):
        np.testing.assert_allclose(leaves(none, name), leaves(lora, name), rtol=1e-3)


def test_finetune_is_that_of_the_library(ablation, tiny):
    """With nothing frozen: step by step what `irqlora train` does, its clipping included."""
    config, base, batches = tiny
    model = Llama(config, adapter=AdapterConfig(method="iec", rank=4, alpha=8.0))
    train = TrainConfig(
        steps=5, batch_size=4, compute_dtype="float32", remat=False, learning_rate=1e-2
    )
    optimizer = make_optimizer(train)
    state = make_state(model.init_adapters(jax.random.key(1)), optimizer, jax.random.key(0))
    step = jax.jit(
        lambda s, b: train_step(s, base, b, model=model, optimizer=optimizer, config=train)
    )
    losses, norms = [], []
    for number in range(5):
        state, metrics = step(state, {name: each[number] for name, each in batches.items()})
        losses.append(metrics["loss"])
        norms.append(metrics["grad_norm"])
    assert max(norms) > train.clip_norm  # or clipping would not be seen
    ours, our_losses = tuned(ablation, tiny, "iec", ())
    np.testing.assert_allclose(our_losses, losses, rtol=1e-5)
    for name in ("lora_A", "lora_B", "beta1", "beta2"):
        expected = leaves(state.adapters, name)
        np.testing.assert_allclose(leaves(ours, name), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.long
def test_prepared_weights_are_the_packed_ones(ablation, modules, tiny):
    """The float weights that runs compute with give the logits of the QTensors."""
    config, base, batches = tiny
    quant = QuantConfig(format="nf3", block_size=8, calibration="icq")
    packed = modules["draws"].quantized(base, quant)
    start = ablation.prepare(base, config, quant, None, None, jax.random.key(0))
    forward, tokens = jax.jit(Llama(config).apply), batches["tokens"][0]
    logits = [forward({"base": each}, tokens) for each in (packed, start.base)]
    np.testing.assert_allclose(*logits, rtol=1e-5, atol=1e-5)
    assert 1.5 < start.entropy < 3 and 0.01 < start.error < 0.1


# ------------------------------------------------------------------------------------ all of it


@pytest.mark.long
def test_small_run_resumes_and_fewer_bits_are_worse(ablation, comparison, tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")  # main sets it, for good
    command = ["--small", "--steps", "10", "--questions", "512", "--rates", "1e-3"]
    command += ["--methods", "full", "plain", "qlora", "--formats", "nf4", "nf3", "nf2"]
    command += ["--output", str(tmp_path)]
    ours, made, kill_at = ablation.Bench.run, [], 9

    def run(self, run):
        if len(made) == kill_at:
            raise KeyboardInterrupt
        made.append(run)
        return ours(self, run)

    monkeypatch.setattr(ablation.Bench, "run", run)
    with pytest.raises(KeyboardInterrupt):
        ablation.main(command)
    before = (tmp_path / "results.jsonl").read_text()
    assert before.count("\n") == 1 + 9
    kill_at = None
    ablation.main(command)
    after = (tmp_path / "results.jsonl").read_text()
    assert after.startswith(before)
    assert len(made) == len(set(made)) == 2 * (1 + 3 + 3)
    found, results = comparison.read(tmp_path / "results.jsonl")
    assert list(results) == made and found.bases == 1

    for seed in range(2):
        accuracy = [results[comparison.Run("full", "none", seed, None)]["test"]["accuracy"]]
        errors = [0.0]
        for name in ("nf4", "nf3", "nf2"):
            plain = results[comparison.Run("plain", name, seed, None)]
            accuracy.append(plain["test"]["accuracy"])
            errors.append(plain["error"])
            qlora = results[comparison.Run("qlora", name, seed, 1e-3)]
            assert qlora["error"] == plain["error"] and qlora["entropy"] == plain["entropy"]
            assert qlora["trained"] == 40_960
            assert qlora["test"]["loss"] < plain["test"]["loss"]  # ten steps teach the format
        assert accuracy == sorted(accuracy, reverse=True) and len(set(accuracy)) == 4
        assert errors == sorted(errors) and len(set(errors)) == 4
    one, other = (results[comparison.Run("plain", "nf3", seed, None)] for seed in range(2))
    assert one["error"] != other["error"]  # seeds differ in their blocks

    monkeypatch.setattr(ablation.Bench, "run", None)
    (tmp_path / "report.md").unlink()
    ablation.main(["--report", "--output", str(tmp_path)])
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    for bits in (4, 3, 2):
        assert f"## {bits} bits" in text and f"Order, nf{bits}: " in text


@pytest.mark.long
@pytest.mark.parametrize("name", ["nf3", "nf2"])
def test_least_error_beats_plain(ablation, comparison, monkeypatch, tmp_path, name):
    untuned = ablation.Method(ablation.METHODS["error"].quant, None)
    monkeypatch.setitem(ablation.METHODS, "untuned", untuned)
    bench = ablation.Bench(settings(comparison, questions=512), None, tmp_path)
    plain, error = (
        bench.run(comparison.Run(method, name, 0, None)) for method in ("plain", "untuned")
    )
    assert error["error"] < 0.8 * plain["error"]
    assert error["test"]["accuracy"] > plain["test"]["accuracy"]
