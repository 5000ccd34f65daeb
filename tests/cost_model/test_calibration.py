"""The fitting code: it finds what it was given, and it regenerates what is shipped."""

import random
from pathlib import Path

import pytest

import backends
from backends.profile_files import load_profile
from sagellm.cost_model.factory import make_step_cost_model
from sagellm.models.known_models import load_model
from sim.calibration.__main__ import main
from sim.calibration.fit_report import region_errors
from sim.calibration.host_fit import fit_host
from sim.calibration.measured_steps import MeasuredRequest, MeasuredStep, read_requests, read_steps
from sim.calibration.regression import fit_relative, hat_weights
from sim.calibration.step_fit import StepFit, fit_steps, padded

DATA = Path(__file__).parents[2].parent / "shared" / "data" / "h200"
PREFIX = "vllm-0.22.1_qwen2.5-7b"
TRUTH = StepFit(
    schedule_base_us=50.0,
    schedule_seq_us=5.0,
    decode_base_us=(5000.0, 5050.0, 5200.0, 5300.0, 5500.0, 6200.0, 7500.0, 8300.0),
    decode_context_us=(0.018, 0.014, 0.0135, 0.0125),
    mixed_base_us=(6500.0, 6800.0, 7000.0, 8500.0, 12500.0, 22000.0, 41000.0, 80000.0, 165000.0),
    token_pair_us=0.0006,
    mixed_context_us=0.04,
)


def data_file(name: str) -> Path:
    path = DATA / f"{PREFIX}_{name}.csv"
    if not path.exists():
        pytest.skip(f"measured data is not at hand: ../shared/data/h200/{path.name}")
    return path


def made_step(num_seqs: int, context: int, chunks: tuple[tuple[int, int], ...], factor: float) -> MeasuredStep:
    step = MeasuredStep("made", 0, 1, num_seqs, context, chunks, steady=not chunks)
    schedule_us = 50 + 5 * step.num_seqs
    if chunks:
        rest_us = TRUTH.mixed_us(step.num_tokens, step.num_token_pairs, context)
    else:
        rest_us = TRUTH.decode_us(num_seqs, context)
    duration_us = round(schedule_us + rest_us * factor)
    return MeasuredStep("made", schedule_us, duration_us, num_seqs, context, chunks, steady=not chunks)


def test_the_fit_finds_known_constants_through_outliers() -> None:
    rng = random.Random(5)
    steps = []
    for batch in (1, 4, 16, 32, 64, 128, 192, 256):
        for context in (128, 1024, 4096):
            for _ in range(6):
                factor = 50.0 if rng.random() < 0.03 else 1 + rng.gauss(0, 0.003)
                steps.append(made_step(batch, batch * context, (), factor))
    for size in (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192):
        for decodes in (0, 8):
            for computed in (0, 2000):
                chunks = ((size - decodes, computed),) if size > 8 else ((size, computed),)
                context = 20_000 * decodes
                steps += [made_step(decodes, context, chunks, 1 + rng.gauss(0, 0.003)) for _ in range(4)]
    fit = fit_steps(steps)
    assert fit.decode_base_us == pytest.approx(TRUTH.decode_base_us, rel=0.01)
    # At batch 1 even 4096 tokens of context are 1.5 % of the step, so its slope is the least certain.
    assert fit.decode_context_us[0] == pytest.approx(TRUTH.decode_context_us[0], rel=0.15)
    assert fit.decode_context_us[1:] == pytest.approx(TRUTH.decode_context_us[1:], rel=0.05)
    assert fit.mixed_base_us[1:] == pytest.approx(TRUTH.mixed_base_us[1:], rel=0.02)
    assert fit.token_pair_us == pytest.approx(TRUTH.token_pair_us, rel=0.03)
    assert fit.mixed_context_us == pytest.approx(TRUTH.mixed_context_us, rel=0.05)
    assert fit.schedule_seq_us == pytest.approx(5.0)


def test_outliers_get_next_to_no_weight() -> None:
    rows = [[1.0, float(x)] for x in range(1, 41)]
    targets = [100 + 3.0 * x for x in range(1, 41)]
    targets[7] *= 60
    coefficients, _ = fit_relative(rows, targets)
    assert list(coefficients) == pytest.approx([100, 3], rel=1e-3)


def test_hat_weights_rebuild_a_line() -> None:
    knots = (1, 4, 16, 64)
    for point in (1, 2, 4, 10, 63, 64):
        assert sum(w * k for w, k in zip(hat_weights(point, knots), knots, strict=True)) == pytest.approx(point)
    assert hat_weights(500, knots) == [0, 0, 0, 1]


def test_padding_is_that_of_the_engine() -> None:
    assert [padded(size) for size in (1, 3, 5, 9, 250, 257, 512, 513)] == [1, 4, 8, 16, 256, 272, 512, 513]


def alone(start_us: float, step_us: float, num_output_tokens: int) -> MeasuredRequest:
    first_us = start_us + 20_000
    return MeasuredRequest(start_us, first_us, first_us + step_us * (num_output_tokens - 1), 400, num_output_tokens)


def test_the_hosts_base_is_what_lone_decodes_save() -> None:
    run = [alone(i * 1e6, TRUTH.decode_us(1, 450) - 700, 101) for i in range(5)]
    assert fit_host(TRUTH, [run]).base_us == pytest.approx(700, abs=5)


def test_a_run_without_lone_decodes_is_refused() -> None:
    run = [alone(0.0, 5000, 200), alone(10.0, 5000, 200)]
    with pytest.raises(ValueError, match="decodes alone"):
        fit_host(TRUTH, [run])


def test_the_shipped_profiles_are_what_the_code_makes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["fit", "--steps", str(data_file("steps"))]
    for run in ("online_conv_16", "online_code_6"):
        arguments += ["--online", str(data_file(run))]
    fitted, family = tmp_path / "fitted.json", tmp_path / "family.json"
    assert main([*arguments, "--out", str(fitted), "--family-out", str(family)]) == 0
    shipped = Path(backends.__file__).parent / "cuda" / "profiles"
    assert fitted.read_text() == (shipped / "h200_vllm-0.22.1-qwen2.5-7b.json").read_text()
    assert family.read_text() == (shipped / "h200_vllm-0.22.1.json").read_text()
    assert "mixed, 4097-8192 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "limit"), [("h200/vllm-0.22.1-qwen2.5-7b", 0.03), ("h200/vllm-0.22.1", 0.04)])
def test_steady_decodes_and_full_steps_are_close_to_measured(name: str, limit: float) -> None:
    steps = read_steps(data_file("steps"))
    cost_model = make_step_cost_model(load_profile(name), load_model("Qwen/Qwen2.5-7B"))
    errors = {error.region: error for error in region_errors(cost_model, steps)}
    for region, error in errors.items():
        if region.startswith("decode, batch") and "changed" not in region:
            assert error.median_absolute < limit, region
    assert abs(errors["mixed, 4097-8192 tokens"].mean) < 0.01
    assert errors["prefill, 513-4096 tokens"].median_absolute < 0.01


def test_the_first_call_that_compiled_did_not_enter() -> None:
    steps = read_steps(data_file("steps"))
    assert max(step.duration_us for step in steps if not step.chunks) > 290_000
    assert fit_steps(steps).decode_us(1, 128) == pytest.approx(5361, rel=0.02)


def test_the_host_constants_come_out_of_one_run_as_out_of_two() -> None:
    fit = fit_steps(read_steps(data_file("steps")))
    conversation, code = (read_requests(data_file(name)) for name in ("online_conv_16", "online_code_6"))
    one, two = fit_host(fit, [conversation]), fit_host(fit, [conversation, code])
    assert one.base_us == pytest.approx(two.base_us, rel=0.05)
    assert one.seq_us == pytest.approx(two.seq_us, rel=0.15)


def test_bad_files_end_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header = "case,step,start_s,schedule_us,duration_us,num_decode_seqs,decode_context_tokens,prefill_chunks\n"
    path = tmp_path / "steps.csv"
    out = tmp_path / "out.json"
    for content, words in (
        ("a,b\n1,2\n", "column case is missing"),
        (header + "x,0,0.0,10,many,1,1,\n", "line 2: invalid literal"),
        (header + "x,0,0.0,10,20,1,1,5@\n", "line 2: invalid literal"),
    ):
        path.write_text(content)
        assert main(["fit", "--steps", str(path), "--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
        assert not out.exists()
